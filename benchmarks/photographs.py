"""What experts give on real photographs, and what decoders do: NYUD-v2 and a pretrained ViT-S/14.

    python benchmarks/photographs.py --data ROOT --weights FILE --out runs/nyud [--rows ...] [--exports] [--json FILE]
    python benchmarks/photographs.py --data ROOT --weights FILE --out runs/nyud-decoders --decoders [--epochs 5] ...

ROOT is NYUD-v2 in NYUD_MT's layout, FILE weights of timm's vit_small_patch14_dinov2. Nothing but public commands: m3vit
train with the recipe nyud-vits14, the same number of epochs for each row, then eval (protocol A, whole val split) and
profile. What was trained and scored before is not done again and an interrupted training is resumed, so that the table
may be made in several goes. Rows: single-task, dense, two ways of experts; delta_m is over the single-task models of
the tasks that have one. With --decoders: `linear`, `conv` (the recipe's), `multiscale` and `taskexpert`, the last two
of the same MACs; delta_m is over `multiscale` on the dense trunk. --exports goes on with the first row of experts: ONNX
packages and multiplexed projects, scored on the same images.
"""

import json
from pathlib import Path
from typing import Any

from _bench import arguments, machine, save
from quality import run  # beside this file

from m3vit.evaluation.gain import Baseline, delta_m
from m3vit.evaluation.scoring import read
from m3vit.tasks import TASKS

DENSE = ["--model.moe_blocks=none"]
SINGLE = ("semseg", "depth")  # what is the benchmark's own ground truth
ROWS: dict[str, list[str]] = {
    **{f"single-task, {task}": [*DENSE, f"--model.tasks=[{task}]"] for task in SINGLE},
    "dense multi-task": DENSE,
    "MoE, multi-gate": [],
    "MoE, specialised": ["--train.balance_weight=0", "--train.specialise_weight=0.1"],
}
BLOCKS = "blocks: [3, 5, 7, 9, 11]"  # as the recipe's
TASKEXPERT = ["--model.head=taskexpert", f"--model.head_args={{{BLOCKS}, experts: 5, width: 64, head_width: 64}}"]
DECODERS: dict[str, list[str]] = {
    "linear, dense": [*DENSE, "--model.head=linear", "--model.head_args={}"],  # of the last block
    "dense multi-task": DENSE,
    "multiscale, dense": [
        *DENSE,
        "--model.head=multiscale",
        f"--model.head_args={{{BLOCKS}, width: 61, head_width: 64}}",
    ],
    "taskexpert, dense": [*DENSE, *TASKEXPERT],
    "MoE, multi-gate": [],
    "taskexpert, MoE": TASKEXPERT,
}
REFERENCE = "multiscale, dense"
METRICS = {"semseg": ("mIoU", "mIoU_trained"), "depth": ("rmse", "delta1"), "normals": ("mErr",), "edge": ("odsF",)}
EXPORTS: dict[str, list[str]] = {  # name -> arguments of m3vit export
    "ONNX, fp32": ["onnx"],
    "ONNX, int8": ["onnx", "--precision", "int8"],
    "ONNX, pruned 0.99": ["onnx", "--prune", "coverage=0.99"],
    "ONNX, pruned 0.99, int8": ["onnx", "--prune", "coverage=0.99", "--precision", "int8"],
    "ZCU104, 16-bit": ["hls", "--schedule", "multiplexed", "--samples", "4"],
    "ZCU104, W8A8": ["hls", "--schedule", "multiplexed", "--samples", "4", "--weight-bits", "8", "--act-bits", "8"],
}


def folder_of(out: Path, row: str) -> Path:
    return out / row.replace(",", "").replace(" ", "-").lower()


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """Return {task: {metric: value}} of an evaluated folder."""
    _, result = read(folder, "A")
    predictor = result["predictor"]
    return {task: values[predictor] for task, values in result["tasks"].items()}


def cells(scores: dict[str, dict[str, float]]) -> list[str]:
    """Return a row's figures as the table shows them, - for what it does not predict."""
    names = [(task, metric) for task, metrics in METRICS.items() for metric in metrics]
    found = [scores.get(task, {}).get(metric) for task, metric in names]
    return ["-" if value is None else f"{value:.3f}" if value < 2 else f"{value:.2f}" for value in found]


