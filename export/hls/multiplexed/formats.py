"""Fractions of every tensor, from what the float model's tensors reach on calibration images.

Narrow tensors are act_bits wide, or 16 where a map that reads them is chosen for it, each with a fraction of its own
that leaves HEADROOM_BITS above the largest value seen. Below HEADROOM_FROM bits a bit is dear: the fraction is the one
that just holds that value, or the next finer one, which clips it, whichever has the smaller squared error. Values may
saturate there, and simulation counts them. The residual stream, which layers add to in place, is 32 bits wide, with
one fraction throughout, or 16: then it has as many fractional bits as hold what it reaches up to the next attention,
and where that adds to it loses some.
"""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, fx

from m3vit.errors import InputError
from m3vit.export.hls import leaf
from m3vit.export.hls.calibration import Calibration
from m3vit.export.hls.magnitudes import OCTAVES
from m3vit.export.hls.multiplexed.words import integer_bits

HEADROOM_BITS = 1
HEADROOM_FROM = 12
WIDE_HEADROOM_BITS = {32: 3, 16: 1}
WIDE_FRAC_LIMIT = 20  # finer than any product; and LayerNorm's eps then fits 60 bits
LOGIT_FRAC_LIMIT = 24
FINE_BITS = 16  # of the inputs of maps that are chosen for more than act_bits
# Of the layers of a block what they write to narrow memory, and which map reads it.
READERS = {
    ("norm1", "result"): "attn.qkv",
    ("attn", "result"): "attn.proj",
    ("norm2", "result"): "mlp.fc1",
    ("gelu", "input"): "mlp.fc2",
    ("gelu", "result"): "mlp.fc2",
    ("moe", "hidden"): "mlp.fc2",
    ("moe", "active"): "mlp.fc2",
}
LIMITS: Mapping[str, Sequence[int]] = {"weight_bits": (8, 12, 16), "act_bits": (8, 10, 12, 14, 16)}


class Formats(NamedTuple):
    """Fractional bits: `wide` of the residual stream at first, which has wide_bits; `layers` {hls4ml layer: {kind:
    fraction}}; `bits` likewise, of narrow tensors that do not have act_bits.

    Kinds: result (of narrow outputs); query, key, value (attention's input); input (before GELU); logit, hidden, active
    (MoE: router, before and after GELU); normed (head), output0, output1, ... (each task's outputs; of a head with a
    convolution, its features); stream (of a residual stream of 16 bits: of an attention's projection, and of sums).
    """

    weight_bits: int
    act_bits: int
    wide: int
    layers: dict[str, dict[str, int]]
    wide_bits: int = 32
    bits: Mapping[str, Mapping[str, int]] = MappingProxyType({})


def reader_of(layer: str, kind: str) -> str:
    """Return the name of the map (m3vit.hw.layer_bits) that reads a narrow tensor, or an empty text for one that no map
    reads, or one that has act_bits whatever is chosen."""
    if found := re.fullmatch(r"blocks_(\d+)_(\w+)", layer):
        inner = READERS.get((found[2], kind))
        return f"blocks.{found[1]}.{inner}" if inner else ""
    if layer == "head":
        return "heads.linear" if kind == "normed" else "heads.conv"
    return ""


def few(bits: int) -> bool:
    """Return whether a tensor of this width has no bit to spare."""
    return bits < HEADROOM_FROM


def narrow_frac(largest: float, bits: int, octaves: Tensor | None = None) -> int:
    """Return the fraction of a narrow tensor that reaches `largest`; octaves: its `octave_sums`, of few bits."""
    if not math.isfinite(largest):
        raise InputError("cannot export to HLS: the model has weights or outputs that are not finite; train it again")
    headroom = 0 if few(bits) else HEADROOM_BITS
    frac = bits - 1 - headroom - integer_bits(max(largest, 2.0**-12))
    return frac if octaves is None else min((frac, frac + 1), key=lambda one: squared_error(octaves, one, bits))


