"""How the published evaluations read a stored edge map: each turns 8 bits into maps of boundary pixels its own way.

All go on alike, with seism's thinning, matching and figures (m3vit.evaluation.edges). Files are those of the
repositories jponttuset/seism (a copy is in prismformore/Boundary-Detection-Evaluation-Tools), pdollar/edges and
pdollar/toolbox. H, W rows and columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.floating]

THRESHOLDS: tuple[float, ...] = tuple(i / 100 for i in range(1, 100))  # as the papers say
SEISM_THRESHOLDS: tuple[float, ...] = (0.001, *THRESHOLDS, 0.999)  # seism's parameters/HED.txt: 101

_FADE_PX = 5  # responses this close to the border are scaled down: the tools' s
_STRONGER = 1.01  # a pixel survives a neighbour up to this much stronger: the tools' m


@dataclass(frozen=True)
class Reader:
    """A published way to read a stored map.

    `ridges` turns the file's uint8 [H, W] into values in 0..1 [H, W], float32 as MATLAB's single or float64. A
    pixel is a boundary at a threshold if its value exceeds it (`strict`) or reaches it.
    """

    name: str
    thresholds: tuple[float, ...]
    strict: bool
    ridges: Callable[[NDArray[np.uint8]], Floats]

    def levels(self, grey: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return how many of the thresholds each pixel of a stored map passes: [H, W]."""
        # float32 is compared as it is, as MATLAB compares single with double: 0.2 in float32 exceeds 0.2.
        values = self.ridges(grey).astype(np.float64)
        return np.searchsorted(np.sort(self.thresholds), values, side="left" if self.strict else "right")


def suppressed(grey: NDArray[np.uint8]) -> Floats:
    """Read as seism's src/io/read_one_cont_png.m:7-11: non-maximum suppression of the map as stored."""
    return nms(_single(grey))


def as_stored(grey: NDArray[np.uint8]) -> Floats:
    """Read as evaluation/seism/read_one_png.m:6 of SimonVandenhende/Multi-Task-Learning-PyTorch: nothing is done."""
    return grey / 255


def suppressed_and_stored(grey: NDArray[np.uint8]) -> Floats:
    """Read as nms_process.m:19-26 of innovator-zero/seism, then src/io/read_one_png.m:6 there.

    Smoothed first, suppressed with a radius of 4, and stored with 8 bits (rounded) once more.
    """
    ridges = nms(_smoothed_little(_single(grey)), radius=4)
    return np.floor((ridges * np.float32(255)).astype(np.float64) + 0.5) / 255


HEADLINE = Reader("read_one_cont_png", SEISM_THRESHOLDS, True, suppressed)
# The readers behind a protocol's published figures: docs/datasets.md says which is behind which. First the headline's.
READERS: dict[str, tuple[Reader, ...]] = {
    "A": (HEADLINE, Reader("read_one_png", THRESHOLDS, False, as_stored)),
    "B": (HEADLINE, Reader("sak", THRESHOLDS, False, suppressed_and_stored)),
}


def _single(grey: NDArray[np.uint8]) -> Floats:
    return grey.astype(np.float32) / np.float32(255)  # MATLAB's im2single


