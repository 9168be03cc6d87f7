"""Images as callers give them: numpy arrays, and for everything else a word on how to make one."""

import os
from typing import Any

import numpy as np
from PIL import Image

from m3vit.errors import InputError

_READ = "m3vit.export.images.read_image"  # turns photographs upright, which PIL's own arrays are not


def require_array(value: Any, name: str, wanted: str) -> None:
    """Raise InputError unless `value` is a numpy array; `name`: what messages call it, with "is" or "are"."""
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise refusal(value, name, wanted)


def refusal(value: Any, name: str, wanted: str) -> InputError:
    """Return the error for a value that is not what is wanted."""
    what, advice = _described(value)
    return InputError(f"{name} {what}: give {wanted}{advice and '; '}{advice}")


def _described(value: Any) -> tuple[str, str]:
    """Return what a value is, and how to make an array of it."""
    if isinstance(value, str | os.PathLike):
        return f"a path ({str(value)[:40]})", f"{_READ} reads a file as one"
    if isinstance(value, Image.Image):
        advice = f"numpy.asarray(image.convert('RGB')) is one, {_READ} reads a file as one, upright"
        return f"a PIL image ({value.mode}, {value.width} x {value.height})", advice
    if isinstance(value, list | tuple):
        advice = "numpy.stack makes one of several arrays, numpy.array of nested lists"
        return f"a {type(value).__name__} of {len(value)}", advice
    if isinstance(value, np.ma.MaskedArray):
        return "a masked array", "its method filled makes one"
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"a {name}", "numpy.asarray makes one, of what is on the CPU" if hasattr(value, "__array__") else ""
