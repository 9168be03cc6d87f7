"""C++ emitted for our layers: a configuration struct and a call of the kernel in hw/include/m3vit_*.h."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from hls4ml.backends.template import FunctionCallTemplate, LayerConfigTemplate
from hls4ml.model.layers import Layer

from m3vit.export.hls import ir

SQRT_FRAC_BITS = 16  # of sqrt(n_dim) in m3vit_layernorm.h


class ConfigTemplate(LayerConfigTemplate):
    """`struct configN` with the layer's sizes, types and constants."""

    layer: ClassVar[type[ir.VitLayer]]
    sizes: ClassVar[Sequence[str]] = ()

    def __init__(self) -> None:
        super().__init__(self.layer)

    def constants(self, node: Layer) -> list[str]:
        """Return further lines of the struct."""
        return []

    def format(self, node: Layer) -> str:
        sizes = [f"static const unsigned {name} = {node.get_attr(name)};" for name in self.sizes]
        types = [
            f"typedef {node.attributes[f'{name}_t'].name} {name}_t;"
            for name in (*self.layer.WEIGHTS, *self.layer.TYPES)
        ]
        lines = "".join(f"    {line}\n" for line in [*sizes, *types, *self.constants(node)])
        return f"struct config{node.index} {{\n{lines}}};\n"


class CallTemplate(FunctionCallTemplate):
    """`nnet::vit::kernel<input types, output type, configN>(inputs, output, weights);`"""

    layer: ClassVar[type[ir.VitLayer]]
    kernel: ClassVar[str]

    def __init__(self) -> None:
        header = {"task_head": "head"}.get(self.kernel, self.kernel)
        super().__init__(self.layer, include_header=[f"nnet_utils/m3vit_{header}.h"])

    def format(self, node: Layer) -> str:
        inputs = [node.get_input_variable(name) for name in node.inputs]
        output = node.get_output_variable()
        types = ", ".join([*(variable.type.name for variable in inputs), output.type.name, f"config{node.index}"])
        weights = [node.get_weights(name).name for name in self.layer.WEIGHTS]
        arguments = ", ".join([*(variable.name for variable in inputs), output.name, *weights])
        return f"nnet::vit::{self.kernel}<{types}>({arguments});"


def _norm_constants(node: Layer) -> list[str]:
    """Return what normalise_token (m3vit_layernorm.h) needs to know about n_dim and eps."""
    n_dim, precision = node.get_attr("n_dim"), node.get_input_variable(node.inputs[0]).type.precision
    eps_raw = max(1, round(n_dim**3 * node.get_attr("eps") * 4.0**precision.fractional))
    return [
        f"static const unsigned sqrt_dim = {round(math.sqrt(n_dim) * 2**SQRT_FRAC_BITS)};",
        f"static const unsigned long long eps_raw = {eps_raw}ull;",
    ]


class GeluConfig(ConfigTemplate):
    layer = ir.VitGelu
    sizes = ("n_tok", "n_dim")


class GeluCall(CallTemplate):
    layer = ir.VitGelu
    kernel = "gelu"


class LayerNormConfig(ConfigTemplate):
    layer = ir.VitLayerNorm
    sizes = ("n_tok", "n_dim")

    def constants(self, node: Layer) -> list[str]:
        return _norm_constants(node)


class LayerNormCall(CallTemplate):
    layer = ir.VitLayerNorm
    kernel = "layernorm"


class PositionConfig(ConfigTemplate):
    layer = ir.VitPosition
    sizes = ("n_tok", "n_dim", "n_prefix")


class PositionCall(CallTemplate):
    layer = ir.VitPosition
    kernel = "position"


class AttentionConfig(ConfigTemplate):
    layer = ir.VitAttention
    sizes = ("n_tok", "n_dim", "n_head")


class AttentionCall(CallTemplate):
    layer = ir.VitAttention
    kernel = "attention"


class MoEConfig(ConfigTemplate):
    layer = ir.VitMoE
    sizes = ("n_tok", "n_dim", "n_hid", "n_exp", "n_top", "n_task")

    def constants(self, node: Layer) -> list[str]:
        return [f"static const unsigned layer = {node.get_attr('moe_index')};"]


class MoECall(CallTemplate):
    layer = ir.VitMoE
    kernel = "moe"


class TaskHeadConfig(ConfigTemplate):
    layer = ir.VitTaskHead
    sizes = ("n_tok", "n_dim", "n_prefix", "n_out", "n_task")

    def constants(self, node: Layer) -> list[str]:
        widths: list[int] = node.get_attr("widths")
        first = ", ".join(str(sum(widths[:task])) for task in range(len(widths) + 1))
        return [
            *_norm_constants(node),
            f"static const unsigned n_rows = {sum(widths)};",
            f"static unsigned first_row(unsigned task) {{ static const unsigned t[n_task + 1] = {{{first}}}; "
            "return t[task]; }",
        ]


class TaskHeadCall(CallTemplate):
    layer = ir.VitTaskHead
    kernel = "task_head"


TEMPLATES: tuple[Any, ...] = (
    *(GeluConfig, LayerNormConfig, PositionConfig, AttentionConfig, MoEConfig, TaskHeadConfig),
    *(GeluCall, LayerNormCall, PositionCall, AttentionCall, MoECall, TaskHeadCall),
)
