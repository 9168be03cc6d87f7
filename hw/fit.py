"""The engines for a program on a board: of those that fit, the fastest, modelled. No torch."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from m3vit.errors import InputError
from m3vit.hw.boards import BOARDS, BUDGETS, FIXED_DSP, FIXED_LUT, Board, engine_resources, resources
from m3vit.hw.cost import Assumptions, cycles_of, uniform_queues
from m3vit.hw.design import SIZES
from m3vit.hw.hardware import GROUPS, TILES_OUT, Hardware, round_up, row_unit
from m3vit.hw.isa import Experts, Instruction, Patches, Route
from m3vit.hw.ops import ENGINES, OPS, fetch, needs
from m3vit.hw.program import MAX_TOKENS

Sizes = Mapping[str, Any]  # fields of Hardware that are fixed
# Fields of instructions that cost nothing: where their tensors lie, and how numbers are shifted.
PLACES = {
    *(
        "src",
        "src_pitch",
        "dst",
        "dst_pitch",
        "hidden",
        "hidden_pitch",
        "weights",
        "params",
        "weights_step",
        "params_step",
    ),
    *("gelu_in", "gelu_out", "score_shift", "value_shift", "logit_frac", "shift", "bias_shift", "biases", "eps"),
    "pixel_pitch",
    "rescale",
}


def least_hardware(
    program: Sequence[Instruction], weight_bits: int, act_bits: int, board: Board, wide_bits: int = 32
) -> Hardware:
    """Return the smallest engines that hold a program, with the board's ports."""
    limits: dict[str, Any] = needs(program)
    least = Hardware(weight_bits, act_bits, TILES_OUT[-1], 1, 1, 1, 1, 1, 1)
    unit = row_unit(least.weight_word, least.act_word, board.port_bits)
    limits["max_in"] = round_up(limits["max_in"], unit)
    least = replace(least, port_bits=board.port_bits, wide_bits=wide_bits)
    # They divide a line of a patch and a narrow word.
    pixels = math.gcd(least.values(least.act_word), *(3 * i.patch for i in program if isinstance(i, Patches)))
    return replace(least, tile_in=unit, lanes=unit, groups=GROUPS[-1], pixels=pixels, **limits)


# Of each engine that has sizes of its own those of SIZES, beside tile_out, that its cycles and its resources depend on.
PARTS = {
    "linear": ("token_block", "weight_ports", "results", "tiles_in_lut", "gates_in_lut", "folded"),
    "attention": ("lanes", "groups", "divided", "finished_in_uram"),
    "norm": ("norm_words", "norm_in_lut"),
}


def possible(h: Hardware, board: Board) -> bool:
    """Return whether sizes go together, on this board."""
    narrow, wide = h.values(h.act_word), h.values(h.wide_bits)
    return (
        h.tile_out % narrow == 0  # a tile's results are whole words
        and h.lanes % h.tile_in == 0  # weights of a step of values are made together
        and h.divided <= narrow
        and (h.fold > 0 or not h.folded)
        and h.softmax_queries <= h.group
        and 2 * wide <= h.results <= narrow
        and h.norm_words * wide <= narrow
        and h.weight_ports < board.ports
        and (h.weight_ports == 1 or h.tile_out >= 2 * narrow)  # each port has rows of its own
        and (board.uram > 0 or not h.finished_in_uram)
    )


# And those that its cycles depend on.
TIMED = {
    "linear": ("tile_out", "token_block", "weight_ports", "results", "folded"),
    "attention": ("tile_out", "lanes", "groups", "divided"),
    "norm": ("norm_words",),
}


class Option(NamedTuple):
    """Sizes of one engine: the cycles that it takes of a frame, and what it takes of each of BUDGETS."""

    cycles: int
    takes: tuple[float, ...]
    sizes: dict[str, Any]

    @property
    def costs(self) -> tuple[float, ...]:
        return (self.cycles, *self.takes)


