"""The seam of HLS schedules: names, options, an incomplete one, and a third one from outside the package."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from m3vit.errors import InputError
from m3vit.evaluation.artefacts import open_predictor
from m3vit.evaluation.protocols import NetworkImage
from m3vit.export.hls.schedules import SCHEDULES, choose_options, find_schedule
from m3vit.export.hls.verify import SimulatedOutputs, verify_project
from m3vit.hw.manifest import NEEDS, Needs
from m3vit.models.multitask import MultiTaskModel
from tests.export.models import SAMPLES, TASKS, make_images, make_samples

# A schedule that simulates the lowered model itself, in float.
ELSEWHERE = """
import numpy as np
import torch

from m3vit.export.hls import leaf
from m3vit.export.hls.schedules import Runner, Simulated
from m3vit.hw.sim.csim import tokenise

LIMITS, ACT_BITS, BOARD = {"weight_bits": (16,), "act_bits": (32,)}, 32, None

def write(folder, model, calibration, options):
    lowered = leaf.lower(model)
    torch.save(lowered, folder / "model.pt")
    return lowered, {}

def write_bench(folder, images, outputs, manifest):
    np.savetxt(folder / "tb_data" / "first.txt", outputs["depth"][0])

def readme(manifest):
    return "# float, for " + ", ".join(task["name"] for task in manifest["tasks"])

@torch.no_grad()
def outputs(project, images, manifest):
    lowered, tokens = torch.load(project / "model.pt", weights_only=False), torch.from_numpy(tokenise(images, 8))
    ids = [torch.full((len(tokens), 1), float(task)) for task in range(len(manifest["tasks"]))]
    return torch.stack([lowered(tokens, task) for task in ids], dim=1).numpy()

def simulate(project, images, manifest, progress):
    with np.load(project / "tb_data" / "samples.npz") as stored:
        names = [task["name"] for task in manifest["tasks"]]
        experts = np.stack([stored[f"experts_{name}_0"][: len(images)] for name in names], axis=1)
    return Simulated(outputs(project, images, manifest), [experts], {"s_per_image": {"torch": 0.0}})

def agreement(report):
    return "there is one way only"

def said(report):
    return ["in float"]

def runner(project, manifest):
    return Runner("float", 4, lambda images: outputs(project, images, manifest))
"""


def test_a_schedule_from_outside(model: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from m3vit.export.hls.project import export_project

    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(SCHEDULES, "float", "elsewhere")
    monkeypatch.setitem(NEEDS, "float", Needs(files=("model.pt",)))
    out = tmp_path / "project"
    export_project(model, out, calibration=make_images(1), samples=make_samples(), schedule="float")
    assert (out / "README.md").read_text() == "# float, for " + ", ".join(TASKS)
    report = verify_project(out)
    assert all(result["worst_error_relative"] < 1e-4 and result["flips"] == 0 for result in report["tasks"].values())
    assert "there is one way only" in SimulatedOutputs.load(out).summary
    predictor, _, _ = open_predictor(out, "cpu", 1)
    pixels = make_images(SAMPLES)[:2]
    logits = predictor.run([NetworkImage("", image, slice(0, 24), slice(0, 32)) for image in pixels])
    assert predictor.name == "float" and list(logits) == TASKS and logits["depth"].shape == (2, 1, 24, 32)
    stored = SimulatedOutputs.load(out).outputs["depth"][:2]
    np.testing.assert_allclose(np.load(out / "tb_data" / "samples.npz")["output_depth"][:2], stored, atol=1e-4)


def test_what_is_no_schedule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="schedule is 'both': choose from spatial, multiplexed"):
        find_schedule("both")
    monkeypatch.setitem(SCHEDULES, "half", "math")
    with pytest.raises(
        InputError, match="schedule half: math has no LIMITS, ACT_BITS, BOARD, write, write_bench, readme"
    ):
        find_schedule("half")


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ("spatial", (5, None, None), "weight_bits is 5: the spatial schedule has 6 to 24"),
        ("spatial", (16, 25, None), "act_bits is 25: the spatial schedule has 8 to 24"),
        ("spatial", (16, None, "zcu104"), "(its part is in project.tcl): leave it out or give --schedule multiplexed"),
        ("multiplexed", (16, 9, None), "act_bits is 9: the multiplexed schedule has 8, 10, 12, 14, 16"),
        ("multiplexed", (16, 9, "zcu1"), "--board zcu1: choose from kv260, pynq-z2, u280"),
    ],
)  # fmt: skip
def test_options_that_a_schedule_has_not(schedule: str, options: tuple, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        choose_options(schedule, *options)


def test_defaults_of_each_schedule() -> None:
    assert choose_options("spatial", 16, None, None).act_bits == 20
    chosen = choose_options("multiplexed", 8, None, None)
    assert (chosen.act_bits, chosen.board) == (16, "zcu104")


def test_the_table_needs_neither_torch_nor_hls4ml() -> None:
    script = "import sys, m3vit.export.hls.schedules; sys.exit(any(m in sys.modules for m in ('torch', 'hls4ml')))"
    subprocess.run([sys.executable, "-c", script], check=True)
