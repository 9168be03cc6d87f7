"""A multiplexed project and its simulation, shared by all tests of this folder."""

from pathlib import Path
from typing import Any

import pytest

from m3vit.export.hls.verify import verify_project
from m3vit.models.multitask import MultiTaskModel
from tests.export.multiplexed.exporting import export


@pytest.fixture(scope="session")
def simulated(model: MultiTaskModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("multiplexed") / "project"
    export(model, out)
    return out, verify_project(out)


@pytest.fixture(scope="session")
def project(simulated: tuple[Path, dict[str, Any]]) -> Path:
    """An emitted project as `m3vit hw csim` leaves it, the simulator built, whatever test comes first; read only."""
    return simulated[0]


@pytest.fixture(scope="session")
def report(simulated: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """What `m3vit hw csim` returned for the project."""
    return simulated[1]
