"""What a kind of dense prediction is: the class that every kind derives from. No torch until a method needs it.

Shapes: B images, C channels of the logits, H x W pixels, D numbers a pixel. Labels are arrays as loaders return them,
[H, W] or [H, W, D]; `values` are tensors of one label while it is augmented, [D or 1, H, W]; a batch of them, as losses
take it, is [B, H, W] or [B, D, H, W]. Predictions are decoded, [H, W] or [H, W, D].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3vit.kinds.pictures import Place, Range, Scale, Swatches, grey_blend

if TYPE_CHECKING:
    from torch import Tensor

    from m3vit.evaluation.meters import Meter, Scoring
    from m3vit.tasks import Task

IGNORE = 255  # of labels that are ids or 0 and 1: a pixel that neither losses nor meters look at
REQUIRED = ("valid", "loss", "decode", "paint", "legend", "summary", "tally", "constant")


@dataclass(frozen=True)
class Look:
    """Figures of one label: what statistics and warnings about a data set are made from (m3vit.data.tools).

    `valid_share` is that of pixels that are neither ignored nor invalid; `value` is what all of these have in common,
    or None. `pixels` counts ids 0..255 (classes); `max_m`, `reach_m` are of distances: the greatest, and that which
    95 % of the valid ones do not exceed (0 if none is valid).
    """

    valid_share: float
    value: float | tuple[float, ...] | None
    positive_share: float = 0.0
    pixels: NDArray[np.int64] | None = None
    max_m: float = 0.0
    reach_m: float = 0.0


class Kind:
    """One kind of dense prediction. `REQUIRED` names what every kind has to define; the rest has a plain default.

    name: what manifests of packages and projects call it (`decode`).
    channels: of the logits; None for as many as the task has classes.
    described_as: what one decoded value is, in the manifest; empty for the task's `unit`.
    label_dtype, label_shape: of one pixel's label. fill: the label of a pixel that is not labelled.
    nearest: predictions are resized by the nearest neighbour, not bilinearly.
    has_axes: values are along the camera's axes, y up; a data set's files may have y down (LabelSet.normals_y_down).
    loss_options: names of the options of `loss`, which a task may set.
    own_range: a picture shows its values over a range of its own (`limits`), such as depth's.
    dark_on_white: a picture is ink on paper, so that laid over the image it darkens it.
    stored_file: ending of the files that published code stores predictions in: .png (8 bits) or .mat (as they are).
    last_bin_marks: one pixel of the last of `bins` makes a whole patch one of it, since it is rare and thin.
    has_entropy: `entropy` says how undecided logits are; kinds that predict a measure have none.
    """

    name: str = ""
    channels: int | None = 1
    described_as: str = ""
    label_dtype: ClassVar[type[np.generic]] = np.float32
    label_shape: tuple[int, ...] = ()
    fill: float = 0.0
    nearest: bool = False
    has_axes: bool = False
    loss_options: tuple[str, ...] = ()
    own_range: bool = False
    dark_on_white: bool = False
    stored_file: str = ".png"
    last_bin_marks: bool = False
    has_entropy: bool = False

    # --- labels ---

    def no_label(self, size: tuple[int, int]) -> NDArray[Any]:
        """Return the label of an image that has none: ignored or invalid at every pixel."""
        return np.full((*size, *self.label_shape), self.fill, self.label_dtype)

    def mirrored(self, values: "Tensor") -> "Tensor":
        """Return the values of a label whose pixels were mirrored left to right."""
        return values

    def zoomed(self, values: "Tensor", factor: float) -> "Tensor":
        """Return the values of a label whose pixels were enlarged, as by a camera `factor` times as near."""
        return values

    def turned(self, values: "Tensor", angle_deg: float) -> "Tensor":
        """Return the values of a label whose pixels were turned counter-clockwise, as seen, by an angle."""
        return values

    def target(self, values: "Tensor", task: "Task") -> "Tensor":
        """Return the label [H, W] or [D, H, W] that the loss takes, from its values."""
        return values if self.label_shape else values[0]

    # --- loss ---

    def valid(self, label: "Tensor") -> "Tensor":
        """Return which pixels [B, H, W] of a batch of labels are labelled."""
        raise NotImplementedError

    def counts(self, label: "Tensor") -> "Tensor":
        """Return what `loss` divides by, int64 [N]: sums over pixels, so that those of a batch's parts add up."""
        return self.valid(label).sum()[None]

    def loss(self, logits: "Tensor", label: "Tensor", counts: "Tensor", **options: float) -> "Tensor":
        """Return the loss of logits [B, C, H, W], the sum over the valid pixels divided by the counts of a batch.

        `counts` are of the whole batch, of which these images may be a part: their losses then add up to its mean.
        `options`: the task's `loss_options`.
        """
        raise NotImplementedError

    def entropy(self, logits: "Tensor") -> "Tensor":
        """Return the entropy of each pixel's prediction, in nats [B, H, W], for logits [B, C, H, W] (`has_entropy`)."""
        raise NotImplementedError

    def distance(self, logits: "Tensor", target: "Tensor") -> "Tensor":
        """Return how far each pixel's logits [B, C, H, W] are from others' of the task [B, H, W]; 0 where they agree.

        What a smaller budget's outputs learn by (m3vit.training.budgets), so in the unit of `loss`, and flat at 0: an
        absolute difference pulls as hard at the smallest one, and what both compute alike, next to nothing at first,
        is then where they stay. Here the channels' mean squared difference, over twice the size (root mean square) of
        the image's target, or of the differences if they are larger.
        """
        apart = logits - target
        ours, theirs = (one.detach().square().mean(dim=(1, 2, 3), keepdim=True) for one in (apart, target))
        size = ours.maximum(theirs).sqrt().clamp(min=1e-6)  # 0 where both are
        return (apart.square() / (2 * size)).mean(dim=1)

    # --- predictions ---

    def decode(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        """Turn logits [B, C, H, W] into predictions [B, H, W] or [B, H, W, D], uint8 or float32."""
        raise NotImplementedError

    def resized(self, prediction: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
        """Return a prediction at another size (height, width)."""
        if prediction.ndim == 3:
            parts = [np.ascontiguousarray(prediction[..., part]) for part in range(prediction.shape[-1])]
            return np.stack([self.resized(part, size) for part in parts], axis=-1)
        how = Image.Resampling.NEAREST if self.nearest else Image.Resampling.BILINEAR
        return np.asarray(Image.fromarray(prediction).resize(size[::-1], how))

    def enlarged(self, prediction: NDArray[Any], factor: int) -> NDArray[Any]:
        """Return a prediction to be drawn `factor` times as large, without steps where it is smooth."""
        return self.resized(prediction, (prediction.shape[0] * factor, prediction.shape[1] * factor))

    def stored(self, logits: "Tensor", y_down: bool) -> "Tensor":
        """Turn one image's logits [C, H, W] into what the published code stores [D or 1, H, W], before it resizes it.

        `y_down`: it stores vectors of this data set with y down.
        """
        return logits

    def restored(self, stored: "Tensor", eight_bits: bool, y_down: bool) -> NDArray[Any]:
        """Return the prediction [H, W] or [H, W, D] that is read from what was stored, in 8 bits or exactly."""
        return self.decode(stored.numpy()[None])[0]

    def meter(self, scoring: "Scoring") -> "Meter | None":
        """Return the meter of a task of this kind; None if each task has to bring its own."""
        return None

    # --- pictures ---

    def limits(self, prediction: NDArray[Any], outside: float = 2.0) -> Range | None:
        """Return the range of values that a picture shows, without the extreme `outside` % of pixels on each side.

        None for kinds without one (`own_range`), and where no pixel is valid.
        """
        return None

    def paint(
        self, prediction: NDArray[Any], palette: Sequence[Sequence[int]] = (), limits: Range | None = None
    ) -> NDArray[np.uint8]:
        """Turn a prediction into a picture uint8 [H, W, 3], with a palette of classes or over a range of values."""
        raise NotImplementedError

    def blend(
        self,
        image: NDArray[np.uint8],
        prediction: NDArray[Any],
        palette: Sequence[Sequence[int]] = (),
        limits: Range | None = None,
    ) -> NDArray[np.uint8]:
        """Lay a prediction over its image; here its colours over a grey image."""
        return grey_blend(image, self.paint(prediction, palette, limits))

    def legend(
        self,
        prediction: NDArray[Any],
        task: str,
        entry: Mapping[str, Any],
        limits: Range | None = None,
        rows: int | None = None,
        plain: bool = False,
    ) -> Swatches | Scale:
        """Return what the colours of `blend` mean or, if `plain`, those of `paint`; `entry`: the manifest's."""
        raise NotImplementedError

    def places(self, prediction: NDArray[Any], entry: Mapping[str, Any]) -> Sequence[Place]:
        """Return where names can stand in the picture of a prediction, none by default; `entry`: the manifest's."""
        return ()

    def drawable(self, label: NDArray[Any]) -> NDArray[Any]:
        """Return a label as `paint` takes predictions."""
        return label

    def summary(self, prediction: NDArray[Any], entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return figures about a prediction, as JSON values."""
        raise NotImplementedError

    # --- the predictor that looks at nothing ---

    def tally(self, label: NDArray[Any]) -> NDArray[np.float64]:
        """Return sums over one label's pixels, of any number, from which `constant` is made."""
        raise NotImplementedError

    def constant(self, total: NDArray[np.float64]) -> Any:
        """Return the one value to predict everywhere, as JSON, from the sum of all labels' tallies."""
        raise NotImplementedError

    def classes_in(self, total: NDArray[np.float64]) -> list[int] | None:
        """Return the ids of the classes that labels have, from the sum of their tallies; None without classes."""
        return None

    def constant_logits(self, constant: Any, channels: int) -> NDArray[np.float32]:
        """Return the logits [C] that are decoded as a constant."""
        return np.asarray(constant, np.float32).reshape(-1)

    # --- what is written and said of labels ---

    def entry(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return what a package's manifest says of a task beside its channels and its unit."""
        return {}

    def entry_fits(self, entry: Mapping[str, Any]) -> bool:
        """Return whether a manifest's entry of a task of this kind is whole."""
        return self.channels in (None, entry["channels"])

    def look(self, label: NDArray[Any]) -> Look:
        """Return the figures of a label; here, whether it is blank, for labels that are `fill` where not labelled."""
        valid = label != self.fill
        return Look(float((valid.any(axis=-1) if self.label_shape else valid).mean()), None)

    def statistics(self, looks: Sequence[Look], classes: Sequence[str]) -> dict[str, Any]:
        """Return figures over all labels of a task; shares are means over images."""
        return {"invalid_share": float(np.mean([1 - one.valid_share for one in looks]))}

    # --- what routing is told apart by ---

    def bins(self, task: "Task", classes: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the bins, at most 254, that `binned` sorts pixels into; none: labels are not sorted."""
        return ()

    def binned(self, label: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the bin of each pixel [H, W], `IGNORE` where it is not labelled."""
        raise NotImplementedError

    def says(self, value: Any, classes: Sequence[str], task: "Task") -> str:
        """Return a label's value (`Look.value`) in words."""
        return f"({', '.join(f'{part:.3g}' for part in value)})" if isinstance(value, tuple) else f"{value:g}"


def as_json(value: Any) -> Any:
    """Return what a kind gives as JSON, numpy's numbers and arrays in it as Python's."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value
