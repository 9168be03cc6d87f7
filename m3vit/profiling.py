"""`m3vit profile`: parameters and multiply-accumulates (MACs) of a model, by part and by task, without its weights.

The model is built and run on torch's meta device, which knows shapes and no values: an image costs milliseconds and no
memory. What counts are the functions of torch that are called, whichever module calls them: timm's blocks differ in
their modules (fused and separate projections, weights used without their Linear, parallel branches), not in these. The
MACs follow from the shapes (a FLOP count is twice these):

- linear: outputs x inputs, a token; convolution: output elements x inputs of each (k^2 x channels / groups), a
  transposed one: input elements x outputs of each; matrix product: output elements x the inner dimension;
- attention: 2 N^2 D for N tokens of width D (scores q k^T, and the weighted sum of the values), besides its linears;
- router: E D a token and task; experts: K (2 D H) for the K experts of a token, and K D for their weighted sum.

Not counted: biases, norms, activations, softmax, top-k, residual sums, position embeddings and bilinear resizes (what
one counts of those differs between tools; they come to well under 1 %).

Shapes: N tokens, D embedding dimension, E experts, K experts per token, H their hidden width.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from io import StringIO
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from m3vit.errors import InputError
from m3vit.models.budget import FULL, Budget, Use
from m3vit.models.config import ModelConfig
from m3vit.models.meta import KnownShapes, without_values
from m3vit.models.mlp import cut
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.of_timm import timm
from m3vit.models.router import EMBEDDING, Router
from m3vit.models.trial import meta_model, refusing

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
    "distillation": "training only",
}

# Of a parameter or module within a block, by a word in its name. The projections that timm's parallel blocks share
# between attention and MLP, and what they call themselves, count as attention.
_WORDS = (
    ((".router",), "routers"),
    ((".experts",), "experts"),
    (("norm1", "norm2", "in_norm"), "norms"),
    ((".mlp", ".ffns"), "dense_mlps"),
    ((".attn", ".in_proj", ".out_proj"), "attention"),
)
_BLOCK = re.compile(r"\.blocks\.\d+$")

Counts = dict[str, int]  # by part, all parts of PARTS


def profile(config: ModelConfig, task: str | None = None, budget: Budget = FULL) -> dict[str, Any]:
    """Return what `m3vit profile` prints, as JSON values; the keys stay the same within a `format_version`.

    `stored`: parameters of everything; `activated` of a task: those that one of its tokens meets (its own gate and
    head, K of E experts a layer). Parts are the keys of PARTS; totals are without distillation, which is training's.
    `decoder`: the MACs of heads that have parts of their own. `tasks` has all tasks of the model, or `task` alone.
    Under a `budget`, `activated` and MACs are of what it uses. Raises InputError for one that the model cannot keep to.
    """
    config.check()
    if task is not None and task not in config.tasks:
        raise InputError(f"--task is {task!r}: this model has {', '.join(config.tasks)}")
    with refusing(config):
        model = meta_model(config)
        model.uses(budget, config.tasks)
        return _report(config, model, [task] if task else config.tasks, budget)


def _report(config: ModelConfig, model: MultiTaskModel, chosen: list[str], budget: Budget) -> dict[str, Any]:
    stored, paper = count_parameters(model), paper_parameters(model)
    tasks = {}
    for name in chosen:
        counted = _counted(model, [name], budget=budget)
        activated = _totals(activated_parameters(model, name, budget))
        tasks[name] = {"macs": _totals(counted.counts), "activated": activated, **_inside(counted)}
    at_once = _counted(model, config.tasks, budget=budget)
    distilling = count_macs(model, config.tasks, training=True) if stored["distillation"] else stored
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
        **({} if budget.full else {"budget": budget.to_json()}),
        "stored": _totals(stored) | {"mib_fp16": _total(stored) * MIB_FP16},
        "tasks": tasks,
        "all_tasks_in_one_pass": {
            "tasks": list(config.tasks),
            "macs": _totals(at_once.counts),
            **_inside(at_once),
        },
        "distillation": {"parameters": stored["distillation"], "macs": distilling["distillation"]},
        "as_the_paper_counts": {
            "parameters": paper,
            "mib_fp16": paper * MIB_FP16,
            "gmacs": sum(entry["macs"]["total"] for entry in tasks.values()) / len(tasks) / 1e9,
        },
    }


def _inside(counted: "_MacCounter") -> dict[str, Counts]:
    """Return what a report says of a decoder that has parts of its own."""
    return {"decoder": counted.decoder} if len(counted.decoder) > 1 else {}


def _totals(counts: Counts) -> dict[str, Any]:
    """Return the counts by part, their sum, and their sum without heads; both sums without distillation."""
    return {"parts": counts, "total": _total(counts), "without_heads": _total(counts) - counts["heads"]}


def _total(counts: Counts) -> int:
    return sum(counts.values()) - counts["distillation"]


def part_of(name: str) -> str:
    """Return the part that a parameter or module of this dotted name belongs to."""
    if not name.startswith("backbone."):
        return "distillation" if name.startswith("heads.training_only") else "heads"
    if ".blocks." not in name:
        return "norms" if "norm_pre" in name else "embedding"
    if _BLOCK.search(name):
        return "attention"
    return next((part for words, part in _WORDS if any(word in name for word in words)), "norms")


def count_parameters(model: MultiTaskModel) -> Counts:
    """Return the number of parameters of each part. BatchNorm's running statistics are no parameters."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def activated_parameters(model: MultiTaskModel, task: str, budget: Budget = FULL) -> Counts:
    """Return the parameters that a token of this task meets, by part."""
    counts = count_parameters(cut(model, {block: width for block, width in budget.width.items() if width}))
    counts["distillation"] = 0
    counts["heads"] = model.heads.used_count(task, budget.heads.get(task))
    for block in model.backbone.moe_indices:
        layer: Any = model.backbone.trunk.blocks[block].mlp
        router, use = layer.router, layer.use(budget.layer(task, block))
        counts["routers"] -= sum(gate.numel() for gate in router.gates) - router.gates[0].numel()
        counts["experts"] -= (router.num_experts - use.top_k) * (2 * router.dim * use.width + use.width + router.dim)
    for block in budget.left_out:
        for name, parameter in model.named_parameters():
            if name.startswith(f"backbone.trunk.blocks.{block}."):
                counts[part_of(name)] -= parameter.numel()
    return counts


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(
    model: MultiTaskModel,
    tasks: list[str],
    training: bool = False,
    budget: Budget = FULL,
    *,
    every_expert: bool = False,
) -> Counts:
    """Return the MACs of one image of the trained size, by part, for these tasks in one pass.

    `budget`: what is used of the experts. `every_expert`: a token goes to all that are kept.
    """
    return _counted(model, tasks, training, budget, every_expert).counts


def _counted(
    model: MultiTaskModel,
    tasks: list[str],
    training: bool = False,
    budget: Budget = FULL,
    every_expert: bool = False,
) -> "_MacCounter":
    counter, handles = _MacCounter(model, every_expert), []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(counter.enter, name)))
        handles.append(module.register_forward_hook(partial(counter.leave, name)))
    try:
        with torch.no_grad(), KnownShapes(), counter:
            model.train(training)(torch.empty(1, 3, *model.config.image_size, device="meta"), tasks, budget=budget)
    finally:
        model.eval()
        for handle in handles:
            handle.remove()
    return counter


def graph_macs(
    config: ModelConfig,
    tasks: str | Sequence[str],
    size: tuple[int, int],
    budget: Budget = FULL,
    *,
    every_expert: bool = False,
) -> int:
    """Return the MACs of one image of `size` (height, width) in the exported graph of a task, or of several at once.

    `count_macs` says how.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    return total_macs(meta_model(replace(config, image_size=size)), names, budget, every_expert=every_expert)


def total_macs(
    model: MultiTaskModel, tasks: Sequence[str], budget: Budget = FULL, *, every_expert: bool = False
) -> int:
    """Return what `graph_macs` does, of a model of shapes (`meta_model`) at the size of its configuration."""
    return _total(count_macs(model, list(tasks), budget=budget, every_expert=every_expert))


def macs_share(model: MultiTaskModel, budget: Budget) -> float:
    """Return the share of the MACs of all tasks' graphs, of the size trained at, that a budget takes.

    model: of shapes (`meta_model`).
    """
    used, whole = (sum(total_macs(model, [task], one) for task in model.config.tasks) for one in (budget, FULL))
    return used / whole


class _MacCounter(TorchFunctionMode):
    """Counts the MACs of the functions called within it, each for the part of the module that calls it."""

    def __init__(self, model: MultiTaskModel, every_expert: bool) -> None:
        super().__init__()
        self.heads, self.every_expert = model.heads, every_expert
        self.decoder: Counts = {}  # of the heads, by the decoder's own parts
        self.counts: Counts = dict.fromkeys(PARTS, 0)
        self.modules: list[str] = []  # names of those running, the innermost last
        self.inside_moe = 0  # how many of them are MoE layers: these count as they are trained, not as run here

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        """Note that a module begins; a forward pre-hook."""
        self.modules.append(name)
        self.inside_moe += isinstance(module, MoELayer)

    def leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Note that a module is done; a forward hook."""
        self.modules.pop()
        if isinstance(module, MoELayer):
            self.inside_moe -= 1
            self.counts["experts"] += _experts(module, *inputs, every=self.every_expert)
        elif isinstance(module, Router):
            self.counts["routers"] += _router(module, *inputs)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if not self.inside_moe and (rule := _RULES.get(function)) is not None:
            part, macs = part_of(self.modules[-1]), rule(output, *args, **(kwargs or {}))
            self.counts[part] += macs
            if part == "heads":
                own = self.heads.part_of(self.modules[-1].removeprefix("heads").removeprefix("."))
                self.decoder[own] = self.decoder.get(own, 0) + macs
        return output


