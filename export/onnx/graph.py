"""Tracing of the tasks of a model, or of its parts, to ONNX graphs."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.export.onnx.exporter import TRANSLATIONS, exporter, shapes_alone
from m3vit.export.onnx.lower import copied, lower_moe, reachable
from m3vit.export.onnx.options import MAX_OPSET, MIN_OPSET
from m3vit.export.onnx.simplify import without_decomposing
from m3vit.export.onnx.widths import narrow_mlps
from m3vit.models.budget import FULL, Budget, Uses
from m3vit.models.decoders.base import Features
from m3vit.models.multitask import MultiTaskModel, of_decoder

NUMBER = "task.number"  # no name of a task


class _Tasks(nn.Module):
    """The model as a function of the image and the number of a task: what each head makes of that task's tokens.

    `budget`: what it says of blocks that are left out and of the decoder; lowering does the rest.
    """

    def __init__(self, model: MultiTaskModel, tasks: Sequence[str], budget: Budget) -> None:
        super().__init__()
        self.model, self.tasks, self.skip = model, tasks, budget.left_out
        self.used = of_decoder(model.uses(budget, tasks))

    def forward(self, image: Tensor, task: Tensor) -> tuple[Tensor, ...]:
        features, _ = self.model.backbone(image, task, self.model.heads.blocks, _without(self.skip))
        size = (image.shape[-2], image.shape[-1])
        return tuple(self.model.heads(features, {name: size}, **self.used).logits[name] for name in self.tasks)


def _without(skip: Sequence[int]) -> Uses | None:
    """Return all of the model but some blocks, as it is traced: what else a budget leaves out, lowering does."""
    return Uses([], dict.fromkeys(skip, 0)) if skip else None


def traced_of(model: MultiTaskModel, budget: Budget) -> str:
    """Return what of a budget tells traced graphs of a model apart."""
    return repr((budget.left_out, of_decoder(model.uses(budget, model.config.tasks))))


class _AllTasks(nn.Module):
    """The model as a function of the image alone: the logits of some tasks, what they have in common computed once."""

    def __init__(self, model: MultiTaskModel, tasks: Sequence[str], budget: Budget) -> None:
        super().__init__()
        self.model, self.tasks, self.skip = model, tasks, budget.left_out
        self.used = of_decoder(model.uses(budget, tasks))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        ids = tuple(self.model.task_id(task) for task in self.tasks)
        features, _ = self.model.backbone(image, ids, self.model.heads.blocks, _without(self.skip))
        size = (image.shape[-2], image.shape[-1])
        logits = self.model.heads(features, dict.fromkeys(self.tasks, size), **self.used).logits
        return tuple(logits[name] for name in self.tasks)


class _Features(nn.Module):
    """The backbone as a function of the image and the number of the task; its tokens as a map [B, L * D, h, w]."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, task: Tensor) -> Tensor:
        features, _ = self.model.backbone(image, task, self.model.heads.blocks)
        return features.as_map()


class _Head(nn.Module):
    """The decoder of one task as a function of that map."""

    def __init__(self, model: MultiTaskModel, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, features: Tensor) -> Tensor:
        grid = (features.shape[-2], features.shape[-1])
        patch = self.model.backbone.patch_size
        blocks = tapped(self.model)
        maps = features.chunk(len(blocks), dim=1) if len(blocks) > 1 else [features]
        parts = (one.flatten(2).mT[None] for one in maps)
        tokens = Features(dict(zip(blocks, parts, strict=True)), 1, grid, patch)
        return self.model.heads(tokens, {self.task: (grid[0] * patch, grid[1] * patch)}).logits[self.task]


def tapped(model: MultiTaskModel) -> list[int]:
    """Return the indices of the blocks whose tokens the decoder reads."""
    return sorted(set(model.heads.blocks)) or [len(model.backbone.trunk.blocks) - 1]


def require_onnx(model: MultiTaskModel) -> None:
    """Raise InputError if the model's decoder cannot be exported to ONNX."""
    if reason := model.heads.no_onnx:
        raise InputError(f"cannot export to ONNX: the model has {model.config.head} heads, and {reason}")


def trace_tasks(
    model: MultiTaskModel,
    tasks: Sequence[str],
    *,
    opset: int = MIN_OPSET,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    budget: Budget = FULL,
) -> onnx.ModelProto:
    """Return one graph of several tasks, for `of_task` to take each task's out of: tracing is what takes long.

    What differs between tasks are their gates, picked by the task's number as in `trace_backbone`, and their heads.
    Inputs `image` and NUMBER (int64 [1]); an output for each task, of its name. Of the `budget`, tracing needs the
    blocks that are left out, and what tasks use of the decoder. The rest as in `trace_task`.
    """
    image, axes = _image_of(model, tasks, opset, size, batch)
    inputs = {"image": image, NUMBER: _zeros(model, 1).long()}
    return _trace(model, _Tasks(model, tasks, budget), inputs, axes, tasks, opset, traced_of(model, budget))


