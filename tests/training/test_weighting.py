"""Weightings and the choice of the best evaluation, against numbers worked out by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from m3vit.errors import InputError
from m3vit.training.config import Config
from m3vit.training.validation import figure, is_best
from m3vit.training.weighting import DynamicAverage, GradientMethod, Uncertainty

CPU = torch.device("cpu")


def test_uncertainty_starts_at_the_fixed_weights_and_learns_from_the_losses() -> None:
    method = Uncertainty({"depth": 1.0, "edge": 50.0}, CPU)
    assert method.weights() == pytest.approx({"depth": 1.0, "edge": 50.0})
    # d/ds of exp(-s) L / 2 + s / 2 is (1 - exp(-s) L) / 2; here exp(-s) is 2 and 100, L is 3 and 0.01
    method.observe({"depth": 3.0, "edge": 0.01}, 1.0, lambda loss: loss.backward())
    assert method.log_variances.grad is not None
    assert method.log_variances.grad.tolist() == pytest.approx([(1 - 6) / 2, (1 - 1) / 2], abs=1e-6)


def test_uncertainty_of_drawn_tasks_leaves_the_others_and_scales() -> None:
    method = Uncertainty({"depth": 1.0, "normals": 10.0, "edge": 50.0}, CPU)
    method.observe({"edge": 0.02}, 3.0, lambda loss: loss.backward())
    assert method.log_variances.grad is not None
    assert method.log_variances.grad.tolist() == pytest.approx([0, 0, 3 * (1 - 2) / 2], abs=1e-5)


def test_dynamic_average() -> None:
    method = DynamicAverage({"depth": 1.0, "edge": 50.0})
    never: Callable[..., Any] = lambda loss: pytest.fail("nothing is learned")  # noqa: E731
    for depth, edge in ((1.0, 0.4), (3.0, 0.4)):
        method.observe({"depth": depth, "edge": edge}, 1.0, never)
    method.end_epoch()  # means 2 and 0.4
    assert method.weights() == {"depth": 1.0, "edge": 50.0}  # two epochs are needed
    method.observe({"depth": 1.0, "edge": 0.4}, 1.0, never)
    method.end_epoch()
    # ratios 0.5 and 1, over temperature 2: exp(0.25) and exp(0.5), normalised to a sum of 2
    total = math.exp(0.25) + math.exp(0.5)
    expected = {"depth": 2 * math.exp(0.25) / total, "edge": 50 * 2 * math.exp(0.5) / total}
    assert method.weights() == pytest.approx(expected)


def test_pcgrad_by_hand() -> None:
    method = GradientMethod({"depth": 1.0, "edge": 1.0}, "pcgrad")
    # g1 = (1, 0), g2 = (-1, 1): g1 loses its part along g2: g1 + g2 / 2, g2 along g1: g2 + g1. Sum: 2 g1 + 1.5 g2.
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    assert method.combine(gradients @ gradients.T, 0).tolist() == pytest.approx([2.0, 1.5])
    # no conflict: the plain sum
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    before = torch.get_rng_state()
    assert method.combine(gradients @ gradients.T, 0).tolist() == pytest.approx([1.0, 1.0])
    assert torch.equal(torch.get_rng_state(), before), "the run's random state is its own"


def test_mgda_by_hand() -> None:
    # the shortest vector between (1, 0) and (0, 2): t (1, 0) + (1 - t) (0, 2), t = 0.8; times two tasks
    gradients = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    weights = GradientMethod({"depth": 1.0, "edge": 1.0}, "mgda").combine(gradients @ gradients.T, 0)
    assert weights.tolist() == pytest.approx([1.6, 0.4], abs=1e-2)  # its solver stops at 1e-3


def test_best_evaluation_by_hand() -> None:
    tasks = ["semseg", "depth", "edge"]
    first = {"semseg/mIoU": 2.0, "depth/rmse": 1.0, "edge/pixF1": 40.0}
    second = {"semseg/mIoU": 4.0, "depth/rmse": 1.25, "edge/pixF1": 50.0}
    # (4 - 2) / 4, -(1.25 - 1) / 1.25, (50 - 40) / 50
    assert figure(second, first, tasks, "mean") == pytest.approx((0.5 - 0.2 + 0.2) / 3)
    assert figure(first, first, tasks, "mean") == 0
    assert figure(second, first, tasks, "depth") == -1.25
    assert is_best([first], tasks, "mean") and is_best([first, second], tasks, "mean")
    assert not is_best([first, second], tasks, "depth")
    assert not is_best([first, second, second], tasks, "mean"), "the earlier of equals is kept"
    assert not is_best([first, {**second, "depth/rmse": math.nan}], tasks, "mean")
    nothing = {**first, "semseg/mIoU": 0.0}
    assert figure(second, nothing, tasks, "semseg") == 4.0
    assert figure(second, nothing, tasks, "mean") == pytest.approx((1 - 0.2 + 0.2) / 3)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("weighting", "gradnorm", "choose from fixed, uncertainty, dwa, pcgrad"),
        ("best", "saliency", "choose from mean, semseg"),
        ("ema", 1.0, "give a decay below 1"),
        ("ema", -0.1, "give a decay below 1"),
        ("seed", 2**32, "below 2"),
        ("momentum", 1.0, "below 1"),
        ("accumulate", 0, "give a positive number"),
        ("accumulate", 9, "no more parts"),
        ("tasks_per_step", 5, "the model has 4 tasks"),
        ("tasks_per_step", -1, "zero or a positive"),
    ],
)
def test_values_that_cannot_work(key: str, value: object, words: str) -> None:
    config = Config()
    setattr(config.train, key, value)
    with pytest.raises(InputError, match=words):
        config.check()


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("model", "tasks", ["depth"], "one task"),
        ("model", "router", "single", "router single"),
        ("train", "tasks_per_step", 1, "tasks_per_step 1"),
        ("train", "weighting", "pcgrad", "runs each task alone"),
    ],
)
def test_specialising_is_refused_where_it_does_nothing(section: str, key: str, value: object, words: str) -> None:
    config = Config()
    config.train.specialise_weight = 0.1
    config.check()
    setattr(getattr(config, section), key, value)
    with pytest.raises(InputError, match=f"is 0 with .*{words}"):
        config.check()


@pytest.mark.parametrize(("key", "value"), [("tasks_per_step", 2), ("weighting", "pcgrad")])
def test_distillation_needs_all_tasks_in_a_pass(key: str, value: object) -> None:
    config = Config()
    config.model.head, config.model.distillation = "pup", [0]
    config.check()
    setattr(config.train, key, value)
    with pytest.raises(InputError, match=f"train.{key} {value} never has them"):
        config.check()


def test_learned_noise_of_zero_is_refused() -> None:
    config = Config()
    config.model.router_noise_kind = "learned"
    with pytest.raises(InputError, match=r"--model\.router_noise=1"):
        config.check()


def test_gradient_methods_refuse_scaled_gradients() -> None:
    config = Config()
    config.train.weighting, config.train.precision = "pcgrad", "16-mixed"
    with pytest.raises(InputError, match="bf16-mixed"):
        config.check()
