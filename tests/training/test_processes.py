"""Several processes train what one does, stop together, and resume to the same bits."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TASKEXPERT, TINY
from tests.training.launching import Run, run
from tests.training.runs import assert_close, lines, same_bits

pytestmark = pytest.mark.process


def test_two_processes_or_parts_train_what_one_does(uneven_data: Path, tmp_path: Path) -> None:
    # SGD: AdamW divides by a gradient's size, and so turns rounding of a tiny one into a whole step.
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={uneven_data}", "--train.optimizer=sgd", "--train.lr=0.01"]
    words += ["--train.epochs=4", "--train.ema=0.5", "--train.eval_epochs=1", "--train.tasks_per_step=3"]
    run([*words, "--out", tmp_path / "one"], tmp_path)
    run([*words, "--out", tmp_path / "two"], tmp_path, processes=2)
    # Eight steps of rate 0.01, gradients of size 10 summed in another order: a few float32 roundings, 6e-8 each.
    assert_close(tmp_path / "one", tmp_path / "two", weights_atol=1e-6)
    # Parts: but for the balance losses, which are of each part.
    words += ["--train.balance_weight=0"]
    run([*words, "--out", tmp_path / "whole"], tmp_path)
    run([*words, "--train.accumulate=2", "--out", tmp_path / "parts"], tmp_path, processes=2)
    for folder in ("whole", "parts"):
        text = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        kept = [{key: value for key, value in json.loads(line).items() if key != "balance"} for line in text]
        (tmp_path / folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert_close(tmp_path / "whole", tmp_path / "parts", weights_atol=1e-6)


def test_all_routing_losses_are_those_of_the_whole_batch(uneven_data: Path, tmp_path: Path) -> None:
    # Router noise is drawn by each process for itself: tests/training/test_routing_sums.py shares it out.
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={uneven_data}", "--train.optimizer=sgd", "--train.lr=0.01"]
    words += ["--train.epochs=4", "--train.balance_weight=0.1", "--train.switch_weight=0.1", "--train.z_weight=0.1"]
    words += ["--train.specialise_weight=0.1", "--model.experts_per_task={depth: [0, 2, 3], edge: [1, 2]}"]
    run([*words, "--out", tmp_path / "one"], tmp_path)
    run([*words, "--out", tmp_path / "two"], tmp_path, processes=2)
    assert_close(tmp_path / "one", tmp_path / "two", weights_atol=1e-6)
    (first, *_) = [line for line in lines(tmp_path / "two") if line["kind"] == "train"]
    assert {"balance", "switch", "z", "specialise"} <= set(first)


@pytest.mark.parametrize(("head", "weighting"), [([], "pcgrad"), (TASKEXPERT, "mgda")], ids=["conv", "taskexpert"])
def test_gradient_methods_see_the_gradient_of_all_processes(
    uneven_data: Path, tmp_path: Path, head: list[str], weighting: str
) -> None:
    words = ["train", "synthetic-tiny", *TINY, *head, f"--data.root={uneven_data}", "--train.optimizer=sgd"]
    words += ["--train.lr=0.01", "--train.epochs=2", f"--train.weighting={weighting}"]
    words += ["--train.checkpoint_activations=true"]
    run([*words, "--out", tmp_path / "one"], tmp_path)
    run([*words, "--out", tmp_path / "two"], tmp_path, processes=2)
    assert_close(tmp_path / "one", tmp_path / "two", weights_atol=1e-6)
    assert any(line.get("gradient/edge", 1) != 1 for line in lines(tmp_path / "one")), "no conflict: nothing was tested"


def test_the_moving_average_is_what_is_kept_in_bfloat16_too(uneven_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={uneven_data}", "--train.precision=bf16-mixed"]
    run([*words, "--train.epochs=6", "--train.ema=0.8", "--train.eval_epochs=1", "--out", out], tmp_path)
    state, saved = torch.load(out / "last" / "state.pt", weights_only=True), load_file(out / "model.safetensors")
    assert all(torch.equal(state["average"][f"module.{name}"], value) for name, value in saved.items())
    assert not all(torch.equal(state["model"][name], value) for name, value in saved.items())
    assert all(value.dtype == torch.float32 for value in saved.values())
    # best/ is a run folder; its scores are those of the evaluation that chose it.
    run(["eval", out / "best"], tmp_path)
    epoch = json.loads((out / "best" / "model.json").read_text())["epochs_trained"]
    (line,) = [line for line in lines(out) if line["kind"] == "val" and line["epoch"] == epoch]
    scores = json.loads((out / "best" / "eval.json").read_text())["protocols"]["A"]["tasks"]["depth"]["torch"]
    assert scores["rmse"] == pytest.approx(line["depth/rmse"], rel=1e-6)


def test_stopped_killed_and_resumed_on_two_processes(uneven_data: Path, tmp_path: Path) -> None:
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={uneven_data}", "--train.checkpoint_steps=1"]
    words += ["--model.router_noise=1.0", "--train.ema=0.9", "--train.accumulate=2", "--train.tasks_per_step=2"]
    words += ["--train.weighting=uncertainty", "--train.epochs=8", "--train.eval_epochs=2"]
    run([*words, "--out", tmp_path / "unbroken"], tmp_path, processes=2)

    out, moments = tmp_path / "broken", random.Random(0)
    metrics = out / "metrics.jsonl"
    # torchrun passes SIGTERM on; nobody writes after it has ended.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "m3vit"]
    with open(tmp_path / "torchrun.txt", "w") as output:
        process = subprocess.Popen([*torchrun, *words, "--out", str(out)], stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    text = (tmp_path / "torchrun.txt").read_text()
    assert "m3vit: stopped by SIGTERM after step" in text, text
    step = torch.load(out / "last" / "state.pt", weights_only=True)["step"]
    assert f"after step {step};" in text and 2 <= step < 16

    for wanted in (6, 12):
        started = Run([*words, "--out", out, "--resume"], tmp_path, processes=2)
        started.wait_for_lines(metrics, wanted)
        time.sleep(moments.uniform(0, 0.05))
        started.kill()
    run([*words, "--out", out, "--resume"], tmp_path, processes=2)
    same_bits(tmp_path / "unbroken", out)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_divergence_stops_every_process(uneven_data: Path, tmp_path: Path, strategy: str) -> None:
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={uneven_data}", "--train.epochs=4"]
    words += ["--train.optimizer=sgd", "--train.lr=1e30", "--train.checkpoint_steps=1", "--out", tmp_path / "run"]
    words += [f"--train.strategy={strategy}"]
    started = Run(words, tmp_path, processes=2)
    assert started.wait() == [2, 2], started.text
    assert started.text.count("training diverged at step") == 1, "one process speaks"
    assert "Traceback" not in started.text


def test_an_unreadable_file_of_one_process(make_data: Callable[..., Path], tmp_path: Path) -> None:
    root = make_data(tmp_path / "data")
    (root / "images" / "0004.jpg").write_bytes(b"")
    # One image a process: the one without it has nothing, and takes part all the same.
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={root}", "--train.optimizer=sgd", "--train.lr=0.01"]
    words += ["--train.batch_size=2", "--train.epochs=1"]
    stopped = Run([*words, "--out", tmp_path / "stopped"], tmp_path, processes=2)
    assert stopped.wait() == [2, 2], stopped.text
    assert "0004.jpg" in stopped.text and "Traceback" not in stopped.text
    words += ["--data.on_error=skip"]
    run([*words, "--out", tmp_path / "one"], tmp_path)
    text = run([*words, "--out", tmp_path / "two"], tmp_path, processes=2)
    assert "1 training images could not be read" in text
    assert_close(tmp_path / "one", tmp_path / "two", weights_atol=1e-6)


def children_of(parent: int | None) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(parent):
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("what", ["loader", "process"])
def test_all_end_when_one_is_killed(uneven_data: Path, tmp_path: Path, what: str) -> None:
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={uneven_data}", "--train.epochs=500", "--data.cache=false"]
    started = Run([*words, "--data.workers=1", "--out", tmp_path / "run"], tmp_path, processes=2)
    started.wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3)
    pid = started.processes[1].pid
    if what == "process":
        loaders = set(children_of(pid))
        while not loaders:  # a new one comes with each epoch
            loaders = set(children_of(pid))
        os.kill(pid, signal.SIGKILL)
        assert started.wait(60) == [2, -signal.SIGKILL], started.text
        assert "another process of this training ended" in started.text
        deadline = time.monotonic() + 60
        while left := [loader for loader in loaders if Path(f"/proc/{loader}").exists()]:
            assert time.monotonic() < deadline, f"{left} load data for nobody"
            time.sleep(0.05)
    else:
        deadline = time.monotonic() + 60
        # A new one comes with each epoch, and one that has handed over all of an epoch is missed by nobody.
        while time.monotonic() < deadline and started.processes[1].is_alive():
            for loader in children_of(pid):
                with suppress(ProcessLookupError):
                    os.kill(loader, signal.SIGKILL)
            time.sleep(0.02)
        assert started.wait(60) == [2, 2], started.text
        said = "error: a process that loads data failed: it was killed by SIGKILL, maybe for want of memory. "
        assert started.text.count(said) == 1, started.text
        assert "go on with --resume" in started.text
    assert "Traceback" not in started.text


def test_another_number_of_processes_goes_on_with_a_note(uneven_data: Path, tmp_path: Path) -> None:
    words = ["train", "synthetic-tiny", *TINY, f"--data.root={uneven_data}", "--train.epochs=200", "--out"]
    started = Run([*words, tmp_path / "run"], tmp_path)
    started.wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3)
    busy = Run([*words, tmp_path / "run", "--resume"], tmp_path)
    started.signal(signal.SIGUSR1)
    assert started.wait() == [138] and "stopped by SIGUSR1 after step" in started.text
    # The second one waited for the first to end, and goes on.
    busy.wait_for_lines(tmp_path / "run" / "metrics.jsonl", 6)
    busy.signal(signal.SIGINT)
    assert busy.wait() == [130] and "stopped by SIGINT after step" in busy.text
    resumed = Run([*words, tmp_path / "run", "--resume"], tmp_path, processes=2)
    resumed.wait_for_lines(tmp_path / "run" / "metrics.jsonl", 9)
    resumed.signal(signal.SIGTERM)
    assert resumed.wait() == [143, 143], resumed.text
    (note,) = [line for line in lines(tmp_path / "run") if line["kind"] == "resumed"]
    assert (note["processes_before"], note["processes"]) == (1, 2)
    steps = [line["step"] for line in lines(tmp_path / "run") if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
