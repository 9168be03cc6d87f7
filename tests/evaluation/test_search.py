"""`m3vit search`: its costs, its two choices against all combinations, and the file from search to package."""

import itertools
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from m3vit.errors import InputError
from m3vit.evaluation.search import (
    Point,
    best_together,
    cost_of,
    predicted_front,
    read_preferences,
    relative_loss,
    sample_front,
)
from m3vit.models.budget import Budget
from m3vit.models.budget_file import read_budget, write_budget
from m3vit.models.config import ModelConfig
from m3vit.profiling import graph_macs
from tests.test_cli import refused

Cli = Callable[..., subprocess.CompletedProcess]
TRUNK = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, global_pool="", class_token=False)


def test_costs_are_those_of_the_profile() -> None:
    config = ModelConfig(
        "vit_tiny_patch16_224", TRUNK, image_size=(32, 48), num_experts=6, top_k=3, tasks=["depth", "semseg"]
    )
    macs = cost_of(config, [1, 3])
    for task, counts in itertools.product(config.tasks, itertools.product((1, 2, 3), repeat=2)):
        budget = Budget({task: dict(zip([1, 3], counts, strict=True))})
        assert macs(task, counts) == graph_macs(config, task, (32, 48), budget), (task, counts)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_of_a_task_is_that_of_all_combinations(seed: int) -> None:
    rng = np.random.default_rng(seed)
    top_k, blocks = 3, 4
    units = rng.integers(1, 4, blocks)
    alone = [{count: 0.0 if count == top_k else float(rng.integers(-2, 9)) for count in (3, 1, 2)} for _ in range(4)]

    def macs(counts: tuple[int, ...]) -> int:
        return 100 + int(sum(units * counts))

    everything = [
        Point(counts, macs(counts), sum(losses[count] for losses, count in zip(alone, counts, strict=True)))
        for counts in itertools.product((1, 2, 3), repeat=blocks)
    ]
    expected = {
        (one.macs, one.loss)
        for one in everything
        if not any(
            (other.macs <= one.macs and other.loss < one.loss) or (other.macs < one.macs and other.loss <= one.loss)
            for other in everything
        )
    }
    found = predicted_front(alone, macs, top_k)
    assert [(point.macs, point.loss) for point in found] == sorted(expected)
    for point in found:
        assert point in everything
    assert sample_front(found, 2)[0] == found[0] and sample_front(found, 2)[-1] == found[-1]


@pytest.mark.parametrize("seed", range(20))
def test_points_together_are_the_best_of_all_choices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fronts = {
        task: [Point((place,), int(rng.integers(1, 9)), float(rng.integers(-3, 9))) for place in range(4)]
        for task in ("semseg", "depth", "edge")
    }
    weights = {"semseg": 1.0, "depth": 2.0, "edge": 0.0}
    found = best_together(fronts, weights)
    for limit in range(3, 25):
        expected = math.inf
        for choice in itertools.product(*fronts.values()):
            if sum(point.macs for point in choice) <= limit:
                expected = min(expected, (choice[0].loss + 2 * choice[1].loss) / 3)
        within = [loss for macs, loss, _ in found if macs <= limit]
        assert (min(within) if within else math.inf) == pytest.approx(expected)
    for macs, loss, points in found:
        assert macs == sum(point.macs for point in points.values())
        assert loss == pytest.approx((points["semseg"].loss + 2 * points["depth"].loss) / 3)


def test_losses_are_relative_and_positive_where_worse() -> None:
    assert relative_loss("semseg", 40.0, 38.0) == pytest.approx(5.0)
    assert relative_loss("depth", 0.8, 0.84) == pytest.approx(5.0)
    assert relative_loss("depth", 0.8, 0.76) == pytest.approx(-5.0)


def test_preferences() -> None:
    tasks = ["semseg", "depth"]
    assert read_preferences(None, tasks) == {"semseg": 1, "depth": 1}
    assert read_preferences("depth=2.5", tasks) == {"semseg": 1, "depth": 2.5}
    for text, words in (
        ("edge=1", "of the tasks semseg, depth"),
        ("depth", "give task=weight"),
        ("depth=-1", "weights of 0 or more"),
        ("depth=nan", "weights of 0 or more"),
        ("depth=inf", "weights of 0 or more"),
        ("depth=1,depth=2", "weighs depth twice"),
        ("depth=0,semseg=0", "leaves no task any weight"),
    ):
        with pytest.raises(InputError, match=words):
            read_preferences(text, tasks)


def test_files_that_are_no_budget(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    with pytest.raises(InputError, match=r"budget\.json"):
        read_budget(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="m3vit search writes"):
        read_budget(path)
    budget = Budget({"depth": {1: 2}})
    write_budget(path, budget, {})
    assert read_budget(path) == budget
    path.write_text(path.read_text().replace('"1": 2', '"1": 3'))
    with pytest.raises(InputError, match="not as it was written"):
        read_budget(path)


@pytest.mark.slow
def test_from_search_to_package(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    run, file, package = tmp_path / "run", tmp_path / "light.json", tmp_path / "package"
    shutil.copytree(tiny_run, run)
    refused(cli("search", run, "--budget", 0.3, "--out", file), "one expert per token in every block this model still")
    refused(cli("search", run, "--budget", 1.5, "--out", file), "give a number above 0, up to 1")
    refused(cli("search", run, "--budget", 1, "--prefer", "x=1", "--out", file), "of the tasks")
    refused(cli("search", run, "--budget", 1, "--out", tmp_path / "no" / "x.json"), "is no folder")
    assert not file.exists()
    result = cli("search", run, "--budget", 0.99, "--prefer", "depth=3", "--images", 2, "--out", file)
    assert result.returncode == 0, result.stderr
    refused(cli("search", run, "--budget", 0.99, "--out", file), "is there already")
    told = json.loads(file.read_text())["search"]
    assert told["share_of_macs"] <= 0.99 and told["images"] == 2 and told["preferences"]["depth"] == 3
    budget = read_budget(file)
    assert {count for of in budget.top_k.values() for count in of.values()} <= {1, 2}
    assert any(count == 1 for of in budget.top_k.values() for count in of.values())

    before = cli("eval", run)
    assert before.returncode == 0, before.stderr
    whole = (run / "eval.json").read_bytes()
    result = cli("eval", run, "--budget", file)
    assert result.returncode == 0, result.stderr
    assert (run / "eval.json").read_bytes() == whole, "the run's own evaluation stays"
    entry = json.loads((run / "budgets" / "light" / "eval.json").read_text())["protocols"]["A"]
    assert entry["budget"] == budget.to_json()
    result = cli("eval", "--compare", run, run / "budgets" / "light")
    assert result.returncode == 0, result.stderr

    refused(cli("export", "onnx", run, "--budget", file, "--top-k", 1, "--out", package), "leave out --top-k")
    result = cli("export", "onnx", run, "--budget", file, "--tasks", "depth", "--measure", 0, "--out", package)
    assert result.returncode == 0, result.stderr
    entry = json.loads((package / "manifest.json").read_text())["tasks"]["depth"]
    assert entry["macs"] == told["tasks"]["depth"]["macs"]
    refused(cli("eval", package, "--budget", file), "is of a run")
    write_budget(tmp_path / "other.json", Budget({"depth": {7: 1}}), {})
    refused(cli("eval", run, "--budget", tmp_path / "other.json"), "budget names block 7")
