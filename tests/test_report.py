"""m3vit report: every column it can have, all on the same images, and what it refuses."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.data.opening import open_split
from m3vit.data.sample import Sample, no_label
from m3vit.errors import InputError
from m3vit.evaluation import scoring
from m3vit.evaluation.evaluate import Predictor, torch_predictor
from m3vit.models.budget import FULL, Budget
from m3vit.models.config import ModelConfig
from m3vit.models.trial import meta_model
from m3vit.report.budgets import what_is_used
from m3vit.report.hls import read_project
from m3vit.report.page import example
from m3vit.report.stored import Stored
from m3vit.run_folder import load_run
from m3vit.tasks import TASKS as TABLE
from tests.conftest import TINY
from tests.test_cli import refused

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess]
TASKS = ("semseg", "depth", "normals", "edge")


def test_what_budgets_use() -> None:
    trunk = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, global_pool="", class_token=False)
    config = ModelConfig("vit_tiny_patch16_224", trunk, image_size=(32, 48), num_experts=6, top_k=3)
    config = replace(config, tasks=["depth", "edge"], head="pup")
    budget = Budget({"depth": {1: 2}}, {"edge": {3: (0, 4, 5)}}, {0: 0, 1: 8, 2: 48}, heads={"edge": 64})
    used = what_is_used(meta_model(config), {"full": FULL, "light": budget})
    assert used["heads"] == ["hidden units of blocks 0·1·2·3", "depth", "edge"] and used["routed"] == [1, 3]
    assert used["rows"] == [
        {"name": "full", "cells": ["64·32·64·32", "3·3; 256 channels", "3·3; 256 channels"]},
        {"name": "light", "cells": ["none·8·48·32", "2·3; 256 channels", "3 of 6·3 of 3; 64 channels"]},
    ]
    config = replace(config, head="taskexpert", head_args={"blocks": [1, 3], "experts": 5, "width": 6, "head_width": 5})
    pruned = Budget(decoder={"edge": {3: (1, 4)}})
    assert what_is_used(meta_model(config), {"pruned": pruned})["rows"][0]["cells"][1:] == [
        "3·3",
        "3·3; decoder 5 of 5·2 of 5",
    ]
    dense = what_is_used(meta_model(replace(config, moe_blocks="none", head="linear", head_args={})), {"full": FULL})
    assert dense["rows"] == [{"name": "full", "cells": ["64·64·64·64", "all", "all"]}] and not dense["routed"]


@pytest.fixture(scope="module")
def simulated(cli: Cli, hls_project: Path) -> Path:
    """The spatial project, two of its three images C-simulated."""
    result = cli("hw", "csim", hls_project, "--samples", 2)
    assert result.returncode == 0, result.stderr
    for task in TASKS:
        assert re.search(rf"{task}: worst error .* mean error .* top-k flips in \d+ routing decisions", result.stdout)
    return hls_project


@pytest.fixture(scope="module")
def evaluated(cli: Cli, tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiplexed project, evaluated on all three images."""
    project = tmp_path_factory.mktemp("projects") / "hls"
    words = ("export", "hls", tiny_run, "--schedule", "multiplexed", "--samples", 3, "--out", project)
    for command in (words, ("eval", project, "--data.root", tiny_data)):
        result = cli(*command)
        assert result.returncode == 0, result.stderr
    return project


