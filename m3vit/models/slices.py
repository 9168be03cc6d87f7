"""The beginnings of parameters, which smaller budgets use, and where their gradients go."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_in_place = False


@contextmanager
def gradients_in_place() -> Iterator[None]:
    """Have backward passes in here add the gradient of a parameter's beginning to what `grad` has of it.

    Autograd would make a tensor of the whole parameter's size, zeros but for the beginning, and add all of it. For
    parameters that have a gradient already, of the same type, and for backward(), not torch.autograd.grad: it gets
    nothing then. Hooks of such parameters (those of several processes) are not told.
    """
    global _in_place
    before, _in_place = _in_place, True
    try:
        yield
    finally:
        _in_place = before


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, dim: int, count: int) -> Tensor:
        ctx.parameter, ctx.dim, ctx.count = parameter, dim, count
        return parameter.narrow(dim, 0, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,), parameter = gradients, ctx.parameter
        known = parameter.grad if parameter.is_leaf else None
        if _in_place and known is not None and known.dtype == grad.dtype and not torch.is_grad_enabled():
            known.narrow(ctx.dim, 0, ctx.count).add_(grad)
            return None, None, None
        whole = grad.new_zeros(parameter.shape)
        whole.narrow(ctx.dim, 0, ctx.count).copy_(grad)
        return whole, None, None


def first(parameter: Tensor, dim: int, count: int) -> Tensor:
    """Return a view of the first `count` of a parameter along a dimension, to which gradients go; all: itself."""
    if count == parameter.shape[dim]:
        return parameter
    if not torch.is_grad_enabled() or not parameter.requires_grad:
        return parameter.narrow(dim, 0, count)
    return _First.apply(parameter, dim, count)  # type: ignore[no-any-return]
