"""One of several classes a pixel: ids 0..C-1, 255 ignored. The logit of each class; the largest is predicted."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3vit.kinds import decoding
from m3vit.kinds.kind import IGNORE, Kind, Look
from m3vit.kinds.pictures import Colour, Place, Range, Scale, Swatches, rounded

if TYPE_CHECKING:
    from torch import Tensor

    from m3vit.evaluation.meters import Meter, Scoring
    from m3vit.tasks import Task

_GRID = 96  # rows or columns, the fewer of both, that places of names are looked for on
_OTHER_CLASSES: Colour = (0, 0, 0)
NOT_LABELLED: Colour = (224, 224, 192)  # PASCAL VOC's, for its 255


class Classes(Kind):
    """See the module."""

    name = "argmax"
    channels = None
    described_as = "class id"
    label_dtype = np.uint8
    fill = IGNORE
    nearest = True
    has_entropy = True

    def target(self, values: "Tensor", task: "Task") -> "Tensor":
        """Return ids int64 [H, W]; nothing to learn from without a foreground, if the task asks for one."""
        ids = values[0].long()
        if task.needs_foreground and not ((ids > 0) & (ids != IGNORE)).any():
            return ids.new_full(ids.shape, IGNORE)
        return ids

    def valid(self, label: "Tensor") -> "Tensor":
        return label != IGNORE

    def loss(self, logits: "Tensor", label: "Tensor", counts: "Tensor", **options: float) -> "Tensor":
        """Return the cross-entropy, a mean over the labelled pixels."""
        from torch.nn import functional as F

        return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum") / counts[0].clamp(min=1)

    def distance(self, logits: "Tensor", target: "Tensor") -> "Tensor":
        """Return the Kullback-Leibler divergence from the target's shares of the classes."""
        from torch.nn import functional as F

        # Two tensors of the logits' size are kept for the gradient; written out, it would be five.
        return F.cross_entropy(logits, target.softmax(dim=1), reduction="none") - self.entropy(target)

    def entropy(self, logits: "Tensor") -> "Tensor":
        log_shares = logits.log_softmax(dim=1)
        return -(log_shares.exp() * log_shares).sum(dim=1)

    def enlarged(self, prediction: NDArray[Any], factor: int) -> NDArray[np.uint8]:
        """Return at each point the class that is most of its surroundings: borders without steps."""
        present = np.unique(prediction)
        size = (prediction.shape[1] * factor, prediction.shape[0] * factor)
        best = share = np.zeros(size[::-1], np.uint8)
        for index in present:
            mask = Image.fromarray((prediction == index).astype(np.uint8) * np.uint8(255))
            here = np.asarray(mask.resize(size, Image.Resampling.BILINEAR))
            best, share = np.where(here > share, index, best), np.maximum(here, share)
        return best

    def decode(self, logits: NDArray[np.float32]) -> NDArray[np.uint8]:
        return decoding.argmax(logits)

    def stored(self, logits: "Tensor", y_down: bool) -> "Tensor":
        return logits.argmax(dim=0, keepdim=True).float()

    def restored(self, stored: "Tensor", eight_bits: bool, y_down: bool) -> NDArray[np.uint8]:
        return stored[0].numpy().astype(np.uint8)

    def meter(self, scoring: "Scoring") -> "Meter":
        from m3vit.evaluation.meters import ClassMeter

        return ClassMeter(scoring.labels.classes[scoring.task])

    def paint(
        self, prediction: NDArray[Any], palette: Sequence[Sequence[int]] = (), limits: Range | None = None
    ) -> NDArray[np.uint8]:
        """Paint the palette's colours, what is not labelled in VOC's, other ids black."""
        colours = np.zeros((256, 3), np.uint8)
        colours[IGNORE] = NOT_LABELLED
        colours[: len(palette)] = palette
        return colours[prediction]

    def legend(
        self,
        prediction: NDArray[Any],
        task: str,
        entry: Mapping[str, Any],
        limits: Range | None = None,
        rows: int | None = None,
        plain: bool = False,
    ) -> Swatches | Scale:
        """Name the classes in the picture, the largest first, with their share of it; see `drawing.legend` of rows."""
        palette, names = entry["palette"], class_names(entry)
        counts = np.bincount(prediction.ravel(), minlength=256)
        present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
        texts = {index: names[index] if index < len(names) else f"class {index}" for index in present}
        longest = tuple(names) or tuple(texts.values())
        if rows is None:
            texts = {index: f"{text} {_percent(counts[index] / prediction.size)}" for index, text in texts.items()}
            longest = tuple(texts.values())
        colours = {index: tuple(palette[index]) if index < len(palette) else _OTHER_CLASSES for index in present}
        return Swatches(tuple((texts[index], colours[index]) for index in present), longest, rows)

    def places(self, prediction: NDArray[Any], entry: Mapping[str, Any]) -> Sequence[Place]:
        """Return for each class the largest square of its pixels, found on a grid of about `_GRID` rows."""
        names, step = class_names(entry), max(1, min(prediction.shape) // _GRID)
        coarse = prediction[step // 2 :: step, step // 2 :: step]
        found = []
        for index in np.unique(coarse):
            corners, side = coarse == index, 0  # upper left ones of squares that are the class's
            while corners.any():
                left, side = corners, side + 1
                corners = left[1:, 1:] & left[:-1, 1:] & left[1:, :-1] & left[:-1, :-1]
            if index < len(names):
                rows, columns = np.nonzero(left)
                middle = np.hypot(rows - rows.mean(), columns - columns.mean()).argmin()
                row, column = (float(places[middle]) + side / 2 for places in (rows, columns))
                found.append(Place(names[index], row * step, column * step, side * step))
        return found

    def summary(self, prediction: NDArray[Any], entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return `classes`, the largest first, with pixels and share."""
        counts, names = np.bincount(prediction.ravel(), minlength=256), class_names(entry)
        colours = entry["palette"]
        classes = [
            {
                "id": int(index),
                "name": names[index] if index < len(names) else f"class {index}",
                "colour": list(colours[index]) if index < len(colours) else [0, 0, 0],
                "pixels": int(counts[index]),
                "share": rounded(counts[index] / prediction.size),
            }
            for index in np.argsort(-counts, kind="stable")
            if counts[index]
        ]
        return {"classes": classes}

    def tally(self, label: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(label.ravel(), minlength=256).astype(np.float64)

    def constant(self, total: NDArray[np.float64]) -> int:
        """Return the most frequent class."""
        return int(total[:IGNORE].argmax())

    def classes_in(self, total: NDArray[np.float64]) -> list[int]:
        return [int(index) for index in np.flatnonzero(total[:IGNORE])]

    def constant_logits(self, constant: Any, channels: int) -> NDArray[np.float32]:
        return np.eye(channels, dtype=np.float32)[constant]

    def entry(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"classes": list(classes), "palette": [list(colour) for colour in palette(classes)]}

    def entry_fits(self, entry: Mapping[str, Any]) -> bool:
        colours, names = entry["palette"], entry.get("classes", [])
        painted = all(
            len(colour) == 3 and all(type(one) is int and 0 <= one <= 255 for one in colour) for colour in colours
        )
        return len(colours) == entry["channels"] > 0 and painted and isinstance(names, list)

    def look(self, label: NDArray[Any]) -> Look:
        return look_at_ids(label)

    def statistics(self, looks: Sequence[Look], classes: Sequence[str]) -> dict[str, Any]:
        """Return the shares of the classes, over pixels, and the ids there are."""
        pixels = np.sum([one.pixels for one in looks if one.pixels is not None], axis=0)
        return {
            "ids_present": [index for index in range(len(classes)) if pixels[index]],
            "ids_absent": [index for index in range(len(classes)) if not pixels[index]],
            "ignored_share": float(pixels[IGNORE] / pixels.sum()),
            "pixel_shares": {name: float(pixels[i] / pixels.sum()) for i, name in enumerate(classes)},
        }

    def bins(self, task: "Task", classes: Sequence[str]) -> tuple[str, ...]:
        return tuple(name.replace("_", " ") for name in classes)

    def binned(self, label: NDArray[Any]) -> NDArray[np.uint8]:
        return label.astype(np.uint8)

    def says(self, value: Any, classes: Sequence[str], task: "Task") -> str:
        return classes[int(value)]


def class_names(entry: Mapping[str, Any]) -> list[str]:
    """Return the names of a task's classes, as people write them; numbers if the manifest has none."""
    names = entry.get("classes") or [f"class {index}" for index in range(len(entry.get("palette", ())))]
    return [str(name).replace("_", " ") for name in names]


def palette(classes: Sequence[str]) -> list[Colour]:
    """Return a colour for each class: the PASCAL VOC colour map (bit-reversed ids), black for a background only."""
    first = 0 if classes[0] == "background" else 1
    colours = []
    for index in range(first, first + len(classes)):
        red = green = blue = 0
        value = index
        for shift in range(7, -1, -1):
            red |= (value & 1) << shift
            green |= (value >> 1 & 1) << shift
            blue |= (value >> 2 & 1) << shift
            value >>= 3
        colours.append((red, green, blue))
    return colours


def look_at_ids(label: NDArray[Any]) -> Look:
    """Return the figures of a label of ids, 255 ignored."""
    pixels = np.bincount(label.ravel(), minlength=256)
    ids = np.flatnonzero(pixels[:IGNORE])
    return Look(
        valid_share=float(1 - pixels[IGNORE] / label.size),
        value=float(ids[0]) if len(ids) == 1 else None,
        positive_share=float(pixels[1] / label.size),
        pixels=pixels,
    )


def _percent(share: float) -> str:
    return "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"
