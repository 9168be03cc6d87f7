"""m3vit sweep: what its space may be, by hand; and a small sweep, stopped, gone on with, and with a failing trial."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3vit.errors import InputError
from m3vit.training.sweep import Axis, Sweep, read_axis
from tests.conftest import TINY
from tests.test_cli import refused

Cli = Callable[..., subprocess.CompletedProcess]
AXIS = Axis("train.lr", (), 1e-4, 1e-2, log=True)


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("train.lr=log:1e-4..1e-2", Axis("train.lr", (), 1e-4, 1e-2, log=True)),
        ("train.lr=1e-04..0.5", Axis("train.lr", (), 1e-4, 0.5)),
        ("train.task_weights.semseg=.5..3.", Axis("train.task_weights.semseg", (), 0.5, 3.0)),
        ("model.top_k=1..4", Axis("model.top_k", (), 1, 4, whole=True)),
        ("train.batch_size=log:4..64", Axis("train.batch_size", (), 4, 64, log=True, whole=True)),
        ("model.moe_blocks=[1,3],odd,none", Axis("model.moe_blocks", ("[1,3]", "odd", "none"))),
        ("train.precision=32-true,bf16-mixed", Axis("train.precision", ("32-true", "bf16-mixed"))),
    ],
)
def test_axes(text: str, axis: Axis) -> None:
    assert read_axis(text) == axis


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr", "give KEY=VALUES, such as"),
        ("lr=1..2", "give KEY=VALUES, such as"),
        ("train.lr=0.1", "two or more different values"),
        ("train.lr=0.1,0.1", "two or more different values"),
        ("train.lr=1,,2", "two or more different values"),
        ("train.lr=1e-2..1e-4", r"1e-2 is not below the upper end 1e-4"),
        ("train.lr=log:0..1", "begins above 0"),
        ("train.lr=1..wide", "1 and wide are not two numbers"),
    ],
)
def test_what_no_axis_is(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_axis(text)


@pytest.mark.parametrize(
    ("text", "value", "found"),
    [
        ("train.lr=1e-4..1e-2", 1e-3, 1e-3),
        ("train.lr=1e-4..1e-2", 0.1, None),
        ("model.top_k=1..4", 2, 2),
        ("model.moe_blocks=[1,3],odd", [1, 3], "[1,3]"),
        ("model.moe_blocks=[1,3],odd", "odd", "odd"),
        ("train.ema=0,0.999", 0.0, "0"),
        ("model.top_k=1,2", 4, None),
    ],
)
def test_whether_the_recipe_lies_in_the_space(text: str, value: Any, found: Any) -> None:
    assert read_axis(text).holds(value) == found


def test_a_sweep_that_is_gone_on_with_draws_other_values(tmp_path: Path) -> None:
    drawn = []
    for resume in (False, True, True):
        axis = read_axis("train.lr=log:1e-4..1e-2")
        sweep = Sweep(tmp_path / "sweep", ["synthetic-tiny"], [], [axis], ["depth"], "depth", 1, False, print)
        sweep.open(resume, 0, None)
        trial = sweep.study.ask()
        drawn.append(axis.suggest(trial))
        sweep.study.tell(trial, 1.0)
    assert len({*drawn}) == 3


def test_two_at_once_in_one_folder(tmp_path: Path) -> None:
    def opened(resume: bool) -> Sweep:
        sweep = Sweep(tmp_path / "sweep", ["synthetic-tiny"], (), [AXIS], ["depth"], "depth", 1, False, print)
        sweep.open(resume, 0, None)
        return sweep

    first = opened(False)
    with pytest.raises(InputError, match="another process is training into it"):
        opened(True)
    first.close()
    opened(True).close()


@pytest.mark.slow
@pytest.mark.process
def test_a_sweep_from_the_first_trial_to_the_best_again(cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = ("sweep", "synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--train.epochs=1", "--model.tasks=[depth]")
    words = (*words, "--data.workers=0", "--space", "train.lr=log:1e-4..1e-2", "--out", out)
    refused(cli(*words, "--trials", 1, "--objective", "semseg"), "'semseg': give mean, or a task of the model: depth")
    refused(cli(*words[:-2], "model.top_k=a,b", "--out", out, "--trials", 1), "top_k")
    assert not out.exists()
    result = cli(*words, "--trials", 1)
    assert result.returncode == 0, result.stderr
    assert "trained to their end" in result.stdout and "m3vit train synthetic-tiny" in result.stdout
    refused(cli(*words, "--trials", 2), "holds a sweep: go on with --resume")
    refused(cli(*words, "--trials", 2, "--resume", "--train.seed=1"), "another words")
    result = cli(*words, "--trials", 2, "--resume")
    assert result.returncode == 0, result.stderr
    found = json.loads((out / "sweep.json").read_text())
    assert [row["state"] for row in found["trials"]] == ["complete"] * 2 and found["objective"] == "depth"
    values = [row["value"] for row in found["trials"]]
    assert values == sorted(values), "the smallest error first"
    for row in found["trials"]:
        lines = (out / f"trial-{row['trial']:04d}" / "metrics.jsonl").read_text().splitlines()
        val = [json.loads(line) for line in lines if '"kind": "val"' in line]
        assert row["value"] == val[-1]["depth/rmse"] == row["metrics"]["depth/rmse"]
    first = next(row for row in found["trials"] if row["trial"] == 0)
    assert first["keys"] == {"train.lr": 0.003}, "the recipe as it is"


@pytest.mark.slow
@pytest.mark.process
def test_a_space_of_failures_ends(cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    words = ("synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--train.epochs=1", "--space", "model.top_k=5..9")
    result = cli("sweep", *words, "--out", tmp_path / "sweep", "--trials", 9)
    refused(result, "the first 3 trials failed, the last with: m3vit: error: .*top_k")
