"""The path from real photographs to predictions, by the public commands, on a handful of NYU Depth v2."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3vit.data.augment import training_pair
from m3vit.data.opening import open_split
from m3vit.data.sample import Split
from m3vit.data.tools.prepare import CAMERA_WIDTH_PX, CENTRE_PX, FOCAL_PX
from m3vit.digests import read_sealed_json
from m3vit.kinds.classes import palette
from m3vit.label_sets import NYUD_CLASSES
from m3vit.normalisation import IMAGENET
from m3vit.tasks import IGNORE
from tests.conftest import once, succeed
from tests.photographs import source, write

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess]
TASKS = ("semseg", "depth", "normals", "edge")
SIZE, NETWORK = (120, 160), (96, 128)
LAST = len(NYUD_CLASSES) - 1  # other_prop: unlabelled in the training labels, labelled in those of val
# Depths of 8 bits, (v + 0.5) / 25.5116 m: the Kinect sees from about 0.5 m on, the official toolbox cuts at 10 m.
NEAR_M, FAR_M = 0.4, 255.5 / 25.5116
MODEL = [
    f"--model.image_size={list(NETWORK)}",
    "--model.trunk_args={patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2, mlp_ratio: 2, class_token: false, "
    "global_pool: ''}",
    "--model.num_experts=4",
    "--train.epochs=1",
    "--train.batch_size=3",
    "--train.threads=1",
    "--train.eval_epochs=0",
    "--train.log_steps=1",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs to train on and four to validate on, in NYUD_MT's layout; read only."""
    source()  # skips: a skip within `once` would leave half a folder
    return once(tmp_path_factory, "photographs", lambda root: write(root, SIZE, 6, 4))


