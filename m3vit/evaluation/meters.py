"""One meter per task: feed it logits and labels, read the task's metrics.

Logits come at the label's own resolution; ignored pixels are those of the task table's conventions. State is
summed over processes by torchmetrics.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from m3vit.tasks import IGNORE, TASKS

# Said with every figure (DESIGN.md, section 10). Two published protocols exist; this is neither to the letter.
PROTOCOL = "m3vit-pixel-1: logits resized to the label's size; edge is the best-threshold pixel F1, not odsF"


class SemsegMeter(Metric):
    """mIoU in percent over all C classes; a class absent from labels and predictions counts 0, as published.

    `mIoU_present` is the mean over the classes that occur in the labels.
    """

    confusion: Tensor

    def __init__(self, num_classes: int = TASKS["semseg"].channels) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add logits [B, C, H, W] and label [B, H, W] int64 (255 ignored)."""
        valid = label != IGNORE
        pairs = label[valid] * self.num_classes + logits.argmax(dim=1)[valid]
        self.confusion += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.confusion)

    def compute(self) -> dict[str, float]:
        """Return {"mIoU", "mIoU_present"}."""
        true_positive, in_label = self.confusion.diag().double(), self.confusion.sum(dim=1)
        iou = true_positive / (in_label + self.confusion.sum(dim=0) - true_positive).clamp(min=1)
        present = iou[in_label > 0]
        return {"mIoU": 100 * float(iou.mean()), "mIoU_present": 100 * float(present.mean()) if len(present) else 0.0}


class DepthMeter(Metric):
    """Root mean squared error in metres and mean absolute relative error, over all valid pixels pooled."""

    squared: Tensor
    relative: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("squared", "relative", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add logits [B, 1, H, W] and label [B, H, W], both in metres (label 0 is invalid)."""
        valid = label > 0
        error, truth = (logits[:, 0] - label)[valid].double(), label[valid].double()
        self.squared += (error**2).sum()
        self.relative += (error.abs() / truth).sum()
        self.count += valid.sum()

    def compute(self) -> dict[str, float]:
        """Return {"rmse" (m), "abs_rel"}."""
        return {"rmse": float((self.squared / self.count).sqrt()), "abs_rel": float(self.relative / self.count)}


class NormalsMeter(Metric):
    """Mean angle in degrees between predicted and true normals, and the share of pixels within 11.25, 22.5, 30."""

    LIMITS = (11.25, 22.5, 30.0)
    angle: Tensor
    within: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("angle", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(len(self.LIMITS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add logits [B, 3, H, W] of any length and label [B, 3, H, W] (unit vectors; zero is invalid)."""
        valid = label.abs().sum(dim=1) > 0
        predicted, truth = F.normalize(logits.double(), dim=1), F.normalize(label.double(), dim=1)
        # 2 atan2(|p - g|, |p + g|): exact near 0 and 180 degrees, where arccos of a dot product is not.
        distance = torch.atan2((predicted - truth).norm(dim=1), (predicted + truth).norm(dim=1))
        angle = torch.rad2deg(2 * distance)[valid]
        self.angle += angle.sum()
        self.within += torch.stack([(angle < limit).sum() for limit in self.LIMITS])
        self.count += valid.sum()

    def compute(self) -> dict[str, float]:
        """Return {"mErr" (degrees), "within_11.25", "within_22.5", "within_30" (percent)}."""
        within = {
            f"within_{limit:g}": 100 * float(n / self.count) for limit, n in zip(self.LIMITS, self.within, strict=True)
        }
        return {"mErr": float(self.angle / self.count), **within}


class EdgeMeter(Metric):
    """Best F1 in percent over 99 thresholds 0.01 .. 0.99, pixel by pixel, with no tolerance in place.

    One threshold for the whole data set. Not odsF, which matches edges within a distance.
    """

    positive: Tensor
    negative: Tensor
    thresholds: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("thresholds", torch.arange(1, 100, dtype=torch.float64) / 100)
        for name in ("positive", "negative"):
            self.add_state(name, torch.zeros(100, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Add logits [B, 1, H, W] and label [B, H, W] (0 or 1, 255 ignored)."""
        valid = label != IGNORE
        # Bin b: the probability exceeds exactly b of the thresholds.
        bins = torch.bucketize(logits[:, 0][valid].double().sigmoid(), self.thresholds)
        truth = label[valid] > 0
        self.positive += torch.bincount(bins[truth], minlength=100)
        self.negative += torch.bincount(bins[~truth], minlength=100)

    def compute(self) -> dict[str, float]:
        """Return {"pixF1" (percent), "threshold"}."""
        predicted_true = self.positive.flip(0).cumsum(0).flip(0)[1:].double()  # at threshold i: bins i + 1 and up
        predicted_false = self.negative.flip(0).cumsum(0).flip(0)[1:].double()
        f1 = 2 * predicted_true / (predicted_true + predicted_false + self.positive.sum()).clamp(min=1)
        best = int(f1.argmax())
        return {"pixF1": 100 * float(f1[best]), "threshold": float(self.thresholds[best])}


METERS: dict[str, Callable[[], Metric]] = {
    "semseg": SemsegMeter,
    "depth": DepthMeter,
    "normals": NormalsMeter,
    "edge": EdgeMeter,
}


def make_meter(task: str) -> Metric:
    """Return a new meter for a task of the task table."""
    return METERS[task]()
