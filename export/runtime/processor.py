"""What this machine's processor can do: whom a cache of laid out weights is for."""

import platform
from pathlib import Path

from m3vit.export.runtime.ort import EXACT, onnxruntime


def machine() -> str:
    """Return what a cache is made for: the processor, its instructions, onnxruntime's version and what it is told."""
    features = sorted(cpu_flags())
    said = "=".join(EXACT)
    return f"{platform.system()} {platform.machine()} onnxruntime {onnxruntime.__version__} {said} {' '.join(features)}"


def cpu_flags() -> set[str]:
    """Return the processor's features as Linux names them; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next(
        (set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set()
    )
