"""The hidden units of MLPs and experts: the first of them used alone, or cut off for what is made of a model."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.models.moe import MoELayer, first_units
from m3vit.models.of_timm import Mlp
from m3vit.models.slices import first


def mlp_width(block: Any) -> int | None:
    """Return the hidden units of a block's MLP; None for one whose units cannot be left out one by one.

    It must be Linear, activation, Linear: then a unit is a row of the first map and a column of the second.
    """
    mlp: Any = getattr(block, "mlp", None)
    if type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity) or not isinstance(mlp.fc1, nn.Linear):
        return None
    return int(mlp.fc1.out_features)


@contextmanager
def first_units_of(block: Any, width: int | None) -> Iterator[None]:
    """Have a block's MLP use its first `width` hidden units while in here; None: all.

    The block runs as it is, hooks and all (sharded training puts its weights together there): its MLP alone computes
    less.
    """
    if width is None:
        yield
        return
    block.mlp.forward = partial(_forward, block.mlp, width)
    try:
        yield
    finally:
        del block.mlp.forward


def _forward(mlp: Any, width: int, x: Tensor) -> Tensor:
    bias = None if mlp.fc1.bias is None else first(mlp.fc1.bias, 0, width)
    hidden = mlp.drop1(mlp.act(F.linear(x, first(mlp.fc1.weight, 0, width), bias)))
    return mlp.drop2(F.linear(hidden, first(mlp.fc2.weight, 1, width), mlp.fc2.bias))  # type: ignore[no-any-return]


def cut(model: Any, widths: Mapping[int, int]) -> Any:
    """Return a copy of a MultiTaskModel whose blocks have so many hidden units, by block, the first of its own.

    Blocks that are left out (0) stay.
    """
    small = copy.deepcopy(model) if widths else model
    for block, width in widths.items():
        if width == 0:  # whose place is to stay: blocks are named by it
            continue
        mlp: Any = small.backbone.trunk.blocks[block].mlp
        if isinstance(mlp, MoELayer):
            bank = first_units(mlp.experts, width)
            for name in ("w1", "b1", "w2"):
                setattr(mlp.experts, name, nn.Parameter(getattr(bank, name).detach().clone()))
            continue
        one, second = mlp.fc1, mlp.fc2
        bias = None if one.bias is None else nn.Parameter(one.bias[:width].detach().clone())
        one.weight, one.bias, one.out_features = nn.Parameter(one.weight[:width].detach().clone()), bias, width
        second.weight, second.in_features = nn.Parameter(second.weight[:, :width].detach().clone()), width
    return small
