"""The two forms of attention: the same numbers, by operators of every runtime or by a kernel of onnxruntime's."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import ModelProto, TensorProto, helper, numpy_helper

from m3vit.digests import read_sealed_json
from m3vit.export.onnx.attention import FORMS, FUSED_DOMAIN
from m3vit.export.onnx.lower import copied, lower_moe
from m3vit.export.onnx.options import Content
from m3vit.export.onnx.package import export_package
from tests.export.test_onnx import make_model

B, A, T, D = 2, 3, 37, 24


def attention_graph(scale: float, split: bool) -> ModelProto:
    """An m3vit::Attention node between timm's layout of q, k and v and its rows: of one tensor, or of three."""
    nodes, constants = [], {"rows": np.array([0, 0, D]), "five": np.array([0, 0, 3, A, D // A])}
    if split:
        nodes.append(helper.make_node("Reshape", ["x", "five"], ["parts"]))
        nodes.append(helper.make_node("Transpose", ["parts"], ["laid"], perm=[2, 0, 3, 1, 4]))
        constants["zero"] = np.array([0])
        for place, name in enumerate("qkv"):
            constants |= {f"{name}0": np.array([place]), f"{name}1": np.array([place + 1])}
            nodes.append(helper.make_node("Slice", ["laid", f"{name}0", f"{name}1", "zero"], [f"{name}_slice"]))
            nodes.append(helper.make_node("Squeeze", [f"{name}_slice", "zero"], [name]))
    else:  # as with rotary positions: something stands between the linear map and the attention
        constants |= {"cut": np.array([D, D, D]), "four": np.array([0, 0, A, D // A])}
        nodes.append(helper.make_node("Split", ["x", "cut"], ["q_", "k_", "v_"], axis=-1))
        for name in "qkv":
            nodes.append(helper.make_node("Reshape", [f"{name}_", "four"], [f"{name}4"]))
            nodes.append(helper.make_node("Transpose", [f"{name}4"], [name], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Attention", list("qkv"), ["o"], domain="m3vit", scale=scale, heads=A))
    nodes.append(helper.make_node("Transpose", ["o"], ["turned"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["turned", "rows"], ["last"]))
    nodes.append(helper.make_node("Relu", ["last"], ["y"]))
    sides = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "T", 3 * D])]
    ends = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "T", D])]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "attention", sides, ends, initializer=initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("m3vit", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("split", [True, False], ids=["one map", "three"])
@pytest.mark.parametrize("scale", [0.35, 2.0])
def test_both_forms_compute_attention(scale: float, split: bool, threads: int) -> None:
    x = np.random.default_rng(0).standard_normal((B, T, 3 * D)).astype(np.float32)
    q, k, v = (torch.from_numpy(part).view(B, T, A, D // A).transpose(1, 2) for part in np.split(x, 3, axis=-1))
    expected = F.relu(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(B, T, D)).numpy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for form in FORMS:
        graph = lower_moe(copied(attention_graph(scale, split)), attention=form)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        first = session.run(None, {"x": x})[0]
        np.testing.assert_allclose(first, expected, rtol=0, atol=2e-6)
        assert all(session.run(None, {"x": x})[0].tobytes() == first.tobytes() for _ in range(5))
        operators = [node.op_type for node in graph.graph.node]
        if form == "fused":  # what the kernel gives is taken as it is, and one map's thirds as they come
            assert operators.count("MultiHeadAttention") == 1 and "Softmax" not in operators
            assert operators.count("Transpose") == (0 if split else 6)
        else:
            assert {node.domain for node in graph.graph.node} == {""}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "content"),
    [("fused", {}), ("standard", {"attention": "standard"}), ("standard", {"static": True, "size": (32, 48)})],
    ids=["default", "standard", "static"],
)
def test_the_manifest_says_what_a_graph_needs(asked: str, content: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(tasks=["depth"]).eval()
    export_package(model, tmp_path / "package", Content(precisions=("fp32", "int8"), **content), info={})
    assert read_sealed_json(tmp_path / "package" / "manifest.json", "")["attention"] == asked
    for name in ("depth.onnx", "depth.int8.onnx"):
        graph = onnx.load(tmp_path / "package" / name, load_external_data=False)
        domains = {entry.domain for entry in graph.opset_import}
        assert (FUSED_DOMAIN in domains) == (asked == "fused")
