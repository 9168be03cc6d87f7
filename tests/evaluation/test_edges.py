"""Edge scores: cases worked by hand, and each fast step against a slow obvious one."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from scipy import ndimage, optimize

from m3vit.data.thinning import segmentation_boundaries
from m3vit.evaluation import matching
from m3vit.evaluation.edges import (
    SEISM_THRESHOLDS,
    THRESHOLDS,
    edge_counts,
    match_count,
    nms,
    ois_counts,
    summarise,
    thin,
)

Bools = NDArray[np.bool_]
MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))
EIGHT = np.ones((3, 3))  # scipy's structure of 8-connectivity


def drawing(*rows: str) -> Bools:
    """A mask from text: # is set."""
    return np.array([[letter == "#" for letter in row] for row in rows])


def random_mask(rng: np.random.Generator, shape: tuple[int, int], density: float) -> Bools:
    return rng.random(shape) < density


def pair_of_masks(side: int = 9) -> st.SearchStrategy[tuple[Bools, Bools]]:
    shapes = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=side)
    return shapes.flatmap(lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape)))


# --- matching


def squared_distances(predicted: Bools, truth: Bools) -> NDArray[np.int64]:
    """[P, T]"""
    return ((np.argwhere(predicted)[:, None] - np.argwhere(truth)[None]) ** 2).sum(axis=2)


def kuhn(predicted: Bools, truth: Bools, distance: float) -> int:
    """Kuhn's algorithm: augment from one predicted pixel after the other."""
    near = squared_distances(predicted, truth) <= distance**2
    mate: dict[int, int] = {}

    def augment(p: int, seen: set[int]) -> bool:
        for t in np.flatnonzero(near[p]):
            if t not in seen:
                seen.add(t)
                if t not in mate or augment(mate[t], seen):
                    mate[t] = p
                    return True
        return False

    return sum(augment(p, set()) for p in range(len(near)))


def cheapest_assignment(predicted: Bools, truth: Bools, distance: float) -> int:
    """As correspondPixels poses it: minimal summed distance, 100 maximum distances for each pixel left out."""
    squared = squared_distances(predicted, truth)
    outlier = 100 * max(distance, 1)
    num_P, num_T = squared.shape
    cost = np.full((num_P + num_T, num_T + num_P), outlier, float)
    cost[:num_P, :num_T] = np.where(squared <= distance**2, np.sqrt(squared), 3 * outlier)  # 3: never worth it
    rows, columns = optimize.linear_sum_assignment(cost)
    return int(((rows < num_P) & (columns < num_T)).sum())


def test_a_shifted_line_matches_within_the_distance_only() -> None:
    truth, predicted = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    truth[5, 3:25] = True  # 22 pixels
    predicted[8, 3:25] = True  # 3 rows below
    assert match_count(predicted, truth, 3.0) == 22
    assert match_count(predicted, truth, 2.9) == 0
    # Shifted by 3 rows and 4 columns, to columns 7..28. At 4.9 pixels a pair may be sqrt(4.9^2 - 3^2) = 3.87, that is
    # 3 columns apart: columns 7..27 match columns 4..24, and column 28 has no truth within 3.
    predicted = np.roll(truth, (3, 4), axis=(0, 1))
    assert match_count(predicted, truth, 4.9) == 21


def test_the_distance_is_inclusive() -> None:
    truth, predicted = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    truth[1, 1] = True
    predicted[4, 5] = True  # 3-4-5
    assert match_count(predicted, truth, 5.0) == 1
    assert match_count(predicted, truth, np.nextafter(5.0, 0)) == 0
    assert match_count(truth, truth, 0.0) == 1
    assert match_count(predicted, truth, 0.0) == 0


def test_a_true_pixel_is_matched_once() -> None:
    truth = drawing("..#..")
    assert match_count(drawing(".#.#."), truth, 1.5) == 1


