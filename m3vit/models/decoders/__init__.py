"""Decoders: what turns the backbone's tokens into the logits of the tasks. Which there are; no torch.

A decoder is a class of `base.Decoder`; `model.head` names it. One from outside the package is added with `add_decoder`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from m3vit.errors import InputError, short
from m3vit.values import function_at


class Entry(NamedTuple):
    """One decoder.

    build: a function of (config, backbone, **model.head_args) that returns a `Decoder`, or where it is
    ("module:function"), so that naming decoders imports no torch. reads: keys of the model's configuration that it
    looks at, out of head_stride and distillation.
    """

    build: str | Callable[..., Any]
    reads: tuple[str, ...] = ()


DECODERS: dict[str, Entry] = {
    "linear": Entry("m3vit.models.decoders.linear:linear", ("head_stride",)),
    "conv": Entry("m3vit.models.decoders.conv:conv", ("head_stride",)),
    "pup": Entry("m3vit.models.decoders.pup:pup", ("distillation",)),
    "multiscale": Entry("m3vit.models.decoders.multiscale:multiscale", ("head_stride",)),
    "taskexpert": Entry("m3vit.models.decoders.taskexpert:taskexpert", ("head_stride",)),
}
READABLE = ("head_stride", "distillation")


def add_decoder(name: str, build: str | Callable[..., Any], reads: Sequence[str] = ()) -> None:
    """Add a decoder as `model.head` NAME, see `Entry`; raise InputError if it cannot be one."""
    if name in DECODERS:
        raise InputError(f"there is a decoder {name!r} already: give another name")
    if not name.isidentifier():
        raise InputError(f"a decoder cannot be called {name!r}: give letters, digits and _")
    if not callable(build) and not (isinstance(build, str) and ":" in build):
        raise InputError(f"decoder {name} is {short(build)}: give a function that builds it, or its 'module:function'")
    if unknown := sorted(set(reads) - set(READABLE)):
        raise InputError(f"decoder {name} reads {', '.join(unknown)}: choose from {', '.join(READABLE)}")
    DECODERS[name] = Entry(build, tuple(reads))


def builder(name: str) -> Callable[..., Any]:
    """Return the function that builds a decoder, or raise InputError if it cannot be imported."""
    return function_at(f"decoder {name}", DECODERS[name].build)


def check_args(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise InputError if a decoder does not take these arguments (model.head_args)."""
    if not arguments:
        return
    signature = inspect.signature(builder(name))
    try:
        signature.bind(None, None, **arguments)
    except TypeError as error:
        own = list(signature.parameters)[2:]
        raise InputError(
            f"model.head_args is {short(dict(arguments))}, and head {name} takes {', '.join(own) or 'none'} ({error})"
        ) from None
