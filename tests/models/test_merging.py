"""Merging dense runs: each task first computes what its own run does, the rest is the mean, and misfits are refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from m3vit.errors import InputError
from m3vit.models.initialise import new_model, not_taken
from m3vit.models.merging import LEAD, shift_norm
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel
from m3vit.run_folder import load_run, save_model
from tests.models.test_from_run import ARGS, config, trained

SHARED = ("mlp", "heads")  # what two runs of one ancestor differ in, in `siblings`


def merged(first: Path, second: Path, **changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"tasks": ["depth", "edge"], "num_experts": 8, "init": f"merge:[{first}, {second}]"}
    return new_model(config(**defaults | changes)).eval()


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Dense runs, one of depth and one of edges, that differ in the MLPs of odd blocks and in their heads alone."""
    root = tmp_path_factory.mktemp("merged")
    first = trained(root / "depth", moe_blocks="none", tasks=["depth"])
    second = trained(root / "edge", moe_blocks="none", tasks=["edge"])
    with torch.no_grad():
        for name, value in second.backbone.state_dict().items():
            if not any(f"blocks.{index}.mlp" in name for index in (1, 3)):
                value.copy_(first.backbone.state_dict()[name])
            else:
                value.add_(torch.randn_like(value) * 0.2)
    save_model(root / "edge", second, epoch=1)
    return root / "depth", root / "edge"


