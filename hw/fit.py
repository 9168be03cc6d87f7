"""The engines for a program on a board: of those that fit, the fastest, modelled. No torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any

from m3vit.errors import InputError
from m3vit.hw.boards import BOARDS, BUDGETS, Board, fits, resources
from m3vit.hw.cost import lines_of
from m3vit.hw.design import SIZES
from m3vit.hw.hardware import GROUPS, TILES_OUT, Hardware, round_up, row_unit
from m3vit.hw.isa import Instruction
from m3vit.hw.ops import needs
from m3vit.hw.program import MAX_TOKENS

Sizes = Mapping[str, Any]  # fields of Hardware that are fixed


def least_hardware(program: Sequence[Instruction], weight_bits: int, act_bits: int, board: Board) -> Hardware:
    """Return the smallest engines that hold a program, with the board's ports."""
    limits: dict[str, Any] = needs(program)
    least = Hardware(weight_bits, act_bits, TILES_OUT[-1], 1, 1, 1, 1, 1, 1)
    unit = row_unit(least.weight_word, least.act_word, board.port_bits)
    limits["max_in"] = round_up(limits["max_in"], unit)
    return replace(least, tile_in=unit, lanes=unit, groups=GROUPS[-1], port_bits=board.port_bits, **limits)


def sizes_of(hardware: Hardware, board: Board, fixed: Sizes) -> Iterator[Hardware]:
    """Yield the hardware with engines of every size that the array allows, larger ones first, with what is fixed."""
    choices = {name: (fixed[name],) if name in fixed else every for name, every in SIZES.items()}
    for values in product(*choices.values()):
        sizes: dict[str, Any] = dict(zip(choices, values, strict=True))
        words = sizes["tile_out"] % hardware.values(hardware.act_word) == 0  # a tile's results are whole words
        together = sizes["lanes"] % hardware.tile_in == 0  # weights of a step of values are made together
        if words and together and sizes["weight_ports"] < board.ports:
            yield replace(hardware, uram=board.uram > 0, **sizes)


def fitting(hardware: Hardware, board: Board, fixed: Sizes) -> list[Hardware]:
    """Return what fits, but none that another exceeds in all that makes it faster."""
    found: dict[tuple[int, ...], Hardware] = {}
    if not _holds(hardware, board, fixed):
        return []
    for size in sizes_of(hardware, board, fixed):
        key = (size.tile_out, size.lanes, size.groups, size.token_block, size.weight_ports, size.norm_words)
        beaten = any(all(a >= b for a, b in zip(other, key, strict=True)) for other in found)
        if not beaten and fits(size, board):
            found[key] = size
    return list(found.values())


class FrameTimes:
    """The modelled cycles of frames of a program's first task, for engines of many sizes.

    Each part depends on some sizes, the rest on the words of LayerNorm alone: each is counted once for those.
    """

    def __init__(self, program: Sequence[Instruction], board: Board) -> None:
        self.program, self.board = list(program), board
        self.known: dict[tuple[Any, ...], int] = {}

    def cycles(self, hardware: Hardware) -> int:
        """Return the cycles of a frame."""
        key = (hardware.tile_out, hardware.lanes, hardware.groups)
        keys = {
            "attention": key,
            "linear": (hardware.tile_out, hardware.token_block, hardware.weight_ports),
            "": (hardware.norm_words,),
        }
        for name, sizes in keys.items():
            if (name, *sizes) not in self.known:
                lines = lines_of(self.program, hardware, self.board)
                for part, others in keys.items():
                    own = [line.cycles for line in lines if (line.engine if line.engine in keys else "") == part]
                    self.known[(part, *others)] = sum(own)
        return sum(self.known[(name, *sizes)] for name, sizes in keys.items())


def check_tokens(tokens: int) -> None:
    """Raise InputError if an image has more tokens than the queues of experts can hold."""
    if tokens > MAX_TOKENS:
        raise InputError(
            f"the model has {tokens} tokens, and the queues of the multiplexed schedule hold {MAX_TOKENS}: give a "
            "smaller model.image_size or a larger patch"
        )


def fit(
    program: Sequence[Instruction],
    weight_bits: int,
    act_bits: int,
    board: Board,
    fixed: Sizes = MappingProxyType({}),
    others: Sequence[Instruction] = (),
) -> Hardware:
    """Return the engines that run a program's first task fastest, modelled, of those that fit the board.

    fixed: sizes that are not to be chosen. others: instructions of other programs, which they must hold. Raises
    InputError, with what is over and what would fit, if none does, or if there are too many tokens.
    """
    hardware = least_hardware([*program, *others], weight_bits, act_bits, board)
    check_tokens(hardware.max_rows)
    found = fitting(hardware, board, fixed)
    if found:
        times = FrameTimes(program, board)
        return min(found, key=times.cycles)
    raise _nothing_fits(program, hardware, board, fixed)


def _size(h: Hardware) -> tuple[int, ...]:
    return h.tile_out * h.lanes * h.groups * h.token_block, h.weight_ports * h.norm_words


def _holds(hardware: Hardware, board: Board, fixed: Sizes) -> bool:
    """Return whether the smallest engines fit, wherever their memories lie: what is larger takes more."""
    sizes = list(sizes_of(hardware, board, fixed))
    least = min(map(_size, sizes), default=None)
    return any(fits(size, board) for size in sizes if _size(size) == least)


def _over(h: Hardware, board: Board) -> str:
    """Return what engines take beyond a board's budgets."""
    return ", ".join(
        f"{value} {name} of {int(BUDGETS[name] * getattr(board, name))}"
        for name, value in resources(h).items()
        if value > BUDGETS[name] * getattr(board, name)
    )


def _nothing_fits(program: Sequence[Instruction], hardware: Hardware, board: Board, fixed: Sizes) -> InputError:
    """Return the error that says what is over, and what would fit."""
    bits = (hardware.weight_bits, hardware.act_bits)
    free = fitting(hardware, board, {})
    if fixed and free:
        given = ", ".join(f"{name} {value}" for name, value in fixed.items())
        smallest = min(sizes_of(hardware, board, fixed), key=_size, default=None)
        why = _over(smallest, board) if smallest else "sizes that do not go together, or more ports than there are"
        near = min(sizes_of(hardware, board, {}), key=lambda h: (not fits(h, board), _distance(h, fixed)))
        nearest = ", ".join(f"{name} {getattr(near, name)}" for name in fixed)
        return InputError(f"{given} does not fit {board.name} (modelled): {why}; the nearest that fits is {nearest}")
    smallest = min(sizes_of(hardware, board, {}), key=_size)
    options = [
        f"--board {other.name}" for other in BOARDS.values() if _holds(least_hardware(program, *bits, other), other, {})
    ]
    if bits[0] > 8 and _holds(replace(hardware, weight_bits=8), board, {}):
        options.append("--weight-bits 8")
    advice = f"give {' or '.join(options)}" if options else "no board here holds it: give a narrower model"
    return InputError(
        f"the model does not fit {board.name} (modelled): with the smallest array ({smallest.tile_in} x "
        f"{smallest.tile_out}), inputs of {hardware.max_in} and {hardware.max_rows} tokens x top-{hardware.max_top} it "
        f"takes {_over(smallest, board)}; {advice}"
    )


def _distance(h: Hardware, fixed: Sizes) -> float:
    """Return how far sizes are from the fixed ones, in powers of two."""
    return sum(abs(math.log2((1 + getattr(h, name)) / (1 + value))) for name, value in fixed.items())
