"""Whether a pixel is something, with its probability: labels 0 and 1, 255 ignored. One logit, its log-odds.

The metric depends on what the probability is of, so that each task brings its own meter.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from m3vit.kinds import decoding
from m3vit.kinds.classes import look_at_ids
from m3vit.kinds.kind import IGNORE, Kind, Look
from m3vit.kinds.pictures import Colour, Range, Scale, Swatches, histogram, rounded

if TYPE_CHECKING:
    from torch import Tensor

    from m3vit.tasks import Task


_MARK: Colour = (255, 0, 160)  # of what is probable over the image: a colour that photographs seldom hold


def _opacity(probability: NDArray[Any]) -> NDArray[Any]:
    """Return how opaque a probability is drawn: squared, since edges are learnt with weights that raise every one."""
    return probability**2


class Probability(Kind):
    """See the module."""

    name = "sigmoid"
    described_as = "probability"
    label_dtype = np.uint8
    fill = IGNORE
    loss_options = ("positive_weight",)
    dark_on_white = True
    last_bin_marks = True
    has_entropy = True

    def valid(self, label: "Tensor") -> "Tensor":
        return label != IGNORE

    def counts(self, label: "Tensor") -> "Tensor":
        """Return how many pixels are valid, and how many of these positive."""
        import torch

        valid = self.valid(label)
        return torch.stack([valid.sum(), (valid & (label > 0)).sum()])

    def loss(self, logits: "Tensor", label: "Tensor", counts: "Tensor", **options: float) -> "Tensor":
        """Return the binary cross-entropy over the valid pixels: positives weigh `positive_weight`, others the rest.

        Without that option it balances as HED does: the weight is the share of negatives among the batch's pixels.
        """
        from torch.nn import functional as F

        valid, truth = self.valid(label), (label > 0).to(logits.dtype)
        share = options.get("positive_weight")
        positive_weight = 1 - counts[1] / counts[0].clamp(min=1) if share is None else share
        weight = valid * (positive_weight * truth + (1 - positive_weight) * (1 - truth))
        loss = F.binary_cross_entropy_with_logits(logits[:, 0], truth, weight=weight, reduction="sum")
        return loss / counts[0].clamp(min=1)

    def distance(self, logits: "Tensor", target: "Tensor") -> "Tensor":
        """Return the Kullback-Leibler divergence from the target's probability."""
        from torch.nn import functional as F

        x, y = logits[:, 0], target[:, 0]
        return F.softplus(x) - F.softplus(y) - y.sigmoid() * (x - y)

    def entropy(self, logits: "Tensor") -> "Tensor":
        """Return -p log p - (1 - p) log(1 - p) of the probability p."""
        from torch.nn import functional as F

        x = logits[:, 0]
        return F.softplus(x) - x * x.sigmoid()

    def decode(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return decoding.sigmoid(logits)

    def stored(self, logits: "Tensor", y_down: bool) -> "Tensor":
        """Return the probability in steps of 8 bits."""
        return 255 * logits.sigmoid()

    def restored(self, stored: "Tensor", eight_bits: bool, y_down: bool) -> NDArray[np.float32]:
        return ((stored.floor() if eight_bits else stored)[0] / 255).numpy()

    def paint(
        self, prediction: NDArray[Any], palette: Sequence[Sequence[int]] = (), limits: Range | None = None
    ) -> NDArray[np.uint8]:
        """Paint dark on white."""
        grey = np.rint((1 - np.clip(prediction, 0, 1)) * 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)

    def blend(
        self,
        image: NDArray[np.uint8],
        prediction: NDArray[Any],
        palette: Sequence[Sequence[int]] = (),
        limits: Range | None = None,
    ) -> NDArray[np.uint8]:
        """Lay one strong colour over the image as it is, the more opaque the more probable the pixel is."""
        share = _opacity(np.clip(prediction, 0, 1)[..., None].astype(np.float32))
        return np.rint(image + share * (np.array(_MARK, np.float32) - image)).astype(np.uint8)

    def legend(
        self,
        prediction: NDArray[Any],
        task: str,
        entry: Mapping[str, Any],
        limits: Range | None = None,
        rows: int | None = None,
        plain: bool = False,
    ) -> Swatches | Scale:
        shares = np.linspace(0, 1, 256)
        shares = shares if plain else _opacity(shares)
        white, full = np.array([255.0, 255.0, 255.0]), np.array((0, 0, 0) if plain else _MARK)
        colours = white + shares[:, None] * (full - white)
        return Scale(f"{task}, probability", np.rint(colours).astype(np.uint8), 0, 1)

    def drawable(self, label: NDArray[Any]) -> NDArray[Any]:
        """Return what is ignored as a half."""
        return np.where(label == IGNORE, 0.5, label)

    def summary(self, prediction: NDArray[Any], entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return `mean`, `max`, `share_above_half` and `histogram`."""
        return {
            "mean": rounded(prediction.mean()),
            "max": rounded(prediction.max()),
            "share_above_half": rounded((prediction > 0.5).mean()),
            "histogram": histogram(prediction, 0, 1),
        }

    def tally(self, label: NDArray[Any]) -> NDArray[np.float64]:
        return np.array([(label == 1).sum(), (label <= 1).sum()], np.float64)

    def constant(self, total: NDArray[np.float64]) -> float:
        """Return the share of positive pixels."""
        return float(total[0] / max(total[1], 1))

    def constant_logits(self, constant: Any, channels: int) -> NDArray[np.float32]:
        """Return a logit above every threshold: the best constant there is for F is to call every pixel positive."""
        return np.full(1, 20.0, np.float32)

    def look(self, label: NDArray[Any]) -> Look:
        return look_at_ids(label)

    def statistics(self, looks: Sequence[Look], classes: Sequence[str]) -> dict[str, Any]:
        return {"positive_share": float(np.mean([one.positive_share for one in looks]))}

    def bins(self, task: "Task", classes: Sequence[str]) -> tuple[str, ...]:
        return f"no {task.name}", task.name

    def binned(self, label: NDArray[Any]) -> NDArray[np.uint8]:
        return np.where(label == IGNORE, IGNORE, label > 0).astype(np.uint8)
