"""The engines for a program on a board: of those that fit, the fastest, modelled. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from m3vit.errors import InputError
from m3vit.hw.boards import BOARDS, BUDGETS, Board, fits, resources
from m3vit.hw.cost import lines_of
from m3vit.hw.hardware import TOKEN_BLOCKS, Hardware, round_up, row_unit
from m3vit.hw.isa import Instruction
from m3vit.hw.ops import needs
from m3vit.hw.program import MAX_TOKENS

TILES_OUT = (256, 192, 160, 128, 112, 96, 80, 64, 48, 32, 16)  # largest first
GROUPS = (512, 256, 128, 64, 32)  # of queries on chip, largest first
LANES = (64, 32, 16)  # of softmax, largest first


def least_hardware(program: Sequence[Instruction], weight_bits: int, act_bits: int, board: Board) -> Hardware:
    """Return the smallest engines that hold a program, with the board's ports."""
    limits: dict[str, Any] = needs(program)
    least = Hardware(weight_bits, act_bits, TILES_OUT[-1], 1, 1, 1, 1, 1, 1)
    unit = row_unit(least.weight_word, least.act_word, board.port_bits)
    limits["max_in"] = round_up(limits["max_in"], unit)
    return replace(least, tile_in=unit, lanes=unit, groups=GROUPS[-1], port_bits=board.port_bits, **limits)


def _sizes(hardware: Hardware, board: Board) -> Iterator[Hardware]:
    """Yield the hardware with arrays of every size; of each, blocks of tokens from the largest on, in BRAM or LUTs."""
    for tile in TILES_OUT:
        if tile % hardware.values(hardware.act_word) == 0:  # a tile's results are whole words
            for lanes in LANES:
                if lanes % hardware.tile_in == 0:  # weights of a step of values are made together
                    for groups in GROUPS:
                        for block in TOKEN_BLOCKS:
                            for in_lut in (False, True):
                                sizes: dict[str, Any] = {"tile_out": tile, "lanes": lanes, "groups": groups}
                                sizes |= {"token_block": block, "tiles_in_lut": in_lut}
                                yield replace(hardware, uram=board.uram > 0, **sizes)


def _best_of_each_array(hardware: Hardware, board: Board) -> list[Hardware]:
    """Return for each array, of what fits, the one with the largest block of tokens, but none that another exceeds."""
    found: dict[tuple[int, ...], Hardware] = {}
    for size in _sizes(hardware, board):
        key = (size.tile_out, size.lanes, size.groups, size.token_block)
        beaten = any(all(a >= b for a, b in zip(other, key, strict=True)) for other in found)
        if not beaten and fits(size, board):
            found[key] = size
    return list(found.values())


def check_tokens(tokens: int) -> None:
    """Raise InputError if an image has more tokens than the queues of experts can hold."""
    if tokens > MAX_TOKENS:
        raise InputError(
            f"the model has {tokens} tokens, and the queues of the multiplexed schedule hold {MAX_TOKENS}: give a "
            "smaller model.image_size or a larger patch"
        )


def fit(program: Sequence[Instruction], weight_bits: int, act_bits: int, board: Board) -> Hardware:
    """Return the engines that run a program's first task fastest, modelled, of those that fit the board.

    Raises InputError, with the figures and what would fit, if none does, or if there are too many tokens.
    """
    hardware = least_hardware(program, weight_bits, act_bits, board)
    check_tokens(hardware.max_rows)
    found = _best_of_each_array(hardware, board)
    if found:
        return min(found, key=lambda size: sum(line.cycles for line in lines_of(program, size, board)))
    smallest = min(_sizes(hardware, board), key=lambda size: (size.token_block, size.tile_out, size.lanes, size.groups))
    over = ", ".join(
        f"{value} {name} of {int(BUDGETS[name] * getattr(board, name))}"
        for name, value in resources(smallest).items()
        if value > BUDGETS[name] * getattr(board, name)
    )
    options = [
        f"--board {other.name}"
        for other in BOARDS.values()
        if any(fits(size, other) for size in _sizes(least_hardware(program, weight_bits, act_bits, other), other))
    ]
    if weight_bits > 8 and any(fits(size, board) for size in _sizes(replace(hardware, weight_bits=8), board)):
        options.append("--weight-bits 8")
    advice = f"give {' or '.join(options)}" if options else "no board here holds it: give a narrower model"
    raise InputError(
        f"the model does not fit {board.name} (modelled): with the smallest array ({smallest.tile_in} x "
        f"{smallest.tile_out}), inputs of {hardware.max_in} and {hardware.max_rows} tokens x top-{hardware.max_top} it "
        f"takes {over}; {advice}"
    )
