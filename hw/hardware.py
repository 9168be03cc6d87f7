"""The configuration of the accelerator's engines: C in hw/include/engine/m3vit_engine.h. No torch."""

from dataclasses import dataclass

TILE_IN = 16
GATE_OUT = 8
QUERY_BLOCK = 128
PORT_BITS = 128  # of most boards
PORT_WIDTHS = (64, 128, 256)  # 24 words of an instruction are whole words of these
TOKEN_BLOCKS = (256, 128, 64, 32)  # largest first
LUT_RAM_DEPTH = 64  # words of a memory that goes into LUTs


@dataclass(frozen=True)
class Hardware:
    """The sizes of arrays, buffers and numbers."""

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
    tiles_in_lut: bool = False  # weight tiles lie in LUTs
    tile_in: int = TILE_IN
    gate_out: int = GATE_OUT
    query_block: int = QUERY_BLOCK
    query_lanes: int = 8  # queries that attention works on at once
    port_bits: int = PORT_BITS

    @property
    def weight_word(self) -> int:
        """Bits that a weight is stored in."""
        return stored_bits(self.weight_bits)

    @property
    def act_word(self) -> int:
        """Bits that a narrow value is stored in."""
        return stored_bits(self.act_bits)

    def lanes(self, bits: int) -> int:
        """Return how many values of `bits` stored bits a word of a port holds."""
        return self.port_bits // bits


def row_unit(weight_word: int, act_word: int, port_bits: int = PORT_BITS) -> int:
    """Return tile_in, the values that rows are filled up to: a step of the array, at least a word of any port."""
    return max(TILE_IN, port_bits // min(weight_word, act_word))


def stored_bits(bits: int) -> int:
    """Return the bits that a weight or a narrow value of `bits` is stored in."""
    return 8 if bits <= 8 else 16


def round_up(count: int, unit: int) -> int:
    """Return the least multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit
