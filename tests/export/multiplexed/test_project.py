"""The multiplexed schedule end to end: export, hls4ml's backend, C-simulation, emulator, the commands."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.evaluation.artefacts import open_predictor
from m3vit.evaluation.protocols import NetworkImage
from m3vit.export.hls import leaf
from m3vit.export.hls.multiplexed import schedule
from m3vit.export.hls.project import reference
from m3vit.export.hls.schedules import choose_options
from m3vit.export.hls.verify import SimulatedOutputs
from m3vit.hw.fit import fit
from m3vit.hw.isa import Norm
from m3vit.hw.manifest import WEIGHTS
from m3vit.hw.network import program_of
from m3vit.hw.program import Image
from m3vit.hw.sim import csim
from m3vit.hw.sim.emulator import Emulator
from m3vit.models.budget import Budget
from m3vit.models.multitask import MultiTaskModel
from tests.export.models import SAMPLES, TASKS, make_images, make_model, make_samples
from tests.export.multiplexed.exporting import export
from tests.hw.programs import ROOT, STRICT

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess]


def test_hls4ml_finds_the_backend_by_its_entry_point() -> None:
    script = "import hls4ml; print(hls4ml.backends.get_available_backends())"
    printed = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert "'vitismoe'" in printed.stdout and "WARNING" not in printed.stdout


def test_importing_hls4ml_does_not_import_torch_through_the_plugin() -> None:
    script = "import sys, m3vit.export.hls.multiplexed.backend; sys.exit('m3vit.export.hls.leaf' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_only_the_plugin_imports_what_makes_hls4ml_import_it() -> None:
    """Else the first `import hls4ml` would meet modules that are half imported, warn, and go on without the backend."""
    module, names = r"m3vit\.export\.hls\.multiplexed", r"(?:backend|writer)\b"
    imports = re.compile(rf"^\s*(?:(?:from|import) {module}\.{names}|from {module} import .*\b{names})", re.MULTILINE)
    for folder in ("export", "hw", "m3vit", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not imports.search(path.read_text()) or path.name == "plugin.py", path


def test_simulation_agrees_with_torch_and_the_emulator(report: dict[str, Any]) -> None:
    assert report["images"] == SAMPLES
    assert report["different_words"] == 0 and report["words"] == SAMPLES * len(TASKS) * 12 * 160
    assert report["saturated"] == {}
    for result in report["tasks"].values():
        # 16-bit weights and products; the residual stream has 20 fractional bits.
        assert result["mean_error_relative"] < 1e-3
        assert result["largest_flip_margin"] < 5e-3
        assert result["decisions"] == SAMPLES * 13


@pytest.mark.skipif(not shutil.which("clang++"), reason="clang++ is not installed")
@pytest.mark.parametrize("definition", [[], ["-D__SYNTHESIS__"]], ids=["simulation", "synthesis"])
def test_clang_takes_the_project(definition: list[str], project: Path) -> None:
    """Vitis HLS reads C++ by clang."""
    command = ["clang++", *STRICT, "-fsyntax-only", *definition, "firmware/m3vit.cpp"]
    subprocess.run(command, cwd=project, check=True)


def test_traffic_is_reported_for_each_task(report: dict[str, Any], project: Path) -> None:
    traffic = report["traffic"]
    assert list(traffic) == TASKS
    for ports in traffic.values():
        assert ports["image"] == 24 * 32 * 3
    assert len({ports["gates"] for ports in traffic.values()}) == 1
    outputs = {task["name"]: task["outputs"] for task in csim.read_manifest(project)["tasks"]}
    for task, ports in traffic.items():
        assert ports["output"] == 12 * outputs[task] * 4


@pytest.mark.slow
def test_both_schedules_agree(spatial: Path, project: Path, report: dict[str, Any]) -> None:
    tokens = csim.tokenise(make_images(SAMPLES), 8).repeat(len(TASKS), axis=0)
    theirs = csim.run_bridge(spatial, tokens, np.tile(np.arange(len(TASKS)), SAMPLES))
    ours = SimulatedOutputs.load(project)
    with np.load(project / "tb_data" / "csim_outputs.npz") as stored:
        routes = np.stack([stored[f"experts_{task}_0"] for task in TASKS], axis=1)
    same = (np.sort(routes, -1) == np.sort(theirs.expert_ids[0].reshape(routes.shape), -1)).all(-1)
    assert same.mean() > 0.98  # else of near ties alone
    outputs = theirs.outputs.reshape(SAMPLES, len(TASKS), 12, -1)
    for place, task in enumerate(TASKS):
        reference = outputs[:, place, :, : ours.outputs[task].shape[-1]]
        error = np.abs(ours.outputs[task] - reference)[same[:, place, 1:]]
        # Each is within 1e-3 standard deviations of torch on average; the worst of 7680 values a few times that.
        assert error.mean() < 1e-3 * reference.std() and error.max() < 1e-2 * reference.std()


def test_stand_alone_folder_checks_itself(report: dict[str, Any], copy: Path) -> None:
    done = subprocess.run(["make", "check"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"0 of {len(TASKS)} frames differ" in done.stdout
    assert "warning" not in done.stderr
    words = bytearray((copy / "tb_data" / "expected_outputs.bin").read_bytes())
    words[4] ^= 1
    (copy / "tb_data" / "expected_outputs.bin").write_bytes(words)
    done = subprocess.run(["./csim.exe"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1 and f"1 of {len(TASKS)} frames differ" in done.stdout


def test_sources_compile_as_synthesis_reads_them(project: Path) -> None:
    """Without the counters and logs of C-simulation, with the standards that build_prj.tcl names."""
    for standard in ("c++11", "c++14"):
        flags = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-label", f"-std={standard}"]
        command = [csim.find_compiler(), *flags, "-D__SYNTHESIS__", "-fsyntax-only", "-I.", "firmware/m3vit.cpp"]
        subprocess.run(command, cwd=project, check=True)


def test_no_path_of_this_machine(project: Path) -> None:
    for path in (p for p in project.rglob("*") if p.suffix in (".md", ".yml", ".json", ".tcl", ".cpp", ".h", ".py")):
        assert str(project.parent) not in path.read_text(), path


def test_weights_map_is_of_the_weights(project: Path, model: MultiTaskModel) -> None:
    """The named tensors, read back from the file, are the model's weights within half of their last bit."""
    image = Image.read(project / WEIGHTS)
    entries = {tensor["name"]: tensor for tensor in json.loads((project / "weights_map.json").read_text())["tensors"]}
    entry = entries["blocks_0_fc1.weight"]
    rows, columns = entry["shape"]
    words = image.weights[entry["offset"] : entry["offset"] + rows * columns].reshape(rows, columns).astype(np.float64)
    fc1: Any = model.backbone.trunk.blocks[0].mlp.fc1
    expected = fc1.weight.detach().numpy().astype(np.float64)
    scale = (words * expected).sum(1) / (expected**2).sum(1)
    fracs = np.log2(scale)
    np.testing.assert_allclose(fracs, np.round(fracs), atol=1e-3)  # powers of two
    assert np.abs(words - expected * 2.0 ** np.round(fracs)[:, None]).max() <= 0.5
    (params,) = (e for name, e in entries.items() if name == "blocks_0_norm1.scale_bias")
    place = next(i for i in image.program if isinstance(i, Norm)).params
    assert params["offset"] == place


