"""FPGA boards, and a model of what the time-multiplexed accelerator takes of one. No torch.

Everything about resources here is modelled, not synthesised. Budgets are shares of a part that leave room for the
DMA, interconnect and placement (70 % of LUTs, 80 % of the rest, as FINN's platforms file has them).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from m3vit.errors import InputError
from m3vit.hw.hardware import LUT_RAM_DEPTH, TILE_IN, TOKEN_BLOCKS, Hardware
from m3vit.hw.ops import ENGINES, memories
from m3vit.hw.program import MAX_TOKENS

BUDGETS = {"lut": 0.7, "bram36": 0.8, "dsp": 0.8, "uram": 0.8}
TILES_OUT = (64, 32, 16, 8)  # largest first
FIXED_DSP = 60  # LayerNorm, softmax, rounding, addresses
# LUTs: 50,000 and 40 a multiplier are near what UbiMoE (arXiv 2502.05602) reports on a ZCU102: 123,400 with 1,850 DSPs.
FIXED_LUT = 50_000
LUT_PER_MULTIPLIER = 40
ARRAYS = ("linear", "gate")  # engines of which LUT_PER_MULTIPLIER was seen
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


def resources(hardware: Hardware) -> dict[str, int]:
    """Return the modelled LUTs, BRAM36, DSPs and URAMs."""
    used = {"lut": FIXED_LUT, "bram36": 0, "dsp": FIXED_DSP, "uram": 0}
    for memory in memories(hardware):
        columns = math.ceil(memory.bits / 72)
        if memory.kind == "uram":
            used["uram"] += memory.copies * columns * math.ceil(memory.words / 4096)
        elif memory.kind == "bram" or memory.words > LUT_RAM_DEPTH:
            used["bram36"] += memory.copies * columns * math.ceil(memory.words / 512)
        else:
            bits_a_lut = 14 if memory.words <= LUT_RAM_DEPTH // 2 else 7
            used["lut"] += memory.copies * 8 * math.ceil(memory.bits / bits_a_lut)
    for name, engine in ENGINES.items():
        used["dsp"] += engine.multipliers(hardware)
        used["lut"] += engine.multipliers(hardware) * (LUT_PER_MULTIPLIER if name in ARRAYS else 0)
    return used


def fits(hardware: Hardware, board: Board) -> bool:
    """Return whether the modelled resources are within the board's budgets."""
    return all(value <= BUDGETS[name] * getattr(board, name) for name, value in resources(hardware).items())


def find_board(name: str) -> Board:
    """Return a board by name, or raise InputError."""
    if name not in BOARDS:
        raise InputError(f"--board {name}: choose from {', '.join(BOARDS)}")
    return BOARDS[name]


def _sizes(hardware: Hardware, board: Board) -> Iterator[Hardware]:
    """Yield the hardware with arrays and blocks of tokens of every size, largest first."""
    for tile in TILES_OUT:
        for block in TOKEN_BLOCKS:
            yield replace(hardware, tile_out=tile, token_block=block, uram=board.uram > 0)


def check_tokens(tokens: int) -> None:
    """Raise InputError if an image has more tokens than the queues of experts can hold."""
    if tokens > MAX_TOKENS:
        raise InputError(
            f"the model has {tokens} tokens, and the queues of the multiplexed schedule hold {MAX_TOKENS}: give a "
            "smaller model.image_size or a larger patch"
        )


def fit(hardware: Hardware, board: Board) -> Hardware:
    """Return the hardware with the largest multiplier array that fits the board, then the largest block of tokens.

    Raises InputError, with the figures and what would fit, if none does, or if there are too many tokens.
    """
    check_tokens(hardware.max_rows)
    found = next((size for size in _sizes(hardware, board) if fits(size, board)), None)
    if found:
        return found
    *_, smallest = _sizes(hardware, board)
    over = ", ".join(
        f"{value} {name} of {int(BUDGETS[name] * getattr(board, name))}"
        for name, value in resources(smallest).items()
        if value > BUDGETS[name] * getattr(board, name)
    )
    options = [
        f"--board {other.name}"
        for other in BOARDS.values()
        if any(fits(size, other) for size in _sizes(hardware, other))
    ]
    if hardware.weight_bits > 8 and fits(replace(smallest, weight_bits=8), board):
        options.append("--weight-bits 8")
    advice = f"give {' or '.join(options)}" if options else "no board here holds it: give a narrower model"
    raise InputError(
        f"the model does not fit {board.name} (modelled): with the smallest array ({TILE_IN} x {TILES_OUT[-1]}), "
        f"inputs of {hardware.max_in} and {hardware.max_rows} tokens x top-{hardware.max_top} it takes {over}; {advice}"
    )
