"""More epochs of a finished run: `m3vit train ... --resume` with a larger train.epochs.

Weights, optimiser, moving average and random state go on as they are. The schedule becomes that of all epochs, so the
learning rate steps up from where the finished run had let it down to; everything else is as if the run had been
interrupted there. A run that is not finished has to be finished first: its steps were taken under the other schedule.
"""

from dataclasses import replace
from pathlib import Path

from m3vit.errors import InputError
from m3vit.training.budgets import distances_count
from m3vit.training.checkpoint import read_metrics
from m3vit.training.config import Config, differences, read_run_config
from m3vit.training.optim import learning_rate

KIND = "extended"  # of its line in metrics.jsonl


def epochs_before(config: Config, out: Path) -> int:
    """Return how many epochs a run was trained for, if it is to be trained for more and nothing else; 0 if not."""
    if not (out / "config.yaml").exists():
        return 0
    before = read_run_config(out)
    more = config.train.epochs > before.train.epochs and "train.epochs" in differences(before, config)
    return before.train.epochs if more else 0


def check_finished(out: Path, before: int, step: int, steps_per_epoch: int) -> None:
    """Raise InputError unless a run that did `step` steps has done all of the epochs that it was to have before."""
    if step < before * steps_per_epoch:
        raise InputError(
            f"{out} did {step} of the {before * steps_per_epoch} steps of its {before} epochs, and more epochs are for "
            "a finished run, since the learning rate depends on their number: go on with "
            f"--train.epochs={before} first",
            everywhere=True,
        )


def words(config: Config, before: int, steps_per_epoch: int, start: int = 0) -> str:
    """Say what the learning rate does, and the weight of budgets' distances, in one line.

    `start`: the step that smaller budgets began with.
    """
    train, done = config.train, before * steps_per_epoch
    last = learning_rate(replace(train, epochs=before), done - 1, steps_per_epoch)
    following = learning_rate(train, done, steps_per_epoch)
    rising = distances_count(train, done, train.epochs * steps_per_epoch, start) if train.budgets else 1.0
    return (
        f"{before} epochs are done, and ended at a learning rate of {last:.3g}; from here on the {train.schedule} "
        f"schedule is that of {train.epochs} epochs, which goes on at {following:.3g}"
        + (f"; budgets' distances count {rising:.2f} of their weights, and more from here on" if rising < 1 else "")
    )


def is_noted(out: Path, epochs: int) -> bool:
    """Return whether the log says already that the run is one of so many epochs."""
    lines = [line for line in read_metrics(out) if line["kind"] == KIND]
    return bool(lines) and lines[-1].get("epochs") == epochs
