"""An image without the label of one task is one that is not labelled for that task: all else is as with the label."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.data.loading import EpochBatches, TrainingSet, make_loader
from m3vit.data.nyud import NYUD
from m3vit.data.pascal_context import PASCALContext
from m3vit.data.sample import no_label
from m3vit.errors import InputError
from m3vit.evaluation.evaluate import TrivialPredictor, evaluate
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.normalisation import IMAGENET
from m3vit.tasks import IGNORE
from m3vit.training.config import Config, TrainConfig
from m3vit.training.launch import Fabric
from m3vit.training.losses import BatchCounts, task_loss
from m3vit.training.optim import make_optimizer
from m3vit.training.step import Stepper, step_losses
from m3vit.training.validation import is_best, validate
from m3vit.training.weighting import make_weighting
from tests.data.layouts import write_pascal

TRUNK: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
TRUNK |= {"class_token": False, "global_pool": ""}
TASKS = ["semseg", "depth", "normals", "edge"]


@pytest.fixture
def holes(make_data: Callable[..., Path], tmp_path: Path) -> Path:
    """Four training images: 0000 without depth, 0002 with damaged classes; of val, 0004 without depth and edges."""
    root = make_data(tmp_path / "holes", train=4, val=2)
    for file in ("depth/0000.npy", "depth/0004.npy", "edge/0004.npy"):
        (root / file).unlink()
    (root / "segmentation" / "0002.png").write_bytes(b"no picture")
    return root


def test_what_an_image_lacks_is_ignored_or_invalid_and_named(holes: Path) -> None:
    with pytest.raises(InputError, match=r"depth/0000\.npy not found.*on_error skip"):
        NYUD(holes, "train")  # by default, a data set is whole
    split = NYUD(holes, "train", partial=True)
    samples = [split.load(index) for index in range(4)]
    assert [sorted(sample.unlabelled) for sample in samples] == [["depth"], [], ["semseg"], []]
    assert "0000.npy not found" in samples[0].unlabelled["depth"]
    assert not samples[0].labels["depth"].any() and (samples[2].labels["semseg"] == IGNORE).all()
    whole = {task: samples[1].labels[task] for task in TASKS}
    for sample in samples:
        assert {task: (x.dtype, x.shape) for task, x in sample.labels.items()} == {
            task: (x.dtype, x.shape) for task, x in whole.items()
        }
    (holes / "images" / "0001.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"0001\.jpg"):  # there is nothing to learn from
        split.load(1)


def test_pascal_keeps_its_own_rules(tmp_path: Path) -> None:
    root = write_pascal(tmp_path)
    split = PASCALContext(root, "train", partial=True)
    before = split.load(0)
    split.path(0, "human_parts").unlink()
    after = split.load(0)
    assert list(after.unlabelled) == ["human_parts"] and (after.labels["human_parts"] == IGNORE).all()
    assert all((after.labels[task] == before.labels[task]).all() for task in ("semseg", "saliency", "normals", "edge"))
    # Edges, and which pixels have normals, are read from one file.
    split.path(0, "edge").unlink()
    assert list(split.load(0).unlabelled) == ["human_parts", "normals", "edge"]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_name_the_labels_they_lack(holes: Path, workers: int) -> None:
    dataset = TrainingSet(NYUD(holes, "train", partial=True), (32, 48), 0, IMAGENET)
    (batch,) = make_loader(dataset, EpochBatches(4, 4, seed=0), workers)
    assert len(batch.images) == 4 and not batch.errors and not batch.failure
    assert sorted(task for task, _ in batch.unlabelled) == ["depth", "semseg"]


def test_a_mean_is_over_the_labelled_pixels_alone() -> None:
    """Two images of two pixels, depth 2 and 4 m in the first: errors of 1 and 3 m have the mean 2, with or without."""
    logits = torch.tensor([[[[3.0, 1.0]]], [[[100.0, 100.0]]]])
    label = torch.stack([torch.tensor([[2.0, 4.0]]), torch.from_numpy(no_label("depth", (1, 2)))])
    assert float(task_loss("depth", logits, label, {})) == 2.0
    assert float(task_loss("depth", logits[:1], label[:1], {})) == 2.0
    assert float(task_loss("depth", logits[1:], label[1:], {})) == 0.0
    counts = BatchCounts({"depth": label, "edge": torch.full((2, 1, 2), IGNORE)})
    assert counts.labelled() == {"depth"}


def make(weighting: str, balance: float = 0.0) -> tuple[Config, MultiTaskModel, Stepper]:
    torch.manual_seed(0)
    kinds: dict[str, Any] = {"trunk_args": TRUNK, "image_size": (32, 48), "num_experts": 4, "pretrained": False}
    config = Config(ModelConfig(**kinds, tasks=TASKS), train=TrainConfig(weighting=weighting, balance_weight=balance))
    model, fabric = MultiTaskModel(config.model), Fabric(accelerator="cpu", devices=1)
    way = make_weighting(config, fabric.device)
    optimizer = make_optimizer(config.train, model, way.parameters())
    return config, model, Stepper(fabric, config, fabric.setup(model), fabric.setup_optimizers(optimizer), way)


def labelled_batch() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(1)
    labels = {
        "semseg": torch.randint(0, 40, (2, 32, 48), generator=rng),
        "depth": torch.rand(2, 32, 48, generator=rng) + 1,
        "normals": torch.nn.functional.normalize(torch.randn(2, 3, 32, 48, generator=rng), dim=1),
        "edge": torch.randint(0, 2, (2, 32, 48), generator=rng),
    }
    return torch.randn(2, 3, 32, 48, generator=rng), labels


def test_the_other_tasks_learn_as_with_the_label() -> None:
    config, model, _ = make("fixed")
    images, labels = labelled_batch()
    missing = labels | {"depth": torch.zeros_like(labels["depth"])}
    _, with_label = step_losses(config, model, images, labels)
    loss, without = step_losses(config, model, images, missing)
    assert without["depth"] == 0 and with_label["depth"] > 0
    assert all(torch.equal(with_label[task], without[task]) for task in ("semseg", "normals", "edge"))
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    weights = dict(zip(TASKS, (1.0, 1.0, 10.0, 50.0), strict=True))
    others = sum(weights[task] * with_label[task] for task in ("semseg", "normals", "edge"))
    expected = torch.autograd.grad(others, list(model.parameters()), allow_unused=True)
    for found, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(
            torch.zeros(1) if found is None else found.abs().sum()[None],
            torch.zeros(1) if right is None else right.abs().sum()[None],
        )


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "dwa", "pcgrad", "mgda", "aligned_mtl"])
def test_a_batch_without_a_label_of_one_task_or_of_any(weighting: str) -> None:
    images, labels = labelled_batch()
    none = {
        task: torch.zeros_like(x) if task in ("depth", "normals") else torch.full_like(x, IGNORE)
        for task, x in labels.items()
    }
    _, model, stepper = make(weighting)
    values = stepper.gradients(0, images, labels | {"depth": none["depth"]})
    assert all(math.isfinite(value) for value in values.values())
    assert "depth" not in values and "gradient/depth" not in values and values["semseg"] > 0
    first = next(model.parameters()).grad
    assert first is not None and torch.isfinite(first).all() and first.abs().sum() > 0
    if weighting == "mgda":  # an empty gradient is the shortest: it would have all the weight
        assert sum(values[f"gradient/{task}"] for task in ("semseg", "normals", "edge")) == pytest.approx(3)
    if weighting == "uncertainty":
        assert stepper.weighting.log_variances.grad[1] == 0
    if weighting == "dwa":
        assert set(stepper.weighting.sums) == {"semseg", "normals", "edge"}
    values = stepper.gradients(1, images, none)
    assert values == {"loss": 0.0} | {name: value for name, value in values.items() if name != "loss"}
    assert all(math.isfinite(value) for value in values.values()) and not set(values) & set(TASKS)


def test_the_trivial_predictor_is_fitted_to_the_labels_there_are(holes: Path) -> None:
    with pytest.raises(InputError, match=r"0000\.npy not found"):
        TrivialPredictor.fit(NYUD(holes, "train"))
    found = TrivialPredictor.fit(NYUD(holes, "train", partial=True))
    split = NYUD(holes, "train", partial=True)
    depths = np.concatenate([split.read(index, "depth").ravel() for index in (1, 2, 3)])
    assert found.left_out == 2
    assert found.constants["depth"] == pytest.approx(depths[depths > 0].mean(), rel=1e-6)
    (holes / "images" / "0003.jpg").unlink()
    assert TrivialPredictor.fit(split).left_out == 2 + len(TASKS)


def test_meters_leave_the_image_out(holes: Path) -> None:
    split = NYUD(holes, "val", partial=True)
    constants = {"semseg": 0, "depth": 3.0, "normals": [0.0, 0.0, 1.0], "edge": 0.1}
    predictor = TrivialPredictor(constants, "nyud").predictor((32, 48))
    for quick in (True, False):
        both = evaluate(split, predictor, quick=quick)
        assert [len(both.unlabelled[task]) for task in TASKS] == [0, 1, 0, 1]
        scores, second = both.scores(), evaluate(split, predictor, quick=quick, indices=[1]).scores()
        for task in ("depth", "edge"):
            assert scores[task] == second[task]
    # By hand: rmse over the valid pixels of the second image, where 3 m is predicted.
    truth = np.load(holes / "depth" / "0005.npy").astype(np.float64)
    assert scores["depth"]["rmse"] == pytest.approx(np.sqrt(((3 - truth) ** 2).mean()), rel=1e-6)


def test_a_task_that_no_image_is_labelled_for_has_no_figure(holes: Path) -> None:
    (holes / "depth" / "0005.npy").unlink()
    (holes / "depth" / "extra.npy").write_bytes(b"")
    _, model, _ = make("fixed")
    values = validate(NYUD(holes, "val", partial=True), model, "skip")
    assert not [name for name in values if name.startswith("depth/")] and values["unlabelled/depth"] == 2
    assert all(math.isfinite(value) for name, value in values.items() if not name.endswith("median"))
    assert is_best([values], TASKS, "mean") and not is_best([values, values], TASKS, "mean")
