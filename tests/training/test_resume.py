"""A run that is stopped, however rudely, ends as an unbroken run does: bit for bit on the CPU."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3vit.training.checkpoint import load_state, save_state
from tests.conftest import PUP, TINY
from tests.training.launching import Run

pytestmark = pytest.mark.process

Cli = Callable[..., subprocess.CompletedProcess]
# Router noise draws from torch's random state, so resuming has to restore that too.
RECIPE = ["synthetic-tiny", *TINY, "--train.epochs=8", "--train.checkpoint_steps=1", "--model.router_noise=1.0"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(cli: Cli, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    result = cli("train", *RECIPE, f"--data.root={tiny_data}", "--out", run)
    assert result.returncode == 0, result.stderr
    return run


def test_killed_at_random_moments_and_resumed(unbroken: Path, cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    run, moments = tmp_path / "run", random.Random(0)
    words = ["train", *RECIPE, f"--data.root={tiny_data}", "--out", run, "--resume"]
    kills = 0
    for wanted in (1, 4, 8):  # steps done before the kill; then a random moment later
        started = Run(words, tmp_path)
        started.wait_for_lines(run / "metrics.jsonl", wanted)
        time.sleep(moments.uniform(0, 0.05))
        started.kill()
        kills += started.processes[0].exitcode == -signal.SIGKILL
    assert kills >= 2, "the run ended before it could be killed: give it more steps"
    result = cli(*words)
    assert result.returncode == 0, result.stderr
    expected, resumed = weights(unbroken), weights(run)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    # The log is that of one run too: no step twice, none missing.
    assert (run / "metrics.jsonl").read_text() == (unbroken / "metrics.jsonl").read_text()
    assert not list(run.rglob(".*")), "temporary files were left behind"


def test_resuming_a_finished_run_changes_nothing(unbroken: Path, cli: Cli, tiny_data: Path) -> None:
    before = (unbroken / "model.safetensors").read_bytes()
    result = cli("train", *RECIPE, f"--data.root={tiny_data}", "--out", unbroken, "--resume")
    assert result.returncode == 0, result.stderr
    assert (unbroken / "model.safetensors").read_bytes() == before


def test_refuses_to_overwrite_or_to_resume_something_else(unbroken: Path, cli: Cli, tiny_data: Path) -> None:
    words = ["train", *RECIPE, f"--data.root={tiny_data}", "--out", unbroken]
    again = cli(*words)
    assert again.returncode == 2 and "continue it with m3vit train --resume" in again.stderr
    other = cli(*words, "--resume", "--train.lr=0.5")
    assert other.returncode == 2 and "train.lr" in other.stderr


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(
    cli: Cli, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--train.epochs=4", "--train.optimizer=sgd"]
    # The learning rate climbs, from nothing, until a step makes the weights infinite.
    words += ["--train.lr=1e38", "--train.warmup_epochs=3.9", "--train.checkpoint_steps=1", "--train.momentum=0"]
    result = cli("train", *words, "--out", run)
    assert result.returncode == 2, result.stderr
    assert "training diverged at step" in result.stderr and "not finite" in result.stderr
    state = run / "last" / "state.pt"
    assert ("last checkpoint is kept" in result.stderr) == state.exists()
    if state.exists():
        saved = torch.load(state, weights_only=True)["model"]
        assert all(value.isfinite().all() for value in saved.values())
    assert not (run / "model.safetensors").exists() or all(v.isfinite().all() for v in weights(run).values())


def test_infinite_gradients_under_clipping_are_a_clear_error(cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    words = ["synthetic-tiny", *TINY, f"--data.root={tiny_data}", "--train.epochs=4", "--train.optimizer=sgd"]
    result = cli("train", *words, "--train.lr=1e4", "--train.grad_clip=1e9", "--out", tmp_path / "run")
    assert result.returncode == 2, result.stderr
    assert "training diverged at step" in result.stderr and "Traceback" not in result.stderr


def test_distillation_under_its_former_names_goes_on(cli: Cli, tiny_data: Path, tmp_path: Path) -> None:
    words = ["synthetic-tiny", *TINY, *PUP, "--model.distillation=[0]", "--model.tasks=[depth,normals]"]
    words += ["--train.epochs=1", "--train.ema=0.9", f"--data.root={tiny_data}", "--out", str(tmp_path / "run")]
    result = cli("train", *words)
    assert result.returncode == 0, result.stderr
    state = load_state(tmp_path / "run")
    assert state is not None
    for key in ("model", "average"):
        former = {name.replace("heads.training_only.", "distillation."): value for name, value in state[key].items()}
        assert any("distillation.0." in name for name in former)
        state[key] = former
    save_state(tmp_path / "run", state)
    result = cli("train", *words, "--resume")
    assert result.returncode == 0, result.stderr