def trace_all_tasks(
    model: MultiTaskModel,
    tasks: Sequence[str],
    *,
    opset: int = MIN_OPSET,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    budget: Budget = FULL,
) -> onnx.ModelProto:
    """Return the graph of several tasks at once: `image` -> logits of each, outputs named like the tasks.

    What comes before the first MoE layer is computed once; behind it the tokens of all tasks are one batch, of which
    each expert gets its own at a time, as in training. `budget` as in `trace_tasks`, the rest as in `trace_task`.
    """
    image, axes = _image_of(model, tasks, opset, size, batch)
    return _trace(
        model, _AllTasks(model, tasks, budget), {"image": image}, axes, tasks, opset, traced_of(model, budget)
    )


def tracer(model: MultiTaskModel, tasks: Sequence[str], **shape: Any) -> Callable[..., onnx.ModelProto]:
    """Return `trace_tasks` of these tasks as a function of a budget, or with `at_once` `trace_all_tasks`.

    Budgets that trace alike are traced once. `shape`: opset, size and batch.
    """
    found: dict[tuple[str, bool], onnx.ModelProto] = {}

    def traced(budget: Budget = FULL, at_once: bool = False) -> onnx.ModelProto:
        key = traced_of(model, budget), at_once
        if key not in found:
            found[key] = (trace_all_tasks if at_once else trace_tasks)(model, tasks, budget=budget, **shape)
        return found[key]

    return traced


def _image_of(
    model: MultiTaskModel, tasks: Sequence[str], opset: int, size: tuple[int, int] | None, batch: int | None
) -> tuple[Tensor, list[tuple[int, str]]]:
    """Return an image to trace these tasks with, and its dynamic axes; errors as of `trace_task`."""
    require_onnx(model)
    for task in tasks:
        model.task_id(task)
    shape = _example_shape(model, opset, size)
    return _zeros(model, batch or 2, 3, *shape), _axes(size, batch)


def _axes(size: tuple[int, int] | None, batch: int | None = None) -> list[tuple[int, str]]:
    """Return the dynamic axes of 4-D inputs, and their names: all that nothing fixes."""
    return [(0, "batch"), (2, "height"), (3, "width")][bool(batch) : 1 if size else None]


def of_task(traced: onnx.ModelProto, model: MultiTaskModel, task: str) -> onnx.ModelProto:
    """Return the graph of one task, `image` -> its logits, out of `trace_tasks`'s, which stays as it is.

    The number of the task becomes a constant. `lower_moe` computes the gate from it, and drops what the task's graph
    does not need of the others.
    """
    graph = copied(traced)
    graph.graph.name = f"m3vit_{task}"
    nodes = reachable(list(graph.graph.node), [task])
    inputs = [value for value in graph.graph.input if value.name != NUMBER]
    outputs = [value for value in graph.graph.output if value.name == task]
    for name, content in (("node", nodes), ("input", inputs), ("output", outputs)):
        graph.graph.ClearField(name)
        getattr(graph.graph, name).extend(content)
    graph.graph.initializer.append(numpy_helper.from_array(np.array([model.task_id(task)]), NUMBER))
    return graph


def trace_task(
    model: MultiTaskModel,
    task: str,
    *,
    opset: int = MIN_OPSET,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
) -> onnx.ModelProto:
    """Return the graph of one task as traced: MoE layers are single nodes, for `lower_moe` to expand.

    Input `image` [B, 3, H, W] float32, normalised RGB; output, named like the task, [B, C, H, W] float32 logits.
    B is dynamic, unless `batch` fixes it; H and W are too (multiples of the patch size), unless `size` = (height,
    width) in pixels fixes them. Weights are inside.

    Raises InputError for an unknown task, a `size` that the patch size does not divide, and an unsupported opset.
    """
    return of_task(trace_tasks(model, [task], opset=opset, size=size, batch=batch), model, task)


def export_task(
    model: MultiTaskModel,
    task: str,
    *,
    opset: int = MIN_OPSET,
    size: tuple[int, int] | None = None,
    budget: Budget = FULL,
    form: str = "sparse",
    attention: str = "standard",
) -> onnx.ModelProto:
    """Return the graph of one task: `trace_task`, then `lower_moe`, which say the rest."""
    traced = of_task(trace_tasks(model, [task], opset=opset, size=size, budget=budget), model, task)
    narrow_mlps(traced, model, budget.width)
    return lower_moe(traced, budget.layers(task, model.backbone.moe_indices), form, attention)


