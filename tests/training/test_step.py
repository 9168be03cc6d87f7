"""One step: parts, recomputed blocks, drawn tasks and moving averages against the plain way."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3vit.data.loading import EpochBatches, TrainingSet, make_loader
from m3vit.data.nyud import NYUD
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.normalisation import IMAGENET
from m3vit.training.config import Config, TrainConfig
from m3vit.training.launch import Fabric
from m3vit.training.optim import make_average, make_optimizer
from m3vit.training.step import Labels, Stepper, choose_tasks, step_losses
from m3vit.training.weighting import GradientMethod, make_weighting

TRUNK = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": ""}
TASKS = ["semseg", "depth", "normals", "edge"]


def configuration(**train: object) -> Config:
    model = ModelConfig(trunk="vit_tiny_patch16_224", trunk_args=TRUNK, image_size=(32, 48), num_experts=4, top_k=2)
    config = Config(model=model, train=TrainConfig(accelerator="cpu", native_losses=["semseg"], **train))  # type: ignore[arg-type]
    config.check()
    return config


@pytest.fixture
def batch(tiny_data: Path) -> tuple[Tensor, Labels]:
    dataset = TrainingSet(NYUD(tiny_data, "train"), (32, 48), 1, IMAGENET)
    images, labels, *_ = next(iter(make_loader(dataset, EpochBatches(len(dataset), 6, seed=1), 0)))
    labels["depth"][:4, :, 5:] = 0  # parts of different numbers of valid pixels
    return images, labels


def stepper(config: Config) -> Stepper:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision=config.train.precision)  # type: ignore[arg-type]
    model = MultiTaskModel(config.model).train()
    model.backbone.checkpoint_activations = config.train.checkpoint_activations
    weighting = make_weighting(config, fabric.device)
    optimizer = make_optimizer(config.train, model, weighting.parameters())
    return Stepper(fabric, config, *fabric.setup(model, optimizer), weighting)


def gradients(
    config: Config, batch: tuple[Tensor, Labels], step: int = 0
) -> tuple[dict[str, float], dict[str, Tensor]]:
    found = stepper(config)
    values = found.gradients(step, *batch)
    return values, {name: p.grad for name, p in found.model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_plain_step_is_the_sum_of_the_losses(batch: tuple[Tensor, Labels]) -> None:
    config = configuration()
    values, found = gradients(config, batch)
    model = stepper(config).model
    loss, losses = step_losses(config, model, *batch)
    loss.backward()
    assert values == pytest.approx({"loss": loss.item(), **{name: value.item() for name, value in losses.items()}})
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, found)


@pytest.mark.parametrize("parts", [2, 4, 6])  # 6 images: parts of 2 and 1 too
def test_parts_add_up_to_the_batch(batch: tuple[Tensor, Labels], parts: int) -> None:
    whole, expected = gradients(configuration(balance_weight=0.0), batch)
    values, found = gradients(configuration(balance_weight=0.0, accumulate=parts), batch)
    assert {name: values[name] for name in TASKS} == pytest.approx({name: whole[name] for name in TASKS})
    # float32 sums in another order; gradients reach 10
    assert_same(expected, found, rtol=1e-4, atol=2e-5)


def test_balance_losses_of_parts_are_averaged(batch: tuple[Tensor, Labels]) -> None:
    values, _ = gradients(configuration(accumulate=2), batch)
    model, (images, labels) = stepper(configuration()).model, batch
    parts = [step_losses(configuration(), model, images[place], {t: v[place] for t, v in labels.items()})[1]
             for place in (slice(0, 3), slice(3, 6))]  # fmt: skip
    assert values["balance"] == pytest.approx(sum(part["balance"].item() for part in parts) / 2, rel=1e-5)


def test_missing_images_leave_the_rest_of_the_batch(batch: tuple[Tensor, Labels]) -> None:
    images, labels = batch
    few = images[:1], {task: label[:1] for task, label in labels.items()}
    _, expected = gradients(configuration(), few)
    _, found = gradients(configuration(accumulate=3), few)  # two of the parts are stand-ins
    # Their routing counts nothing, but the balance loss is the mean of three parts.
    expected = {n: g for n, g in expected.items() if n.startswith("heads")}
    assert_same(expected, {n: g for n, g in found.items() if n.startswith("heads")}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", ["fixed", "pcgrad"])
def test_recomputed_blocks_give_the_same_gradient(batch: tuple[Tensor, Labels], weighting: str) -> None:
    results = []
    for recompute in (False, True):
        config = configuration(checkpoint_activations=recompute, weighting=weighting)
        config.model.router_noise = 1.0  # drawn twice, the same
        results.append(gradients(config, batch))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1], rtol=0, atol=0)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_parts_without_tokens_add_nothing_to_any_routing_loss(batch: tuple[Tensor, Labels], noise: float) -> None:
    images, labels = batch
    few = images[:1], {task: label[:1] for task, label in labels.items()}
    weights = {"balance_weight": 0.1, "switch_weight": 0.1, "z_weight": 0.1, "specialise_weight": 0.1}
    results = []
    for parts in (1, 3):  # two of three are stand-ins
        config = configuration(accumulate=parts, **weights)
        config.model.router_noise, config.model.router_noise_kind = noise, "learned"
        results.append(gradients(config, few))
    (one, _), (three, found) = results
    for name in ("balance", "switch", "z", "specialise"):
        assert three[name] == pytest.approx(one[name] / 3, rel=1e-4), "the mean over the parts"
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_drawn_tasks_expect_the_full_sum(batch: tuple[Tensor, Labels]) -> None:
    config = configuration(tasks_per_step=2, switch_weight=0.1, z_weight=0.1)
    drawn = Counter(tuple(choose_tasks(config.train, TASKS, step)) for step in range(600))
    assert set(drawn) == set(combinations(TASKS, 2))
    assert all(60 < count < 140 for count in drawn.values())  # 100 +- 4 sigma
    # Over one of each pair, scaled by 4 / 2, the mean is the sum over all tasks, routing losses included.
    full, _ = gradients(configuration(switch_weight=0.1, z_weight=0.1), batch)
    first = {pair: next(s for s in range(600) if tuple(choose_tasks(config.train, TASKS, s)) == pair) for pair in drawn}
    losses = [gradients(config, batch, step)[0]["loss"] for step in first.values()]
    assert sum(losses) / len(losses) == pytest.approx(full["loss"], rel=1e-5)
    _, found = gradients(config, batch, first["semseg", "edge"])
    assert not any(name.startswith(("heads.depth", "heads.normals")) for name in found)


def test_gradients_combined_with_ones_are_the_plain_gradient(
    batch: tuple[Tensor, Labels], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GradientMethod, "combine", lambda self, gramian, seed: torch.ones(len(gramian)))
    weights = {"switch_weight": 0.1, "z_weight": 0.1}
    values, found = gradients(configuration(weighting="mgda", accumulate=2, **weights), batch)
    plain, expected = gradients(configuration(accumulate=2, **weights), batch)
    assert {name: values[name] for name in plain} == pytest.approx(plain, rel=1e-5)
    assert_same(expected, found, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("weighting", ["uncertainty", "dwa", "pcgrad", "mgda", "aligned_mtl"])
@pytest.mark.parametrize("tasks", [0, 1, 3])
def test_every_weighting_takes_steps(batch: tuple[Tensor, Labels], weighting: str, tasks: int) -> None:
    found = stepper(configuration(weighting=weighting, tasks_per_step=tasks, lr=1e-3))
    before = [parameter.detach().clone() for parameter in found.model.parameters()]
    for step in range(3):
        values = found.gradients(step, *batch)
        assert all(torch.tensor(value).isfinite() for value in values.values())
        assert sum(name.startswith("weight/") for name in values) == (tasks or 4)
        found.clip()
        found.optimizer.step()
        found.weighting.end_epoch()
    assert any(not torch.equal(a, b) for a, b in zip(before, found.model.parameters(), strict=True))
    state = found.weighting.state_dict()
    again = make_weighting(found.config, torch.device("cpu"))
    again.load_state_dict(state)
    assert again.weights() == found.weighting.weights()


def test_bfloat16_step_is_near_the_float32_one(batch: tuple[Tensor, Labels]) -> None:
    exact, _ = gradients(configuration(), batch)
    values, found = gradients(configuration(precision="bf16-mixed"), batch)
    # 8 bits of mantissa; losses are taken in float32
    assert values["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())


def test_moving_average_by_hand() -> None:
    config = configuration(ema=0.9)
    model = MultiTaskModel(config.model)
    average = make_average(config.train, model)
    assert average is not None and make_average(TrainConfig(), model) is None
    weight, seen = model.heads["depth"].linear.bias, []
    for value in (1.0, 2.0, 4.0):
        torch.nn.init.constant_(weight, value)
        average.update_parameters(model)
        seen.append(average.module.heads["depth"].linear.bias[0].item())
    # the first as it is, then 0.9 * 1 + 0.1 * 2 = 1.1, then 0.9 * 1.1 + 0.1 * 4 = 1.39
    assert seen == pytest.approx([1.0, 1.1, 1.39])
