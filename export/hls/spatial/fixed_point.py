"""Fixed-point formats of the spatial schedule, chosen from what the float model's tensors reach on calibration images.

Total widths are given (act_bits, weight_bits); the integer bits of every tensor are those its largest magnitude needs,
with one more for activations, since other images may reach further. Everything rounds (AP_RND) and saturates (AP_SAT).
Accumulators hold exact sums: as wide as the bound of the sum of products, which must stay within 62 bits because
C-simulation and the kernels of hw/include/m3vit_*.h use 64-bit integers.
"""

import math
from typing import Any, NamedTuple

from torch import Tensor, fx

from m3vit.errors import InputError
from m3vit.export.hls import leaf
from m3vit.export.hls.calibration import Calibration
from m3vit.hw.tables import NORM_FRAC, PROB_FRAC

INPUT = "ap_ufixed<8,0>"
TASK = "ap_uint<8>"
HEADROOM_BITS = 1
ACCUMULATOR_LIMIT_BITS = 62


class Fixed(NamedTuple):
    """A signed fixed-point format: `width` bits, `integer` of them (sign included) left of the point."""

    width: int
    integer: int

    @property
    def frac(self) -> int:
        """Return the number of fractional bits (may exceed the width or be negative)."""
        return self.width - self.integer

    @property
    def limit(self) -> float:
        """Return the magnitude that no value of the format exceeds."""
        return 2.0 ** (self.integer - 1)

    def text(self, exact: bool = False) -> str:
        """Return the C++ type; `exact`: never rounds nor overflows (an accumulator), so no hardware for that."""
        modes = "" if exact else ",AP_RND,AP_SAT"
        return f"ap_fixed<{self.width},{self.integer}{modes}>"


def fixed_for(largest: float, width: int, headroom: int = 0) -> Fixed:
    """Return the format of `width` bits with the fewest integer bits that hold +-largest, and `headroom` more."""
    if not math.isfinite(largest):
        raise InputError("cannot export to HLS: the model has weights or outputs that are not finite; train it again")
    return Fixed(width, math.ceil(math.log2(max(largest, 2.0**-12) * (1 + 2.0**-width))) + 1 + headroom)


