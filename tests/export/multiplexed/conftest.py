"""A multiplexed project and its simulation, shared by all tests of this folder."""

from pathlib import Path
from typing import Any

import pytest

from m3vit.export.hls.verify import verify_project
from m3vit.models.multitask import MultiTaskModel
from tests.export.multiplexed.exporting import export


@pytest.fixture(scope="session")
def project(model: MultiTaskModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emitted project; read only."""
    out = tmp_path_factory.mktemp("multiplexed") / "project"
    export(model, out)
    return out


@pytest.fixture(scope="session")
def report(project: Path) -> dict[str, Any]:
    """What `m3vit hw csim` returns for the project, which leaves the simulator built."""
    return verify_project(project)
