"""m3vit eval."""

import argparse
from pathlib import Path
from typing import Any

from m3vit.commands.terminal import console, positive, print_scores, progress_bar, say_changed
from m3vit.errors import InputError


def add_eval(parser: argparse.ArgumentParser) -> None:
    from m3vit.evaluation.gain import BASELINES

    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="run folder, ONNX package or HLS project")
    parser.add_argument(
        "--protocol",
        choices=["A", "B"],
        default=None,
        help="A: resized to the label's size (Vandenhende, M3ViT); B: padded (ATRC, InvPT) (default: A; with --compare "
        "the one that all folders were evaluated under)",
    )
    parser.add_argument(
        "--data.root",
        dest="data_root",
        metavar="DIR",
        help="data set's folder (default: the one a run was trained on; exports do not know it)",
    )
    parser.add_argument(
        "--device", default=None, help="of a run alone: cpu, cuda, ... or auto: cuda if there is one (default: auto)"
    )
    parser.add_argument(
        "--precision", default=None, help="of an ONNX package: one it holds, such as int8 (default: its first)"
    )
    parser.add_argument(
        "--batch", type=positive, default=None, metavar="N", help="of a run alone: images it takes at once (default: 1)"
    )
    parser.add_argument(
        "--workers", type=positive, default=None, metavar="N", help="processes that match edges (default: one a core)"
    )
    parser.add_argument(
        "--all-metrics", action="store_true", help="print every metric, not only the main one of each task"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="show two or more folders that were evaluated in one table; evaluates nothing",
    )
    parser.add_argument(
        "--baseline",
        default=None,
        metavar="NAME",
        help="with --compare: the single-task figures that delta_m is over: an evaluated folder, or a published set "
        f"({', '.join(BASELINES)}) (default: no delta_m)",
    )


def run_eval(args: argparse.Namespace) -> None:
    if args.compare:
        if any((args.data_root, args.workers, args.all_metrics, args.precision, args.device, args.batch)):
            raise InputError(
                "--compare shows what was evaluated: leave out --data.root, --workers, --all-metrics, --precision, "
                "--device and --batch"
            )
        from m3vit.evaluation.compare import compare

        print_comparison(compare(args.folders, args.protocol, args.baseline))
        return
    if len(args.folders) > 1 or args.baseline:
        raise InputError("give one folder to evaluate; --compare shows several that were evaluated, and delta_m")
    (folder,) = args.folders
    from m3vit.collectives import rank
    from m3vit.evaluation.artefacts import choose_device, is_export, open_predictor
    from m3vit.evaluation.scoring import score
    from m3vit.tasks import TASKS
    from m3vit.training.config import read_run_config

    if is_export(folder) and (args.device or args.batch):
        raise InputError(
            f"--device and --batch are of a run, and {folder} is an export, which runs on the CPU, an image at a time: "
            "leave them out"
        )
    device = choose_device(args.device or "auto")
    predictor, info, root = open_predictor(folder, device, args.batch or 1, args.precision)
    if args.workers and not any(TASKS[task].matches_edges for task in predictor.tasks):
        raise InputError(f"--workers are processes that match edges, which {folder} does not predict: leave it out")
    if not (args.data_root or root):
        raise InputError(f"{folder} does not say where its data are: give --data.root DIR")
    is_run = predictor.name == "torch"
    with progress_bar("evaluating", visible=rank() == 0) as bar:
        result = score(
            predictor,
            folder,
            args.data_root or root,
            args.protocol or "A",
            trivial=is_run,
            partial=is_run and read_run_config(folder).data.on_error == "skip",
            info=info,
            workers=args.workers,
            progress=bar,
        )
    if result:  # None in all but the first of several processes
        columns = ("trivial", "torch") if is_run else (predictor.name,)
        made = f" ({result['origin']})" if result["origin"] else ""
        caption = f"{result['images']} val images of {result['release']}{made}; protocol {result['protocol']}"
        print_scores(result["tasks"], columns, caption, args.all_metrics)
        say_changed(info.get("changed_files", []))


def print_comparison(comparison: dict[str, Any]) -> None:
    """Print evaluations side by side, a row for each task, with their intervals."""
    from rich.table import Table

    from m3vit.tasks import TASKS

    rows = comparison["rows"]
    caption = (
        f"{comparison['images']} val images; protocol {comparison['protocol']}\n95 % intervals over images "
        f"({comparison['resamples']} resamples); second lines: difference to {rows[0]['name']}, paired"
    )
    caption += "".join(f"\n{note}" for note in comparison["notes"])
    caption += f"\ndata: {comparison['origin']}" if comparison["origin"] else ""
    if comparison["baseline"]:
        baseline = comparison["baseline"]
        metrics = ", ".join(f"{task} {metric}" for task, metric in baseline["metrics"].items())
        caption += f"\ndelta_m over {baseline['name']} ({baseline['source']}), of {metrics}"
    table = Table("task", "metric", caption=caption)
    for row in rows:
        table.add_column(row["name"], justify="right")
    for task, first in rows[0]["tasks"].items():
        arrow = "↑" if TASKS[task].higher_is_better else "↓"
        cells = []
        for row in rows:
            cell = row["tasks"][task]
            low, high = cell["interval"]
            text = f"{cell['value']:.3f} [{low:.3f}, {high:.3f}]"
            if "difference" in cell:
                low, high = cell["difference_interval"]
                text += f"\n{cell['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            cells.append(text)
        table.add_row(task, f"{first['metric']} ({TASKS[task].unit}) {arrow}", *cells)
    if comparison["baseline"]:
        table.add_row("all", "delta_m (%) ↑", *(f"{row['delta_m']:+.2f}" for row in rows))
    console(max(console().width, 60 + 36 * len(rows))).print(table)
