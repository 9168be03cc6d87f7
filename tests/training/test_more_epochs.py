"""More epochs of a finished run: the schedule is that of all of them, and said; all else goes on as if interrupted."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3vit.models.saved import INFO
from m3vit.run_folder import load_run
from m3vit.training.checkpoint import load_state, write_config
from m3vit.training.config import read_run_config
from m3vit.training.optim import learning_rate
from tests.conftest import TINY
from tests.test_cli import refused
from tests.training.runs import lines

STEPS = 2  # an epoch: 10 images, batches of 4


@pytest.fixture
def finished(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def words(data: Path, run: Path, epochs: int, *more: str) -> list[object]:
    return ["train", "synthetic-tiny", *TINY, f"--data.root={data}", f"--train.epochs={epochs}", "--out", run, *more]


def test_a_finished_run_goes_on(cli: Callable, tiny_data: Path, finished: Path, tmp_path: Path) -> None:
    before, config = lines(finished), read_run_config(finished)
    # What it is to equal: the same run, had it been one of four epochs that stopped after two.
    stopped = Path(shutil.copytree(finished, tmp_path / "stopped"))
    longer = replace(config, train=replace(config.train, epochs=4))
    write_config(longer, stopped)
    assert (result := cli(*words(tiny_data, stopped, 4, "--resume"))).returncode == 0, result.stderr

    result = cli(*words(tiny_data, finished, 4, "--resume"))
    assert result.returncode == 0, result.stderr
    last, following = learning_rate(config.train, 2 * STEPS - 1, STEPS), learning_rate(longer.train, 2 * STEPS, STEPS)
    assert following > last
    said = (
        f"2 epochs are done, and ended at a learning rate of {last:.3g}; from here on the cosine schedule is that of "
    )
    said += f"4 epochs, which goes on at {following:.3g}"
    assert said in " ".join(result.stdout.split()) and "trained for 4 epochs" in result.stdout

    found = lines(finished)
    assert found[: len(before)] == before
    note = found.pop(len(before))
    assert note["kind"] == "extended" and (note["epochs"], note["epochs_before"]) == (4, 2) and note["message"] == said
    assert note["step"] == 2 * STEPS
    assert found == lines(stopped)
    rates = {line["step"]: line["lr"] for line in found if line["kind"] == "train"}
    assert rates == {
        step + 1: learning_rate((config if step < 2 * STEPS else longer).train, step, STEPS)
        for step in range(4 * STEPS)
    }
    for file in ("model.safetensors", "best/model.safetensors"):
        one, other = load_file(finished / file), load_file(stopped / file)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_run(finished).config.train.epochs == 4 and load_run(finished).info["epochs_trained"] == 4
    # Finished once more: nothing is left to do, and nothing is noted twice.
    assert cli(*words(tiny_data, finished, 4, "--resume")).returncode == 0
    assert lines(finished) == [*found[: len(before)], note, *found[len(before) :]]


def test_what_is_not_more_epochs_of_a_finished_run(cli: Callable, tiny_data: Path, finished: Path) -> None:
    fewer = cli(*words(tiny_data, finished, 1, "--resume"))
    refused(fewer, "was started with other values of train.epochs")
    refused(cli(*words(tiny_data, finished, 3, "--resume", "--train.lr=0.1")), "other values of train.lr: resume")
    refused(cli(*words(tiny_data, finished, 3)), "continue it with m3vit train --resume")
    config = read_run_config(finished)
    write_config(replace(config, train=replace(config.train, epochs=5)), finished)  # of which it has done two
    said = r"did 4 of the 10 steps of its 5 epochs, and more epochs are for .* go on with --train.epochs=5 first"
    refused(cli(*words(tiny_data, finished, 6, "--resume")), said)
    assert read_run_config(finished).train.epochs == 5
    assert [line["kind"] for line in lines(finished)].count("extended") == 0


def test_a_run_goes_on_without_what_it_was_started_from(
    cli: Callable, tiny_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    source, run = Path(shutil.copytree(tiny_run, tmp_path / "source")), tmp_path / "run"
    given = [f"--model.init=run:{source}", "--model.tasks=[depth,edge]"]
    result = cli(*words(tiny_data, run, 1, *given))
    assert result.returncode == 0, result.stderr
    assert "weights begin as run:source" in result.stdout
    assert "not taken of run:source: " in result.stdout and "heads.semseg (not a task of this model)" in result.stdout
    origins = load_run(run).info["initialised"]
    assert (state := load_state(run)) and state["origins"] == origins
    shutil.rmtree(source)
    assert (result := cli(*words(tiny_data, run, 2, *given, "--resume"))).returncode == 0, result.stderr
    assert load_run(run).info["initialised"] == origins and (run / INFO).exists()
    again = cli(*words(tiny_data, tmp_path / "again", 1, *given))
    refused(again, "is no trained run")
