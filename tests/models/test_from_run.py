"""Starting from a trained run: what fits is taken, bit for bit or as it is made to fit, and what does not is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m3vit.digests import write_sealed_json
from m3vit.errors import InputError
from m3vit.label_sets import LABEL_SETS, LabelSet, add_label_set
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import initialise, new_model, not_taken, sources
from m3vit.models.multitask import MultiTaskModel
from m3vit.run_folder import load_run, save_model
from m3vit.training.config import Config
from m3vit.training.starting import initialise as init_run
from tests.command_line import kept_state

ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
BLOCK = "backbone.trunk.blocks.1.mlp."


def config(**changes: Any) -> ModelConfig:
    defaults: dict[str, Any] = {"trunk": "vit_tiny_patch16_224", "trunk_args": ARGS, "image_size": (32, 48)}
    defaults |= {"num_experts": 4, "top_k": 2, "tasks": ["semseg", "depth"]}
    return ModelConfig(**defaults | changes)


def trained(folder: Path, **changes: Any) -> MultiTaskModel:
    """Write a run all of whose weights are its own, and return its model."""
    torch.manual_seed(3)
    init_run(Config(model=config(**changes)), folder)
    model = load_run(folder).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_model(folder, model, epoch=1)
    return load_run(folder).model


def started(folder: Path, **changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    return new_model(config(init=f"run:{folder}", **changes)).eval()


def tensors(model: MultiTaskModel) -> dict[str, Tensor]:
    return model.state_dict()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("started") / "moe"
    trained(folder, normalisation={"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]})
    return folder


@pytest.mark.parametrize(
    ("head", "router"),
    [
        ("linear", "single"),
        ("linear", "task_conditioned"),
        ("conv", "multi"),
        ("pup", "multi"),
        ("taskexpert", "multi"),
    ],
)
def test_the_same_architecture_is_the_same_model(head: str, router: str, tmp_path: Path) -> None:
    changes = {"head": head, "router": router, "router_noise": 1.0, "router_noise_kind": "learned"}
    source = trained(tmp_path / "run", **changes)
    model = started(tmp_path / "run", **changes)
    assert tensors(model).keys() == tensors(source).keys()
    assert all(torch.equal(value, tensors(source)[name]) for name, value in tensors(model).items())
    assert model.origins == {"from": {"backbone": "run:run", "heads": "run:run"}, "left_out": {}}
    assert not_taken(model) == []


def test_normalisation_is_the_runs(run: Path) -> None:
    assert started(run).normalisation.mean == (0.1, 0.2, 0.3)
    assert started(run, normalisation="imagenet").normalisation.std == (0.229, 0.224, 0.225)


def test_other_tasks(run: Path) -> None:
    """Heads and gates go by the name of their task, whatever its place; a new one starts with the mean of the gates."""
    source = tensors(load_run(run).model)
    model = started(run, tasks=["edge", "depth"])
    found = tensors(model)
    assert torch.equal(found["heads.depth.linear.weight"], source["heads.depth.linear.weight"])
    assert torch.equal(found[f"{BLOCK}router.gates.1"], source[f"{BLOCK}router.gates.1"])
    mean = (source[f"{BLOCK}router.gates.0"] + source[f"{BLOCK}router.gates.1"]) / 2
    torch.testing.assert_close(found[f"{BLOCK}router.gates.0"], mean)
    assert model.origins["from"]["heads.edge"] == "random"
    assert not_taken(model) == [
        "not taken of run:moe: heads.semseg (not a task of this model)",
        "at random: heads.edge",
    ]


def test_another_size(run: Path) -> None:
    model = started(run, image_size=(64, 96))
    source = load_run(run).model
    grid, other = source.backbone.constants((4, 6)), model.backbone.constants((8, 12))
    assert other.shape[1] == 1 + 96 and not_taken(model) == []
    torch.testing.assert_close(other[:, 0], grid[:, 0])  # the class token
    torch.testing.assert_close(other, source.backbone.constants((8, 12)))  # as timm resamples when it runs
    smaller = started(run, trunk_args=ARGS | {"patch_size": 4})
    assert tensors(smaller)["backbone.trunk.patch_embed.proj.weight"].shape[-1] == 4
    assert {"backbone": "run:moe"}.items() <= smaller.origins["from"].items()


def test_other_classes(run: Path) -> None:
    """Outputs of classes with the same name, in the order of the model's."""
    source = tensors(load_run(run).model)
    with kept_state():
        add_label_set(LabelSet("mine", ("semseg", "depth"), {"semseg": ("sky", "floor", "wall")}))
        model = started(run, label_set="mine")
        found = tensors(model)
        for name in ("heads.semseg.linear.weight", "heads.semseg.linear.bias"):
            ours, theirs = found[name].unflatten(0, (3, 4)), source[name].unflatten(0, (40, 4))
            assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[0])
            assert not (ours[0] == theirs[:, None]).all(dim=-1).any()
        (line,) = not_taken(model)
        assert line == (
            "not taken of run:moe: heads.semseg.linear (38 of 40 classes, of names that this model has not)"
        )
        names = tuple(f"c{number}" for number in range(40))  # as many, and all others
        add_label_set(LabelSet("others", ("semseg", "depth"), {"semseg": names}))
        model = started(run, label_set="others")
        assert "of other classes, none of the same name" in not_taken(model)[0]
        assert not torch.equal(tensors(model)["heads.semseg.linear.weight"], source["heads.semseg.linear.weight"])
        assert torch.equal(tensors(model)["heads.semseg.norm.weight"], source["heads.semseg.norm.weight"])
        assert set(LABEL_SETS) == {"nyud", "pascal", "mine", "others"}


