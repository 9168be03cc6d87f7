"""Meters: what one image contributes to a metric, and the metrics of summed contributions.

Every published metric here is a function of per-image statistics summed over images. So a meter is two pure
functions: `image` returns one image's statistics, a vector of K numbers, and `compute` turns sums of such vectors
[..., K] into metrics [...]. The same numbers thus serve the score, its bootstrap over images, and several processes.

Predictions are those of m3vit.evaluation.protocols.prediction, at the label's size, labels as loaded
(m3vit.tasks). float64 throughout, so that the order of the sum does not show.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.errors import InputError
from m3vit.evaluation.edge_readers import HEADLINE, THRESHOLDS, Reader
from m3vit.evaluation.edges import ois_counts, reader_counts, summarise
from m3vit.label_sets import LABEL_SETS, LabelSet
from m3vit.tasks import IGNORE, TASKS, kind_of

Statistics = NDArray[np.float64]
Metrics = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Scoring:
    """What a meter is made for: a task of a label set under a protocol; `quick` for the evaluations while training."""

    task: str
    labels: LabelSet
    protocol: str
    quick: bool


class Meter(ABC):
    """See the module."""

    @abstractmethod
    def image(self, prediction: NDArray[Any], label: NDArray[Any]) -> Statistics:
        """Return what one image contributes: [K], all zero without a valid pixel."""

    @abstractmethod
    def compute(self, totals: Statistics) -> Metrics:
        """Return the metrics [...] of sums of contributions [..., K]."""

    def breakdown(self, prediction: NDArray[Any], label: NDArray[Any]) -> NDArray[np.int64] | None:
        """Return what one image adds to a breakdown of the errors, of any shape; None: the task has none.

        Integers, so that the sum over images is the same in any order and over any number of processes.
        """
        return None

    def explained(self, total: NDArray[np.int64]) -> dict[str, Any]:
        """Return the breakdown of a sum over images as JSON values, "kind" among them."""
        raise NotImplementedError


TRAINED = "mIoU_trained"  # beside the published mIoU, never in its place


def ratio(a: Any, b: Any, empty: float = np.nan) -> NDArray[np.float64]:
    """Return a / b, `empty` where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.divide(a, b, out=np.full(a.shape, empty), where=b != 0)


class ClassMeter(Meter):
    """mIoU in percent over all C classes (semseg, human_parts); both protocols.

    A class absent from labels and predictions counts 0, as published. `mIoU_present` is the mean over the classes that
    occur in the labels. Images without a valid pixel (no person) contribute nothing.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes

    def image(self, prediction: NDArray[np.uint8], label: NDArray[np.uint8]) -> Statistics:
        """Return true positives, predicted and labelled pixels of each class: [3 C]."""
        confusion = self.breakdown(prediction, label)
        return np.concatenate([confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)]).astype(np.float64)

    def compute(self, totals: Statistics) -> Metrics:
        """Return mIoU, mIoU_present, and the IoU of each class."""
        hits, predicted, labelled = np.split(totals, 3, axis=-1)
        iou = 100 * ratio(hits, predicted + labelled - hits, empty=0.0)
        present = labelled > 0
        result = {"mIoU": iou.mean(axis=-1), "mIoU_present": ratio((iou * present).sum(axis=-1), present.sum(axis=-1))}
        return result | {f"IoU_{name}": iou[..., index] for index, name in enumerate(self.classes)}

    def breakdown(self, prediction: NDArray[np.uint8], label: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return pixels by labelled and predicted class: [C, C]."""
        count = len(self.classes)
        valid = label != IGNORE
        pairs = label[valid].astype(np.int64) * count + prediction[valid]
        return np.bincount(pairs, minlength=count * count).reshape(count, count)

    def explained(self, total: NDArray[np.int64]) -> dict[str, Any]:
        """Return {"kind": "confusion", "classes": names, "pixels": [labelled][predicted]}."""
        return {"kind": "confusion", "classes": list(self.classes), "pixels": total.tolist()}


def over_trained(metrics: dict[str, float], classes: Sequence[str], untrained: Collection[str]) -> dict[str, float]:
    """Return the metrics of a `ClassMeter` with `TRAINED`: the mean IoU over the classes that are not `untrained`.

    Pixels of an untrained class still count against the class that is predicted there. Other meters' stay as they are.
    """
    trained = [metrics[f"IoU_{name}"] for name in classes if name not in untrained and f"IoU_{name}" in metrics]
    return {**metrics, TRAINED: float(np.mean(trained))} if trained else metrics