def test_a_pair_gives_way_to_two() -> None:
    # Predicted columns 0 and 3, true columns 2 and 5. At distance 1 the only pair is 3-2. With pairs 2 apart allowed,
    # 3-2 must give way to 0-2 and 3-5.
    predicted, truth = drawing("#..#...."), drawing("..#..#..")
    assert match_count(predicted, truth, 1.0) == 1
    assert match_count(predicted, truth, 2.0) == 2
    # Predicted 2 and 4, true 0 and 3, at distance 2: 2-0 and 4-3, not 2-3, which would leave 4 and 0 alone.
    assert match_count(drawing("..#.#"), drawing("#..#."), 2.0) == 2


def test_empty_maps() -> None:
    empty, some = np.zeros((6, 7), bool), np.eye(6, 7, dtype=bool)
    for predicted, truth in ((empty, some), (some, empty), (empty, empty)):
        assert match_count(predicted, truth, 3.0) == 0
    # matched, predicted, true
    np.testing.assert_array_equal(edge_counts(some.astype(float), empty, 0.1, [0.5], apply_nms=False), [[0, 6, 0]])
    np.testing.assert_array_equal(edge_counts(empty.astype(float), some, 0.1, [0.5], apply_nms=False), [[0, 0, 6]])
    np.testing.assert_array_equal(edge_counts(empty.astype(float), empty, 0.1, [0.5]), [[0, 0, 0]])


@settings(max_examples=200, deadline=None)
@given(pair_of_masks(), st.sampled_from([0.0, 1.0, 1.5, 2.0, math.sqrt(5), 3.0, 6.0]))
def test_match_count_is_that_of_obvious_matchers(masks: tuple[Bools, Bools], distance: float) -> None:
    count = match_count(*masks, distance)
    assert count == kuhn(*masks, distance)
    assert count == cheapest_assignment(*masks, distance)


@settings(max_examples=100, deadline=None)
@given(pair_of_masks(12), st.floats(0, 5), st.floats(0, 5))
def test_match_count_properties(masks: tuple[Bools, Bools], distance: float, more: float) -> None:
    predicted, truth = masks
    count = match_count(predicted, truth, distance)
    assert np.count_nonzero(predicted & truth) <= count <= min(predicted.sum(), truth.sum())
    assert match_count(truth, predicted, distance) == count
    moves: list[Callable[[Bools], Bools]] = [np.transpose, np.flipud, np.fliplr]
    for move in moves:
        assert match_count(move(predicted), move(truth), distance) == count
    assert match_count(predicted, truth, distance + more) >= count


@pytest.mark.parametrize("density", [(0.1, 0.1), (0.3, 0.08), (0.06, 0.3), (0.25, 0.25)])
def test_larger_maps_need_long_augmenting_paths(density: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    predicted, truth = (random_mask(rng, (24, 30), share) for share in density)
    for distance in (1.0, 2.0, 3.5):
        assert match_count(predicted, truth, distance) == kuhn(predicted, truth, distance)


def test_many_maps_at_once_and_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    # Maps with much more and much less than the truth, so that both directions of search occur.
    rng = np.random.default_rng(1)
    maps = [random_mask(rng, (30, 40), share) for share in np.linspace(0, 0.5, matching.MAX_MAPS)]
    truth = random_mask(rng, (30, 40), 0.2)
    words = np.zeros((30, 40), np.uint64)
    for k, mask in enumerate(maps):
        words |= mask.astype(np.uint64) << np.uint64(k)
    alone = [match_count(mask, truth, 2.5) for mask in maps]
    np.testing.assert_array_equal(matching.matching_sizes(words, truth, 2.5, len(maps)), alone)
    monkeypatch.setattr(matching, "_MAX_EDGES", 50)
    np.testing.assert_array_equal(matching.matching_sizes(words, truth, 2.5, len(maps)), alone)
    assert alone[::9] == [kuhn(mask, truth, 2.5) for mask in maps[::9]]


# --- thinning and truth


def thin_slowly(mask: Bools) -> Bools:
    """Lam, Lee, Suen 1992, p. 879, pixel by pixel: n[0] .. n[7] are x1 .. x8, counter-clockwise from east."""
    around = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)]
    image = np.pad(mask, 1)
    while True:
        before = image.copy()
        for second in (False, True):
            source = image.copy()
            for y, x in np.argwhere(source):
                n = [bool(source[y + dy, x + dx]) for dy, dx in around]
                groups = sum(not n[i] and (n[i + 1] or n[(i + 2) % 8]) for i in (0, 2, 4, 6))
                n1 = sum(n[i] or n[i + 1] for i in (0, 2, 4, 6))
                n2 = sum(n[i + 1] or n[(i + 2) % 8] for i in (0, 2, 4, 6))
                third = (n[5] or n[6] or not n[3]) and n[4] if second else (n[1] or n[2] or not n[7]) and n[0]
                if groups == 1 and 2 <= min(n1, n2) <= 3 and not third:
                    image[y, x] = False
        if (image == before).all():
            return image[1:-1, 1:-1]


