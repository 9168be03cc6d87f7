"""Losses from outside, by name: what `train.losses` may give a task instead of its kind's own. No torch."""

from collections.abc import Callable
from typing import Any

from m3vit.errors import InputError, short
from m3vit.values import function_at

# name -> function(logits [B, C, H, W] float32, label, valid bool [B, H, W], count) -> the loss: a sum over the valid
# pixels divided by `count`, how many of them the whole batch has; or where that function is, "module:function".
LOSSES: dict[str, str | Callable[..., Any]] = {}


def add_loss(name: str, function: str | Callable[..., Any]) -> None:
    """Make a loss known as `train.losses.TASK=NAME`, or raise InputError if it cannot be one."""
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"a loss cannot be called {short(name)}: give letters, digits and _")
    if name in LOSSES:
        raise InputError(f"there is a loss {name!r} already: give another name")
    if not callable(function) and not (isinstance(function, str) and ":" in function):
        raise InputError(f"loss {name} is {short(function)}: give a function, or its 'module:function'")
    LOSSES[name] = function


def loss_named(name: str) -> Callable[..., Any]:
    """Return a loss, or raise InputError if it cannot be imported."""
    return function_at(f"loss {name}", LOSSES[name])
