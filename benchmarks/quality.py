"""Does the mixture of experts help? Single-task, dense multi-task, three routers, several seeds, on rendered scenes.

    python benchmarks/quality.py --out runs/quality [--epochs 40] [--seeds 3] [--jobs 2] [--json FILE]

Nothing but public commands: m3vit data synth, train and eval (protocol A) with the recipe synthetic-tiny, whose dense
MLPs (ratio 2) cost what its experts cost (ratio 1, top-2). What was trained before is not trained again, so an
interrupted run goes on. The table gives mean and standard deviation over seeds; delta_m is over the single-task models'
means, by seed. Rendered scenes and small models: the table says nothing about photographs.
"""

import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _bench import arguments, save

from m3vit.evaluation.gain import Baseline, delta_m
from m3vit.evaluation.scoring import read
from m3vit.label_sets import LABEL_SETS
from m3vit.tasks import TASKS

NAMES = LABEL_SETS["nyud"].tasks
ROWS: dict[str, list[list[str]]] = {  # row of the table -> the keys of its models, one or one a task
    "single-task": [["--model.moe_blocks=none", f"--model.tasks=[{task}]"] for task in NAMES],
    "dense multi-task": [["--model.moe_blocks=none"]],
    "MoE, multi-gate": [[]],
    "MoE, task-conditioned": [["--model.router=task_conditioned"]],
    "MoE, single gate": [["--model.router=single"]],
    "MoE, multi-gate, specialised": [["--train.balance_weight=0", "--train.specialise_weight=0.1"]],
}


def run(*words: object) -> None:
    """Run one m3vit command, or stop with what it said."""
    command = [sys.executable, "-m", "m3vit", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")


def folder_of(out: Path, row: str, index: int, seed: int) -> Path:
    name = row.replace(",", "").replace(" ", "-").lower()
    return out / f"{name}-{NAMES[index]}-{seed}" if row == "single-task" else out / f"{name}-{seed}"


def train_and_score(out: Path, row: str, index: int, seed: int, epochs: int) -> None:
    """Train one model on one thread and evaluate it, unless that is done."""
    folder = folder_of(out, row, index, seed)
    if (folder / "eval.json").exists():
        return
    keys = [*ROWS[row][index], f"--train.epochs={epochs}", f"--train.seed={seed}", "--train.threads=1"]
    keys += ["--model.head=linear", "--train.eval_epochs=0", f"--data.root={out / 'data'}"]
    start = time.perf_counter()
    run("train", "synthetic-tiny", *keys, "--out", folder, "--resume")
    run("eval", folder, "--workers", 1)
    print(f"{folder.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def figures(out: Path, row: str, seed: int) -> dict[str, dict[str, float]]:
    """Return {task: {metric: value}} of a row's models of one seed."""
    scores: dict[str, dict[str, float]] = {}
    for index in range(len(ROWS[row])):
        _, result = read(folder_of(out, row, index, seed), "A")
        scores |= {task: values["torch"] for task, values in result["tasks"].items()}
    return scores


def beside(found: dict[str, list[Any]], reference: str) -> dict[str, dict[str, list[float]]]:
    """Return {row: {task: headline metrics, delta_m: gains}} by seed, of {row: scores by seed}.

    delta_m is over the means of the row `reference`.
    """
    metrics = {task: TASKS[task].metric for task in NAMES}
    means = {t: (metric, statistics.mean(s[t][metric] for s in found[reference])) for t, metric in metrics.items()}
    baseline = Baseline(reference, "nyud", "A", "this run", means)
    return {
        row: {task: [scores[task][metric] for scores in runs] for task, metric in metrics.items()}
        | {"delta_m": [delta_m({task: scores[task] for task in NAMES}, baseline) for scores in runs]}
        for row, runs in found.items()
    }


def print_table(table: dict[str, dict[str, list[float]]], digits: int | None = None) -> None:
    """Print mean and standard deviation over the seeds; digits: None for two, three of means below 2."""
    heads = [f"{task} {TASKS[task].metric} {'↑' if TASKS[task].higher_is_better else '↓'}" for task in NAMES]
    print("| | " + " | ".join([*heads, "delta_m % ↑"]) + " |\n|---|" + "---:|" * (len(NAMES) + 1))
    for row, columns in table.items():
        cells = []
        for values in columns.values():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            shown = digits or (3 if statistics.mean(values) < 2 and columns["delta_m"] is not values else 2)
            cells.append(f"{statistics.mean(values):.{shown}f} ± {spread:.{shown}f}")
        print(f"| {row} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="models trained at a time, on one thread each")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    rows = list(dict.fromkeys(["single-task", *args.rows]))
    run("data", "synth", "--out", args.out / "data", "--train", 400, "--val", 100)
    # Seed by seed, so that what an interruption leaves is whole seeds.
    jobs = [(row, index, seed) for seed in range(args.seeds) for row in rows for index in range(len(ROWS[row]))]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train_and_score(args.out, *job, args.epochs), jobs))

    seeds = range(args.seeds)
    found = {row: [figures(args.out, row, seed) for seed in seeds] for row in rows}
    table = beside(found, "single-task")
    print(f"{args.epochs} epochs, {args.seeds} seeds, protocol A, {platform.machine()}; mean ± standard deviation")
    print_table(table)
    save(args.json, {"epochs": args.epochs, "rows": table})


if __name__ == "__main__":
    main()
