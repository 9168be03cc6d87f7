"""Channels of pup heads: the first of them against a head made of these alone, with gradients; their order."""

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.models.budget import Budget
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.order import carry_out
from m3vit.models.space import require_trained
from m3vit.profiling import graph_macs, profile
from m3vit.training.budgets import space
from m3vit.training.config import TrainConfig
from tests.conftest import TINY
from tests.test_cli import refused

Cli = Callable[..., subprocess.CompletedProcess]
TRUNK = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, global_pool="", class_token=False)
GRID, SIZE = (4, 6), (32, 48)
CHANNELS = {"depth": 64, "normals": 128}
BUDGET = Budget(heads=CHANNELS)


def make(**changes: Any) -> MultiTaskModel:
    """Return a model whose BatchNorms have seen something."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"num_experts": 4, "top_k": 2, "tasks": ["depth", "normals"], "head": "pup"}
    model = MultiTaskModel(ModelConfig("vit_tiny_patch16_224", TRUNK, image_size=SIZE, **defaults | changes))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            for values in (norm.running_var, norm.weight):
                nn.init.uniform_(values, 0.5, 2)  # type: ignore[arg-type]
            nn.init.normal_(norm.bias, std=0.1)
    return model.eval()


def slow_head(head: Any, tokens_BTD: Tensor, count: int) -> Tensor:
    """A head of `count` channels, each parameter cut by hand."""
    x = F.layer_norm(tokens_BTD, tokens_BTD.shape[-1:], head.norm.weight, head.norm.bias, 1e-6)
    x = x.mT.reshape(len(x), -1, *GRID)
    for place, (conv, norm, _) in enumerate(head.stages):
        if place:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.conv2d(x, conv.weight[:count, : x.shape[1]], conv.bias[:count], padding=1)
        mean, deviation = norm.running_mean[:count], (norm.running_var[:count] + norm.eps).sqrt()
        x = (x - mean[:, None, None]) / deviation[:, None, None]
        x = (x * norm.weight[:count, None, None] + norm.bias[:count, None, None]).clamp(min=0)
    x = F.conv2d(x, head.output.weight[:, :count], head.output.bias)
    return F.interpolate(x, size=SIZE, mode="bilinear", align_corners=False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [False, True])
def test_the_first_channels_alone_are_a_smaller_head(images: Tensor, training: bool) -> None:
    """Also in training: BatchNorm then has its running statistics, and does not change them."""
    model = make().train(training)
    before = {name: values.clone() for name, values in model.named_buffers()}
    output = model(images, budget=BUDGET, keep_tokens=True)
    (tokens,) = output.tokens.values()
    expected = {
        task: slow_head(model.heads[task], own, CHANNELS[task])
        for task, own in zip(CHANNELS, tokens.expand(2, -1, -1, -1), strict=True)
    }
    wanted = torch.stack([(logits * torch.linspace(-1, 1, SIZE[1])).sum() for logits in expected.values()]).sum()
    found = torch.stack([(logits * torch.linspace(-1, 1, SIZE[1])).sum() for logits in output.logits.values()]).sum()
    parameters = dict(model.heads.named_parameters())
    slow, fast = (torch.autograd.grad(one, list(parameters.values()), retain_graph=True) for one in (wanted, found))
    for task, logits in expected.items():
        torch.testing.assert_close(output.logits[task], logits, rtol=1e-4, atol=1e-5)
    for name, one, other in zip(parameters, slow, fast, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()), msg=name)
    assert not fast[list(parameters).index("depth.stages.1.0.weight")][:, 64:].any()
    after = dict(model.named_buffers())
    assert all(torch.equal(values, after[name]) for name, values in before.items())


def test_all_channels_are_the_model_as_trained(images: Tensor) -> None:
    model = make()
    with torch.no_grad():
        whole, same = (model(images, budget=budget).logits for budget in (None, Budget(heads={"depth": 256})))
    assert all(torch.equal(whole[task], same[task]) for task in whole)


def test_one_task_has_fewer_channels_than_another(images: Tensor) -> None:
    model = make()
    with torch.no_grad():
        whole, some = (model(images, budget=budget).logits for budget in (None, Budget(heads={"depth": 64})))
    assert torch.equal(whole["normals"], some["normals"]) and not torch.equal(whole["depth"], some["depth"])


@pytest.mark.parametrize("distillation", [[], [0]])
def test_ordered_channels_compute_the_same(images: Tensor, distillation: list[int]) -> None:
    model = make(distillation=distillation)
    head = model.heads["depth"]
    with torch.no_grad():
        before, own = model(images).logits, head.stages[1][0].weight.clone()
        carry_out(model.heads.channel_moves())
        after = model(images).logits
    for task, logits in before.items():
        torch.testing.assert_close(after[task], logits, rtol=1e-4, atol=1e-5)
    for place, following in ((0, head.stages[1][0]), (1, head.stages[2][0]), (2, head.output)):
        added = head.stages[place][1].weight.abs() * following.weight.square().sum(dim=(0, 2, 3)).sqrt()
        falling = bool((added.diff() <= 0).all())
        assert falling != (place == 1 and bool(distillation)), "what is distilled has one order for all tasks"
    assert not torch.equal(own, head.stages[1][0].weight)


def test_macs_and_parameters_are_of_the_channels_used() -> None:
    model, (h, w) = make(), GRID
    expected, activated = {}, {}
    for task, count in CHANNELS.items():
        outputs = {"depth": 1, "normals": 3}[task]
        sides = [h * w * 4**stage for stage in range(3)]
        weights = [count * given * 9 for given in (32, count, count)]
        macs = sum(side * one for side, one in zip(sides, weights, strict=True)) + sides[-1] * count * outputs
        expected[task], activated[task] = macs, sum(weights) + 3 * 3 * count + 64 + outputs * (count + 1)
    report, whole = profile(model.config, budget=BUDGET), profile(model.config)
    for task in CHANNELS:
        assert report["tasks"][task]["macs"]["parts"]["heads"] == expected[task]
        assert report["tasks"][task]["activated"]["parts"]["heads"] == activated[task]
        own = sum(parameter.numel() for parameter in model.heads[task].parameters())
        assert whole["tasks"][task]["activated"]["parts"]["heads"] == own
    macs = [graph_macs(model.config, "depth", SIZE, budget) for budget in (Budget(), BUDGET)]
    assert macs[0] - macs[1] == whole["tasks"]["depth"]["macs"]["parts"]["heads"] - expected["depth"]


def test_a_space_has_four_numbers_of_channels_a_task() -> None:
    model = make()
    found = space(model, TrainConfig(budgets=1, budget_heads=0.25))
    assert found.heads == dict.fromkeys(CHANNELS, (64, 128, 192, 256))
    assert found.smallest.heads == dict.fromkeys(CHANNELS, 64)
    whole = space(model, TrainConfig(budgets=1))
    assert whole.smallest.heads == {}
    require_trained(found, BUDGET, trained=True)
    for given, trained, said in (
        (found, True, "has 32 channels in the head of depth: the smallest that this run was trained for has 64"),
        (whole, True, "has 32 channels in the head of depth: the smallest that this run was trained for has 256"),
        (found, False, "has 32 channels in the head of depth, and this run was not trained for fewer than all"),
    ):
        with pytest.raises(InputError, match=said):
            require_trained(given, Budget(heads={"depth": 32}), trained)


@pytest.mark.parametrize(
    ("head", "heads", "said"),
    [
        ("conv", {"depth": 8}, "budget of the head of depth: its channels cannot be left out, as those of pup can"),
        ("pup", {"depth": 257}, "budget of the head of depth: channels are 257, of 256: give 1 to that"),
        ("pup", {"edge": 8}, "budget names task edge: this model has depth, normals"),
    ],
)
def test_budgets_of_other_heads_are_refused(images: Tensor, head: str, heads: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(head=head)(images, budget=Budget(heads=heads))


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", None, True])
def test_channels_that_no_head_has_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"budget of the head of depth: channels are .*, give a whole number above 0"):
        Budget.from_json({"heads": {"depth": value}})
    with pytest.raises(InputError, match="budget: heads is 3, give an object by task"):
        Budget.from_json({"heads": 3})


def test_budgets_with_channels_are_read_as_written() -> None:
    assert Budget.from_json(BUDGET.to_json()) == BUDGET and BUDGET.tasks == ["depth", "normals"]
    assert "heads" not in Budget({"depth": {1: 1}}).to_json(), "files of other budgets stay what they were"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--train.budgets=1 --train.budget_heads=0.5",
            "train.budget_heads is 0.5, and (linear|conv) heads cannot do with",
        ),
        ("--train.budgets=1 --train.budget_heads=0 --model.head=pup", "give a share above 0, up to 1"),
        ("--train.budget_heads=0.5 --model.head=pup", "train.budgets is 0, the whole model alone is trained"),
    ],
)
def test_shares_of_channels_that_cannot_act_are_refused(cli: Cli, tmp_path: Any, words: str, said: str) -> None:
    refused(cli("init", "synthetic-tiny", *TINY, *words.split(), "--out", tmp_path / "run"), said)
