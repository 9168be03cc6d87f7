"""A budget: its checks, its JSON form, and the forward pass that keeps to it, by task and by layer."""

import json
from typing import Any

import pytest
import torch

from m3vit.errors import InputError
from m3vit.models.budget import FULL, Budget, in_all_layers
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.router import expert_load

TRUNK = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, global_pool="", class_token=False)
TASKS = ["depth", "normals", "edge"]


def make(**changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"num_experts": 6, "top_k": 3, "tasks": TASKS}
    config = ModelConfig("vit_tiny_patch16_224", TRUNK, image_size=(32, 48), **defaults | changes)
    return MultiTaskModel(config).eval()


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    return make()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: MultiTaskModel, images: torch.Tensor, *arguments: Any) -> dict[str, torch.Tensor]:
    values: dict[str, torch.Tensor] = model(images, *arguments).logits
    return values


@pytest.mark.parametrize("router", ["multi", "task_conditioned", "single"])
def test_one_top_k_of_all_equals_a_model_made_with_it(images: torch.Tensor, router: str) -> None:
    model, other = make(router=router), make(router=router, top_k=1)
    other.load_state_dict(model.state_dict())
    expected, budget = logits(other, images), in_all_layers(dict.fromkeys(TASKS, 1), [1, 3])
    found = logits(model, images, None, (), budget)
    assert all(torch.equal(found[task], expected[task]) for task in TASKS)
    trained = in_all_layers(dict.fromkeys(TASKS, 3), [1, 3])
    before = logits(model, images)
    for same in (None, FULL, trained):
        found = logits(model, images, None, (), same)
        assert all(torch.equal(found[task], before[task]) for task in TASKS)


@pytest.mark.parametrize("execution", ["sorted", "reference"])
@pytest.mark.parametrize("router", ["multi", "single"])
def test_tasks_that_differ_in_one_pass_equal_each_alone(images: torch.Tensor, router: str, execution: str) -> None:
    model = make(router=router, experts=execution)
    budget = Budget({"depth": {1: 1, 3: 2}, "edge": {3: 5}}, {"depth": {1: (4,)}, "normals": {3: (0, 2, 5)}})
    together = logits(model, images, None, (), budget)
    for task in TASKS:
        alone = logits(model, images, [task], (), budget)[task]
        torch.testing.assert_close(together[task], alone, rtol=1e-4, atol=1e-5)  # float32 sum order
    whole = logits(model, images)
    assert not any(torch.allclose(together[task], whole[task], atol=1e-4) for task in TASKS)


def test_one_layer_and_one_task_alone_are_changed(model: MultiTaskModel, images: torch.Tensor) -> None:
    budget = Budget({"depth": {3: 1}}, {"depth": {3: (0, 2, 5)}})
    with torch.no_grad():
        before, changed = model(images), model(images, budget=budget)
    assert all(torch.equal(before.logits[task], changed.logits[task]) for task in ("normals", "edge"))
    assert not torch.allclose(before.logits["depth"], changed.logits["depth"], atol=1e-4)
    assert torch.equal(before.routings[0].expert_ids_RNK, changed.routings[0].expert_ids_RNK)
    routing = changed.routings[1]
    used = [routing.expert_ids_RNK[task, :, :count] for task, count in enumerate((1, 3, 3))]
    assert routing.used_RK is not None and routing.used_RK.sum(dim=1).tolist() == [1, 3, 3]
    loads = expert_load(routing.expert_ids_RNK, 6, routing.used_RK)
    assert loads.sum(dim=1).tolist() == [48, 144, 144]
    # Masked by hand: scores over all experts, the best of the kept, not renormalised.
    logits_RNE = routing.logits_RNE
    assert logits_RNE is not None
    masked = logits_RNE[0].clone()
    masked[:, [1, 3, 4]] = -float("inf")
    assert torch.equal(used[0][:, 0], masked.argmax(dim=1))
    expected = logits_RNE[0].softmax(dim=1).gather(1, used[0])
    assert torch.equal(routing.weights_RNK[0], torch.cat([expected, torch.zeros(48, 2)], dim=1))


