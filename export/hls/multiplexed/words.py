"""Linear maps, LayerNorms and tables as the words that the engines read: integers, shifts and fractions.

A value is raw * 2^-frac. Each output of a linear map has a weight fraction of its own: the one that holds its largest
weight, or the next finer one, which clips it, whichever has the smaller squared error.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3vit.errors import InputError
from m3vit.hw.isa import ACCUMULATOR_BITS
from m3vit.hw.program import row_words

BIAS_BITS = 31
SCALE_BITS = 18
MAX_WEIGHT_FRAC = 30
SHIFTED_BITS = 62  # of a sum that is shifted left to its result

Floats = NDArray[np.float64]


class LinearWords(NamedTuple):
    """A quantised linear map: weights int64 [n_out, n_in], their fractions [n_out], the rows' parameters int32
    [2 n_out] and the bits that the largest possible sum needs."""

    weights: NDArray[np.int64]
    fracs: NDArray[np.int64]
    params: NDArray[np.int32]
    sum_bits: int

    @property
    def inputs(self) -> int:
        """n_in."""
        return self.weights.shape[1]


def check_finite(values: Floats) -> None:
    """Raise InputError for weights that are not finite."""
    if not np.isfinite(values).all():
        raise InputError("cannot export to HLS: the model has weights or outputs that are not finite; train it again")


def integer_bits(largest: float) -> int:
    """Return the least i with largest < 2^i."""
    return math.frexp(largest)[1] if largest > 0 else -MAX_WEIGHT_FRAC


def rounded(values: Floats, frac: NDArray[np.int64] | int, bits: int) -> NDArray[np.int64]:
    """Return values * 2^frac, rounded half up and held to `bits` signed bits."""
    high = (1 << (bits - 1)) - 1
    return np.clip(np.floor(np.ldexp(values, frac) + 0.5), -high, high).astype(np.int64)


def row_fracs(weight: Floats, bits: int) -> NDArray[np.int64]:
    """Return the fraction of each row of weight [n_out, n_in]."""
    largest = np.abs(weight).max(axis=1, initial=0)
    base = np.array([min(bits - 1 - integer_bits(float(value)), MAX_WEIGHT_FRAC - 1) for value in largest])
    errors = []
    for frac in (base, base + 1):
        back = np.ldexp(rounded(weight, frac[:, None], bits).astype(np.float64), -frac[:, None])
        errors.append(((back - weight) ** 2).sum(axis=1))
    return base + (errors[1] < errors[0])


def linear_words(
    weight: Floats,
    bias: Floats,
    weight_bits: int,
    x: tuple[int, int],
    y_frac: NDArray[np.int64] | int,
    where: str,
    missing: int = 0,
) -> LinearWords:
    """Quantise a linear map whose input is `x` = (bits, fractional bits) and whose outputs have `y_frac`.

    `missing` was subtracted from every raw input: the biases make up for it. Raises InputError, naming `where`, if a
    sum could need more than ACCUMULATOR_BITS.
    """
    check_finite(weight)
    check_finite(bias)
    x_bits, x_frac = x
    fracs = np.minimum(row_fracs(weight, weight_bits), MAX_WEIGHT_FRAC)
    integers = rounded(weight, fracs[:, None], weight_bits)
    sum_frac = fracs + x_frac
    bias = bias + np.ldexp(missing * integers.sum(axis=1).astype(np.float64), -sum_frac)
    bias_shift = np.array(
        [max(0, integer_bits(abs(float(b))) + int(f) - (BIAS_BITS - 1)) for b, f in zip(bias, sum_frac, strict=True)],
        dtype=np.int64,
    )
    biases = rounded(bias, sum_frac - bias_shift, BIAS_BITS)
    shift = sum_frac - y_frac
    bound = np.abs(integers).sum(axis=1) * 2 ** (x_bits - 1) + np.ldexp(np.abs(biases).astype(np.float64), bias_shift)
    sum_bits = int(math.frexp(float(bound.max(initial=0)))[1]) + 1
    if sum_bits > ACCUMULATOR_BITS or sum_bits - shift.min(initial=0) > SHIFTED_BITS:
        raise InputError(
            f"cannot export to HLS: {where} needs {sum_bits}-bit sums shifted by {int(shift.min(initial=0))}, and the "
            f"engines have {ACCUMULATOR_BITS} bits, {SHIFTED_BITS} with the shift: give smaller weight_bits or act_bits"
        )
    return LinearWords(integers, fracs, row_words(biases, bias_shift, shift), sum_bits)


class NormWords(NamedTuple):
    """A quantised LayerNorm: params int32 [2 n] (scales, biases), and the fields of its instruction."""

    params: NDArray[np.int32]
    shift: int
    bias_shift: int
    sqrt_dim: int
    eps: int


def norm_words(scale: Floats, bias: Floats, eps: float, x_frac: int, y_frac: int, norm_frac: int) -> NormWords:
    """Quantise a LayerNorm from fraction x_frac to y_frac; its normalised channels have norm_frac."""
    check_finite(scale)
    check_finite(bias)
    n = len(scale)
    scale_frac = min(SCALE_BITS - 1 - integer_bits(float(np.abs(scale).max())), 22)
    frac = norm_frac + scale_frac
    bias_shift = max(0, integer_bits(float(np.abs(bias).max())) + frac - (BIAS_BITS - 1))
    params = np.concatenate([rounded(scale, scale_frac, SCALE_BITS), rounded(bias, frac - bias_shift, BIAS_BITS)])
    raw = round(n**3 * eps * 4.0**x_frac)
    sqrt_dim = round(math.sqrt(n) * 2**16)
    return NormWords(params.astype(np.int32), frac - y_frac, bias_shift, sqrt_dim, max(1, min(raw, 1 << 60)))
