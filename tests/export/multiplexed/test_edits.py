"""An edited project is simulated as it is: right if the emulator's words come out, else refused, the edit named."""

import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3vit.digests import UncheckedWarning, read_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation.artefacts import open_predictor
from m3vit.evaluation.protocols import NetworkImage
from m3vit.export.hls.verify import OUTPUTS, REPORT, SimulatedOutputs, verify_project
from tests.export.models import TASKS, make_images
from tests.test_digests import flips

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers are the same whatever the compiler optimises."""
    monkeypatch.setattr("m3vit.hw.sim.csim.MULTIPLEXED_FLAGS", ("-O1", "-std=c++11", "-Wno-unknown-pragmas"))


def edit(project: Path, name: str, old: str, new: str) -> None:
    text = (project / name).read_text()
    assert old in text, name
    (project / name).write_text(text.replace(old, new, 1))


def halve_the_array(project: Path) -> None:
    (line,) = (line for line in (project / "firmware/parameters.h").read_text().splitlines() if "tile_out" in line)
    edit(project, "firmware/parameters.h", line, "    static const unsigned tile_out = 8;")


def test_another_array_and_clock_give_the_same_words(copy: Path, report: dict[str, Any], project: Path) -> None:
    halve_the_array(copy)
    edit(copy, "project.tcl", "clock_period 3.333", "clock_period 6.667")
    names = ["firmware/parameters.h", "project.tcl"]
    made = verify_project(copy, 2)
    assert made["changed_files"] == names and made["different_words"] == 0
    assert read_sealed_json(copy / REPORT, "a test")["changed_files"] == names
    assert SimulatedOutputs.load(copy).summary.endswith(
        "; changed since the export: firmware/parameters.h, project.tcl."
    )
    predictor, info, _ = open_predictor(copy, "cpu", 1)
    assert info["changed_files"] == names
    images = [NetworkImage("", make_images(1)[0], slice(0, 24), slice(0, 32))]
    for task, logits in open_predictor(project, "cpu", 1)[0].run(images).items():
        np.testing.assert_array_equal(predictor.run(images)[task], logits)
    edit(copy, "project.tcl", "clock_period 6.667", "clock_period 5")  # which no simulation reads
    SimulatedOutputs.load(copy)
    done = subprocess.run(["make", "check", "CXXFLAGS=-O1"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and f"0 of {len(TASKS)} frames differ" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("firmware/nnet_utils/m3vit_integer.h", "if (", "if (!", "of 5760 words of the C-simulation are not"),
        ("firmware/parameters.h", "unsigned head = ", "unsigned head = 1 + 0 * ", "error|killed by|words"),
        ("firmware/parameters.h", "act_bits = 16", "act_bits = 14", "is for 16-bit words and 16-bit activations"),
        ("firmware/m3vit.cpp", "#include", "#inclde", "building the test bench failed: .*error: invalid"),
        ("m3vit_test.cpp", "fwrite(memory.output", "if (frame) fwrite(memory.output", "outputs that cannot be read"),
        (
            "m3vit_test.cpp",
            "    const bool check",
            "    return 3;\n    const bool check",
            "exit code 3: it said",
        ),
    ],
)
def test_a_wrong_edit_is_found_and_named(copy: Path, name: str, old: str, new: str, message: str) -> None:
    edit(copy, name, old, new)
    with pytest.raises(InputError, match=f"(?s)({message}).*; changed since the export: {name}"):
        verify_project(copy, 1)
    with pytest.raises(InputError, match=f"{Path(name).name}.*: simulate it"):  # the older results are of other sources
        SimulatedOutputs.load(copy)


def test_no_flipped_bit_of_what_was_simulated_passes(copy: Path, report: dict[str, Any], project: Path) -> None:
    for name in (REPORT, OUTPUTS):
        content = (project / name).read_bytes()
        for other in (REPORT, OUTPUTS):
            (copy / other).write_bytes((project / other).read_bytes())
        for spoilt in flips(content, 200):
            (copy / name).write_bytes(spoilt)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", UncheckedWarning)
                    simulated = SimulatedOutputs.load(copy)
            except (InputError, UncheckedWarning) as error:
                assert "simulate it: m3vit hw csim" in str(error) or isinstance(error, UncheckedWarning)
            else:  # white space
                assert name == REPORT and simulated.report == SimulatedOutputs.load(project).report
    (copy / OUTPUTS).unlink()
    with pytest.raises(InputError, match="not found: simulate it"):
        SimulatedOutputs.load(copy)
