"""The README.md of a time-multiplexed project."""

from typing import Any


def readme(manifest: dict[str, Any]) -> str:
    """Return the text."""
    return "# m3vit\n"
