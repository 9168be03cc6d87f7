"""Procedural surface colours: what a material is, how to draw a random one, how to evaluate it at points.

N points.  Colours are display values (sRGB-like) in 0..1; the renderer takes them to linear light before shading.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Range = tuple[float, float]
T = TypeVar("T")


class Pattern(IntEnum):
    """How `Material.colour` and `Material.accent` are mixed over a surface."""

    FLAT = 0  # colour only
    CHECKER = 1
    STRIPES = 2
    WOOD = 3  # wavy grain along v
    NOISE = 4  # two octaves of value noise: plaster, carpet, woven cloth
    TILES = 5  # running bond with accent-coloured joints
    PATCHES = 6  # a random colour per cell (neither colour nor accent): paintings, book spines
    OUTDOORS = 7  # colour (sky) above accent (greenery), with a ragged horizon: what a window shows
    BLOTCHES = 8  # large spots of the accent with sharp borders: a cow's hide
    PANES = 9  # rows of accent-coloured windows: the front of a building


@dataclass(frozen=True)
class Material:
    """A pattern of two colours; `period_m` is its length scale, `turn_rad` its rotation in the surface."""

    pattern: Pattern
    colour: FloatArray
    accent: FloatArray
    period_m: float
    turn_rad: float = 0.0
    glow: float = 0.0  # light given off, as a multiple of the albedo


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Return one of the options; unlike `rng.choice` it does not turn them into an array."""
    return options[int(rng.integers(len(options)))]


def hsv_to_rgb(hue: float, saturation: float, value: float) -> FloatArray:
    """Return the RGB colour of a hue (one turn = 1), saturation and value."""
    sector = (np.array([5.0, 3.0, 1.0]) + hue * 6.0) % 6.0
    return np.asarray(value - value * saturation * np.clip(np.minimum(sector, 4.0 - sector), 0.0, 1.0))


def random_material(
    rng: np.random.Generator,
    patterns: Sequence[Pattern],
    *,
    hue: Range = (0.0, 1.0),
    saturation: Range = (0.1, 0.8),
    value: Range = (0.2, 0.9),
    period_m: Range = (0.05, 0.4),
    glow: float = 0.0,
) -> Material:
    """Draw a material; the accent is a shade of the colour seven times in ten, else a colour of its own."""
    colour = hsv_to_rgb(rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value))
    if rng.random() < 0.7:
        accent = np.clip(colour * rng.uniform(0.55, 1.35), 0.0, 1.0)
    else:
        accent = hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    turn_rad = pick(rng, (0.0, 0.0, np.pi / 4, np.pi / 2))
    return Material(pick(rng, patterns), colour, accent, rng.uniform(*period_m), turn_rad, glow)


def wood(rng: np.random.Generator) -> Material:
    """Draw a wood: brown hues, mostly with grain."""
    patterns = (Pattern.WOOD, Pattern.WOOD, Pattern.WOOD, Pattern.FLAT)
    return random_material(
        rng, patterns, hue=(0.05, 0.12), saturation=(0.2, 0.7), value=(0.2, 0.85), period_m=(0.03, 0.12)
    )


def paint(rng: np.random.Generator) -> Material:
    """Draw a paint: any hue, not too saturated, mostly plain."""
    patterns = (Pattern.FLAT, Pattern.FLAT, Pattern.NOISE)
    return random_material(rng, patterns, saturation=(0.0, 0.5), value=(0.15, 0.95))


def fabric(rng: np.random.Generator) -> Material:
    """Draw a fabric: any hue and any pattern of the regular ones."""
    patterns = (Pattern.FLAT, Pattern.NOISE, Pattern.STRIPES, Pattern.CHECKER, Pattern.TILES)
    return random_material(rng, patterns, saturation=(0.05, 0.85), value=(0.15, 0.9), period_m=(0.04, 0.25))