def test_more_experts_are_copies_with_noise(run: Path) -> None:
    source, found = tensors(load_run(run).model), tensors(started(run, num_experts=7, top_k=3))
    for name in ("experts.w1", "experts.b2", "router.gates.0"):
        theirs, ours = source[BLOCK + name], found[BLOCK + name]
        assert torch.equal(ours[:4], theirs)
        copies = (ours[4:] - theirs[:3]).std() / theirs.std()
        assert 0.01 < copies < 0.03


def write_use(run: Path, chosen: dict[str, list[float]], digest: str = "") -> None:
    digest = digest or json.loads((run / "model.json").read_text())["weights_sha256"]
    rows = {task: {"chosen": values} for task, values in chosen.items()}
    found = {"run": {"weights_sha256": digest}, "use": {str(block): {"tasks": rows} for block in (1, 3)}}
    (run / "routing").mkdir(exist_ok=True)
    write_sealed_json(run / "routing" / "routing.json", found)


def test_fewer_experts_are_those_most_used(tmp_path: Path) -> None:
    run = tmp_path / "run"
    source = tensors(trained(run))
    with pytest.raises(InputError, match=r"leaves out 2 of the 4 experts of .*m3vit routing .* writes it"):
        started(run, num_experts=2)
    write_use(run, {"semseg": [0.1, 0.9, 0.2, 0.8], "depth": [1.0, 0.0, 0.1, 0.9]})
    for tasks, kept in ((["semseg"], [1, 3]), (["depth"], [0, 3]), (["semseg", "depth"], [0, 3])):
        found = tensors(started(run, num_experts=2, tasks=tasks))
        assert torch.equal(found[f"{BLOCK}experts.w1"], source[f"{BLOCK}experts.w1"][kept])
        place = 0 if tasks[0] == "semseg" else 1
        assert torch.equal(found[f"{BLOCK}router.gates.0"], source[f"{BLOCK}router.gates.{place}"][kept])
    write_use(run, {"depth": [1.0, 0.0]})
    with pytest.raises(InputError, match="does not tell how block 1 uses 4 experts"):
        started(run, num_experts=2)
    write_use(run, {"depth": [1.0, 0.0, 0.1, 0.9]}, "0")
    with pytest.raises(InputError, match="is of other weights than the run has now"):
        started(run, num_experts=2)


def test_another_router(run: Path, tmp_path: Path) -> None:
    multi = tensors(load_run(run).model)
    mean = (multi[f"{BLOCK}router.gates.0"] + multi[f"{BLOCK}router.gates.1"]) / 2
    torch.testing.assert_close(tensors(started(run, router="single"))[f"{BLOCK}router.gates.0"], mean)
    of_depth = tensors(started(run, router="single", tasks=["depth"]))
    assert torch.equal(of_depth[f"{BLOCK}router.gates.0"], multi[f"{BLOCK}router.gates.1"])
    conditioned = started(run, router="task_conditioned")
    torch.testing.assert_close(tensors(conditioned)[f"{BLOCK}router.gates.0"][:, :32], mean)
    assert "router.task_embedding" in not_taken(conditioned)[0]

    one = tensors(trained(tmp_path / "one", router="single"))
    found = tensors(started(tmp_path / "one"))
    assert all(torch.equal(found[f"{BLOCK}router.gates.{n}"], one[f"{BLOCK}router.gates.0"]) for n in (0, 1))

    told = tensors(trained(tmp_path / "told", router="task_conditioned"))
    model = started(tmp_path / "told")
    assert torch.equal(tensors(model)[f"{BLOCK}router.gates.1"], told[f"{BLOCK}router.gates.0"][:, :32])
    assert "task_embedding (of the router task_conditioned, here multi)" in not_taken(model)[0]
    swapped = started(tmp_path / "told", router="task_conditioned", tasks=["depth", "semseg"])
    source = load_run(tmp_path / "told").model
    for task in ("semseg", "depth"):
        gates = [m.backbone.trunk.blocks[1].mlp.router.gate(m.task_id(task)) for m in (swapped, source)]
        assert all(torch.equal(a, b) for a, b in zip(*gates, strict=True))