def trace_backbone(
    model: MultiTaskModel, *, opset: int = MIN_OPSET, size: tuple[int, int] | None = None
) -> onnx.ModelProto:
    """Return the backbone of all tasks as traced: `image`, `task` (int64 [1], its number) -> `features`
    [B, L * D, h, w], the L blocks that the decoder reads one after the other.

    What differs between tasks, the gates, is picked at run time. Sizes, opset and errors as in `trace_task`.
    """
    shape = _example_shape(model, opset, size)
    inputs = {"image": _zeros(model, 2, 3, *shape), "task": _zeros(model, 1).long()}
    return _trace(model, _Features(model), inputs, _axes(size), ["features"], opset)


def trace_head(
    model: MultiTaskModel, task: str, *, opset: int = MIN_OPSET, size: tuple[int, int] | None = None
) -> onnx.ModelProto:
    """Return the head of one task: `features` [B, L * D, h, w] -> logits [B, C, H, W], named like the task."""
    model.task_id(task)
    patch, dim = model.backbone.patch_size, model.backbone.dim * len(tapped(model))
    grid = [side // patch for side in _example_shape(model, opset, size)]
    inputs = {"features": _zeros(model, 2, dim, *grid)}
    return _trace(model, _Head(model, task), inputs, _axes(size), [task], opset)


def _zeros(model: MultiTaskModel, *shape: int) -> Tensor:
    return torch.zeros(*shape, device=next(model.parameters()).device)


def _trace(
    model: MultiTaskModel,
    function: nn.Module,
    inputs: dict[str, Tensor],
    axes: list[tuple[int, str]],
    outputs: Sequence[str],
    opset: int,
    used: str = "",
) -> onnx.ModelProto:
    """Return the graph of `function`; `axes` of its 4-D inputs are dynamic, and named in the graph.

    `used`: what it uses of the model, if not all (`traced_of`), which tells it from others.
    """
    dynamic = {axis: torch.export.Dim.DYNAMIC for axis, _ in axes}
    was_training = model.training
    try:
        with torch.no_grad(), exporter():
            with shapes_alone():
                traced = torch.export.export(
                    function.eval(),
                    tuple(inputs.values()),
                    dynamic_shapes=tuple(dynamic if value.ndim == 4 else None for value in inputs.values()),
                    strict=False,
                )
            program = torch.onnx.export(
                without_decomposing(traced),
                (),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                custom_translation_table=TRANSLATIONS,
            )
    finally:
        model.train(was_training)
    assert program is not None
    graph = program.model_proto
    graph.graph.name = f"m3vit_{'_'.join(outputs)}"
    for value in (*graph.graph.input, *graph.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        for axis, name in axes if len(dimensions) == 4 else []:
            # A feature map's sides count patches, an image's pixels.
            dimensions[axis].dim_param = (
                {"height": "rows", "width": "columns"}.get(name, name) if (value.name == "features") else name
            )
    name_folded(graph, model)
    return graph


def name_folded(graph: onnx.ModelProto, model: nn.Module) -> None:
    """Name the transposed weights that the exporter folded (`val_40`) after their parameters (`....qkv.weight.T`).

    Their numbers change with everything before them: a name of the content is the same in every task's graph, and
    says what a tensor is.
    """
    parameters: dict[bytes, tuple[tuple[int, ...], str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            transposed = np.ascontiguousarray(parameter.detach().cpu().numpy().T)
            parameters.setdefault(hashlib.sha256(transposed.tobytes()).digest(), (transposed.shape, f"model.{name}.T"))
    taken = {tensor.name for tensor in graph.graph.initializer}
    renamed: dict[str, str] = {}
    for tensor in graph.graph.initializer:
        if (
            len(tensor.dims) == 2
            and tensor.data_type == onnx.TensorProto.FLOAT
            and not tensor.name.startswith("model.")
        ):
            data = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
            shape, name = parameters.get(hashlib.sha256(data).digest(), ((), ""))
            if shape == tuple(tensor.dims) and name not in taken:
                renamed[tensor.name] = name
                taken.add(name)
                tensor.name = name
    for node in graph.graph.node:
        for place, name in enumerate(node.input):
            if name in renamed:
                node.input[place] = renamed[name]


def _example_shape(model: MultiTaskModel, opset: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the image size to trace with, or raise InputError for an opset or a size that cannot be exported."""
    patch = model.backbone.patch_size
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError(f"opset is {opset}: give {MIN_OPSET} to {MAX_OPSET}")
    if size is not None and (min(size) < patch or size[0] % patch or size[1] % patch):
        raise InputError(f"size is {size[0]}x{size[1]}: give positive multiples of the patch size {patch}")
    return size or _example_size(model)


def _example_size(model: MultiTaskModel) -> tuple[int, int]:
    """Return an image size whose sides are neither equal, nor the trained ones, nor a single patch.

    The exporter takes what its example has by chance (equal sides, the trained size) for a law, without a word.
    """
    trained = [side // model.backbone.patch_size for side in model.config.image_size]
    rows, columns = [side for side in (5, 7, 9, 11) if side not in trained][:2]
    return rows * model.backbone.patch_size, columns * model.backbone.patch_size