def squared_error(octaves: Tensor, frac: int, bits: int) -> float:
    """Return what rounding to a fraction and clipping to a width are expected to add up to, squared."""
    above = min(max(bits - 1 - frac + OCTAVES // 2 + 1, 0), OCTAVES)  # octaves of what is clipped
    most = 2.0 ** (bits - 1 - frac) - 2.0**-frac
    count, total, squares = octaves[:, above:].sum(1).tolist()
    return float(octaves[0, :above].sum()) * 4.0**-frac / 12 + squares - 2 * most * total + most**2 * count


def wide_frac(largest: float, limit: int, bits: int = 32) -> int:
    """Return the fraction of a wide tensor that reaches `largest`."""
    if not math.isfinite(largest):
        raise InputError("cannot export to HLS: the model has weights or outputs that are not finite; train it again")
    return min(limit, bits - 1 - WIDE_HEADROOM_BITS[bits] - integer_bits(max(largest, 2.0**-12)))


def choose(
    calibration: Calibration,
    weight_bits: int,
    act_bits: int,
    wide_bits: int = 32,
    fine: frozenset[str] = frozenset(),
) -> Formats:
    """Return the formats of a calibrated model; fine: maps (m3vit.hw.layer_bits) whose inputs have 16 bits."""
    layers: dict[str, dict[str, int]] = {}
    bits: dict[str, dict[str, int]] = {}
    reached = calibration.outputs

    def narrow(node: str, kind: str = "", layer: str = "") -> int:
        """Return the fraction of a node's output, or of an inner tensor of it; `layer`: what it is the input of."""
        of, name = (calibration.inner[node], kind) if kind else (reached, node)
        owner, what = (layer, "input") if layer else (node, kind or "result")
        if reader_of(owner, what) not in fine:
            return narrow_frac(of[name], act_bits, of.octaves.get(name))
        bits.setdefault(owner, {})[what] = FINE_BITS
        return narrow_frac(of[name], FINE_BITS)

    for node in calibration.graph.graph.nodes:
        if node.op != "call_module":
            continue
        module: Any = calibration.graph.get_submodule(node.target)
        inner = calibration.inner[node.name]
        kinds = {"result": narrow(node.name)}
        if isinstance(module, leaf.VitAttention):
            kinds |= {name: narrow(node.name, name) for name in ("query", "key", "value")}
        elif isinstance(module, leaf.VitGelu):
            kinds["input"] = narrow(node.args[0].name, layer=node.name)
        elif isinstance(module, leaf.VitMoE):
            kinds["logit"] = wide_frac(inner["logit"], LOGIT_FRAC_LIMIT, wide_bits)
            kinds |= {name: narrow(node.name, name) for name in ("hidden", "active")}
        elif isinstance(module, leaf.VitTaskHead):
            kinds["normed"] = narrow(node.name, "normed")
            for task in range(len(module.widths)):
                largest = inner[f"output{task}"]
                # With a convolution after it, its outputs are inputs of products.
                last = "pixel_head" not in calibration.inner
                name = f"output{task}"
                kinds[name] = wide_frac(largest, WIDE_FRAC_LIMIT) if last else narrow(node.name, name)
        elif isinstance(module, leaf.VitPixelHead):
            for task in range(len(module.widths)):
                kinds[f"output{task}"] = wide_frac(inner[f"output{task}"], WIDE_FRAC_LIMIT)
        layers[node.name] = kinds
    parts = _stream(calibration)
    if wide_bits == 32:  # which are enough for one fraction
        parts = [(max(largest for largest, _ in parts), [])]
    fracs = np.minimum.accumulate([wide_frac(largest, WIDE_FRAC_LIMIT, wide_bits) for largest, _ in parts]).tolist()
    for frac, (_, names) in zip(fracs, parts, strict=True):
        for name in names:
            layers.setdefault(name, {})["stream"] = frac
    return Formats(weight_bits, act_bits, int(fracs[0]), layers, wide_bits, bits)


def _stream(calibration: Calibration) -> list[tuple[float, list[str]]]:
    """Return what the residual stream reaches up to each attention and after the last, and the layers that write it."""
    graph, parts = calibration.graph, [(0.0, list[str]())]
    for node in graph.graph.nodes:
        module = graph.get_submodule(node.target) if node.op == "call_module" else None
        if node.op != "call_function" and not isinstance(module, leaf.VitPosition) and node.name != "norm_pre":
            continue
        if projection := _attention_added(graph, node):
            parts.append((0.0, [projection]))
        largest, names = parts[-1]
        parts[-1] = (max(largest, calibration.outputs[node.name]), [*names, node.name])
    return parts


def _attention_added(graph: fx.GraphModule, node: fx.Node) -> str:
    """Return the name of the Linear after an attention that a sum adds, or an empty text."""
    if node.op != "call_function":
        return ""
    branch = node.all_input_nodes[-1]
    before = branch.all_input_nodes[0]
    attends = before.op == "call_module" and isinstance(graph.get_submodule(str(before.target)), leaf.VitAttention)
    return branch.name if attends else ""
