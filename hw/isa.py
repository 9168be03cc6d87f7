"""The instruction set of the time-multiplexed accelerator: opcodes, their fields, and the constants of its arithmetic.

The one place where they are stated. m3vit_isa.h, which the engines include, and the table of docs/hls.md are generated
from it (m3vit.hw.isa_header); what an instruction costs is in m3vit.hw.ops. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cache
from typing import Annotated, ClassVar, NamedTuple, get_args

import numpy as np

from m3vit.errors import InputError

WORDS = 24  # int32 of an instruction
ACCUMULATOR_BITS = 48  # of a DSP48; also below 2^53, so that sums in float64 are exact
ROW_WORDS = 2  # of each output of a linear map in params: bias, shifts
SHIFT_OFFSET = 64  # added to the shift of an output, which is stored in 8 bits
BIAS_SHIFT_LIMIT = 64  # shifts of a bias are below it
SCORE_FRAC = 12  # fractional bits of an attention score
SCORE_BITS = 30  # an attention score is held to
CONTEXT_DROP = 8  # bits of a context sum left out before its division
MAX_RISE = 60  # of the maximum of the scores from one block of keys to the next: beyond, nothing is left of the sums
KEY_BLOCK = 64  # keys an attention step takes at once; decides how sums are rounded
PIXEL_ZERO = 128  # subtracted from a pixel, so that it fits 8 signed bits
TAPS = 9  # pixels that a convolution reads for one
TWO_BYTES_MOST = 32639  # the largest value of two bytes: 256 high + low, each from -128 to 127


class Op(IntEnum):
    """What an instruction does."""

    END = 0
    IMAGE = 1
    LINEAR = 2
    GATE = 3
    POSITION = 4
    NORM = 5
    ATTENTION = 6
    ROUTE = 7
    EXPERTS = 8
    CONV = 9


class Mode(IntEnum):
    """Where results go: to narrow or wide memory, added to wide, to the output, added to wide for a queue's tokens."""

    NARROW = 0
    WIDE = 1
    RESIDUAL = 2
    OUTPUT = 3
    QUEUE = 4


# A field is one int32 word (Long: two), of this type in C++.
Unsigned = Annotated[int, "unsigned"]
Signed = Annotated[int, "int"]
Long = Annotated[int, "long long"]
Target = Annotated[Mode, "int"]

OPCODE = 0
# Words of the fields that several opcodes have. The others of an opcode are its own: from OWN on, in its class's order.
SHARED = {
    **{"task": 1, "rows": 2, "n_in": 3, "n_out": 4, "src": 5, "src_pitch": 6, "dst": 7, "dst_pitch": 8},
    **{"weights": 9, "params": 10, "mode": 11, "gelu_in": 12, "gelu_out": 13, "eps": 19, "rescale": 21},
    **{"src_low": 22, "dst_low": 23},
}
OWN = 14
BLANK = {"task": -1, "gelu_in": -1}  # of an opcode without the field; other words are 0


class Field(NamedTuple):
    """A field of an opcode: its first word, its type in Python and in C++."""

    name: str
    word: int
    kind: type[int]
    c_type: str

    @property
    def range(self) -> tuple[int, int]:
        """The least and the largest value."""
        bits = 64 if self.c_type == "long long" else 32
        return (0, (1 << bits) - 1) if self.c_type == "unsigned" else (-(1 << bits - 1), (1 << bits - 1) - 1)


