"""Learning rates by part and depth, and parts that are frozen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay
from torch import Tensor

from m3vit.data.loading import EpochBatches, TrainingSet, make_loader
from m3vit.data.nyud import NYUD
from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.normalisation import IMAGENET
from m3vit.training.config import PARTS, Config, DataConfig, TrainConfig
from m3vit.training.launch import Fabric
from m3vit.training.loop import train
from m3vit.training.optim import make_optimizer
from m3vit.training.parts import ahead, block_of, freeze, frozen_epochs, lr_factors, part_of, rows, table
from m3vit.training.starting import build
from m3vit.training.step import Labels, Stepper
from m3vit.training.weighting import make_weighting
from tests.conftest import TINY, Cli
from tests.training.launching import run
from tests.training.runs import assert_close, same_bits

SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
ROPE = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_reg_tokens": 1}


def model_config(**values: Any) -> ModelConfig:
    given: dict[str, Any] = {"trunk": "vit_tiny_patch16_224", "trunk_args": SMALL, "image_size": (32, 48)}
    return ModelConfig(**given | {"num_experts": 4, "top_k": 2} | values)


def configuration(model: dict[str, Any] | None = None, **train_values: Any) -> Config:
    settings = {"accelerator": "cpu", "epochs": 4, "batch_size": 4, "threads": 1, **train_values}
    config = Config(model=model_config(**model or {}), train=TrainConfig(**settings))
    config.check()
    return config


def names(model: MultiTaskModel) -> set[str]:
    return {name for name, _ in model.named_parameters()}


# --- parts and learning rates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"head": "pup", "distillation": [0], "router": "task_conditioned", "router_noise_kind": "learned"},
        {"trunk": "vit_small_patch16_rope_mixed_224", "trunk_args": ROPE, "moe_blocks": [3]},
        {"trunk": "deit_tiny_distilled_patch16_224", "moe_blocks": "none"},
    ],
)
def test_parts_have_every_parameter_once(values: dict[str, Any]) -> None:
    config = model_config(**values)
    model = MultiTaskModel(config)
    trunk, blocks = model.backbone.trunk, model.backbone.trunk.blocks
    of: dict[str, set[Tensor]] = {part: set() for part in PARTS}
    for block in blocks:
        inside = set(block.parameters())
        if hasattr(block.mlp, "experts"):
            of["experts"] |= set(block.mlp.experts.parameters())
            of["routers"] |= set(block.mlp.router.parameters())
        of["trunk"] |= inside - of["experts"] - of["routers"]
    of["embed"] = set(trunk.parameters()) - set(blocks.parameters())
    of["heads"] = set(model.heads.parameters())
    assert sum(map(len, of.values())) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert parameter in of[part_of(name)], name
        block = block_of(name)
        assert (block is None) == (parameter not in set(blocks.parameters()))
        assert block is None or parameter in set(blocks[block].parameters())
    assert {row.part for row in rows(TrainConfig(), model)} == {part for part, found in of.items() if found}
    assert sum(row.parameters for row in rows(TrainConfig(), model)) == sum(p.numel() for p in model.parameters())


def test_layer_decay_is_timms() -> None:
    config = model_config(moe_blocks="none")
    dense = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), num_classes=5, **SMALL)
    names_of = {parameter: name for name, parameter in dense.named_parameters()}
    expected = {
        f"backbone.trunk.{names_of[parameter]}": group["lr_scale"]
        for group in param_groups_layer_decay(dense, layer_decay=0.7)
        for parameter in group["params"]
    }
    model = MultiTaskModel(config)
    found = lr_factors(TrainConfig(layer_decay=0.7), model)
    for name in names(model):
        assert found[name] == pytest.approx(1.0 if name.startswith("heads") else expected[name]), name
    # Experts and routers are of their block.
    moe = lr_factors(
        TrainConfig(layer_decay=0.7, lr_scale={"experts": 3.0, "heads": 2.0}), MultiTaskModel(model_config())
    )
    assert moe["backbone.trunk.blocks.1.mlp.experts.w1"] == pytest.approx(3 * 0.7**3)
    assert moe["backbone.trunk.blocks.1.mlp.router.gates.0"] == pytest.approx(0.7**3)
    assert moe["backbone.trunk.pos_embed"] == pytest.approx(0.7**5)
    assert moe["heads.depth.linear.weight"] == 2


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_groups_have_every_parameter_once_at_its_rate(optimizer: str) -> None:
    model = MultiTaskModel(model_config())
    plain = make_optimizer(TrainConfig(optimizer=optimizer), model)  # type: ignore[arg-type]
    decays = {p: group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    assert len(plain.param_groups) == (2 if optimizer == "adamw" else 1), "as runs without factors have it"
    assert not any("lr_scale" in group for group in plain.param_groups)
    settings = TrainConfig(optimizer=optimizer, lr_scale={"trunk": 0.1, "routers": 2.0}, layer_decay=0.9)  # type: ignore[arg-type]
    factors = lr_factors(settings, model)
    found = [
        (p, group["weight_decay"], group.get("lr_scale", 1.0))
        for group in make_optimizer(settings, model).param_groups
        for p in group["params"]
    ]
    assert len(found) == len(names(model))
    of = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, decay, scale in found:
        assert decay == decays[parameter] and scale == factors[of[parameter]]


# --- freezing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(tiny_data: Path) -> tuple[Tensor, Labels]:
    dataset = TrainingSet(NYUD(tiny_data, "train"), (32, 48), 1, IMAGENET)
    images, labels, *_ = next(iter(make_loader(dataset, EpochBatches(len(dataset), 4, seed=1), 0)))
    return images, labels


def gradients(config: Config, batch: tuple[Tensor, Labels], epoch: int = 0) -> tuple[Stepper, dict[str, Tensor]]:
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1)
    model = MultiTaskModel(config.model).train()
    freeze(model, frozen_epochs(config.train, model), epoch)
    model.backbone.checkpoint_activations = config.train.checkpoint_activations
    weighting = make_weighting(config, fabric.device)
    optimizer = make_optimizer(config.train, model, weighting.parameters())
    stepper = Stepper(fabric, config, *fabric.setup(model, optimizer), weighting)
    stepper.gradients(0, *batch)
    return stepper, {name: p.grad for name, p in stepper.model.named_parameters() if p.grad is not None}


FROZEN = ["embed", "blocks.0-2"]


@pytest.mark.parametrize(
    "settings",
    [
        {"freeze": FROZEN},
        {"freeze": ["embed", "trunk"]},
        {"freeze": ["experts", "routers"]},
        {"freeze": ["heads"], "freeze_epochs": {"blocks.1": 2, "routers": 1}},
        {"freeze": FROZEN, "checkpoint_activations": True},
        {"freeze": ["trunk"], "accumulate": 2, "balance_weight": 0.0},
    ],
    ids=str,
)
def test_what_is_trained_has_the_gradient_it_had(batch: tuple[Tensor, Labels], settings: dict[str, Any]) -> None:
    _, expected = gradients(configuration(), batch)
    if not settings.get("balance_weight", 1):
        _, expected = gradients(configuration(balance_weight=0.0), batch)
    config = configuration(**settings)
    stepper, found = gradients(config, batch)
    epochs = frozen_epochs(config.train, stepper.model)
    assert found.keys() == {name for name in expected if not epochs[name]} and 0 < len(found) < len(expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-5)


def leaves(output: Tensor) -> set[Tensor]:
    """Return the parameters that a tensor's graph leads to."""
    found, seen, nodes = set[Tensor](), set[Any](), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {node.variable} if hasattr(node, "variable") else set()
            nodes += [following for following, _ in node.next_functions]
    return found


