"""odsF, oisF and AP of edge maps as seism defines them, without MATLAB.

A map as stored (8 bits) -> a published reader's boundaries at each threshold (m3vit.evaluation.edge_readers) ->
thinning -> one-to-one matching with the truth within a fraction of the image diagonal; counts are summed over images
before F is taken. Read from the released tools: seism's src/measures/eval_cont.m, src/piotr_edges/edgesEvalImg.m and
src/scripts/{gather_measure,general_ods,general_ois,general_ap}.m; all versions of the readers go through these.

Not used: pyEdgeEval 0.2.8 compiles the original C++ matcher on installation (Linux, Cython, OpenCV) and takes about
a second a threshold at 425 x 560; edgeval 0.1.1 needs CUDA and ships prebuilt binaries.

An image's statistic are its counts (`reader_counts`), pure and picklable: compute them in any process, add them up,
resample them. H, W rows and columns; T thresholds.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from m3vit.evaluation.edge_readers import SEISM_THRESHOLDS, THRESHOLDS, Floats, Reader, as_stored, nms, suppressed
from m3vit.evaluation.matching import MAX_MAPS, Words, matching_sizes

__all__ = [
    "SEISM_THRESHOLDS",
    "THRESHOLDS",
    "edge_counts",
    "match_count",
    "nms",
    "ois_counts",
    "reader_counts",
    "summarise",
    "thin",
]

Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]

_BLOCK = 1 << 14  # pixels thinned in one numpy call: the operands stay in the cache


def thin(mask: Bools) -> Bools:
    """Thin a mask [H, W] to lines one pixel wide: MATLAB's bwmorph(mask, 'thin', Inf).

    Guo and Hall's conditions as in Lam, Lee, Suen (TPAMI 1992, p. 879), outside the image all false.
    """
    _check_map("mask", mask)
    return _thin_words(np.asarray(mask, bool).astype(np.uint64)) > 0


def _thin_words(words: Words) -> Words:
    """Thin up to 64 masks at once: bit k of words [H, W] is a pixel of mask k."""
    row = words.shape[1] + 2
    flat = np.pad(words, 1).ravel()
    # Counter-clockwise from east, in the literature x1 .. x8.
    around = np.array([1, 1 - row, -row, -row - 1, -1, row - 1, row, row + 1])
    # A pixel's fate hangs on its 3 x 3 pixels alone: it is looked at again only where one of them has changed since
    # the last sub-iteration of that kind, that is, in one of the last two.
    active, second = np.flatnonzero(flat), False
    before = active
    while len(active):
        drop = np.empty(len(active), np.uint64)
        for start in range(0, len(active), _BLOCK):
            block = active[start : start + _BLOCK]
            drop[start : start + _BLOCK] = flat[block] & _deletable([flat[block + i] for i in around], second)
        hit = np.flatnonzero(drop)
        changed = active[hit]
        flat[changed] ^= drop[hit]
        near = np.zeros(len(flat), bool)
        for i in (0, *around):
            near[changed + i] = True
            near[before + i] = True
        near &= flat != 0
        active, before, second = np.flatnonzero(near), changed, not second
    return flat.reshape(-1, row)[1:-1, 1:-1]


def _deletable(x: Sequence[Words], second: bool) -> Words:
    """Return the bits of the pixels that one of the two sub-iterations deletes, given their 8 neighbours."""
    x1, x2, x3, x4, x5, x6, x7, x8 = x
    a, b, c, d = x2 | x3, x4 | x5, x6 | x7, x8 | x1
    e, f, g, h = x1 | x2, x3 | x4, x5 | x6, x7 | x8
    # G1: exactly one group of neighbours, X_H = 1 (no deletion splits a line or opens a hole).
    s, t, u, v = ~x1 & a, ~x3 & b, ~x5 & c, ~x7 & d
    one_group = (s ^ t ^ u ^ v) & ~((s & t) | (u & v))
    # G2: 2 <= min(n1, n2) <= 3, where n1 counts e..h and n2 counts a..d (end points stay).
    two_n1 = (e & f) | (g & h) | ((e | f) & (g | h))
    two_n2 = (a & b) | (c & d) | ((a | b) & (c | d))
    inside = a & b & c & d & e & f & g & h
    # G3: the side that is peeled.
    spared = (c | ~x4) & x5 if second else (a | ~x8) & x1
    return one_group & two_n1 & two_n2 & ~inside & ~spared


def match_count(predicted: Bools, truth: Bools, max_distance_px: float) -> int:
    """Return the size of a maximum one-to-one matching of two boundary maps [H, W] within a distance, inclusive."""
    _check_pair(predicted, truth)
    if not max_distance_px >= 0:
        raise ValueError(f"max_distance_px {max_distance_px}: a number of pixels, 0 or more")
    words = np.asarray(predicted, bool).astype(np.uint64)
    return int(matching_sizes(words, np.asarray(truth, bool), max_distance_px, 1)[0])


def reader_counts(reader: Reader, probability: Floats, truth: Bools, max_dist: float) -> Counts:
    """Return an image's counts int64 [T, 3] by a published reader: matched, predicted and true edge pixels.

    `probability` and `truth` are [H, W], of the same size; the reader gets the map stored with 8 bits (rounded).
    `max_dist` is in fractions of the image diagonal (0.0075 for PASCAL-Context, 0.011 for NYUD-v2); `truth` is matched
    as it is, thin or not.
    """
    _check_pair(probability, truth)
    limits = np.asarray(reader.thresholds, np.float64)
    if limits.ndim != 1 or not len(limits) or not np.all((limits >= 0) & (limits <= 1)):
        raise ValueError(f"thresholds {reader.thresholds}: a list of numbers in 0..1")
    if not max_dist >= 0:
        raise ValueError(f"max_dist {max_dist}: a fraction of the image diagonal, 0 or more")
    if not np.all((probability >= 0) & (probability <= 1)):
        raise ValueError(f"probability in {np.min(probability)}..{np.max(probability)}: must be in 0..1")
    passed = reader.levels(np.floor(255 * np.asarray(probability, np.float64) + 0.5).astype(np.uint8))
    true = np.asarray(truth, bool)
    max_distance_px = max_dist * float(np.hypot(*true.shape))

    # Thresholds between the same two levels that occur give the same map: one map per lowest level in it.
    present = np.flatnonzero(np.bincount(passed.ravel(), minlength=len(limits) + 1))
    rank = np.argsort(np.argsort(limits, kind="stable"), kind="stable")  # a pixel passes it at a level above its rank
    position = np.searchsorted(present, rank, side="right")
    occurring = np.unique(position[position < len(present)])
    by_map = np.zeros((len(present) + 1, 2), np.int64)  # matched, predicted; the last one is the empty map
    for start in range(0, len(occurring), MAX_MAPS):
        maps = occurring[start : start + MAX_MAPS]
        in_map = np.arange(len(limits) + 1)[:, None] >= present[maps]
        table = (in_map.astype(np.uint64) << np.arange(len(maps), dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
        thinned = _thin_words(table[passed])
        pixels = thinned[thinned != 0]
        by_map[maps, 0] = matching_sizes(thinned, true, max_distance_px, len(maps))
        by_map[maps, 1] = [np.count_nonzero(pixels & np.uint64(1 << k)) for k in range(len(maps))]
    true_pixels = np.full(len(limits), np.count_nonzero(true))
    return np.column_stack([by_map[position], true_pixels]).astype(np.int64)


def edge_counts(
    probability: Floats,
    truth: Bools,
    max_dist: float,
    thresholds: Sequence[float] = THRESHOLDS,
    apply_nms: bool = True,
) -> Counts:
    """Return `reader_counts` at any thresholds, exceeded: of the map suppressed as by seism's reader, or as stored."""
    reader = Reader("", tuple(thresholds), True, suppressed if apply_nms else as_stored)
    return reader_counts(reader, probability, truth, max_dist)


