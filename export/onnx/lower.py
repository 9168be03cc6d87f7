"""Lowering of m3vit::MoE, the one custom operator of an exported graph, to standard ONNX operators.

Form: NonZero dispatch, Split by runtime counts, one small MLP per expert, Concat, inverse Gather. Every token runs
through its own K experts only, and an expert without tokens costs nothing. The combine step is a Gather and a MatMul,
never ScatterND(reduction="add"): onnxruntime's CPU kernel for that races when rows repeat (wrong results with more
than one thread; compare microsoft/onnxruntime issue 18048).

Shapes: N tokens (batch and grid flattened), D embedding dimension, H hidden, E experts, K experts per token,
S = N * K dispatched rows, S_e those of expert e.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from m3vit.errors import InputError

DOMAIN, OPERATOR = "m3vit", "MoE"
INPUTS = ("x", "gate", "gate_bias", "w1", "b1", "w2", "b2")
MIN_OPSET = 20  # the first one with Gelu
_CHECK_LIMIT = 2**31 - 1  # protobuf serialises no message above 2 GiB


def lower_moe(graph: ModelProto) -> ModelProto:
    """Replace each m3vit::MoE node by standard operators; change `graph` in place and return it.

    Each expert's weights become 2-D initializers of their own, transposed for Gemm, named after the parameters they
    come from: the graphs of two tasks then hold identical tensors under identical names. (One stacked tensor per
    layer makes onnxruntime copy every expert when it folds constants: gigabytes at load.) What only the custom
    nodes used is dropped, as are the exporter's annotations, which quote source paths of the exporting machine.

    Raises InputError for an opset below 20 and ValueError for a node whose parameters depend on the graph's input.
    """
    opset = next((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise InputError(f"opset {opset}: give {MIN_OPSET} or later, the first with Gelu")
    values = _Values(graph)
    nodes: list[NodeProto] = []
    layer = 0
    for node in graph.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
            nodes += _expand(node, f"moe{layer}", values)
            layer += 1
        else:
            nodes.append(node)
    nodes = _reachable(nodes, [output.name for output in graph.graph.output])
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.graph.output}
    initializers = [tensor for tensor in graph.graph.initializer if tensor.name in used]
    initializers += [numpy_helper.from_array(array, name) for name, array in values.added.items() if name in used]
    for field, content in (("node", nodes), ("initializer", initializers)):
        graph.graph.ClearField(field)
        getattr(graph.graph, field).extend(content)
    standard = [entry for entry in graph.opset_import if entry.domain != DOMAIN]
    graph.ClearField("opset_import")
    graph.opset_import.extend(standard)
    strip(graph)
    check(graph)
    return graph


def strip(graph: ModelProto) -> None:
    """Drop documentation, metadata and inferred shapes: none is needed to run, and they hold paths and stack traces."""
    graph.ClearField("doc_string")
    graph.ClearField("metadata_props")
    _strip_graph(graph.graph)
    for function in graph.functions:
        for field in ("doc_string", "metadata_props", "value_info"):
            function.ClearField(field)
        for node in function.node:
            _strip_node(node)


def _strip_graph(graph: GraphProto) -> None:
    for field in ("doc_string", "metadata_props", "value_info", "quantization_annotation"):
        graph.ClearField(field)
    for item in (*graph.input, *graph.output, *graph.initializer):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: NodeProto) -> None:
    node.ClearField("doc_string")
    node.ClearField("metadata_props")
    for attribute in node.attribute:
        attribute.ClearField("doc_string")
        if attribute.HasField("g"):
            _strip_graph(attribute.g)


def check(graph: ModelProto) -> None:
    """Assert that the graph is valid, shapes included, and needs no custom operator (a defect of ours otherwise)."""
    custom = {node.domain for node in graph.graph.node} | {entry.domain for entry in graph.opset_import}
    assert custom <= {"", "ai.onnx"}, f"custom operator domains left in the graph: {sorted(custom)}"
    assert not graph.functions, "local functions left in the graph"
    # Larger ones are checked by path, once their weights are in a file of their own (package.py).
    if graph.ByteSize() < _CHECK_LIMIT:
        onnx.checker.check_model(graph, full_check=True)


class _Values:
    """Constant tensors of a graph: reads those it has, collects those that the lowering adds."""

    def __init__(self, graph: ModelProto) -> None:
        self.opsets = list(graph.opset_import)
        self.initializers = {tensor.name: tensor for tensor in graph.graph.initializer}
        self.producers = {name: node for node in graph.graph.node for name in node.output}
        self.added: dict[str, NDArray[np.generic]] = {}

    def read(self, name: str) -> NDArray[np.generic]:
        """Return the value of an initializer, or of a tensor computed from initializers alone.

        The gate of a task_conditioned router is computed: a slice of the shared gate, and a bias made of the task
        embedding. Evaluated here, the graph holds what its task needs and nothing of the others.
        """
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        nodes: list[NodeProto] = []
        constants: dict[str, TensorProto] = {}
        seen: set[str] = set()

        def visit(tensor: str) -> None:
            if not tensor or tensor in seen:
                return
            seen.add(tensor)
            if tensor in self.initializers:
                constants[tensor] = self.initializers[tensor]
            elif tensor in self.producers:
                node = self.producers[tensor]
                for source in node.input:
                    visit(source)
                if node not in nodes:
                    nodes.append(node)
            else:
                raise ValueError(f"{DOMAIN}::{OPERATOR}: its parameter {name} depends on the graph's input {tensor}")

        visit(name)
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        part = helper.make_graph(nodes, "constant", [], [result], initializer=list(constants.values()))
        evaluator = ReferenceEvaluator(helper.make_model(part, opset_imports=self.opsets))
        results: Any = evaluator.run(None, {})  # a list of arrays; annotated as more than that
        return np.asarray(results[0])

    def add(self, name: str, array: NDArray[np.generic]) -> str:
        """Add an initializer, and return its name. The same name always means the same content."""
        # np.ascontiguousarray would turn a scalar into a vector.
        self.added.setdefault(name, np.array(array, order="C"))
        return name

    def int64(self, value: int | list[int]) -> str:
        """Return the name of an int64 constant: a scalar for an int, else a vector. Layers share them."""
        text = "_".join(map(str, value)) if isinstance(value, list) else f"scalar_{value}"
        return self.add(f"m3vit.int64.{text}", np.array(value, dtype=np.int64))


class _Nodes:
    """The nodes of one layer, in order, each output named after the layer and what it is."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []

    def __call__(self, what: str, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output, and return the output's name."""
        return self.many([what], operator, *inputs, **attributes)[0]

    def many(self, what: list[str], operator: str, *inputs: str, **attributes: Any) -> list[str]:
        """Append a node with several outputs, and return their names."""
        outputs = [f"{self.prefix}/{name}" for name in what]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs


def _expand(node: NodeProto, fallback: str, values: _Values) -> list[NodeProto]:
    """Return the standard nodes that compute what one m3vit::MoE node does."""
    source = dict(zip(INPUTS, node.input, strict=True))
    top_k = next(attribute.i for attribute in node.attribute if attribute.name == "top_k")
    gate_ED, bias_E, w1_EHD, b1_EH, w2_EDH, b2_ED = (values.read(source[name]) for name in INPUTS[1:])
    E = len(w1_EHD)
    # "...blocks.1.mlp.experts.w1" -> "...blocks.1.mlp"
    bank = source["w1"].rpartition(".")[0]
    layer = bank.rpartition(".")[0] or fallback
    x_ND = source["x"]
    add, int64 = _Nodes(layer), values.int64

    # Router. TopK puts the lower index first when scores tie.
    gate = values.add(f"{layer}.router.gate.T", gate_ED.T)
    logits_NE = add("logits", "Gemm", x_ND, gate, values.add(f"{layer}.router.bias", bias_E))
    scores_NE = add("scores", "Softmax", logits_NE, axis=-1)
    weights_NK, ids_NK = add.many(["weights", "ids"], "TopK", scores_NE, int64([top_k]), axis=-1)

    # Dispatch. chosen[e, n] is 1 if token n goes to expert e, int64. NonZero lists the ones row by row, that is,
    # already grouped by expert, tokens in order: no sort needed. A token's K ids differ, so no index repeats here.
    zeros_NE = add("zeros", "ConstantOfShape", add("shape_NE", "Shape", scores_NE), value=_int64_tensor(0))
    ones_NK = add("ones", "ConstantOfShape", add("shape_NK", "Shape", ids_NK), value=_int64_tensor(1))
    chosen_NE = add("chosen_by_token", "ScatterElements", zeros_NE, ids_NK, ones_NK, axis=1)
    chosen_EN = add("chosen", "Transpose", chosen_NE, perm=[1, 0])
    counts_E = add("counts", "ReduceSum", chosen_EN, int64([1]), keepdims=0)
    tokens_S = add("tokens", "Gather", add("nonzero", "NonZero", chosen_EN), int64(1), axis=0)
    rows_SD = add("rows", "Gather", x_ND, tokens_S, axis=0)
    groups = [rows_SD]
    if E > 1:
        groups = add.many([f"rows.{expert}" for expert in range(E)], "Split", rows_SD, counts_E, axis=0)

    # Experts: [S_e, D] -> [S_e, H] -> [S_e, D], S_e may be 0.
    outputs = []
    for expert, rows in enumerate(groups):

        def linear(what: str, x: str, weight_OI: NDArray[np.generic], bias_O: NDArray[np.generic], i: int) -> str:
            name = f"{bank or fallback}.{i}.{what}"
            weight = values.add(f"{name}.weight.T", weight_OI.T)
            return add(f"expert{i}.{what}", "Gemm", x, weight, values.add(f"{name}.bias", bias_O))

        hidden = linear("fc1", rows, w1_EHD[expert], b1_EH[expert], expert)
        hidden = add(f"expert{expert}.gelu", "Gelu", hidden)
        outputs.append(linear("fc2", hidden, w2_EDH[expert], b2_ED[expert], expert))
    out_SD = add("outputs", "Concat", *outputs, axis=0)

    # Combine. The exclusive running sum of `chosen` numbers the grouped rows; token n's row for expert e is entry
    # e * N + n of it.
    flat = add("chosen_flat", "Reshape", chosen_EN, int64([-1]))  # [E * N]
    row_of = add("row_of", "CumSum", flat, int64(0), exclusive=1)  # [E * N]
    count_N = add("num_tokens", "Squeeze", add("shape_N", "Shape", x_ND, start=0, end=1))  # scalar
    range_N = add("range", "Range", int64(0), count_N, int64(1))
    range_N1 = add("column", "Unsqueeze", range_N, int64([1]))
    entries_NK = add("entries", "Add", add("expert_starts", "Mul", ids_NK, count_N), range_N1)
    positions_NK = add("positions", "Gather", row_of, entries_NK, axis=0)
    picked_NKD = add("picked", "Gather", out_SD, positions_NK, axis=0)
    weights_N1K = add("weights_row", "Unsqueeze", weights_NK, int64([1]))
    sum_N1D = add("weighted_sum", "MatMul", weights_N1K, picked_NKD)
    add("output", "Squeeze", sum_N1D, int64([1]))
    add.nodes[-1].output[0] = node.output[0]  # the rest of the graph knows it by this name
    return add.nodes


def _int64_tensor(value: int) -> TensorProto:
    """Return the one-element tensor that ConstantOfShape takes as its attribute."""
    return helper.make_tensor("value", TensorProto.INT64, [1], [value])


def _reachable(nodes: list[NodeProto], outputs: list[str]) -> list[NodeProto]:
    """Return the nodes that the outputs depend on, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(name for name in node.input if name)
            for attribute in node.attribute:  # a subgraph (If, Loop) reads tensors of the graph around it
                wanted.update(name for inner in attribute.g.node for name in inner.input if name)
    return kept[::-1]