def first_input(node: fx.Node) -> str:
    """Return the name of the node that computes a node's first argument."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.name


def _weights(value: Tensor, bits: int) -> Fixed:
    return fixed_for(float(value.detach().abs().max()), bits)


def sum_format(x: tuple[float, int], weight: Tensor, weight_t: Fixed, bias: Tensor, where: str) -> Fixed:
    """Return the format that holds every partial sum of `weight` [..., out, in] times inputs, plus bias, exactly.

    `x` is (largest magnitude, fractional bits) of the inputs. Raises InputError beyond ACCUMULATOR_LIMIT_BITS.
    """
    bound = x[0] * float(weight.detach().abs().sum(dim=-1).max()) + float(bias.detach().abs().max()) + 1
    integer = math.ceil(math.log2(bound)) + 1
    total = Fixed(integer + x[1] + weight_t.frac, integer)
    if total.width > ACCUMULATOR_LIMIT_BITS:
        raise InputError(
            f"cannot export to HLS: {where} needs a {total.width}-bit accumulator, over the "
            f"{ACCUMULATOR_LIMIT_BITS} of the kernels' 64-bit integers; give smaller weight_bits or act_bits"
        )
    return total


class Chooser:
    """Chooses the formats of one model; `choose` is the entry point."""

    def __init__(self, calibration: Calibration, weight_bits: int, act_bits: int) -> None:
        self.calibration, self.weight_bits, self.act_bits = calibration, weight_bits, act_bits
        self.results: dict[str, Fixed] = {}

    def activation(self, largest: float) -> Fixed:
        """Return the format of an activation that reached `largest`."""
        chosen = fixed_for(largest, self.act_bits, HEADROOM_BITS)
        if chosen.frac < 0:
            raise InputError(f"cannot export to HLS: a tensor reaches {largest:.3g}, too much for {self.act_bits} bits")
        return chosen

    def source(self, node: fx.Node) -> tuple[float, int]:
        """Return (largest magnitude, fractional bits) of the first input of a node."""
        name = first_input(node)
        if name == "tokens":
            return 1.0, 8
        return self.results[name].limit, self.results[name].frac

    def linear(self, node: fx.Node, module: leaf.VitLinear) -> dict[str, Fixed]:
        weight = _weights(module.weight, self.weight_bits)
        return {
            "weight": weight,
            "bias": _weights(module.bias, self.act_bits),
            "accum": sum_format(self.source(node), module.weight, weight, module.bias, node.name),
        }

    def layernorm(self, node: fx.Node, module: leaf.VitLayerNorm) -> dict[str, Fixed]:
        self._check_norm(node, module.scale.numel())
        return {"scale": _weights(module.scale, self.weight_bits), "bias": _weights(module.bias, self.act_bits)}

    def position(self, node: fx.Node, module: leaf.VitPosition) -> dict[str, Fixed]:
        return {"table": _weights(module.table, self.act_bits)}

    def attention(self, node: fx.Node, module: leaf.VitAttention) -> dict[str, Fixed]:
        source = self.results[first_input(node)]
        position: Any = self.calibration.graph.get_submodule("position")
        # Bits of: the fraction of a score; a context sum times a reciprocal (m3vit_attention.h).
        needed = max(2 * source.frac, source.width + PROB_FRAC + math.ceil(math.log2(position.table.shape[0])) + 20 - 8)
        if needed > ACCUMULATOR_LIMIT_BITS:
            raise InputError(f"cannot export to HLS: {node.name} needs {needed}-bit sums; give smaller act_bits")
        return {}

    def moe(self, node: fx.Node, module: leaf.VitMoE) -> dict[str, Fixed]:
        seen = self.calibration.inner[node.name]
        matrices = {name: _weights(getattr(module, name), self.weight_bits) for name in ("router_w", "w1", "w2")}
        vectors = {name: _weights(getattr(module, name), self.act_bits) for name in ("router_b", "b1", "b2")}
        hidden, expert = self.activation(seen["hidden"]), self.activation(seen["expert"])
        x = self.source(node)
        sum_format(x, module.router_w, matrices["router_w"], module.router_b, f"the router of {node.name}")
        sum_format(x, module.w1, matrices["w1"], module.b1, f"expert layer 1 of {node.name}")
        inner = (hidden.limit, hidden.frac)
        sum_format(inner, module.w2, matrices["w2"], module.b2, f"expert layer 2 of {node.name}")
        return {**matrices, **vectors, "hidden": hidden, "expert": expert}

    def task_head(self, node: fx.Node, module: leaf.VitTaskHead) -> dict[str, Fixed]:
        dim = module.weight.shape[1]
        self._check_norm(node, dim)
        weight = _weights(module.weight, self.weight_bits)
        sum_format((math.sqrt(dim), NORM_FRAC), module.weight, weight, module.bias, "the task head")
        return {"weight": weight, "bias": _weights(module.bias, self.act_bits)}

    def pixel_head(self, node: fx.Node, module: leaf.VitPixelHead) -> dict[str, Fixed]:
        weight = _weights(module.weight, self.weight_bits)
        sum_format(self.source(node), module.weight.flatten(1), weight, module.bias, "the convolution of the heads")
        return {"weight": weight, "bias": _weights(module.bias, self.act_bits)}

    def _check_norm(self, node: fx.Node, dim: int) -> None:
        source = self.results[first_input(node)]
        if dim**3 >= 2 ** (63 - 2 * (source.width - 1)):
            raise InputError(
                f"cannot export to HLS: LayerNorm {node.name} over {dim} channels of {source.width} bits needs sums "
                "over 63 bits; give smaller act_bits or a narrower trunk"
            )

    def choose(self) -> dict[str, dict[str, Fixed]]:
        """Return {hls4ml layer name: {type name: format}} for every layer but the inputs."""
        rules: dict[type, Any] = {
            leaf.VitLinear: self.linear,
            leaf.VitLayerNorm: self.layernorm,
            leaf.VitPosition: self.position,
            leaf.VitAttention: self.attention,
            leaf.VitMoE: self.moe,
            leaf.VitTaskHead: self.task_head,
            leaf.VitPixelHead: self.pixel_head,
        }
        formats = {}
        for node in self.calibration.graph.graph.nodes:
            if node.op not in ("call_module", "call_function"):
                continue
            types: dict[str, Fixed] = {}
            if node.op == "call_module":
                module = self.calibration.graph.get_submodule(node.target)
                types = rules[type(module)](node, module) if type(module) in rules else {}
            self.results[node.name] = self.activation(self.calibration.outputs[node.name])
            formats[node.name] = {"result": self.results[node.name], **types}
        return formats