def ois_counts(counts: Counts) -> Counts:
    """Return the counts [3] of the image's best threshold, from its counts [T, 3]: the first of several."""
    _check_counts(counts)
    return np.asarray(counts)[_f_measure(counts).argmax()]


def summarise(total_counts: NDArray, ois_totals: NDArray, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, float]:
    """Return {"odsF", "oisF", "AP" (percent), "threshold"} of counts summed over images.

    `total_counts` [T, 3] are sums of `edge_counts`, `ois_totals` [3] those of `ois_counts`. All as in seism: odsF is
    the best F over the thresholds, not interpolated between them, and `threshold` the lowest that reaches it. AP is
    0.01 times the sum of the precision interpolated at recalls 0, 0.01 .. 1, and 0 outside the recalls reached; where
    nothing is predicted the precision is 1 and the recall 0. Of equal recalls the lowest threshold counts (MATLAB's
    unique since R2013a). Mind that AP thus may reach 101, and that it is 0 with a single recall, for perfect
    predictions of probability 1 too.
    """
    _check_counts(total_counts)
    best_per_image = np.asarray(ois_totals)
    if len(total_counts) != len(thresholds) or best_per_image.shape != (3,):
        raise ValueError(
            f"counts {np.shape(total_counts)}, ois_totals {best_per_image.shape}, {len(thresholds)} thresholds: "
            f"must be [T, 3], [3], T"
        )
    ascending = np.argsort(thresholds, kind="stable")
    matched, predicted, true = np.asarray(total_counts)[ascending].T
    f_measure = _f_measure(np.asarray(total_counts)[ascending])
    best = int(f_measure.argmax())
    recall, first = np.unique(matched / np.maximum(true, 1), return_index=True)
    precision = np.where(predicted > 0, matched / np.maximum(predicted, 1), 1.0)[first]
    average = 0.0
    if len(recall) > 1:
        average = 0.01 * float(np.interp(np.linspace(0, 1, 101), recall, precision, left=0, right=0).sum())
    return {
        "odsF": 100 * float(f_measure[best]),
        "oisF": 100 * float(_f_measure(best_per_image[None])[0]),
        "AP": 100 * average,
        "threshold": float(thresholds[ascending[best]]),
    }


def _f_measure(counts: NDArray) -> NDArray[np.float64]:
    """Return F = 2PR / (P + R) = 2 matched / (predicted + true) of counts [N, 3], 0 where nothing matched."""
    matched, predicted, true = np.asarray(counts).T
    return 2 * matched / np.maximum(predicted + true, 1)


def _check_map(name: str, values: NDArray) -> None:
    if np.ndim(values) != 2 or not np.size(values):
        raise ValueError(f"{name} of shape {np.shape(values)}: must be [H, W]")


def _check_pair(predicted: NDArray, truth: NDArray) -> None:
    _check_map("prediction", predicted)
    if np.shape(predicted) != np.shape(truth):
        raise ValueError(f"prediction {np.shape(predicted)} and truth {np.shape(truth)}: must have one size")


def _check_counts(counts: NDArray) -> None:
    if np.ndim(counts) != 2 or np.shape(counts)[1] != 3 or not len(counts):
        raise ValueError(f"counts of shape {np.shape(counts)}: must be [thresholds, 3]")
