"""Export of one task of a model to one ONNX graph."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.export.onnx.lower import DOMAIN, INPUTS, MIN_OPSET, OPERATOR, lower_moe
from m3vit.models.multitask import MultiTaskModel

MAX_OPSET = 23  # the last that the exporter and onnxruntime were tested with


class _OneTask(nn.Module):
    """The model as a function of the image alone."""

    def __init__(self, model: MultiTaskModel, task: str) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image, [self.task]).logits[self.task]


def export_task(
    model: MultiTaskModel, task: str, *, opset: int = 20, size: tuple[int, int] | None = None
) -> onnx.ModelProto:
    """Return the graph of one task, standard operators only, weights inside.

    Input `image` [B, 3, H, W] float32, normalised RGB; output, named like the task, [B, C, H, W] float32 logits.
    B is dynamic; H and W are too (multiples of the patch size), unless `size` = (height, width) in pixels fixes them.

    Raises InputError for an unknown task, a `size` that the patch size does not divide, and an unsupported opset.
    """
    model.task_id(task)
    patch = model.backbone.patch_size
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError(f"opset is {opset}: give {MIN_OPSET} to {MAX_OPSET}")
    if size is not None and (min(size) < patch or size[0] % patch or size[1] % patch):
        raise InputError(f"size is {size[0]}x{size[1]}: give positive multiples of the patch size {patch}")
    dynamic = torch.export.Dim.DYNAMIC
    axes = {0: dynamic} if size else {0: dynamic, 2: dynamic, 3: dynamic}
    device = next(model.parameters()).device
    example = torch.zeros(2, 3, *(size or _example_size(model)), device=device)
    was_training = model.training
    try:
        with torch.no_grad(), _quiet(), _moe_schema():
            program = torch.onnx.export(
                _OneTask(model, task).eval(),
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["image"],
                output_names=[task],
                dynamic_shapes=(axes,),
                custom_translation_table={torch.ops.m3vit.moe.default: _moe_node},
            )
    finally:
        model.train(was_training)
    assert program is not None
    graph = program.model_proto
    graph.graph.name = f"m3vit_{task}"
    for value in (*graph.graph.input, *graph.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
            if axis in axes:
                dimensions[axis].dim_param = name
    return lower_moe(graph)


def _example_size(model: MultiTaskModel) -> tuple[int, int]:
    """Return an image size whose sides are neither equal, nor the trained ones, nor a single patch.

    The exporter takes what its example has by chance (equal sides, the trained size) for a law, without a word.
    """
    trained = [side // model.backbone.patch_size for side in model.config.image_size]
    rows, columns = [side for side in (5, 7, 9, 11) if side not in trained][:2]
    return rows * model.backbone.patch_size, columns * model.backbone.patch_size


_MOE = Opset(DOMAIN, 1)


def _moe_node(x: Any, gate: Any, gate_bias: Any, w1: Any, b1: Any, w2: Any, b2: Any, top_k: int) -> Any:
    """Translate m3vit::moe to one node of the same inputs; `lower_moe` does the rest."""
    return _MOE.MoE(x, gate, gate_bias, w1, b1, w2, b2, top_k=top_k)


@contextmanager
def _moe_schema() -> Iterator[None]:
    """Make m3vit::MoE known while exporting: the exporter builds no node of an operator without a schema."""
    schema = OpSchema(
        OPERATOR,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(name, "T") for name in INPUTS],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute("top_k", OpSchema.AttrType.INT, "", required=True)],
    )
    onnx.defs.register_schema(schema)
    try:
        yield
    finally:
        onnx.defs.deregister_schema(OPERATOR, 1, DOMAIN)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings and progress, which are about its own workings, while exporting."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