def test_hls4ml_compiles_and_predicts_from_the_folder(copy: Path) -> None:
    script = (
        "import hls4ml, numpy as np; x = np.load('in.npz');"
        "m = hls4ml.converters.link_existing_project('.'); m._compile();"
        "np.save('out.npy', m.predict([x['tokens'], x['task']]))"
    )
    images = make_images(2, seed=3).repeat(len(TASKS), axis=0)
    ids = np.tile(np.arange(len(TASKS)), 2)
    np.savez(copy / "in.npz", tokens=csim.tokenise(images, 8), task=ids[:, None].astype(np.float32))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    emulator, fracs = Emulator.open(copy / WEIGHTS), csim.read_manifest(copy)["output_fracs"]
    expected = [
        emulator.run(image, task).outputs * 2.0 ** -fracs[task] for image, task in zip(images, ids, strict=True)
    ]
    np.testing.assert_array_equal(np.load(copy / "out.npy"), np.array(expected, np.float32).reshape(6, -1))


def test_eval_scores_by_the_emulator(project: Path, report: dict[str, Any]) -> None:
    predictor, info, _ = open_predictor(project, "cpu", 1)
    assert predictor.name == "emulator" and info["hls4ml"] == "1.3.0"
    pixels = make_images(SAMPLES)[1]
    logits = predictor.run([NetworkImage("", pixels, slice(0, 24), slice(0, 32))])
    stored = SimulatedOutputs.load(project).predictor
    expected = stored.run([NetworkImage("image1", pixels, slice(0, 24), slice(0, 32))])
    for task in TASKS:
        torch.testing.assert_close(logits[task], expected[task], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("trunk", "config"),
    [
        ({"class_token": True, "reg_tokens": 2}, {"moe_blocks": [0, 1]}),
        ({"pre_norm": True}, {"router": "task_conditioned"}),
        ({"qkv_bias": False}, {"router": "single", "top_k": 1, "tasks": ["depth"]}),
        ({"class_token": True, "no_embed_class": True}, {"moe_blocks": "none"}),
        ({}, {"experts_per_task": {"depth": [0, 1], "semseg": [1, 2, 3]}}),
    ],
)
def test_other_trunks_and_routers(tmp_path: Path, trunk: dict[str, Any], config: dict[str, Any]) -> None:
    """The emulator against torch: class and register tokens, a norm before all blocks, other routers, no experts."""
    other = make_model(trunk, **config)
    export(other, tmp_path / "out", samples=make_samples())
    assert_emulator_agrees(tmp_path / "out", other.config.tasks)


