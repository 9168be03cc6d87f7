"""The whole HLS path on a tiny model: lowering, precisions, emitted project, C-simulation both ways, its checks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import GluMlp
from timm.models.vision_transformer import ResPostBlock

from m3vit.cli import main
from m3vit.digests import read_sealed_json
from m3vit.errors import InputError
from m3vit.export.hls import from_run, leaf
from m3vit.export.hls.project import export_project
from m3vit.export.hls.spatial import fixed_point, schedule
from m3vit.export.hls.verify import SimulatedOutputs, verify_project
from m3vit.hw.sim import csim
from m3vit.models.budget import Budget
from m3vit.models.multitask import MultiTaskModel
from m3vit.run_folder import load_run
from m3vit.tasks import TASKS as TASK_TABLE
from tests.export.models import SAMPLES, TASKS, make_images, make_model, make_samples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def project(spatial: Path) -> Path:
    """An emitted project; read only."""
    return spatial


@pytest.fixture(scope="session")
def report(project: Path) -> dict[str, Any]:
    """What `m3vit hw csim` returned for the project, both of whose simulators are built."""
    return read_sealed_json(project / "csim.json", "a test")


def all_runs() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and task ids of every (image, task), the task changing from run to run."""
    tokens = csim.tokenise(make_images(SAMPLES), 8).repeat(len(TASKS), axis=0)
    return tokens, np.tile(np.arange(len(TASKS)), SAMPLES)


# --- lowering and precisions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trunk", "config"),
    [
        ({}, {}),
        ({"class_token": True, "reg_tokens": 2}, {"moe_blocks": [0, 1]}),
        ({"class_token": True, "no_embed_class": True}, {"moe_blocks": "none"}),
        ({"init_values": 0.1, "pre_norm": True}, {"router": "task_conditioned"}),
        ({"qkv_bias": False}, {"router": "single", "top_k": 1}),
    ],
)
def test_lowering_keeps_the_function(trunk: dict[str, Any], config: dict[str, Any]) -> None:
    lowered = leaf.lower(make_model(trunk, **config))  # asserts equality for every task itself, in float64
    tokens = torch.from_numpy(csim.tokenise(make_images(2), 8))
    with torch.no_grad():
        assert lowered(tokens, torch.ones(2, 1)).shape == (2, 12, 160)  # 40 classes, 2 x 2 outputs a patch


