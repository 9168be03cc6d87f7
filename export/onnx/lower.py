"""Lowering of m3vit::MoE, a custom operator of an exported graph, to standard ONNX operators; with it attention.py.

Two forms. `sparse`: NonZero dispatch, Split by runtime counts, one small MLP per expert, Concat, inverse Gather. Every
token runs through its own K experts only, and an expert without tokens costs nothing. The combine step is a Gather and
a MatMul, never ScatterND(reduction="add"): onnxruntime's CPU kernel for that races when rows repeat (wrong results with
more than one thread; compare microsoft/onnxruntime issue 18048). `wide`: all experts as one MLP of E * H hidden units,
each expert's scaled by its weight, which is 0 unless it was chosen. E / K times the arithmetic, but no shape depends on
the data: for compilers that need that.

Shapes: N tokens (batch and grid flattened), D embedding dimension, H hidden, E experts, K experts per token,
S = N * K dispatched rows, S_e those of expert e.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from m3vit.errors import InputError
from m3vit.export.onnx.attention import FUSED_DOMAIN, drop_round_trips, lower_attention
from m3vit.export.onnx.attention import OPERATOR as ATTENTION
from m3vit.export.onnx.options import MIN_OPSET
from m3vit.models.budget import LayerBudget

DOMAIN, OPERATOR = "m3vit", "MoE"
INPUTS = ("x", "gate", "gate_bias", "w1", "b1", "w2", "b2")
FORMS = ("sparse", "wide")
LayerBudgets = LayerBudget | Sequence[LayerBudget]
_NEVER = -1e30  # added to a logit: chosen after all others, and still a number
_CHECK_LIMIT = 2**31 - 1  # protobuf serialises no message above 2 GiB


def lower_moe(
    graph: ModelProto,
    budgets: Sequence[LayerBudgets] = (),
    form: str = "sparse",
    attention: str = "standard",
    nested: bool = False,
) -> ModelProto:
    """Replace each m3vit::MoE node by standard operators, in one of FORMS; change `graph` in place and return it.

    `attention`: the form of m3vit::Attention nodes (attention.py).

    `nested`: weights are such that those of another width are a beginning of the same bytes. In the sparse form experts
    have their first as [H, D]; convolutions with some of their channels have all columns, and the graph takes some.

    `budgets`: what the graph holds and uses of its MoE layers, in their order; none: all, as trained. Of a layer of
    several tasks (a gate [R, E, D], tokens [R * N, D]), one for each task.

    In the sparse form, each expert's weights become 2-D initializers of their own, transposed for Gemm, named after the
    parameters they come from: the graphs of two tasks then hold identical tensors under identical names. (One stacked
    tensor per layer makes onnxruntime copy every expert when it folds constants: gigabytes at load.) What only the
    custom nodes used is dropped, as are the exporter's annotations, which quote source paths of the exporting machine.

    A gate may depend on the graph's input (the task, in a graph of all tasks); it is then computed at run time.

    Raises InputError for an opset below 20, or a budget that a layer cannot keep to (`LayerBudget.resolve`); ValueError
    for an expert's parameter that depends on the graph's input.
    """
    if form not in FORMS:
        raise InputError(f"form is {form!r}: choose from {', '.join(FORMS)}")
    opset = next((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise InputError(f"opset {opset}: give {MIN_OPSET} or later, the first with Gelu")
    _fold_convolutions(graph, nested)
    values = _Values(graph)
    nodes: list[NodeProto] = []
    layer = 0
    for node in graph.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
            nodes += _Layer(node, layer, budgets[layer] if budgets else LayerBudget(), values, nested).expand(form)
            layer += 1
        elif (node.domain, node.op_type) == (DOMAIN, ATTENTION):
            nodes += lower_attention(node, attention, values, _Nodes(node.output[0]))
        else:
            nodes.append(node)
    if attention == "fused":
        drop_round_trips(nodes)
    nodes = reachable(nodes, [output.name for output in graph.graph.output])
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.graph.output}
    initializers = [tensor for tensor in graph.graph.initializer if tensor.name in used]
    initializers += [numpy_helper.from_array(array, name) for name, array in values.added.items() if name in used]
    for name, content in (("node", nodes), ("initializer", initializers)):
        graph.graph.ClearField(name)
        getattr(graph.graph, name).extend(content)
    domains = {node.domain for node in nodes}
    kept = [entry for entry in graph.opset_import if entry.domain != DOMAIN]
    graph.ClearField("opset_import")
    graph.opset_import.extend(kept + ([helper.make_opsetid(FUSED_DOMAIN, 1)] if FUSED_DOMAIN in domains else []))
    strip(graph)
    check(graph)
    return graph


def _fold_convolutions(graph: ModelProto, nested: bool) -> None:
    """Make tensors of the weights of convolutions that are computed from tensors alone, in place.

    A decoder's experts are one convolution, of which a task takes those that it keeps; a head with some of its channels
    has the first rows and columns of its weights, and BatchNorm after it: the graph has nothing else of them then.
    nested: but for the choice of columns, made when the graph is loaded: the rows are a beginning of all.
    """
    values = _Values(graph)
    norms = {node.input[0]: node for node in graph.graph.node if node.op_type == "BatchNormalization"}

    def computed(name: str) -> bool:
        return name not in values.initializers and values.is_constant(name)

    for node in graph.graph.node:
        if node.op_type != "Conv":
            continue
        for place, name in enumerate(node.input[2:], start=2):
            if computed(name):
                node.input[place] = values.add(f"{name}.folded", values.read(name))
        if not computed(name := node.input[1]):
            continue
        columns = values.producers[name]
        within = nested and columns.op_type == "Slice" and values.read(columns.input[3]).tolist() == [1]
        rows = columns.input[0] if within else name
        weight, norm = values.read(rows), norms.get(node.output[0])
        if norm is not None and all(map(values.is_constant, norm.input[1:])):
            weight = _fold_norm(node, norm, weight, values)
        folded = values.add(f"{name}.folded.weight", weight)
        if within:
            columns.input[0] = folded
        else:
            node.input[1] = folded
    graph.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in values.added.items())


def _fold_norm(convolution: NodeProto, norm: NodeProto, weight: NDArray[Any], values: "_Values") -> NDArray[Any]:
    """Make a BatchNormalization part of the convolution before it, and return its weights.

    By the formula, and in the order, in which onnxscript does (rewriter/rules/common/_fuse_batchnorm.py) where they are
    tensors from the start: the same weights are then the same bits in graphs of other budgets.
    """
    gamma, beta, mean, var = (np.asarray(values.read(name), np.float32) for name in norm.input[1:])
    epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
    scale = gamma / np.sqrt(var + epsilon)
    bias: NDArray[Any] = values.read(convolution.input[2]) if len(convolution.input) > 2 else np.zeros_like(mean)
    folded = values.add(f"{norm.output[0]}.bias", (bias - mean) * scale + beta)
    del convolution.input[2:]
    convolution.input.append(folded)
    convolution.output[0] = norm.output[0]
    norm.input[0] = norm.output[0] = f"{norm.output[0]}.dropped"  # leads nowhere
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))


def copied(graph: ModelProto) -> ModelProto:
    """Return a copy of a graph: lowering and quantisation change theirs."""
    copy = ModelProto()
    copy.CopyFrom(graph)
    return copy


def strip(graph: ModelProto) -> None:
    """Drop documentation, metadata and inferred shapes: none is needed to run, and they hold paths and stack traces."""
    graph.ClearField("doc_string")
    graph.ClearField("metadata_props")
    _strip_graph(graph.graph)
    for function in graph.functions:
        for name in ("doc_string", "metadata_props", "value_info"):
            function.ClearField(name)
        for node in function.node:
            _strip_node(node)


def _strip_graph(graph: GraphProto) -> None:
    for name in ("doc_string", "metadata_props", "value_info", "quantization_annotation"):
        graph.ClearField(name)
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
    assert custom <= {"", "ai.onnx", FUSED_DOMAIN}, f"custom operator domains left in the graph: {sorted(custom)}"
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
        """Return the value of an initializer or an added tensor, or of a tensor computed from initializers alone.

        The gate of a task_conditioned router is computed: a slice of the shared gate, and a bias made of the task
        embedding. Evaluated here, the graph holds what its task needs and nothing of the others.
        """
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        if name in self.added:
            return self.added[name]
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

    def is_constant(self, name: str) -> bool:
        """Return whether a tensor is an initializer or computed from initializers alone."""
        waiting, seen = [name], set[str]()
        while waiting:
            tensor = waiting.pop()
            if not tensor or tensor in seen or tensor in self.initializers:
                continue
            if tensor not in self.producers:
                return False
            seen.add(tensor)
            waiting += self.producers[tensor].input
        return True

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


class _Layer:
    """One m3vit::MoE node: its parameters, of the kept experts, and the standard nodes that compute what it does."""

    def __init__(
        self, node: NodeProto, number: int, budgets: LayerBudgets, values: _Values, nested: bool = False
    ) -> None:
        self.nested = nested
        self.source = dict(zip(INPUTS, node.input, strict=True))
        self.values, self.output, self.x = values, node.output[0], self.source["x"]
        w1_EHD, b1_EH, w2_EDH, b2_ED = (values.read(self.source[name]) for name in INPUTS[3:])
        # "...blocks.1.mlp.experts.w1" -> "...blocks.1.mlp.experts", "...blocks.1.mlp"
        bank = self.source["w1"].rpartition(".")[0]
        self.layer = bank.rpartition(".")[0] or f"moe{number}"
        self.bank = bank or self.layer
        self.add = _Nodes(self.layer)
        experts, hidden, _ = w1_EHD.shape
        trained = next(attribute.i for attribute in node.attribute if attribute.name == "top_k")
        several = [budgets] if isinstance(budgets, LayerBudget) else budgets
        self.uses = [budget.resolve(experts, trained, hidden) for budget in several]
        self.top_k = max(use.top_k for use in self.uses)
        self.kept = sorted({expert for use in self.uses for expert in use.kept})
        self.pruned = len(self.kept) < experts
        width = self.uses[0].width  # the same for all tasks
        self.w1_EHD, self.b1_EH = w1_EHD[self.kept, :width], b1_EH[self.kept, :width]
        self.w2_EDH, self.b2_ED = w2_EDH[self.kept, :, :width], b2_ED[self.kept]

    def expand(self, form: str) -> list[NodeProto]:
        """Return the standard nodes, in order."""
        scores_NE, weights_NK, ids_NK = self.route()
        (self.sparse if form == "sparse" else self.wide)(scores_NE, weights_NK, ids_NK)
        self.add.nodes[-1].output[0] = self.output  # the rest of the graph knows it by this name
        return self.add.nodes

    def route(self) -> tuple[str, str, str]:
        """Return scores of the kept experts [N, E], and the chosen ones' weights and numbers among the kept [N, K].

        The logits decide, as in torch: softmax rounds small differences away. TopK puts the lower index first in ties.
        """
        add, values = self.add, self.values
        if not values.is_constant(self.source["gate"]):
            logits_NE = add("logits", "Gemm", self.x, self.source["gate"], self.source["gate_bias"], transB=1)
        elif (gate := values.read(self.source["gate"])).ndim == 3:
            return self.route_tasks(gate, values.read(self.source["gate_bias"]))
        else:
            # A name of its own content: the same router has another gate in another task's graph.
            transposed = values.add(f"{self.layer}.router.gate.T", gate.T)
            bias = values.add(f"{self.layer}.router.bias", values.read(self.source["gate_bias"]))
            logits_NE = add("logits", "Gemm", self.x, transposed, bias)
        scores_NE = add("scores", "Softmax", logits_NE, axis=-1)
        if self.pruned:
            scores_NE = add("kept_scores", "Gather", scores_NE, values.int64(self.kept), axis=1)
            logits_NE = add("kept_logits", "Gather", logits_NE, values.int64(self.kept), axis=1)
        _, ids_NK = add.many(["best_logits", "ids"], "TopK", logits_NE, values.int64([self.top_k]), axis=-1)
        weights_NK = add("weights", "GatherElements", scores_NE, ids_NK, axis=1)
        return scores_NE, weights_NK, ids_NK

    def route_tasks(self, gate_RED: NDArray[np.generic], bias_RE: NDArray[np.generic]) -> tuple[str, str, str]:
        """Do as `route` for R tasks, the tokens of one after those of the other.

        Tasks may differ in what they use: experts that a task leaves out come last, slots that it leaves out weigh 0.
        """
        add, values, int64 = self.add, self.values, self.values.int64
        R, E, D = gate_RED.shape
        uses = self.uses if len(self.uses) > 1 else self.uses * R
        gates = values.add(f"{self.layer}.router.gates.T", gate_RED.transpose(0, 2, 1))
        biases = values.add(f"{self.layer}.router.biases", bias_RE[:, None])
        x_RND = add("x_by_task", "Reshape", self.x, int64([R, -1, D]))
        logits = add("logits", "Add", add("products", "MatMul", x_RND, gates), biases)
        scores_NE = add("scores", "Softmax", add("logits_flat", "Reshape", logits, int64([-1, E])), axis=-1)
        masks = np.full((R, 1, E), _NEVER, np.float32)
        for mask, use in zip(masks, uses, strict=True):
            mask[0, list(use.kept)] = 0
        if masks.any():
            logits = add("ranked", "Add", logits, values.add(f"{self.layer}.router.left_out", masks))
        logits_NE = add("ranked_flat", "Reshape", logits, int64([-1, E]))
        if self.pruned:
            scores_NE = add("kept_scores", "Gather", scores_NE, int64(self.kept), axis=1)
            logits_NE = add("kept_logits", "Gather", logits_NE, int64(self.kept), axis=1)
        _, ids_NK = add.many(["best_logits", "ids"], "TopK", logits_NE, int64([self.top_k]), axis=-1)
        weights_NK = add("weights", "GatherElements", scores_NE, ids_NK, axis=1)
        counts = np.array([use.top_k for use in uses])
        if len(set(counts)) > 1:
            used = (np.arange(self.top_k) < counts[:, None, None]).astype(np.float32)  # [R, 1, K]
            weights = add("weights_by_task", "Reshape", weights_NK, int64([R, -1, self.top_k]))
            weights = add("weights_used", "Mul", weights, values.add(f"{self.layer}.router.used", used))
            weights_NK = add("weights_flat", "Reshape", weights, int64([-1, self.top_k]))
        return scores_NE, weights_NK, ids_NK

    def linear(self, x: str, place: int, what: str, weight_OI: NDArray[np.generic], bias_O: NDArray[np.generic]) -> str:
        """Add one linear map of one expert, the place-th of the kept; its parameters carry the expert's own number."""
        name = f"{self.bank}.{self.kept[place]}.{what}"
        bias = self.values.add(f"{name}.bias", bias_O)
        if self.nested and what == "fc1":
            weight = self.values.add(f"{name}.weight", weight_OI)
            return self.add(f"expert{self.kept[place]}.{what}", "Gemm", x, weight, bias, transB=1)
        weight = self.values.add(f"{name}.weight.T", weight_OI.T)
        return self.add(f"expert{self.kept[place]}.{what}", "Gemm", x, weight, bias)

    def sparse(self, scores_NE: str, weights_NK: str, ids_NK: str) -> None:
        """Run each expert on its own tokens."""
        add, int64, x_ND = self.add, self.values.int64, self.x
        E = len(self.kept)

        # Dispatch. chosen[e, n] is 1 if token n goes to expert e, int64. NonZero lists the ones row by row, that is,
        # already grouped by expert, tokens in order: no sort needed. A token's K ids differ, so no index repeats here.
        zeros_NE = add("zeros", "ConstantOfShape", add("shape_NE", "Shape", scores_NE), value=_tensor(0))
        ones_NK = add("ones", "ConstantOfShape", add("shape_NK", "Shape", ids_NK), value=_tensor(1))
        chosen_NE = add("chosen_by_token", "ScatterElements", zeros_NE, ids_NK, ones_NK, axis=1)
        chosen_EN = add("chosen", "Transpose", chosen_NE, perm=[1, 0])
        counts_E = add("counts", "ReduceSum", chosen_EN, int64([1]), keepdims=0)
        tokens_S = add("tokens", "Gather", add("nonzero", "NonZero", chosen_EN), int64(1), axis=0)
        rows_SD = add("rows", "Gather", x_ND, tokens_S, axis=0)
        groups = [rows_SD]
        if E > 1:
            groups = add.many([f"rows.{expert}" for expert in self.kept], "Split", rows_SD, counts_E, axis=0)

        # Experts: [S_e, D] -> [S_e, H] -> [S_e, D], S_e may be 0.
        outputs = []
        for place, rows in enumerate(groups):
            hidden = self.linear(rows, place, "fc1", self.w1_EHD[place], self.b1_EH[place])
            hidden = add(f"expert{self.kept[place]}.gelu", "Gelu", hidden)
            outputs.append(self.linear(hidden, place, "fc2", self.w2_EDH[place], self.b2_ED[place]))
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

    def wide(self, scores_NE: str, weights_NK: str, ids_NK: str) -> None:
        """Run all kept experts on every token, as one MLP."""
        add, values, int64 = self.add, self.values, self.values.int64
        E, H, D = self.w1_EHD.shape
        # Which experts, in the name: graphs that keep others have other tensors.
        name = self.bank + ".wide" + (f"_{'_'.join(map(str, self.kept))}" if self.pruned else "")
        zeros_NE = add("zeros", "Sub", scores_NE, scores_NE)
        combine_NE = add("combine", "ScatterElements", zeros_NE, ids_NK, weights_NK, axis=1)
        fc1 = values.add(f"{name}.fc1.weight.T", self.w1_EHD.reshape(E * H, D).T)
        hidden = add("wide.fc1", "Gemm", self.x, fc1, values.add(f"{name}.fc1.bias", self.b1_EH.reshape(E * H)))
        hidden_NEH = add("hidden", "Reshape", add("wide.gelu", "Gelu", hidden), int64([-1, E, H]))
        scaled_NEH = add("scaled", "Mul", hidden_NEH, add("combine_column", "Unsqueeze", combine_NE, int64([2])))
        scaled = add("scaled_flat", "Reshape", scaled_NEH, int64([-1, E * H]))
        fc2 = values.add(f"{name}.fc2.weight.T", self.w2_EDH.transpose(0, 2, 1).reshape(E * H, D))
        bias_ND = add("wide.bias", "MatMul", combine_NE, values.add(f"{name}.fc2.bias", self.b2_ED))
        add("output", "Add", add("wide.fc2", "MatMul", scaled, fc2), bias_ND)


def _tensor(value: int) -> TensorProto:
    """Return the one-element int64 tensor that ConstantOfShape takes as its attribute."""
    return helper.make_tensor("value", TensorProto.INT64, [1], [value])


def reachable(nodes: list[NodeProto], outputs: list[str]) -> list[NodeProto]:
    """Return the nodes that the outputs depend on, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(name for name in node.input if name)
            for attribute in node.attribute:  # a subgraph (If, Loop) reads tensors of the graph around it
                wanted.update(name for inner in attribute.g.node for name in inner.input if name)
    return kept[::-1]
