"""The task table: a task is a row, its kind and numbers; what differs between kinds is m3vit.kinds'. No torch.

Conventions shared by loaders, losses, meters, runtime and hardware:
- image: RGB, uint8 on disk, normalised float32 [3, H, W] in the network;
- semseg, human_parts: ids 0..C-1, 255 ignored; saliency, edge: 0/1, 255 ignored; depth: metres, 0 invalid;
  normals: unit vectors, zero vector invalid, x right, y up, z towards the camera.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from m3vit.errors import InputError, short
from m3vit.kinds import IGNORE as IGNORE
from m3vit.kinds import KINDS, Kind
from m3vit.kinds.classes import palette as palette
from m3vit.values import check_values

if TYPE_CHECKING:
    from m3vit.evaluation.meters import Meter, Scoring


@dataclass(frozen=True)
class Task:
    """One dense-prediction task: its kind (m3vit.kinds), and the numbers and rules that are its own.

    metric: the headline number; unit: its unit; published_metrics: by protocol, what published delta_m take instead.
    quick_metric: what the meter gives in place of `metric` while training, if it takes too long.
    weight: in the sum of losses: M3ViT's and InvPT's configurations, the same on both data sets.
    meter: makes the meter, where it is not the kind's (m3vit.evaluation.meters.Scoring).
    matches_edges: `metric` is of edges matched with the split's `edge_truth` within the label set's `edge_max_dist`; it
        takes so long that processes of their own do it (m3vit.evaluation.edge_pool).
    output_bias: where the head's bias starts, so that an untrained network predicts something typical.
    value_unit: of a predicted value, where the kind leaves it to the task.
    loss_options: options of the kind's loss, each with the setting of `train` that it is, or its value.
    stored_in_8_bits: maps are stored in 8 bits under every protocol, not under A alone.
    needs_foreground: an image of background alone is one without labels.
    guides_crop: a random crop of training images is drawn again where one of its classes fills most of it.
    tolerated: shares of a split's images up to which a finding of `m3vit data check` is no warning, by finding.
    reach: (least, most, in words what) of what 95 % of an image's values do not exceed, if their unit is right.
    blanks_named: what `m3vit data check` also calls the number of images without a label.
    """

    name: str
    kind: str
    metric: str
    unit: str
    higher_is_better: bool
    weight: float
    output_bias: float = 0.0
    meter: "Callable[[Scoring], Meter] | None" = None
    quick_metric: str = ""
    matches_edges: bool = False
    published_metrics: Mapping[str, str] = field(default_factory=dict)
    value_unit: str = ""
    loss_options: Mapping[str, str | float] = field(default_factory=dict)
    stored_in_8_bits: bool = False
    needs_foreground: bool = False
    guides_crop: bool = False
    tolerated: Mapping[str, float] = field(default_factory=dict)
    reach: tuple[float, float, str] | None = None
    blanks_named: str = ""

    @property
    def channels(self) -> int | None:
        """The number of outputs, or None where it is the number of classes of the label set."""
        return KINDS[self.kind].channels

    def headline(self, quick: bool) -> str:
        """Return the name of the headline metric, or of what stands for it while training."""
        return (quick and self.quick_metric) or self.metric

    def on_edge_truth(self, quick: bool) -> bool:
        """Return whether the meter takes the split's `edge_truth` for a label, not the label trained on."""
        return self.matches_edges and not (quick and self.quick_metric)


TASKS: dict[str, Task] = {}


def add_task(task: Task) -> None:
    """Make a task known, or raise InputError for one that is incomplete or whose name is taken."""
    if not isinstance(task, Task) or not isinstance(task.name, str) or not task.name.isidentifier():
        raise InputError(f"{short(task)} is no task: give an m3vit.tasks.Task with a name of letters, digits and _")
    if task.name in TASKS:
        raise InputError(f"task {task.name} is there already: choose another name")
    check_values(f"task {short(task.name)}", task, {"Meter": Any, "Scoring": Any})
    if task.kind not in KINDS:
        raise InputError(f"task {task.name} is of the unknown kind {short(task.kind)}: choose from {', '.join(KINDS)}")
    kind = KINDS[task.kind]
    own_meter = type(kind).meter is not Kind.meter
    missing = {
        "metric": not task.metric,
        f"meter (tasks of the kind {task.kind} bring their own)": task.meter is None and not own_meter,
        "value_unit (what a predicted value is in)": not (task.value_unit or kind.described_as),
    }
    if any(missing.values()):
        lacks = ", ".join(part for part, absent in missing.items() if absent)
        raise InputError(f"task {task.name} lacks {lacks}: give it")
    if without := [name for name in task.loss_options if name not in kind.loss_options]:
        there = ", ".join(kind.loss_options) or "none"
        raise InputError(
            f"task {task.name} has the loss options {', '.join(without)}: those of {task.kind} are {there}"
        )
    TASKS[task.name] = task


def kind_of(task: str) -> Kind:
    """Return the kind of a task of this name."""
    return KINDS[TASKS[task].kind]


def _saliency_meter(scoring: "Scoring") -> "Meter":
    from m3vit.evaluation.meters import SaliencyMeterA, SaliencyMeterB

    return SaliencyMeterA() if scoring.protocol == "A" else SaliencyMeterB()


def _edge_meter(scoring: "Scoring") -> "Meter":
    from m3vit.evaluation.edge_readers import READERS
    from m3vit.evaluation.meters import EdgeMeter, PixelEdgeMeter

    return PixelEdgeMeter() if scoring.quick else EdgeMeter(scoring.labels.edge_max_dist, READERS[scoring.protocol])


for _task in (
    Task("semseg", "argmax", "mIoU", "%", True, 1.0, guides_crop=True, tolerated={"constant": 0.05}),  # close-ups
    Task(
        "human_parts",
        "argmax",
        "mIoU",
        "%",
        True,
        2.0,
        needs_foreground=True,  # AddIgnoreRegions of both training pipelines
        tolerated={"blank": 1.0, "constant": 0.05},  # images without a person: many in PASCAL-Context
        blanks_named="images_without_person",
    ),
    Task(
        "saliency",
        "sigmoid",
        "maxF",
        "%",
        True,
        5.0,
        output_bias=-1.0,  # log-odds
        meter=_saliency_meter,
        # calculate_multi_task_performance in evaluation/evaluate_utils.py:51 (Vandenhende) takes mIoU. Nothing
        # published under protocol B computes delta_m; its papers report maxF.
        published_metrics={"A": "mIoU"},
        tolerated={"constant": 0.25},  # nothing stands out
    ),
    Task(
        "depth",
        "identity",
        "rmse",
        "m",
        False,
        1.0,
        output_bias=2.5,
        value_unit="m",
        tolerated={"unit": 0.01},
        # NYU's Kinect measures 0.7 to 10 m; tenths of metres, tens of metres, depths divided by their maximum, and most
        # inverse depths are outside.
        reach=(1.0, 15.0, "metres of a room"),
    ),
    Task(
        "normals",
        "unit_vector",
        "mErr",
        "deg",
        False,
        10.0,
        tolerated={"constant": 0.05},  # one wall
    ),
    Task(
        "edge",
        "sigmoid",
        "odsF",
        "%",
        True,
        50.0,
        output_bias=-2.0,
        meter=_edge_meter,
        quick_metric="pixF1",  # odsF takes too long between epochs
        matches_edges=True,
        loss_options={"positive_weight": "edge_positive_weight"},
        stored_in_8_bits=True,  # maps are png files under both protocols
        tolerated={"constant": 0.05},
    ),
):
    add_task(_task)
