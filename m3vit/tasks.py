"""The task table: everything that differs between tasks, in one place. A leaf module: no torch.

Conventions shared by loaders, losses, meters, runtime and hardware:
- image: RGB, uint8 on disk, normalised float32 [3, H, W] in the network;
- semseg, human_parts: ids 0..C-1, 255 ignored; saliency, edge: 0/1, 255 ignored; depth: metres, 0 invalid;
  normals: unit vectors, zero vector invalid, x right, y up, z towards the camera.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from m3vit.errors import InputError

IGNORE = 255  # label value that neither losses nor meters look at (semseg, human_parts, saliency, edge)


NYUD_CLASSES = tuple(
    (
        "wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain "
        "dresser pillow mirror floor_mat clothes ceiling books refrigerator television paper towel shower_curtain box "
        "whiteboard person night_stand toilet sink lamp bathtub bag other_structure other_furniture other_prop"
    ).split()
)
VOC_CLASSES = tuple(
    (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
        "pottedplant sheep sofa train tvmonitor"
    ).split()
)
PART_CLASSES = ("background", "head", "torso", "upper_arm", "lower_arm", "upper_leg", "lower_leg")


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


@dataclass(frozen=True)
class LabelSet:
    """What one data set labels: its tasks, the class names of those with classes, and how its edges are scored.

    `edge_max_dist` is the largest distance of matching edge pixels, as a share of the image diagonal (odsF).
    `normals_y_down` says that the files' normals have y down, and are turned up on reading.
    """

    name: str
    tasks: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    edge_max_dist: float
    normals_y_down: bool = False

    def channels(self, task: str) -> int:
        """Return the number of outputs of a task."""
        return TASKS[task].channels or len(self.classes[task])


# maxDist: the values of the published evaluations (Multi-Task-Transformer and ATRC, edge evaluation).
LABEL_SETS: dict[str, LabelSet] = {
    "nyud": LabelSet("nyud", ("semseg", "depth", "normals", "edge"), {"semseg": NYUD_CLASSES}, 0.011),
    "pascal": LabelSet(
        "pascal",
        ("semseg", "human_parts", "saliency", "normals", "edge"),
        {"semseg": VOC_CLASSES, "human_parts": PART_CLASSES},
        0.0075,
        normals_y_down=True,
    ),
}


def resolve(names: Sequence[str], label_set: str) -> list[Task]:
    """Return the tasks of these names, in the order given, or raise InputError naming those that cannot be."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise InputError(f"unknown task {', '.join(unknown)}: choose from {', '.join(TASKS)}")
    if not names or len(set(names)) != len(names):
        raise InputError(f"tasks {list(names)}: name at least one task, each once")
    if label_set not in LABEL_SETS:
        raise InputError(f"model.label_set is {label_set!r}: choose from {', '.join(LABEL_SETS)}")
    absent = [name for name in names if name not in LABEL_SETS[label_set].tasks]
    if absent:
        raise InputError(
            f"{label_set} has no labels for {', '.join(absent)}: its tasks are {', '.join(LABEL_SETS[label_set].tasks)}"
        )
    return [TASKS[name] for name in names]


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