def test_report_holds_every_column_on_the_same_images(
    cli: Cli, tiny_run: Path, onnx_package: Path, simulated: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    result = cli("report", tiny_run, "--onnx", onnx_package, "--hls", simulated, "--images", 2, "--out", page)
    assert result.returncode == 0, result.stderr
    report = json.loads(page.with_suffix(".json").read_text())
    assert report["images"] == 2, "the images that were simulated"
    for task in TASKS:
        row = report["tasks"][task]
        assert row["onnx"] == pytest.approx(row["torch"], rel=1e-4)
        # Fixed point: 20-bit maps, 16-bit weights. On two tiny images one pixel more or less moves a score.
        assert row["csim"] == pytest.approx(row["torch"], rel=0.03)
        assert row["trivial"] >= 0
    text = page.read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text), "nothing is fetched"
    # 2 images x (input + 4 tasks x (truth, torch, ONNX, C-sim)), and 2 x 1 MoE layer x (input + 4 tasks), and the worst
    # and the best image of 4 tasks x (input, truth, torch)
    assert text.count("<img ") == 2 * (1 + 4 * 4) + 2 * 5 + 2 * 4 * 3
    assert text.count('src="data:image/jpeg;') == 2 * 2 + 2 * 4, "photographs alone"
    assert text.count('<div class="scale"') == 2 * 2 and "<span>2</span><span>4 m</span>" not in text
    legend = text[text.index('<p class="legend">semseg') :]
    assert "towards the camera" in legend and "not labelled" not in legend
    assert text.count("<svg") == 4
    pixels = np.array(report["breakdown"]["semseg"]["pixels"])
    iou = pixels.diagonal() / np.maximum(pixels.sum(axis=0) + pixels.sum(axis=1) - pixels.diagonal(), 1)
    assert 100 * iou.mean() == pytest.approx(report["tasks"]["semseg"]["torch"])
    ranges = report["breakdown"]["depth"]["ranges"]
    squared = sum(row["pixels"] * row["rmse"] ** 2 for row in ranges) / sum(row["pixels"] for row in ranges)
    assert squared**0.5 == pytest.approx(report["tasks"]["depth"]["torch"], rel=1e-4)
    for task, found in report["images_by_error"].items():
        (worst,), (best,) = found["worst"], found["best"]
        assert worst["id"] != best["id"] and f'id="{task}-{worst["id"]}"' in text
        assert (worst["value"] <= best["value"]) == TABLE[task].higher_is_better or worst["value"] == best["value"]


