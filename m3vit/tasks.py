"""The task table: everything that differs between tasks, in one place. A leaf module: no torch.

Conventions shared by loaders, losses, meters, runtime and hardware:
- image: RGB, uint8 on disk, normalised float32 [3, H, W] in the network;
- semseg labels: int64 ids 0..C-1, 255 ignored; depth: metres, 0 invalid; normals: unit vectors, zero vector
  invalid, x right, y up, z towards the camera; edge: 0/1, 255 ignored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from m3vit.errors import InputError

IGNORE = 255  # label value that neither losses nor meters look at (semseg, edge)

# ImageNet statistics: the normalisation of every published M3ViT/InvPT configuration (RGB, of images in 0..1).
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

NYUD_CLASSES = (
    "wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain "
    "dresser pillow mirror floor_mat clothes ceiling books refrigerator television paper towel shower_curtain box "
    "whiteboard person night_stand toilet sink lamp bathtub bag other_structure other_furniture other_prop"
).split()


@dataclass(frozen=True)
class Task:
    """One dense-prediction task.

    `metric` is the headline number, `unit` its unit; `output_bias` is where the head's bias starts, so that an
    untrained network predicts something typical (metres for depth, log-odds of an edge pixel for edge).
    """

    name: str
    channels: int
    metric: str
    unit: str
    higher_is_better: bool
    loss: str
    decode: str  # what the logits mean: argmax, identity, unit_vector or sigmoid (m3vit.export.runtime.decode)
    weight: float  # in the sum of losses: M3ViT's four-task NYUD configuration
    output_bias: float = 0.0


# Channels of semseg are those of NYUD-v2 (40 classes, no background).
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("semseg", 40, "mIoU", "%", True, "cross_entropy", "argmax", 1.0),
        Task("depth", 1, "rmse", "m", False, "l1", "identity", 1.0, output_bias=2.5),
        Task("normals", 3, "mErr", "deg", False, "l1_unit", "unit_vector", 10.0),
        Task("edge", 1, "pixF1", "%", True, "balanced_bce", "sigmoid", 50.0, output_bias=-2.0),
    )
}


def resolve(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names, in the order given, or raise InputError naming the unknown ones."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise InputError(f"unknown task {', '.join(unknown)}: choose from {', '.join(TASKS)}")
    if not names or len(set(names)) != len(names):
        raise InputError(f"tasks {list(names)}: name at least one task, each once")
    return [TASKS[name] for name in names]


def palette(num_colours: int) -> list[tuple[int, int, int]]:
    """Return the PASCAL VOC colour map (bit-reversed ids), from id 1 on: distinct colours without a table."""
    colours = []
    for index in range(1, num_colours + 1):
        red = green = blue = 0
        value = index
        for shift in range(7, -1, -1):
            red |= (value & 1) << shift
            green |= (value >> 1 & 1) << shift
            blue |= (value >> 2 & 1) << shift
            value >>= 3
        colours.append((red, green, blue))
    return colours