def unbeaten(options: Iterable[Option]) -> list[Option]:
    """Return the options that no other one is as good as in everything, fastest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: one.costs):
        if not any(all(a <= b for a, b in zip(other.costs, option.costs, strict=True)) for other in kept):
            kept.append(option)
    return kept


class Candidate(NamedTuple):
    """Sizes of all engines: the cycles of a frame, and what they take."""

    cycles: int
    takes: dict[str, int]
    sizes: dict[str, Any]


def _sized(hardware: Hardware, sizes: Sizes) -> Hardware:
    """Return what `replace` does, of which a search makes tens of thousands, in a seventh of the time."""
    found = object.__new__(Hardware)
    vars(found).update(vars(hardware), **sizes)
    return found


MOST_KNOWN = 1000
_KNOWN: dict[tuple[Any, ...], list[tuple[dict[str, float], dict[str, Any]]]] = {}


def _options(
    part: str, base: Hardware, choices: tuple[tuple[Any, ...], ...], board: Board
) -> list[tuple[dict[str, float], dict[str, Any]]]:
    """Return what an engine takes in each of the sizes that go on this board, and those; `choices`: of its own sizes.

    The same are asked for again and again: whether any fit, which are the smallest, what would fit instead.
    """
    key = (part, base, choices, board.ports, board.uram > 0)  # all that it depends on
    if key not in _KNOWN:
        of_others: dict[str, Any] = {
            "weight_ports": 1,
            "results": 2 * base.values(base.wide_bits),
            "lanes": base.tile_in,
        }
        of_others |= {"divided": 1, "finished_in_uram": False, "folded": False}
        # What other engines have must not forbid it: the least of these always goes.
        harmless = replace(base, **{name: value for name, value in of_others.items() if name not in PARTS[part]})
        found = []
        for values in product(*choices):
            sizes = dict(zip(PARTS[part], values, strict=True))
            if possible(_sized(harmless, sizes), board):
                found.append((engine_resources(ENGINES[part], _sized(base, sizes)), sizes))
        if len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = found
    return _KNOWN[key]


class Candidates:
    """The engines for a program on a board that may be the best at anything: each engine has options of its own, of
    which those that others beat in everything are left out."""

    def __init__(self, program: Sequence[Instruction], hardware: Hardware, board: Board, fixed: Sizes) -> None:
        self.board = board
        self.base = replace(hardware, uram=board.uram > 0)
        self.times = FrameTimes(program, board)
        self.choices = {name: (fixed[name],) if name in fixed else every for name, every in SIZES.items()}
        rest = [ENGINES[name] for name in ENGINES if name not in PARTS]
        self.least = {"lut": float(FIXED_LUT), "dsp": float(FIXED_DSP)}
        for engine in rest:
            for kind, count in engine_resources(engine, self.base).items():
                self.least[kind] = self.least.get(kind, 0) + count

    def options(self, part: str, tile_out: int, timed: bool = True) -> list[Option]:
        """Return the options of one engine beside an array: those that fit by themselves, or untimed all."""
        found = []
        choices = tuple(self.choices[name] for name in PARTS[part])
        base = replace(self.base, tile_out=tile_out)
        for takes, sizes in _options(part, base, choices, self.board):
            fits_alone = all(count <= BUDGETS[kind] * getattr(self.board, kind) for kind, count in takes.items())
            if not timed or fits_alone:
                cycles = self.times.part(part, _sized(base, sizes)) if timed else 0
                found.append(Option(cycles, tuple(takes[kind] for kind in BUDGETS), sizes))
        return unbeaten(found)

    def _all_options(self, tile_out: int) -> list[list[Option]]:
        """Return the options of each engine beside an array; none of any if one of them has none."""
        found = []
        for part in PARTS:
            found.append(self.options(part, tile_out))
            if not found[-1]:
                return [[]]
        return found

    def __iter__(self) -> Iterator[Candidate]:
        """Yield the engines that fit."""
        for tile_out in self.choices["tile_out"]:
            for chosen in product(*self._all_options(tile_out)):
                takes = self._together(chosen)
                if self._within(takes):
                    sizes = {name: value for option in chosen for name, value in option.sizes.items()}
                    cycles = self.times.rest_of(self.base) + sum(option.cycles for option in chosen)
                    whole = dict(zip(BUDGETS, map(math.ceil, takes), strict=True))
                    yield Candidate(cycles, whole, {"tile_out": tile_out, **sizes})

    def _together(self, chosen: Iterable[Option]) -> list[float]:
        """Return what engines take of each of BUDGETS, what has no sizes to choose included."""
        start = [self.least.get(kind, 0) for kind in BUDGETS]
        return [sum(counts) for counts in zip(start, *(option.takes for option in chosen), strict=True)]

    def _within(self, takes: Iterable[float]) -> bool:
        limits = (share * getattr(self.board, kind) for kind, share in BUDGETS.items())
        return all(math.ceil(count) <= limit for count, limit in zip(takes, limits, strict=True))

    def some_fit(self) -> bool:
        """Return whether any engines fit: from the smallest arrays on, none of them timed."""
        for tile_out in reversed(self.choices["tile_out"]):
            parts = [self.options(part, tile_out, timed=False) for part in PARTS]
            if any(self._within(self._together(chosen)) for chosen in product(*parts)):
                return True
        return False

    def smallest(self) -> Hardware | None:
        """Return the engines of the smallest sizes, whether they fit or not; None: none go together."""
        for tile_out in reversed(self.choices["tile_out"]):
            parts = [self.options(part, tile_out, timed=False) for part in PARTS]
            if all(parts):
                chosen = [min(options, key=lambda one: one.takes) for options in parts]
                sizes = {name: value for option in chosen for name, value in option.sizes.items()}
                return replace(self.base, tile_out=tile_out, **sizes)
        return None


class FrameTimes:
    """The modelled cycles of frames of a program's first task, for engines of many sizes: each part depends on some of
    them, and is counted once for those."""

    def __init__(self, program: Sequence[Instruction], board: Board) -> None:
        self.board = board
        self.known: dict[tuple[Any, ...], int] = {}
        # Equal instructions cost the same wherever they read and write; experts, with the queues of the router before.
        self.kinds: dict[tuple[Any, ...], list[Any]] = {}
        route: Route | None = None
        for i in program:
            route = i if isinstance(i, Route) else route
            of_size = tuple((name, value) for name, value in vars(i).items() if name not in PLACES)
            queue = uniform_queues(route.rows, route.n_in, route.top_k) if route and isinstance(i, Experts) else []
            entry = self.kinds.setdefault((i.op, *of_size), [i, queue, 0, i.task in (-1, 0)])
            entry[2] += 1
        self._rest: int | None = None

    def part(self, name: str, hardware: Hardware) -> int:
        """Return the cycles of an engine in a frame."""
        key = (name, *(getattr(hardware, size) for size in TIMED[name]))
        if key not in self.known:
            self.known[key] = self._count(hardware, (name,))
        return self.known[key]

    def rest_of(self, hardware: Hardware) -> int:
        """Return the cycles of all other engines, which have no sizes to choose."""
        if self._rest is None:
            self._rest = self._count(hardware, [name for name in ENGINES if name not in PARTS])
        return self._rest

    def cycles(self, hardware: Hardware) -> int:
        """Return the cycles of a frame."""
        return self.rest_of(hardware) + sum(self.part(name, hardware) for name in PARTS)

    def _count(self, hardware: Hardware, engines: Sequence[str]) -> int:
        total = 0
        for instruction, queue, count, runs in self.kinds.values():
            if OPS[instruction.op].engine in engines:
                whole = cycles_of(instruction, hardware, self.board, queue) if runs else self.fetched(hardware)
                total += count * whole
        return total

    def fetched(self, hardware: Hardware) -> int:
        """Return the cycles of an instruction of another task."""
        return fetch(hardware, Assumptions().timing)


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
    wide_bits = fixed.get("wide_bits", 32)
    hardware = least_hardware([*program, *others], weight_bits, act_bits, board, wide_bits)
    check_tokens(hardware.max_rows)
    candidates = Candidates(program, hardware, board, fixed)
    best = min(candidates, key=lambda found: found.cycles, default=None)
    if best is None:
        raise _nothing_fits(program, hardware, board, fixed)
    return replace(candidates.base, **best.sizes)


def require_fit(
    program: Sequence[Instruction], weight_bits: int, act_bits: int, board: Board, fixed: Sizes = MappingProxyType({})
) -> None:
    """Raise InputError as `fit` does if no engines for a program fit, without looking for the best."""
    hardware = least_hardware(program, weight_bits, act_bits, board, fixed.get("wide_bits", 32))
    check_tokens(hardware.max_rows)
    if not _fits_any(program, hardware, board, fixed):
        raise _nothing_fits(program, hardware, board, fixed)


def _fits_any(program: Sequence[Instruction], hardware: Hardware, board: Board, fixed: Sizes) -> bool:
    """Return whether any engines fit."""
    return Candidates(program, hardware, board, fixed).some_fit()


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
    if fixed and _fits_any(program, hardware, board, {}):
        given = ", ".join(f"{name} {value}" for name, value in fixed.items())
        smallest = Candidates(program, hardware, board, fixed).smallest()
        why = _over(smallest, board) if smallest else "sizes that do not go together, or more ports than there are"
        near = next(sizes for sizes in _nearest(fixed) if _fits_any(program, hardware, board, sizes))
        nearest = ", ".join(f"{name} {value}" for name, value in near.items())
        return InputError(f"{given} does not fit {board.name} (modelled): {why}; the nearest that fits is {nearest}")
    smallest = Candidates(program, hardware, board, {}).smallest()
    assert smallest is not None
    options = [
        f"--board {other.name}"
        for other in BOARDS.values()
        if _fits_any(program, least_hardware(program, *bits, other, hardware.wide_bits), other, {})
    ]
    if bits[0] > 8 and _fits_any(program, replace(hardware, weight_bits=8), board, {}):
        options.append("--weight-bits 8")
    advice = f"give {' or '.join(options)}" if options else "no board here holds it: give a narrower model"
    return InputError(
        f"the model does not fit {board.name} (modelled): with the smallest array ({smallest.tile_in} x "
        f"{smallest.tile_out}), inputs of {hardware.max_in} and {hardware.max_rows} tokens x top-{hardware.max_top} it "
        f"takes {_over(smallest, board)}; {advice}"
    )


def _nearest(fixed: Sizes) -> list[dict[str, Any]]:
    """Return all values of the sizes that are fixed, nearest first, in powers of two."""
    every = [dict(zip(fixed, values, strict=True)) for values in product(*(SIZES[name] for name in fixed))]
    return sorted(every, key=lambda sizes: sum(abs(math.log2((1 + sizes[name]) / (1 + fixed[name]))) for name in fixed))
