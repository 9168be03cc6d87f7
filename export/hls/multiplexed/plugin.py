"""hls4ml finds this module by the entry point `hls4ml.backends` and calls `register`."""

from collections.abc import Callable
from typing import Any

NAME = "VitisMoE"  # of the backend


def register(*, register_backend: Callable[[str, Any], None], register_writer: Callable[[str, Any], None]) -> None:
    """Make the backend VitisMoE and its writer known to hls4ml."""
    from m3vit.export.hls.multiplexed.backend import VitisMoEBackend
    from m3vit.export.hls.multiplexed.writer import VitisMoEWriter

    register_writer(NAME, VitisMoEWriter)
    register_backend(NAME, VitisMoEBackend)
