"""Several budgets in one project: programs around one set of weights, and a register that picks one."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from m3vit.commands.hls import run_cost
from m3vit.errors import InputError
from m3vit.export.hls.multiplexed import tracing
from m3vit.export.hls.multiplexed.scheduler import Units
from m3vit.export.hls.multiplexed.timing import evaluated, record
from m3vit.export.hls.project import reference
from m3vit.export.hls.schedules import silent
from m3vit.export.hls.tracing import Reference, compare, first_of, trace
from m3vit.export.hls.verify import verify_project
from m3vit.hw.isa import Experts, Linear, Route
from m3vit.hw.manifest import WEIGHTS, budget_names, find_budget, read_manifest, top_ks
from m3vit.hw.program import Image
from m3vit.hw.sim import csim
from m3vit.hw.sim.emulator import Emulator
from m3vit.models.budget import Budget
from m3vit.models.budget_file import write_budget
from m3vit.models.multitask import MultiTaskModel
from tests.export.models import TASKS, make_images, make_model, make_samples
from tests.export.multiplexed.exporting import export
from tests.export.multiplexed.test_driver import ModelledDevice, emitted_driver, modelled_allocate

Cli = Callable[..., subprocess.CompletedProcess]
# Blocks 0 and 2 are dense with 64 hidden units, block 1 has experts with 32. Light: tasks with other numbers of
# experts, widths that fill no word of a port, a block less. Mid: another block less, which light has.
BUDGETS = {
    "full": Budget(),
    "light": Budget({"depth": {1: 1}, "semseg": {1: 2}, "edge": {1: 1}}, width={0: 35, 1: 9, 2: 0}),
    "mid": Budget({task: {1: 1} for task in TASKS}, width={0: 0, 1: 16, 2: 32}),
}


@pytest.fixture(scope="module")
def other() -> MultiTaskModel:
    return make_model({"depth": 3}, moe_blocks=[1])


@pytest.fixture(scope="module")
def several(other: MultiTaskModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("budgets") / "project"
    export(other, out, budgets=BUDGETS)
    return out


@pytest.fixture(scope="module")
def judged(several: Path) -> dict[str, Any]:
    return verify_project(several, 2)


def test_units_in_parts() -> None:
    """What is computed from the first parts is what the first units give, in plain numbers."""
    rng, units = np.random.default_rng(0), Units((3, 8, 21), 8)
    assert units.spans == [(0, 3), (3, 8), (8, 21)] and units.places == [0, 8, 16, 29]
    w1, w2, x = rng.normal(size=(21, 5)), rng.normal(size=(4, 21)), rng.normal(size=5)
    apart = units.filled(w1, 0)
    assert apart.shape == (29, 5) and not apart[3:8].any()
    for count in units.ends:
        wanted = w2[:, :count] @ np.tanh(w1[:count] @ x)
        parts, hidden = units.parts(count), np.tanh(apart @ x)
        end = units.places[parts - 1] + count - units.spans[parts - 1][0]
        np.testing.assert_allclose(units.filled(w2, 1)[:, :end] @ hidden[:end], wanted)


def test_weights_lie_once(several: Path, other: MultiTaskModel, tmp_path: Path) -> None:
    """A further budget costs its program: all weights are those of the whole model, but for what parts are filled up
    with, and a smaller budget reads the beginnings of what a larger one reads."""
    export(other, tmp_path / "alone")
    alone, image = (Image.read(folder / WEIGHTS) for folder in (tmp_path / "alone", several))
    filled = 2 * 32 * (13 + 3) * 4 + 2 * 32 * (13 + 16)  # at most: parts of 35, 9 and 7 filled up to 16
    assert 0 <= image.weights.size - alone.weights.size <= filled
    assert image.gates.size == alone.gates.size
    full, light, mid = (image.program_of(number) for number in range(3))
    stored = {one.weights for one in full if isinstance(one, Linear | Experts)}
    for program in (light, mid):
        assert {one.weights for one in program if isinstance(one, Linear | Experts)} < stored
    assert [one.n_out for program in (full, light, mid) for one in program if getattr(one, "gelu_in", -1) >= 0] == [
        *(48 + 29, 16, 16, 16, 32 + 32),
        *(35, 16),
        *(16, 16, 32),
    ]
    assert [(one.task, one.top_k) for one in light if isinstance(one, Route)] == [(0, 1), (1, 2), (2, 1)]
    assert [(one.task, one.top_k) for one in mid if isinstance(one, Route)] == [(-1, 1)]


def test_every_budget_is_the_emulators_and_torchs(judged: dict[str, Any], several: Path, other: MultiTaskModel) -> None:
    assert judged["budget"] == "full" and list(judged["budgets"]) == ["light", "mid"]
    for found in (judged, *judged["budgets"].values()):
        assert found["different_words"] == 0 and found["words"] == 2 * 3 * 12 * max(
            task["outputs"] for task in read_manifest(several)["tasks"]
        )
        for result in found["tasks"].values():
            assert result["mean_error_relative"] < 1e-3 and result["flips"] == 0
    manifest = read_manifest(several)
    assert [top_ks(manifest, number) for number in range(3)] == [[[2, 2, 2]], [[1, 2, 1]], [[1, 1, 1]]]
    with np.load(several / "tb_data" / "samples.npz") as stored:  # what torch gave, stored by the budget's number
        for number, name in enumerate(BUDGETS):
            wanted, _ = reference(other, stored["images"], "edge", BUDGETS[name])
            found = stored[f"budget{number}_output_edge" if number else "output_edge"]
            np.testing.assert_array_equal(found, wanted.numpy())


def test_budgets_switch_from_frame_to_frame(judged: dict[str, Any], several: Path) -> None:
    """In any order, in one run: every word, every chosen expert and every saturated value is the emulator's alone."""
    rng = np.random.default_rng(3)
    images = make_images(9, seed=5)
    tasks, budgets = rng.permutation(np.repeat(np.arange(3), 3)), rng.permutation(np.tile(np.arange(3), 3))
    result = csim.run_frames(several, images, tasks, budgets=budgets)
    assert result.expert_ids[0].shape == (9, 12, 2)
    for frame, (task, budget) in enumerate(zip(tasks.tolist(), budgets.tolist(), strict=True)):
        found = Emulator.open(several / WEIGHTS, budget).run(images[frame], task)
        np.testing.assert_array_equal(result.outputs[frame].ravel(), found.outputs)
        (chosen,), ids = found.expert_ids, result.expert_ids[0][frame]
        np.testing.assert_array_equal(ids[:, : chosen.shape[1]], chosen)
        assert (ids[:, chosen.shape[1] :] == -1).all()
    with pytest.raises(InputError, match="give each frame one, 0 to 2"):
        csim.run_frames(several, images[:1], tasks[:1], budgets=np.array([3]))