@dataclass(kw_only=True)
class Instruction:
    """What every instruction has: its opcode, and the one task it is for (-1: for all).

    Offsets (src, dst, hidden; weights and params in their sections) and pitches, from one row to the next, count
    elements of the memory they are in.

    src_low, dst_low: of narrow values that are read or written and have two bytes (256 high + low, both signed), how
    many places after the high byte the low one lies, a word of a port: words of high and of low bytes take turns. 0:
    values have one place.
    """

    op: ClassVar[Op]
    task: Signed = -1

    @classmethod
    @cache
    def layout(cls) -> tuple[Field, ...]:
        """Return the fields of the opcode."""
        found, own = [], OWN
        for field in fields(cls):
            kind, c_type = get_args(field.type)[0], field.type.__metadata__[0]  # type: ignore[union-attr]
            if field.name not in SHARED:
                own += 1
            found.append(Field(field.name, SHARED.get(field.name, own - 1), kind, c_type))
        assert own <= SHARED["eps"], f"{cls.__name__} has too many fields"
        return tuple(found)

    def encode(self) -> np.ndarray:
        """Return its int32 words [WORDS]."""
        words = [0] * WORDS
        for name, value in BLANK.items():
            words[SHARED[name]] = value
        words[OPCODE] = self.op
        for field in self.layout():
            value, (low, high) = int(getattr(self, field.name)), field.range
            assert low <= value <= high, f"{field.name} {value} of {self}"
            words[field.word] = value
            if field.c_type == "long long":
                words[field.word : field.word + 2] = value, value >> 32
        return np.array([word & 0xFFFFFFFF for word in words], np.uint32).view(np.int32)


@dataclass(kw_only=True)
class End(Instruction):
    """The end of the program."""

    op = Op.END


@dataclass(kw_only=True)
class Patches(Instruction):
    """Patches of the image, pixel - 128, to narrow: rows of n_in = 3 patch^2 values, `columns` of them side by side."""

    op = Op.IMAGE
    rows: Unsigned
    n_in: Unsigned
    dst: Unsigned = 0
    dst_pitch: Unsigned = 0
    patch: Unsigned
    columns: Unsigned


@dataclass(kw_only=True)
class Linear(Instruction):
    """Narrow x weights to narrow (with GELU unless gelu_in < 0), wide, added to wide, or to the output.

    gelu_in, gelu_out: fractional bits before and after GELU. rescale: fractional bits that wide values lose before they
    are added to; engines of a 32-bit stream have none.
    """

    op = Op.LINEAR
    rows: Unsigned
    n_in: Unsigned
    n_out: Unsigned
    src: Unsigned = 0
    src_pitch: Unsigned = 0
    dst: Unsigned = 0
    dst_pitch: Unsigned = 0
    weights: Unsigned
    params: Unsigned
    mode: Target
    gelu_in: Signed = -1
    gelu_out: Signed = 0
    rescale: Unsigned = 0
    src_low: Unsigned = 0
    dst_low: Unsigned = 0


@dataclass(kw_only=True)
class Gate(Instruction):
    """Narrow x 16-bit gates of one task to wide: the router's logits."""

    op = Op.GATE
    rows: Unsigned
    n_in: Unsigned
    n_out: Unsigned
    src: Unsigned = 0
    src_pitch: Unsigned = 0
    dst: Unsigned = 0
    dst_pitch: Unsigned = 0
    weights: Unsigned
    params: Unsigned
    mode: Target = Mode.WIDE
    src_low: Unsigned = 0


@dataclass(kw_only=True)
class Position(Instruction):
    """Wide, in place: the first `prefix` rows become those of the table in params, the others get them added."""

    op = Op.POSITION
    rows: Unsigned
    n_out: Unsigned
    dst: Unsigned = 0
    dst_pitch: Unsigned = 0
    params: Unsigned
    prefix: Unsigned


@dataclass(kw_only=True)
class Norm(Instruction):
    """LayerNorm of n_in channels, wide to narrow or wide; params: scales, from `biases` on biases times 2^bias_shift.

    shift: of the result; sqrt_dim: sqrt(n_in) * 2^16; eps: n_in^3 eps * 2^(2 fractional bits of the input), at least 1.
    biases: from the scales on; 0 in older programs, where it is n_in.
    """

    op = Op.NORM
    rows: Unsigned
    n_in: Unsigned
    n_out: Unsigned
    src: Unsigned = 0
    src_pitch: Unsigned = 0
    dst: Unsigned = 0
    dst_pitch: Unsigned = 0
    params: Unsigned
    mode: Target
    shift: Signed
    bias_shift: Signed
    sqrt_dim: Signed
    biases: Unsigned = 0
    eps: Long
    dst_low: Unsigned = 0


