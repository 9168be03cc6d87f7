"""Timed C-simulation of a spatial project: hls4ml's and our layers as processes, joined by FIFOs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from m3vit.errors import InputError
from m3vit.export.hls.multiplexed.timing import recorded
from m3vit.export.hls.spatial.timing import FRAMES, TRACE, evaluated, record
from m3vit.hw.dataflow import DeadlockError, Recording, evaluate
from tests.conftest import Cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def timed(spatial: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, one image recorded for every task; its outputs were compared with those of hw csim."""
    folder = tmp_path_factory.mktemp("timed") / "project"
    shutil.copytree(spatial, folder, ignore=shutil.ignore_patterns("*.so", "*.exe"))
    record(folder)
    return folder


def test_a_frame(timed: Path) -> None:
    found = recorded(timed)
    content, frame = (timed / TRACE).read_bytes(), found["frames"][0]
    recording = Recording.parse(content[: frame["bytes"]])
    outputs = [name for name, cycles in recording.cycles.items() if len(cycles)]
    ours = evaluate(recording)
    written = ours.wrote[[fifo.name for fifo in ours.fifos].index(outputs[0])]
    np.testing.assert_array_equal(written, recording.cycles[outputs[0]])  # as the C++ found while it ran

    report = evaluated(timed, found)
    for task in report["tasks"].values():
        assert 0 < task["first"] < task["latency"] and task["interval"] < task["latency"]  # frames overlap
        assert max(part["share"] for part in task["processes"].values()) <= 1
        assert all(0 < fifo["held"] <= fifo["depth"] for fifo in task["fifos"].values())
    assert FRAMES > 2 and "II 1 and depth 12" in report["said"][0]
    # Nothing that only C-simulation has takes time: the log of the routing is a loop of its own there.
    source = (timed / "firmware" / "nnet_utils" / "m3vit_moe.h").read_text().splitlines()
    logged = {number for number, line in enumerate(source, 1) if "i < count" in line}
    assert logged and not any(f"m3vit_moe.h:{number} " in report["said"][0] for number in logged)


def test_other_assumptions_without_running_again(timed: Path) -> None:
    found = recorded(timed)
    base = evaluated(timed, found)["tasks"]["depth"]
    faster = evaluated(timed, found, {"clock": 400, "depth": 2})["tasks"]["depth"]
    assert faster["latency"] < base["latency"] and faster["latency_ms"] == faster["latency"] / 400e3
    held = max(fifo["held"] for fifo in base["fifos"].values())
    assert evaluated(timed, found, {"fifo": held + 1})["tasks"]["depth"]["first"] == base["first"]
    with pytest.raises(DeadlockError) as caught:
        evaluated(timed, found, {"fifo": 1})
    assert any(one.does == "writes" and one.depth == 1 and "cpy" in one.fifo for one in caught.value.stuck)


def test_the_command(cli: Cli, timed: Path, tmp_path: Path) -> None:
    words = ("hw", "csim", timed, "--timed", "--recorded")
    done = cli(*words, "--json", tmp_path / "out.json")
    assert done.returncode == 0 and "between frames" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["tasks"]["depth"]["interval"] > 0
    for more, message in ((["--fifo", "1"], "full at depth 1: it waits for"), (["--gap", "1"], "--gap: the spatial")):
        done = cli(*words, *more)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_an_edited_project_is_timed_again(timed: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(timed, tmp_path / "edited"))
    top = project / "firmware" / "m3vit.cpp"
    top.write_text(top.read_text() + "\n")
    with pytest.raises(InputError, match="was edited after it was timed"):
        recorded(project)
