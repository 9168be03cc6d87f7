"""Linear layers in 8-bit integers, quantised as they run: signed weights per output channel, inputs per tensor.

Dynamic: the range of an input is measured in each run, so nothing has to be calibrated. Standard operators only
(DynamicQuantizeLinear, MatMulInteger), which onnxruntime fuses. What is quantised, by name:

- int8: every linear layer but the routers. A router's output decides; rounding it would change the decision.
- int8-mixed: the same, but neither the attention in front of a router nor the head, which ends in the prediction.
- int8-experts: the experts alone, most of the bytes of a package.

On x86 processors without VNNI instructions onnxruntime adds pairs of products of 8 bits in 16, which can saturate:
there, `m3vit.export.runtime.package` warns.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from m3vit.errors import InputError
from m3vit.export.onnx.lower import check, reachable
from m3vit.export.runtime.manifest import FLOAT as FLOAT
from m3vit.export.runtime.manifest import PRECISIONS as PRECISIONS

MIN_WEIGHT = 1024  # elements; below, the integer product costs more than it saves

_EXPERT = re.compile(r"blocks\.(\d+)\.mlp\.experts\.")
_HEAD = re.compile(r"(^|\.)heads\.")


def quantize(graph: ModelProto, precision: str, *, required: bool = True) -> ModelProto:
    """Quantise a lowered graph, in place, and return it; `precision` is one of PRECISIONS (fp32: nothing to do).

    Raises InputError for another precision and, if `required`, for a graph without a layer to quantise.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}: choose from {', '.join(PRECISIONS)}")
    if precision == FLOAT:
        return graph
    weights = {tensor.name: tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2}
    routed = {match[1] for name in weights if (match := _EXPERT.search(name))}
    quantised = _Quantiser(graph)
    for node in graph.graph.node:
        weight = weights.get(node.input[1]) if _is_linear(node) else None
        if weight is not None and _selected(precision, node, weight, routed):
            quantised.linear(node, weight)
        else:
            quantised.nodes.append(node)
    if not quantised.added and not required:
        return graph
    if not quantised.added:
        raise InputError(f"nothing to quantise to {precision}: the model has no such layer; export it in fp32")
    quantised.finish()
    check(graph)
    return graph


def _is_linear(node: NodeProto) -> bool:
    """Return whether a node is x @ W (+ b) and nothing more."""
    if node.op_type == "MatMul":
        return True
    neutral = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return node.op_type == "Gemm" and all(neutral[name] == value for name, value in attributes.items())


def _selected(precision: str, node: NodeProto, weight: TensorProto, routed: set[str]) -> bool:
    """Return whether a precision quantises a linear layer; `routed`: the numbers of the blocks with experts."""
    if weight.data_type != TensorProto.FLOAT or np.prod(weight.dims) < MIN_WEIGHT or ".router." in weight.name:
        return False
    if precision == "int8-experts":
        return bool(_EXPERT.search(weight.name))
    if precision == "int8-mixed":
        feeds_router = any(f"blocks.{block}.attn." in weight.name for block in routed)
        return not feeds_router and not _HEAD.search(weight.name)
    return True


def quantize_weight(weight_IO: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return signed 8-bit weights [I, O], -127 to 127, and their scales [O]: weight is about ints * scale."""
    largest = np.abs(weight_IO).max(axis=0)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight_IO / scale).astype(np.int8), scale


class _Quantiser:
    """Builds the nodes of a quantised graph, in order."""

    def __init__(self, graph: ModelProto) -> None:
        self.graph = graph
        self.nodes: list[NodeProto] = []
        self.added: dict[str, TensorProto] = {}
        self.inputs: dict[str, tuple[str, str, str]] = {}  # tensor -> its integers, scale, zero point
        self.producers = {name: node for node in graph.graph.node for name in node.output}

    def node(self, operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def linear(self, node: NodeProto, weight: TensorProto) -> None:
        """Put the integer product, and what turns it into floats again, in the place of a linear layer."""
        integers, scale = f"{weight.name}.int8", f"{weight.name}.scale"
        if integers not in self.added:
            w_q, w_scale = quantize_weight(numpy_helper.to_array(weight))
            self.added[integers] = numpy_helper.from_array(w_q, integers)
            self.added[scale] = numpy_helper.from_array(w_scale, scale)
        x_q, x_scale, x_zero = self.input(node.input[0])
        (y,) = node.output
        product = self.node("MatMulInteger", [x_q, integers, x_zero], [f"{y}.product"])
        floats = self.node("Cast", [product], [f"{y}.floats"], to=TensorProto.FLOAT)
        scales = self.node("Mul", [x_scale, scale], [f"{y}.scale"])
        if len(node.input) == 2:
            self.node("Mul", [floats, scales], [y])
        else:
            self.node("Add", [self.node("Mul", [floats, scales], [f"{y}.unbiased"]), node.input[2]], [y])

    def input(self, x: str) -> tuple[str, str, str]:
        """Return the names of a tensor's integers, scale and zero point, once for all its users.

        The rows of the experts of one layer are quantised before they are dispatched: once for all, and a quarter of
        the bytes to move.
        """
        if x in self.inputs:
            return self.inputs[x]
        split = self.producers.get(x)
        rows = self.producers.get(split.input[0]) if split is not None and split.op_type == "Split" else None
        if split is not None and rows is not None and rows.op_type == "Gather":
            tokens, scale, zero = self.input(rows.input[0])
            gathered = self.node("Gather", [tokens, rows.input[1]], [f"{rows.output[0]}.int8"], axis=0)
            outputs = [f"{name}.int8" for name in split.output]
            self.node("Split", [gathered, split.input[1]], outputs, axis=0)
            self.inputs |= {name: (f"{name}.int8", scale, zero) for name in split.output}
        else:
            outputs = [f"{x}.int8", f"{x}.int8_scale", f"{x}.int8_zero"]
            self.node("DynamicQuantizeLinear", [x], outputs)
            self.inputs[x] = (outputs[0], outputs[1], outputs[2])
        return self.inputs[x]

    def finish(self) -> None:
        """Replace the nodes and the tensors of the graph by those still needed."""
        graph = self.graph.graph
        nodes = reachable(self.nodes, [output.name for output in graph.output])
        used = {name for node in nodes for name in node.input}
        tensors = [tensor for tensor in (*graph.initializer, *self.added.values()) if tensor.name in used]
        for name, content in (("node", nodes), ("initializer", tensors)):
            graph.ClearField(name)
            getattr(graph, name).extend(content)