def hash_to_unit(*keys: NDArray[np.generic]) -> FloatArray:
    """Hash up to four integer-valued arrays of one shape to numbers in [0, 1), the same on every platform."""
    multipliers = (374761393, 668265263, 2147483647, 1274126177)
    state = np.zeros(keys[0].shape, np.uint32)
    for multiplier, key in zip(multipliers, keys, strict=False):
        state = (state ^ (key.astype(np.int64).astype(np.uint32) * np.uint32(multiplier))) * np.uint32(2654435761)
        state ^= state >> np.uint32(15)
    return state / np.float64(2**32)


def value_noise(u_N: FloatArray, v_N: FloatArray, seed_N: NDArray[np.int64]) -> FloatArray:
    """Return smooth noise in [0, 1): random values at integer lattice points, smoothstep between them."""
    cell_u, cell_v = np.floor(u_N), np.floor(v_N)
    mix_u, mix_v = u_N - cell_u, v_N - cell_v
    mix_u, mix_v = mix_u * mix_u * (3 - 2 * mix_u), mix_v * mix_v * (3 - 2 * mix_v)
    low, low_up, high, high_up = (hash_to_unit(cell_u + a, cell_v + b, seed_N) for a in (0, 1) for b in (0, 1))
    return (low * (1 - mix_v) + low_up * mix_v) * (1 - mix_u) + (high * (1 - mix_v) + high_up * mix_v) * mix_u


def _accent_share(pattern: Pattern, u_N: FloatArray, v_N: FloatArray, seed_N: NDArray[np.int64]) -> FloatArray:
    """Return how much of the accent each point shows, 0..1."""
    if pattern == Pattern.CHECKER:
        return (np.floor(u_N) + np.floor(v_N)) % 2
    if pattern == Pattern.STRIPES:
        return (u_N % 1 < 0.5).astype(np.float64)
    if pattern == Pattern.WOOD:
        bend = 1.5 * value_noise(u_N * 0.7, v_N * 0.08, seed_N)
        return 0.5 + 0.5 * np.sin(6 * (u_N + bend) + 4 * value_noise(u_N * 3, v_N * 0.3, seed_N))
    if pattern == Pattern.NOISE:
        return 0.6 * value_noise(u_N * 2, v_N * 2, seed_N) + 0.4 * value_noise(u_N * 7, v_N * 7, seed_N)
    if pattern == Pattern.TILES:
        shifted = (u_N + 0.5 * (np.floor(v_N) % 2)) % 1
        return ((shifted < 0.06) | (v_N % 1 < 0.06)).astype(np.float64)
    if pattern == Pattern.OUTDOORS:
        horizon = 0.6 * value_noise(u_N * 3, np.zeros_like(u_N), seed_N) - 0.35
        foliage = 0.65 + 0.35 * value_noise(u_N * 12, v_N * 12, seed_N)
        return np.where(v_N < horizon, foliage, 0.15 * value_noise(u_N * 2, v_N * 4, seed_N))
    if pattern == Pattern.BLOTCHES:
        return (value_noise(u_N, v_N, seed_N) > 0.55).astype(np.float64)
    if pattern == Pattern.PANES:
        return ((np.abs(u_N % 1 - 0.5) < 0.24) & (np.abs(v_N % 1 - 0.5) < 0.3)).astype(np.float64)
    return np.zeros(len(u_N))


def evaluate(
    pattern_N: NDArray[np.int64],
    u_N: FloatArray,
    v_N: FloatArray,
    colour_N3: FloatArray,
    accent_N3: FloatArray,
    seed_N: NDArray[np.int64],
) -> FloatArray:
    """Return the colours (N, 3) of points with surface coordinates u, v in units of their material's period."""
    share_N = np.zeros(len(u_N))
    for value in np.unique(pattern_N):
        here = pattern_N == value
        share_N[here] = _accent_share(Pattern(value), u_N[here], v_N[here], seed_N[here])
    colours_N3 = colour_N3 + share_N[:, None] * (accent_N3 - colour_N3)
    here = pattern_N == Pattern.PATCHES
    if here.any():
        cell = np.floor(u_N[here]), np.floor(v_N[here]), seed_N[here]
        channels = [hash_to_unit(*cell, np.full(int(here.sum()), channel)) for channel in range(3)]
        colours_N3[here] = 0.15 + 0.75 * np.stack(channels, axis=1)
    return colours_N3