def test_gradients_of_slots_that_are_not_used_are_zero(images: torch.Tensor) -> None:
    model = make(moe_blocks=[1])
    budget = Budget({"depth": {1: 1}}, {"depth": {1: (4,)}})
    model(images, budget=budget).logits["depth"].sum().backward()
    grad = model.backbone.trunk.blocks[1].mlp.experts.w1.grad
    assert grad[4].abs().max() > 0 and grad[[0, 1, 2, 3, 5]].abs().max() == 0


def test_json_round_trip() -> None:
    budget = Budget({"depth": {1: 1, 3: 2}}, {"edge": {3: (0, 5)}}, {1: 32})
    text = json.dumps(budget.to_json())
    assert text == '{"top_k": {"depth": {"1": 1, "3": 2}}, "kept": {"edge": {"3": [0, 5]}}, "width": {"1": 32}}'
    assert Budget.from_json(json.loads(text)) == budget
    assert Budget.from_json({}) == Budget({"depth": {}}) == FULL and FULL.full and not budget.full
    assert (budget.tasks, budget.blocks) == (["depth", "edge"], [1, 3])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "give an object with top_k, kept, width"),
        ({"topk": {}}, "give an object with top_k, kept, width"),
        ({"top_k": 2}, "top_k is 2, give an object by task"),
        ({"width": 2}, "width is 2, give an object by block"),
        ({"top_k": {"depth": 2}}, "top_k has 2, give an object by block"),
        ({"top_k": {"depth": {"one": 2}}}, "give an object by block"),
        ({"top_k": {"depth": {"1": 0}}}, "depth, block 1: top_k is 0, give a whole number above 0"),
        ({"top_k": {"depth": {"1": True}}}, "depth, block 1: top_k is True"),
        ({"top_k": {"depth": {"1": 1.5}}}, "depth, block 1: top_k is 1.5"),
        ({"kept": {"edge": {"1": []}}}, r"edge, block 1: kept are \(\), name one or more experts, ascending"),
        ({"kept": {"edge": {"1": [1, 0]}}}, "name one or more experts, ascending"),
        ({"kept": {"edge": {"1": [0, 0]}}}, "name one or more experts, ascending"),
        ({"kept": {"edge": {"1": ["a"]}}}, "name one or more experts, ascending"),
        ({"kept": {"edge": {"1": 3}}}, "name one or more experts, ascending"),
        ({"width": {"1": -1}}, "block 1: width is -1, give a whole number of 0 or more"),
    ],
)
def test_values_that_no_model_can_have(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Budget.from_json(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget({"flow": {1: 1}}), "budget names task flow: this model has depth, normals, edge"),
        (Budget({"depth": {2: 1}}), "budget names block 2: the blocks with experts are 1, 3"),
        (Budget({"depth": {1: 7}}), "depth, block 1: top_k is 7 with 6 experts kept of 6: give 1 to that"),
        (Budget(kept={"depth": {1: (0, 1)}}), "depth, block 1: top_k is 3 with 2 experts kept of 6"),
        (Budget(kept={"depth": {3: (0, 1, 6)}}), r"depth, block 3: kept are \[0, 1, 6\], but its experts are 0 to 5"),
        (Budget(width={1: 40}), "block 1: width is 40, but its experts have 32 hidden units: give 1 to that"),
        (Budget(width={0: 80}), "block 0: width is 80, but its MLP has 64 hidden units: give 1 to that"),
        (Budget(width={9: 8}), "names block 9: the blocks with experts are 1, 3; widths may be of 0, 2 too"),
    ],
)
def test_what_this_model_cannot_keep_to(
    model: MultiTaskModel, images: torch.Tensor, budget: Budget, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        model(images, budget=budget)
    # A width of all is none.
    whole, before = logits(model, images, ["depth"], (), Budget(width={1: 32})), logits(model, images, ["depth"])
    assert torch.equal(whole["depth"], before["depth"])
