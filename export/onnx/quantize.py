"""Weights of fewer bytes: linear layers in 8-bit integers, experts in 4 bits, or all weights stored in half precision.

Of integers: quantised as they run, signed weights per output channel, inputs per tensor.

Dynamic: the range of an input is measured in each run, so nothing has to be calibrated. Standard operators only
(DynamicQuantizeLinear, MatMulInteger), which onnxruntime fuses. What is quantised, by name:

- int8: every linear layer but the routers. A router's output decides; rounding it would change the decision.
- int8-mixed: the same, but neither the attention in front of a router nor the head, which ends in the prediction.
- int8-experts: the experts alone, most of the bytes of a package.
- int4-experts: as int8, but weights of experts have 4 bits and a scale for each 128 of an output, in onnxruntime's own
  operator (MatMulNBits), whose products are of 8 bits. Fewer bytes, more time.

fp16 quantises nothing: weights are stored in half the bytes, and made float32 when the graph is loaded.

The experts of a layer have their rows quantised together, before the first linear map and, their hidden units joined
for one GELU, before the second: a small product each that also finds a range of its own costs more on several threads.

On x86 processors without VNNI instructions onnxruntime adds pairs of products of 8 bits in 16, which can saturate,
unless a session is told otherwise: `m3vit.export.runtime.ort.session_options` does.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from m3vit.errors import InputError
from m3vit.export.onnx.attention import FUSED_DOMAIN
from m3vit.export.onnx.lower import check, reachable
from m3vit.export.runtime.manifest import FLOAT as FLOAT
from m3vit.export.runtime.manifest import HALF
from m3vit.export.runtime.manifest import PRECISIONS as PRECISIONS

BLOCK = 128  # weights that have one scale, of those in 4 bits
_MIDDLE = 8  # of the unsigned 4 bits, which stands for 0
MIN_WEIGHT = 1024  # elements; below, the integer product costs more than it saves

_EXPERT = re.compile(r"blocks\.(\d+)\.mlp\.experts\.")
_EXPERT_NODE = re.compile(r"(.*)/expert\d+\.(fc1|gelu|fc2)$")  # as lower.py names them
_HEAD = re.compile(r"(^|\.)heads\.")


def quantize(graph: ModelProto, precision: str, *, required: bool = True) -> ModelProto:
    """Quantise a lowered graph, in place, and return it; `precision` is one of PRECISIONS (fp32: nothing to do).

    Raises InputError for another precision and, if `required`, for a graph without a layer to quantise.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}: choose from {', '.join(PRECISIONS)}")
    if precision == FLOAT:
        return graph
    if precision == HALF:
        return store_halves(graph)
    weights = {tensor.name: tensor for tensor in graph.graph.initializer if len(tensor.dims) == 2}
    routed = {match[1] for name in weights if (match := _EXPERT.search(name))}
    join_experts(graph)
    quantised = _Quantiser(graph)
    for node in graph.graph.node:
        weight = weights.get(node.input[1]) if _is_linear(node) else None
        if weight is not None and _selected(precision, node, weight, routed):
            if precision == "int4-experts" and _EXPERT.search(weight.name):
                quantised.in_blocks(node, weight)
            else:
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


def quantize_blocks(weight_IO: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return weights in 4 bits as MatMulNBits has them, [O, blocks, BLOCK / 2], and the blocks' scales [O, blocks].

    A weight is about (bits - 8) * scale; of two in a byte the first is the lower half. A last block is filled up.
    """
    count = -(-len(weight_IO) // BLOCK)
    padded = np.zeros((weight_IO.shape[1], count * BLOCK), np.float32)
    padded[:, : len(weight_IO)] = weight_IO.T
    blocks = padded.reshape(-1, count, BLOCK)
    # The largest becomes -8, which the positive side lacks.
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
    scale = np.where(largest == 0, 1, largest / -_MIDDLE).astype(np.float32)
    bits = np.clip(np.rint(blocks / scale) + _MIDDLE, 0, 2 * _MIDDLE - 1).astype(np.uint8)
    return bits[:, :, ::2] | bits[:, :, 1::2] << 4, scale[:, :, 0]


def store_halves(graph: ModelProto) -> ModelProto:
    """Store a graph's larger float32 tensors in half precision, each with a Cast to what it was; in place."""
    casts = []
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= MIN_WEIGHT:
            name, values = tensor.name, numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):  # what is too large becomes infinite, which export_package refuses
                tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.fp16"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.graph.node]
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)
    check(graph)
    return graph


