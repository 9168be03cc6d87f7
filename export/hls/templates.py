"""C++ emitted for our layers: a configuration struct and a call of the kernel in hw/include/m3vit_*.h."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from hls4ml.backends.template import FunctionCallTemplate, LayerConfigTemplate
from hls4ml.model.layers import Layer

from m3vit.export.hls import ir

SQRT_FRAC_BITS = 16  # of sqrt(n_dim) in m3vit_layernorm.h


class Kernel(NamedTuple):
    """A layer's kernel, its header m3vit_<header>.h, the sizes in its configuration, and further lines of that."""

    layer: type[ir.VitLayer]
    name: str
    header: str
    sizes: Sequence[str]
    constants: Callable[[Layer], list[str]] = lambda node: []


class ConfigTemplate(LayerConfigTemplate):
    """`struct configN` with the layer's sizes, types and constants."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        super().__init__(kernel.layer)

    def format(self, node: Layer) -> str:
        layer = self.kernel.layer
        sizes = [f"static const unsigned {name} = {node.get_attr(name)};" for name in self.kernel.sizes]
        types = [f"typedef {node.attributes[f'{name}_t'].name} {name}_t;" for name in (*layer.WEIGHTS, *layer.TYPES)]
        lines = "".join(f"    {line}\n" for line in [*sizes, *types, *self.kernel.constants(node)])
        return f"struct config{node.index} {{\n{lines}}};\n"


class CallTemplate(FunctionCallTemplate):
    """`nnet::vit::kernel<input types, output type, configN>(inputs, output, weights);`"""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        super().__init__(kernel.layer, include_header=[f"nnet_utils/m3vit_{kernel.header}.h"])

    def format(self, node: Layer) -> str:
        inputs = [node.get_input_variable(name) for name in node.inputs]
        output = node.get_output_variable()
        types = ", ".join([*(variable.type.name for variable in inputs), output.type.name, f"config{node.index}"])
        weights = [node.get_weights(name).name for name in self.kernel.layer.WEIGHTS]
        arguments = ", ".join([*(variable.name for variable in inputs), output.name, *weights])
        return f"nnet::vit::{self.kernel.name}<{types}>({arguments});"


def _norm_constants(node: Layer) -> list[str]:
    """Return what normalise_token (m3vit_layernorm.h) needs to know about n_dim and eps."""
    n_dim, precision = node.get_attr("n_dim"), node.get_input_variable(node.inputs[0]).type.precision
    eps_raw = max(1, round(n_dim**3 * node.get_attr("eps") * 4.0**precision.fractional))
    return [
        f"static const unsigned sqrt_dim = {round(math.sqrt(n_dim) * 2**SQRT_FRAC_BITS)};",
        f"static const unsigned long long eps_raw = {eps_raw}ull;",
    ]


def _moe_constants(node: Layer) -> list[str]:
    return [f"static const unsigned layer = {node.get_attr('moe_index')};"]


def _head_constants(node: Layer) -> list[str]:
    return [*_norm_constants(node), *_rows_by_task(node.get_attr("widths"))]


def _pixel_head_constants(node: Layer) -> list[str]:
    return _rows_by_task(node.get_attr("channels"))


def _rows_by_task(widths: list[int]) -> list[str]:
    first = ", ".join(str(sum(widths[:task])) for task in range(len(widths) + 1))
    return [
        f"static const unsigned n_rows = {sum(widths)};",
        f"static unsigned first_row(unsigned task) {{ static const unsigned t[n_task + 1] = {{{first}}}; "
        "return t[task]; }",
    ]


PIXEL_HEAD_SIZES = ("n_tok", "n_dim", "n_row", "n_column", "n_scale", "n_unrectified", "n_out", "n_task")
MOE_SIZES = ("n_tok", "n_dim", "n_hid", "n_exp", "n_top", "n_task")
KERNELS = (
    Kernel(ir.VitGelu, "gelu", "gelu", ("n_tok", "n_dim")),
    Kernel(ir.VitLayerNorm, "layernorm", "layernorm", ("n_tok", "n_dim"), _norm_constants),
    Kernel(ir.VitPosition, "position", "position", ("n_tok", "n_dim", "n_prefix")),
    Kernel(ir.VitAttention, "attention", "attention", ("n_tok", "n_dim", "n_head")),
    Kernel(ir.VitMoE, "moe", "moe", MOE_SIZES, _moe_constants),
    Kernel(ir.VitTaskHead, "task_head", "head", ("n_tok", "n_dim", "n_prefix", "n_out", "n_task"), _head_constants),
    Kernel(ir.VitPixelHead, "pixel_head", "pixel_head", PIXEL_HEAD_SIZES, _pixel_head_constants),
)
# What hls4ml's register_template calls to make each.
TEMPLATES = tuple(partial(template, kernel) for template in (ConfigTemplate, CallTemplate) for kernel in KERNELS)
