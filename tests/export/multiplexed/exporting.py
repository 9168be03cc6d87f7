"""Exports of multiplexed projects with few images."""

from pathlib import Path
from typing import Any

from m3vit.export.hls.project import export_project
from m3vit.models.multitask import MultiTaskModel
from tests.export.models import make_images, make_samples


def export(model: MultiTaskModel, out: Path, **options: Any) -> dict[str, Any]:
    """Export with few images."""
    arguments: dict[str, Any] = {"calibration": make_images(4, seed=9), "samples": make_samples(), **options}
    return export_project(model, out, schedule="multiplexed", **arguments)