def test_lowering_matches_the_model_in_float32(model: MultiTaskModel) -> None:
    lowered, images = leaf.lower(model), make_images(2)
    for task_id, task in enumerate(TASKS):
        expected, _ = leaf.reference_outputs(model, leaf.normalise(images, model.normalisation), task)
        with torch.no_grad():
            y = lowered(torch.from_numpy(csim.tokenise(images, 8)), torch.full((2, 1), float(task_id)))
        # 1e-5: float32 sums in another order, since the normalisation is folded into the weights.
        assert (y[..., : expected.shape[-1]] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("trunk", "config", "message"),
    [
        ({"qk_norm": True}, {}, "block 0 is not plain softmax attention"),
        ({"act_layer": "silu"}, {}, "MLP of block 0 is a Mlp with SiLU"),
        ({"mlp_layer": GluMlp}, {}, "MLP of block 0 is a GluMlp with GELU"),
        ({"block_fn": ResPostBlock}, {}, "block 0 is a ResPostBlock"),
        ({}, {"trunk": "vit_small_patch16_dinov3"}, "vit_small_patch16_dinov3 has rotary positions"),
        ({}, {"trunk": "eva_giant_patch14_224"}, "block 0 is a EvaBlock"),
        ({"depth": 7}, {"moe_blocks": list(range(7))}, "7 MoE layers"),
    ],
)
def test_lowering_refuses_what_it_cannot_export(trunk: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        schedule.lower(make_model(trunk, **config))


def test_lowering_keeps_to_a_budget() -> None:
    budget = Budget({task: {0: 1, 1: 4} for task in TASKS})
    lowered = leaf.lower(make_model(moe_blocks=[0, 1]), budget)  # asserts equality itself, with the same budget
    assert [layer.top_k for layer in lowered.moe_layers()] == [1, 4]


def test_lowering_keeps_to_widths() -> None:
    model = make_model({"depth": 3})
    whole = model.hidden_widths()
    widths = {0: whole[0] // 2, 1: whole[1] // 4}
    lowered = leaf.lower(model, Budget(width=widths))  # asserts equality itself: the model runs with the same budget
    first, experts, last = lowered.blocks
    assert (first.fc1.weight.shape[0], experts.moe.w1.shape[1], last.fc1.weight.shape[0]) == (
        *widths.values(),
        whole[2],
    )
    assert model.hidden_widths() == whole
    assert len(leaf.lower(model, Budget(width={2: 0})).blocks) == 2
    with pytest.raises(InputError, match="block 0: width is 999, but its MLP has"):
        leaf.lower(model, Budget(width={0: 999}))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget({"depth": {1: 1}}), r"another top_k for each task in block 1 \(depth 1, semseg 2, edge 2\)"),
        (Budget(kept={task: {1: (0, 1, 3)} for task in TASKS}), "leaves experts of block 1 out"),
        (Budget({"depth": {0: 1}}), "the blocks with experts are 1"),
        (Budget({task: {1: 5} for task in TASKS}), "depth, block 1: top_k is 5 with 4 experts kept"),
    ],
)
def test_lowering_refuses_a_budget_that_the_engines_cannot_keep_to(
    model: MultiTaskModel, budget: Budget, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        schedule.lower(model, budget)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", "depth=1"], "another top_k for each task"),
        (["--top-k", "9"], "--top-k is '9': give a number, 1 to 4"),
    ],
)
def test_a_top_k_of_one_task_is_refused(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = tmp_path / "project"
    assert main(["export", "hls", str(tiny_run), "--out", str(out), "--samples", "1", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    ("largest", "width", "headroom", "integer"),
    # 1.0 needs 1 bit above the point and the sign; 0.4 < 2^-1 needs only the sign; 0.2 < 2^-2 one less than that.
    [(0.99, 16, 0, 1), (1.0, 16, 0, 2), (0.4, 16, 0, 0), (0.2, 16, 0, -1), (5.0, 20, 1, 5)],
)
def test_integer_bits(largest: float, width: int, headroom: int, integer: int) -> None:
    chosen = fixed_point.fixed_for(largest, width, headroom)
    assert (chosen.width, chosen.integer) == (width, integer)
    assert largest <= chosen.limit - 2.0**-chosen.frac


def test_accumulator_too_wide_is_refused() -> None:
    weight = torch.ones(1, 64)
    with pytest.raises(InputError, match="accumulator"):
        fixed_point.sum_format((2.0**20, 30), weight, fixed_point.Fixed(16, -8), torch.zeros(1), "test")


def test_not_finite_weights_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        fixed_point.fixed_for(float("nan"), 16)


# --- the emitted project --------------------------------------------------------------------------------------------


def test_every_precision_is_stated(project: Path) -> None:
    config = (project / "hls4ml_config.yml").read_text()
    assert "auto" not in config
    assert "PytorchModel: null" in config
    types = (project / "firmware" / "defines.h").read_text().splitlines()
    arrays = [line for line in types if line.startswith("typedef nnet::array<ap_fixed")]
    assert arrays and all("AP_RND,AP_SAT" in line.replace(" ", "") for line in arrays)


def test_hls4mls_own_layers_are_used(project: Path) -> None:
    top = (project / "firmware" / "m3vit.cpp").read_text()
    for kernel in ("pointwise_conv_1d_cl<", "add<", "clone_stream<"):
        assert f"nnet::{kernel}" in top
    for kernel in ("position", "layernorm", "attention", "gelu", "moe", "task_head"):
        assert f"nnet::vit::{kernel}<" in top


def test_no_path_of_this_machine(project: Path) -> None:
    for path in (p for p in project.rglob("*") if p.suffix in (".md", ".yml", ".json", ".tcl", ".sh", ".cpp", ".h")):
        assert str(project.parent) not in path.read_text(), path


def test_existing_project_is_replaced_and_survives_a_failure(
    copy: Path, model: MultiTaskModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "csim.json").write_text("{}")

    def export() -> None:
        export_project(model, copy, calibration=make_images(1), samples=make_samples())

    with monkeypatch.context() as patch:
        patch.setattr(schedule, "write_project", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export()
    assert (copy / "csim.json").exists() and os.listdir(copy.parent) == ["copy"]
    export()
    assert not (copy / "csim.json").exists() and os.listdir(copy.parent) == ["copy"]


def test_foreign_folder_is_left_alone(tmp_path: Path, model: MultiTaskModel) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"is not empty and holds no project \(no m3vit.json\)"):
        export_project(model, tmp_path, calibration=make_images(1), samples=make_samples())
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("change", [{"weight_bits": 40}, {"act_bits": 2}, {"calibration": np.zeros((1, 8, 8, 3))}])
def test_bad_arguments(tmp_path: Path, model: MultiTaskModel, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"calibration": make_images(1), "samples": make_samples(), **change}
    with pytest.raises(InputError, match=next(iter(change))):
        export_project(model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


# --- C-simulation ---------------------------------------------------------------------------------------------------


def test_simulation_agrees_with_torch(report: dict[str, Any]) -> None:
    assert report["images"] == SAMPLES
    assert list(report["tasks"]) == TASKS
    for task, result in report["tasks"].items():
        # Tokens whose top-k did not flip differ by rounding alone: 16-bit weights, 20-bit activations.
        assert result["worst_error_unflipped"] < 2e-3 * result["worst_error"] / max(
            result["worst_error_relative"], 1e-9
        )
        assert result["mean_error_relative"] < 1e-3
        assert result["tokens"] == SAMPLES * 12
        assert result["decisions"] == SAMPLES * 13  # one MoE layer, and a class token
        # A flip needs a near tie: logits carry the error of 16-bit weights and 20-bit activations.
        assert result["largest_flip_margin"] < 5e-3
        # Not every metric: the IoU of a class with few pixels and the best threshold jump with one of them.
        metric = TASK_TABLE[task].metric
        assert result["csim"][metric] == pytest.approx(result["torch"][metric], rel=0.01)


def test_bridge_and_test_bench_agree_to_print_precision(report: dict[str, Any]) -> None:
    # The test bench prints six significant digits: half a unit of the sixth is 5e-6 of 1; float32 adds its rounding.
    assert report["bridge_vs_testbench"] < 5.1e-6


def test_switching_tasks_changes_nothing(report: dict[str, Any], project: Path) -> None:
    tokens, task_ids = all_runs()
    mixed = csim.run_bridge(project, tokens, task_ids)
    for task_id in range(len(TASKS)):
        chosen = task_ids == task_id
        alone = csim.run_bridge(project, tokens[chosen], task_ids[chosen])
        np.testing.assert_array_equal(mixed.outputs[chosen], alone.outputs)
        np.testing.assert_array_equal(mixed.expert_ids[0][chosen], alone.expert_ids[0])
        width = csim.read_manifest(project)["tasks"][task_id]["outputs"]
        assert not alone.outputs[..., width:].any() and alone.outputs[..., :width].any()
    routes = mixed.expert_ids[0].reshape(SAMPLES, len(TASKS), -1)
    assert (routes[:, 0] != routes[:, 1]).any()  # the task does reach the router


def test_linear_stand_in_equals_hls4mls_kernel(
    report: dict[str, Any], project: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, task_ids = all_runs()
    monkeypatch.setattr(csim, "FLAGS", (*csim.FLAGS, "-DM3VIT_HLS4ML_DENSE"))
    csim.build_testbench(copy)
    theirs = csim.run_testbench(copy, tokens, task_ids)
    np.testing.assert_array_equal(csim.run_testbench(project, tokens, task_ids).outputs, theirs.outputs)


def test_hls4ml_takes_up_the_project_from_disk(report: dict[str, Any], copy: Path, project: Path) -> None:
    script = (
        "import hls4ml, numpy as np; x = np.load('in.npz');"
        "m = hls4ml.converters.link_existing_project('.'); m.compile();"
        "np.save('out.npy', m.predict([x['tokens'], x['task']]))"
    )
    tokens, task_ids = all_runs()
    np.savez(copy / "in.npz", tokens=tokens, task=task_ids[:, None].astype(np.float32))
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=copy, check=True, capture_output=True)
    ours = csim.run_bridge(project, tokens, task_ids).outputs
    np.testing.assert_array_equal(np.load(copy / "out.npy").reshape(ours.shape), ours)


def test_test_bench_runs_as_emitted(report: dict[str, Any], project: Path, copy: Path) -> None:
    shutil.copy(project / csim.TESTBENCH, copy)
    subprocess.run(["./" + csim.TESTBENCH], cwd=copy, check=True, capture_output=True)
    simulated = np.loadtxt(copy / "tb_data" / "csim_results.log")
    expected = np.loadtxt(copy / "tb_data" / "tb_output_predictions.dat")
    simulated, expected = simulated.reshape(len(TASKS), -1), expected.reshape(len(TASKS), -1)
    # torch against fixed point; the mean, since a token may have flipped.
    assert np.abs(simulated - expected).mean() < 1e-3 * expected.std()


def test_simulated_outputs_for_the_report(report: dict[str, Any], project: Path) -> None:
    simulated = SimulatedOutputs.load(project)
    assert simulated.ids == [f"image{i}" for i in range(SAMPLES)]
    assert simulated.outputs["semseg"].shape == (SAMPLES, 12, 160)
    assert f"{SAMPLES} images" in simulated.summary and "not synthesised" in simulated.summary


@pytest.mark.parametrize("victim", ["firmware/weights/w1_*.txt", "firmware/defines.h"])
def test_changed_files_are_noticed(copy: Path, victim: str) -> None:
    path = next(copy.glob(victim))
    path.write_text(path.read_text().replace("0", "1", 1))
    with pytest.raises(InputError, match=f"{path.name} was changed since export"):
        verify_project(copy)
    path.unlink()
    with pytest.raises(InputError, match=f"{path.name} is missing"):
        verify_project(copy)


def test_files_of_the_users_are_not_deleted(report: dict[str, Any], copy: Path) -> None:
    arguments: dict[str, Any] = {"calibration": make_images(1), "samples": make_samples()}
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not the project's \(notes.txt\)"):
        export_project(make_model(), copy, **arguments)
    assert (copy / "notes.txt").read_text() == "mine"
    (copy / csim.MANIFEST).write_text('{"a": 1}')
    with pytest.raises(InputError, match="is not an HLS project's"):
        export_project(make_model(), copy, **arguments)


def test_more_samples_than_stored(project: Path) -> None:
    with pytest.raises(InputError, match=f"holds {SAMPLES} images"):
        verify_project(project, SAMPLES + 1)


def test_not_a_project(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="m3vit export hls"):
        verify_project(tmp_path)
    (tmp_path / csim.MANIFEST).write_text("{}")
    with pytest.raises(InputError, match="export the project again"):
        verify_project(tmp_path)


def test_no_compiler(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match="no g\\+\\+ found: install it"):
        verify_project(project)
    monkeypatch.setenv("CXX", "fancy-c++")
    with pytest.raises(InputError, match="CXX is 'fancy-c\\+\\+'"):
        csim.find_compiler()


def test_bad_inputs_of_a_simulation(report: dict[str, Any], project: Path) -> None:
    tokens, task_ids = all_runs()
    with pytest.raises(InputError, match="give \\[n, 12, 192\\]"):
        csim.run_bridge(project, tokens[:, :3], task_ids)
    with pytest.raises(InputError, match="0 to 2"):
        csim.run_bridge(project, tokens, task_ids + 1)
    with pytest.raises(InputError, match="pixel / 256"):
        csim.run_testbench(project, tokens * 0.999, task_ids)


def test_simulating_needs_neither_torch_nor_hls4ml() -> None:
    script = "import sys, m3vit.hw.sim.csim; sys.exit(any(m in sys.modules for m in ('torch', 'hls4ml')))"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_lowering_is_checked_on_a_part_of_large_images(model: MultiTaskModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid is the model's all the same; what lowering gets wrong is found on the part."""
    whole = leaf.lower(model)
    monkeypatch.setattr(leaf, "CHECKED_PATCHES", 2)
    lowered = leaf.lower(model)
    assert lowered.grid == whole.grid
    assert all(torch.equal(a, b) for a, b in zip(lowered.parameters(), whole.parameters(), strict=True))
    monkeypatch.setattr(leaf, "LOG2_E", 1.5)
    with pytest.raises(AssertionError, match="lowering changed the outputs"):
        leaf.lower(model)


def test_fewer_samples_of_a_large_model(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(tiny_run)
    monkeypatch.setattr(from_run, "SAMPLES_WORK", 1)
    monkeypatch.setattr(from_run, "SAMPLES_MIN", 1)
    told: list[str] = []
    from_run.export_run(run, tmp_path / "out", progress=lambda done, total, what: told.append(what))
    with np.load(tmp_path / "out" / "tb_data" / "samples.npz") as stored:
        assert len(stored["ids"]) == 1
    assert any("calibration" in what for what in told) and any("samples" in what for what in told)
