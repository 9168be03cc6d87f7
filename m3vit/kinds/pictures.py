"""What pictures of predictions are made of: colours, ranges, and what a legend says. numpy only."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
Range = tuple[float, float]

# Nine points of matplotlib's inferno map (public domain, CC0), dark to bright, even in perceived lightness.
RAMP: tuple[Colour, ...] = (
    (0, 0, 4),
    (31, 12, 72),
    (85, 15, 109),
    (136, 34, 106),
    (186, 54, 85),
    (227, 89, 51),
    (249, 140, 10),
    (249, 201, 50),
    (252, 255, 164),
)
_OPACITY = 0.6  # of predictions over a grey image
_BINS = 20  # of histograms


@dataclass(frozen=True)
class Swatches:
    """A legend of colours and what they mean, in columns as wide as the longest of `names` needs."""

    items: tuple[tuple[str, Colour], ...]
    names: tuple[str, ...]
    rows: int | None = None  # of fixed height, or as high as the items need


@dataclass(frozen=True)
class Place:
    """A name and where it can stand in a picture: the centre of a square of pixels that it is the name of."""

    name: str
    row: float
    column: float
    side: float


@dataclass(frozen=True)
class Scale:
    """A legend of a continuous value: colours from left to right, and the values where they are."""

    title: str
    colours: NDArray[np.uint8]  # [N, 3]
    low: float
    high: float


def ramp(position: NDArray[Any]) -> NDArray[np.uint8]:
    """Return colours [..., 3] of positions 0 (dark) to 1 (bright)."""
    colours = np.array(RAMP, np.float32)
    scaled = np.clip(position, 0, 1) * (len(colours) - 1)
    channels = [np.interp(scaled, np.arange(len(colours)), colours[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def grey_blend(image: NDArray[np.uint8], picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay a picture over its image in shades of grey, both uint8 [H, W, 3]."""
    grey = image @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.rint(np.float32(_OPACITY) * picture + np.float32(1 - _OPACITY) * grey[..., None]).astype(np.uint8)


def rounded(value: Any) -> float | None:
    """Return six significant digits, as many as float32 holds; null for nothing and for what is not finite."""
    return float(f"{float(value):.6g}") if value is not None and np.isfinite(value) else None


def histogram(values: NDArray[np.float32], low: float, high: float) -> dict[str, Any]:
    """Return the edges and counts of a histogram, as JSON values."""
    counts, edges = np.histogram(values, _BINS, (float(low), float(high)))
    return {"edges": [rounded(edge) for edge in edges], "counts": [int(count) for count in counts]}
