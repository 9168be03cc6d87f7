"""Putting slices of parameters into another order: hidden units, channels. What follows them is put in the same."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Move(NamedTuple):
    """A new order of a tensor's slices along a dimension: its n old places [n], or [E, n] of each of E experts.

    The tensor is `module`'s, a parameter or a buffer, by its `name`; experts are its first dimension.
    """

    module: nn.Module
    name: str
    dim: int
    order: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same shape, such as the parameter's moments in an optimiser, in this order."""
        order = self.order.to(tensor.device)
        if order.ndim == 1:
            return tensor.index_select(self.dim, order)
        shape = [len(order), *(1 for _ in tensor.shape[1:])]
        shape[self.dim] = order.shape[1]
        return tensor.gather(self.dim, order.view(shape).expand_as(tensor))


@torch.no_grad()
def carry_out(moves: Iterable[Move]) -> None:
    """Put tensors of modules in order, one after the other."""
    for move in moves:
        tensor = getattr(move.module, move.name)
        tensor.copy_(move.of(tensor))
