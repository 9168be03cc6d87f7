"""Fixtures of both HLS schedules. Each has its own `project` and `report`."""

import json
import shutil
from pathlib import Path

import pytest

from m3vit.digests import read_sealed_json
from m3vit.export.hls.project import export_project
from m3vit.export.hls.verify import verify_project
from m3vit.models.multitask import MultiTaskModel
from tests.conftest import once
from tests.export.models import make_images, make_model, make_samples


@pytest.fixture(scope="session")
def model() -> MultiTaskModel:
    """With a class token and LayerScale, which take their own paths through export."""
    return make_model({"class_token": True, "init_values": 0.5})


@pytest.fixture(scope="session")
def spatial(model: MultiTaskModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spatial project of the model as `m3vit hw csim` leaves it, both simulators built; read only."""

    def make(out: Path) -> None:
        export_project(model, out, calibration=make_images(4, seed=9), samples=make_samples())
        report = verify_project(out)
        assert read_sealed_json(out / "csim.json", "a test") == json.loads(json.dumps(report))

    return once(tmp_path_factory, "spatial_project", make)


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """A copy of the project, to spoil."""
    return Path(shutil.copytree(project, tmp_path / "copy", ignore=shutil.ignore_patterns("*.so", "*.exe")))