@pytest.fixture(scope="module")
def run(cli: Cli, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on them for an epoch and evaluated; what the commands printed is beside it, in run.txt."""

    def make(folder: Path) -> None:
        said = ""
        for words in (("train", "synthetic-tiny", *MODEL, "--data.root", data, "--out", folder), ("eval", folder)):
            result = cli(*words)
            succeed(result)
            said += result.stdout + result.stderr
        folder.with_suffix(".txt").write_text(said)

    return once(tmp_path_factory, "photographs_run", make)


@pytest.fixture(scope="module")
def package(cli: Cli, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX package of two tasks in floats and in 8-bit integers."""
    words = ("--tasks", "semseg", "depth", "--precision", "fp32", "int8", "--measure", 4)
    return once(
        tmp_path_factory, "photographs_onnx", lambda out: succeed(cli("export", "onnx", run, "--out", out, *words))
    )


def scores(folder: Path) -> dict[str, Any]:
    return read_sealed_json(folder / "eval.json", "")["protocols"]["A"]


def splits(data: Path) -> list[Split]:
    return [open_split("nyud", data, split, TASKS) for split in ("train", "val")]


def towards(normals: np.ndarray) -> np.ndarray:
    """Return the cosines [H, W] between normals and the directions to the camera (up to the length of these)."""
    height, width = normals.shape[:2]
    x = ((np.arange(width) + 0.5) * CAMERA_WIDTH_PX / width + 0.5 - CENTRE_PX[0]) / FOCAL_PX[0]
    y = ((np.arange(height) + 0.5) * CAMERA_WIDTH_PX / width + 0.5 - CENTRE_PX[1]) / FOCAL_PX[1]  # down
    return -normals[..., 0] * x + normals[..., 1] * y[:, None] + normals[..., 2]


def test_the_doctor_has_no_complaint(cli: Cli, data: Path, tmp_path: Path) -> None:
    result = cli("data", "check", data, "--workers", 1, "--json", tmp_path / "check.json")
    assert result.returncode == 0, result.stdout
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["ok"] and report["counts"] == {"error": 0, "warning": 0, "note": 3}
    # What is no fault: fewer images than published, twice, and classes of val that six photographs do not show.
    (note,) = [problem for problem in report["problems"] if problem["kind"] == "untrained"]
    assert "other_prop (" in note["message"]
    depth = report["statistics"]["depth"]
    assert NEAR_M < depth["reach_m"] < depth["max_m"] <= FAR_M
    assert 0 < report["statistics"]["normals"]["invalid_share"] < 0.3
    assert 0.005 < report["statistics"]["edge"]["positive_share"] < 0.2


def test_labels_are_what_the_conventions_say(data: Path) -> None:
    seen: list[set[int]] = []
    for split in splits(data):
        seen.append(set())
        for index in range(len(split)):
            sample = split.load(index)
            seen[-1] |= set(np.unique(sample.labels["semseg"]).tolist())
            depth, normals = sample.labels["depth"], sample.labels["normals"]
            assert sample.image.shape == (*SIZE, 3) and len(np.unique(sample.image)) > 200, "a photograph"
            assert NEAR_M < depth.min() and depth.max() <= FAR_M + 1e-4
            length = np.linalg.norm(normals, axis=-1)
            np.testing.assert_allclose(length[length > 0], 1, atol=1e-4)
            assert (towards(normals)[length > 0] > 0).all(), "surfaces face the camera"
            # The lowest rows show floors and tables more than ceilings: y is up.
            below, above = normals[-SIZE[0] // 4 :, :, 1], normals[: SIZE[0] // 4, :, 1]
            assert below.mean() > above.mean()
    train, val = seen
    assert LAST not in train and LAST in val, "other_prop is never trained, and counted"
    assert IGNORE in train & val and max(train | val - {IGNORE}) <= IGNORE


@pytest.mark.parametrize("pipeline", ["simple", "m3vit", "invpt"])
def test_pipelines_keep_labels_in_range(data: Path, pipeline: str) -> None:
    (train, _) = splits(data)
    for index in range(3):
        sample = train.load(index)
        rng = np.random.default_rng(index)
        image, labels = training_pair(pipeline, sample, NETWORK, rng, IMAGENET, ranges=train.m3vit_ranges, flip=True)
        assert image.shape == (3, *NETWORK) and image.isfinite().all()
        depth, length = labels["depth"], labels["normals"].norm(dim=0)
        # Zoomed in by up to 1.5 (m3vit) or 2 (invpt), a scene is as much nearer; out by 2, as much farther.
        assert depth[depth > 0].min() > NEAR_M / 2 and depth.max() <= 2 * FAR_M
        assert ((length - 1).abs()[length > 0] < 1e-3).all() and (length > 0).float().mean() > 0.3
        assert set(labels["semseg"].unique().tolist()) <= {*range(LAST), IGNORE}


def test_evaluation_says_what_no_training_label_has(run: Path) -> None:
    said = " ".join(run.with_suffix(".txt").read_text().replace("│", " ").split())
    assert "warning" not in said.lower()
    assert "mIoU_trained (%) ↑" in said and "without" in said
    found = scores(run)
    assert found["release"] == "NYUD_MT" and found["origin"] is None and found["images"] == 4
    untrained = found["untrained"]["semseg"]
    assert "other_prop" in untrained and "wall" not in untrained and "floor" not in untrained
    for name in ("trivial", "torch"):
        figures = found["tasks"]["semseg"][name]
        kept = [figures[f"IoU_{one}"] for one in NYUD_CLASSES if one not in untrained]
        assert figures["mIoU_trained"] == pytest.approx(np.mean(kept))
        assert figures["mIoU"] == pytest.approx(sum(figures[f"IoU_{one}"] for one in NYUD_CLASSES) / 40)
    assert 1.5 < found["trivial"]["depth"] < 4.5, "the mean depth of rooms, metres"
    assert found["trivial"]["normals"][2] > 0.5, "towards the camera"
    assert found["tasks"]["depth"]["torch"]["rmse"] < 4
    assert 0 < found["tasks"]["edge"]["torch"]["odsF"] < 100


def test_package_scores_as_the_run(cli: Cli, run: Path, package: Path, data: Path) -> None:
    result = cli("eval", package, "--data.root", data)
    succeed(result)
    ours, torchs = scores(package), scores(run)
    assert ours["untrained"] == torchs["untrained"]
    for task, metric in (("semseg", "mIoU"), ("semseg", "mIoU_trained"), ("depth", "rmse"), ("depth", "delta1")):
        expected = torchs["tasks"][task]["torch"][metric]
        assert ours["tasks"][task]["onnx"][metric] == pytest.approx(expected, rel=1e-3, abs=1e-3), (task, metric)
    # 8-bit weights and maps; what they cost a trained model is measured elsewhere.
    measured = json.loads((package / "manifest.json").read_text())["measured"]
    assert measured["images"] == 4
    for task, row in measured["tasks"].items():
        assert abs(row["loss_percent"]["fp32"]) < 0.1 and abs(row["loss_percent"]["int8"]) < 20, task


def test_predictions_of_a_whole_photograph(cli: Cli, package: Path, data: Path, tmp_path: Path) -> None:
    name = (data / "gt_sets" / "val.txt").read_text().split()[0]
    photograph = source() / "images" / f"{name}.jpg"
    words = ("--task", "all", "--resize", "--overlay", "--raw", "--out", tmp_path)
    succeed(cli("predict", package, photograph, *words))
    classes, depth = (np.load(tmp_path / f"{name}_{task}.npy") for task in ("semseg", "depth"))
    assert classes.shape == depth.shape == (480, 640) and classes.max() <= LAST
    assert np.isfinite(depth).all() and 0 < depth.min() and depth.max() < 2 * FAR_M
    picture = np.asarray(Image.open(tmp_path / f"{name}_semseg.png"))
    assert picture.shape[1] == 640 and 480 < picture.shape[0] < 850, "with a legend below"
    legend = {tuple(colour) for colour in picture[480:].reshape(-1, 3).tolist()}
    shown = {palette(NYUD_CLASSES)[index] for index in np.unique(classes)}
    assert shown <= legend, "each class in the picture is in its legend"


def test_routing_of_photographs(cli: Cli, run: Path, tmp_path: Path) -> None:
    """Patches are sorted by the classes and depths of real labels; the photograph itself is in no picture."""
    succeed(cli("routing", run, "--maps", 1, "--out", tmp_path / "routing"))
    found = read_sealed_json(tmp_path / "routing" / "routing.json", "")
    classes, depths = found["labels"]["semseg"], found["labels"]["depth"]
    patches = dict(zip(classes["bins"], classes["patches"], strict=True))
    assert patches["wall"] > 20 and 4 * 48 * 0.5 < sum(patches.values()) <= 4 * 48
    assert sum(depths["patches"]) == 4 * 48, "depth is filled everywhere"
    photograph = Path(found["data"]["root"]) / "images" / "0001.jpg"
    succeed(cli("panel", run, photograph, "--no-input", "--out", tmp_path / "panel.png"))
    assert (tmp_path / "panel.png").stat().st_size <= 150_000
