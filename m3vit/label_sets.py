"""The label sets: what each data set labels, and the names of its classes. No torch."""

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from m3vit.errors import InputError, first_line, short
from m3vit.tasks import IGNORE, TASKS, Task, add_task
from m3vit.values import check_values

VERSION = 1  # of `describe`
MOST_DIST = 0.1  # of edge_max_dist: published are 0.0075 and 0.011, and the time of matching grows with its square

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
    `tolerated`, `reach`: as a task's (m3vit.tasks), by task, where this data set differs.
    """

    name: str
    tasks: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    edge_max_dist: float = 0.0
    normals_y_down: bool = False
    tolerated: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reach: Mapping[str, tuple[float, float, str]] = field(default_factory=dict)

    def channels(self, task: str) -> int:
        """Return the number of outputs of a task."""
        return TASKS[task].channels or len(self.classes[task])


LABEL_SETS: dict[str, LabelSet] = {}
DECLARED: list[dict[str, Any]] = []  # what `declare` added: processes started afresh need it too


def add_label_set(labels: LabelSet) -> None:
    """Make a label set known, or raise InputError for one that lacks a part or whose name is taken."""
    if not isinstance(labels, LabelSet) or not isinstance(labels.name, str) or labels.name in ("", "auto"):
        raise InputError(
            f"{short(labels)} is no label set: give an m3vit.label_sets.LabelSet with a name other than auto"
        )
    check_values(f"label set {short(labels.name)}", labels)
    if labels.name in LABEL_SETS:
        raise InputError(f"label set {labels.name} is there already: give another name")
    if isinstance(labels.tasks, str) or not labels.tasks or len(set(labels.tasks)) != len(labels.tasks):
        raise InputError(f"label set {labels.name} has the tasks {labels.tasks!r}: give a tuple of names, each once")
    if unknown := [task for task in labels.tasks if task not in TASKS]:
        raise InputError(
            f"label set {labels.name} has the unknown task {', '.join(unknown)}: add it first, or choose from "
            f"{', '.join(TASKS)}"
        )
    for task in labels.tasks:
        names = labels.classes.get(task, ())
        if TASKS[task].channels is None and not (1 < len(names) < IGNORE and len(set(names)) == len(names)):
            raise InputError(f"label set {labels.name} has the classes {short(names)} of {task}: give 2 to 254 names")
        if TASKS[task].channels is not None and task in labels.classes:
            raise InputError(f"label set {labels.name} has the classes {short(names)} of {task}, which has none")
        if TASKS[task].matches_edges and not 0 < labels.edge_max_dist <= MOST_DIST:
            given = f"has edge_max_dist {labels.edge_max_dist}" if labels.edge_max_dist else "lacks edge_max_dist"
            raise InputError(
                f"label set {labels.name} {given}, which edges are scored by: give a share of the image diagonal, at "
                f"most {MOST_DIST}"
            )
    LABEL_SETS[labels.name] = labels


# maxDist: the values of the published evaluations (Multi-Task-Transformer and ATRC, edge evaluation).
for _labels in (
    LabelSet("nyud", ("semseg", "depth", "normals", "edge"), {"semseg": NYUD_CLASSES}, 0.011),
    LabelSet(
        "pascal",
        ("semseg", "human_parts", "saliency", "normals", "edge"),
        {"semseg": VOC_CLASSES, "human_parts": PART_CLASSES},
        0.0075,
        normals_y_down=True,
        tolerated={"normals": {"blank": 0.5}},  # only some classes have them: none in a sky with an aeroplane
    ),
):
    add_label_set(_labels)


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
        have = LABEL_SETS[label_set].tasks
        left = [name for name in names if name in have] or have
        raise InputError(
            f"{label_set} has no labels for {', '.join(absent)}: its tasks are {', '.join(have)}; "
            f"give model.tasks=[{','.join(left)}]"
        )
    return [TASKS[name] for name in names]


def describe(label_set: str) -> dict[str, Any]:
    """Return a label set and the rows of its tasks as JSON values: `declare` makes them known elsewhere.

    Of a task, what is code is named under "code" alone.
    """
    labels = LABEL_SETS[label_set]
    tasks = {}
    for name in labels.tasks:
        row = vars(TASKS[name])
        code = sorted(key for key, value in row.items() if callable(value))
        tasks[name] = {key: value for key, value in row.items() if key not in code} | {"code": code}
    description = {"version": VERSION, "label_set": asdict(labels), "tasks": tasks}
    return json.loads(json.dumps(description, default=dict))  # type: ignore[no-any-return]


def declare(description: dict[str, Any], where: str, needed: Collection[str]) -> str:
    """Make known what a run or an export says of its labels (`describe`), and return the name of its label set.

    Tasks and label sets that are known here stay as they are. A label set of a known name with other classes gets a
    name of its own. Raises InputError for a task of `needed` that cannot be known without the code it was added by; the
    label set goes without others that cannot.
    """
    if not isinstance(description, dict) or description.get("version") != VERSION:
        raise InputError(f"{where} describes its labels in another version than {VERSION}: open it with what wrote it")
    try:
        for name, row in description["tasks"].items():
            try:
                _declare_task(name, {**row}, where)
            except InputError:
                if name in needed:
                    raise
        fields = description["label_set"]
        classes = {
            task: tuple(names) if isinstance(names, list) else names for task, names in fields["classes"].items()
        }
        tasks = tuple(task for task in fields["tasks"] if task in TASKS)
        labels = LabelSet(**{**fields, "tasks": tasks, "classes": classes})
        known = LABEL_SETS.get(labels.name)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where} describes its labels in a way that cannot be read ({first_line(error)})") from None
    if known is not None and known.classes != labels.classes:
        digest = zlib.crc32(json.dumps(labels.classes).encode())
        labels = replace(labels, name=f"{labels.name}-{digest:08x}")
    if labels.name not in LABEL_SETS:
        try:
            add_label_set(labels)
        except InputError as error:
            raise InputError(f"{where} describes labels that there cannot be: {error}") from None
        DECLARED.append(description)
    return labels.name


def _declare_task(name: str, row: dict[str, Any], where: str) -> None:
    code, known = row.pop("code"), TASKS.get(name)
    if row["name"] != name:
        raise TypeError(f"{short(row['name'])} under the name of {short(name)}")
    if known is not None:
        if known.kind != row["kind"]:
            raise InputError(f"{where} has a task {name} of the kind {short(row['kind'])}, here it is of {known.kind}")
        return
    if code:
        raise InputError(f"{where} has the unknown task {name}, whose {' and '.join(code)[:120]} it cannot hold")
    try:
        add_task(Task(**row))
    except InputError as error:
        raise InputError(f"{where} describes a task that there cannot be: {error}") from None