def nms(probability: Floats, radius: int = 1) -> Floats:
    """Suppress what is not a ridge of the edge map: float32 [H, W] of float32/64 [H, W] in 0..1.

    The orientation is that of the map smoothed by a triangle of radius 4; the map itself, not smoothed, is compared
    at distances 1..radius across the edge: Dollar's edgesNmsMex(E, O, radius, 5, 1.01), in the tools' order of float32
    operations, on which ties and the signs of tiny derivatives hang. The orientation keeps the formula's flaw: on an
    exactly horizontal ridge the mixed derivative is 0, O is 0 instead of pi/2, and nothing is suppressed.
    """
    if np.ndim(probability) != 2:
        raise ValueError(f"probability of shape {np.shape(probability)}: must be [H, W]")
    height, width = probability.shape
    if min(height, width) < 2:
        raise ValueError(f"probability {probability.shape}: at least 2 x 2 pixels")
    E = np.ascontiguousarray(probability, np.float32)
    y, x = np.nonzero(E)
    angle = _orientation(E)[y, x].astype(np.float64)
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    flat, here = E.ravel(), y * width + x
    limit, weaker = flat[here] * np.float32(_STRONGER), np.zeros(len(here), bool)
    for distance in (d for d in range(-radius, radius + 1) if d):
        side = np.float32(distance)
        xs = np.clip(x.astype(np.float32) + side * cosine, 0, np.float32(width - 1.001))
        ys = np.clip(y.astype(np.float32) + side * sine, 0, np.float32(height - 1.001))
        column, line = xs.astype(np.intp), ys.astype(np.intp)
        right, below, at = xs - column.astype(np.float32), ys - line.astype(np.float32), line * width + column
        left, above = 1 - right, 1 - below
        across = flat[at] * left * above + flat[at + 1] * right * above
        weaker |= limit < across + flat[at + width] * left * below + flat[at + width + 1] * right * below
    result = E.copy()
    result.ravel()[here[weaker]] = 0
    fade = min(_FADE_PX, height // 2, width // 2)
    for size, shape in ((width, (1, -1)), (height, (-1, 1))):
        position = np.arange(size)
        border = np.minimum(position, size - 1 - position)
        result *= np.minimum(border / fade, 1).astype(np.float32).reshape(shape)
    return result


def _orientation(E: Floats) -> Floats:
    """Return the angle across the edges, float32 [H, W] in 0..pi, as the tools compute it."""
    dy, dx = np.gradient(_smoothed(E))
    dxx = np.gradient(dx, axis=1)
    dyy, dxy = np.gradient(dy)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = dyy * np.sign(-dxy) / (dxx + np.float32(1e-5))
    # Rounded from float64: the same on every machine, and what a good arctan of float32 gives.
    angle = np.arctan(slope.astype(np.float64)).astype(np.float32)
    return np.nan_to_num(angle) % np.float32(np.pi)


def _smoothed(E: Floats) -> Floats:
    """Smooth float32 [H, W] by a triangle of radius 4 along both axes, mirrored at the border (Dollar's convTri).

    The tool adds up second differences, column after column, then row after row. So does this, in its order: where
    the map is the same along an axis, the sign of the derivative along it is that of what rounding leaves.
    """
    radius = 5  # of the tool's sums, one more than the triangle's
    if min(E.shape) <= 9:  # where the tool convolves instead
        kernel = np.divide([1, 2, 3, 4, 5, 4, 3, 2, 1], 25)
        return ndimage.correlate1d(ndimage.correlate1d(E, kernel, 1, mode="reflect"), kernel, 0, mode="reflect")
    scale = np.float32(1) / np.float32(radius**4)
    return _triangle_sums(_triangle_sums(E.T, radius, scale).T, radius, np.float32(1))


def _triangle_sums(image: Floats, radius: int, scale: np.float32) -> Floats:
    """Return sums along axis 0 weighted 1, 2, .. radius, .. 2, 1 and by `scale`, as a running sum of running sums."""
    first = np.add.accumulate(image[:radius])
    start = scale * (2 * np.add.accumulate(first)[-1] - first[-1])
    padded = np.pad(image, ((radius, radius), (0, 0)), mode="symmetric")
    count = len(image) - 1
    change = padded[:count] + padded[2 * radius :][:count] - 2 * padded[radius:][:count]
    return np.add.accumulate(np.concatenate([start[None], scale * np.add.accumulate(change)]))


def _smoothed_little(E: Floats) -> Floats:
    """Smooth float32 [H, W] by a triangle of radius 1, mirrored at the border, in the order of Dollar's convTri1."""
    wide = np.pad(E, ((0, 0), (1, 1)), mode="edge")
    across = np.float32(1 / 16) * (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:])
    result = np.empty_like(across)
    result[1:-1] = across[:-2] + 2 * across[1:-1] + across[2:]
    result[0] = 3 * across[0] + across[1]
    result[-1] = across[-2] + 3 * across[-1]
    return result