# Arguments have torch's names: they may be given by these.
def _linear(output: Tensor, input: Tensor, weight: Tensor, bias: Any = None) -> int:
    return output.numel() * weight.shape[-1]


def _convolution(output: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return output.numel() * weight[0].numel()  # weight [C_out, C_in / groups, k, k]


def _transposed(output: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return input.numel() * weight[0].numel()  # weight [C_in, C_out / groups, k, k]


def _product(output: Tensor, *factors: Tensor, **named: Tensor) -> int:
    first = factors[0] if factors else named["input"]
    return output.numel() * first.shape[-1]


def _attention(output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    scores = query[..., 0].numel() * key.shape[-2]
    return scores * (query.shape[-1] + value.shape[-1])


_RULES: dict[Any, Callable[..., int]] = {
    F.linear: _linear,
    F.conv2d: _convolution,
    F.conv_transpose2d: _transposed,
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__), _product),
}


def _router(router: Router, x: Tensor, task_ids: tuple[int, ...], *_: Any) -> int:
    once = 0
    if router.kind == "task_conditioned":
        # The task embedding and its share of a gate are the same for all tokens: once a task (Router.gate).
        embedding = [layer.weight.numel() for layer in router.task_embedding if isinstance(layer, nn.Linear)]
        once = len(task_ids) * (sum(embedding) + router.num_experts * EMBEDDING)
    return x.numel() * router.num_experts + once


def _experts(layer: MoELayer, x: Tensor, task_ids: tuple[int, ...], uses: Sequence[Use] | None, *, every: bool) -> int:
    _, B, T, D = x.shape  # R = 1 where the tasks are still the same: the ids say how many there are
    experts, hidden, _ = layer.experts.w1.shape
    uses = uses or [Use(layer.router.top_k, tuple(range(experts)), hidden)] * len(task_ids)
    return sum((len(use.kept) if every else use.top_k) * B * T * (2 * D * use.width + D) for use in uses)


def paper_parameters(model: MultiTaskModel) -> int:
    """Return the parameters counted as the memory column of M3ViT's hardware table does (82.747 MiB in fp16).

    The trunk as timm publishes it: ImageNet classifier, final norm and position embedding of its own image size. In
    the MoE blocks, experts instead of MLPs, and the gate of one task. No heads. The convention is derived: it is the
    one that gives the paper's figures to the last digit, 22,050,664 for DeiT-S (42.058 MiB) and with experts
    22,050,664 + 6 (16 x 295,680 - 1,181,568) + 6 x 384 x 16 = 43,383,400.
    """
    config = model.config
    arguments = {key: value for key, value in config.trunk_args.items() if key not in ("img_size", "num_classes")}
    with without_values():
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
    experts += ", under a budget" if "budget" in report else ""
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
    tables = [parts, each]
    if "decoder" in together:
        inside = Table(caption=f"GMAC of the {report['head']} heads, by part")
        inside.add_column("part")
        for column in (*tasks, f"{len(together['tasks'])} tasks"):
            inside.add_column(column, justify="right")
        for part in together["decoder"]:
            counted = (entry["decoder"].get(part, 0) for entry in (*tasks.values(), together))
            inside.add_row(part, *map(_giga, counted))
        tables.append(inside)
    console = Console(file=StringIO(), width=120)
    with console.capture() as capture:
        console.print(*tables)
    paper = report["as_the_paper_counts"]
    mean = ", mean over the tasks" if len(tasks) > 1 else ""
    return (
        f"{capture.get()}as M3ViT's paper counts: {paper['parameters']:,} parameters = {paper['mib_fp16']:.3f} MiB in "
        f"fp16, {paper['gmacs']:.0f} GMAC\n(parameters: the published trunk with its ImageNet classifier and image "
        f"size, experts, one task's gates,\nno heads; MACs: one task with its head{mean})"
    )


def _giga(count: int) -> str:
    return f"{count / 1e9:.2f}" if count >= 1e9 or not count else f"{count / 1e9:.3g}"
