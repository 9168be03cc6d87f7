"""`m3vit hw csim --timed` of an emitted project: recorded once, evaluated under other assumptions, edits followed."""

import json
import shutil
from pathlib import Path

import pytest

from m3vit.errors import InputError
from m3vit.export.hls.contents import open_project
from m3vit.export.hls.multiplexed.timing import evaluated, record, recorded, summary
from m3vit.hw.sim.rtl import find_tool
from m3vit.hw.validate import all_hold, rtl_rows, validate
from m3vit.report.hardware import hardware_part
from tests.conftest import Cli
from tests.export.models import TASKS
from tests.export.multiplexed.test_edits import edit, quick_builds
from tests.hw.test_csynth import XML

pytestmark = pytest.mark.slow
__all__ = ["quick_builds"]  # for all tests here


@pytest.fixture(scope="module")
def timed(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that was timed; read only."""
    copy = Path(shutil.copytree(project, tmp_path_factory.mktemp("timed") / "project"))
    record(copy, 2)
    return copy


def test_frames_are_the_closed_form_and_can_be_evaluated_again(timed: Path) -> None:
    found = recorded(timed)
    report = evaluated(timed, found)
    assert list(report["tasks"]) == TASKS and report["clock_mhz"] == 300 and report["images"] == 2
    assert all_hold(validate({"project": report}))
    for task in report["tasks"].values():
        low, high = task["ms_over_images"]
        assert low <= task["ms"] <= high
        assert sum(engine["cycles"] for engine in task["engines"].values()) == sum(
            entry["cycles"] for entry in task["instructions"]
        )
    first = report["tasks"]["depth"]
    said = f"depth {first['ms']:.2f} ({first['modelled_cycles'] / 3e5:.2f}), semseg"
    assert said in summary(timed) and "Timed C-simulation of a frame on zcu104 at 300 MHz" in summary(timed)
    slower = evaluated(timed, found, {"clock": 150, "depth": 20, "gap": 2})
    for name, task in slower["tasks"].items():
        assert task["ms"] > report["tasks"][name]["ms"] and task["loops_ms"] == 2 * report["tasks"][name]["loops_ms"]
    assert slower["assumed"]["depth"] == 20 and slower["assumed"]["gap"] == 2
    with pytest.raises(InputError, match="--bus-bits 100: a part of the ports' 128 bits"):
        evaluated(timed, found, {"bus_bits": 100})


def test_an_edited_project_is_timed_as_it_is(timed: Path, tmp_path: Path) -> None:
    """An array of half the size, and half the clock: what was recorded is refused, and other cycles come out."""
    before = evaluated(timed, recorded(timed))
    copy = Path(shutil.copytree(timed, tmp_path / "copy"))
    text = (copy / "firmware/parameters.h").read_text()
    array = int(text.partition("tile_out = ")[2].partition(";")[0])
    edit(copy, "firmware/parameters.h", f"tile_out = {array};", "tile_out = 16;")
    edit(copy, "project.tcl", "clock_period 3.333", "clock_period 6.667")
    with pytest.raises(InputError, match=r"edited after it was timed \(firmware/parameters\.h\)"):
        recorded(copy)
    found = evaluated(copy, record(copy))
    assert found["clock_mhz"] == 150 and found["changes"]["project.tcl"] == "clock_period 3.333, now 6.667"
    for name, task in found["tasks"].items():
        assert task["cycles"] > before["tasks"][name]["cycles"]
    edit(copy, "firmware/nnet_utils/m3vit_integer.h", "if (", "if (!")
    with pytest.raises(InputError, match=r"of the timed C-simulation are not|failed"):
        record(copy)


def test_the_command(cli: Cli, timed: Path, spatial: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "timed.json", tmp_path / "timeline.svg"
    done = cli("hw", "csim", timed, "--timed", "--recorded", "--gap", "1", "--json", out, "--timeline", picture)
    assert done.returncode == 0, done.stderr
    assert "timed C-simulation" in done.stdout and "II 2 and depth 12: router_place" in done.stdout
    assert json.loads(out.read_text())["tasks"]["depth"]["instructions"][0]["loops"]["norm_pixel"]["passes"] == 1
    assert picture.read_text().count("<svg") == 1
    for words, message in (
        (["hw", "csim", timed, "--gap", "1"], "--gap: give --timed too"),
        (["hw", "csim", timed, "--timed", "--recorded", "--samples", "1"], "leave out --samples"),
        (["hw", "csim", timed, "--timed", "--timeline", tmp_path / "x.txt"], "ends in .png, .svg"),
        (["hw", "csim", timed, "--timed", "--recorded", "--fifo", "2"], "--fifo: the engines have no FIFOs"),
        (["hw", "csim", spatial, "--timed", "--timeline", tmp_path / "x.svg"], "--timeline: the spatial schedule"),
        (["hw", "csim", timed, "--timed", "--samples", "99"], "samples 99"),
    ):
        done = cli(*words)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_the_page_has_every_level(timed: Path) -> None:
    manifest, _ = open_project(timed)
    part = hardware_part(timed, manifest)
    assert part is not None and part["note"] == "" and len(part["charts"]) == 4
    same = {task: found["ms"] for task, found in evaluated(timed, recorded(timed))["tasks"].items()}
    for task, levels in part["levels"].items():
        assert list(levels) == ["modelled", "modelled, the same routing", "timed C-sim"]
        assert levels["timed C-sim"] == same[task]
        assert levels["timed C-sim"] == pytest.approx(levels["modelled, the same routing"], rel=0.05)
    modelled, moved = part["json"]["bytes"]["modelled"], part["json"]["bytes"]["timed C-sim"]
    assert modelled.keys() == moved.keys()
    for kind in ("weights", "narrow", "wide"):
        assert moved[kind] == pytest.approx(modelled[kind], rel=0.2)  # modelled: tokens spread at random
    assert hardware_part(timed, {"schedule": "spatial"}) is None


def test_a_report_of_vitis_takes_the_place_of_what_was_assumed(cli: Cli, timed: Path, tmp_path: Path) -> None:
    """Step at II = 2, its depth 31: twice the trips, and 31 - 2 cycles a pass instead of 12."""
    (tmp_path / "csynth.xml").write_text(XML)
    out = tmp_path / "report.json"
    done = cli("hw", "report", timed, "--csynth", tmp_path / "csynth.xml", "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["loops"]["compute_step"]["reported"] == {"ii": 2, "depth": 29}
    assert found["loops"]["norm_row"]["reported"] is None and found["resources"]["dsp"]["reported"] == 1100
    assert "not found" in done.stdout and "1100 reported" in done.stdout
    steps = evaluated(timed, recorded(timed))["tasks"]["depth"]["instructions"]
    more = sum(
        entry["loops"]["compute_step"]["trips"] + 17 * entry["loops"]["compute_step"]["passes"]
        for entry in steps
        if "compute_step" in entry["loops"]
    )
    alone = evaluated(timed, recorded(timed), {"read": 0, "write": 0})
    slower = evaluated(timed, recorded(timed), {"read": 0, "write": 0}, {"compute_step": (2, 29)})
    gained = slower["tasks"]["depth"]["cycles"] - alone["tasks"]["depth"]["cycles"]
    assert gained == pytest.approx(more, rel=0.05)  # a pass that waits for its memory waits for it still
    (tmp_path / "csynth.xml").write_text(
        XML.replace("Step", "Other").replace("First", "Other").replace("Place", "Other")
    )
    done = cli("hw", "report", timed, "--csynth", tmp_path / "csynth.xml")
    assert done.returncode == 2 and "none of the loops of the engines" in done.stderr


def test_the_rtl_of_its_experts(cli: Cli, timed: Path, spatial: Path, tmp_path: Path) -> None:
    """Words of the emulator and cycles of timed C-simulation, on exported weights and the routing of an image."""
    try:
        find_tool("verilator")
    except InputError as error:
        pytest.skip(str(error))
    out = tmp_path / "rtl.json"
    done = cli("hw", "rtl", timed, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    (layer,) = found["layers"]
    assert layer["different"] == 0 and sum(layer["tokens"]) == 2 * 13 and layer["tokens"] in found["queues_recorded"]
    assert abs(layer["difference"]) < 0.005 and abs(layer["at_bandwidth"]["difference"]) < 0.05
    assert layer["timed_cycles"] > layer["timed_as_assumed_cycles"]
    assert "RTL (Verilator)" in done.stdout and "compute_step 38" in done.stdout
    assert all_hold(validate(engines={"project": found}))
    assert not all_hold(list(rtl_rows("project", {**found, "layers": [{**layer, "cycles": layer["cycles"] * 1.01}]})))
    part = hardware_part(timed, open_project(timed)[0])
    assert part is not None and part["rtl"]["task"] == found["task"]
    assert [(row["rtl"], row["different"]) for row in part["rtl"]["layers"]] == [(layer["cycles"], 0)]
    for words, message in (
        ([timed, "--layer", "2"], "--layer 2: give 1 to 1"),
        ([timed, "--task", "sky"], f"--task sky: choose from {', '.join(TASKS)}"),
        ([spatial], "the RTL is of --schedule multiplexed"),
    ):
        done = cli("hw", "rtl", *words)
        assert done.returncode == 2 and message in done.stderr, done.stderr
