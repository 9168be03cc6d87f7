"""The integer functions of include/m3vit_integer.h on numpy arrays of int64: the same words, element by element."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from m3vit.hw.isa import TWO_BYTES_MOST
from m3vit.hw.tables import TABLES

Ints = NDArray[np.int64]


@cache
def table(name: str) -> Ints:
    """Return a look-up table by its name in m3vit.hw.tables."""
    return np.array(next(table for table in TABLES if table.name == name).values(), dtype=np.int64)


def shift_round(x: Ints, shift: Ints | int) -> Ints:
    """Return x * 2^-shift, rounded half up; a negative shift is to the left."""
    right, left = np.maximum(shift, 0), np.maximum(-np.asarray(shift), 0)
    half = np.where(right > 0, np.left_shift(np.int64(1), np.maximum(right - 1, 0)), 0)
    return np.right_shift(x + half, right) * np.left_shift(np.int64(1), left)


def interpolate(first: Ints, second: Ints, weight: Ints) -> Ints:
    """Return what lies `weight` of 65536 on the way from the first to the second."""
    return first + ((second - first) * weight + 32768 >> 16)


def exponent_of(x: Ints) -> Ints:
    """Return floor(log2(x)) of positive integers."""
    guess = np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1
    return guess - (np.right_shift(x, guess) == 0)  # the float may have been rounded up to the next power of two


def normalise(x: Ints) -> tuple[Ints, Ints]:
    """Return positive integers as (exponent, mantissa): mantissa * 2^(exponent - 24), mantissa in [2^24, 2^25)."""
    exponent = exponent_of(x)
    right = np.right_shift(x, np.maximum(exponent - 24, 0))
    return exponent, np.left_shift(right, np.maximum(24 - exponent, 0)).astype(np.int64)


def exp2_neg(x: Ints, frac: int, out_frac: int) -> Ints:
    """Return 2^-(x * 2^-frac) for x >= 0, with out_frac fractional bits."""
    whole = x >> frac
    part = x - (whole << frac)
    bits = part >> (frac - 24) if frac >= 24 else part << (24 - frac)
    entries = table("exp2_neg")
    y = interpolate(entries[bits >> 16], entries[(bits >> 16) + 1], bits & 0xFFFF)
    return np.where(whole > out_frac, 0, shift_round(y, 22 - out_frac + np.minimum(whole, out_frac)))


def reciprocal(x: Ints) -> tuple[Ints, Ints]:
    """Return (mantissa, shift) of positive integers: 1 / x = mantissa * 2^-(20 + shift)."""
    exponent, mantissa = normalise(x)
    entries, i = table("reciprocal"), mantissa >> 16 & 0xFF
    return interpolate(entries[i], entries[i + 1], mantissa & 0xFFFF), exponent


def rsqrt(x: Ints) -> tuple[Ints, Ints]:
    """Return (mantissa, shift) of positive integers: 1 / sqrt(x) = mantissa * 2^-(20 + shift)."""
    exponent, mantissa = normalise(x)
    even, odd, i = table("rsqrt_even"), table("rsqrt_odd"), mantissa >> 16 & 0xFF
    first, second = (np.where(exponent & 1, odd[i + more], even[i + more]) for more in (0, 1))
    return interpolate(first, second, mantissa & 0xFFFF), exponent >> 1


def gelu_frac(frac: int) -> int:
    """Return the fractional bits of gelu_raw's result."""
    return max(frac, 20)


def gelu_raw(x: Ints, frac: int) -> Ints:
    """Return GELU of x with `frac` fractional bits; the result has gelu_frac(frac) of them."""
    size = np.abs(x)
    position = size >> (frac - 23) if frac >= 23 else size << (23 - frac)
    entries = table("gelu_gap")
    last = len(entries) - 1
    i = np.minimum(position >> 16, last - 1)
    gap = np.where(position >= last << 16, 0, interpolate(entries[i], entries[i + 1], position & 0xFFFF))
    relu = np.maximum(x, 0)
    return relu - (gap << (frac - 20)) if frac >= 20 else (relu << (20 - frac)) - gap


def saturate(x: Ints, bits: int) -> Ints:
    """Return x held to a signed integer of `bits` bits."""
    return np.clip(x, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def hold_two_bytes(x: Ints) -> Ints:
    """Return x held to what 256 high + low may be, both from -128 to 127."""
    return np.clip(x, -(1 << 15), TWO_BYTES_MOST)
