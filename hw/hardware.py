"""The configuration of the accelerator's engines: C in hw/include/engine/m3vit_engine.h. No torch."""

from dataclasses import dataclass

TILE_IN = 16
GATE_OUT = 8
QUERY_BLOCK = 64
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
    tile_in: int = TILE_IN
    gate_out: int = GATE_OUT
    query_block: int = QUERY_BLOCK

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
