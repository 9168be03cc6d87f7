"""Layers in 8-bit integers, against the same arithmetic in numpy."""

import re

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from m3vit.errors import InputError
from m3vit.export.onnx.graph import export_task
from m3vit.export.onnx.quantize import (
    BLOCK,
    PRECISIONS,
    join_experts,
    quantize,
    quantize_blocks,
    quantize_weight,
)
from m3vit.export.runtime.ort import onnxruntime, session_options
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel

Array = NDArray[np.float32]


def run(graph: ModelProto, **inputs: Array) -> Array:
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), session_options(0), providers=["CPUExecutionProvider"]
    )
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


def test_the_largest_products_do_not_saturate() -> None:
    """255 * 127, in pairs: more than 16 bits hold, in which processors without VNNI would add them."""
    x = np.ones((3, 64), np.float32)
    x[:, ::7] = 0
    weight = np.where(np.arange(40) % 2, 1.0, -1.0).astype(np.float32) * np.ones((64, 1), np.float32)
    graph = quantize(one_linear(weight, None), "int8")
    np.testing.assert_allclose(run(graph, x=x), x @ weight, rtol=1e-5)


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
        "fp16": set(),
        "int4-experts": dense | attention | {"heads.semseg.linear"},
    }
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 48), np.float32)
    exact = run(graph, image=image)
    sizes = {}
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
        blocks = [node for node in quantised.graph.node if node.op_type == "MatMulNBits"]
        assert len(blocks) == (len(experts) if precision == "int4-experts" else 0)
        sizes[precision] = quantised.ByteSize()
    assert sizes["fp32"] > sizes["int8-experts"] > sizes["int8-mixed"] > sizes["int8"]


def test_rows_are_quantised_once_before_they_are_dispatched(graph: ModelProto) -> None:
    quantised = quantize(copy(graph), "int8-experts")
    inputs = [node.input[0] for node in quantised.graph.node if node.op_type == "DynamicQuantizeLinear"]
    # The tokens once, and what one GELU of all experts gives.
    assert len(inputs) == 2 and inputs[1].endswith("mlp/gelu")
    splits = [node for node in quantised.graph.node if node.op_type == "Split" and "mlp/" in node.output[0]]
    assert [node.input[0].endswith(".int8") for node in splits] == [True, True]
    assert sum(node.op_type == "Gelu" for node in quantised.graph.node) == 3  # two of blocks without experts


def test_one_gelu_of_all_experts_changes_nothing_in_floats(graph: ModelProto) -> None:
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 48), np.float32)
    joined = copy(graph)
    join_experts(joined)
    assert len(joined.graph.node) == len(graph.graph.node) - 4 + 3
    np.testing.assert_allclose(run(joined, image=image), run(graph, image=image), rtol=0, atol=1e-6)


def test_weights_in_blocks_by_hand() -> None:
    weight = np.zeros((BLOCK + 8, 2), np.float32)
    weight[0], weight[1], weight[BLOCK + 1, 1] = (-8, 1), (3.6, -0.5), 2
    packed, scale = quantize_blocks(weight)
    np.testing.assert_allclose(scale, [[1, 1], [-1 / 8, -1 / 4]])
    assert packed.shape == (2, 2, BLOCK // 2) and packed.dtype == np.uint8
    # -8 and 4 of the first output; 1 -> -8 and -0.5 -> 4 steps of -1/8; 2 -> -8 steps of -1/4; all else is 0.
    assert packed[0, 0, 0] == 0 | 12 << 4 and packed[1, 0, 0] == 0 | 12 << 4 and packed[1, 1, 0] == 8 | 0 << 4
    assert (packed[0, 1] == 0x88).all() and (packed[:, :, 1:] == 0x88).all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("inputs", [48, BLOCK, BLOCK + 16])
def test_a_layer_in_blocks_is_a_product_with_its_rounded_weights(inputs: int, with_bias: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((50, inputs), np.float32), rng.standard_normal((inputs, 40), np.float32)
    graph = one_linear(weight, rng.standard_normal(40, np.float32) if with_bias else None)
    graph.graph.initializer[0].name = graph.graph.node[0].input[1] = "blocks.1.mlp.experts.0.fc1.weight.T"
    packed, scale = quantize_blocks(weight)
    bits = np.stack([packed & 15, packed >> 4], axis=-1).reshape(40, -1, BLOCK).astype(np.float32)
    rounded = ((bits - 8) * scale[:, :, None]).reshape(40, -1)[:, :inputs].T
    bias = numpy_helper.to_array(graph.graph.initializer[1]) if with_bias else 0
    assert np.abs(rounded - weight).max() < np.abs(weight).max() / 8 * 1.01
    result = run(quantize(graph, "int4-experts"), x=x)
    # Inputs are rounded too, to 1/127 of a row's largest: random errors of so many products.
    np.testing.assert_allclose(result, x @ rounded + bias, rtol=0, atol=0.01 * np.abs(x @ rounded).max())


def test_halves_are_the_weights_rounded_to_them(graph: ModelProto) -> None:
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 48), np.float32)
    rounded, stored = copy(graph), quantize(copy(graph), "fp16")
    for tensor in rounded.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= 1024:
            halves = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(halves, tensor.name))
    np.testing.assert_allclose(run(stored, image=image), run(rounded, image=image), rtol=0, atol=1e-6)
    assert stored.ByteSize() < 0.65 * rounded.ByteSize()
    assert {node.domain for node in stored.graph.node} == {""}


def test_refusals(graph: ModelProto) -> None:
    with pytest.raises(InputError, match="precision is 'int4': choose from fp32, fp16, int8, int8-mixed"):
        quantize(copy(graph), "int4")
    small = one_linear(np.ones((4, 4), np.float32), None)
    with pytest.raises(InputError, match="nothing to quantise to int8"):
        quantize(copy(small), "int8")
    assert quantize(copy(small), "int8", required=False) == small