def test_nothing_below_the_first_trained_block_is_in_the_graph() -> None:
    model = MultiTaskModel(model_config()).train()
    freeze(model, frozen_epochs(TrainConfig(freeze=FROZEN), model), 0)
    kept: list[Tensor] = []
    for block in model.backbone.trunk.blocks:
        block.attn.register_forward_hook(lambda module, inputs, output: kept.append(output))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features, _ = model.backbone(torch.randn(2, 3, 32, 48), (0, 1, 2, 3), (2, 3))
        assert not features.tokens[2].requires_grad and features.tokens[3].requires_grad
    assert [output.requires_grad for output in kept] == [False, False, False, True]
    trained = set(model.backbone.trunk.blocks[3].parameters())
    assert leaves(features.tokens[3]) == trained
    below = {p.data_ptr() for block in model.backbone.trunk.blocks[:3] for p in block.parameters()}
    assert not below & {tensor.data_ptr() for tensor in saved}


@pytest.mark.parametrize("weighting", ["pcgrad", "mgda", "aligned_mtl"])
def test_combined_gradients_are_of_what_is_trained(batch: tuple[Tensor, Labels], weighting: str) -> None:
    config = configuration(weighting=weighting, freeze=FROZEN)
    stepper, found = gradients(config, batch)
    assert found and found.keys() == {name for name, p in stepper.model.named_parameters() if p.requires_grad}


