"""Fractions of every tensor, from what the float model's tensors reach on calibration images.

Narrow tensors are act_bits wide, each with a fraction of its own that leaves HEADROOM_BITS above the largest value
seen (none below HEADROOM_FROM bits, where a bit is dear: there values may saturate, and simulation counts them). The
residual stream has one fraction throughout, so that layers add to it in place; it is 32 bits wide.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from m3vit.errors import InputError
from m3vit.export.hls import leaf
from m3vit.export.hls.calibration import Calibration
from m3vit.export.hls.multiplexed.words import integer_bits

HEADROOM_BITS = 1
HEADROOM_FROM = 12
WIDE_HEADROOM_BITS = 3
WIDE_FRAC_LIMIT = 20  # finer than any product; and LayerNorm's eps then fits 60 bits
LOGIT_FRAC_LIMIT = 24
LIMITS: Mapping[str, Sequence[int]] = {"weight_bits": (8, 12, 16), "act_bits": (8, 10, 12, 14, 16)}


class Formats(NamedTuple):
    """Fractional bits: `wide` of the residual stream; `layers` {hls4ml layer: {kind: fraction}}.

    Kinds: result (of narrow outputs); query, key, value (attention's input); input (before GELU); logit, hidden, active
    (MoE: router, before and after GELU); normed (head), output0, output1, ... (each task's outputs; of a head with a
    convolution, its features).
    """

    weight_bits: int
    act_bits: int
    wide: int
    layers: dict[str, dict[str, int]]


def narrow_frac(largest: float, bits: int) -> int:
    """Return the fraction of a narrow tensor that reaches `largest`."""
    if not math.isfinite(largest):
        raise InputError("cannot export to HLS: the model has weights or outputs that are not finite; train it again")
    headroom = HEADROOM_BITS if bits >= HEADROOM_FROM else 0
    return bits - 1 - headroom - integer_bits(max(largest, 2.0**-12))


def wide_frac(largest: float, limit: int) -> int:
    """Return the fraction of a 32-bit tensor that reaches `largest`."""
    if not math.isfinite(largest):
        raise InputError("cannot export to HLS: the model has weights or outputs that are not finite; train it again")
    return min(limit, 31 - WIDE_HEADROOM_BITS - integer_bits(max(largest, 2.0**-12)))


def choose(calibration: Calibration, weight_bits: int, act_bits: int) -> Formats:
    """Return the formats of a calibrated model."""
    layers: dict[str, dict[str, int]] = {}
    reached = calibration.outputs
    stream = 0.0  # the largest value of the residual stream
    for node in calibration.graph.graph.nodes:
        if node.op == "call_function":
            stream = max(stream, reached[node.name])
        if node.op != "call_module":
            continue
        module: Any = calibration.graph.get_submodule(node.target)
        inner = calibration.inner[node.name]
        kinds = {"result": narrow_frac(reached[node.name], act_bits)}
        if isinstance(module, leaf.VitAttention):
            kinds |= {name: narrow_frac(inner[name], act_bits) for name in ("query", "key", "value")}
        elif isinstance(module, leaf.VitGelu):
            kinds["input"] = narrow_frac(reached[node.args[0].name], act_bits)
        elif isinstance(module, leaf.VitMoE):
            kinds["logit"] = wide_frac(inner["logit"], LOGIT_FRAC_LIMIT)
            kinds |= {name: narrow_frac(inner[name], act_bits) for name in ("hidden", "active")}
        elif isinstance(module, leaf.VitTaskHead):
            kinds["normed"] = narrow_frac(inner["normed"], act_bits)
            for task in range(len(module.widths)):
                largest = inner[f"output{task}"]
                # With a convolution after it, its outputs are inputs of products.
                last = "pixel_head" not in calibration.inner
                kinds[f"output{task}"] = wide_frac(largest, WIDE_FRAC_LIMIT) if last else narrow_frac(largest, act_bits)
        elif isinstance(module, leaf.VitPixelHead):
            for task in range(len(module.widths)):
                kinds[f"output{task}"] = wide_frac(inner[f"output{task}"], WIDE_FRAC_LIMIT)
        elif isinstance(module, leaf.VitPosition) or node.name == "norm_pre":
            stream = max(stream, reached[node.name])
        layers[node.name] = kinds
    return Formats(weight_bits, act_bits, wide_frac(stream, WIDE_FRAC_LIMIT), layers)