def headings() -> list[str]:
    return [f"{task} {metric}" for task, metrics in METRICS.items() for metric in metrics]


def train_and_score(row: str, args: Any) -> None:
    """Train the model of a row and evaluate it, unless that is done."""
    folder = folder_of(args.out, row)
    if not (folder / "eval.json").exists():
        keys = [*(ROWS | DECODERS)[row], f"--data.root={args.data}", f"--model.weights={args.weights}"]
        keys += [f"--train.epochs={args.epochs}"] if args.epochs else []
        run("train", "nyud-vits14", *keys, "--out", folder, "--resume")
        run("eval", folder)


def gmac_of(folder: Path) -> float:
    """Return what all tasks of a model take in one pass, in GMAC."""
    file = folder / "profile.json"
    if not file.exists():
        run("profile", folder, "--json", file)
    return float(json.loads(file.read_text())["all_tasks_in_one_pass"]["macs"]["total"]) / 1e9


def rows(args: Any) -> dict[str, Any]:
    """Train what is missing; print and return the table of rows."""
    chosen = DECODERS if args.decoders else ROWS
    for row in chosen if args.rows is None else args.rows:
        train_and_score(row, args)
    evaluated = (row for row in chosen if (folder_of(args.out, row) / "eval.json").exists())
    done = {row: figures(folder_of(args.out, row)) for row in evaluated}
    if args.decoders:
        base = done.get(REFERENCE, {})
    else:
        base = {task: done[f"single-task, {task}"][task] for task in SINGLE if f"single-task, {task}" in done}
    headline = {task: (TASKS[task].metric, scores[TASKS[task].metric]) for task, scores in base.items()}
    baseline = Baseline(REFERENCE if args.decoders else "single-task", "nyud", "A", "this table", headline)
    print("| | " + " | ".join([*headings(), f"delta_m ({', '.join(base)}) %", "GMAC, all tasks"]) + " |")
    print("|---|" + "---:|" * (len(headings()) + 2))
    table: dict[str, Any] = {}
    for row, scores in done.items():
        gmac = gmac_of(folder_of(args.out, row))
        gain = None if "single" in row or not base else delta_m({task: scores[task] for task in base}, baseline)
        table[row] = {"metrics": scores, "delta_m": gain, "gmac": gmac}
        print(
            f"| {row} | " + " | ".join([*cells(scores), "-" if gain is None else f"{gain:+.2f}", f"{gmac:.1f}"]) + " |"
        )
    return table


def exports(args: Any) -> dict[str, Any]:
    """Export the first row of experts, score what comes out; print and return the table."""
    source = folder_of(args.out, "MoE, multi-gate")
    print("| | " + " | ".join(headings()) + " |\n|---|" + "---:|" * len(headings()))
    table = {"torch": figures(source)}
    print("| torch | " + " | ".join(cells(table["torch"])) + " |")
    for name, words in EXPORTS.items():
        folder = folder_of(args.out, name)
        if not folder.exists():
            run("export", words[0], source, "--out", folder, *words[1:])
        if not (folder / "eval.json").exists():
            run("eval", folder, "--data.root", args.data)
        table[name] = figures(folder)
        print(f"| {name} | " + " | ".join(cells(table[name])) + " |", flush=True)
    return table


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=0, help="of each row (default: the recipe's)")
    parser.add_argument(
        "--rows", nargs="*", default=None, choices=list(ROWS | DECODERS), help="which are trained (default: all)"
    )
    parser.add_argument("--decoders", action="store_true", help="rows of decoders, in place of those of experts")
    parser.add_argument("--exports", action="store_true")
    args = parser.parse_args()
    table = DECODERS if args.decoders else ROWS
    if others := set(args.rows or ()) - set(table):
        parser.error(
            f"--rows {', '.join(sorted(others))}: this table has {', '.join(table)} (--decoders: the other one)"
        )
    found: dict[str, Any] = {"machine": machine()}
    found["rows"] = rows(args)
    if args.exports:
        found["exports"] = exports(args)
    save(args.json, found)


if __name__ == "__main__":
    main()
