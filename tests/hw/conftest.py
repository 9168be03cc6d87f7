"""The simulators of the engines, compiled once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.hw.programs import FORMATS, SANITIZERS, Builds, Simulator, hardware_of


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """For each format the simulator at -O2, with products as synthesis has them, and with both sanitizers at -O0."""
    folder = tmp_path_factory.mktemp("engines")

    def build(job: tuple[str, int]) -> Simulator:
        name, place = job
        return Simulator.build(
            folder / f"{name}-{place}", hardware_of(name), (["-O2", "-DM3VIT_AS_SYNTHESISED"], SANITIZERS)[place]
        )

    jobs = [(name, place) for name in FORMATS for place in range(2)]
    with ThreadPoolExecutor(2) as pool:
        built = dict(zip(jobs, pool.map(build, jobs), strict=True))
    return {name: [built[name, 0], built[name, 1]] for name in FORMATS}
