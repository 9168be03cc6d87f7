"""`m3vit eval` as a user runs it: protocols, packages, comparisons, several processes."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from m3vit.data.opening import open_split
from m3vit.digests import read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation import scoring
from m3vit.evaluation.compare import bootstrap_weights, compare
from m3vit.evaluation.evaluate import Evaluation
from m3vit.evaluation.gain import BASELINES, delta_m
from m3vit.evaluation.meters import make_meter
from m3vit.label_sets import LABEL_SETS, NYUD_CLASSES
from tests.conftest import TINY
from tests.test_cli import refused
from tests.training import launching

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval.json").read_text())["protocols"]


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run, evaluated under A, to write into."""
    copy = tmp_path_factory.mktemp("copies") / "run"
    shutil.copytree(tiny_run, copy)
    return copy


@pytest.fixture(scope="module")
def untrained(cli: Cli, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies") / "untrained"
    assert cli("init", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--out", folder).returncode == 0
    assert cli("eval", folder).returncode == 0
    return folder


def test_both_protocols_are_kept_and_named(cli: Cli, run: Path) -> None:
    result = cli("eval", run, "--protocol", "B")
    assert result.returncode == 0, result.stderr
    assert "protocol B" in result.stdout
    found = results(run)
    assert list(found) == ["A", "B"]
    for name, protocol in found.items():
        assert protocol["protocol"].startswith(f"{name} (")
    # Depth does not go through 8 bits, and nothing is resized: the same under both.
    depth = [protocol["tasks"]["depth"]["torch"] for protocol in found.values()]
    assert depth[0] == pytest.approx(depth[1])
    assert found["A"]["tasks"]["normals"]["torch"]["mErr"] != found["B"]["tasks"]["normals"]["torch"]["mErr"]
    assert cli("eval", run).returncode == 0  # A once more: now the last
    assert list(results(run)) == ["B", "A"]


def test_two_processes_score_as_one(run: Path, tmp_path: Path) -> None:
    """Three images on two processes: an uneven split."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    printed = launching.run(["eval", copy, "--device", "cpu"], tmp_path, processes=2)
    assert printed.count("│ semseg") == 1, "one process prints"
    assert results(copy)["A"] == results(run)["A"]
    with np.load(copy / "eval-A.npz") as two, np.load(run / "eval-A.npz") as one:
        for name in one.files:
            np.testing.assert_array_equal(two[name], one[name], err_msg=name)


def test_onnx_package_is_scored_by_the_same_meters(
    cli: Cli, run: Path, onnx_package: Path, tiny_data: Path, tmp_path: Path
) -> None:
    package = tmp_path / "onnx"
    shutil.copytree(onnx_package, package)
    refused(cli("eval", package), "does not say where its data are: give --data.root")
    result = cli("eval", package, "--data.root", tiny_data)
    assert result.returncode == 0, result.stderr
    ours, torchs = results(package)["A"]["tasks"], results(run)["A"]["tasks"]
    for task in ("semseg", "depth", "normals", "edge"):
        for name, value in torchs[task]["torch"].items():
            assert ours[task]["onnx"][name] == pytest.approx(value, rel=1e-4, nan_ok=True), (task, name)
    # The evaluation lies in the package, and does not keep it from being exported again.
    assert cli("export", "onnx", run, "--out", package).returncode == 0


def test_classes_without_training_labels_are_named_and_left_out_beside_the_published_figure(
    cli: Cli, run: Path, onnx_package: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The tiny rooms are walls and floors; here training has walls alone, and a damaged label."""
    data, copy, package = tmp_path / "data", tmp_path / "run", tmp_path / "onnx"
    shutil.copytree(tiny_data, data)
    shutil.copytree(run, copy)
    shutil.copytree(onnx_package, package)
    for name in (data / "gt_sets" / "train.txt").read_text().split():
        label = data / "segmentation" / f"{name}.png"
        stored = np.asarray(Image.open(label)).copy()
        stored[stored == 2] = 0
        Image.fromarray(stored).save(label)
    result = cli("eval", copy, "--data.root", data)
    assert result.returncode == 0, result.stderr
    words = " ".join(result.stdout.replace("│", " ").split())
    assert "mIoU_trained (%) ↑" in words and "classes that training labels have, without floor, cabinet, bed" in words
    found = results(copy)["A"]
    assert found["untrained"]["semseg"] == list(NYUD_CLASSES[1:])
    figures = found["tasks"]["semseg"]["torch"]
    assert figures["mIoU_trained"] == pytest.approx(figures["IoU_wall"]) != figures["mIoU"]
    assert figures["mIoU"] == results(run)["A"]["tasks"]["semseg"]["torch"]["mIoU"], "as published"
    # An export is scored alike, and does not fail for training labels that it does not need.
    label.write_bytes(label.read_bytes()[:-20])
    assert cli("eval", package, "--data.root", data).returncode == 0
    assert results(package)["A"]["untrained"] == found["untrained"]
    (data / "gt_sets" / "train.txt").unlink()
    result = cli("eval", package, "--data.root", data)
    assert result.returncode == 0 and "mIoU_trained" not in result.stdout
    assert results(package)["A"]["untrained"] is None


def test_hls_project_is_scored_by_the_same_meters(cli: Cli, run: Path, tiny_data: Path, tmp_path: Path) -> None:
    project = tmp_path / "hls"
    assert cli("export", "hls", run, "--out", project, "--samples", 1).returncode == 0
    result = cli("eval", project, "--data.root", tiny_data)
    assert result.returncode == 0, result.stderr
    ours, torchs = results(project)["A"], results(run)["A"]
    assert ours["images"] == 3, "the whole split, not the one image stored in the project"
    for task, metric in (("depth", "rmse"), ("normals", "mErr"), ("edge", "odsF")):
        # Fixed point: 20-bit maps, 16-bit weights; three tiny images.
        assert ours["tasks"][task]["csim"][metric] == pytest.approx(torchs["tasks"][task]["torch"][metric], rel=0.03)
    assert cli("export", "hls", run, "--out", project, "--samples", 1).returncode == 0


def test_comparison(cli: Cli, run: Path, untrained: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    refused(cli("eval", "--compare", run, untrained, "--out", tmp_path / "table.doc"), "ends in .json, .csv, .md, .tex")
    refused(cli("eval", run, "--out", table), "--compare shows several")
    result = cli("eval", "--compare", run, untrained, "--baseline", untrained, "--out", table)
    assert result.returncode == 0, result.stderr
    assert json.loads(table.read_text()) == compare([run, untrained], baseline=str(untrained))
    assert "delta_m" in result.stdout and "protocol A" in result.stdout
    found = compare([run, untrained, run], baseline=str(untrained))
    trained, fresh, again = found["rows"]
    assert fresh["delta_m"] == pytest.approx(0)
    for task, cell in trained["tasks"].items():
        low, high = cell["interval"]
        assert low <= cell["value"] <= high or task == "edge"  # a maximum over thresholds is biased upwards
        assert again["tasks"][task]["difference"] == 0
        assert again["tasks"][task]["difference_interval"] == [0, 0], "paired: the same images"


def test_protocols_never_share_a_table(cli: Cli, run: Path, untrained: Path, tmp_path: Path) -> None:
    other = tmp_path / "b"
    shutil.copytree(untrained, other)
    (other / "eval.json").unlink()
    refused(cli("eval", "--compare", run, other), "eval.json not found", "m3vit eval")
    assert cli("eval", other, "--protocol", "B").returncode == 0
    refused(cli("eval", "--compare", untrained, other), "different protocols", "cannot share a table")
    both = tmp_path / "both"  # and last under B
    shutil.copytree(untrained, both)
    stored = {**read_sealed_json(untrained / "eval.json", ""), **read_sealed_json(other / "eval.json", "")}
    stored["protocols"] |= {"A": {**scoring.read(untrained, "A")[1], "precision": "int8"}}
    stored["protocols"] = dict(sorted(stored["protocols"].items()))
    write_sealed_json(both / "eval.json", stored)
    found = compare([untrained, both])
    assert found["protocol"].startswith("A "), "the only one that all have"
    assert [row["name"] for row in found["rows"]] == [str(untrained), f"{both} (int8)"], (
        "as packages of several precisions"
    )
    refused(cli("eval", "--compare", run, other, "--protocol", "A"), "evaluated under protocol B, not A")
    refused(cli("eval", "--compare", run, untrained, "--baseline", "sak-vitb-nyud"), "protocol B", "not comparable")
    refused(cli("eval", "--compare", run, untrained, "--baseline", "m3vit-r50"), "semseg, depth, normals, but this")
    refused(cli("eval", "--compare", run, untrained, "--baseline", "none"), "'none': give an evaluated folder, or one")


def test_other_images_are_not_compared(
    cli: Cli, run: Path, make_data: Callable[..., Path], untrained: Path, tmp_path: Path
) -> None:
    data = make_data(tmp_path / "data", val=2)
    other = tmp_path / "other"
    shutil.copytree(untrained, other)
    assert cli("eval", other, "--data.root", data).returncode == 0
    refused(cli("eval", "--compare", run, other), "evaluated on different images")


def test_other_pixels_under_the_same_names_are_not_compared(
    cli: Cli, run: Path, untrained: Path, tiny_data: Path, tmp_path: Path
) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    shutil.copytree(tiny_data, data)
    shutil.copy(data / "images" / "0010.jpg", data / "images" / "0011.jpg")
    shutil.copytree(untrained, other)
    assert cli("eval", other, "--data.root", data).returncode == 0
    refused(cli("eval", "--compare", run, other), "evaluated on different images")
    refused(cli("eval", "--compare", run, run, "--baseline", other), "evaluated on different images")


def test_figures_of_other_weights_are_not_compared(cli: Cli, run: Path, untrained: Path, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    shutil.copytree(untrained, stale)
    shutil.copy(run / "model.safetensors", stale / "model.safetensors")
    refused(cli("eval", "--compare", run, stale), "evaluated with other weights than it holds now")


def test_rendered_data_are_named(cli: Cli, run: Path, tiny_data: Path, tmp_path: Path) -> None:
    data, copy = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_data, data)
    (data / "synthetic.json").write_text("{}")
    shutil.copytree(run, copy)
    result = cli("eval", copy, "--data.root", data)
    assert "NYUD_MT (rendered by m3vit data synth)" in " ".join(result.stdout.split())
    compared = cli("eval", "--compare", copy, copy)
    assert "rendered by m3vit data synth" in compared.stdout


def test_numbers_that_are_not_finite_are_one_clear_line(cli: Cli, run: Path, tmp_path: Path) -> None:
    from m3vit.run_folder import load_run, save_model

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    model = load_run(copy).model
    model.heads["edge"].linear.weight.data[:] = 3e38  # finite itself, which its sums are not
    save_model(copy, model, epoch=2)
    refused(cli("eval", copy), "predicts edge of image 0010 as numbers that are not finite")


def test_report_under_both_protocols(cli: Cli, run: Path, tmp_path: Path) -> None:
    nothing = ("--onnx", tmp_path / "a", "--hls", tmp_path / "b", "--images", 1)
    for protocol in ("A", "B"):
        assert cli("eval", run, "--protocol", protocol).returncode == 0
        result = cli("report", run, *nothing, "--out", tmp_path / f"{protocol}.html")
        assert result.returncode == 0, result.stderr
        assert json.loads((tmp_path / f"{protocol}.json").read_text())["protocol"].startswith(protocol)
    assert cli("eval", run).returncode == 0


def test_refusals(cli: Cli, run: Path, tmp_path: Path) -> None:
    refused(cli("eval", tmp_path), "is not a run folder, an ONNX package or an HLS project")
    refused(cli("eval", run, run), "--compare")
    refused(cli("eval", "--compare", run), "at least two")
    refused(cli("eval", "--compare", run, run, "--all-metrics"), "leave out --data.root")
    refused(cli("eval", run, "--device", "cuda:7"), "--device cuda:7 cannot be used here")
    refused(cli("eval", run, "--data.root", tmp_path), "is no data set")


def test_larger_images_are_refused_under_b(cli: Cli, run: Path, make_data: Callable[..., Path], tmp_path: Path) -> None:
    data = make_data(tmp_path / "large", size=(40, 48))
    refused(cli("eval", run, "--data.root", data, "--protocol", "B"), "40x48, larger than the network's 32x48")
    assert cli("eval", run, "--data.root", data, "--protocol", "A").returncode == 0


def test_delta_m_of_the_paper() -> None:
    """M3ViT's five PASCAL figures (its table 1): +9.97, -4.32, +3.67, 0.00, +4.22, mean +2.71."""
    scores = {
        "semseg": {"mIoU": 72.8},
        "normals": {"mErr": 14.5},
        "human_parts": {"mIoU": 62.1},
        "saliency": {"mIoU": 66.3},
        "edge": {"odsF": 71.7},
    }
    assert delta_m(scores, BASELINES["m3vit-r18"]) == pytest.approx(2.71, abs=0.005)


def test_delta_m_over_a_folder_takes_what_the_published_one_takes(tmp_path: Path) -> None:
    """Saliency's mIoU under protocol A (evaluate_utils.py:51 of Vandenhende's), maxF under B; else the headline."""
    rng = np.random.default_rng(0)
    guess, label = rng.random((2, 20, 30)).astype(np.float32), rng.integers(0, 2, (2, 20, 30))
    for protocol, metric in (("A", "mIoU"), ("B", "maxF")):
        folders = [tmp_path / f"{protocol}{number}" for number in range(2)]
        for folder, shift in zip(folders, (0.0, 0.3), strict=True):
            folder.mkdir()
            meter = make_meter("saliency", "pascal", protocol)
            rows = np.stack([meter.image(np.clip(g - shift, 0, 1), one) for g, one in zip(guess, label, strict=True)])
            evaluation = Evaluation(protocol, "pascal", ["0", "1"], {"saliency": rows}, fingerprints=[0, 0])
            known = {"protocol": protocol, "label_set": "pascal", "release": "x", "data": "x", "predictor": "torch"}
            result = known | {"tasks": {"saliency": {"torch": evaluation.scores()["saliency"]}}}
            scoring.write(folder, protocol, result, evaluation)
        found = compare(folders, baseline=str(folders[0]))
        assert found["baseline"]["metrics"] == {"saliency": metric}
        first, second = (scoring.read(one)[1]["tasks"]["saliency"]["torch"][metric] for one in folders)
        gains = [row["delta_m"] for row in found["rows"]]
        assert gains == pytest.approx([0, 100 * (second - first) / first])
        assert gains[1] != 0


def test_delta_m_of_sak_is_over_its_own_reader_of_edges() -> None:
    """Figures from innovator-zero/SAK's evaluation: saliency without a second sigmoid, edges by its nms_process.m."""
    pascal = {task: {metric: value} for task, (metric, value) in BASELINES["sak-vitb-pascal"].figures.items()}
    assert {task: list(metrics) for task, metrics in pascal.items()} == {
        "semseg": ["mIoU"],
        "human_parts": ["mIoU"],
        "saliency": ["maxF"],
        "normals": ["mErr"],
        "edge": ["odsF_sak"],
    }
    pascal["edge"]["odsF_sak"] *= 1.05
    assert delta_m(pascal, BASELINES["sak-vitb-pascal"]) == pytest.approx(1)
    assert BASELINES["sak-vitb-nyud"].figures["edge"] == ("odsF_sak", 77.35)


def test_statistics_of_an_earlier_format_are_refused(tmp_path: Path) -> None:
    """Their edges are of other readers; the figures would be taken for those of today's."""
    (tmp_path / "eval.json").write_text(json.dumps({"format": 2, "protocols": {"A": {"tasks": {}}}}))
    with pytest.raises(InputError, match=r"of this version: evaluate it first: m3vit eval"):
        scoring.read(tmp_path)


def test_bootstrap_draws_as_many_images_as_there_are() -> None:
    weights = bootstrap_weights(7)
    assert weights.shape == (1000, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(7), abs=0.15)  # 5 standard errors of 0.93 / sqrt(1000)


def test_stored_predictions_score_as_published_code_reads_them(
    cli: Cli, run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "predictions"
    result = cli("eval", run, "--predictions", out)
    assert result.returncode == 0, result.stderr
    refused(cli("eval", run, "--predictions", out), "is not empty: give a new or empty folder")
    refused(cli("eval", run, "--predictions", tmp_path / "b", "--protocol", "B"), "give --protocol A")
    refused(cli("eval", run, run, "--compare", "--predictions", tmp_path / "b"), "leave out .* --predictions")
    split = open_split("nyud", str(tiny_data), "val", ("semseg", "depth", "normals", "edge"))
    assert sorted(path.relative_to(out).as_posix() for path in out.glob("*/*")) == sorted(
        f"{task}/{name}.{'mat' if task == 'depth' else 'png'}" for task in split.tasks for name in split.ids
    )
    sums: dict[str, Any] = {}
    for index, name in enumerate(split.ids):
        sample = split.load(index)
        # evaluation/eval_*.py of Multi-Task-Learning-PyTorch
        read = {
            "semseg": np.asarray(Image.open(out / "semseg" / f"{name}.png")),
            "depth": loadmat(out / "depth" / f"{name}.mat")["depth"],
            "normals": 2.0 * np.asarray(Image.open(out / "normals" / f"{name}.png")) / 255 - 1,
        }
        read["normals"] *= [1, -1 if LABEL_SETS["nyud"].normals_y_down else 1, 1]
        for task, values in read.items():
            assert values.shape[:2] == sample.image.shape[:2]
            row = make_meter(task, "nyud", "A").image(values, sample.labels[task])
            sums[task] = sums.get(task, 0) + row
        edges = np.asarray(Image.open(out / "edge" / f"{name}.png"))
        assert edges.shape == sample.image.shape[:2] and edges.dtype == np.uint8
    stored = results(run)["A"]["tasks"]
    for task, metric in (("semseg", "mIoU"), ("depth", "rmse"), ("normals", "mErr")):
        found = float(make_meter(task, "nyud", "A").compute(sums[task])[metric])
        assert found == pytest.approx(stored[task]["torch"][metric], rel=1e-5), task
