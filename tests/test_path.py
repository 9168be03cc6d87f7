"""The path with the public commands alone, at the smallest size: from rendered scenes to graphs and projects."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.conftest import TINY
from tests.test_cli import refused

Cli = Callable[..., subprocess.CompletedProcess]
TASKS = ("semseg", "depth", "normals", "edge")


def test_export_says_a_parity_line_for_each_task(onnx_package: Path) -> None:
    printed = onnx_package.with_suffix(".txt").read_text()
    for task in TASKS:
        (error,) = re.findall(rf"^{task}: worst relative error (\S+) ", printed, re.MULTILINE)
        assert float(error) < 1e-4


def test_depth_graph_holds_no_router_or_head_of_another_task(onnx_package: Path, tiny_run: Path) -> None:
    from m3vit.run_folder import load_run

    graph = onnx.load(onnx_package / "depth.onnx")  # with its share of weights.bin
    held = {
        array.tobytes()
        for tensor in graph.graph.initializer
        for array in (onnx.numpy_helper.to_array(tensor), onnx.numpy_helper.to_array(tensor).T)
    }
    state = load_run(tiny_run).model.state_dict()
    seen = {"own": 0, "other": 0}
    for name, value in state.items():
        if gate := re.search(r"gates\.(\d)$", name):
            owner = TASKS[int(gate[1])]
        elif name.startswith("heads.") and name.endswith("linear.weight"):
            owner = name.split(".")[1]
        else:
            continue
        present = bool({value.numpy().tobytes(), value.numpy().T.tobytes()} & held)
        assert present == (owner == "depth"), name
        seen["own" if owner == "depth" else "other"] += 1
    assert seen == {"own": 2, "other": 6}, "one gate and one head of each task"


@pytest.mark.parametrize("task", TASKS)
def test_predict_writes_a_picture_and_the_values(cli: Cli, onnx_package: Path, tmp_path: Path, task: str) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)).save(tmp_path / "odd.png")
    result = cli("predict", onnx_package, "--task", task, tmp_path / "odd.png", "--raw", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "out" / f"odd_{task}.png").size == (61, 37)
    values = np.load(tmp_path / "out" / f"odd_{task}.npy")
    assert values.shape == ((37, 61, 3) if task == "normals" else (37, 61))


def failed(result: subprocess.CompletedProcess, *patterns: str) -> None:
    """The command went through its inputs and names the one that failed, and why."""
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 2, (result.returncode, result.stderr)
    for pattern in patterns:
        assert pattern in result.stderr


def test_predict_refusals(cli: Cli, onnx_package: Path, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    image, out = tiny_data / "images" / "0000.jpg", tmp_path / "out"
    refused(cli("predict", onnx_package, "--task", "flow", image, "--out", out), "no task 'flow'", "semseg, depth")
    refused(cli("predict", onnx_package, "--task", "depth", tmp_path / "no.jpg", "--out", out), "no.jpg not found")
    refused(cli("predict", tmp_path, "--task", "depth", image, "--out", out), "manifest.json not found")
    Image.new("RGB", (1000, 600)).save(tmp_path / "large.png")
    failed(
        cli("predict", onnx_package, "--task", "depth", tmp_path / "large.png", "--out", out),
        "9375 patches",
        "--resize",
    )
    tampered = tmp_path / "tampered"
    shutil.copytree(onnx_package, tampered)
    data = bytearray((tampered / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (tampered / "weights.bin").write_bytes(data)
    refused(cli("predict", tampered, "--task", "depth", image, "--out", out), "weights.bin does not match", "sha256")
    fixed = tmp_path / "fixed"
    assert cli("export", "onnx", tiny_run, "--size", "40x48", "--tasks", "depth", "--out", fixed).returncode == 0
    failed(cli("predict", fixed, "--task", "depth", image, "--out", out), "32x48", "40x48")
    assert not out.exists() or not any(out.iterdir())
    assert cli("predict", fixed, "--task", "depth", image, "--resize", "--out", out).returncode == 0
    large = tmp_path / "large.png"
    assert cli("predict", onnx_package, "--task", "depth", large, "--resize", "--out", out).returncode == 0
    assert Image.open(out / "large_depth.png").size == (1000, 600)


def test_csim_refusals(cli: Cli, process: Cli, hls_project: Path, tmp_path: Path) -> None:
    refused(cli("hw", "csim", tmp_path), "m3vit.json not found", "m3vit export hls")
    refused(cli("hw", "csim", hls_project, "--samples", 4), "holds 3 images")
    env = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    refused(process("hw", "csim", hls_project, env=env), r"no g\+\+ found: install it")


@pytest.mark.slow
def test_synthetic_data_goes_through_the_real_loader(cli: Cli, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    result = cli("data", "synth", "--out", data, "--train", 4, "--val", 2, "--size", "32x48", "--seed", 3)
    assert result.returncode == 0, result.stderr
    words = ["synthetic-tiny", *TINY, f"--data.root={data}", "--train.epochs=1", "--out", run]
    assert cli("train", *words).returncode == 0
    scored = cli("eval", run)
    assert scored.returncode == 0 and "odsF" in scored.stdout
