"""Fixtures of both HLS schedules. Each has its own `project` and `report`."""

import shutil
from pathlib import Path

import pytest

from m3vit.models.multitask import MultiTaskModel
from tests.export.models import make_model


@pytest.fixture(scope="session")
def model() -> MultiTaskModel:
    """With a class token and LayerScale, which take their own paths through export."""
    return make_model({"class_token": True, "init_values": 0.5})


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """A copy of the project, to spoil."""
    return Path(shutil.copytree(project, tmp_path / "copy", ignore=shutil.ignore_patterns("*.so", "*.exe")))