@pytest.mark.parametrize(
    ("num_experts", "top_k", "ratio"),
    [(2, 1, 2.0), (8, 2, 1.0), (8, 4, 1.0), (16, 4, 0.5)],
    ids=["whole MLPs", "halves, a copy a token", "halves, both copies", "quarters"],
)
def test_each_task_starts_as_its_own_run(
    siblings: tuple[Path, Path], num_experts: int, top_k: int, ratio: float
) -> None:
    model = merged(*siblings, num_experts=num_experts, top_k=top_k, expert_ratio=ratio)
    assert not_taken(model) == []
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        found = model(images)
        for run, task, place in zip(siblings, ("depth", "edge"), (0, 1), strict=True):
            expected = load_run(run).model(images).logits[task]
            # Copies differ in their scores by their random gates, of 1 %.
            torch.testing.assert_close(found.logits[task], expected, rtol=0, atol=0.02 * float(expected.abs().max()))
            for routing in found.routings:
                ids = routing.expert_ids_RNK[place]
                assert (ids // (num_experts // 2) == place).all(), "its own experts"


def test_a_gate_row_adds_the_same_to_every_token() -> None:
    torch.manual_seed(0)
    norm, layer = torch.nn.LayerNorm(32), torch.nn.Linear(32, 8)
    with torch.no_grad():
        norm.weight.uniform_(0.2, 2)
        norm.bias.normal_()
    x = torch.randn(50, 32) * 3
    bank = torch.nn.Module()
    bank.w1, bank.b1 = torch.nn.Parameter(layer.weight[None]), torch.nn.Parameter(layer.bias[None])
    before = layer(norm(x))
    direction = shift_norm(norm, bank)
    with torch.no_grad():
        torch.testing.assert_close(norm(x) @ direction, torch.ones(50), rtol=0, atol=1e-4)
        after = torch.nn.functional.linear(norm(x), bank.w1[0], bank.b1[0])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert direction.norm() < 2 and LEAD == 1


def test_the_rest_is_the_mean(siblings: tuple[Path, Path], tmp_path: Path) -> None:
    trained(tmp_path / "edge", moe_blocks="none", tasks=["edge", "semseg"], image_size=(64, 96))
    with torch.no_grad():
        other = load_run(tmp_path / "edge").model
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    save_model(tmp_path / "edge", other, epoch=1)
    model = merged(siblings[0], tmp_path / "edge")
    first, second = load_run(siblings[0]).model.state_dict(), other.state_dict()
    for name, value in model.state_dict().items():
        if ".mlp." not in name and not name.endswith("pos_embed") and "norm2.bias" not in name:
            both = [state[name] for state in (first, second) if name in state]
            torch.testing.assert_close(value, sum(both) / len(both))
    assert not_taken(model) == ["not taken of merge:[depth, edge]: edge: heads.semseg (not a task of this model)"]
    assert isinstance(model.backbone.trunk.blocks[1].mlp, MoELayer)
    dense = merged(siblings[0], tmp_path / "edge", moe_blocks="none", router="single").state_dict()
    name = "backbone.trunk.blocks.1.mlp.fc1.weight"
    torch.testing.assert_close(dense[name], (first[name] + second[name]) / 2)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A dense run, and two of one task each whose weights all differ from its."""
    root = tmp_path_factory.mktemp("family")
    trained(root / "base", moe_blocks="none", tasks=["normals"])
    for seed, task in enumerate(("depth", "edge")):
        torch.manual_seed(10 + seed)
        model = trained(root / task, moe_blocks="none", tasks=[task])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1 * (seed + 1))
        save_model(root / task, model, epoch=1)
    return root / "base", root / "depth", root / "edge"


@pytest.mark.parametrize("coefficients", [[0.5, 0.5], [0.0, 0.0], [0.0, 1.0], [0.3, -0.7]])
@pytest.mark.parametrize("moe_blocks", ["none", "odd"])
def test_task_arithmetic(family: tuple[Path, Path, Path], coefficients: list[float], moe_blocks: str) -> None:
    base, *runs = family
    plain = {"moe_blocks": moe_blocks, "router": "multi" if moe_blocks == "odd" else "single"}
    model = merged(*runs, **plain, weights=str(base / "model.safetensors"), merge_coefficients=coefficients)
    began, first, second = (load_run(folder).model.state_dict() for folder in family)
    compared = 0
    for name, value in model.state_dict().items():
        if name.startswith("heads") or (moe_blocks == "odd" and (".mlp." in name or "norm2.bias" in name)):
            continue
        expected = began[name].clone()
        for number, run in zip(coefficients, (first, second), strict=True):
            expected += number * (run[name] - began[name])
        torch.testing.assert_close(value, expected)
        compared += 1
    assert compared > 20
    for run, task in ((first, "depth"), (second, "edge")):
        for name in (name for name in run if name.startswith(f"heads.{task}.")):
            torch.testing.assert_close(model.state_dict()[name], run[name])
    assert not_taken(model) == []


def test_halves_are_the_mean(family: tuple[Path, Path, Path]) -> None:
    base, *runs = family
    halves = merged(*runs, weights=str(base / "model.safetensors"), merge_coefficients=[0.5, 0.5]).state_dict()
    for name, value in merged(*runs).state_dict().items():
        torch.testing.assert_close(halves[name], value, rtol=1e-4, atol=1e-5)


def test_coefficients_need_what_the_runs_began_from(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, *runs = family
    weights = str(base / "model.safetensors")
    for given, words in (
        ({"merge_coefficients": [0.5, 0.5]}, "give these, model.weights FILE or model.pretrained"),
        ({"merge_coefficients": [0.5], "weights": weights}, "one for each of the 2 runs"),
        ({"merge_coefficients": [0.5, float("nan")], "weights": weights}, "merge_coefficients is nan"),
    ):
        with pytest.raises(InputError, match=words):
            merged(*runs, **given)
    trained(tmp_path / "moe", tasks=["edge"])
    with pytest.raises(InputError, match="has experts, and dense runs cannot have begun from it"):
        merged(*runs, merge_coefficients=[0.5, 0.5], weights=str(tmp_path / "moe" / "model.safetensors"))
    trained(tmp_path / "wide", moe_blocks="none", tasks=["edge"], trunk_args=ARGS | {"mlp_ratio": 4})
    with pytest.raises(InputError, match="does not fit the trunk"):
        merged(*runs, merge_coefficients=[0.5, 0.5], weights=str(tmp_path / "wide" / "model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["depth", "normals"]}, "normals is a task of none: each of model.tasks must be that of exactly one"),
        ({"router": "single"}, "which needs a gate for each: give multi"),
        ({"num_experts": 4, "top_k": 4}, "are 2 for each of the 2 runs of merge.*: give at most 2, or more experts"),
        ({"num_experts": 6}, r"model.num_experts \(6\) \(for 2 of them, 4 must divide it\)"),
        ({"experts_per_task": {"depth": [0, 1]}}, "model.init merge makes copies of an MLP that every task"),
        ({"router_noise": 1.0}, "model.router_noise 1.0 would pick parts of different copies"),
        ({"trunk_args": ARGS | {"depth": 6}}, "does not fit model.trunk .*: no weights for blocks 4 to 5 of 6"),
        ({"trunk_args": ARGS | {"num_heads": 4}}, "with 2 attention heads"),
        ({"init": "merge:[{first}]"}, "name two runs or more, each once"),
        ({"init": "merge:[{first}, {first}]"}, "name two runs or more, each once"),
        ({"init": "merge:{first}"}, r"choose from random, upcycle, run:RUN, merge:\[RUN_A, RUN_B\]"),
        ({"init": "merge:[{first}, {first}/absent]"}, "is no trained run"),
    ],
)
def test_refusals(siblings: tuple[Path, Path], changes: dict[str, Any], words: str) -> None:
    given = {key: value.format(first=siblings[0]) if key == "init" else value for key, value in changes.items()}
    with pytest.raises(InputError, match=words):
        merged(*siblings, **given)


def test_runs_that_are_not_alike(siblings: tuple[Path, Path], tmp_path: Path) -> None:
    first, _ = siblings
    trained(tmp_path / "wide", moe_blocks="none", tasks=["edge"], trunk_args=ARGS | {"mlp_ratio": 4})
    with pytest.raises(InputError, match=r"wide is of another architecture than .*depth: 12 of 51 tensors of another"):
        merged(first, tmp_path / "wide")
    trained(tmp_path / "moe", tasks=["edge"])
    with pytest.raises(InputError, match="has experts already: merge dense runs"):
        merged(first, tmp_path / "moe")
    shutil.copytree(first, tmp_path / "again")
    with pytest.raises(InputError, match=r"depth is a task of .*depth and .*again: each of model.tasks"):
        merged(first, tmp_path / "again", tasks=["depth"])
    other = {"mean": [0.5] * 3, "std": [0.5] * 3}
    trained(tmp_path / "edge", moe_blocks="none", tasks=["edge"], normalisation=other)
    with pytest.raises(InputError, match="normalised differently"):
        merged(first, tmp_path / "edge")
