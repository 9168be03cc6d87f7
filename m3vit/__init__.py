"""m3vit: task-gated mixture-of-experts vision transformers, from training to ONNX and HLS.

What a program calls is here (docs/api.md), imported when it is asked for: `import m3vit` itself imports nothing else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3vit.api import (
        build_model,
        configure,
        evaluate,
        export_hls,
        export_onnx,
        forward_intermediates,
        load_package,
        load_run,
        routing_statistics,
        train,
    )
    from m3vit.errors import InputError

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "build_model",
    "configure",
    "evaluate",
    "export_hls",
    "export_onnx",
    "forward_intermediates",
    "load_package",
    "load_run",
    "routing_statistics",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("m3vit.errors" if name == "InputError" else "m3vit.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
