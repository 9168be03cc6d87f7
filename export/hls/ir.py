"""Our layers in hls4ml's intermediate representation: attributes, weights and types of each.

Shapes: N tokens, D embedding dimension, H expert hidden width, E experts, K experts per token, R tasks.
"""

from typing import ClassVar

from hls4ml.model.attributes import Attribute, TypeAttribute, WeightAttribute
from hls4ml.model.layers import Layer


class VitLayer(Layer):
    """A layer with `WEIGHTS` {name: prefix of its C++ variable} and extra data types `TYPES`.

    Both get a type of their own, set by `Precision: {name: ...}` in the hls4ml configuration; hls4ml only reads those
    of weights and results by itself, hence _set_type_t.
    """

    WEIGHTS: ClassVar[dict[str, str]] = {}
    TYPES: ClassVar[tuple[str, ...]] = ()

    def output_shape(self) -> list[int]:
        """Return the shape of the output without the batch."""
        return list(self.get_input_variable(self.inputs[0]).shape)

    def initialize(self) -> None:
        self.add_output_variable(self.output_shape())
        for name, prefix in self.WEIGHTS.items():
            self.add_weights_variable(name, prefix + "{index}")
        for name in self.TYPES:
            self._set_type_t(name)


def _attributes(weights: dict[str, str], types: tuple[str, ...], *names: str) -> list[Attribute]:
    attributes = [Attribute(name) for name in names]
    attributes += [kind(name) for name in weights for kind in (WeightAttribute, TypeAttribute)]
    return attributes + [TypeAttribute(name) for name in types]


class VitGelu(VitLayer):
    """GELU on [N, D]."""

    _expected_attributes: ClassVar[list[Attribute]] = _attributes({}, (), "n_tok", "n_dim")


class VitLayerNorm(VitLayer):
    """LayerNorm on [N, D]; `eps` as in torch."""

    WEIGHTS: ClassVar[dict[str, str]] = {"scale": "s", "bias": "b"}
    _expected_attributes: ClassVar[list[Attribute]] = _attributes(WEIGHTS, (), "n_tok", "n_dim")


class VitPosition(VitLayer):
    """[N - n_prefix, D] -> [N, D]: constant prefix tokens first, position embedding added."""

    WEIGHTS: ClassVar[dict[str, str]] = {"table": "pos"}
    _expected_attributes: ClassVar[list[Attribute]] = _attributes(WEIGHTS, (), "n_tok", "n_dim", "n_prefix")

    def output_shape(self) -> list[int]:
        return [self.attributes["n_tok"], self.attributes["n_dim"]]


class VitAttention(VitLayer):
    """Self-attention: [N, 3 D] of (q | k | v) -> [N, D]."""

    _expected_attributes: ClassVar[list[Attribute]] = _attributes({}, (), "n_tok", "n_dim", "n_head")

    def output_shape(self) -> list[int]:
        return [self.attributes["n_tok"], self.attributes["n_dim"]]


class VitMoE(VitLayer):
    """Mixture of experts on [N, D]; second input: the task id. `moe_index` counts the model's MoE layers from 0."""

    WEIGHTS: ClassVar[dict[str, str]] = {
        "router_w": "rw",
        "router_b": "rb",
        "w1": "w1_",
        "b1": "b1_",
        "w2": "w2_",
        "b2": "b2_",
    }
    TYPES: ClassVar[tuple[str, ...]] = ("hidden", "expert")
    _expected_attributes: ClassVar[list[Attribute]] = _attributes(
        WEIGHTS, TYPES, "moe_index", "n_tok", "n_dim", "n_hid", "n_exp", "n_top", "n_task"
    )


class VitTaskHead(VitLayer):
    """[N, D] and the task id -> [N - n_prefix, n_out]: the Linear of that task, padded with zeros."""

    WEIGHTS: ClassVar[dict[str, str]] = {"weight": "w", "bias": "b"}
    _expected_attributes: ClassVar[list[Attribute]] = _attributes(
        WEIGHTS, (), "n_tok", "n_dim", "n_prefix", "n_out", "n_task"
    )

    def output_shape(self) -> list[int]:
        return [self.attributes["n_tok"] - self.attributes["n_prefix"], self.attributes["n_out"]]


class VitPixelHead(VitLayer):
    """[N, n_dim] and the task id -> [N, n_out]: ReLU and the 3x3 convolution of that task, padded with zeros.

    N = n_row * n_column tokens, each of n_scale^2 pixels, whose first n_unrectified features pass by the ReLU.
    """

    WEIGHTS: ClassVar[dict[str, str]] = {"weight": "w", "bias": "b"}
    _expected_attributes: ClassVar[list[Attribute]] = _attributes(
        WEIGHTS, (), "n_tok", "n_dim", "n_row", "n_column", "n_scale", "n_unrectified", "n_out", "n_task"
    )

    def output_shape(self) -> list[int]:
        return [self.attributes["n_tok"], self.attributes["n_out"]]


LAYERS: tuple[type[VitLayer], ...] = (
    VitGelu,
    VitLayerNorm,
    VitPosition,
    VitAttention,
    VitMoE,
    VitTaskHead,
    VitPixelHead,
)
