"""A direction a pixel: unit vectors, x right, y up, z towards the camera, and zero where it is not known."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from m3vit.kinds import decoding
from m3vit.kinds.kind import IGNORE, Kind, Look
from m3vit.kinds.pictures import Colour, Range, Scale, Swatches, rounded

if TYPE_CHECKING:
    from torch import Tensor

    from m3vit.evaluation.meters import Meter, Scoring
    from m3vit.tasks import Task

SAME_DIRECTION = 1e-3  # closer than that, in each component, is one value
# What the colours of a picture, (n + 1) / 2, mean.
KEY: tuple[tuple[str, Colour], ...] = (
    ("right", (255, 128, 128)),
    ("left", (0, 128, 128)),
    ("up", (128, 255, 128)),
    ("down", (128, 0, 128)),
    ("towards the camera", (128, 128, 255)),
)
_DIRECTIONS = np.array([(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1)], np.float32)  # as KEY


class Directions(Kind):
    """See the module. The logits are the components, of any length."""

    name = "unit_vector"
    channels = 3
    described_as = "unit vector: x right, y up, z towards the camera"
    label_shape = (3,)
    has_axes = True

    def mirrored(self, values: "Tensor") -> "Tensor":
        return values * values.new_tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)

    def turned(self, values: "Tensor", angle_deg: float) -> "Tensor":
        """Turn them in the picture's plane, as its pixels were."""
        import torch

        turn = torch.deg2rad(torch.tensor(angle_deg))
        cos, sin = turn.cos(), turn.sin()
        x, y, z = values
        return torch.stack([x * cos - y * sin, x * sin + y * cos, z])

    def valid(self, label: "Tensor") -> "Tensor":
        return label.abs().sum(dim=1) > 0

    def loss(self, logits: "Tensor", label: "Tensor", counts: "Tensor", **options: float) -> "Tensor":
        """Return the mean absolute error of the normalised prediction, over valid pixels and components."""
        from torch.nn import functional as F

        error = (F.normalize(logits, dim=1) - label).abs() * self.valid(label)[:, None]
        return error.sum() / (3 * counts[0]).clamp(min=1)

    def distance(self, logits: "Tensor", target: "Tensor") -> "Tensor":
        """Return half the mean squared difference of the unit vectors' components."""
        from torch.nn import functional as F

        return (F.normalize(logits, dim=1) - F.normalize(target, dim=1)).square().mean(dim=1) / 2

    def decode(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return decoding.unit_vector(logits)

    def resized(self, prediction: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
        return decoding.unit(super().resized(prediction, size))

    def stored(self, logits: "Tensor", y_down: bool) -> "Tensor":
        """Return (n + 1) / 2 in steps of 8 bits. With y down, truncation pulls y up, not down."""
        from torch.nn import functional as F

        return (F.normalize(logits * _axes(logits, y_down), dim=0) + 1) * 127.5

    def restored(self, stored: "Tensor", eight_bits: bool, y_down: bool) -> NDArray[np.float32]:
        from torch.nn import functional as F

        values = stored.floor() if eight_bits else stored
        return F.normalize((values / 127.5 - 1) * _axes(stored, y_down), dim=0).permute(1, 2, 0).contiguous().numpy()

    def meter(self, scoring: "Scoring") -> "Meter":
        from m3vit.evaluation.meters import NormalsMeter

        return NormalsMeter()

    def paint(
        self, prediction: NDArray[Any], palette: Sequence[Sequence[int]] = (), limits: Range | None = None
    ) -> NDArray[np.uint8]:
        """Paint (n + 1) / 2."""
        return np.rint(np.clip((prediction + 1) / 2, 0, 1) * 255).astype(np.uint8)

    def legend(
        self,
        prediction: NDArray[Any],
        task: str,
        entry: Mapping[str, Any],
        limits: Range | None = None,
        rows: int | None = None,
        plain: bool = False,
    ) -> Swatches | Scale:
        return Swatches(KEY, tuple(name for name, _ in KEY))

    def summary(self, prediction: NDArray[Any], entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return the `mean` vector, and `facing`: the share of pixels by the direction nearest to theirs."""
        vectors = prediction.reshape(-1, 3)
        shares = np.bincount((vectors @ _DIRECTIONS.T).argmax(axis=1), minlength=len(KEY)) / len(vectors)
        facing = {name: rounded(share) for (name, _), share in zip(KEY, shares, strict=True)}
        return {"mean": [rounded(value) for value in vectors.mean(axis=0)], "facing": facing}

    def tally(self, label: NDArray[Any]) -> NDArray[np.float64]:
        return label.sum(axis=(0, 1), dtype=np.float64)

    def constant(self, total: NDArray[np.float64]) -> list[float]:
        """Return the mean direction."""
        return [float(value) for value in total / max(float(np.linalg.norm(total)), 1e-12)]

    def look(self, label: NDArray[Any]) -> Look:
        has = label.any(axis=-1)
        share = float(has.mean())
        # One axis after the other: the first tells nearly always.
        one = share > 0 and all(np.ptp(label[..., axis][has]) <= SAME_DIRECTION for axis in range(3))
        return Look(share, tuple(round(float(part), 3) for part in label[has][0]) if one else None)

    def bins(self, task: "Task", classes: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name, _ in KEY)

    def binned(self, label: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the direction of `KEY` that is nearest."""
        return np.where(label.any(axis=-1), (label @ _DIRECTIONS.T).argmax(axis=-1), IGNORE).astype(np.uint8)


def _axes(like: "Tensor", y_down: bool) -> "Tensor":
    return like.new_tensor([1.0, -1.0 if y_down else 1.0, 1.0])[:, None, None]