class DepthMeter(Meter):
    """Errors of depth in metres, over the valid pixels of all images pooled; both protocols.

    Predictions at or below zero become 1e-9 m first, as published.
    """

    RANGES = 2.0 ** (np.arange(-8, 17) / 2)  # borders of the breakdown by true depth: 0.06 to 256 m

    def image(self, prediction: NDArray[np.float32], label: NDArray[np.float32]) -> Statistics:
        """Return pixels, and sums of squared error, squared log error, relative error, delta < 1.25, 1.25^2, 1.25^3."""
        valid = label > 0
        truth, guess = label[valid].astype(np.float64), np.maximum(prediction[valid].astype(np.float64), 1e-9)
        log_error, factor = np.log(guess) - np.log(truth), np.maximum(guess / truth, truth / guess)
        within = [(factor < 1.25**power).sum() for power in (1, 2, 3)]
        sums = ((guess - truth) ** 2).sum(), (log_error**2).sum(), (np.abs(guess - truth) / truth).sum()
        return np.array([truth.size, *sums, *within], np.float64)

    def compute(self, totals: Statistics) -> Metrics:
        """Return rmse (m), log_rmse, abs_rel, and delta1 .. delta3 (percent)."""
        count, squared, log_squared, relative, *within = np.moveaxis(totals, -1, 0)
        result = {"rmse": ratio(squared, count) ** 0.5, "log_rmse": ratio(log_squared, count) ** 0.5}
        result["abs_rel"] = ratio(relative, count)
        return result | {f"delta{power}": 100 * ratio(n, count) for power, n in enumerate(within, start=1)}

    def breakdown(self, prediction: NDArray[np.float32], label: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return pixels, summed errors and squared errors (in 1e-6 m, m^2) by range of the true depth: [R, 3]."""
        valid = label > 0
        truth = label[valid].astype(np.float64)
        error = np.maximum(prediction[valid].astype(np.float64), 1e-9) - truth
        place = np.searchsorted(self.RANGES, truth, side="right")
        bins = len(self.RANGES) + 1
        count = np.bincount(place, minlength=bins)
        sums = [np.bincount(place, weights=values, minlength=bins) for values in (error, error**2)]
        return np.stack([count, *(np.rint(1e6 * values).astype(np.int64) for values in sums)], axis=1)

    def explained(self, total: NDArray[np.int64]) -> dict[str, Any]:
        """Return {"kind": "ranges", "ranges": rows} of true depth with their pixels, bias and rmse, in metres."""
        edges = [0.0, *self.RANGES.tolist(), None]
        rows = [
            {"from": low, "to": high, "pixels": int(n), "bias": error / 1e6 / n, "rmse": (squared / 1e6 / n) ** 0.5}
            for low, high, (n, error, squared) in zip(edges[:-1], edges[1:], total.tolist(), strict=True)
            if n
        ]
        return {"kind": "ranges", "ranges": rows}


class NormalsMeter(Meter):
    """Angles between predicted and true normals, over the valid pixels of all images pooled; both protocols.

    The median is read off a histogram with bins of 0.1 degrees: the mean of the two middle angles, each placed in its
    bin by its rank there. So it is within 0.1 degrees of the exact one, however few the pixels.
    """

    LIMITS = (11.25, 22.5, 30.0)
    BINS = 1800

    def image(self, prediction: NDArray[np.float32], label: NDArray[np.float32]) -> Statistics:
        """Return pixels, summed angles, pixels within each limit, and the histogram: [2 + 3 + 1800]."""
        valid = np.abs(label).sum(axis=-1) > 0
        truth, guess = (_unit(array[valid].astype(np.float64)) for array in (label, prediction))
        # Exact near 0 and 180 degrees, where arccos of a dot product is not.
        half = np.arctan2(np.linalg.norm(guess - truth, axis=-1), np.linalg.norm(guess + truth, axis=-1))
        angle = np.rad2deg(2 * half)
        within = [(angle < limit).sum() for limit in self.LIMITS]
        bins = np.minimum((angle * (self.BINS / 180)).astype(np.int64), self.BINS - 1)
        histogram = np.bincount(bins, minlength=self.BINS)
        return np.concatenate([[angle.size, angle.sum(), *within], histogram]).astype(np.float64)

    def compute(self, totals: Statistics) -> Metrics:
        """Return mErr and median (degrees), and within_11.25, within_22.5, within_30 (percent)."""
        count, total = totals[..., 0], totals[..., 1]
        result = {"mErr": ratio(total, count), "median": self._median(totals[..., 5:])}
        for index, limit in enumerate(self.LIMITS):
            result[f"within_{limit:g}"] = 100 * ratio(totals[..., 2 + index], count)
        return result

    def _median(self, histogram: NDArray[np.float64]) -> NDArray[np.float64]:
        cumulative = histogram.cumsum(axis=-1)
        count = cumulative[..., -1:]
        middle = np.zeros_like(count)
        for rank in (np.floor((count - 1) / 2), np.floor(count / 2)):  # from 0; one and the same of an odd number
            place = np.minimum((cumulative <= rank).sum(axis=-1, keepdims=True), self.BINS - 1)
            inside = np.take_along_axis(histogram, place, axis=-1)
            before = np.take_along_axis(cumulative, place, axis=-1) - inside
            middle += (place + ratio(rank - before + 0.5, inside)) * (180 / self.BINS) / 2
        return np.where(count > 0, middle, np.nan)[..., 0]


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


class SaliencyMeterA(Meter):
    """Saliency as in protocol A (ASTMT): per-image IoU, precision and recall averaged over images.

    The best of 15 thresholds 0.2 .. 0.9, exceeded strictly; beta^2 = 1. mIoU is M3ViT's figure. Without a salient pixel
    in label and prediction an image's IoU is 1, its precision and recall 0.
    """

    THRESHOLDS = np.linspace(0.2, 0.9, 15)

    def image(self, prediction: NDArray[np.float32], label: NDArray[np.uint8]) -> Statistics:
        """Return 1, and IoU, precision and recall at each threshold: [1 + 3 * 15]; all zero without a valid pixel."""
        hits, predicted, labelled, valid = _threshold_counts(prediction, label, self.THRESHOLDS, strict=True)
        if not valid:
            return np.zeros(1 + 3 * len(self.THRESHOLDS))
        iou = ratio(hits, predicted + labelled - hits, empty=1.0)
        precision, recall = ratio(hits, predicted, empty=0.0), ratio(hits, labelled, empty=0.0)
        return np.concatenate([[1.0], iou, precision, recall])

    def compute(self, totals: Statistics) -> Metrics:
        """Return maxF and mIoU, in percent."""
        means = 100 * ratio(totals[..., 1:], totals[..., :1])
        iou, precision, recall = np.split(means, 3, axis=-1)
        f_score = ratio(2 * precision * recall, precision + recall, empty=0.0)
        return {"maxF": f_score.max(axis=-1), "mIoU": iou.max(axis=-1)}


class SaliencyMeterB(Meter):
    """Saliency as in protocol B (ATRC, InvPT): F of pixels pooled over images, beta^2 = 0.3, at 19 thresholds.

    `maxF_as_published` passes the probability through a sigmoid once more, as InvPT's and TaskPrompter's code does, so
    that only 4 of the thresholds can tell pixels apart; published rows are made that way. `maxF` is the correct one.
    """

    THRESHOLDS = np.arange(1, 20) / 20
    BETA_SQUARED = 0.3

    def image(self, prediction: NDArray[np.float32], label: NDArray[np.uint8]) -> Statistics:
        """Return hits and predicted pixels at each threshold, for each of both ways, and labelled pixels: [77]."""
        parts = []
        for probability in (prediction, 1 / (1 + np.exp(-prediction))):
            hits, predicted, labelled, _ = _threshold_counts(probability, label, self.THRESHOLDS, strict=False)
            parts += [hits, predicted]
        return np.concatenate([*parts, [labelled]]).astype(np.float64)

    def compute(self, totals: Statistics) -> Metrics:
        """Return maxF and maxF_as_published, in percent."""
        hits, predicted, hits_twice, predicted_twice = np.split(totals[..., :-1], 4, axis=-1)
        labelled = totals[..., -1:]
        result = {}
        for name, true, guessed in (("maxF", hits, predicted), ("maxF_as_published", hits_twice, predicted_twice)):
            precision, recall = ratio(true, guessed, empty=0.0), ratio(true, labelled, empty=0.0)
            weighted = self.BETA_SQUARED * precision + recall
            f_score = ratio((1 + self.BETA_SQUARED) * precision * recall, weighted, empty=0.0)
            result[name] = 100 * f_score.max(axis=-1)
        return result


def _threshold_counts(
    probability: NDArray[np.floating[Any]], label: NDArray[np.uint8], thresholds: NDArray[np.float64], strict: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], int, int]:
    """Return true and predicted positives at each threshold, labelled positives, and valid pixels."""
    valid = label != IGNORE
    # float32 as the published code has it: 8-bit values 51, 102, ... coincide with thresholds.
    values, truth = probability[valid].astype(np.float32), label[valid] > 0
    limits = thresholds.astype(np.float32)
    # Thresholds passed by each pixel.
    bins = np.searchsorted(limits, values, side="left") if strict else np.searchsorted(limits, values, side="right")
    counts = [np.bincount(bins[chosen], minlength=len(thresholds) + 1) for chosen in (truth, slice(None))]
    hits, predicted = (count[::-1].cumsum()[::-1][1:] for count in counts)
    return hits, predicted, int(truth.sum()), int(valid.sum())


class EdgeMeter(Meter):
    """odsF, oisF and AP in percent (seism): edges matched one to one within a distance.

    Once for each of the published readers of the stored map (m3vit.evaluation.edge_readers), whose name the metrics end
    in. Those of read_one_cont_png have no ending: it is behind the published figures of both protocols.
    """

    def __init__(self, max_dist: float, readers: Sequence[Reader] = (HEADLINE,)) -> None:
        self.max_dist, self.readers = max_dist, readers

    def image(self, prediction: NDArray[np.float32], label: NDArray[np.bool_]) -> Statistics:
        """Return matched, predicted and true pixels at each threshold and at the image's best, for each reader.

        [sum of 3 T + 3], 306 of the headline's reader. `label` is the split's `edge_truth`, not the labels trained on.
        """
        parts = []
        for reader in self.readers:
            counts = reader_counts(reader, prediction, label, self.max_dist)
            parts += [counts.ravel(), ois_counts(counts)]
        return np.concatenate(parts).astype(np.float64)

    def compute(self, totals: Statistics) -> Metrics:
        """Return odsF, oisF, AP (percent) and the threshold of odsF, and the same of each further reader."""
        result: Metrics = {}
        ends = np.cumsum([3 * len(reader.thresholds) + 3 for reader in self.readers])
        for reader, part in zip(self.readers, np.split(totals, ends[:-1], axis=-1), strict=True):
            rows = part.reshape(-1, part.shape[-1])
            scores = [summarise(row[:-3].reshape(-1, 3), row[-3:], reader.thresholds) for row in rows]
            suffix = "" if reader.name == HEADLINE.name else f"_{reader.name}"
            for name in scores[0]:
                values = np.array([score[name] for score in scores])
                result[name + suffix] = values.reshape(part.shape[:-1])
        return result


class PixelEdgeMeter(Meter):
    """Best F1 in percent over 99 thresholds, pixel by pixel, with no tolerance in place: quick, and not odsF.

    Scored against the labels trained on. Training reports it between epochs.
    """

    def image(self, prediction: NDArray[np.float32], label: NDArray[np.uint8]) -> Statistics:
        """Return matched and predicted pixels at each threshold, and true ones: [2 * 99 + 1]."""
        hits, predicted, labelled, _ = _threshold_counts(prediction, label, np.asarray(THRESHOLDS), strict=True)
        return np.concatenate([hits, predicted, [labelled]]).astype(np.float64)

    def compute(self, totals: Statistics) -> Metrics:
        """Return pixF1 (percent)."""
        hits, predicted = np.split(totals[..., :-1], 2, axis=-1)
        return {"pixF1": 100 * ratio(2 * hits, predicted + totals[..., -1:], empty=0.0).max(axis=-1)}


def make_meter(task: str, label_set: str, protocol: str, quick: bool = False) -> Meter:
    """Return the meter of a task, its own or its kind's, or raise InputError if that is none."""
    scoring = Scoring(task, LABEL_SETS[label_set], protocol, quick)
    make = TASKS[task].meter or kind_of(task).meter
    try:
        meter = make(scoring)
    except TypeError as error:  # of a class that lacks a method
        raise InputError(f"the meter of {task} cannot be made ({error}): mend it") from error
    if not isinstance(meter, Meter):
        raise InputError(
            f"the meter of {task} under protocol {protocol} is {meter!r}: give an m3vit.evaluation.meters.Meter"
        )
    return meter


def check_meter(task: str, label_set: str, protocol: str, quick: bool = False) -> Meter:
    """Return the meter of a task, or raise InputError if it does not give the task's headline metric."""
    return try_meter(task, label_set, protocol, quick)[0]


def try_meter(task: str, label_set: str, protocol: str, quick: bool = False) -> tuple[Meter, Statistics]:
    """Return the meter of a task, and what an image of nothing contributes; raise InputError as `check_meter` does.

    It is tried so that a task cannot be trained for hours and then not be scored.
    """
    meter, kind, size = make_meter(task, label_set, protocol, quick), kind_of(task), (8, 8)
    channels = LABEL_SETS[label_set].channels(task)
    guess = kind.decode(np.zeros((1, channels, *size), np.float32))[0]
    if guess.shape[:2] != size or guess.dtype not in (np.uint8, np.float32):
        raise InputError(
            f"kind {kind.name} decodes logits [1, {channels}, 8, 8] into {guess.dtype} {[1, *guess.shape]}: give uint8 "
            "or float32 [1, 8, 8] or [1, 8, 8, D]"
        )
    label = np.zeros(size, bool) if TASKS[task].on_edge_truth(quick) else kind.no_label(size)
    row, wanted = meter.image(guess, label), TASKS[task].headline(quick)
    found = meter.compute(row)
    if wanted not in found:
        raise InputError(
            f"the meter of {task} gives {', '.join(list(found)[:5])}, not {wanted}, which the task names as its "
            "headline metric: mend the task's row or its meter"
        )
    return meter, row
