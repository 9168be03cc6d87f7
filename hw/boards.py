"""FPGA boards, and a model of what the time-multiplexed accelerator takes of one. No torch.

Everything about resources here is modelled, not synthesised. Budgets are shares of a part that leave room for the
DMA, interconnect and placement (70 % of LUTs, 80 % of the rest, as FINN's platforms file has them).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from m3vit.errors import InputError
from m3vit.hw.program import KEY_BLOCK, MAX_TOKENS

BUDGETS = {"lut": 0.7, "bram36": 0.8, "dsp": 0.8, "uram": 0.8}
TILE_IN = 16
TILES_OUT = (64, 32, 16, 8)  # largest first
TOKEN_BLOCKS = (256, 128, 64, 32)  # largest first
GATE_OUT = 8
QUERY_BLOCK = 64
FIXED_DSP = 60  # LayerNorm, softmax, rounding, addresses
# LUTs: 50,000 and 40 a multiplier are near what UbiMoE (arXiv 2502.05602) reports on a ZCU102: 123,400 with 1,850 DSPs.
FIXED_LUT = 50_000
LUT_PER_MULTIPLIER = 40
# Memories up to 64 words go into LUTs: 8 of them hold 7 bits of 64 words (RAM64M8) or 14 bits of 32 (RAM32M16).
LUT_RAM_DEPTH = 64


@dataclass(frozen=True)
class Board:
    """A board: its part, PL clock in MHz, and what the part holds."""

    name: str
    part: str
    board_part: str
    clock_mhz: int
    lut: int
    bram36: int
    dsp: int
    uram: int


# As AMD states them (DS891 for the Zynq UltraScale+ devices, DS987 for the K26 module).
BOARDS = {
    board.name: board
    for board in (
        Board("kv260", "xck26-sfvc784-2LV-c", "xilinx.com:kv260_som:part0:1.4", 200, 117_120, 144, 1_248, 64),
        Board("zcu104", "xczu7ev-ffvc1156-2-e", "xilinx.com:zcu104:part0:1.1", 300, 230_400, 312, 1_728, 96),
        Board("zcu102", "xczu9eg-ffvb1156-2-e", "xilinx.com:zcu102:part0:3.4", 300, 274_080, 912, 2_520, 0),
    )
}


@dataclass(frozen=True)
class Hardware:
    """The configuration of the engines, C in hw/include/engine/m3vit_engine.h."""

    weight_bits: int
    act_bits: int
    tile_out: int
    max_in: int
    max_dim: int
    max_rows: int
    max_experts: int
    max_top: int
    max_head: int
    token_block: int = TOKEN_BLOCKS[-1]
    uram: bool = False  # the inputs of a block of tokens lie in URAM
    tile_in: int = TILE_IN
    gate_out: int = GATE_OUT
    query_block: int = QUERY_BLOCK
    key_block: int = KEY_BLOCK

    @property
    def weight_word(self) -> int:
        """Bits that a weight is stored in."""
        return 8 if self.weight_bits <= 8 else 16

    @property
    def act_word(self) -> int:
        """Bits that a narrow value is stored in."""
        return 8 if self.act_bits <= 8 else 16

    @property
    def tiles_in_lut(self) -> bool:
        """Whether weight tiles are so few words deep that they lie in LUTs."""
        return self.max_in // self.tile_in <= LUT_RAM_DEPTH

    def memories(self) -> Iterator[tuple[int, int, int]]:
        """Yield the on-chip memories as (copies, bits a word, words), but for the inputs of a block of tokens."""
        steps = self.max_in // self.tile_in
        yield 2, self.tile_out * self.tile_in * self.weight_word, steps  # weight tiles, ping and pong
        yield 2, self.gate_out * self.tile_in * 16, steps
        yield 4, self.tile_in * self.act_word, steps  # a token's inputs, of both linear engines, double for dataflow
        yield 4, self.max_head * self.act_word, self.key_block  # keys and values, ping and pong
        yield 1, self.max_head * self.act_word, self.query_block
        yield 1, self.max_head * 48 + 2 * 48, self.query_block  # context, total and maximum
        yield 2, 32, self.max_dim  # a LayerNorm's row, double for dataflow
        yield 3, 48, self.max_dim
        yield 2, 32, self.max_dim  # scales, biases
        yield 2, 16 + 18, self.max_rows * self.max_top  # choices, queues
        yield 3, 16, self.max_experts
        yield 7, 23, 1025  # look-up tables

    def resources(self) -> dict[str, int]:
        """Return the modelled LUTs, BRAM36, DSPs and URAMs."""
        bram, lut, uram = 0, FIXED_LUT, 0
        width, depth = self.tile_in * self.act_word, self.token_block * self.max_in // self.tile_in
        if self.uram:
            uram = math.ceil(width / 72) * math.ceil(depth / 4096)
        else:
            bram = math.ceil(width / 72) * math.ceil(depth / 512)
        for copies, width, depth in self.memories():
            if depth <= LUT_RAM_DEPTH:
                lut += copies * 8 * math.ceil(width / (14 if depth <= LUT_RAM_DEPTH // 2 else 7))
            else:
                bram += copies * math.ceil(width / 72) * math.ceil(depth / 512)
        multipliers = self.tile_in * (self.tile_out + self.gate_out)
        lut += multipliers * LUT_PER_MULTIPLIER
        dsp = multipliers + 2 * self.max_head + FIXED_DSP
        return {"lut": lut, "bram36": bram, "dsp": dsp, "uram": uram}

    def fits(self, board: Board) -> bool:
        """Return whether the modelled resources are within the board's budgets."""
        return all(value <= BUDGETS[name] * getattr(board, name) for name, value in self.resources().items())


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
    found = next((size for size in _sizes(hardware, board) if size.fits(board)), None)
    if found:
        return found
    *_, smallest = _sizes(hardware, board)
    over = ", ".join(
        f"{value} {name} of {int(BUDGETS[name] * getattr(board, name))}"
        for name, value in smallest.resources().items()
        if value > BUDGETS[name] * getattr(board, name)
    )
    options = [
        f"--board {other.name}"
        for other in BOARDS.values()
        if any(size.fits(other) for size in _sizes(hardware, other))
    ]
    if hardware.weight_bits > 8 and replace(smallest, weight_bits=8).fits(board):
        options.append("--weight-bits 8")
    advice = f"give {' or '.join(options)}" if options else "no board here holds it: give a narrower model"
    raise InputError(
        f"the model does not fit {board.name} (modelled): with the smallest array ({TILE_IN} x {TILES_OUT[-1]}), "
        f"inputs of {hardware.max_in} and {hardware.max_rows} tokens x top-{hardware.max_top} it takes {over}; {advice}"
    )