def assert_emulator_agrees(project: Path, tasks: list[str]) -> None:
    """Assert that the emulator's outputs of the stored images are torch's, but for rounding."""
    emulator, manifest = Emulator.open(project / WEIGHTS), csim.read_manifest(project)
    with np.load(project / "tb_data" / "samples.npz") as stored:
        for number, task in enumerate(tasks):
            expected = stored[f"output_{task}"]
            words = np.stack([emulator.run(image, number).outputs for image in stored["images"]])
            outputs = words.reshape(SAMPLES, 12, -1)[..., : expected.shape[-1]]
            outputs = outputs * 2.0 ** -manifest["output_fracs"][number]
            assert np.abs(outputs - expected).mean() < 1e-3 * expected.std()


def test_a_budget_by_layer(tmp_path: Path) -> None:
    """Other experts per token than trained, another number in each layer: stored by torch, computed by the engines."""
    other, counts = make_model(moe_blocks=[0, 1]), {0: 3, 1: 1}
    budget = Budget(dict.fromkeys(TASKS, counts))
    manifest = export(other, tmp_path / "out", budget=budget)
    assert [(layer["block"], layer["top_k"]) for layer in manifest["moe_layers"]] == [(0, 3), (1, 1)]
    assert manifest["hardware"]["max_top"] == 3
    assert_emulator_agrees(tmp_path / "out", TASKS)
    with np.load(tmp_path / "out" / "tb_data" / "samples.npz") as stored:
        assert stored["experts_depth_0"].shape[-1] == 3 and stored["experts_depth_1"].shape[-1] == 1
        trained, _ = reference(other, stored["images"], "depth")
        kept, _ = reference(other, stored["images"], "depth", budget)
        assert np.array_equal(stored["output_depth"], kept.numpy())
        assert np.abs(stored["output_depth"] - trained.numpy()).mean() > 1e-2 * trained.std()


def test_hardware_known_before_is_that_of_the_schedule(model: MultiTaskModel, project: Path) -> None:
    options = choose_options("multiplexed", 16, None, None)
    assert options.design is not None
    bits, board = (options.weight_bits, options.act_bits), options.design.target
    program = program_of(schedule.sizes_of(leaf.lower(model)), *bits, board.port_bits)
    assert fit(program, *bits, board, options.design.sizes).plain() == csim.read_manifest(project)["hardware"]


@pytest.mark.slow
def test_commands(cli: Cli, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "hls"
    words = (
        "export",
        "hls",
        tiny_run,
        "--schedule",
        "multiplexed",
        "--weight-bits",
        "8",
        "--samples",
        "2",
        "--top-k",
        1,
    )
    result = cli(*words, "--out", out)
    assert result.returncode == 0, result.stderr
    assert [layer["top_k"] for layer in csim.read_manifest(out)["moe_layers"]] == [1]
    result = cli("hw", "csim", out)
    assert result.returncode == 0 and "output words equal the emulator's" in result.stdout, result.stderr
    result = cli("eval", out, "--data.root", tiny_data, "--workers", 1)
    assert result.returncode == 0 and "emulator" in result.stdout, result.stderr
    result = cli(*words, "--out", tmp_path / "no", "--board", "zcu1")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "choose from kv260, pynq-z2, u280" in result.stderr and not (tmp_path / "no").exists()
