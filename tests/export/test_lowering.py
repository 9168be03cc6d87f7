"""The lowering of one m3vit::MoE node, against the torch operator."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from m3vit.errors import InputError
from m3vit.export.onnx.lower import INPUTS, lower_moe
from m3vit.models.budget import LayerBudget
from m3vit.models.moe import moe_op
from m3vit.models.router import route

Array = NDArray[np.float32]


def make_layer(E: int, D: int = 8, H: int = 12, seed: int = 0) -> dict[str, Array]:
    """Random parameters of one MoE layer, as the operator takes them."""
    rng = np.random.default_rng(seed)
    shapes = {"gate": (E, D), "gate_bias": (E,), "w1": (E, H, D), "b1": (E, H), "w2": (E, D, H), "b2": (E, D)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make_tokens(N: int, D: int = 8) -> Array:
    return np.random.default_rng(1).standard_normal((N, D)).astype(np.float32)


def moe_graph(layer: dict[str, Array], top_k: int) -> ModelProto:
    """A graph of one m3vit::MoE node, as the exporter leaves it."""
    D = layer["gate"].shape[1]
    node = helper.make_node("MoE", list(INPUTS), ["y"], domain="m3vit", top_k=top_k)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", D]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(array, name) for name, array in layer.items()]
    graph = helper.make_graph([node], "one_layer", values[:1], values[1:], initializer=initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("m3vit", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def make_session(graph: ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def torch_layer(x: Array, layer: dict[str, Array], top_k: int) -> Array:
    return np.asarray(moe_op(*(torch.from_numpy(array) for array in (x, *layer.values())), top_k))


def assert_close(actual: Array, expected: Array) -> None:
    # The sum order of float32 dot products differs between the two: a few units in the last place of the largest.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("E", "top_k", "N"), [(1, 1, 5), (2, 1, 1), (3, 2, 64), (4, 4, 33), (5, 1, 100), (16, 4, 1024), (16, 1, 1)]
)
def test_lowered_layer_equals_the_torch_operator(E: int, top_k: int, N: int, threads: int) -> None:
    layer, x = make_layer(E), make_tokens(N)
    session = make_session(lower_moe(moe_graph(layer, top_k)), threads)
    assert_close(session.run(None, {"x": x})[0], torch_layer(x, layer, top_k))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("favoured", [[3], [0, 5]])
def test_empty_experts_and_all_tokens_on_few(favoured: list[int], threads: int) -> None:
    layer, x = make_layer(6), make_tokens(200)
    layer["gate_bias"][favoured] += 50  # far above what the gate itself can add
    top_k = len(favoured)
    used = route(torch.from_numpy(x @ layer["gate"].T + layer["gate_bias"]), top_k).expert_ids_RNK.unique()
    assert used.tolist() == favoured
    session = make_session(lower_moe(moe_graph(layer, top_k)), threads)
    assert_close(session.run(None, {"x": x})[0], torch_layer(x, layer, top_k))


def test_ties_go_to_the_lower_expert() -> None:
    # A zero gate: every score is 1/4. ONNX promises the lower index; torch.topk promises nothing.
    layer, x = make_layer(4), make_tokens(50)
    layer["gate"][:], layer["gate_bias"][:] = 0, 0
    first_two = {name: array[:2] for name, array in layer.items()}
    # Over 2 experts each score is 1/2, so the same sum comes out twice as large.
    expected = torch_layer(x, first_two, 2) * np.float32(0.5)
    assert_close(make_session(lower_moe(moe_graph(layer, 2)), 2).run(None, {"x": x})[0], expected)
    # Where the tied experts are the same expert, torch agrees whichever it takes.
    for name in ("w1", "b1", "w2", "b2"):
        layer[name][:] = layer[name][0]
    assert_close(make_session(lower_moe(moe_graph(layer, 2)), 2).run(None, {"x": x})[0], torch_layer(x, layer, 2))


@pytest.mark.parametrize("threads", [1, 2])
def test_repeated_runs_are_bit_identical(threads: int) -> None:
    # onnxruntime's ScatterND(add) fails this about once in ten runs of this size with 2 threads.
    layer, x = make_layer(8, D=64, H=64), make_tokens(1500, D=64)
    session = make_session(lower_moe(moe_graph(layer, 4)), threads)
    first = session.run(None, {"x": x})[0]
    assert_close(first, torch_layer(x, layer, 4))
    for _ in range(20):
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], first)


def test_onnx_reference_evaluator_agrees() -> None:
    layer, x = make_layer(3), make_tokens(7)
    # Its Gelu is a function of its context, which shape inference provides.
    graph = onnx.shape_inference.infer_shapes(lower_moe(moe_graph(layer, 2)))
    results: Any = ReferenceEvaluator(graph).run(None, {"x": x})
    assert_close(results[0], torch_layer(x, layer, 2))


def chosen_layer(x: Array, layer: dict[str, Array], top_k: int, kept: list[int]) -> Array:
    """The layer token by token: scores over all experts, the best `top_k` of the kept ones."""
    logits = x @ layer["gate"].T + layer["gate_bias"]
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    y = np.zeros_like(x)
    for n, token in enumerate(torch.from_numpy(x)):
        for e in sorted(kept, key=lambda expert: -logits[n, expert])[:top_k]:
            w1, b1, w2, b2 = (torch.from_numpy(layer[name][e]) for name in ("w1", "b1", "w2", "b2"))
            y[n] += scores[n, e] * (w2 @ torch.nn.functional.gelu(w1 @ token + b1) + b2).numpy()
    return y


@pytest.mark.parametrize("form", ["sparse", "wide"])
@pytest.mark.parametrize(
    ("kept", "top_k"), [(range(6), 2), (range(6), 4), ((0, 2, 5), 2), ((1, 4), 2), ((3,), 1), ((2, 3, 4, 5), 1)]
)
def test_kept_experts_and_another_top_k(kept: tuple[int, ...], top_k: int, form: str) -> None:
    layer, x = make_layer(6), make_tokens(50)
    graph = lower_moe(moe_graph(layer, 3), [LayerBudget(top_k, tuple(kept))], form)
    names = " ".join(tensor.name for tensor in graph.graph.initializer)
    assert form == "wide" or all((f".{expert}.fc1." in names) == (expert in kept) for expert in range(6))
    assert_close(make_session(graph, 2).run(None, {"x": x})[0], chosen_layer(x, layer, top_k, list(kept)))


def test_tokens_whose_experts_are_kept_are_not_changed_by_pruning() -> None:
    layer, x = make_layer(8), make_tokens(300)
    ids = route(torch.from_numpy(x @ layer["gate"].T + layer["gate_bias"])[None], 2).expert_ids_RNK[0].numpy()
    kept = (0, 1, 3, 4, 6)
    inside = np.isin(ids, kept).all(axis=1)
    assert 0 < inside.sum() < len(x)
    pruned = make_session(lower_moe(moe_graph(layer, 2), [LayerBudget(None, kept)]), 1).run(None, {"x": x})[0]
    whole = torch_layer(x, layer, 2)
    assert_close(pruned[inside], whole[inside])
    assert np.abs(pruned[~inside] - whole[~inside]).max() > 0.01


def test_no_shape_of_the_wide_form_depends_on_data() -> None:
    layer, x = make_layer(5), make_tokens(20)
    graph = lower_moe(moe_graph(layer, 2), form="wide")
    assert not {"NonZero", "Split", "Concat", "Shape"} & {node.op_type for node in graph.graph.node}
    assert_close(make_session(graph, 2).run(None, {"x": x})[0], torch_layer(x, layer, 2))


def test_a_gate_may_be_computed_at_run_time() -> None:
    layer, x = make_layer(4), make_tokens(30)
    graph = moe_graph(layer, 2)
    gate = next(tensor for tensor in graph.graph.initializer if tensor.name == "gate")
    graph.graph.initializer.remove(gate)
    graph.graph.input.append(helper.make_tensor_value_info("gate", TensorProto.FLOAT, [4, 8]))
    session = make_session(lower_moe(graph), 2)
    for seed in (0, 1):
        layer["gate"] = make_layer(4, seed=seed)["gate"]
        assert_close(session.run(None, {"x": x, "gate": layer["gate"]})[0], torch_layer(x, layer, 2))


def test_small_differences_of_logits_decide() -> None:
    # As after up-cycling: gates so small that the scores round to the same number.
    layer, x = make_layer(6), make_tokens(40)
    layer["gate"] *= np.float32(1e-6)
    layer["gate_bias"][:] = 0
    assert_close(make_session(lower_moe(moe_graph(layer, 2)), 1).run(None, {"x": x})[0], torch_layer(x, layer, 2))


def test_lowered_graph_is_standard_and_never_scatters_sums() -> None:
    graph = lower_moe(moe_graph(make_layer(4), 2))
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 20)]
    assert {node.domain for node in graph.graph.node} == {""}
    assert "ScatterND" not in {node.op_type for node in graph.graph.node}
    scatters = [node for node in graph.graph.node if node.op_type == "ScatterElements"]
    assert all(attribute.name != "reduction" for node in scatters for attribute in node.attribute)
    assert not {"w1", "w2", "gate"} & {tensor.name for tensor in graph.graph.initializer}
    assert all(len(tensor.dims) <= 2 for tensor in graph.graph.initializer)


def test_lowering_refuses_what_it_cannot_lower() -> None:
    graph = moe_graph(make_layer(2), 1)
    graph.opset_import[0].version = 19
    with pytest.raises(InputError, match="opset 19"):
        lower_moe(graph)
    graph = moe_graph(make_layer(8), 1)
    graph.graph.node[0].input[INPUTS.index("w1")] = "x"
    with pytest.raises(ValueError, match="depends on the graph's input x"):
        lower_moe(graph)
    for arguments in ((3,), (0,), (None, (1, 0)), (1, (2,)), (1, ())):
        with pytest.raises(InputError, match=r"top_k|ascending|experts are 0 to 1"):
            lower_moe(moe_graph(make_layer(2), 1), [LayerBudget(*arguments)])
    with pytest.raises(InputError, match="width is 13, but its experts have 12 hidden units"):
        lower_moe(moe_graph(make_layer(2), 1), [LayerBudget(width=13)])
    with pytest.raises(InputError, match="choose from sparse, wide"):
        lower_moe(moe_graph(make_layer(2), 1), form="tall")
