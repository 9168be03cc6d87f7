"""PASCAL-Context through the public commands: rendered, checked, trained, evaluated, exported, predicted."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import TINY
from tests.test_cli import refused

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess]
TASKS = ("semseg", "human_parts", "saliency", "normals", "edge")


@pytest.fixture(scope="module")
def data(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pascal") / "data"
    words = ("--layout", "pascal", "--train", 6, "--val", 3, "--size", "32x48")
    result = cli("data", "synth", "--out", root, *words)
    assert result.returncode == 0, result.stderr
    return root


@pytest.fixture(scope="module")
def run(cli: Cli, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pascal") / "run"
    words = ["synthetic-pascal-tiny", *TINY, f"--data.root={data}", "--train.epochs=2", "--out", folder]
    result = cli("train", *words)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def package(cli: Cli, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pascal") / "onnx"
    result = cli("export", "onnx", run, "--out", folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_doctor_finds_nothing(cli: Cli, data: Path) -> None:
    result = cli("data", "check", data)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASCAL-Context" in result.stdout


@pytest.mark.parametrize(("protocol", "saliency"), [("A", "mIoU"), ("B", "maxF_as_published")])
def test_evaluation(cli: Cli, run: Path, protocol: str, saliency: str) -> None:
    result = cli("eval", run, "--protocol", protocol)
    assert result.returncode == 0, result.stderr
    found = json.loads((run / "eval.json").read_text())["protocols"][protocol]
    assert list(found["tasks"]) == list(TASKS)
    assert found["release"] == "PASCAL-Context" and found["images"] == 3
    assert {"maxF", saliency} <= found["tasks"]["saliency"]["torch"].keys()


def test_export_and_predict(cli: Cli, package: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest["label_set"] == "pascal"
    parts = manifest["tasks"]["human_parts"]
    assert parts["classes"][:2] == ["background", "head"] and parts["palette"][0] == [0, 0, 0]
    image = sorted((data / "JPEGImages").iterdir())[0]
    assert list(manifest["tasks"]) == list(TASKS) and len(manifest["tasks"]["semseg"]["classes"]) == 21
    for task in TASKS:
        assert cli("predict", package, "--task", task, image, "--raw", "--out", out).returncode == 0
    ids = np.load(out / f"{image.stem}_human_parts.npy")
    assert ids.shape == (32, 48) and ids.max() <= 6
    assert Image.open(out / f"{image.stem}_saliency.png").size == (48, 32)


def test_published_pipelines_train(cli: Cli, data: Path, tmp_path: Path) -> None:
    for pipeline in ("m3vit", "invpt"):
        options = [f"--data.pipeline={pipeline}", "--data.colour=0", "--train.epochs=1"]
        words = ["synthetic-pascal-tiny", *TINY, f"--data.root={data}", *options, "--out", tmp_path / pipeline]
        result = cli("train", *words)
        assert result.returncode == 0, result.stderr


def test_layouts_are_not_confused(
    cli: Cli, data: Path, run: Path, package: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = ["--out", tmp_path / "run"]
    nyud = ["synthetic-tiny", *TINY, *out]
    refused(cli("train", *nyud, f"--data.root={data}"), "looks like PASCAL-Context: take a recipe or a run")
    refused(cli("train", *nyud, "--data.layout=pascal", f"--data.root={data}"), "pascal has no labels for depth")
    pascal = ["synthetic-tiny", *TINY, *out, "--data.layout=pascal", f"--data.root={data}", "--model.label_set=nyud"]
    refused(cli("train", *pascal), "model.label_set nyud does not fit data.layout pascal: it has no files for depth")
    words = "model.label_set nyud does not fit data.layout pascal: 40 classes of semseg, but 21 in the files"
    refused(cli("train", *pascal, "--model.tasks=[semseg]"), words)
    words = "normals_y_down is False, but True in the files"
    refused(cli("train", *pascal, "--model.tasks=[normals]"), words)
    tasks = "--model.tasks=[semseg,depth]"
    refused(cli("train", "synthetic-pascal-tiny", *TINY, tasks, *out), "pascal has no labels for depth")
    refused(
        cli("train", *nyud, "--data.pipeline=invpt", f"--data.root={tiny_data}"), "data.colour 0.2 is of the pipeline"
    )
    refused(cli("eval", run, "--data.root", tiny_data), "looks like NYUD-v2")
    refused(cli("eval", package, "--data.root", tiny_data), "looks like NYUD-v2")


def test_a_read_only_root_works(cli: Cli, data: Path, run: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    before = sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))
    assert cli("eval", run, "--data.root", root).returncode == 0
    assert sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*")) == before, "nothing is written"
