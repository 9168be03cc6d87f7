"""FPGA boards, and a model of what the time-multiplexed accelerator takes of one. No torch.

Everything about resources here is modelled, not synthesised. Budgets are shares of a part that leave room for the
DMA, interconnect and placement (70 % of LUTs, 80 % of the rest, as FINN's platforms file has them).
"""

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from m3vit.errors import InputError
from m3vit.hw.hardware import LUT_RAM_DEPTH, Hardware
from m3vit.hw.ops import ENGINES
from m3vit.hw.opspec import Engine, OnChip

BUDGETS = {"lut": 0.7, "bram36": 0.8, "dsp": 0.8, "uram": 0.8}
FIXED_DSP = 20  # addresses
# LUTs: with 44 shifters 50,000 and 40 a multiplier, near what UbiMoE (arXiv 2502.05602) reports on a ZCU102: 123,400
# with 1,850 DSPs. Where two products share a multiplier, sums of four are made in the DSPs' cascade, and taking them
# apart takes the place of an adder tree's first stages.
FIXED_LUT = 36_000
LUT_PER_MULTIPLIER = 40
# 48 bits shifted by a run-time distance (3 levels of 4 to 1), rounded and held (two adders, a choice).
LUT_PER_SHIFTER = 300
# Words and bits of a BRAM36, and of its two halves.
BRAM_SHAPES = (
    *((512, 72, 1.0), (1024, 36, 1.0), (2048, 18, 1.0), (4096, 9, 1.0)),
    *((512, 36, 0.5), (1024, 18, 0.5), (2048, 9, 0.5)),
)
# Memories up to LUT_RAM_DEPTH words go into LUTs: 8 hold 7 bits of 64 words (RAM64M8) or 14 bits of 32 (RAM32M16).


@dataclass(frozen=True)
class Board:
    """A board: its part, PL clock in MHz, and what the part and its memory hold.

    system: what vivado_design.tcl can build around the accelerator, `zynq_ultrascale`, or `other`. products_a_dsp: of
    int8 values. ports: to memory, of port_bits each; bandwidth_gb_s: of the memory, at its peak.
    """

    name: str
    part: str
    board_part: str
    system: str
    clock_mhz: int
    lut: int
    bram36: int
    dsp: int
    uram: int
    products_a_dsp: int
    port_bits: int
    ports: int
    bandwidth_gb_s: float


def _read(path: Path) -> Board:
    """Return the board of a file: for each figure its value, and the source that it is from."""
    return Board(path.stem, **{k: v["value"] for k, v in json.loads(path.read_text()).items()})


BOARDS = {
    board.name: board for board in map(_read, sorted((Path(str(files("m3vit.hw"))) / "board_files").glob("*.json")))
}


def taken(memory: OnChip) -> dict[str, float]:
    """Return the LUTs, BRAM36 (halves are whole BRAM18) or URAMs of an on-chip memory."""
    if memory.kind == "uram":
        one = math.ceil(memory.bits / 72) * math.ceil(memory.words / 4096)
        return {"lut": 0, "bram36": 0.0, "uram": memory.copies * one}
    if memory.kind == "bram" or (memory.kind == "any" and memory.words > LUT_RAM_DEPTH):
        least = min(
            size * math.ceil(memory.bits / width) * math.ceil(memory.words / depth)
            for depth, width, size in BRAM_SHAPES
        )
        return {"lut": 0, "bram36": memory.copies * least, "uram": 0}
    bits_a_lut = 14 if memory.words <= LUT_RAM_DEPTH // 2 else 7
    deep = math.ceil(memory.words / LUT_RAM_DEPTH)
    return {"lut": memory.copies * 8 * deep * math.ceil(memory.bits / bits_a_lut), "bram36": 0.0, "uram": 0}


def engine_resources(engine: Engine, hardware: Hardware) -> dict[str, float]:
    """Return what one engine takes: LUTs, BRAM36 (halves are whole BRAM18), DSPs and URAMs."""
    multipliers = engine.multipliers(hardware)
    lut = multipliers * LUT_PER_MULTIPLIER + engine.shifters(hardware) * LUT_PER_SHIFTER + engine.luts(hardware)
    used: dict[str, float] = {"lut": lut, "bram36": 0.0, "dsp": multipliers + engine.dsps(hardware), "uram": 0}
    for memory in engine.memories(hardware):
        for kind, count in taken(memory).items():
            used[kind] += count
    return used


def resources(hardware: Hardware) -> dict[str, int]:
    """Return the modelled LUTs, BRAM36, DSPs and URAMs."""
    used = {"lut": float(FIXED_LUT), "bram36": 0.0, "dsp": float(FIXED_DSP), "uram": 0.0}
    for engine in ENGINES.values():
        for kind, count in engine_resources(engine, hardware).items():
            used[kind] += count
    return {kind: math.ceil(count) for kind, count in used.items()}


def fits(hardware: Hardware, board: Board) -> bool:
    """Return whether the modelled resources are within the board's budgets."""
    return all(value <= BUDGETS[name] * getattr(board, name) for name, value in resources(hardware).items())


def find_board(name: str, called: str = "--board") -> Board:
    """Return a board by name, or raise InputError; called: what its message calls it."""
    if name not in BOARDS:
        raise InputError(f"{called} {name}: choose from {', '.join(BOARDS)}")
    return BOARDS[name]