def test_report_refuses_exports_of_other_weights(
    cli: Cli, tiny_data: Path, tiny_run: Path, onnx_package: Path, tmp_path: Path
) -> None:
    other = tmp_path / "run"
    assert cli("init", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--out", other).returncode == 0
    assert cli("eval", other).returncode == 0
    refused(cli("report", other, "--onnx", onnx_package, "--hls", tmp_path), "exported from other weights")
    refused(cli("report", tiny_run, "--out", tmp_path / "page.json"), "give a file name for the page, ending in .html")


def test_report_without_exports_says_what_is_missing(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    words = ("report", tiny_run, "--onnx", tmp_path / "a", "--hls", tmp_path / "b", "--out", tmp_path / "r.html")
    with pytest.warns(UserWarning, match="^--(onnx|hls) .* not found: the report has no column of it$") as warned:
        result = cli(*words)
    assert result.returncode == 0 and len(warned) == 2, result.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["tasks"]["depth"].keys() == {"metric", "unit", "higher_is_better", "trivial", "torch"}
    assert any("No ONNX package" in note for note in report["notes"])


def test_without_a_label_the_range_is_that_of_the_prediction() -> None:
    sample = Sample("a", np.zeros((16, 24, 3), np.uint8), {"depth": no_label("depth", (16, 24))})
    metres = torch.linspace(5, 9, 16 * 24).reshape(1, 1, 16, 24)
    predictor = Predictor("torch", ["depth"], "nyud", (16, 24), lambda images: {"depth": metres})
    (row,) = example(sample, {"torch": predictor}, ["ground truth", "torch"], "A", "nyud", {})["rows"]
    assert 5 <= float(row["scale"]["low"]) < 5.2 and row["scale"]["high"].endswith(" m")
    assert 8.8 < float(row["scale"]["high"].split()[0]) <= 9
    sample.unlabelled["depth"] = ""
    (row,) = example(sample, {"torch": predictor}, ["ground truth", "torch"], "A", "nyud", {})["rows"]
    assert row["pictures"][0] is None and row["pictures"][1], "no picture of a label that is not there"
    sample.unlabelled.clear()
    sample.labels["depth"] += 2
    (row,) = example(sample, {"torch": predictor}, ["ground truth", "torch"], "A", "nyud", {})["rows"]
    assert float(row["scale"]["low"]) < 3, "that of the truth, where there is any"


def made(cli: Cli, run: Path, hls: Path, onnx: Path, page: Path, *words: object) -> dict[str, Any]:
    result = cli("report", run, "--onnx", onnx, "--hls", hls, "--images", 2, "--out", page, *words)
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(page.with_suffix(".json").read_text())
    assert ("emulator" in result.stdout) == ("emulator" in report["all_metrics"])
    return report


@pytest.mark.slow
def test_report_of_a_multiplexed_project(cli: Cli, tiny_run: Path, evaluated: Path, tmp_path: Path) -> None:
    page, none = tmp_path / "page.html", tmp_path / "none"
    report = made(cli, tiny_run, evaluated, none, page)
    assert report["images"] == 3 and list(report["all_metrics"]) == ["trivial", "torch", "emulator"]
    scored = json.loads((evaluated / "eval.json").read_text())["protocols"]["A"]["tasks"]
    for task in TASKS:
        assert report["tasks"][task]["emulator"] == scored[task]["emulator"][TABLE[task].metric]
        assert report["tasks"][task]["emulator"] == pytest.approx(report["tasks"][task]["torch"], rel=0.03)
    assert any("was not C-simulated" in note for note in report["notes"])
    text = page.read_text()
    assert "<th>emulator</th>" in text and "integers computed in torch" in text
    assert "<h2>Hardware</h2>" in text and "No timed C-simulation" in text
    levels = report["hardware"]["levels"]
    assert set(levels) == set(TASKS) and all(list(one) == ["modelled"] for one in levels.values())
    assert text.count("<img ") == 2 * (1 + 4 * 3) + 2 * 5 + 2 * 4 * 3, "no ONNX, but pictures of the emulator"

    # C-simulated in part: a note. Wholly: a column, and the same figures, for the words are the same.
    assert cli("hw", "csim", evaluated, "--samples", 2).returncode == 0
    report = made(cli, tiny_run, evaluated, none, page)
    assert report["images"] == 3 and "csim" not in report["all_metrics"]
    assert "Of fewer images than this table, so not in it:" in report["notes"]
    assert any("of 2 images: every word is the emulator's" in note for note in report["notes"])
    assert cli("hw", "csim", evaluated).returncode == 0
    report = made(cli, tiny_run, evaluated, none, page)
    assert list(report["all_metrics"]) == ["trivial", "torch", "csim", "emulator"]
    assert report["all_metrics"]["csim"] == report["all_metrics"]["emulator"]

    # C-simulated alone, as a spatial project.
    copy = tmp_path / "copy"
    shutil.copytree(evaluated, copy, ignore=shutil.ignore_patterns("eval*", "*.exe"))
    report = made(cli, tiny_run, copy, none, page)
    assert list(report["all_metrics"]) == ["trivial", "torch", "csim"] and report["images"] == 3
    assert "<th>emulator</th>" not in page.read_text()


def test_an_evaluation_of_something_else_is_not_shown(
    cli: Cli, tiny_run: Path, tiny_data: Path, evaluated: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(evaluated, copy, ignore=shutil.ignore_patterns("*.exe", "csim*"))
    run, split = load_run(tiny_run), open_split("nyud", tiny_data, "val", TASKS)
    assert list(read_project(run, copy, split, "A").stored) == ["emulator"]
    _, result = scoring.read(copy, "A")
    evaluation = scoring.read_evaluation(copy, "A")
    scoring.write(copy, "A", result, replace(evaluation, ids=evaluation.ids[::-1]))
    with pytest.raises(InputError, match=f"was evaluated on other images than the val split of {tiny_data}"):
        read_project(run, copy, split, "A")
    (copy / "eval-A.npz").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"eval-A.npz cannot be read"):
        read_project(run, copy, split, "A")
    results = read_project(run, copy, split, "B")
    assert not results.stored and not results.scored and results.indices == [0, 1, 2]
    assert f"under protocol A: for this table, m3vit eval {copy} --protocol B" in results.notes[0]
    # The same names, but other pictures.
    others = [value + 1 for value in evaluation.fingerprints]
    scoring.write(copy, "A", result, replace(evaluation, fingerprints=others))
    words = ("report", tiny_run, "--onnx", tmp_path / "none", "--out", tmp_path / "page.html", "--hls", copy)
    refused(cli(*words), "was evaluated on other images than the val split")


def test_what_was_evaluated_is_shown_as_it_is(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    """Of the same weights and images; of others it is measured anew."""
    copy, page = tmp_path / "copy", tmp_path / "page.html"
    shutil.copytree(tiny_run, copy)
    _, result = scoring.read(copy, "A")
    evaluation, truly = scoring.read_evaluation(copy, "A"), result["tasks"]["depth"]

    def reported() -> dict[str, Any]:
        made = cli("report", copy, "--onnx", tmp_path / "none", "--hls", tmp_path / "none", "--out", page)
        assert made.returncode == 0, made.stderr
        return json.loads(page.with_suffix(".json").read_text())

    measured = reported()
    assert measured["tasks"]["depth"]["torch"] == truly["torch"]["rmse"]
    assert measured["tasks"]["depth"]["trivial"] == truly["trivial"]["rmse"]
    assert measured["breakdown"] == json.loads((copy / "breakdown-A.json").read_text())["tasks"]
    worse = evaluation.statistics["depth"].copy()
    worse[:, 1] *= 4  # squared errors
    written = replace(evaluation, statistics={**evaluation.statistics, "depth": worse}, told=measured["breakdown"])
    scoring.write(copy, "A", result, written)
    assert reported()["tasks"]["depth"]["torch"] == pytest.approx(2 * truly["torch"]["rmse"])
    run = load_run(copy)
    split, predictor = open_split("nyud", result["data"], "val", TASKS), torch_predictor(run.model)
    kept = Stored(split, "A").evaluation(copy, predictor)
    assert kept is not None and kept.ids == evaluation.ids and kept.explained() == measured["breakdown"]
    assert Stored(split, "B").evaluation(copy, predictor) is None
    assert Stored(split, "A").evaluation(copy, replace(predictor, name="onnx")) is None
    assert Stored(split, "A").evaluation(copy, predictor, "int8") is None, "another precision of a package"
    others: list[dict[str, Any]] = [
        {"fingerprints": [value + 1 for value in evaluation.fingerprints]},
        {"label_prints": [value + 1 for value in evaluation.label_prints]},  # the same images, corrected labels
        {"label_prints": []},  # of a version that did not note them
        {"ids": evaluation.ids[::-1]},
    ]
    for other in others:
        scoring.write(copy, "A", result, replace(written, **other))
        assert Stored(split, "A").evaluation(copy, predictor) is None
    scoring.write(copy, "A", result, written)
    (copy / "breakdown-A.json").write_text("{}")
    with pytest.raises(InputError, match=r"breakdown-A.json is not as it was .*: evaluate again with m3vit"):
        Stored(split, "A").evaluation(copy, predictor)
    scoring.write(copy, "A", {**result, "weights_sha256": "0" * 64}, written)
    assert Stored(split, "A").evaluation(copy, predictor) is None
    assert reported() == measured, "measured anew"


def test_several_runs_share_a_page(cli: Cli, tiny_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    other, page = tmp_path / "untrained", tmp_path / "runs.html"
    assert cli("init", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--out", other).returncode == 0
    assert cli("eval", other).returncode == 0
    refused(cli("report", tiny_run, other), "give --out FILE.html")
    refused(
        cli("report", tiny_run, other, "--out", page, "--onnx", tmp_path),
        "--budget are of one run's report",
    )
    refused(cli("report", tiny_run, tiny_run, "--out", page), "is given twice")
    assert cli("eval", other, "--protocol", "B").returncode == 0  # the last one, which the first run has not
    result = cli("report", tiny_run, other, "--images", 2, "--out", page)
    assert result.returncode == 0, result.stderr
    figures = [scoring.read(folder, "A")[1]["tasks"]["semseg"]["torch"] for folder in (tiny_run, other)]
    classes = [f"{one['IoU_wall']:.1f}" for one in figures]
    row = re.search(r"<tr><td>wall</td><td></td>(.*?)</tr>", page.read_text())
    assert row and re.findall(r"[\d.]+", row[1]) == classes
    found, text = json.loads(page.with_suffix(".json").read_text()), page.read_text()
    assert [row["name"] for row in found["rows"]] == [str(tiny_run), str(other)]
    for task in TASKS:
        values = [row["tasks"][task]["value"] for row in found["rows"]]
        assert values[0] == scoring.read(tiny_run, "A")[1]["tasks"][task]["torch"][TABLE[task].metric]
        best = max(values) if TABLE[task].higher_is_better else min(values)
        assert f"<b>{best:.3f}</b>" in text
    assert "<b>untrained</b>" not in text and text.count("<th>untrained</th>") == 2
    assert text.count("<img ") == 2 * (1 + 4 * 3), "the input, and for each task the truth and both runs"
    assert text.count("<svg") == 1 and not re.search(r"(src|href)=[\"']?(https?:)?//", text)
