"""Layers in 8-bit integers, against the same arithmetic in numpy."""

import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from m3vit.errors import InputError
from m3vit.export.onnx.graph import export_task
from m3vit.export.onnx.quantize import PRECISIONS, quantize, quantize_weight
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel

Array = NDArray[np.float32]


def run(graph: ModelProto, **inputs: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def copy(graph: ModelProto) -> ModelProto:
    other = ModelProto()
    other.CopyFrom(graph)
    return other


def one_linear(weight: Array, bias: Array | None) -> ModelProto:
    """A graph of one linear layer."""
    tensors = [numpy_helper.from_array(weight, "w")]
    if bias is not None:
        tensors.append(numpy_helper.from_array(bias, "b"))
    node = helper.make_node("MatMul" if bias is None else "Gemm", ["x", *(t.name for t in tensors)], ["y"], name="y")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size])
        for name, size in zip("xy", weight.shape, strict=True)
    ]
    graph = helper.make_graph([node], "linear", values[:1], values[1:], initializer=tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def integer_linear(x: Array, weight: Array, bias: Array | float) -> Array:
    """x @ weight + bias in the integers that ONNX defines: inputs to 0..255 over their range, which includes 0."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    x_q = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    w_scale = np.abs(weight).max(axis=0) / np.float32(127)
    w_q = np.rint(weight / np.where(w_scale > 0, w_scale, 1))
    return np.asarray((x_q @ w_q) * (scale * np.where(w_scale > 0, w_scale, 1)) + bias, np.float32)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_linear_layer_equals_the_integer_arithmetic(with_bias: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((50, 48), np.float32), rng.standard_normal((48, 40), np.float32)
    weight[:, 3] = 0  # a channel without a range
    weight[:, 5] *= 1e-4  # and a small one, which a scale of the whole tensor would round away
    bias = rng.standard_normal(40, np.float32) if with_bias else None
    graph = quantize(one_linear(weight, bias), "int8")
    assert "MatMulInteger" in {node.op_type for node in graph.graph.node}
    assert {t.data_type for t in graph.graph.initializer if t.name == "w.int8"} == {TensorProto.INT8}
    expected = integer_linear(x, weight, 0 if bias is None else bias)
    # One input in half of a step may round the other way: a step of the input times the largest weight.
    np.testing.assert_allclose(run(graph, x=x), expected, atol=1e-2 * np.abs(expected).max() / 48)
    exact = x @ weight + (0 if bias is None else bias)
    np.testing.assert_allclose(run(graph, x=x)[:, 5], exact[:, 5], atol=0.03 * np.abs(exact[:, 5]).max())


def test_weights_by_hand() -> None:
    integers, scale = quantize_weight(np.array([[1.27, 0, -2], [-0.5, 0, 4]], np.float32))
    assert integers.tolist() == [[127, 0, -64], [-50, 0, 127]]  # 2 / (4 / 127) = 63.5 rounds to even
    np.testing.assert_allclose(scale, [0.01, 1, 4 / 127], rtol=1e-6)


@pytest.fixture(scope="module", params=["linear", "conv"])
def graph(request: pytest.FixtureRequest) -> ModelProto:
    torch.manual_seed(0)
    trunk_args = dict(patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2, global_pool="", class_token=False)
    config = ModelConfig(
        trunk="vit_tiny_patch16_224",
        trunk_args=trunk_args,
        image_size=(32, 48),
        tasks=["depth", "semseg"],
        num_experts=4,
        top_k=2,
        head=request.param,
    )
    return export_task(MultiTaskModel(config).eval(), "semseg")


def integer_layers(graph: ModelProto) -> set[str]:
    """The weights that are stored as integers, without what is common to their names."""
    names = {t.name for t in graph.graph.initializer if t.data_type == TensorProto.INT8}
    return {re.sub(r"^model\.(backbone\.trunk\.blocks\.)?|\.weight\.T\.int8$", "", name) for name in names}


def test_what_each_precision_quantises(graph: ModelProto) -> None:
    experts = {f"1.mlp.experts.{expert}.{layer}" for expert in range(4) for layer in ("fc1", "fc2")}
    dense = {f"{block}.mlp.{layer}" for block in (0, 2) for layer in ("fc1", "fc2")}
    attention = {f"{block}.attn.{layer}" for block in range(3) for layer in ("qkv", "proj")}
    before_router = {"1.attn.qkv", "1.attn.proj"}
    expected = {
        "fp32": set(),
        "int8": experts | dense | attention | {"heads.semseg.linear"},
        "int8-mixed": (experts | dense | attention) - before_router,
        "int8-experts": experts,
    }
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 48), np.float32)
    exact = run(graph, image=image)
    sizes = []
    for precision in PRECISIONS:
        quantised = quantize(copy(graph), precision)
        assert integer_layers(quantised) == expected[precision]
        onnx.checker.check_model(quantised, full_check=True)
        # No router is touched, and no weight is there twice.
        assert not any("router" in name for name in integer_layers(quantised))
        assert not {f"{name}" for name in integer_layers(quantised)} & {
            re.sub(r"^model\.(backbone\.trunk\.blocks\.)?|\.weight\.T$", "", t.name)
            for t in quantised.graph.initializer
        }
        result = run(quantised, image=image)
        assert np.sqrt(np.mean((result - exact) ** 2)) < 0.1 * exact.std()
        assert precision == "fp32" or not np.array_equal(result, exact)
        sizes.append(quantised.ByteSize())
    assert sizes[0] > sizes[3] > sizes[2] > sizes[1]


def test_rows_are_quantised_once_before_they_are_dispatched(graph: ModelProto) -> None:
    quantised = quantize(copy(graph), "int8-experts")
    inputs = [node.input[0] for node in quantised.graph.node if node.op_type == "DynamicQuantizeLinear"]
    # The tokens once, and what each of 4 experts' GELU gives.
    assert len(inputs) == 5
    assert sum(name.endswith(".gelu") for name in inputs) == 4
    splits = [node for node in quantised.graph.node if node.op_type == "Split" and "rows" in node.output[0]]
    assert [node.input[0].endswith(".int8") for node in splits] == [True]


def test_refusals(graph: ModelProto) -> None:
    with pytest.raises(InputError, match="precision is 'int4': choose from fp32, int8, int8-mixed, int8-experts"):
        quantize(copy(graph), "int4")
    small = one_linear(np.ones((4, 4), np.float32), None)
    with pytest.raises(InputError, match="nothing to quantise to int8"):
        quantize(copy(small), "int8")
    assert quantize(copy(small), "int8", required=False) == small
