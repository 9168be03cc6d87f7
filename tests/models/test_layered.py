"""The heads `taskexpert` and `multiscale`: each part against loops, by hand, and as they are trained."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.export.hls.leaf import lower
from m3vit.models.budget import Budget
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.layered import tapped_blocks
from m3vit.models.decoders.multiscale import Scale
from m3vit.models.decoders.taskexpert import GATES, Experts, Gate, Step, assemble
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.trial import meta_model
from m3vit.profiling import count_macs, profile
from m3vit.training.config import Config, DataConfig, TrainConfig, recipe_path
from m3vit.training.launch import Fabric
from m3vit.training.loop import train
from m3vit.training.optim import make_optimizer
from m3vit.training.step import Stepper
from m3vit.training.weighting import make_weighting
from tests.training.runs import same_bits

GRID = (2, 3)
TRUNK = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
SMALL = ModelConfig(
    trunk="vit_tiny_patch16_224",
    trunk_args=TRUNK,
    image_size=(24, 40),
    tasks=["semseg", "depth", "edge"],
    num_experts=4,
    top_k=2,
    head="taskexpert",
    head_args={"experts": 3, "width": 6, "head_width": 5},
)
TASKEXPERT: dict[str, Any] = SMALL.head_args
HEADS = [("taskexpert", TASKEXPERT), ("multiscale", {"width": 6, "head_width": 5})]


def config(**changes: Any) -> ModelConfig:
    return replace(SMALL, **changes)


def make(**changes: Any) -> MultiTaskModel:
    """A model whose parameters, zeros and ones among them, are drawn."""
    torch.manual_seed(0)
    return drawn(MultiTaskModel(config(**changes)))


def drawn(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def convolved(x: Tensor, layer: nn.Conv2d, token: int) -> Tensor:
    """A 3x3 convolution at one token of x [T, W], with zeros outside the grid: [outputs]."""
    rows, columns = GRID
    row, column = divmod(token, columns)
    assert layer.bias is not None
    found = layer.bias.clone()
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            if 0 <= row + dy < rows and 0 <= column + dx < columns:
                found = found + layer.weight[:, :, dy + 1, dx + 1] @ x[(row + dy) * columns + column + dx]
    return found


# --- the parts ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_decompose_equals_one_expert_after_the_other() -> None:
    torch.manual_seed(0)
    layer, tokens = drawn(Experts(7, 4, 3)), torch.randn(2, 2, 6, 7)
    projected, parts = layer(tokens, GRID)
    assert projected.shape == (2, 2, 6, 4) and parts.shape == (2, 2, 6, 3, 4)
    for task in range(2):
        for image in range(2):
            expected = layer.project(layer.norm(tokens[task, image]))
            torch.testing.assert_close(projected[task, image], expected)
            for token in range(6):
                for expert in range(3):
                    own = slice(4 * expert, 4 * expert + 4)
                    value = F.gelu(convolved(expected, layer.bank, token)[own])
                    torch.testing.assert_close(parts[task, image, token, expert], value)


@torch.no_grad()
@pytest.mark.parametrize("kind", GATES)
def test_gate_equals_softmaxes_of_each_token(kind: str) -> None:
    torch.manual_seed(0)
    gate, x = drawn(Gate(4, 3, kind)), torch.randn(2, 6, 4)
    weights = gate(x)
    for image in range(2):
        mean = sum(x[image]) / 6
        for token in range(6):
            logits = gate.bias.clone()
            if kind in ("both", "token"):
                logits += gate.token.weight @ x[image, token]
            if kind in ("both", "sample"):
                logits += gate.sample.weight @ mean
            torch.testing.assert_close(weights[image, token], logits.exp() / logits.exp().sum())
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 1e-3 or kind in ("sample", "static")
    assert (weights[0] - weights[1]).abs().max() > 1e-3 or kind == "static"


@pytest.mark.parametrize("memory", [True, False])
def test_assemble_equals_the_sum_over_parts(memory: bool) -> None:
    torch.manual_seed(0)
    parts, read = torch.randn(2, 6, 3, 4), torch.randn(2, 6, 4) if memory else None
    weights = torch.rand(2, 6, 4 if memory else 3)
    found = assemble(weights, parts, read)
    for image in range(2):
        for token in range(6):
            expected = torch.zeros(4)
            for expert in range(3):
                expected += weights[image, token, expert] * parts[image, token, expert]
            if read is not None:
                expected += weights[image, token, 3] * read[image, token]
            torch.testing.assert_close(found[image, token], expected)


@torch.no_grad()
@pytest.mark.parametrize("memory", [True, False])
def test_a_step_reads_gates_assembles_and_writes(memory: bool) -> None:
    torch.manual_seed(0)
    step = drawn(Step(4, 3, memory, "both"))
    held, projected, parts = torch.randn(2, 6, 4), torch.randn(2, 6, 4), torch.randn(2, 6, 3, 4)
    read = step.read(held) if memory else None
    weights = step.gate(projected + read if memory else projected)
    assert weights.shape == (2, 6, 4 if memory else 3)
    assembled = assemble(weights, parts, read)
    found = step(held, projected, parts).memory
    for image in range(2):
        for token in range(6):
            written = step.write.weight @ assembled[image, token] + step.write.bias
            torch.testing.assert_close(found[image, token], held[image, token] + written)


@torch.no_grad()
def test_a_scale_equals_loops_over_tokens() -> None:
    torch.manual_seed(0)
    scale, tokens = drawn(Scale(7, 4)), torch.randn(2, 6, 7)
    found = scale(tokens, GRID)
    for image in range(2):
        projected = scale.project(scale.norm(tokens[image]))
        for token in range(6):
            torch.testing.assert_close(found[image, token], F.gelu(convolved(projected, scale.mix, token)))


# --- the decoders ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("blocks", ["odd", "none", [3]])
def test_taskexpert_equals_its_parts_task_by_task(blocks: Any) -> None:
    model, images = make(moe_blocks=blocks), torch.randn(2, 3, 24, 40)
    tasks, decoder = model.config.tasks, model.heads
    features, _ = model.backbone(images, (0, 1, 2), decoder.blocks)
    logits = model.eval()(images).logits
    for position, task in enumerate(tasks):
        memory: Any = decoder.own[task].start
        memory = torch.stack([torch.stack([memory] * 15)] * 2)
        for place in range(4):
            tokens = features.of(place)[position][None]  # the task's own, also where all have the same
            projected, parts = decoder.shared[place](tokens, features.grid)
            memory = decoder.own[task].steps[place](memory, projected[0], parts[0]).memory
        expected = decoder.outputs[task](memory, features.grid, (24, 40))
        torch.testing.assert_close(logits[task], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_multiscale_equals_the_sum_of_its_scales() -> None:
    model, images = make(head="multiscale", head_args=HEADS[1][1]), torch.randn(2, 3, 24, 40)
    features, _ = model.backbone(images, (0, 1, 2), model.heads.blocks)
    for position, task in enumerate(model.config.tasks):
        scales: Any = model.heads.own[task]
        total = sum(scales[place](features.of(place)[position], features.grid) for place in range(4))
        expected = model.heads.outputs[task](total, features.grid, (24, 40))
        torch.testing.assert_close(model(images).logits[task], expected, rtol=1e-4, atol=1e-5)


def test_experts_run_once_for_all_tasks_that_are_the_same() -> None:
    model, seen = make(moe_blocks=[2]), []
    for experts in model.heads.shared:
        experts.register_forward_hook(lambda module, given, made: seen.append(len(given[0])))
    model(torch.randn(1, 3, 24, 40))
    assert seen == [1, 1, 3, 3]


@torch.no_grad()
@pytest.mark.parametrize("moe_blocks", ["odd", "none"])
@pytest.mark.parametrize(("head", "arguments"), HEADS)
def test_a_task_does_not_depend_on_the_others(head: str, arguments: dict[str, Any], moe_blocks: str) -> None:
    model = make(head=head, head_args=arguments, moe_blocks=moe_blocks)
    images = torch.randn(2, 3, 24, 40)
    together = model(images)
    for tasks in (["depth"], ["edge", "semseg"]):
        alone = model(images, tasks)
        for task in tasks:
            torch.testing.assert_close(alone.logits[task], together.logits[task], rtol=1e-4, atol=1e-5)
            for name in ("preliminary0", "preliminary1", "preliminary2"):
                one, other = alone.auxiliary[name][task], together.auxiliary[name][task]
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("head", "arguments"), HEADS)
def test_preliminary_outputs_are_of_training(head: str, arguments: dict[str, Any]) -> None:
    model, images = make(head=head, head_args=arguments | {"blocks": [1, 3]}), torch.randn(2, 3, 24, 40)
    output = model(images, native=["depth"])
    assert list(output.auxiliary) == ["preliminary1"] and model.eval()(images).auxiliary == {}
    assert output.auxiliary["preliminary1"]["depth"].shape == (2, 1, 3, 5)
    assert output.auxiliary["preliminary1"]["semseg"].shape == (2, 40, 24, 40)
    assert output.logits["depth"].shape == (2, 1, 6, 10)
    for changes in ({"preliminary": False}, {"blocks": 1}, {"blocks": [2]}):
        without = make(head=head, head_args=arguments | changes)
        assert without(images).auxiliary == {}
        assert not any("training_only" in name for name, _ in without.named_parameters())


@pytest.mark.parametrize(
    ("head", "arguments"),
    HEADS
    + [
        ("taskexpert", TASKEXPERT | changes)
        for changes in ({"memory": False}, {"rank": 2}, *({"gates": g} for g in GATES[1:]))
    ],
)
def test_what_a_task_uses_is_what_its_prediction_reaches(head: str, arguments: dict[str, Any]) -> None:
    model = make(head=head, head_args=arguments)
    for task in model.config.tasks:
        model.zero_grad()
        model.eval()(torch.randn(2, 3, 24, 40)).logits[task].square().sum().backward()
        reached = {id(p) for p in model.heads.parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert reached == {id(parameter) for parameter in model.heads.used_by(task)}


def test_taskexpert_by_hand() -> None:
    T, D, W, E, M, s, L = 15, 32, 6, 3, 5, 2, 4
    for moe_blocks, runs in (("none", 3), ("odd", 1)):
        report = profile(config(moe_blocks=moe_blocks))
        once = T * (D * W + 9 * E * W * W)
        own = {
            task: L * (T * (W * W + E * W + (E + 1) * W) + (E + 1) * W) + T * s * s * (W * M + 9 * M * C)
            for task, C in (("semseg", 40), ("depth", 1), ("edge", 1))
        }
        for task, count in own.items():
            assert report["tasks"][task]["macs"]["parts"]["heads"] == L * once + count
        together = report["all_tasks_in_one_pass"]["macs"]["parts"]["heads"]
        # With experts in blocks 1 and 3 the tasks are the same after block 0 alone.
        assert together == (L * once if runs == 3 else once + 3 * 3 * once) + sum(own.values())
        depth = report["tasks"]["depth"]["decoder"]
        gate, update = L * (T * (E + 1) * W + (E + 1) * W), L * T * W * W
        made = {"decompose": L * once, "gate": gate, "assemble": L * T * E * W, "update": update}
        assert depth == made | {"outputs": T * s * s * (W * M + 9 * M)}
        assert sum(report["all_tasks_in_one_pass"]["decoder"].values()) == together
    lean = profile(config(), "depth", Budget(decoder={"depth": {0: (1,)}}))["tasks"]["depth"]
    parts = dict(depth) | {"decompose": depth["decompose"] - 2 * T * 9 * W * W}  # 2 of 3 experts of the first block
    parts["assemble"] -= 2 * T * W
    assert {name: lean["decoder"][name] for name in ("decompose", "assemble", "outputs")} == {
        name: parts[name] for name in ("decompose", "assemble", "outputs")
    }
    assert sum(lean["decoder"].values()) == lean["macs"]["parts"]["heads"]
    step = 2 * W + (E + 1) * (1 + 2 * W) + W * W + W
    shared = 2 * D + W * (D + 1) + E * W * (9 * W + 1)
    depth = W + L * step + 2 * W + (W + 1) * s * s * M + 9 * M + 1
    assert report["tasks"]["depth"]["activated"]["parts"]["heads"] == L * shared + depth
    assert report["distillation"]["parameters"] == (L - 1) * (3 * 2 * W + (W + 1) * 42)


def test_multiscale_by_hand() -> None:
    T, D, W, M, s, L = 15, 32, 6, 5, 2, 4
    report = profile(config(head="multiscale", head_args=HEADS[1][1]))
    for task, C in (("semseg", 40), ("depth", 1)):
        expected = T * (L * (D * W + 9 * W * W) + s * s * (W * M + 9 * M * C))
        assert report["tasks"][task]["macs"]["parts"]["heads"] == expected
    together = report["all_tasks_in_one_pass"]["macs"]["parts"]["heads"]
    assert together == sum(entry["macs"]["parts"]["heads"] for entry in report["tasks"].values())


def test_the_yardstick_of_the_recipe_has_the_macs_of_taskexpert() -> None:
    text = recipe_path("synthetic-taskexpert-tiny").read_text()
    settings = yaml.safe_load(text)["model"] | {"label_set": "nyud"}
    widths = [int(width) for width in re.findall(r"\{width: (\d+)\}", text.partition("model:")[0])]
    for moe_blocks, width in zip(("odd", "none"), widths, strict=True):
        expert = ModelConfig(**settings | {"moe_blocks": moe_blocks})
        plain = replace(expert, head="multiscale", head_args={"width": width})
        one, other = (sum(count_macs(meta_model(c), c.tasks).values()) for c in (expert, plain))
        assert one == pytest.approx(other, rel=0.01)


@pytest.mark.parametrize("name", ["pascal-taskexpert-base", "nyud-taskexpert-base", "nyud-taskexpert-vits14"])
def test_the_yardsticks_of_large_recipes_too(name: str) -> None:
    text = recipe_path(name).read_text()
    labels = "pascal" if name.startswith("pascal") else "nyud"
    expert = ModelConfig(**yaml.safe_load(text)["model"] | {"label_set": labels})
    found = re.search(
        r"--model.head=multiscale --model.head_args='(\{.*?\})' \(the same MACs\)", text.replace("\n# ", " ")
    )
    assert found
    plain = replace(expert, head="multiscale", head_args=yaml.safe_load(found[1]))
    one, other = (count_macs(meta_model(c), c.tasks)["heads"] for c in (expert, plain))
    assert one == pytest.approx(other, rel=0.02)


def test_blocks_are_evenly_spaced() -> None:
    assert tapped_blocks(4, 12) == (2, 5, 8, 11) and tapped_blocks(4, 24) == (5, 11, 17, 23)
    assert tapped_blocks(3, 4) == (0, 1, 3) and tapped_blocks(1, 4) == (3,) and tapped_blocks(4, 4) == (0, 1, 2, 3)
    assert tapped_blocks([0, 2], 4) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 5}, r"blocks is 5: give how many of the trunk's 4 blocks the head reads, 1 to 4, or a rising"),
        ({"blocks": []}, "blocks is "),
        ({"blocks": [2, 1]}, "blocks is "),
        ({"blocks": [1, 1]}, "blocks is "),
        ({"blocks": [4]}, "indices, 0 to 3"),
        ({"blocks": True}, "blocks is True"),
        ({"width": 0}, r"width is 0: give a whole number of 1 to 4096"),
        ({"head_width": 2.5}, "head_width is 2.5: give a whole number"),
        ({"preliminary": 1}, "preliminary is 1: give true or false"),
        ({"experts": 0}, "experts is 0: give a whole number of 1 to 256"),
        ({"gates": "tokens"}, "gates is 'tokens': choose from both, token, sample, static"),
        ({"memory": "yes"}, "memory is 'yes': give true or false"),
        ({"rank": 0}, "rank is 0: give a whole number of 1 to 64, the width, or a list of 5, one an expert"),
        ({"rank": [2, 3]}, "a list of 5, one an expert"),
        ({"rank": True}, "rank is True"),
        ({"heads": 2}, "head taskexpert takes blocks, experts, width, memory, gates, head_width, preliminary, rank"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MultiTaskModel(config(head_args=arguments))
    if next(iter(arguments)) in ("blocks", "width", "head_width", "preliminary"):
        with pytest.raises(InputError, match=message):
            MultiTaskModel(config(head="multiscale", head_args=arguments))


# --- training -------------------------------------------------------------------------------------------------------


def stepper(model: ModelConfig, **train: Any) -> Stepper:
    settings = Config(model=model, train=TrainConfig(accelerator="cpu", native_losses=["semseg"], **train))
    settings.check()
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision=settings.train.precision)  # type: ignore[arg-type]
    module = MultiTaskModel(settings.model).train()
    module.backbone.checkpoint_activations = settings.train.checkpoint_activations
    weighting = make_weighting(settings, fabric.device)
    optimizer = make_optimizer(settings.train, module, weighting.parameters())
    return Stepper(fabric, settings, *fabric.setup(module, optimizer), weighting)


def labelled_batch(without: str = "") -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    labels = {
        "semseg": torch.randint(0, 40, (2, 24, 40)),
        "depth": torch.rand(2, 24, 40) + 0.5,
        "edge": torch.randint(0, 2, (2, 24, 40)),
    }
    if without == "depth":
        labels["depth"][:] = 0
    return torch.randn(2, 3, 24, 40), labels


def gradients(of: Stepper, step: int = 0, without: str = "") -> tuple[dict[str, float], dict[str, Tensor]]:
    values = of.gradients(step, *labelled_batch(without))
    return values, {name: p.grad.clone() for name, p in of.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("moe_blocks", ["odd", "none"])
@pytest.mark.parametrize(("head", "arguments"), HEADS)
def test_every_parameter_learns(head: str, arguments: dict[str, Any], moe_blocks: str) -> None:
    found = stepper(config(head=head, head_args=arguments, moe_blocks=moe_blocks))
    values, grads = gradients(found)
    assert {"depth", "depth/preliminary0", "semseg/preliminary2"} <= set(values)
    assert {name for name, _ in found.model.named_parameters()} == set(grads)
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for name, grad in grads.items() if "heads" in name)


def test_recomputed_blocks_give_the_same_gradient() -> None:
    _, plain = gradients(stepper(SMALL))
    _, again = gradients(stepper(SMALL, checkpoint_activations=True))
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, msg=name)


def test_bfloat16_step_is_near_the_float32_one() -> None:
    values, plain = gradients(stepper(SMALL))
    rounded, again = gradients(stepper(SMALL, precision="bf16-mixed"))
    assert rounded["loss"] == pytest.approx(values["loss"], rel=0.02)
    one, other = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (plain, again))
    assert F.cosine_similarity(one, other, dim=0) > 0.98


def test_drawn_tasks_reach_their_own_parts_alone() -> None:
    found = stepper(SMALL, tasks_per_step=1)
    values, grads = gradients(found)
    (drawn_task,) = {name for name in values if name in SMALL.tasks}
    owners = {name.split(".")[2] for name in grads if name.startswith(("heads.own", "heads.outputs", "heads.training"))}
    assert owners == {drawn_task} and any(name.startswith("heads.shared") for name in grads)


@pytest.mark.parametrize("weighting", ["fixed", "mgda"])
def test_a_task_without_labels_changes_nothing_of_its_own(weighting: str) -> None:
    values, grads = gradients(stepper(SMALL, weighting=weighting), without="depth")
    assert not any(name.startswith("depth") for name in values)
    assert all(grad.isfinite().all() for grad in grads.values())
    own = [name for name in grads if name.startswith(("heads.own.depth", "heads.outputs.depth"))]
    assert all(grads[name].abs().max() == 0 for name in own)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(("head", "arguments"), HEADS)
def test_a_run_stopped_with_parts_frozen_ends_in_the_same_bits(
    head: str, arguments: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    settings = Config(
        model=config(head=head, head_args=arguments, image_size=(32, 48), router_noise=1.0),
        data=DataConfig(root=str(tiny_data), workers=0),
        train=TrainConfig(
            accelerator="cpu", epochs=2, batch_size=4, threads=1, checkpoint_steps=1, log_steps=1, tasks_per_step=2
        ),
    )
    settings.train.freeze, settings.train.freeze_epochs = ["embed", "blocks.0"], {"heads": 1}
    train(settings, tmp_path / "unbroken")

    def stop(step: int, of: int, text: str) -> None:
        if step == of // 2 + 1:  # the heads have been trained for a step
            raise StoppedError

    with pytest.raises(StoppedError):
        train(settings, tmp_path / "broken", progress=stop)
    train(settings, tmp_path / "broken", resume=True)
    same_bits(tmp_path / "unbroken", tmp_path / "broken")
    text = (tmp_path / "unbroken" / "metrics.jsonl").read_text()
    assert "/preliminary0" in text and "/preliminary3" not in text


@pytest.mark.parametrize(("head", "arguments"), HEADS)
def test_the_accelerator_is_refused_with_the_reason(head: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{head} heads, and the FPGA flow has heads that read the last block alone"):
        lower(make(head=head, head_args=arguments))
