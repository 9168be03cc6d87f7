"""Thinning and boundaries against slow, obvious implementations and hand-made cases."""

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from m3vit.data.thinning import laplacian_boundaries, segmentation_boundaries, thin

MASKS = arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def bits(*rows: str) -> NDArray[np.bool_]:
    return np.array([[mark == "#" for mark in row] for row in rows])


def obvious_thin(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Lam, Lee & Suen's conditions G1, G2, G3 and G3', pixel by pixel."""
    image = np.pad(mask, 1)
    while True:
        before = image.copy()
        for second in (False, True):
            gone = []
            for row, column in np.argwhere(image):
                north, south = image[row - 1], image[row + 1]
                west, east = image[row, column - 1], image[row, column + 1]
                x1, x2, x3, x4 = east, north[column + 1], north[column], north[column - 1]
                x5, x6, x7, x8 = west, south[column - 1], south[column], south[column + 1]
                ring = [(x1, x2, x3), (x3, x4, x5), (x5, x6, x7), (x7, x8, x1)]
                g1 = sum((not a) and (b or c) for a, b, c in ring) == 1
                n1 = sum((x1 or x2, x3 or x4, x5 or x6, x7 or x8))
                n2 = sum((x2 or x3, x4 or x5, x6 or x7, x8 or x1))
                g2 = 2 <= min(n1, n2) <= 3
                g3 = not ((x6 or x7 or not x4) and x5) if second else not ((x2 or x3 or not x8) and x1)
                if g1 and g2 and g3:
                    gone.append((row, column))
            for row, column in gone:
                image[row, column] = False
        if (image == before).all():
            return image[1:-1, 1:-1]


def obvious_boundaries(ids: NDArray) -> NDArray[np.bool_]:
    """BSDS's seg2bmap, pixel by pixel, then thinned."""
    height, width = ids.shape
    boundary = np.zeros(ids.shape, np.bool_)
    for row in range(height):
        for column in range(width):
            for down, right in ((0, 1), (1, 0), (1, 1)):
                if row + down < height and column + right < width:
                    boundary[row, column] |= ids[row, column] != ids[row + down, column + right]
    return obvious_thin(boundary)


@settings(deadline=None, max_examples=300)
@given(MASKS)
def test_thin_is_the_obvious_algorithm(mask: NDArray[np.bool_]) -> None:
    original = mask.copy()
    thinned = thin(mask)
    assert (mask == original).all()  # the argument is left alone
    np.testing.assert_array_equal(thinned, obvious_thin(mask))
    assert thinned.dtype == np.bool_ and not (thinned & ~mask).any()
    np.testing.assert_array_equal(thin(thinned), thinned)
    connected = np.ones((3, 3))
    assert scipy.ndimage.label(thinned, connected)[1] == scipy.ndimage.label(mask, connected)[1]


def test_thin_by_hand() -> None:
    """Results of skimage.morphology.thin (0.26); a line keeps its ends."""
    np.testing.assert_array_equal(
        thin(bits("#......", ".#.....", "..###..", "..###..", "..###..", "..###..", "..###..")),
        bits("#......", ".#.....", "..#....", "...#...", "...#...", "...#...", "......."),
    )
    np.testing.assert_array_equal(thin(bits("##", "##")), bits("..", "#."))
    np.testing.assert_array_equal(thin(bits("###", "###", "###")), bits("...", ".#.", "..."))
    for kept in (bits("#######"), bits("#..", ".#.", "..#"), bits("#"), bits(".")):
        np.testing.assert_array_equal(thin(kept), kept)


def smooth_ids(seed: int, size: tuple[int, int]) -> NDArray[np.uint16]:
    """Regions with curved borders, as in an annotated photograph."""
    rng = np.random.default_rng(seed)
    fields = [scipy.ndimage.gaussian_filter(rng.standard_normal(size), 6) for _ in range(6)]
    return (rng.permutation(459)[:6] + 1).astype(np.uint16)[np.argmax(fields, 0)]


@pytest.mark.parametrize("seed", range(3))
def test_on_label_maps(seed: int) -> None:
    ids = smooth_ids(seed, (60, 70))
    np.testing.assert_array_equal(segmentation_boundaries(ids), obvious_boundaries(ids))
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    laplacian = scipy.ndimage.convolve(ids.astype(np.float64), kernel, mode="mirror")  # OpenCV's BORDER_REFLECT_101
    np.testing.assert_array_equal(laplacian_boundaries(ids), obvious_thin(laplacian != 0))
    blobs = ids > np.median(ids)
    np.testing.assert_array_equal(thin(blobs), obvious_thin(blobs))


@settings(deadline=None, max_examples=100)
@given(arrays(np.uint8, st.tuples(st.integers(1, 8), st.integers(1, 8)), elements=st.integers(0, 3)))
def test_boundaries_of_small_maps(ids: NDArray[np.uint8]) -> None:
    np.testing.assert_array_equal(segmentation_boundaries(ids), obvious_boundaries(ids))
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    laplacian = scipy.ndimage.convolve(ids.astype(np.int64), kernel, mode="mirror")
    np.testing.assert_array_equal(laplacian_boundaries(ids), obvious_thin(laplacian != 0))


def test_boundaries_by_hand() -> None:
    # 7 | 9 at column 2: the pixel west of the border, and nothing in the last row or column for want of a neighbour.
    np.testing.assert_array_equal(segmentation_boundaries(np.array([[7, 7, 9, 9]] * 3)), bits(".#..", ".#..", ".#.."))
    np.testing.assert_array_equal(
        segmentation_boundaries(np.array([[7] * 3, [7] * 3, [9] * 3])), bits("...", "###", "...")
    )
    np.testing.assert_array_equal(segmentation_boundaries(np.array([[0, 255, 0, 0]])), bits("##.."))  # raw values do
    # A ramp 1 2 3 has no Laplacian in the middle: 1 + 3 - 2 * 2 = 0. Mirrored, its ends have 2 * (2 - 1), 2 * (2 - 3).
    np.testing.assert_array_equal(laplacian_boundaries(np.array([[1, 2, 3]], np.uint16)), bits("#.#"))
    np.testing.assert_array_equal(laplacian_boundaries(np.array([[1, 1, 459, 459]], np.uint16)), bits(".##."))
    assert not laplacian_boundaries(np.full((5, 5), 3, np.uint16)).any()