def test_a_dense_run_is_up_cycled(tmp_path: Path) -> None:
    source = trained(tmp_path / "dense", moe_blocks="none")
    model = started(tmp_path / "dense")
    assert model.origins["from"] == {"backbone": "run:dense", "heads": "run:dense"} and not_taken(model) == []
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        for task, logits in source(images).logits.items():
            torch.testing.assert_close(model(images).logits[task], logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="so 4 experts make up the MLP"):
        started(tmp_path / "dense", expert_ratio=0.5)
    with pytest.raises(InputError, match=r"leave out model\.experts_per_task"):
        started(tmp_path / "dense", experts_per_task={"depth": [0, 1]})


def test_what_does_not_fit_is_named(run: Path) -> None:
    lines = not_taken(started(run, expert_ratio=0.5, head="conv", trunk_args=ARGS | {"depth": 5}))
    assert "experts of 32 hidden units and dimension 32, here 16 and 32" in lines[0]
    assert "heads (linear heads, here conv)" in lines[0]
    assert "heads" in lines[1] and "backbone.trunk.blocks.*.mlp.experts" in lines[1]
    dense = not_taken(started(run, moe_blocks="none"))
    assert "mlp.experts (not in this model)" in dense[0]
    mlp = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    fresh = [f"backbone.trunk.blocks.*.mlp.{name} (some)" for name in mlp]
    assert dense[1] == f"at random: {', '.join(fresh)}"
    distilled = not_taken(started(run, head="linear", head_stride=2))
    assert "linear.weight (160x32, here 640x32)" in distilled[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trunk_args": ARGS | {"embed_dim": 64}}, "nothing of the trunk of .* fits .*the run has vit_tiny"),
        ({"trunk_args": ARGS | {"num_heads": 4}}, "with 2 attention heads, and .* has 4: give --model.trunk_args"),
        ({"init": "run:"}, r"model.init is 'run:': choose from random, upcycle, run:RUN"),
        ({"init": "runs/a"}, r"model.init is 'runs/a': choose from random, upcycle, run:RUN"),
        ({"init": "run:{parent}"}, "is no trained run .it has no model.json.: give a folder"),
        ({"init": "run:{run}/model.safetensors"}, "is no trained run"),
        ({"init": "run:absent"}, "run:absent is no trained run"),
    ],
)
def test_what_cannot_be_started_from(run: Path, changes: dict[str, Any], words: str) -> None:
    changes = {
        key: value.format(run=run, parent=run.parent) if key == "init" else value for key, value in changes.items()
    }
    with pytest.raises(InputError, match=words):
        new_model(config(**{"init": f"run:{run}"} | changes))


def test_damaged_runs_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        started(tmp_path / "run")


def test_weights_of_a_run_with_experts(run: Path, tmp_path: Path) -> None:
    """model.weights is of the trunk: all of it, experts and gates too, and no head."""
    weights = str(run / "model.safetensors")
    source, found = tensors(load_run(run).model), new_model(config(weights=weights))
    trunk = [name for name in source if name.startswith("backbone.")]
    assert all(torch.equal(tensors(found)[name], source[name]) for name in trunk)
    assert found.origins["from"] == {"backbone": "model.safetensors", "heads": "random"}
    with pytest.raises(InputError, match=r"lacks \d+ tensors of the trunk.*--model.init=run:.* takes what fits"):
        new_model(config(weights=weights, expert_ratio=0.5))
    with pytest.raises(InputError, match=r"would make new experts over those of model\.weights"):
        new_model(config(weights=weights, init="upcycle"))
    alone = tmp_path / "model.safetensors"
    alone.write_bytes(Path(weights).read_bytes())
    with pytest.raises(InputError, match=r"holds experts, and no model.json beside it says of which tasks"):
        new_model(config(weights=str(alone)))


def test_pretrained_weights_beside_it_do_nothing(run: Path, tmp_path: Path) -> None:
    given = config(init=f"run:{run}", pretrained=True, weights=str(tmp_path / "absent.pth"))
    given.check()
    assert [source.name for source in sources(given)] == ["run:moe"]
    model = MultiTaskModel(replace(given, weights=""))
    assert initialise(model, sources(given))["from"] == {"backbone": "run:moe", "heads": "run:moe"}


def test_the_run_needs_what_it_started_from_no_more(run: Path, tmp_path: Path) -> None:
    init_run(Config(model=config(init=f"run:{run}", tasks=["depth"])), tmp_path / "next")
    info = json.loads((tmp_path / "next" / "model.json").read_text())
    assert info["architecture"]["init"] == "run:moe"  # not where it lies on this disk
    assert load_run(tmp_path / "next").config.model.init == "run:moe"
