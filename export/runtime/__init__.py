"""What runs an exported package: onnxruntime, numpy and pillow. Nothing here imports torch.

`m3vit.export.runtime.Package` is `Package` of package.py, which a program needs to predict; it is imported when it is
asked for, so that the modules that need no onnxruntime come without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3vit.export.runtime.package import Package

__all__ = ["Package"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from m3vit.export.runtime import package

    return getattr(package, name)
