"""m3vit sweep."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from m3vit.commands.terminal import OneLineParser, console, say
from m3vit.errors import InputError

TITLE = "Train a recipe many times with other values of some keys, chosen by Optuna."


def arguments() -> argparse.ArgumentParser:
    """Return the parser of what is not `m3vit train`'s."""
    parser = OneLineParser(
        prog="m3vit sweep RECIPE",
        description=f"{TITLE} All other words are those of m3vit train: --data.root DIR, --train.epochs 20, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write: a run per trial")
    parser.add_argument(
        "--space",
        nargs="+",
        action="extend",
        required=True,
        metavar="KEY=VALUES",
        help="what is tried: train.lr=log:1e-4..1e-2 (a range), model.top_k=1..4 (whole numbers), "
        "train.batch_size=4,8,16 (a choice)",
    )
    parser.add_argument("--trials", type=int, required=True, metavar="N", help="trainings in all")
    parser.add_argument(
        "--objective",
        default="mean",
        metavar="TASK",
        help="the task whose headline metric counts, or mean: over tasks, the gain over the first trial (default)",
    )
    parser.add_argument(
        "--no-prune",
        action="store_true",
        help="train every trial to its end; otherwise one that is worse than the median at the same evaluation "
        "(train.eval_epochs) ends there",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of values (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in --out")
    return parser


def run_sweep(argv: Sequence[str]) -> int:
    parser = arguments()
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            parser.parse_args(["--help"])
        raise InputError("give a recipe first: m3vit sweep RECIPE --space KEY=VALUES --trials N --out DIR")
    wanted, words = parser.parse_known_args(argv[1:])
    if wanted.trials < 1:
        raise InputError(f"--trials is {wanted.trials}: give 1 or more")
    from m3vit.commands.training import config_from
    from m3vit.training.effects import check_given
    from m3vit.training.sweep import MEAN, Stopped, Sweep, check_objective, read_axis, value_of

    axes = [read_axis(text) for text in wanted.space]
    if len({axis.key for axis in axes}) < len(axes):
        raise InputError("--space names a key twice: give all its values at once")
    words = [argv[0], *words]
    for place in (0, -1):  # both ends, so that a value of another type is told before hours of training
        ends = [(axis.choices or (f"{axis.low:g}", f"{axis.high:g}"))[place] for axis in axes]
        config_from("train", [*words, *(f"--{a.key}={v}" for a, v in zip(axes, ends, strict=True)), "--out", "x"])
    config, _ = config_from("train", [*words, "--out", "x"])
    check_given(config, words)
    tasks = config.model.tasks
    check_objective(wanted.objective, tasks)
    objective = tasks[0] if wanted.objective == MEAN and len(tasks) == 1 else wanted.objective
    every, epochs = config.train.eval_epochs, config.train.epochs
    evaluations = -(-epochs // every) if every else 1
    prune = not wanted.no_prune and evaluations > 1
    if not wanted.no_prune and not prune:
        say("trials are trained to their end: train.eval_epochs gives no evaluation before it")
    sweep = Sweep(wanted.out, words, config.plugins, axes, tasks, objective, evaluations, prune, say)
    first = {axis.key: axis.holds(value_of(config, axis.key)) for axis in axes}
    sweep.open(wanted.resume, wanted.seed, None if None in first.values() else first)
    try:
        sweep.run(wanted.trials)
    except Stopped as stopped:
        print(f"m3vit: {stopped}", file=sys.stderr)
        return stopped.exit_code
    finally:
        sweep.close()
    print_trials(sweep.result())
    say(f"the best again: m3vit train {shlex.join(sweep.best_words())} --out RUN")
    return 0


def print_trials(result: dict) -> None:
    """Print the trials, the best first."""
    from rich.table import Table

    table = Table("trial", "state", result["objective"])
    keys = list(result["trials"][0]["keys"])
    for key in keys:
        table.add_column(key, justify="right")
    for row in result["trials"]:
        value = "-" if row["value"] is None else f"{row['value']:.3f}"
        cells = [row["keys"].get(key, "-") for key in keys]
        shown = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        table.add_row(str(row["trial"]), row["state"], value, *shown)
    console(max(console().width, 100)).print(table)