def test_another_number_of_experts_by_task_alone(other: MultiTaskModel, tmp_path: Path) -> None:
    """One budget may have it too; its engines hold the most."""
    budget = Budget({"depth": {1: 3}, "semseg": {1: 1}, "edge": {1: 2}})
    manifest = export(other, tmp_path / "out", budget=budget)
    assert (budget_names(manifest), top_ks(manifest), manifest["hardware"]["max_top"]) == (["budget"], [[3, 1, 2]], 3)
    emulator, (image,) = Emulator.open(tmp_path / "out" / WEIGHTS), make_images(1, seed=8)
    for number, (task, count) in enumerate({"depth": 3, "semseg": 1, "edge": 2}.items()):
        wanted, routings = reference(other, image[None], task, budget)
        found = emulator.run(image, number)
        assert found.expert_ids[0].shape[1] == count == routings[0].expert_ids_RNK.shape[-1]
        words = found.outputs.reshape(12, -1)[:, : wanted.shape[-1]] * 2.0 ** -manifest["output_fracs"][number]
        assert np.abs(words - wanted[0].numpy()).mean() < 1e-3 * float(wanted.std())


@pytest.mark.slow
def test_the_driver_switches_budgets(several: Path, tmp_path: Path) -> None:
    device = ModelledDevice(shutil.copytree(several, tmp_path / "board"))
    with emitted_driver(several) as driver:
        accelerator = driver.Accelerator(device, modelled_allocate, several)
    manifest = read_manifest(several)
    before = {name: accelerator.buffers[name].copy() for name in ("weights", "params")}
    (image,) = make_images(1, seed=11)
    for budget, task in (("full", 0), ("light", 1), ("mid", 1), ("light", 2), (0, 2), (2, 0)):
        accelerator.set_budget(budget)
        accelerator.set_task(task)
        number = budget if isinstance(budget, int) else list(BUDGETS).index(budget)
        assert accelerator.ip.words[accelerator.ip.offset("entry")] == manifest["entries"][number]
        words = Emulator.open(several / WEIGHTS, number).run(image, task).outputs.reshape(12, -1)
        wanted = words[:, : manifest["tasks"][task]["outputs"]] * 2.0 ** -manifest["output_fracs"][task]
        np.testing.assert_array_equal(accelerator.run(image), wanted.astype(np.float32))
    for name, buffer in before.items():
        np.testing.assert_array_equal(buffer, accelerator.buffers[name])
    with pytest.raises(ValueError, match="no budget 'slow': this accelerator has full, light, mid"):
        accelerator.set_budget("slow")


