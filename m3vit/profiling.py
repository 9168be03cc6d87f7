"""`m3vit profile`: parameters and multiply-accumulates (MACs) of a model, by part and by task, without its weights.

The model is built and run on torch's meta device, which knows shapes and no values: an image costs milliseconds and no
memory. Each module's MACs follow from the shapes it saw (a FLOP count is twice these):

- Linear: outputs x inputs, a token; convolution: output elements x inputs of each (k^2 x channels / groups), a
  transposed one: input elements x outputs of each;
- attention: 2 N^2 D for N tokens of width D (scores q k^T, and the weighted sum of the values), besides its Linears;
- router: E D a token and task; experts: K (2 D H) for the K experts of a token, and K D for their weighted sum.

Not counted: biases, norms, activations, softmax, top-k, residual sums, position embeddings and bilinear resizes (what
one counts of those differs between tools; they come to well under 1 %).

Shapes: N tokens, D embedding dimension, E experts, K experts per token, H their hidden width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.router import EMBEDDING, Router

FORMAT, FORMAT_VERSION = "m3vit profile", 1
MIB_FP16 = 2 / 2**20  # MiB a parameter in half precision
PARTS = {
    "embedding": "embeddings",
    "attention": "attention",
    "dense_mlps": "dense MLPs",
    "routers": "routers",
    "experts": "experts",
    "norms": "norms",
    "heads": "heads",
    "distillation": "distillation (training only)",
}

Counts = dict[str, int]  # by part, all parts of PARTS


def profile(config: ModelConfig, task: str | None = None) -> dict[str, Any]:
    """Return what `m3vit profile` prints, as JSON values; the keys stay the same within a `format_version`.

    `stored`: parameters of everything; `activated` of a task: those that one of its tokens meets (its own gate and
    head, K of E experts a layer). Parts are the keys of PARTS; totals are without distillation, which is training's.
    `tasks` has all tasks of the model, or `task` alone.
    """
    config = replace(config, pretrained=False)
    config.check()
    if task is not None and task not in config.tasks:
        raise InputError(f"--task is {task!r}: this model has {', '.join(config.tasks)}")
    model = _build(config)
    stored, paper = count_parameters(model), paper_parameters(model)
    tasks = {
        name: {
            "macs": _totals(count_macs(model, [name])),
            "activated": _totals(activated_parameters(model, name)),
        }
        for name in ([task] if task else config.tasks)
    }
    distilling = count_macs(model, config.tasks, training=True) if config.distillation else stored
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "trunk": config.trunk,
        "image_size": list(config.image_size),
        "moe_blocks": model.backbone.moe_indices,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "router": config.router,
        "head": config.head,
        "stored": _totals(stored) | {"mib_fp16": _total(stored) * MIB_FP16},
        "tasks": tasks,
        "all_tasks_in_one_pass": {"tasks": list(config.tasks), "macs": _totals(count_macs(model, config.tasks))},
        "distillation": {"parameters": stored["distillation"], "macs": distilling["distillation"]},
        "as_the_paper_counts": {
            "parameters": paper,
            "mib_fp16": paper * MIB_FP16,
            "gmacs": sum(entry["macs"]["total"] for entry in tasks.values()) / len(tasks) / 1e9,
        },
    }


def _build(config: ModelConfig) -> MultiTaskModel:
    """Return the model on the meta device, its experts run in a way that needs shapes alone."""
    with torch.device("meta"):
        model = MultiTaskModel(config)
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.execution = "reference"
    return model.eval()


def _totals(counts: Counts) -> dict[str, Any]:
    """Return the counts by part, their sum, and their sum without heads; both sums without distillation."""
    return {"parts": counts, "total": _total(counts), "without_heads": _total(counts) - counts["heads"]}


def _total(counts: Counts) -> int:
    return sum(counts.values()) - counts["distillation"]


def part_of(name: str) -> str:
    """Return the part that a parameter or module of this dotted name belongs to."""
    if not name.startswith("backbone."):
        return name.partition(".")[0]  # heads, distillation
    if ".blocks." not in name:
        return "norms" if "norm_pre" in name else "embedding"
    for word, part in ((".router", "routers"), (".experts", "experts"), (".attn", "attention"), (".mlp", "dense_mlps")):
        if word in name:
            return part
    return "norms"


def count_parameters(model: MultiTaskModel) -> Counts:
    """Return the number of parameters of each part. BatchNorm's running statistics are no parameters."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def activated_parameters(model: MultiTaskModel, task: str) -> Counts:
    """Return the parameters that a token of this task meets, by part."""
    counts = count_parameters(model)
    counts["distillation"] = 0
    counts["heads"] = _numel(model.heads[task])
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            router, bank = layer.router, layer.experts
            counts["routers"] -= sum(gate.numel() for gate in router.gates) - router.gates[0].numel()
            counts["experts"] -= _numel(bank) * (router.num_experts - router.top_k) // router.num_experts
    return counts


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(
    model: MultiTaskModel, tasks: list[str], training: bool = False, experts: Callable[..., int] | None = None
) -> Counts:
    """Return the MACs of one image of the trained size, by part, for these tasks in one pass.

    `experts`: the formula of a MoE layer, another one than for experts as trained.
    """
    counts = dict.fromkeys(PARTS, 0)

    def count(name: str, rule: Callable[..., int]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            counts[part_of(name)] += rule(module, inputs, output)

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            handles.append(module.register_forward_hook(count(f"{name}.experts", experts or _experts)))
        elif (rule := _rule(module)) is not None:
            handles.append(module.register_forward_hook(count(name, rule)))
    try:
        with torch.no_grad():
            model.train(training)(torch.empty(1, 3, *model.config.image_size, device="meta"), tasks)
    finally:
        model.eval()
        for handle in handles:
            handle.remove()
    return counts


def graph_macs(
    config: ModelConfig,
    task: str,
    size: tuple[int, int],
    *,
    kept: Mapping[int, Sequence[int]],
    top_k: int | None = None,
    every_expert: bool = False,
) -> int:
    """Return the MACs of one image of `size` (height, width) in the exported graph of a task.

    kept: the experts that the graph holds of each MoE layer, {layer number: ids}, all of a layer not named. top_k: of
    them, those a token goes to, None as trained; with `every_expert` it goes to all that are held.
    """
    model = _build(replace(config, pretrained=False, weights="", image_size=size))
    numbers = {id(layer): number for number, layer in enumerate(m for m in model.modules() if isinstance(m, MoELayer))}

    def experts(layer: MoELayer, inputs: tuple[Tensor, tuple[int, ...]], output: Any) -> int:
        _, B, T, D = inputs[0].shape
        held = len(kept.get(numbers[id(layer)], range(layer.router.num_experts)))
        used = held if every_expert else layer.router.top_k if top_k is None else top_k
        return B * T * used * (2 * D * layer.experts.w1.shape[1] + D)

    return _total(count_macs(model, [task], experts=experts))


def _rule(module: Any) -> Callable[..., int] | None:
    """Return the formula of a module, or None if nothing of it counts by itself."""
    if isinstance(module, Router):
        return _router
    if hasattr(module, "qkv") and hasattr(module, "num_heads"):  # timm's attentions
        return _attention
    rules: tuple[tuple[type[nn.Module], Callable[..., int]], ...] = (
        (nn.Linear, _linear),
        (nn.Conv2d, _convolution),
        (nn.ConvTranspose2d, _transposed),
    )
    return next((rule for kind, rule in rules if isinstance(module, kind)), None)


def _linear(linear: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> int:
    return output.numel() * linear.in_features


def _convolution(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> int:
    return output.numel() * conv.weight[0].numel()  # weight [C_out, C_in / groups, k, k]


def _transposed(conv: nn.ConvTranspose2d, inputs: tuple[Tensor], output: Tensor) -> int:
    return inputs[0].numel() * conv.weight[0].numel()  # weight [C_in, C_out / groups, k, k]


def _attention(attention: Any, inputs: tuple[Tensor], output: Tensor) -> int:
    B, N, _ = inputs[0].shape
    return 2 * B * N**2 * attention.qkv.out_features // 3


def _router(router: Router, inputs: tuple[Tensor, tuple[int, ...]], output: Any) -> int:
    # The task embedding's share of a gate is the same for all tokens: once a task (Router.gate).
    once = len(inputs[1]) * router.num_experts * EMBEDDING if router.kind == "task_conditioned" else 0
    return inputs[0].numel() * router.num_experts + once


def _experts(layer: MoELayer, inputs: tuple[Tensor, tuple[int, ...]], output: Any) -> int:
    _, B, T, D = inputs[0].shape  # R = 1 where the tasks are still the same: the ids say how many there are
    hidden = layer.experts.w1.shape[1]
    return len(inputs[1]) * B * T * layer.router.top_k * (2 * D * hidden + D)


def paper_parameters(model: MultiTaskModel) -> int:
    """Return the parameters counted as the memory column of M3ViT's hardware table does (82.747 MiB in fp16).

    The trunk as timm publishes it: ImageNet classifier, final norm and position embedding of its own image size. In
    the MoE blocks, experts instead of MLPs, and the gate of one task. No heads. The convention is derived: it is the
    one that gives the paper's figures to the last digit, 22,050,664 for DeiT-S (42.058 MiB) and with experts
    22,050,664 + 6 (16 x 295,680 - 1,181,568) + 6 x 384 x 16 = 43,383,400.
    """
    config = model.config
    arguments = {key: value for key, value in config.trunk_args.items() if key not in ("img_size", "num_classes")}
    with torch.device("meta"):
        published = timm.create_model(config.trunk, pretrained=False, **arguments)
    count = _numel(published)
    for name, layer in model.backbone.trunk.named_modules():
        if isinstance(layer, MoELayer):
            count += _numel(layer) - _numel(published.get_submodule(name))
            count -= sum(gate.numel() for gate in layer.router.gates) - layer.router.gates[0].numel()
    return count


def render(report: dict[str, Any]) -> str:
    """Return the report as tables for the terminal: by part, then by task, then as the paper counts."""
    height, width = report["image_size"]
    tasks, together = report["tasks"], report["all_tasks_in_one_pass"]
    name, shown = next(iter(tasks.items()))
    experts = f"{report['top_k']} of {report['num_experts']} experts in blocks {report['moe_blocks']}"
    parts = Table(
        title=f"{report['trunk']}, {height}x{width}, {experts}, router {report['router']}, {report['head']} heads",
        caption="parameters: stored, and met by a token of one task (activated); GMAC = 1e9 multiply-accumulates",
    )
    parts.add_column("part")
    columns = ("stored", "MiB fp16", f"activated, {name}", f"GMAC, {name}", f"GMAC, {len(together['tasks'])} tasks")
    for column in columns:
        parts.add_column(column, justify="right")

    def add_row(title: str, stored: int, activated: int, one: int, every: int) -> None:
        numbers = (
            f"{stored:,}",
            f"{stored * MIB_FP16:.3f}",
            f"{activated:,}",
            f"{one / 1e9:.2f}",
            f"{every / 1e9:.2f}",
        )
        parts.add_row(title, *numbers)

    counts = (report["stored"], shown["activated"], shown["macs"], together["macs"])
    for part, title in PARTS.items():
        if part != "distillation" and any(count["parts"][part] for count in counts):
            add_row(title, *(count["parts"][part] for count in counts))
    parts.add_section()
    for key, title in (("without_heads", "without heads"), ("total", "total")):
        add_row(title, *(count[key] for count in counts))
    if report["distillation"]["parameters"]:
        parts.add_section()
        extra = report["distillation"]
        add_row(PARTS["distillation"], extra["parameters"], 0, 0, extra["macs"])
    each = Table(caption="one task at a time")
    each.add_column("task")
    for column in ("activated, no head", "activated", "GMAC, no head", "GMAC, head", "GMAC"):
        each.add_column(column, justify="right")
    for task, entry in tasks.items():
        macs, activated = entry["macs"], entry["activated"]
        amounts = (macs["without_heads"], macs["parts"]["heads"], macs["total"])
        each.add_row(
            task,
            f"{activated['without_heads']:,}",
            f"{activated['total']:,}",
            *map(_giga, amounts),
        )
    console = Console(file=StringIO(), width=120)
    with console.capture() as capture:
        console.print(parts, each)
    paper = report["as_the_paper_counts"]
    mean = ", mean over the tasks" if len(tasks) > 1 else ""
    return (
        f"{capture.get()}as M3ViT's paper counts: {paper['parameters']:,} parameters = {paper['mib_fp16']:.3f} MiB in "
        f"fp16, {paper['gmacs']:.0f} GMAC\n(parameters: the published trunk with its ImageNet classifier and image "
        f"size, experts, one task's gates,\nno heads; MACs: one task with its head{mean})"
    )


def _giga(count: int) -> str:
    return f"{count / 1e9:.2f}" if count >= 1e9 or not count else f"{count / 1e9:.3g}"
