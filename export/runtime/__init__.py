"""What runs an exported package: onnxruntime, numpy and pillow. Nothing here imports torch.

The names that a program needs to predict are here: they are package.py's, imported when they are asked for, so that
the modules that need no onnxruntime come without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m3vit.export.runtime.package import NotFinite, Package, PackageChanged, give_memory_back

__all__ = ["NotFinite", "Package", "PackageChanged", "give_memory_back"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from m3vit.export.runtime import package

    return getattr(package, name)
