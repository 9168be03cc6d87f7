"""The configuration of the accelerator's engines: C in hw/include/engine/m3vit_engine.h. No torch."""

from dataclasses import asdict, dataclass
from typing import Any

from m3vit.hw.isa import KEY_BLOCK
from m3vit.hw.tables import PROB_FRAC

TILE_IN = 16
GATE_OUT = 16
LANES = 16
BATCH = 8  # groups of queries of a round: m3vit_engine_attention.h
STAGES = 4  # of attention
LEAST_TURN = 4  # cycles of a group
PACKED_PROB_FRAC = 8  # fractional bits of softmax weights where two products share a multiplier
SPLIT_INPUTS = 512  # a linear map to wide tokens with more inputs is several, each adding to the one before
PORT_BITS = 128  # of most boards
WIDE_BITS = (32, 16)  # of the residual stream
PORT_WIDTHS = (64, 128, 256)  # 24 words of an instruction are whole words of these
TOKEN_BLOCKS = (1024, 512, 256, 128, 64, 32)  # largest first, as all of these
TILES_OUT = (512, 448, 384, 320, 288, *range(256, 144, -16), *range(144, 8, -8))
GROUPS = (512, 384, 256, 192, 128, 96, 64, 32)  # of queries on chip
LANES_CHOICES = (128, 64, 32, 16)  # of softmax
WEIGHT_PORTS = (2, 1)
DIVIDED = (16, 8, 4)
RESULTS = (32, 16, 8, 4)
NORM_WORDS = (2, 1)
# Properties of Hardware that firmware/parameters.h states too.
DERIVED = ("gate_out", "head", "span", "group", "product_bits", "context_bits", "two_bytes", "max_cached")
OPTIONAL = ("max_bytes",)  # fields that a manifest may lack
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
    tiles_in_lut: bool = False  # weight tiles lie in LUTs, else in BRAM
    gates_in_lut: bool = True  # those of routers
    tile_in: int = TILE_IN
    groups: int = 64  # of queries, that are kept on chip
    lanes: int = LANES  # scores that are rounded, and weighed, in a cycle
    port_bits: int = PORT_BITS
    wide_bits: int = 32  # of the residual stream and of logits
    weight_ports: int = 1
    norm_words: int = 1  # that LayerNorm takes a step
    norm_in_lut: bool = False  # its products with the number of channels are made in LUTs
    results: int = 8  # narrow ones of linear maps in a cycle
    divided: int = 8  # values of attention that are divided in a cycle
    folded: bool = False  # two rows of the array make an output of tiles that leave rows over
    finished_in_uram: bool = False  # what attention divides lies in URAM
    pixels: int = 1  # values of the image that are read at once
    max_bytes: int = 0  # places of the inputs of a token that have two bytes each; 0: none have

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values: the fields of projects before there were inputs of two bytes, and what is more."""
        values = asdict(self)
        return {name: value for name, value in values.items() if value or name not in OPTIONAL}

    @property
    def two_bytes(self) -> bool:
        """Whether linear maps take inputs of two bytes too, and what writes these writes two."""
        return self.max_bytes > 0

    @property
    def max_cached(self) -> int:
        """Places for a token's inputs on chip; where tiles are folded, a step more between bytes of both kinds."""
        return max(self.max_in, self.max_bytes + self.tile_in * (self.folded and self.two_bytes))

    @property
    def fold(self) -> int:
        """Rows of the array from an output of a folded tile to its other one: a quarter of them; 0 if spans of outputs
        that share inputs, and the halves of two ports, are not such quarters."""
        quarter = self.tile_out // 4
        fits = self.tile_out % (2 * self.values(self.act_word)) == 0 and self.tile_out % 4 == 0
        return quarter if fits and quarter % self.span == 0 else 0

    @property
    def packed(self) -> bool:
        """Whether two products share a multiplier."""
        return max(self.weight_bits, self.act_bits) <= 8

    @property
    def gate_out(self) -> int:
        """Outputs a tile of the router; packed, its 16-bit weights take two products each."""
        return min(GATE_OUT, self.tile_out // (2 if self.packed else 1))

    @property
    def head(self) -> int:
        """The most channels of a head, filled up to whole steps of the array and a power of two."""
        return max(self.tile_in, 1 << (self.max_head - 1).bit_length())

    @property
    def span(self) -> int:
        """Outputs of the array that share their inputs."""
        return min(self.head, KEY_BLOCK)

    @property
    def score_queries(self) -> int:
        """Queries whose scores are multiplied at once."""
        return max(1, self.tile_out // KEY_BLOCK)

    @property
    def value_queries(self) -> int:
        """Queries whose weights are multiplied with values at once."""
        return max(1, self.tile_out // self.head)

    @property
    def group(self) -> int:
        """Queries that attention works on at once."""
        return max(self.score_queries, self.value_queries)

    @property
    def softmax_queries(self) -> int:
        """Queries whose scores softmax works on in a cycle."""
        return max(1, self.lanes // KEY_BLOCK)

    @property
    def softmax_scores(self) -> int:
        """Scores of each of these queries."""
        return self.lanes // self.softmax_queries

    @property
    def softmax_sums(self) -> int:
        """Channels of each of these queries whose sums of before are shifted in a cycle."""
        return self.softmax_scores * min(self.head, KEY_BLOCK) // KEY_BLOCK

    @property
    def product_bits(self) -> int:
        """Bits of an attention score before it is rounded."""
        return 2 * self.act_bits + (self.head - 1).bit_length()

    @property
    def context_bits(self) -> int:
        """Bits of a sum of weighted values, of weights of 1 each, and of the total of these: 48 at most."""
        return PROB_FRAC + self.act_bits + self.max_rows.bit_length()

    @property
    def multipliers(self) -> int:
        """DSPs of the array."""
        return self.tile_in * self.tile_out // (2 if self.packed else 1)

    @property
    def weight_word(self) -> int:
        """Bits that a weight is stored in."""
        return stored_bits(self.weight_bits)

    @property
    def act_word(self) -> int:
        """Bits that a narrow value is stored in."""
        return stored_bits(self.act_bits)

    def values(self, bits: int) -> int:
        """Return how many values of `bits` stored bits a word of a port holds."""
        return self.port_bits // bits


def row_unit(weight_word: int, act_word: int, port_bits: int = PORT_BITS) -> int:
    """Return tile_in, the values that rows are filled up to: a step of the array, at least a word of any port."""
    return max(TILE_IN, port_bits // min(weight_word, act_word))


def stored_bits(bits: int) -> int:
    """Return the bits that a weight or a narrow value of `bits` is stored in."""
    return 8 if bits <= 8 else 16


def split_inputs(inputs: int, unit: int) -> list[int]:
    """Return the inputs of each part of a linear map to wide tokens: multiples of `unit`, SPLIT_INPUTS at most."""
    parts = -(-inputs // max(SPLIT_INPUTS, unit))
    size = round_up(-(-inputs // parts), unit)
    return [min(size, inputs - start) for start in range(0, inputs, size)]


def round_up(count: int, unit: int) -> int:
    """Return the least multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit
