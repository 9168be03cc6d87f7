"""A distance from the camera a pixel, in the task's unit: greater than 0, and 0 where it is not known."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from m3vit.kinds import decoding
from m3vit.kinds.kind import IGNORE, Kind, Look
from m3vit.kinds.pictures import Range, Scale, Swatches, histogram, ramp, rounded

if TYPE_CHECKING:
    from torch import Tensor

    from m3vit.evaluation.meters import Meter, Scoring
    from m3vit.tasks import Task

SAME_DISTANCE = 1e-3  # closer than that is one value; sensors and 8-bit codes spread more
REACH_PERCENT = 95
BINS = (
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    8.0,
)  # where one ends and the next begins: even steps, about, of a room's log depth


class Distance(Kind):
    """See the module. Near is drawn bright, far dark."""

    name = "identity"
    own_range = True
    stored_file = ".mat"

    def zoomed(self, values: "Tensor", factor: float) -> "Tensor":
        """Divide by the factor: a camera that is that much nearer."""
        return values / factor

    def valid(self, label: "Tensor") -> "Tensor":
        return label > 0

    def loss(self, logits: "Tensor", label: "Tensor", counts: "Tensor", **options: float) -> "Tensor":
        """Return the mean absolute error over the valid pixels."""
        return ((logits[:, 0] - label).abs() * self.valid(label)).sum() / counts[0].clamp(min=1)

    def decode(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return decoding.identity(logits)

    def meter(self, scoring: "Scoring") -> "Meter":
        from m3vit.evaluation.meters import DepthMeter

        return DepthMeter()

    def limits(self, prediction: NDArray[Any], outside: float = 2.0) -> Range | None:
        """Return the nearest and farthest distance, but for the extreme ones."""
        valid = prediction[_is_valid(prediction)]
        if not valid.size:
            return None
        near, far = np.percentile(valid, (outside, 100 - outside))
        return float(near), float(far)

    def paint(
        self, prediction: NDArray[Any], palette: Sequence[Sequence[int]] = (), limits: Range | None = None
    ) -> NDArray[np.uint8]:
        """Near is bright; invalid (<= 0) pixels are black. Without limits: the picture's own."""
        limits = limits or self.limits(prediction)
        if limits is None:
            return np.zeros((*prediction.shape, 3), np.uint8)
        near, far = limits
        valid = _is_valid(prediction)
        share = (far - np.where(valid, prediction, far)) / max(far - near, 1e-6)
        return np.where(valid[..., None], ramp(share), 0).astype(np.uint8)

    def legend(
        self,
        prediction: NDArray[Any],
        task: str,
        entry: Mapping[str, Any],
        limits: Range | None = None,
        rows: int | None = None,
        plain: bool = False,
    ) -> Swatches | Scale:
        near, far = limits or self.limits(prediction) or (0.0, 1.0)
        return Scale(f"{task}, {entry.get('unit', 'm')}", ramp(np.linspace(1, 0, 256)), near, far)

    def summary(self, prediction: NDArray[Any], entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return `valid_share`, and `min`, `p5`, `median`, `mean`, `p95`, `max` and `histogram` of the valid pixels."""
        valid = prediction[_is_valid(prediction)]
        names = ("min", "p5", "median", "p95", "max")
        values = np.percentile(valid, (0, 5, 50, 95, 100)) if valid.size else (None,) * len(names)
        return {
            "unit": entry.get("unit", "m"),
            "valid_share": rounded(valid.size / prediction.size),
            **{name: rounded(value) for name, value in zip(names, values, strict=True)},
            "mean": rounded(valid.mean(dtype=np.float64)) if valid.size else None,
            "histogram": histogram(valid, valid.min(), valid.max()) if valid.size else None,
        }

    def tally(self, label: NDArray[Any]) -> NDArray[np.float64]:
        valid = label[label > 0].astype(np.float64)
        return np.array([valid.sum(), valid.size])

    def constant(self, total: NDArray[np.float64]) -> float:
        """Return the mean distance."""
        return float(total[0] / max(total[1], 1))

    def look(self, label: NDArray[Any]) -> Look:
        valid = label[label > 0]
        if not valid.size:
            return Look(0.0, None)
        reach = float(np.percentile(valid, REACH_PERCENT))
        one = valid.max() - valid.min() <= SAME_DISTANCE
        return Look(valid.size / label.size, float(valid[0]) if one else None, max_m=float(valid.max()), reach_m=reach)

    def statistics(self, looks: Sequence[Look], classes: Sequence[str]) -> dict[str, Any]:
        return {
            **super().statistics(looks, classes),
            "max_m": max(one.max_m for one in looks),
            "reach_m": float(np.median([one.reach_m for one in looks if one.valid_share] or [0])),
        }

    def bins(self, task: "Task", classes: Sequence[str]) -> tuple[str, ...]:
        between = (f"{low:g} to {high:g} {task.value_unit}" for low, high in pairwise(BINS))
        return (f"below {BINS[0]:g} {task.value_unit}", *between, f"from {BINS[-1]:g} {task.value_unit}")

    def binned(self, label: NDArray[Any]) -> NDArray[np.uint8]:
        return np.where(_is_valid(label), np.searchsorted(BINS, label, side="right"), IGNORE).astype(np.uint8)

    def says(self, value: Any, classes: Sequence[str], task: "Task") -> str:
        return f"{value:.3g} {task.value_unit}"


def _is_valid(prediction: NDArray[Any]) -> NDArray[np.bool_]:
    return np.isfinite(prediction) & (prediction > 0)
