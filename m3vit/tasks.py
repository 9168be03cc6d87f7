"""The task table: everything that differs between tasks, in one place. A leaf module: no torch.

Conventions shared by loaders, losses, meters, runtime and hardware:
- image: RGB, uint8 on disk, normalised float32 [3, H, W] in the network;
- semseg, human_parts: ids 0..C-1, 255 ignored; saliency, edge: 0/1, 255 ignored; depth: metres, 0 invalid;
  normals: unit vectors, zero vector invalid, x right, y up, z towards the camera.
"""

from collections.abc import Sequence
from dataclasses import dataclass

IGNORE = 255  # label value that neither losses nor meters look at (semseg, human_parts, saliency, edge)


@dataclass(frozen=True)
class Task:
    """One dense-prediction task.

    `channels` is the number of outputs, or None where it is the number of classes of the label set. `metric` is the
    headline number, `unit` its unit; `output_bias` is where the head's bias starts, so that an untrained network
    predicts something typical (metres for depth, log-odds of an edge pixel for edge).
    """

    name: str
    channels: int | None
    metric: str
    unit: str
    higher_is_better: bool
    loss: str
    decode: str  # what the logits mean: argmax, identity, unit_vector or sigmoid (m3vit.export.runtime.package.decode)
    weight: float  # in the sum of losses: M3ViT's and InvPT's configurations, the same on both data sets
    output_bias: float = 0.0


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("semseg", None, "mIoU", "%", True, "cross_entropy", "argmax", 1.0),
        Task("human_parts", None, "mIoU", "%", True, "cross_entropy", "argmax", 2.0),
        Task("saliency", 1, "maxF", "%", True, "balanced_bce", "sigmoid", 5.0, output_bias=-1.0),
        Task("depth", 1, "rmse", "m", False, "l1", "identity", 1.0, output_bias=2.5),
        Task("normals", 3, "mErr", "deg", False, "l1_unit", "unit_vector", 10.0),
        Task("edge", 1, "odsF", "%", True, "balanced_bce", "sigmoid", 50.0, output_bias=-2.0),
    )
}


def palette(classes: Sequence[str]) -> list[tuple[int, int, int]]:
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
