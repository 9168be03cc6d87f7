"""The label sets: what each data set labels, and the names of its classes. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from m3vit.errors import InputError
from m3vit.tasks import TASKS, Task

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
class LabelSet:
    """What one data set labels: its tasks, the class names of those with classes, and how its edges are scored.

    `edge_max_dist` is the largest distance of matching edge pixels, as a share of the image diagonal (odsF).
    `normals_y_down` says that the files' normals have y down, and are turned up on reading.
    `tolerated`: as a task's (m3vit.tasks), by task, where this data set differs.
    """

    name: str
    tasks: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    edge_max_dist: float
    normals_y_down: bool = False
    tolerated: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

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
        tolerated={"normals": {"blank": 0.5}},  # only some classes have them: none in a sky with an aeroplane
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
