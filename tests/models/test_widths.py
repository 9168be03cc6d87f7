"""Hidden widths: parts of experts and dense MLPs against a model that is cut to them, with gradients; the order."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from m3vit.models.budget import Budget
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.space import Space, width_choices
from m3vit.profiling import graph_macs
from m3vit.training.budgets import order_units, space
from m3vit.training.config import TrainConfig

TRUNK = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, global_pool="", class_token=False)
TASKS = ["depth", "normals"]
WIDTH = {0: 24, 1: 8, 2: 40}  # of 64, 32 and 64; block 3 whole
BUDGET = Budget({"depth": {1: 1}}, {"normals": {3: (0, 2, 3)}}, WIDTH)


def make(**changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"num_experts": 4, "top_k": 2, "tasks": TASKS, "experts": "reference"}
    config = ModelConfig("vit_tiny_patch16_224", TRUNK, image_size=(32, 48), **defaults | changes)
    return MultiTaskModel(config)


def cut(model: MultiTaskModel, widths: dict[int, int]) -> MultiTaskModel:
    """Return the model made smaller: each unit that is not among the first is gone."""
    small = copy.deepcopy(model)
    for block, width in widths.items():
        mlp = small.backbone.trunk.blocks[block].mlp
        if block % 2:
            for name, kept in (("w1", (slice(None), slice(width))), ("b1", (slice(None), slice(width)))):
                setattr(mlp.experts, name, nn.Parameter(getattr(mlp.experts, name)[kept].detach()))
            mlp.experts.w2 = nn.Parameter(mlp.experts.w2[:, :, :width].detach())
        else:
            mlp.fc1.weight, mlp.fc1.bias = (nn.Parameter(p[:width].detach()) for p in (mlp.fc1.weight, mlp.fc1.bias))
            mlp.fc2.weight = nn.Parameter(mlp.fc2.weight[:, :width].detach())
    return small


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("execution", ["sorted", "reference"])
def test_a_width_is_a_model_cut_to_it_with_gradients(images: Tensor, execution: str, recompute: bool) -> None:
    model = make(experts=execution)
    model.backbone.checkpoint_activations = recompute
    small = cut(make(), WIDTH)
    rest = Budget(BUDGET.top_k, BUDGET.kept)
    found, expected = model(images, budget=BUDGET).logits, small(images, budget=rest).logits
    for task in TASKS:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-4, atol=1e-5)  # sums in another order
    for logits in (found, expected):
        sum(value.square().mean() for value in logits.values()).backward()
    own = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in small.named_parameters():
        grad, other = own[name], parameter.grad
        assert (grad is None) == (other is None), name
        if grad is None or other is None:
            continue
        inside = tuple(slice(size) for size in other.shape)
        torch.testing.assert_close(grad[inside], other, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)
        outside = grad.clone()
        outside[inside] = 0
        assert not outside.any(), f"{name}: what is not used has a gradient"


def test_the_model_is_whole_again_after_a_smaller_budget(images: Tensor) -> None:
    model = make().eval()
    with torch.no_grad():
        before = model(images).logits
        smaller = model(images, budget=BUDGET).logits
        after = model(images).logits
    for task in TASKS:
        assert torch.equal(before[task], after[task]) and not torch.allclose(before[task], smaller[task], atol=1e-4)


def test_macs_of_widths() -> None:
    config = make().config
    tokens, size = 24, (32, 48)
    whole = graph_macs(config, "depth", size)
    narrow = graph_macs(config, "depth", size, Budget(width={0: 24}))
    assert whole - narrow == tokens * 2 * 32 * (64 - 24)
    experts = graph_macs(config, "depth", size, Budget({"depth": {1: 1}}, width={1: 8}))
    assert whole - experts == tokens * (2 * (2 * 32 * 32 + 32) - (2 * 32 * 8 + 32))


@torch.no_grad()
def test_ordering_changes_no_output_and_puts_the_important_first(images: Tensor) -> None:
    model = make().eval()
    model.backbone.trunk.blocks[0].mlp.fc1.weight[5] *= 10
    bank = model.backbone.trunk.blocks[1].mlp.experts
    bank.w2[2, :, 7] *= 10
    expected, row, column = (
        model(images).logits,
        model.backbone.trunk.blocks[0].mlp.fc1.weight[5].clone(),
        bank.w2[2, :, 7].clone(),
    )
    order_units(model)
    for task, logits in model(images).logits.items():
        torch.testing.assert_close(logits, expected[task], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.backbone.trunk.blocks[0].mlp.fc1.weight[0], row)
    assert torch.equal(bank.w2[2, :, 0], column)
    for block in (1, 3):
        bank = model.backbone.trunk.blocks[block].mlp.experts
        importance = bank.w1.norm(dim=2) * bank.w2.norm(dim=1)
        assert (importance.diff(dim=1) <= 0).all()


def test_the_budgets_between() -> None:
    assert width_choices(384, 0.25) == (96, 192, 288, 384) and width_choices(64, 1) == (64,)
    assert width_choices(6, 0.01) == (2, 4, 6) and width_choices(20, 0.5) == (8, 12, 16, 20)
    found = space(make(), TrainConfig(budgets=2, budget_width=0.5))
    assert found.widths == {0: (32, 40, 56, 64), 1: (16, 24, 32), 2: (32, 40, 56, 64), 3: (16, 24, 32)}
    smallest = found.smallest
    assert smallest == Budget({task: {1: 1, 3: 1} for task in TASKS}, width={0: 32, 1: 16, 2: 32, 3: 16})
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        budget = found.random(rng)
        seen |= {("k", budget.top_k["depth"][1]), ("w", budget.width[2])}
        assert all(budget.width[block] in found.widths[block] for block in range(4))
    assert seen == {("k", 1), ("k", 2), ("w", 32), ("w", 40), ("w", 56), ("w", 64)}
    assert Space(("depth",), (), 1, 2, {0: (8,)}).single and not found.single
