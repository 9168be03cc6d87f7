"""From somebody's own photographs to predictions: a run describes its classes and tasks itself."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from m3vit.run_folder import load_run
from tests.command_line import kept_state
from tests.conftest import TINY, succeed
from tests.data.own import CLASSES, DESCRIPTION, write_own

Cli = Callable[..., subprocess.CompletedProcess]
WORDS = ("train", "synthetic-tiny", *TINY, "--data.layout=folder", "--model.tasks=[all]", "--train.batch_size=3")


@pytest.mark.slow
def test_from_photographs_to_predictions(cli: Cli, tmp_path: Path) -> None:
    special = "mean: [0.4, 0.4, 0.5]\nstd: [0.2, 0.3, 0.2]\n"
    root, run = write_own(tmp_path / "own", DESCRIPTION + special), tmp_path / "run"
    result = cli(*WORDS, f"--data.root={root}", "--train.epochs=1", "--out", run)
    succeed(result)
    assert "8 train images, with semseg" in result.stdout and "mean 0.4 0.4 0.5, std 0.2 0.3 0.2" in result.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "val"}  # a label that is not there is nothing to report
    succeed(cli("eval", run))
    scores = json.loads((run / "eval.json").read_text())["protocols"]["A"]
    figures = scores["tasks"]["semseg"]["torch"]
    assert [name for name in figures if name.startswith("IoU_")] == [f"IoU_{name}" for name in CLASSES]
    assert figures["mIoU"] == pytest.approx(np.mean([figures[f"IoU_{name}"] for name in CLASSES]))
    assert scores["release"] == "street" and scores["images"] == 3
    root.rename(tmp_path / "gone")  # no data are needed to know the classes
    with kept_state():
        assert load_run(run).config.model.labels.classes == {"semseg": CLASSES}
    succeed(cli("profile", run))
    succeed(cli("export", "onnx", run, "--tasks", "semseg", "--out", tmp_path / "onnx"))
    photograph = tmp_path / "gone" / "photos" / "IMG 10.png"
    succeed(cli("predict", tmp_path / "onnx", photograph, "--task", "semseg", "--out", tmp_path / "predicted"))
    manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
    assert manifest["tasks"]["semseg"]["classes"] == list(CLASSES)
    succeed(cli("eval", tmp_path / "onnx", "--data.root", tmp_path / "gone"))
    # Another order of the classes is another model.
    described = tmp_path / "gone" / "data.yaml"
    described.write_text(DESCRIPTION.replace("[sky, road, car]", "[car, road, sky]"))
    result = cli("eval", run, "--data.root", tmp_path / "gone")
    assert result.returncode == 2 and "class 0 of semseg is sky, but car in data.yaml" in result.stderr


def test_what_is_wrong_is_refused_before_training(cli: Cli, tmp_path: Path) -> None:
    root, run = write_own(tmp_path / "own"), tmp_path / "run"
    result = cli(*[word for word in WORDS if "layout" not in word], f"--data.root={root}", "--out", run)
    assert result.returncode == 2 and "[all]" not in result.stdout and not run.exists()
    result = cli(*WORDS, "--out", run)
    assert result.returncode == 2 and "data.layout folder takes its classes from data.yaml" in result.stderr
    keys = ("--model.tasks=[all]", f"--data.root={root}")
    counted = cli("profile", "synthetic-tiny", *keys, "--data.layout=folder")  # which classes there are counts
    succeed(counted)
    assert "semseg" in counted.stdout and "normals" not in counted.stdout
    assert "--data.root changes nothing" in cli("profile", "synthetic-tiny", keys[1]).stderr
    words = [word for word in WORDS if "tasks" not in word]
    result = cli(*words, f"--data.root={root}", "--out", run)
    assert result.returncode == 2 and "its tasks are semseg, depth" in result.stderr
    (root / "data.yaml").write_text(DESCRIPTION.replace("classes: [sky, road, car]", "classes: [sky, road]"))
    result = cli(*WORDS, f"--data.root={root}", "--out", run)
    assert result.returncode == 2 and "8 problems" in result.stderr and not run.exists()
    assert "its ids 2 are neither in classes nor in ignore" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["pcgrad", "uncertainty"])
def test_batches_of_one_image_often_lack_a_task(weighting: str, cli: Cli, tmp_path: Path) -> None:
    root, run = write_own(tmp_path / "own"), tmp_path / "run"
    words = (f"--data.root={root}", "--train.epochs=1", "--train.batch_size=1", f"--train.weighting={weighting}")
    succeed(cli(*WORDS, *words, "--out", run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    given = [{"semseg", "depth"} & line.keys() for line in lines if line["kind"] == "train"]
    assert len(given) == 8 and {"semseg"} in given and {"depth"} in given