def test_thin_small_figures() -> None:
    bar = np.zeros((7, 11), bool)
    bar[2:5, 1:10] = True
    # 3 x 9 bar: peeled from both long sides to its middle row; 1 pixel is lost at either end.
    expected = np.zeros((7, 11), bool)
    expected[3, 2:9] = True
    np.testing.assert_array_equal(thin(bar), expected)
    # Stairs lose their corners; the last step is an end.
    stairs, line = drawing("##...", ".##..", "..##.", "...##"), drawing("#....", ".#...", "..#..", "...##")
    np.testing.assert_array_equal(thin(stairs), line)
    ring = drawing("#####", "#...#", "#...#", "#####")
    assert ndimage.label(~thin(np.pad(ring, 1)))[1] == 2  # a hole stays a hole
    for kept in (drawing("#"), drawing("#####"), drawing("#..", ".#.", "..#"), np.zeros((3, 4), bool)):
        np.testing.assert_array_equal(thin(kept), kept)


@settings(max_examples=200, deadline=None)
@given(MASKS)
def test_thin_is_the_slow_one_and_keeps_the_connectivity(mask: Bools) -> None:
    thinned = thin(mask)
    np.testing.assert_array_equal(thinned, thin_slowly(mask))
    np.testing.assert_array_equal(thin(thinned), thinned)
    assert not (thinned & ~mask).any()
    assert ndimage.label(thinned, EIGHT)[1] == ndimage.label(mask, EIGHT)[1]


@pytest.mark.parametrize("sigma", [1.0, 2.5])
def test_thin_large_blobs(sigma: float) -> None:
    # Wide blobs take many rounds, in which only a part of the pixels is looked at.
    blobs = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((60, 70)), sigma) > 0
    np.testing.assert_array_equal(thin(blobs), thin_slowly(blobs))


def test_boundaries_of_label_maps_by_hand() -> None:
    # One vertical border: the last pixel to the west of it, one pixel wide, down to the last row.
    two = np.repeat([[0, 0, 7, 7]], 3, axis=0)
    np.testing.assert_array_equal(segmentation_boundaries(two), drawing(".#..", ".#..", ".#.."))
    np.testing.assert_array_equal(segmentation_boundaries(two.T), drawing(".#..", ".#..", ".#..").T)
    # One pixel of another label at (1, 1): east, south or south-east of it at (1, 0), (0, 1), (0, 0), and itself. Of
    # this 2 x 2 square the first sub-iteration deletes all that have no pixel to the east with one to the north of
    # them or none to the south-east: the south-west one stays.
    dot = np.zeros((4, 4), int)
    dot[1, 1] = 3
    np.testing.assert_array_equal(segmentation_boundaries(dot), drawing("....", "#...", "....", "...."))
    # (1, 1), (1, 2) and (2, 1) see the corner; the corner itself has no east or south. The elbow (1, 1) is thinned.
    corner = np.zeros((3, 3), int)
    corner[2, 2] = 1
    np.testing.assert_array_equal(segmentation_boundaries(corner), drawing("...", "..#", ".#."))
    assert not segmentation_boundaries(np.full((5, 6), 4)).any()


