"""The simulators of the engines, compiled once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import once
from tests.hw.programs import FORMATS, SANITIZERS, Builds, Simulator, hardware_of


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """For each format the simulator at -O2, with products as synthesis has them, and with both sanitizers at -O0."""
    jobs = [(name, place) for name in FORMATS for place in range(2)]

    def make(folder: Path) -> None:
        def build(job: tuple[str, int]) -> None:
            name, place = job
            flags = (["-O2", "-DM3VIT_AS_SYNTHESISED"], SANITIZERS)[place]
            Simulator.build(folder / f"{name}-{place}", hardware_of(name), flags)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(build, jobs))

    folder = once(tmp_path_factory, "engines", make)
    return {name: [Simulator(folder / f"{name}-{place}" / "csim.exe") for place in range(2)] for name in FORMATS}
