"""The published readers of edge maps: against the compiled tools' own results, and against slow obvious loops."""

import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from m3vit.evaluation import edge_readers
from m3vit.evaluation.edge_readers import HEADLINE, READERS, SEISM_THRESHOLDS, THRESHOLDS, Reader, nms
from m3vit.evaluation.edges import edge_counts, match_count, ois_counts, reader_counts, summarise, thin

f32 = np.float32
Floats = NDArray[np.float32]
PLAIN, SAK = READERS["A"][1], READERS["B"][1]
ALL = (HEADLINE, PLAIN, SAK)


def stored(name: str) -> NDArray[np.uint8]:
    """A map of 61 x 83 pixels in whole numbers: the same everywhere."""
    y, x = np.mgrid[:61, :83]
    maps = {
        "waves": (x * x * 7 + y * y * 13 + x * y * 3) % 256,
        "rings": np.abs(((x - 40) ** 2 + (y - 30) ** 2) // 8 % 128 * 2 - 128),
        "bars": np.where(y // 4 % 5 == 2, 200 - 7 * (y % 4), 0) + np.where(x // 3 % 9 == 4, 55, 0),
        "noise": (x * 7919 + y * 104729 + x * x * y * 31) % 251,
        "flat": np.where((x - 41) ** 2 + (y - 29) ** 2 < 400, 180, 40),
    }
    return maps[name].clip(0, 255).astype(np.uint8)


# What convTri (convConst.cpp), gradient2 and edgesNmsMex.cpp of seism's sources make of these maps, compiled by g++ 12
# with SSE2 and called as read_one_cont_png.m and nms_process.m call them: pixels that pass a threshold, thresholds
# passed by all pixels together, and the CRC-32 of each pixel's number of them as uint8, row after row.
COMPILED = {
    ("waves", "read_one_cont_png"): (1703, 121562, 1577671483),
    ("rings", "read_one_cont_png"): (518, 18028, 3397872762),
    ("bars", "read_one_cont_png"): (1036, 55444, 1085786841),
    ("noise", "read_one_cont_png"): (1794, 122622, 3957189014),
    ("flat", "read_one_cont_png"): (4661, 134871, 2776056474),
    ("waves", "sak"): (757, 43027, 2106036528),
    ("rings", "sak"): (522, 17822, 1783832783),
    ("bars", "sak"): (697, 33962, 3883162005),
    ("noise", "sak"): (810, 44328, 400775738),
    ("flat", "sak"): (4042, 113570, 74583974),
}


@pytest.mark.parametrize(("name", "reader"), COMPILED)
def test_readers_give_what_the_compiled_tools_give(name: str, reader: str) -> None:
    passed = {one.name: one for one in ALL}[reader].levels(stored(name))
    found = np.count_nonzero(passed), passed.sum(), zlib.crc32(passed.astype(np.uint8).tobytes())
    assert found == COMPILED[name, reader]


def one_line(line: Floats, r: int) -> Floats:
    """Weights 1 .. r .. 1 along a line, mirrored: a running sum of a running sum, each step in float32."""
    n = len(line)
    pixel = {i: line[i if 0 <= i < n else -i - 1 if i < 0 else 2 * n - 1 - i] for i in range(-r - 1, n + r)}
    t = u = line[0]
    for i in range(1, r):
        t = f32(t + line[i])
        u = f32(u + t)
    u, t = f32(f32(2) * u - t), f32(0)
    result = [u]
    for i in range(1, n):
        t = f32(t + f32(f32(pixel[i - 1 - r] + pixel[i - 1 + r]) - f32(2) * pixel[i - 1]))
        u = f32(u + t)
        result.append(u)
    return np.array(result, f32)


def test_smoothing_is_a_triangle_summed_in_the_tools_order() -> None:
    image = np.random.default_rng(0).random((23, 31)).astype(f32)
    sums = edge_readers._triangle_sums(image, 5, f32(1))
    np.testing.assert_array_equal(sums, np.stack([one_line(column, 5) for column in image.T], axis=1))
    kernel = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
    for size in ((23, 31), (10, 40), (9, 12), (4, 4)):
        image = np.random.default_rng(1).random(size).astype(f32)
        plain = ndimage.correlate1d(ndimage.correlate1d(image.astype(float), kernel, 0), kernel, 1)
        np.testing.assert_allclose(edge_readers._smoothed(image), plain, atol=2e-6)
        little = ndimage.correlate1d(ndimage.correlate1d(image.astype(float), [0.25, 0.5, 0.25], 0), [0.25, 0.5, 0.25])
        np.testing.assert_allclose(edge_readers._smoothed_little(image), little, atol=1e-6)


def suppress_slowly(E: Floats, radius: int) -> Floats:
    """Pixel by pixel, in float32, from the tools' orientation."""
    height, width = E.shape
    angle = edge_readers._orientation(E)

    def between(x: f32, y: f32) -> f32:
        x, y = (f32(min(max(float(at), 0), side - 1.001)) for at, side in ((x, width), (y, height)))
        column, row = int(x), int(y)
        right, below = f32(x - f32(column)), f32(y - f32(row))
        left, above = f32(1 - right), f32(1 - below)
        terms = (
            (E[row, column], left, above),
            (E[row, column + 1], right, above),
            (E[row + 1, column], left, below),
            (E[row + 1, column + 1], right, below),
        )
        total = f32(0)
        for value, one, other in terms:
            total = f32(total + f32(f32(value * one) * other))
        return total

    result = E.copy()
    for y, x in np.argwhere(E):
        cosine, sine = f32(math.cos(float(angle[y, x]))), f32(math.sin(float(angle[y, x])))
        for d in range(-radius, radius + 1):
            there = between(f32(f32(x) + f32(f32(d) * cosine)), f32(f32(y) + f32(f32(d) * sine)))
            if d and f32(E[y, x] * f32(1.01)) < there:
                result[y, x] = 0
    fade = min(5, height // 2, width // 2)
    for i in range(fade):
        for line in (result[:, i], result[:, width - 1 - i]):
            line *= f32(i / fade)
    for i in range(fade):
        for line in (result[i], result[height - 1 - i]):
            line *= f32(i / fade)
    return result


def structured(kind: str) -> Floats:
    rng, (h, w) = np.random.default_rng(2), (26, 33)
    y, x = np.mgrid[:h, :w].astype(float)
    return {
        "noise": rng.random((h, w)),
        "blurred": ndimage.gaussian_filter(rng.random((h, w)), 1.5),
        "few levels": np.round(rng.random((h, w)) * 3) / 3,
        "horizontal": np.exp(-0.5 * ((y - 13) / 2) ** 2),
        "vertical": np.exp(-0.5 * ((x - 16) / 2) ** 2),
        "slanted": np.exp(-0.5 * (((x - 16) * 0.8 + (y - 13) * 0.6) / 2) ** 2),
        "flat": np.full((h, w), 0.4),
        "empty": np.zeros((h, w)),
        "at the border": np.where((x < 3) | (y > h - 3), 0.9, 0.1),
        "grid": ndimage.gaussian_filter(((x % 8 == 0) | (y % 8 == 0)).astype(float), 0.8),
    }[kind].astype(f32)


@pytest.mark.parametrize("radius", [1, 4])
@pytest.mark.parametrize(
    "kind",
    "noise;blurred;few levels;horizontal;vertical;slanted;flat;empty;at the border;grid".split(";"),
)
def test_suppression_is_the_slow_one(kind: str, radius: int) -> None:
    np.testing.assert_array_equal(nms(structured(kind), radius), suppress_slowly(structured(kind), radius))


@pytest.mark.parametrize("reader", ALL, ids=lambda reader: reader.name)
def test_counts_are_those_of_each_threshold_alone(reader: Reader) -> None:
    grey = stored("rings")
    truth = thin(stored("bars") > 100)
    values = {
        "read_one_cont_png": lambda: nms(grey.astype(f32) / f32(255)),
        "read_one_png": lambda: grey / 255,
        "sak": lambda: np.round(nms(edge_readers._smoothed_little(grey.astype(f32) / f32(255)), 4) * 255) / 255,
    }[reader.name]().astype(float)
    counts = reader_counts(reader, grey / 255, truth, 0.02)
    assert counts.shape == (len(reader.thresholds), 3)
    for threshold, row in list(zip(reader.thresholds, counts, strict=True))[::7]:
        predicted = thin(values > threshold if reader.strict else values >= threshold)
        assert row.tolist() == [match_count(predicted, truth, 0.02 * math.hypot(61, 83)), predicted.sum(), truth.sum()]


def test_thresholds_are_exceeded_or_reached_as_published() -> None:
    assert HEADLINE.thresholds == SEISM_THRESHOLDS and len(SEISM_THRESHOLDS) == 101
    assert PLAIN.thresholds == SAK.thresholds == THRESHOLDS and len(THRESHOLDS) == 99
    assert (HEADLINE.strict, PLAIN.strict, SAK.strict) == (True, False, False)
    grey = np.arange(256, dtype=np.uint8)[None]
    for value in (51, 102, 153, 204):  # 0.2, 0.4, 0.6, 0.8
        at = replace(PLAIN, thresholds=(value / 255,))
        assert at.levels(grey)[0, value] == 1 and at.levels(grey)[0, value - 1] == 0
        assert replace(at, strict=True).levels(grey)[0, value] == 0
    # A single of MATLAB is compared with a double as it is, and 0.2 as a single is above 0.2.
    single = replace(HEADLINE, ridges=lambda grey: grey.astype(f32) / f32(255), thresholds=(0.2,))
    assert single.levels(grey)[0, 50:52].tolist() == [0, 1]


def test_both_protocols_have_the_headline_first() -> None:
    assert {name: [reader.name for reader in readers] for name, readers in READERS.items()} == {
        "A": ["read_one_cont_png", "read_one_png"],
        "B": ["read_one_cont_png", "sak"],
    }


def test_suppression_changes_the_figure_and_smoothing_first_would_too() -> None:
    """A blurred map: the headline's figure is that of the map suppressed and not stored again."""
    rng = np.random.default_rng(0)
    regions = ndimage.gaussian_filter(rng.normal(size=(96, 128)), 9) > 0
    truth = np.zeros(regions.shape, bool)
    truth[:, :-1] |= regions[:, 1:] != regions[:, :-1]
    truth[:-1] |= regions[1:] != regions[:-1]
    blurred = ndimage.gaussian_filter(truth.astype(float), 1.5) * 2.6
    probability = np.clip(blurred + ndimage.gaussian_filter(rng.normal(0, 0.3, truth.shape), 2), 0, 1)

    def figure(counts: NDArray[np.int64], thresholds: tuple[float, ...]) -> float:
        return summarise(counts, ois_counts(counts), thresholds)["odsF"]

    by_reader = {
        reader.name: figure(reader_counts(reader, probability, truth, 0.011), reader.thresholds) for reader in ALL
    }
    by_hand = figure(edge_counts(probability, truth, 0.011, SEISM_THRESHOLDS), SEISM_THRESHOLDS)
    assert by_reader["read_one_cont_png"] == by_hand
    assert len({round(value, 2) for value in by_reader.values()}) == 3


@pytest.mark.parametrize("call", [lambda: nms(np.zeros(5)), lambda: nms(np.zeros((1, 5)))])
def test_maps_that_are_none_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="probability"):
        call()
