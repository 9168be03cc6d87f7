"""Which experts a task keeps: gate mass against a loop over tokens, choices worked out by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.errors import InputError
from m3vit.export.onnx.pruning import (
    check_rule,
    choose,
    decoder_mass,
    gate_mass,
    pruned,
    pruned_decoder,
    read_coverage,
)
from m3vit.models.budget import Budget, in_all_layers, read_top_k
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    torch.manual_seed(0)
    trunk_args = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, global_pool="", class_token=False)
    config = ModelConfig(
        trunk="vit_tiny_patch16_224",
        trunk_args=trunk_args,
        image_size=(32, 48),
        tasks=["depth", "normals"],
        num_experts=6,
        top_k=3,
    )
    return MultiTaskModel(config).eval()


def test_gate_mass_equals_a_loop_over_tokens(model: MultiTaskModel) -> None:
    batches = [torch.randn(2, 3, 32, 48), torch.randn(1, 3, 32, 48)]
    found = gate_mass(model, batches, in_all_layers({"normals": 1}, [1, 3]))
    for task, count in (("depth", 3), ("normals", 1)):
        expected = np.zeros((2, 6))
        for batch in batches:
            with torch.no_grad():
                routings = model(batch, [task], budget=in_all_layers({task: count}, [1, 3])).routings
            for layer, routing in enumerate(routings):
                for scores in routing.scores_RNE[0]:
                    for expert in scores.argsort(descending=True)[:count]:
                        expected[layer, expert] += float(scores[expert])
        np.testing.assert_allclose(found[task], expected, rtol=1e-5)


@pytest.mark.parametrize("moe_blocks", ["odd", "none"])
def test_mass_of_a_decoder_and_what_it_keeps(model: MultiTaskModel, moe_blocks: str) -> None:
    torch.manual_seed(0)
    head: dict[str, Any] = {"head": "taskexpert", "head_args": {"blocks": [1, 3], "experts": 3, "width": 4}}
    decoded = MultiTaskModel(replace(model.config, moe_blocks=moe_blocks, **head)).eval()
    with torch.no_grad():
        decoded.heads.own["depth"].steps[1].gate.bias[:] = torch.tensor([9.0, 0, 4, 2])  # the last is the memory's
    batches = [torch.randn(2, 3, 32, 48), torch.randn(1, 3, 32, 48)]
    found, seen = decoder_mass(decoded, batches), np.zeros((2, 3))
    for place in range(2):
        weights: list[torch.Tensor] = []
        gate = decoded.heads.own["depth"].steps[place].gate
        handle = gate.register_forward_hook(lambda module, given, made, into=weights: into.append(made))
        with torch.no_grad():
            for batch in batches:
                decoded(batch, ["depth"])
        handle.remove()
        for token in torch.cat(weights).flatten(0, 1):
            for expert in range(3):
                seen[place, expert] += float(token[expert])
    np.testing.assert_allclose(found["depth"], seen, rtol=1e-5)
    budget, shares = pruned_decoder(decoded, found, Budget(), 0.99)
    assert budget == Budget(decoder={"depth": {3: (0,)}}) and shares["depth"][1] > 0.99
    everything, _ = pruned_decoder(decoded, found, Budget(), 1.0)
    assert everything.full, "with nothing left out the model does the very same"
    assert decoder_mass(model, batches) == {}


def test_torch_keeps_to_a_budget_and_then_routes_as_before(model: MultiTaskModel) -> None:
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        before = model(image, ["depth"])
        changed = model(image, ["depth"], budget=Budget({"depth": {1: 2, 3: 2}}, {"depth": {3: (0, 2, 5)}}))
        after = model(image, ["depth"])
    assert changed.routings[0].expert_ids_RNK.shape[-1] == 2
    assert set(changed.routings[1].expert_ids_RNK.unique().tolist()) <= {0, 2, 5}
    # Scores stay those over all experts: the weights of a token do not sum to 1.
    assert torch.allclose(changed.routings[1].scores_RNE.sum(-1), torch.ones(()))
    assert torch.equal(before.logits["depth"], after.logits["depth"])
    assert not torch.equal(before.logits["depth"], changed.logits["depth"])


MASS = np.array([[4.0, 0, 1, 3, 2], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("rule", "top_k", "kept", "share"),
    [
        ({"coverage": 1.0}, 1, (0, 2, 3, 4), 1.0),  # expert 1 is never used
        ({"coverage": 0.9}, 1, (0, 3, 4), 0.9),  # exactly
        ({"coverage": 0.91}, 1, (0, 2, 3, 4), 1.0),
        ({"coverage": 0.1}, 1, (0,), 0.4),
        ({"coverage": 0.1}, 3, (0, 3, 4), 0.9),  # never fewer than a token uses
        ({"keep": 2}, 1, (0, 3), 0.7),
        ({"keep": 1}, 2, (0, 3), 0.7),
    ],
)
def test_choices_by_hand(rule: dict[str, Any], top_k: int, kept: tuple[int, ...], share: float) -> None:
    found, shares = choose(MASS, [top_k, top_k], **rule)
    assert found[0] == kept
    assert shares[0] == pytest.approx(share)
    assert found[1] == tuple(range(max(top_k, rule.get("keep", 1))))  # a layer without mass: the first ones
    assert shares[1] == 1.0


def test_a_pruned_budget_keeps_its_top_k_by_layer(model: MultiTaskModel) -> None:
    given = Budget({"depth": {3: 1}}, {"normals": {1: (4, 5)}})
    mass = np.tile(np.array([6.0, 5, 4, 3, 2, 1]), (2, 1))
    found, shares = pruned(model, {"depth": mass}, given, keep=1)
    assert found == Budget({"depth": {3: 1}}, {"normals": {1: (4, 5)}, "depth": {1: (0, 1, 2), 3: (0,)}})
    assert shares == {"depth": [pytest.approx(15 / 21), pytest.approx(6 / 21)]}


def test_rules_and_texts_that_make_no_sense_are_refused() -> None:
    for rule in ((None, None), (0.5, 3), (0.0, None), (1.5, None), (None, 9), (None, 0)):
        with pytest.raises(InputError):
            check_rule(*rule, 8)
    assert read_coverage("coverage=0.999") == 0.999
    for text in ("0.9", "coverage", "coverage=x", "coverage=0", "coverage=2", "share=0.5"):
        with pytest.raises(InputError, match="coverage=SHARE"):
            read_coverage(text)
    tasks = ["depth", "edge"]
    assert read_top_k("2", tasks, 4) == {"depth": 2, "edge": 2}
    assert read_top_k("depth=1,edge=3", tasks, 4) == {"depth": 1, "edge": 3}
    wrong: list[Any] = ["0", "5", "x", "flow=1", "depth=", "depth=1;edge=2", ""]
    for text in wrong:
        with pytest.raises(InputError, match="1 to 4, or task=number"):
            read_top_k(text, tasks, 4)
