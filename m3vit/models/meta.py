"""Models of shapes alone, on torch's meta device: what torch works out there in Python, at length, is known."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KnownShapes(TorchFunctionMode):
    """Within it, tensors on the meta device are filled by nothing, and the functions of `_SHAPES` run at once.

    The shapes are those that torch finds by running a function's parts one by one (linear interpolation takes it 20
    ms). What does not fit is left for torch to refuse.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        first = args[0] if args else named.get("input")
        if isinstance(first, Tensor) and first.is_meta:
            if function in _FILLING:
                return first
            if (shape := _SHAPES.get(function)) is not None:
                return shape(*args, **named)
        return function(*args, **named)


def _alike(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(input)


def _resized(input: Tensor, size: Any = None, scale_factor: Any = None, *rest: Any, **named: Any) -> Tensor:
    if size is None and isinstance(scale_factor, int):
        size = [length * scale_factor for length in input.shape[2:]]
    if not isinstance(size, tuple | list) or len(size) != input.ndim - 2:
        return F.interpolate(input, size, scale_factor, *rest, **named)
    return input.new_empty(*input.shape[:2], *size)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return F.linear(input, weight, bias)  # which says so
    return input.new_empty(*input.shape[:-1], len(weight))


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
    if rest or named.get("attn_mask") is not None or key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        return F.scaled_dot_product_attention(query, key, value, *rest, **named)
    return torch.empty_like(query)


def _normalised(input: Tensor, normalized_shape: Sequence[int], *rest: Any, **named: Any) -> Tensor:
    if tuple(input.shape[-len(normalized_shape) :]) != tuple(normalized_shape):
        return F.layer_norm(input, normalized_shape, *rest, **named)
    return torch.empty_like(input)


_SHAPES: dict[Any, Callable[..., Tensor]] = {
    F.interpolate: _resized,
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _normalised,
    **dict.fromkeys((F.gelu, F.relu), _alike),
}
# What initialisation is made of; each returns the tensor that it changes.
_FILLING = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_}
_FILLING |= {Tensor.zero_, Tensor.fill_, Tensor.copy_}