def test_cost_by_budget(several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cost([str(several), "--budget", "light", "--task", "semseg", "--json", str(tmp_path / "cost.json")])
    printed = capsys.readouterr().out
    assert "task 1, budget light" in printed and "\nbudget mid: " in printed
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["macs"] == found["budgets"]["light"]["macs"] < found["budgets"]["full"]["macs"]
    assert found["budgets"]["mid"]["ms"] < found["budgets"]["full"]["ms"]
    with pytest.raises(InputError, match="no budget 'slow': choose from full, light, mid"):
        run_cost([str(several), "--budget", "slow"])


def test_timed_by_budget(several: Path) -> None:
    """Cycles of a budget's own program: closed form and timed C-simulation keep to each other as of one budget."""
    report = evaluated(several, record(several, budget="light"))
    assert report["budget"] == "light" and set(report["tasks"]) == set(TASKS)
    program = Image.read(several / WEIGHTS).program_of(find_budget(read_manifest(several), "light"))
    for found in report["tasks"].values():
        assert len(found["instructions"]) == len(program) and abs(found["difference"]) < 0.02


@pytest.mark.slow
def test_trace_of_a_budget(several: Path, judged: dict[str, Any], other: MultiTaskModel) -> None:
    """Layer by layer against torch under that budget: hidden units lie apart, sums come in parts, a block is out."""
    manifest, (pixels,) = read_manifest(several), make_images(1, seed=6)
    run: Any = SimpleNamespace(model=other)
    torch_of = Reference(run, several, manifest, 2)
    found = tracing.trace(several, manifest, pixels, 1, torch_of, silent, budget=2)
    layers = compare(found.layers, torch_of, pixels, 1)
    assert found.facts["whole_frame_different"] == 0
    assert first_of(layers, 0.01) == {"different": None, "out_of_bounds": None}
    bare = [layer["name"] for layer in layers if "own" not in layer]
    assert bare == ["image", "blocks_1_moe.route", "blocks_1_moe.part0"], "torch has nothing of a part"
    with pytest.raises(InputError, match="no budget 'slow'"):
        trace(several, budget="slow")


def test_a_damaged_table_of_programs_is_refused(several: Path, tmp_path: Path) -> None:
    data = bytearray((several / WEIGHTS).read_bytes())
    image = Image.read(several / WEIGHTS)
    at = int(np.frombuffer(data, np.int64, 20)[1]) + 4 * image.starts_at
    data[at + 4 : at + 8] = np.array([1 << 30], np.int32).tobytes()
    (tmp_path / "weights.bin").write_bytes(data)
    with pytest.raises(InputError, match="its programs"):
        Image.read(tmp_path / "weights.bin")


def test_one_budget_for_the_spatial_schedule(other: MultiTaskModel, tmp_path: Path) -> None:
    from m3vit.export.hls.project import export_project

    with pytest.raises(InputError, match="names 3 budgets, and a project of the spatial schedule has one"):
        export_project(other, tmp_path / "out", calibration=make_images(2), samples=make_samples(), budgets=BUDGETS)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_commands(cli: Cli, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A run that was not trained for budgets: experts per token by task, from files, in one project."""
    write_budget(tmp_path / "light.json", Budget({"depth": {1: 1}, "normals": {1: 1}}), {})
    words = ("export", "hls", tiny_run, "--samples", 1, "--budget", f"full,{tmp_path / 'light.json'}")
    result = cli(*words, "--out", tmp_path / "no")
    assert result.returncode == 2 and "names 2 budgets, and a project of the spatial" in result.stderr
    out = tmp_path / "hls"
    result = cli(*words, "--schedule", "multiplexed", "--weight-bits", 8, "--act-bits", 8, "--out", out)
    assert "budgets: full, light, each a program" in result.stdout, result.stderr
    done = cli("hw", "csim", out)
    assert done.stdout.count("output words equal the emulator's") == 2 and "budget light" in done.stdout, done.stderr
    evaluation = ("eval", out, "--data.root", tiny_data, "--workers", 1, "--budget")
    for name, folder in (("light", out / "budgets" / "light"), ("full", out)):
        assert cli(*evaluation, name).returncode == 0
        assert json.loads((folder / "eval.json").read_text())["protocols"]["A"]["budget"] == name
    done = cli(*evaluation, "slow")
    assert done.returncode == 2 and done.stderr.endswith("no budget 'slow': choose from full, light\n")
    assert cli(*words, "--schedule", "multiplexed", "--out", out).returncode == 0, "what eval left may be replaced"