# --- non-maximum suppression


def test_nms_keeps_the_crest_of_a_vertical_ridge() -> None:
    ridge = np.exp(-0.5 * ((np.arange(41) - 20) / 2.0) ** 2) * np.ones((30, 1))
    suppressed = nms(ridge)
    assert suppressed.dtype == np.float32
    inner = suppressed[5:-5]  # the border fades
    np.testing.assert_array_equal(np.flatnonzero(inner.any(axis=0)), [20])
    np.testing.assert_array_equal(inner[:, 20], 1)  # as it was: the map itself is not smoothed
    # 0 in the outermost row, then 1/5, 2/5, 3/5, 4/5 and whole from the sixth.
    np.testing.assert_allclose(suppressed[:6, 20], np.arange(6) / 5, rtol=1e-6)


def test_nms_spares_what_is_at_most_a_hundredth_weaker() -> None:
    # Crests between columns 20 and 21, of sigma 2: at 20.49 the two differ by exp((0.51^2 - 0.49^2) / 8) = 1.0025, at
    # 20.3 by exp((0.7^2 - 0.3^2) / 8) = 1.05.
    for crest, kept in ((20.49, [20, 21]), (20.3, [20])):
        ridge = np.exp(-0.5 * ((np.arange(41) - crest) / 2.0) ** 2) * np.ones((30, 1))
        np.testing.assert_array_equal(np.flatnonzero(nms(ridge)[5:-5].any(axis=0)), kept)


def test_nms_does_nothing_on_an_exactly_horizontal_ridge() -> None:
    # The flaw of the published formula: the mixed derivative is exactly 0, so the orientation is taken for 0.
    ridge = np.exp(-0.5 * ((np.arange(41) - 20) / 2.0) ** 2)[:, None] * np.ones((1, 30))
    inner = nms(ridge)[5:-5, 5:-5]
    assert (inner > 0).all()


@pytest.mark.parametrize("degrees", [20, 45, 70, 110, 160])
def test_nms_thins_slanted_ridges(degrees: float) -> None:
    y, x = np.mgrid[:61, :61] - 30
    across = x * math.cos(math.radians(degrees)) + y * math.sin(math.radians(degrees))
    suppressed = nms(np.exp(-0.5 * (across / 2) ** 2))
    assert (suppressed[np.abs(across) > 1.5] < 0.02).all()
    assert ndimage.label(suppressed > 0.5, EIGHT)[1] == 1
    assert 40 < np.count_nonzero(suppressed > 0.5) < 130  # about 60 / sin or cos, up to 2 wide


# --- counts and scores


