"""Kinds of tasks: those there are, and one that is added from outside and meets no switch on the way."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3vit.data.augment import training_pair
from m3vit.data.sample import Sample, no_label
from m3vit.data.tools.plausibility import look, oddities, statistics
from m3vit.errors import InputError
from m3vit.evaluation.evaluate import Predictor, TrivialPredictor, evaluate
from m3vit.evaluation.meters import Meter, Scoring, check_meter
from m3vit.evaluation.protocols import network_image, prediction
from m3vit.export.runtime.drawing import overlay
from m3vit.export.runtime.summary import summarise
from m3vit.kinds import KINDS, add_kind, as_json
from m3vit.kinds.decoding import decode
from m3vit.kinds.kind import REQUIRED, Kind
from m3vit.kinds.pictures import Range, Scale, ramp
from m3vit.label_sets import LABEL_SETS, LabelSet
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.normalisation import IMAGENET
from m3vit.tasks import TASKS, Task, add_task, kind_of
from m3vit.training.config import Config, TrainConfig
from m3vit.training.launch import Fabric
from m3vit.training.losses import BatchCounts, loss_options, task_loss
from m3vit.training.optim import make_optimizer
from m3vit.training.step import Stepper
from m3vit.training.validation import check_scored, headline
from m3vit.training.weighting import make_weighting

UNKNOWN = 1e9  # as Middlebury's flow has it


class Flow(Kind):
    """How far each pixel moves, in pixels: right and down. Any number is possible, so that a far one is unknown."""

    name, channels, described_as, label_shape, fill = "flow", 2, "pixels: right, down", (2,), UNKNOWN
    own_range = True

    def mirrored(self, values: Tensor) -> Tensor:
        return torch.where(values == UNKNOWN, values, values * values.new_tensor([-1.0, 1.0]).view(2, 1, 1))

    def valid(self, label: Tensor) -> Tensor:
        return label[:, 0] != UNKNOWN

    def loss(self, logits: Tensor, label: Tensor, counts: Tensor, **options: float) -> Tensor:
        error = (logits - label).square().sum(dim=1)
        return torch.where(self.valid(label), error, 0).sum() / counts[0].clamp(min=1)

    def decode(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        return logits.transpose(0, 2, 3, 1)

    def meter(self, scoring: Scoring) -> Meter:
        return EndPoints()

    def limits(self, prediction: NDArray[Any], outside: float = 2.0) -> Range | None:
        lengths = np.linalg.norm(prediction, axis=-1)[prediction[..., 0] != UNKNOWN]
        return (0.0, float(np.percentile(lengths, 100 - outside))) if lengths.size else None

    def paint(
        self, prediction: NDArray[Any], palette: Sequence[Sequence[int]] = (), limits: Range | None = None
    ) -> NDArray[np.uint8]:
        low, high = limits or self.limits(prediction) or (0.0, 1.0)
        return ramp((np.linalg.norm(prediction, axis=-1) - low) / max(high - low, 1e-6))

    def legend(
        self,
        prediction: NDArray[Any],
        task: str,
        entry: Mapping[str, Any],
        limits: Range | None = None,
        rows: int | None = None,
        plain: bool = False,
    ) -> Scale:
        return Scale(f"{task}, pixels", ramp(np.linspace(0, 1, 256)), *(limits or (0.0, 1.0)))

    def summary(self, prediction: NDArray[Any], entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"mean": [float(value) for value in prediction.mean(axis=(0, 1))]}

    def tally(self, label: NDArray[Any]) -> NDArray[np.float64]:
        valid = label[label[..., 0] != UNKNOWN]
        return np.array([*valid.sum(axis=0), len(valid)], np.float64)

    def constant(self, total: NDArray[np.float64]) -> list[float]:
        return [float(value) for value in total[:2] / max(total[2], 1)]


class EndPoints(Meter):
    """Mean length of the error."""

    def image(self, prediction: NDArray[np.float32], label: NDArray[np.float32]) -> NDArray[np.float64]:
        valid = label[..., 0] != UNKNOWN
        return np.array([np.linalg.norm((prediction - label)[valid], axis=-1).sum(), valid.sum()], np.float64)

    def compute(self, totals: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        return {"epe": totals[..., 0] / np.maximum(totals[..., 1], 1)}


@pytest.fixture
def flow() -> Iterator[Task]:
    """A task of a new kind, with a label set that has it beside depth."""
    add_kind(Flow())
    task = Task("flow", "flow", "epe", "px", False, 3.0)
    add_task(task)
    LABEL_SETS["driving"] = LabelSet("driving", ("depth", "flow"), {}, 0.01)
    yield task
    del LABEL_SETS["driving"], TASKS["flow"], KINDS["flow"]


def sample(seed: int, size: tuple[int, int] = (24, 32)) -> Sample:
    rng = np.random.default_rng(seed)
    moved = rng.normal(2, 1, (*size, 2)).astype(np.float32)
    moved[rng.random(size) < 0.2] = UNKNOWN
    depth = rng.uniform(1, 9, size).astype(np.float32)
    return Sample(str(seed), rng.integers(0, 256, (*size, 3), dtype=np.uint8), {"depth": depth, "flow": moved})


class Drives:
    """A split of two images."""

    label_set, release, split, tasks, partial = "driving", "made", "val", ("depth", "flow"), False

    def __len__(self) -> int:
        return 2

    def load(self, index: int) -> Sample:
        return sample(index)


# --- the kinds there are ---


def test_every_kind_is_complete_and_every_task_can_be_scored() -> None:
    for kind in KINDS.values():
        assert all(getattr(type(kind), part) is not getattr(Kind, part) for part in REQUIRED)
    for name, labels in LABEL_SETS.items():
        check_scored(labels.tasks, name)


CHANNELS = {"argmax": 5, "unit_vector": 3}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_how_far_logits_are_apart_is_0_and_flat_where_they_agree(name: str) -> None:
    """And more, the further they are apart: an absolute difference would pull as hard at the smallest one."""
    torch.manual_seed(0)
    kind, target = KINDS[name], torch.randn(2, CHANNELS.get(name, 1), 4, 6) + 3
    away = torch.randn_like(target)
    found, slopes = [], []
    for step in (0.0, 1e-2, 1e-1, 0.5):
        logits = (target + step * away).requires_grad_()
        distance = kind.distance(logits, target)
        assert distance.shape == (2, 4, 6)
        (slope,) = torch.autograd.grad(distance.sum(), logits)
        found.append(float(distance.detach().mean()))
        slopes.append(float(slope.abs().max()))
    assert found[0] == pytest.approx(0, abs=1e-6) and found == sorted(found) and found[3] > 0
    assert slopes[0] < 1e-5 and 5 * slopes[1] < slopes[2] < slopes[3]
    nothing, far = torch.zeros_like(target), (100 * away).requires_grad_()
    for target in (nothing, 1e-9 * away):  # no larger a slope than an absolute difference has, whatever the target
        distance = kind.distance(far, target)
        (slope,) = torch.autograd.grad(distance.sum(), far)
        assert distance.isfinite().all() and slope.isfinite().all() and slope.abs().mean() <= 1


def test_neither_tasks_nor_meters_import_torch() -> None:
    code = (
        "import sys, m3vit.label_sets, m3vit.evaluation.meters, m3vit.export.runtime.drawing, m3vit.data.tools.check; "
        "m3vit.evaluation.meters.check_meter('edge', 'nyud', 'A'); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- what is refused ---


@pytest.mark.parametrize("part", REQUIRED)
def test_an_incomplete_kind_is_refused(part: str) -> None:
    incomplete = type("Half", (Flow,), {"name": "half", part: getattr(Kind, part)})
    with pytest.raises(InputError, match=rf"^kind half \(Half\) lacks {part}: define them$"):
        add_kind(incomplete())
    assert "half" not in KINDS


def test_a_kind_needs_a_name_of_its_own() -> None:
    taken = type("Taken", (Flow,), {"name": "sigmoid"})
    with pytest.raises(InputError, match=r"kind sigmoid is there already \(Probability\): choose another name"):
        add_kind(taken())
    with pytest.raises(InputError, match="has the name '': give one"):
        add_kind(type("Nameless", (Flow,), {"name": ""})())
    with pytest.raises(InputError, match=r"^kind wide has 0 channels: give 1 or more"):
        add_kind(type("Wide", (Flow,), {"name": "wide", "channels": 0})())
    with pytest.raises(InputError, match=r"^kind wide.channels is '2', expected int"):
        add_kind(type("Wide", (Flow,), {"name": "wide", "channels": "2"})())
    with pytest.raises(InputError, match="is no kind: derive one from"):
        add_kind(Flow)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "depth"}, "task depth is there already: choose another name"),
        ({"kind": "heat"}, "task shadow is of the unknown kind 'heat': choose from argmax, identity"),
        ({}, r"task shadow lacks meter \(tasks of the kind sigmoid bring their own\): give it"),
        ({"kind": "identity"}, r"task shadow lacks value_unit \(what a predicted value is in\): give it"),
        ({"kind": "argmax", "metric": ""}, "task shadow lacks metric: give it"),
        (
            {"kind": "argmax", "loss_options": {"tau": 2}},
            "task shadow has the loss options tau: those of argmax are none",
        ),
        ({"weight": "1"}, "task 'shadow'.weight is '1', expected float"),
        ({"name": "no name"}, "is no task: give an m3vit.tasks.Task with a name of letters, digits and _"),
    ],
)
def test_an_incomplete_task_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_task(dataclasses.replace(Task("shadow", "sigmoid", "F1", "%", True, 1.0), **changes))
    assert "shadow" not in TASKS


def test_a_headline_that_the_meter_does_not_give_is_refused_at_the_start(
    flow: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "flow", dataclasses.replace(flow, metric="rmse"))
    with pytest.raises(InputError, match="the meter of flow gives epe, not rmse, which the task names as its headline"):
        check_scored(["depth", "flow"], "driving")
    with pytest.raises(InputError, match="the meter of flow gives epe, not rmse"):
        evaluate(Drives(), TrivialPredictor({"depth": 1.0, "flow": [0, 0]}, "driving").predictor((24, 32)))  # type: ignore[arg-type]


class NoCompute(Meter):
    """Half a meter."""

    def image(self, prediction: NDArray[Any], label: NDArray[Any]) -> NDArray[np.float64]:
        return np.zeros(1)


@pytest.mark.parametrize(
    ("meter", "message"),
    [
        (lambda scoring: None, "the meter of flow under protocol A is None: give an m3vit.evaluation.meters.Meter"),
        (lambda scoring: NoCompute(), "the meter of flow cannot be made (.*compute.*): mend it"),
    ],
)
def test_half_a_meter_is_refused_at_the_start(
    flow: Task, monkeypatch: pytest.MonkeyPatch, meter: Any, message: str
) -> None:
    monkeypatch.setitem(TASKS, "flow", dataclasses.replace(flow, meter=meter))
    with pytest.raises(InputError, match=message):
        check_scored(["flow"], "driving")


def test_a_setting_that_there_is_not_is_no_loss_option(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(TASKS["edge"], loss_options={"positive_weight": "edge_weight"})
    monkeypatch.setitem(TASKS, "edge", row)
    with pytest.raises(
        InputError, match=r"its loss option positive_weight is to be train.edge_weight, and there is no"
    ):
        loss_options("edge", TrainConfig())


def test_a_kind_that_decodes_into_something_else_is_refused_at_the_start(
    flow: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flow, "decode", lambda self, logits: logits.astype(np.float64))
    with pytest.raises(InputError, match=r"kind flow decodes logits \[1, 2, 8, 8\] into float64 \[1, 2, 8, 8\]: give"):
        check_scored(["flow"], "driving")


def test_a_board_says_what_it_cannot_decode() -> None:
    with pytest.raises(ValueError, match=r"flow is decoded by what added it to m3vit, not here: take what run\(\)"):
        decode(np.zeros((1, 2, 4, 4), np.float32), "flow")


# --- a kind from outside ---


def test_augmentation_moves_its_labels_and_asks_it_for_their_values(flow: Task) -> None:
    one = sample(0)
    _, labels = training_pair("simple", one, (24, 32), np.random.default_rng(0), IMAGENET)
    _, plain = training_pair("simple", one, (24, 32), np.random.default_rng(0), IMAGENET, flip=False)
    np.testing.assert_array_equal(plain["flow"].permute(1, 2, 0).numpy(), one.labels["flow"])
    mirrored = one.labels["flow"][:, ::-1] * np.where(one.labels["flow"][:, ::-1] == UNKNOWN, 1, [-1, 1])
    flipped = [
        training_pair("simple", one, (24, 32), np.random.default_rng(seed), IMAGENET)[1]["flow"] for seed in range(8)
    ]
    assert labels["flow"].shape == (2, 24, 32)
    assert any(np.array_equal(values.permute(1, 2, 0).numpy(), mirrored.astype(np.float32)) for values in flipped)
    _, padded = training_pair("invpt", one, (80, 90), np.random.default_rng(1), IMAGENET)
    assert (padded["flow"][:, 0, 0] == UNKNOWN).all() and (padded["depth"][0, 0] == 0).all()
    assert (no_label("flow", (2, 3)) == UNKNOWN).all() and no_label("flow", (2, 3)).shape == (2, 3, 2)


def test_its_losses_of_parts_add_up_to_the_batchs(flow: Task) -> None:
    label = torch.from_numpy(np.stack([sample(seed).labels["flow"] for seed in range(3)])).permute(0, 3, 1, 2)
    logits = torch.randn(3, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    counts = BatchCounts({"flow": label, "depth": torch.zeros(3, 24, 32)})
    parts = [task_loss("flow", logits[i : i + 1], label[i : i + 1], {}, counts) for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(), task_loss("flow", logits, label, {}))
    assert counts.labelled() == {"flow"}


def test_a_model_learns_it_beside_another_task(flow: Task) -> None:
    torch.manual_seed(0)
    trunk = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": ""}
    model_config = ModelConfig(
        trunk="vit_tiny_patch16_224", trunk_args=trunk, image_size=(24, 32), num_experts=2, top_k=1, pretrained=False
    )
    model_config.tasks, model_config.label_set = ["depth", "flow"], "driving"
    config = Config(model_config, train=TrainConfig(accelerator="cpu"))
    model, fabric = MultiTaskModel(config.model), Fabric(accelerator="cpu", devices=1)
    weighting = make_weighting(config, fabric.device)
    optimizer = make_optimizer(config.train, model, weighting.parameters())
    stepper = Stepper(fabric, config, fabric.setup(model), fabric.setup_optimizers(optimizer), weighting)
    pairs = [training_pair("simple", sample(seed), (24, 32), np.random.default_rng(0), IMAGENET) for seed in range(2)]
    labels = {task: torch.stack([found[task] for _, found in pairs]) for task in ("depth", "flow")}
    values = stepper.gradients(0, torch.stack([image for image, _ in pairs]), labels)
    assert values["flow"] > 0 and values["loss"] >= 3.0 * values["flow"]
    assert model(torch.zeros(1, 3, 24, 32)).logits["flow"].shape[1] == 2
    assert stepper.stand_in.labels["flow"].unique().tolist() == [UNKNOWN]


def test_it_is_scored_beside_a_trivial_predictor_of_its_own(flow: Task) -> None:
    split = Drives()
    trivial = TrivialPredictor.fit(split)  # type: ignore[arg-type]
    valid = np.concatenate([one[one[..., 0] != UNKNOWN] for one in (sample(i).labels["flow"] for i in range(2))])
    assert trivial.constants["flow"] == pytest.approx(valid.mean(axis=0, dtype=np.float64))
    scores = evaluate(split, trivial.predictor((24, 32))).scores()  # type: ignore[arg-type]
    errors = np.linalg.norm(valid - np.float32(trivial.constants["flow"]), axis=1)
    assert scores["flow"] == {"epe": pytest.approx(errors.mean(), rel=1e-5)} and "rmse" in scores["depth"]
    assert headline("flow") == "flow/epe"


@pytest.mark.parametrize(("protocol", "label_size"), [("A", (30, 20)), ("B", (20, 30))])
def test_its_predictions_are_those_of_the_logits(flow: Task, protocol: str, label_size: tuple[int, int]) -> None:
    logits = torch.tensor([3.5, -2.0]).view(2, 1, 1).expand(2, 6, 8)
    place = network_image(protocol, "x", np.zeros((*label_size, 3), np.uint8), (24, 32))
    guess = prediction(protocol, "flow", logits, place, label_size)
    assert guess.shape == (*label_size, 2) and np.allclose(guess, (3.5, -2.0), rtol=1e-6)


def test_numbers_of_numpy_are_as_good_as_pythons() -> None:
    given = {"mean": np.float32([0.5, 2]), "most": np.int64(3), "of": [np.uint8(1), (np.float64(0.25), None)]}
    assert json.loads(json.dumps(as_json(given))) == {"mean": [0.5, 2], "most": 3, "of": [1, [0.25, None]]}


def test_it_is_drawn_summed_up_and_resized(flow: Task) -> None:
    kind, one = kind_of("flow"), np.tile(np.float32([3, 4]), (10, 12, 1))
    entry = {"decode": "flow", "channels": 2, "unit": kind.described_as, **kind.entry(())}
    assert kind.entry_fits(entry) and not kind.entry_fits(entry | {"channels": 3})
    picture = overlay(np.zeros((10, 12, 3), np.uint8), one, "flow", {"tasks": {"flow": entry}})
    assert picture.dtype == np.uint8 and picture.shape[1] >= 320
    assert summarise(one, entry) == {"mean": [3.0, 4.0]}
    resized = kind.resized(one, (5, 7))
    assert resized.shape == (5, 7, 2) and np.allclose(resized, (3, 4))


def test_the_doctor_looks_at_its_labels(flow: Task) -> None:
    looks = [look("flow", sample(0).labels["flow"]), look("flow", no_label("flow", (4, 4)))]
    assert 0.7 < looks[0].valid_share < 0.9 and looks[1].valid_share == 0
    assert statistics("flow", "driving", looks)["blank_images"] == 1
    assert oddities("flow", "driving", ["a", "b"], looks) == [("blank", "1 of 2 images (50.0 %), such as b")]


def test_a_meter_can_ask_for_the_truth_of_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second task that is scored by matching is scored as edge is, on the same maps."""
    contour = dataclasses.replace(TASKS["edge"], name="contour")
    add_task(contour)
    monkeypatch.setitem(LABEL_SETS, "both", LabelSet("both", ("edge", "contour"), {}, 0.011))

    class Both(Drives):
        label_set, tasks = "both", ("edge", "contour")

        def load(self, index: int) -> Sample:
            wrong = np.zeros((24, 32), np.uint8)
            return Sample(str(index), sample(index).image, {"edge": wrong, "contour": wrong})

        def edge_truth(self, index: int) -> NDArray[np.bool_]:
            return np.eye(24, 32, index, dtype=bool)

    def run(images: list[Any]) -> dict[str, Tensor]:
        maps = torch.randn(len(images), 1, 24, 32, generator=torch.Generator().manual_seed(0))
        return {"edge": maps, "contour": maps}

    try:
        found = evaluate(Both(), Predictor("noise", ("edge", "contour"), "both", (24, 32), run))  # type: ignore[arg-type]
        assert TASKS["contour"].on_edge_truth(quick=False) and not TASKS["contour"].on_edge_truth(quick=True)
        assert found.scores()["contour"] == found.scores()["edge"] and found.scores()["edge"]["odsF"] > 0
    finally:
        del TASKS["contour"]


def test_a_task_of_a_kind_that_there_is_takes_all_from_it() -> None:
    add_task(Task("range", "identity", "abs_rel", "%", False, 1.0, value_unit="cm"))
    try:
        assert check_meter("range", "nyud", "A") and TASKS["range"].channels == 1
        assert kind_of("range").says(2.5, (), TASKS["range"]) == "2.5 cm"
    finally:
        del TASKS["range"]