def test_frozen_modules_run_as_in_evaluation() -> None:
    config = model_config(head="pup", router_noise=1.0, trunk_args={**SMALL, "drop_path_rate": 0.5})
    model = MultiTaskModel(config).train()
    freeze(model, frozen_epochs(TrainConfig(freeze=["routers", "heads", "blocks.0"]), model), 0)
    blocks = model.backbone.trunk.blocks
    assert not any(module.training for module in [*model.heads.modules(), *blocks[0].modules()])
    assert not blocks[1].mlp.router.training and blocks[1].mlp.experts.training
    assert blocks[1].training and blocks[1].drop_path1.training and model.backbone.trunk.patch_embed.training
    model.train()
    freeze(model, dict.fromkeys(names(model), 0.0), 0)
    assert all(module.training for module in model.modules())


# --- whole runs -------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def test_a_run_stopped_about_its_unfreezing_ends_in_the_same_bits(tiny_data: Path, tmp_path: Path) -> None:
    config = configuration(
        freeze=["embed", "blocks.0"],
        freeze_epochs={"trunk": 1, "experts": 2},
        ema=0.5,
        checkpoint_steps=1,
        log_steps=1,
        epochs=3,
        lr_scale={"heads": 2.0},
        layer_decay=0.8,
    )
    config.model = replace(config.model, router_noise=1.0)
    config.data = DataConfig(root=str(tiny_data), workers=0)
    train(config, tmp_path / "unbroken")
    steps = len((tmp_path / "unbroken" / "metrics.jsonl").read_text().splitlines()) - 1  # one line is of val
    for stop in range(1, steps, 2):

        def kill(step: int, of: int, text: str, stop: int = stop) -> None:
            if step == stop:
                raise KilledError

        with pytest.raises(KilledError):
            train(config, tmp_path / "broken", resume=stop > 1, progress=kill)
    train(config, tmp_path / "broken", resume=True)
    same_bits(tmp_path / "unbroken", tmp_path / "broken")
    start, end = build(config), load_file(tmp_path / "unbroken" / "model.safetensors")
    epochs = frozen_epochs(config.train, start)
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, end[name]) == (epochs[name] > 3), name  # the moving average too


@pytest.mark.process
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_train_what_one_does(uneven_data: Path, tmp_path: Path, strategy: str) -> None:
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={uneven_data}", "--train.epochs=3", "--train.ema=0.5"]
    words += ["--train.optimizer=sgd", "--train.lr=0.01", "--train.freeze=[embed,blocks.0]", "--train.grad_clip=0.5"]
    words += ["--train.lr_scale={experts: 0.5}"]
    if strategy == "ddp":
        words += ["--train.freeze_epochs={routers: 1, trunk: 2}"]
    run([*words, "--out", tmp_path / "one"], tmp_path)
    run([*words, f"--train.strategy={strategy}", "--out", tmp_path / "two"], tmp_path, 2)
    assert_close(tmp_path / "one", tmp_path / "two", weights_atol=1e-6)


