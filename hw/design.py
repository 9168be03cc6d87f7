"""What a user fixes of the accelerator before the engines are fitted: board, part, clock, ports, sizes. No torch."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from m3vit.errors import InputError
from m3vit.files import read_json
from m3vit.hw.boards import BOARDS, Board, find_board
from m3vit.hw.hardware import (
    DIVIDED,
    GROUPS,
    LANES_CHOICES,
    NORM_WORDS,
    PORT_WIDTHS,
    RESULTS,
    TILES_OUT,
    TOKEN_BLOCKS,
    WEIGHT_PORTS,
    WIDE_BITS,
)

CLOCKS = range(50, 601)  # MHz
WRITTEN = "give a file that `m3vit hw explore --out` wrote"
BITS = ("weight_bits", "act_bits")
LAYERS = "layer_bits"  # a text: m3vit.hw.layer_bits
# Fields of Hardware that may be fixed, and what each may be.
SIZES: dict[str, tuple[Any, ...]] = {
    "tile_out": TILES_OUT,
    "lanes": LANES_CHOICES,
    "groups": GROUPS,
    "token_block": TOKEN_BLOCKS,
    "tiles_in_lut": (False, True),
    "gates_in_lut": (True, False),
    "weight_ports": WEIGHT_PORTS,
    "norm_words": NORM_WORDS,
    "norm_in_lut": (False, True),
    "results": RESULTS,
    "divided": DIVIDED,
    "folded": (False, True),
    "finished_in_uram": (True, False),
    "wide_bits": WIDE_BITS,
}
OPTIONS = {
    "array": "tile_out",
    "ports": "weight_ports",
    "residual_bits": "wide_bits",
}  # of the command line, and the sizes that they fix


@dataclass(frozen=True)
class Design:
    """A board by name, and what differs on it; sizes: those of Hardware that are fixed. None: as the board has it."""

    board: str
    part: str | None = None
    clock: int | None = None
    port_bits: int | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> Board:
        """The board with what differs."""
        board = find_board(self.board)
        changed: dict[str, Any] = {"part": self.part, "clock_mhz": self.clock, "port_bits": self.port_bits}
        return replace(board, **{name: value for name, value in changed.items() if value is not None})

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "sizes": dict(self.sizes)}


def device_of(part: str) -> str:
    """Return the device of a part, whose resources do not depend on package and speed grade."""
    return part.lower().split("-")[0]


def as_option(name: str) -> str:
    """Return a value's option."""
    return f"--{name.replace('_', '-')}"


def design_of(
    board: str | None,
    part: str | None = None,
    clock: int | None = None,
    array: int | None = None,
    port_bits: int | None = None,
    ports: int | None = None,
    residual_bits: int | None = None,
    default: str = "zcu104",
    called: Callable[[str], str] = as_option,
) -> Design:
    """Return the design of a command's options; a part alone chooses the board that has its device.

    called: what messages call each. Raises InputError for what no engine or board can do.
    """
    if part is not None:
        having = [one.name for one in BOARDS.values() if device_of(one.part) == device_of(part)]
        if not having:
            known = ", ".join(sorted({device_of(one.part) for one in BOARDS.values()}))
            raise InputError(
                f"{called('part')} {part}: what its device holds is not known here: choose a part of {known}"
            )
        if board is not None and (other := find_board(board, called("board"))).name not in having:
            raise InputError(f"{called('part')} {part}: {board} has a {other.part}: give {called('board')} {having[0]}")
        board = board or having[0]
    chosen = find_board(board or default, called("board"))
    if clock is not None and clock not in CLOCKS:
        raise InputError(f"{called('clock')} {clock}: give {CLOCKS[0]} to {CLOCKS[-1]} MHz")
    widths = [width for width in PORT_WIDTHS if width <= chosen.port_bits]
    if port_bits is not None and port_bits not in widths:
        raise InputError(f"{called('port_bits')} {port_bits}: {chosen.name} has {', '.join(map(str, widths))}")
    given = {"array": array, "ports": ports, "residual_bits": residual_bits}
    sizes = {OPTIONS[name]: value for name, value in given.items() if value is not None}
    check_sizes(sizes, {size: called(name) for name, size in OPTIONS.items()})
    return Design(chosen.name, part, clock, port_bits, sizes)


def check_sizes(sizes: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise InputError for a size that is not among SIZES; `names`: what messages call each."""
    for size, value in sizes.items():
        if size not in SIZES:
            raise InputError(f"{size} is not a size of the engines: choose from {', '.join(SIZES)}")
        if type(value) is not type(SIZES[size][0]) or value not in SIZES[size]:
            allowed = ", ".join(json.dumps(one) for one in sorted(SIZES[size]))
            raise InputError(f"{names.get(size, size)} {json.dumps(value)}: choose from {allowed}")


def read_design(path: Path) -> tuple[Design, dict[str, Any]]:
    """Return the design of a configuration file (`m3vit hw explore`), and its weight_bits, act_bits and layer_bits.

    layer_bits is not there where the file has none.

    Raises InputError for a file that is none, or that says what cannot be.
    """
    found = read_json(path, WRITTEN)
    keys = {"board", "part", "clock", "port_bits", "sizes", LAYERS, *BITS}
    if (
        not isinstance(found, dict)
        or not {"board", "sizes", *BITS} <= set(found)
        or not isinstance(found["sizes"], dict)
    ):
        raise InputError(f"{path} is not a configuration of the engines: {WRITTEN}")
    if unknown := set(found) - keys - {"note"}:
        raise InputError(f"{path} has {', '.join(sorted(unknown))}, which is no key of a configuration: leave it out")
    whole = [name for name in ("clock", "port_bits", *BITS) if type(found.get(name, 0)) not in (int, type(None))]
    text = [name for name in ("board", "part", LAYERS) if not isinstance(found.get(name, ""), str | None)]
    if wrong := whole + text:
        raise InputError(f"{path}: {wrong[0]} is {found[wrong[0]]!r}: give {'a whole number' if whole else 'a name'}")
    given: dict[str, Any] = {name: found.get(name) for name in ("board", "part", "clock", "port_bits")}
    design = design_of(**given, called=lambda name: f"{path}: {name}")
    check_sizes(found["sizes"], {size: f"{path}: {size}" for size in SIZES})
    return replace(design, sizes=found["sizes"]), {name: found[name] for name in (*BITS, LAYERS) if name in found}
