"""One MoE layer on the CPU: as an export lowers it, against onnxruntime's own operators MoE and QMoE.

    python benchmarks/onnx_experts.py [--tokens 197 1025] [--rounds 30]

A layer of M3ViT-S: 16 experts of 384 hidden units, top-4, 384 channels, random weights, one thread. CPU time of the
process (which others on the machine hardly change), the least of the rounds, as ratios to the lowered layer of the same
precision; and the largest difference from the layer in fp32, relative to its largest output. onnxruntime's GELU in MoE
is an approximation; QMoE makes the weights of a token's experts sum to 1, which is another layer: of it the time alone
is told.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

# Python looks for modules in this file's folder first, and onnx.py there would be the module onnx: look there last.
sys.path.sort(key=lambda entry: Path(entry or ".").resolve() == Path(__file__).resolve().parent)
import numpy as np
from _bench import machine
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from m3vit.export.onnx.lower import copied, lower_moe
from m3vit.export.onnx.quantize import quantize
from m3vit.export.runtime.ort import onnxruntime, session_options

D, E, K, BLOCK = 384, 16, 4, 128
CONTRIB = "com.microsoft"
Arrays = dict[str, NDArray[Any]]


def model(nodes: list[Any], weights: Arrays) -> ModelProto:
    """Return a graph of x [N, D] -> y [N, D]."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", D]) for name in ("x", "y"))
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "layer", [x], [y], tensors)
    domains = [helper.make_opsetid("", 20), helper.make_opsetid(CONTRIB, 1), helper.make_opsetid("m3vit", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def blockwise(weight_EOI: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantise in blocks of BLOCK inputs, as QMoE takes it: zero at 2^(bits-1), two 4-bit values a byte."""
    blocks = weight_EOI.reshape(*weight_EOI.shape[:2], -1, BLOCK)
    most = 2 ** (bits - 1) - 1
    scales = np.abs(blocks).max(-1, keepdims=True) / most
    values = (np.clip(np.rint(blocks / scales), -most, most) + most + 1).astype(np.uint8).reshape(weight_EOI.shape)
    if bits == 4:
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    return values, scales[..., 0].astype(np.float32)


def variants() -> dict[str, ModelProto]:
    """Return the graphs by name."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> NDArray[np.float32]:
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)

    bank = {"b.w1": draw(E, D, D), "b.b1": draw(E, D), "b.w2": draw(E, D, D), "b.b2": draw(E, D)}
    weights: Arrays = {"gate": draw(E, D), "bias": np.zeros(E, np.float32), **bank}
    ours = model([helper.make_node("MoE", ["x", "gate", "bias", *bank], ["y"], domain="m3vit", top_k=K)], weights)
    lowered = lower_moe(copied(ours))
    router = helper.make_node("Gemm", ["x", "gate", "bias"], ["logits"], transB=1)
    said = {"domain": CONTRIB, "k": K, "activation_type": "gelu", "normalize_routing_weights": 0}
    found = {
        "lowered fp32": lowered,
        "MoE fp32": model([router, helper.make_node("MoE", ["x", "logits", *bank], ["y"], **said)], weights),
        "lowered int8": quantize(copied(lowered), "int8"),
    }
    for bits in (8, 4):
        (q1, s1), (q2, s2) = blockwise(bank["b.w1"], bits), blockwise(bank["b.w2"], bits)
        parts: Arrays = {"q1": q1, "s1": s1, "b1": bank["b.b1"], "q2": q2, "s2": s2, "b2": bank["b.b2"]}
        node = helper.make_node(
            "QMoE", ["x", "logits", *parts], ["y"], expert_weight_bits=bits, block_size=BLOCK, **said
        )
        found[f"QMoE {bits} bits"] = model([router, node], {"gate": weights["gate"], "bias": weights["bias"], **parts})
    return found


def session(graph: ModelProto) -> Any:
    return onnxruntime.InferenceSession(
        graph.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )


def cpu_ms(each: Any, x: NDArray[np.float32], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        each.run(None, {"x": x})
        times.append(time.process_time() - start)
    return 1000 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 1025])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    machine()
    sessions = {name: session(graph) for name, graph in variants().items()}
    for tokens in args.tokens:
        x = np.random.default_rng(1).standard_normal((tokens, D)).astype(np.float32)
        outputs = {name: each.run(None, {"x": x})[0] for name, each in sessions.items()}
        ms = {name: cpu_ms(each, x, args.rounds) for name, each in sessions.items()}
        for name in sessions:
            like = "lowered fp32" if "fp32" in name else "lowered int8"
            line = f"{tokens:5} tokens  {name:13} {ms[name]:6.2f} ms, {ms[name] / ms[like]:.2f} x {like}"
            if not name.startswith("QMoE"):
                exact = outputs["lowered fp32"]
                line += f", off by {np.abs(outputs[name] - exact).max() / np.abs(exact).max():.1e}"
            print(line)


if __name__ == "__main__":
    main()
