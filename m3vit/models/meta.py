"""Models of shapes alone, on torch's meta device: what torch works out there in Python, at length, is known."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
                others = (*args[1:], *named.values())
                return function(*args, **named) if any(isinstance(one, Tensor) for one in others) else first
            if (shape := _SHAPES.get(function)) is not None:
                return shape(*args, **named)
        return function(*args, **named)


@contextmanager
def without_values() -> Iterator[None]:
    """Within it, models are built on the meta device."""
    with KnownShapes(), torch.device("meta"):
        yield


def _alike(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(input)


def _activated(input: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate not in ("none", "tanh"):
        return F.gelu(input, approximate=approximate)
    return torch.empty_like(input)


def _resized(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    usual = (
        input.ndim == 4
        and not antialias
        and not recompute_scale_factor
        and (mode == "bilinear" or (mode == "nearest" and align_corners is None))
    )
    found: Any = size if scale_factor is None else None
    if size is None and type(scale_factor) is int:
        found = [length * scale_factor for length in input.shape[2:]]
    if usual and isinstance(found, tuple | list) and len(found) == 2:
        if all(type(length) is int and length > 0 for length in found):
            return input.new_empty(*input.shape[:2], *found)
    return F.interpolate(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return F.linear(input, weight, bias)  # which says so
    return input.new_empty(*input.shape[:-1], len(weight))


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
    alike = query.shape[:-2] == key.shape[:-2] and query.shape[-1] == key.shape[-1] and key.shape == value.shape
    if rest or named.get("attn_mask") is not None or not alike:
        return F.scaled_dot_product_attention(query, key, value, *rest, **named)
    return query.new_empty(query.shape)


def _normalised(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    last = tuple(input.shape[-len(normalized_shape) :])
    shapes = [normalized_shape, *(given.shape for given in (weight, bias) if given is not None)]
    if any(tuple(shape) != last for shape in shapes):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return input.new_empty(input.shape)


_SHAPES: dict[Any, Callable[..., Tensor]] = {
    F.interpolate: _resized,
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _normalised,
    F.gelu: _activated,
    F.relu: _alike,
}
# What initialisation is made of; each returns the tensor that it changes, by numbers alone.
_FILLING = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_}
_FILLING |= {Tensor.zero_, Tensor.fill_, Tensor.copy_}