def blurry(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    return (1 / (1 + np.exp(-12 * field))).astype(np.float32)


@pytest.mark.parametrize("apply_nms", [True, False])
@pytest.mark.parametrize("thresholds", [THRESHOLDS, SEISM_THRESHOLDS, (0.7, 0.2, 0.7)])
def test_edge_counts_is_the_plain_way(apply_nms: bool, thresholds: tuple[float, ...]) -> None:
    rng = np.random.default_rng(3)
    probability, truth = blurry(rng, (40, 48)), thin(blurry(rng, (40, 48)) > 0.6)
    counts = edge_counts(probability, truth, 0.04, thresholds, apply_nms)
    assert counts.shape == (len(thresholds), 3) and counts.dtype == np.int64
    grey = np.floor(255 * probability.astype(float) + 0.5)  # stored once, before the suppression
    values = nms((grey / 255).astype(np.float32)).astype(float) if apply_nms else grey / 255
    for threshold, row in zip(thresholds, counts, strict=True):
        predicted = thin(values > threshold)
        assert row.tolist() == [
            match_count(predicted, truth, 0.04 * math.hypot(40, 48)),
            predicted.sum(),
            truth.sum(),
        ]


def test_thresholds_are_strict_and_act_on_8_bits() -> None:
    assert len(THRESHOLDS) == 99 and len(SEISM_THRESHOLDS) == 101
    probability = np.zeros((9, 9))
    probability[4, 4] = 0.2005  # stored as 51 = 255 / 5, which does not exceed 0.2
    truth = probability > 0
    counts = edge_counts(probability, truth, 0.01, [0.19, 0.2], apply_nms=False)
    np.testing.assert_array_equal(counts, [[1, 1, 1], [0, 0, 1]])


def test_the_distance_is_a_fraction_of_the_diagonal() -> None:
    probability, truth = np.zeros((30, 40)), np.zeros((30, 40), bool)  # diagonal 50
    probability[10, 10], truth[13, 14] = 1.0, True  # 5 apart
    assert edge_counts(probability, truth, 0.1, [0.5], apply_nms=False).tolist() == [[1, 1, 1]]
    assert edge_counts(probability, truth, 0.0999, [0.5], apply_nms=False).tolist() == [[0, 1, 1]]


def test_ods_and_ois_of_two_images() -> None:
    # Image 1: at 0.3 F = 2*80/(100+100) = 0.8, at 0.6 2*50/(60+100) = 0.625.
    # Image 2: at 0.3 F = 2*40/(160+100) = 0.308, at 0.6 2*40/(60+100) = 0.5.
    thresholds = [0.3, 0.6]
    first, second = np.array([[80, 100, 100], [50, 60, 100]]), np.array([[40, 160, 100], [40, 60, 100]])
    np.testing.assert_array_equal(ois_counts(first), first[0])
    np.testing.assert_array_equal(ois_counts(second), second[1])
    result = summarise(first + second, ois_counts(first) + ois_counts(second), thresholds)
    # Dataset: at 0.3 2*120/(260+200) = 12/23 = 0.522, at 0.6 2*90/(120+200) = 9/16 = 0.5625.
    assert result["odsF"] == pytest.approx(100 * 9 / 16)
    assert result["threshold"] == 0.6
    # OIS: 80 + 40 matched, 100 + 60 predicted, 200 true: 2*120/360 = 2/3.
    assert result["oisF"] == pytest.approx(100 * 2 / 3)
    # Recalls 0.45 (P = 0.75) and 0.6 (P = 6/13): straight between them, 0 elsewhere. 16 points 0.45, 0.46 .. 0.60
    # at equal steps: 16 times the mean of the two ends, times 0.01.
    assert result["AP"] == pytest.approx(100 * 0.01 * 16 * (0.75 + 6 / 13) / 2)
    # The order of the thresholds does not matter.
    assert summarise((first + second)[::-1], ois_counts(first) + ois_counts(second), thresholds[::-1]) == result


def test_of_equal_recalls_the_lowest_threshold_counts() -> None:
    # Recall 0.5 at precisions 50/200 and 50/50; nothing predicted is recall 0 at precision 1 (seism's
    # gather_measure.m:78): a line from (0, 1) to (0.5, 1/4), 51 points.
    counts = np.array([[50, 200, 100], [50, 50, 100], [0, 0, 100]])
    result = summarise(counts, counts[1], [0.1, 0.2, 0.3])
    assert result["AP"] == pytest.approx(100 * 0.01 * 51 * (1 + 1 / 4) / 2)
    assert result["odsF"] == pytest.approx(100 * 2 / 3)  # 2*50/(50+100)
    # Predicted, but nothing of it right: recall 0 at precision 0.
    counts[2] = 0, 7, 100
    assert summarise(counts, counts[1], [0.1, 0.2, 0.3])["AP"] == pytest.approx(100 * 0.01 * 51 * (0 + 1 / 4) / 2)


def test_a_perfect_prediction_scores_100() -> None:
    rng = np.random.default_rng(0)
    truth = segmentation_boundaries((ndimage.gaussian_filter(rng.standard_normal((60, 80)), 4) > 0).astype(int))
    counts = edge_counts(truth.astype(np.float32), truth, 0.011, apply_nms=False)
    result = summarise(counts, ois_counts(counts))
    assert (result["odsF"], result["oisF"]) == (100.0, 100.0)
    assert result["AP"] == 0.0  # a single recall: the tools' definition leaves nothing to interpolate
    # Probabilities that fall off along the edges: every recall, at precision 1; the tools sum 101 points / 100.
    graded = np.where(truth, np.linspace(0.005, 0.995, 80), 0)
    counts = edge_counts(graded, truth, 0.011, apply_nms=False)
    assert 90 < summarise(counts, ois_counts(counts))["AP"] <= 101


def test_without_truth_the_scores_are_zero() -> None:
    counts = edge_counts(np.ones((9, 9)), np.zeros((9, 9), bool), 0.1)
    scores = summarise(counts, ois_counts(counts))
    assert (scores["odsF"], scores["oisF"], scores["AP"]) == (0.0, 0.0, 0.0)


def test_edge_counts_leaves_its_arguments_alone() -> None:
    rng = np.random.default_rng(0)
    probability, truth = blurry(rng, (20, 25)), random_mask(rng, (20, 25), 0.1)
    copies = probability.copy(), truth.copy()
    first = edge_counts(probability, truth, 0.05)
    np.testing.assert_array_equal(edge_counts(probability, truth, 0.05), first)
    np.testing.assert_array_equal(probability, copies[0])
    np.testing.assert_array_equal(truth, copies[1])


@pytest.mark.parametrize("apply_nms", [True, False])
@pytest.mark.parametrize("size", [(2, 2), (2, 9), (9, 3), (5, 5)])
def test_tiny_images(size: tuple[int, int], apply_nms: bool) -> None:
    counts = edge_counts(np.full(size, 0.5), np.ones(size, bool), 0.5, [0.1], apply_nms)
    assert 0 <= counts[0, 0] <= counts[0, 1] <= counts[0, 2] == size[0] * size[1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: edge_counts(np.zeros((3, 4)), np.zeros((4, 3), bool), 0.1), r"\(3, 4\) and truth \(4, 3\)"),
        (lambda: edge_counts(np.full((3, 4), 1.5), np.zeros((3, 4), bool), 0.1), "1.5"),
        (lambda: edge_counts(np.full((3, 4), np.nan), np.zeros((3, 4), bool), 0.1), "nan"),
        (lambda: edge_counts(np.zeros((3, 4)), np.zeros((3, 4), bool), -0.1), "max_dist -0.1"),
        (lambda: edge_counts(np.zeros((3, 4)), np.zeros((3, 4), bool), 0.1, []), "thresholds"),
        (lambda: edge_counts(np.zeros((3, 4)), np.zeros((3, 4), bool), 0.1, [50]), "50"),
        (lambda: match_count(np.zeros((3, 4), bool), np.zeros((3, 4), bool), math.nan), "nan"),
        (lambda: thin(np.zeros(5, bool)), r"\(5,\)"),
        (lambda: nms(np.zeros((1, 5))), "2 x 2"),
        (lambda: ois_counts(np.zeros((5, 2))), r"\(5, 2\)"),
        (lambda: summarise(np.zeros((5, 3)), np.zeros(3)), "99 thresholds"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("kind", ["ones", "noise", "checkerboard", "stripes"])
@pytest.mark.parametrize("truth", ["grid", "ones"])
def test_dense_maps_do_not_stall(kind: str, truth: str) -> None:
    # scipy's maximum_bipartite_matching takes minutes on such maps. A third of the size of the real images.
    height, width = 142, 187
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    noise = rng.random((height, width))
    probability = {"ones": np.ones_like(noise), "noise": noise, "checkerboard": (x + y) % 2 * noise}.get(
        kind, y % 2 * noise
    )
    true = (x % 16 == 0) | (y % 16 == 0) if truth == "grid" else np.ones(noise.shape, bool)
    for apply_nms in (True, False):
        counts = edge_counts(probability, true, 0.033, apply_nms=apply_nms)
        assert (counts[:, 0] <= counts[:, 1:].min(axis=1)).all()
