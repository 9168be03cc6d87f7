"""Hidden widths: parts of experts and dense MLPs against a model that is cut to them, with gradients; the order."""

import copy
import re
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.label_sets import LABEL_SETS
from m3vit.models.budget import FULL, Budget
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.order import carry_out
from m3vit.models.space import Space, width_choices
from m3vit.profiling import graph_macs, profile, render
from m3vit.training.budgets import of_step, space, step_macs
from m3vit.training.config import TrainConfig
from m3vit.training.ordering import importance, unit_moves
from tests.conftest import TINY

TRUNK = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, global_pool="", class_token=False)
TASKS = ["depth", "normals"]
WIDTH = {0: 24, 1: 8, 2: 40}  # of 64, 32 and 64; block 3 whole
BUDGET = Budget({"depth": {1: 1}}, {"normals": {3: (0, 2, 3)}}, WIDTH)


def make(**changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"num_experts": 4, "top_k": 2, "tasks": TASKS, "experts": "reference"}
    trunk = TRUNK | changes.pop("trunk_args", {})
    config = ModelConfig("vit_tiny_patch16_224", trunk, image_size=(32, 48), **defaults | changes)
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
@pytest.mark.parametrize("execution", ["sorted", "grouped", "reference"])
def test_a_width_is_a_model_cut_to_it_with_gradients(images: Tensor, execution: str, recompute: bool) -> None:
    if execution == "grouped" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
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


@torch.no_grad()
def test_a_block_of_width_0_is_left_out(images: Tensor) -> None:
    model, small = make().eval(), make().eval()
    small.backbone.trunk.blocks[2] = nn.Identity()
    found = model(images, budget=Budget(width={2: 0})).logits
    for task, logits in small(images).logits.items():
        assert torch.equal(found[task], logits)
    config = model.config
    whole, less = (graph_macs(config, "depth", (32, 48), Budget(width=w)) for w in ({}, {2: 0}))
    assert whole - less == 24 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 24 * 24 * 32
    with pytest.raises(InputError, match="block 1: width is 0, but its experts have 32 hidden units: give 1 to that"):
        model(images, budget=Budget(width={1: 0}))
    with pytest.raises(InputError, match="names 1: the blocks that can be left out are the dense ones, 0, 2"):
        space(model, TrainConfig(budgets=1, budget_skip=[1]))
    assert space(model, TrainConfig(budgets=1, budget_skip=[2])).smallest.left_out == (2,)


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
@pytest.mark.parametrize("router", ["multi", "single"])
def test_ordering_changes_no_output_and_puts_the_important_first(images: Tensor, router: str) -> None:
    model = make(router=router, trunk_args={"init_values": 0.5}).eval()
    blocks = model.backbone.trunk.blocks
    blocks[0].ls2.gamma[:16] *= 3
    expected = model(images).logits

    # Slowly: every token of every task through every unit of every expert, one after the other.
    seen: dict[int, list[Any]] = {block: [] for block in range(4)}
    handles = [
        blocks[block].mlp.register_forward_hook(lambda m, x, y, block=block: seen[block].append((x, y)))
        for block in range(4)
    ]
    model(images)
    for handle in handles:
        handle.remove()
    slow: dict[int, Tensor] = {}
    for block in (0, 2):
        mlp, ((x,), _) = blocks[block].mlp, seen[block][0]
        active = mlp.act(mlp.fc1(x)).flatten(0, -2)
        added = (mlp.fc2.weight * blocks[block].ls2.gamma[:, None]).norm(dim=0)
        slow[block] = active.square().mean(dim=0).sqrt() * added
    for block in (1, 3):
        bank, (inputs, (_, routing)) = blocks[block].mlp.experts, seen[block][0]
        x = inputs[0].expand(len(TASKS), -1, -1, -1).flatten(1, 2)
        slow[block] = torch.zeros_like(bank.b1)
        for task, token, slot in np.ndindex(len(TASKS), 48, 2):
            if task < len(routing.expert_ids_RNK):
                expert, weight = routing.expert_ids_RNK[task, token, slot], routing.weights_RNK[task, token, slot]
                active = torch.nn.functional.gelu(bank.w1[expert] @ x[task, token] + bank.b1[expert])
                slow[block][expert] += (weight * active) ** 2 / (48 * len(routing.expert_ids_RNK))
        added = (bank.w2 * blocks[block].ls2.gamma[:, None]).norm(dim=1)
        slow[block] = slow[block].sqrt() * added
    found = importance(model, images)
    for block, values in slow.items():
        scale = 2**0.5  # sums of two images' means
        torch.testing.assert_close(found[block], scale * values, rtol=1e-4, atol=1e-7)

    carry_out(unit_moves(model, found))
    for task, logits in model(images).logits.items():
        torch.testing.assert_close(logits, expected[task], rtol=1e-4, atol=1e-5)
    for values in importance(model, images).values():
        assert (values.diff(dim=-1) <= 1e-7).all()


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