def test_the_table_says_what_is_trained() -> None:
    model = MultiTaskModel(model_config())
    settings = TrainConfig(lr=1e-3, freeze=FROZEN, freeze_epochs={"routers": 2}, lr_scale={"heads": 10.0}, epochs=9)
    lines = [" ".join(line.split()) for line in table(settings, model).splitlines()]
    assert lines[0] == "part parameters trained learning rate"
    assert f"routers of blocks 3 {4 * 4 * 32} after epoch 2 0.001" in lines
    assert any(line.startswith("trunk of blocks 0-2 ") and line.endswith(" no") for line in lines)
    assert any(line.startswith("heads ") and line.endswith(" yes 0.01") for line in lines)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"lr_scale": {"trunk": 0.1}}, "0.001, the first block at 0.0001:"),
        ({"lr_scale": {"trunk": 0.1}, "freeze_epochs": {"embed": 1, "trunk": 2}}, "at 0.0001 after epoch 2:"),
        ({"freeze_epochs": {"trunk": 3}}, "0.001, the first block at 0.001 after epoch 3:"),
        ({"freeze": ["trunk"]}, "0.001, the first block not at all:"),
        ({"freeze": ["blocks.0-1"]}, "0.001, the first block not at all:"),
        ({"freeze": ["blocks.3"]}, None),
        ({"freeze_epochs": {"embed": 2, "trunk": 2}}, None),
        ({"lr_scale": {"trunk": 0.1, "embed": 0.1}}, None),
        ({"lr_scale": {"trunk": 0.1}, "freeze": ["embed"]}, None),
        ({"layer_decay": 0.5}, None),
        ({}, None),
    ],
)
def test_patches_that_learn_faster_than_the_blocks_are_named(settings: dict[str, Any], rates: str | None) -> None:
    line = ahead(TrainConfig(lr=1e-3, epochs=9, **settings), MultiTaskModel(model_config()))
    assert rates in line if rates and line else line is rates


@pytest.mark.parametrize("of_run", [False, True])
def test_they_are_named_where_weights_are_given(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, cli: Cli, of_run: bool
) -> None:
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--train.lr_scale={trunk: 0.1}"]
    words += ["--train.epochs=1", "--out", str(tmp_path / "run")] + [f"--model.init=run:{tiny_run}"] * of_run
    result = cli(*words)
    assert result.returncode == 0, result.stderr
    assert ("embed, which is a part of its own, learns at" in result.stdout + result.stderr) is of_run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scale": {"gates": 1.0}}, "train.lr_scale names gates: choose from embed, trunk, experts, routers, heads"),
        ({"lr_scale": {"heads": 0.0}}, "train.lr_scale.heads is 0.0: give a positive number"),
        ({"lr_scale": {"heads": -1.0}}, "train.lr_scale.heads is -1.0"),
        ({"lr_scale": {"heads": float("nan")}}, "train.lr_scale.heads is nan"),
        ({"layer_decay": 0.0}, "train.layer_decay is 0.0"),
        ({"layer_decay": 1.5}, "train.layer_decay is 1.5"),
        ({"freeze": ["head"]}, "train.freeze names head: choose from embed"),
        ({"freeze": ["blocks"]}, "train.freeze names blocks: choose from"),
        ({"freeze": ["blocks.3-1"]}, "train.freeze names blocks.3-1"),
        ({"freeze_epochs": {"gates": 1}}, "train.freeze_epochs names gates"),
        ({"freeze": ["heads"], "freeze_epochs": {"heads": 1}}, "train.freeze and train.freeze_epochs both name heads"),
        ({"freeze_epochs": {"heads": 0}}, "train.freeze_epochs gives heads 0 epochs: give 1 to 3"),
        ({"freeze_epochs": {"heads": 1}, "epochs": 1}, "gives heads 1 epochs: of 1 in all; train.freeze is for all"),
        ({"freeze_epochs": {"heads": 4}}, "train.freeze_epochs gives heads 4 epochs"),
        ({"freeze_epochs": {"heads": 1}, "strategy": "fsdp"}, "fsdp does not go with train.freeze_epochs"),
    ],
    ids=str,
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        configuration(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"^blocks.2-4 is to be frozen: vit_tiny_patch16_224 has blocks 0 to 3$"):
        build(configuration(freeze=["blocks.2-4"]))
    with pytest.raises(
        InputError, match=r"^heads, embed, blocks.0-3 are frozen, which is all of the model in the first"
    ):
        build(configuration(freeze_epochs={"heads": 1}, freeze=["embed", "blocks.0-3"]))
