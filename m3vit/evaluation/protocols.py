"""The two published evaluation protocols: how an image enters the network and how its output meets the labels.

A: Vandenhende's Multi-Task-Learning-PyTorch and M3ViT (evaluation/evaluate_utils.py, utils/utils.py there). Images are
   resized to the network's size, predictions back to the label's size, stored as 8-bit files, and read again.
B: ATRC, InvPT, TaskPrompter and after (evaluation/, data/transforms.py there). Images are padded to the network's
   size, and scored there, without a resize.

Figures of different protocols are not comparable, so each carries its protocol (DESIGN.md, section 10).

Shapes: n images, C channels, H x W the network's size, h x w the label's.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from m3vit.data.network_input import padded_place, resize_image
from m3vit.errors import InputError
from m3vit.models.budget_file import BUDGETS
from m3vit.tasks import TASKS, kind_of

PROTOCOLS = {
    "A": "A (Vandenhende, M3ViT: predictions resized to the label's size, 8-bit)",
    "B": "B (ATRC, InvPT: images padded, scored at the network's resolution)",
}

# What `m3vit eval` leaves in the folder of a run, a package or a project: the exporters may replace it, and what it
# leaves of other budgets (`of_evaluation`).
EVALUATION_FILES = (
    "eval.json",
    *(name for protocol in PROTOCOLS for name in (f"eval-{protocol}.npz", f"breakdown-{protocol}.json")),
)


def of_evaluation(name: str, budgets: Collection[str]) -> bool:
    """Return whether a file, named from its folder, is what `m3vit eval` leaves, with --budget too."""
    *folders, last = name.split("/")
    of_budget = len(folders) == 2 and folders[0] == BUDGETS and folders[1] in budgets
    return last in EVALUATION_FILES and (not folders or of_budget)


@dataclass(frozen=True)
class NetworkImage:
    """An image as the network gets it: `pixels` uint8 [H, W, 3], of which `rows` and `columns` show the image.

    The rest is padding, which is zero after normalisation: black here, until whoever knows the network fills it.
    """

    id: str
    pixels: NDArray[np.uint8]
    rows: slice
    columns: slice

    def padded(self, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
        """Return the pixels with the padding in a colour, for networks whose input is pixels."""
        pixels = np.full_like(self.pixels, colour)
        pixels[self.rows, self.columns] = self.pixels[self.rows, self.columns]
        return pixels


def check_protocol(name: str) -> str:
    """Return `name`, or raise InputError if it is not a protocol."""
    if name not in PROTOCOLS:
        raise InputError(f"protocol {name!r}: choose from {', '.join(PROTOCOLS)}")
    return name


def network_image(protocol: str, name: str, image: NDArray[np.uint8], size: tuple[int, int]) -> NetworkImage:
    """Fit an RGB image [h, w, 3] to the network's size.

    Protocol B raises InputError for an image larger than that: the published code fails there too.
    """
    if protocol == "A":
        # OpenCV's INTER_CUBIC, truncated: FixedResize works on float32, and ToTensor casts to uint8
        # (data/custom_transforms.py:295 there). Overshoot wraps around there; it is clipped here.
        return NetworkImage(name, resize_image(image, size, cubic=True), slice(0, size[0]), slice(0, size[1]))
    rows, columns = padded_place(image.shape[:2], size)
    if rows.stop > size[0] or columns.stop > size[1]:
        raise InputError(
            f"image {name} is {image.shape[0]}x{image.shape[1]}, larger than the network's {size[0]}x{size[1]}, and "
            "protocol B pads images but never resizes them: evaluate with --protocol A, or with the release and image "
            "size that this protocol was published with (NYUDv2 425x560 at 448x576, PASCAL-Context at 512x512)"
        )
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[rows, columns] = image
    return NetworkImage(name, pixels, rows, columns)


def as_stored(
    protocol: str, task: str, logits: Tensor, place: NetworkImage, label_size: tuple[int, int], *, y_down: bool = False
) -> Tensor:
    """Turn one image's logits [C, H, W] (any resolution: resized to H x W first) into what is stored [D or 1, h, w].

    Before it becomes 8 bits, where it does. `y_down`: as of `prediction`.
    """
    height, width = place.pixels.shape[:2]
    if logits.shape[-2:] != (height, width):
        logits = F.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    kind = kind_of(task)
    values = kind.stored(logits.float(), y_down)[:, place.rows, place.columns]
    if tuple(values.shape[-2:]) != tuple(label_size):
        assert protocol == "A", "protocol B does not resize"
        # OpenCV's INTER_NEAREST takes pixel floor(x * scale), as torch's "nearest" does.
        mode = {"mode": "nearest"} if kind.nearest else {"mode": "bilinear", "align_corners": False}
        values = F.interpolate(values[None], size=tuple(label_size), **mode)[0]  # type: ignore[arg-type]
    return values


def as_read(protocol: str, task: str, stored: Tensor, *, y_down: bool = False) -> NDArray[np.generic]:
    """Return the prediction [h, w] or [h, w, 3] that is read from what was stored."""
    # 8 bits: .astype(np.uint8) in the published code: truncated, not rounded
    return kind_of(task).restored(stored, protocol == "A" or TASKS[task].stored_in_8_bits, y_down)


def prediction(
    protocol: str, task: str, logits: Tensor, place: NetworkImage, label_size: tuple[int, int], *, y_down: bool = False
) -> NDArray[np.generic]:
    """Turn one image's logits [C, H, W] into a prediction [h, w], by way of what is stored.

    Classes: ids uint8. depth: metres float32. normals: float32 [h, w, 3], unit length. saliency, edge: probability
    float32 in steps of 1/255 (A, and edges in B, whose maps are stored as png) or exact. `y_down` says
    that the published code stores this data set's normals with y down (LabelSet.normals_y_down): truncation to 8 bits
    then pulls y up, not down.
    """
    stored = as_stored(protocol, task, logits, place, label_size, y_down=y_down)
    return as_read(protocol, task, stored, y_down=y_down)