def test_profile_under_a_budget_is_that_of_a_model_cut_to_it() -> None:
    model, budget = make(), Budget({"depth": {1: 1}}, width={0: 24, 1: 8, 2: 0})
    whole, found = profile(model.config), profile(model.config, budget=budget)
    small = cut(model, {0: 24, 1: 8})
    met = sum(parameter.numel() for parameter in small.heads.used_by("depth"))
    for name, parameter in small.backbone.named_parameters():
        if ".blocks.2." not in name and "gates.1" not in name:
            used = {1: 1, 3: 2}.get(int(name.split(".")[2]), 0) / 4 if ".experts." in name else 1
            met += int(parameter.numel() * used)
    assert found["tasks"]["depth"]["activated"]["total"] == met
    for task in TASKS:
        assert found["tasks"][task]["macs"]["total"] == graph_macs(model.config, task, (32, 48), budget)
    assert found["budget"] == budget.to_json() and "budget" not in whole
    assert found["stored"] == whole["stored"]
    assert "under a budget" in render(found)
    with pytest.raises(InputError, match="names block 9"):
        profile(model.config, budget=Budget(width={9: 8}))


def test_the_smallest_budget_is_printed(cli: Callable[..., subprocess.CompletedProcess]) -> None:
    words = ("profile", "synthetic-tiny", *(key for key in TINY if key.startswith("--model")), "--model.label_set=nyud")
    result = cli(*words, "--train.budgets=1", "--train.budget_skip=[0]")
    assert result.returncode == 0, result.stderr
    said = float(re.search(r"the smallest budget trained for takes (0\.\d+) of the MACs", result.stdout)[1])  # type: ignore[index]
    assert 0.5 < said < 0.95
    assert "smallest" not in cli(*words).stdout
    assert 1.5 < float(re.search(r"a step of training takes (1\.\d+) times the MACs", result.stdout)[1]) < 2  # type: ignore[index]


def test_macs_of_a_step_are_those_of_its_passes() -> None:
    """Also of what only trains, which smaller passes go without."""
    model = make(head="pup", distillation=[0]).to("meta").eval()
    train = TrainConfig(budgets=2, budget_heads=0.5, seed=3)
    whole, smallest = (graph_macs(model.config, TASKS, (32, 48), one) for one in (FULL, space(model, train).smallest))
    distilled = profile(model.config)["distillation"]["macs"]
    drawn = [of_step(train, space(model, train), step)[2] for step in range(2)]
    random = sum(graph_macs(model.config, TASKS, (32, 48), budget) for budget in drawn) / 2
    assert step_macs(model, train, 2) == pytest.approx(1 + (smallest + random) / (whole + distilled))


def test_macs_are_of_what_names_stand_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under other classes or another trunk of its name, a configuration is another model."""
    config = make(tasks=["semseg"]).config
    before = graph_macs(config, "semseg", (32, 48))
    assert graph_macs(config, "semseg", (32, 48)) == before
    with monkeypatch.context() as patch:
        patch.setitem(LABEL_SETS["nyud"].classes, "semseg", ("a", "b", "c"))  # type: ignore[arg-type]
        assert graph_macs(config, "semseg", (32, 48)) < before
    entry_points, name = timm.models._registry._model_entrypoints, config.trunk
    with monkeypatch.context() as patch:
        own = entry_points[name]
        patch.setitem(entry_points, name, lambda **given: own(**given | {"mlp_ratio": 4}))
        assert graph_macs(config, "semseg", (32, 48)) > before
    assert graph_macs(config, "semseg", (32, 48)) == before
