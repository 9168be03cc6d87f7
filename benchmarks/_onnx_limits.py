"""What a machine allows an exported model: the rates at which it reads memory and multiplies, measured here.

A graph reads each of its weights at least once an image, and does its multiply-accumulates (MACs) at most as fast as
one large product of the same kind: the larger of the two times is below what any arrangement of the same operators
takes. Attention, which stays in floats, counts at the rate of floats.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from m3vit.export.runtime.ort import onnxruntime

READ_BYTES = 1 << 28  # more than caches hold
ROWS, INPUTS, OUTPUTS = 1024, 384, 1536  # of the product: an MLP's of ViT-S
REPEATS = 30


def _best(run: Any) -> float:
    """Return the seconds of the fastest of some calls: what the machine allows, not what others left of it."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def bandwidth(threads: int) -> float:
    """Return the bytes that so many threads read from memory in a second."""
    parts = np.array_split(np.ones(READ_BYTES // 8, np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return READ_BYTES / _best(lambda: list(pool.map(np.bitwise_or.reduce, parts)))


def product_rates(threads: int) -> dict[str, float]:
    """Return the MACs of a large product in a second, by onnxruntime: in fp32, and int8 as an export has it."""
    from onnx import TensorProto, helper, numpy_helper

    from m3vit.export.onnx.lower import copied
    from m3vit.export.onnx.quantize import quantize

    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((INPUTS, OUTPUTS), np.float32), "w")
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [ROWS, size])
        for name, size in (("x", INPUTS), ("y", OUTPUTS))
    )
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    rows, found = rng.standard_normal((ROWS, INPUTS), np.float32), {}
    for precision in ("fp32", "int8"):
        content = quantize(copied(model), precision).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": rows})
        found[precision] = ROWS * INPUTS * OUTPUTS / _best(lambda session=session: session.run(None, {"x": rows}))
    return found


def attention_macs(size: int, patch: int = 16, dim: int = 384, depth: int = 12) -> int:
    """Return the MACs of the scores and the mixing of ViT-S at an image size: what no precision makes integers."""
    tokens = (size // patch) ** 2 + 1
    return 2 * depth * tokens * tokens * dim


class Limits:
    """The rates of so many threads."""

    def __init__(self, threads: int) -> None:
        self.read, self.products = bandwidth(threads), product_rates(threads)

    def line(self) -> str:
        """Return the rates in words."""
        rates = ", ".join(f"{name} {rate / 1e9:.0f} GMAC/s" for name, rate in self.products.items())
        return f"memory {self.read / 1e9:.1f} GB/s, one large product {rates}"

    def floor_ms(self, weight_bytes: int, macs: int, size: int, precision: str) -> tuple[float, float]:
        """Return the ms that reading a graph's weights takes, and those that its products take."""
        floats = macs if precision == "fp32" else min(macs, attention_macs(size))
        products = floats / self.products["fp32"] + (macs - floats) / self.products["int8"]
        return 1000 * weight_bytes / self.read, 1000 * products