def join_experts(graph: ModelProto) -> None:
    """Give the experts of each layer one GELU over all their rows, in place; layers of one expert stay as they are."""
    layers: dict[str, dict[str, list[NodeProto]]] = {}
    for node in graph.graph.node:
        if found := _EXPERT_NODE.match(node.name):
            layers.setdefault(found[1], {"fc1": [], "gelu": [], "fc2": []})[found[2]].append(node)
    producers = {name: node for node in graph.graph.node for name in node.output}
    nodes, joined = [], set()
    for node in graph.graph.node:
        found = _EXPERT_NODE.match(node.name)
        parts = layers[found[1]] if found else {"fc1": []}
        if found is None or len(parts["fc1"]) < 2:
            nodes.append(node)
        elif found[1] not in joined:
            layer, counts = found[1], producers[parts["fc1"][0].input[0]].input[1]
            joined.add(layer)
            hidden, gelu = f"{layer}/hidden", f"{layer}/gelu"
            nodes += parts["fc1"]
            nodes.append(helper.make_node("Concat", [one.output[0] for one in parts["fc1"]], [hidden], hidden, axis=0))
            nodes.append(helper.make_node("Gelu", [hidden], [gelu], gelu))
            outputs = [one.output[0] for one in parts["gelu"]]
            nodes.append(helper.make_node("Split", [gelu, counts], outputs, f"{layer}/gelus", axis=0))
            nodes += parts["fc2"]
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)


Quantise = Callable[[NDArray[np.float32]], tuple[NDArray[Any], NDArray[Any]]]  # to integers and scales


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

    def weight(self, weight: TensorProto, quantise: Quantise, *endings: str) -> list[str]:
        """Return the names of a weight's integers and scales, made once for all its users."""
        names = [f"{weight.name}.{ending}" for ending in endings]
        if names[0] not in self.added:
            for name, values in zip(names, quantise(numpy_helper.to_array(weight)), strict=True):
                self.added[name] = numpy_helper.from_array(values, name)
        return names

    def linear(self, node: NodeProto, weight: TensorProto) -> None:
        """Put the integer product, and what turns it into floats again, in the place of a linear layer."""
        integers, scale = self.weight(weight, quantize_weight, "int8", "scale")
        x_q, x_scale, x_zero = self.input(node.input[0])
        (y,) = node.output
        product = self.node("MatMulInteger", [x_q, integers, x_zero], [f"{y}.product"])
        floats = self.node("Cast", [product], [f"{y}.floats"], to=TensorProto.FLOAT)
        scales = self.node("Mul", [x_scale, scale], [f"{y}.scale"])
        if len(node.input) == 2:
            self.node("Mul", [floats, scales], [y])
        else:
            self.node("Add", [self.node("Mul", [floats, scales], [f"{y}.unbiased"]), node.input[2]], [y])

    def in_blocks(self, node: NodeProto, weight: TensorProto) -> None:
        """Put onnxruntime's product with weights of 4 bits in the place of a linear layer."""
        bits, scale = self.weight(weight, quantize_blocks, "int4", "int4_scale")
        inputs = [node.input[0], bits, scale, *(["", "", node.input[2]] if len(node.input) > 2 else [])]
        sizes = {"K": weight.dims[0], "N": weight.dims[1], "bits": 4, "block_size": BLOCK}
        # Level 4: inputs are rounded to 8 bits as well, by row, and products are of integers.
        options = {"domain": FUSED_DOMAIN, "accuracy_level": 4}
        self.node("MatMulNBits", inputs, [node.output[0]], **sizes, **options)

    def input(self, x: str) -> tuple[str, str, str]:
        """Return the names of a tensor's integers, scale and zero point, once for all its users.

        The rows of the experts of one layer are quantised before they are split, and before they are dispatched: once
        for all, and a quarter of the bytes to move.
        """
        if x in self.inputs:
            return self.inputs[x]
        split = self.producers.get(x)
        rows = self.producers.get(split.input[0]) if split is not None and split.op_type == "Split" else None
        if split is not None and rows is not None and rows.op_type in ("Gather", "Gelu"):
            if rows.op_type == "Gather":
                tokens, scale, zero = self.input(rows.input[0])
                whole = self.node("Gather", [tokens, rows.input[1]], [f"{rows.output[0]}.int8"], axis=0)
            else:
                whole, scale, zero = self.input(rows.output[0])
            outputs = [f"{name}.int8" for name in split.output]
            self.node("Split", [whole, split.input[1]], outputs, axis=0)
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
        domains = {entry.domain for entry in self.graph.opset_import}
        if FUSED_DOMAIN not in domains and any(node.domain == FUSED_DOMAIN for node in nodes):
            self.graph.opset_import.append(helper.make_opsetid(FUSED_DOMAIN, 1))