@dataclass(kw_only=True)
class Attention(Instruction):
    """Attention of rows (q | k | v) of n_in = 3 n_out channels to n_out, narrow to narrow.

    score_shift: of a sum of products to SCORE_FRAC; value_shift: fractional bits of the values minus the result's.
    weight_drop: fractional bits that softmax weights have fewer than PROB_FRAC (0 in older programs).
    """

    op = Op.ATTENTION
    rows: Unsigned
    n_in: Unsigned
    n_out: Unsigned
    src: Unsigned = 0
    src_pitch: Unsigned = 0
    dst: Unsigned = 0
    dst_pitch: Unsigned = 0
    heads: Unsigned
    score_shift: Signed
    value_shift: Signed
    weight_drop: Unsigned = 0
    dst_low: Unsigned = 0


@dataclass(kw_only=True)
class Route(Instruction):
    """Softmax of n_in logits with logit_frac fractional bits, top-k, and the queues of tokens for the experts."""

    op = Op.ROUTE
    rows: Unsigned
    n_in: Unsigned
    src: Unsigned = 0
    src_pitch: Unsigned = 0
    top_k: Unsigned
    logit_frac: Signed


@dataclass(kw_only=True)
class Experts(Instruction):
    """Both maps of every expert with tokens, n_in -> n_out with GELU -> n_in, weighted and added to wide.

    weights_step, params_step: from one expert to the next; hidden, hidden_pitch: where hidden channels lie in narrow;
    dst_low is of these.
    """

    op = Op.EXPERTS
    rows: Unsigned
    n_in: Unsigned
    n_out: Unsigned
    src: Unsigned = 0
    src_pitch: Unsigned = 0
    dst: Unsigned = 0
    dst_pitch: Unsigned = 0
    weights: Unsigned
    params: Unsigned
    mode: Target = Mode.QUEUE
    gelu_in: Signed
    gelu_out: Signed
    experts: Unsigned
    weights_step: Unsigned
    params_step: Unsigned
    hidden: Unsigned = 0
    hidden_pitch: Unsigned
    src_low: Unsigned = 0
    dst_low: Unsigned = 0


@dataclass(kw_only=True)
class Conv(Instruction):
    """3x3 convolution of a head's pixels, after ReLU and with zeros outside, narrow to the output.

    unrectified: the first features of a pixel, which no ReLU cuts off (0 in older programs).

    A token holds upscale^2 pixels, line by line, of n_in / 9 features each, and `columns` tokens are side by side. The
    rows are the pixels, token after token; n_in is what one reads: the features of its neighbours, line by line. Pixel
    p of token t is written to dst + t dst_pitch + p pixel_pitch (0 in older programs, where it is n_out).
    """

    op = Op.CONV
    rows: Unsigned
    n_in: Unsigned
    n_out: Unsigned
    src: Unsigned = 0
    src_pitch: Unsigned = 0
    dst: Unsigned = 0
    dst_pitch: Unsigned = 0
    weights: Unsigned
    params: Unsigned
    mode: Target = Mode.OUTPUT
    columns: Unsigned
    upscale: Unsigned
    pixel_pitch: Unsigned = 0
    unrectified: Unsigned = 0
    src_low: Unsigned = 0


INSTRUCTIONS: dict[Op, type[Instruction]] = {
    kind.op: kind for kind in (End, Patches, Linear, Gate, Position, Norm, Attention, Route, Experts, Conv)
}


def decode(words: np.ndarray) -> Instruction:
    """Return the instruction of int32 words [WORDS]. Raises InputError for words that are none."""
    try:
        kind = INSTRUCTIONS[Op(int(words[OPCODE]))]
        return kind(**{field.name: field.kind(_value(field, words)) for field in kind.layout()})
    except ValueError as error:
        raise InputError(f"the program is of another version or damaged ({error}): export the project again") from None


def _value(field: Field, words: np.ndarray) -> int:
    low = int(words[field.word])
    if field.c_type == "long long":
        return low & 0xFFFFFFFF | int(words[field.word + 1]) << 32
    return low & 0xFFFFFFFF if field.c_type == "unsigned" else low


def decode_program(params: np.ndarray) -> Iterator[Instruction]:
    """Yield the instructions at the start of a file's params, without the end."""
    for start in range(0, len(params) - WORDS + 1, WORDS):
        instruction = decode(params[start : start + WORDS])
        if isinstance(instruction, End):
            return
        yield instruction
