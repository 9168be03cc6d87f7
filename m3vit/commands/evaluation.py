"""m3vit eval."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from m3vit.collector import resting
from m3vit.commands.terminal import console, print_scores, progress_bar, say, say_changed
from m3vit.errors import InputError
from m3vit.options import DataRoot, File, Folder, Positive, Value, add_options, options


@dataclass(frozen=True)
class Eval:
    """Options of m3vit eval.

    Attributes:
        folders: run folder, ONNX package or HLS project
        protocol: A: resized to the label's size (Vandenhende, M3ViT); B: padded (ATRC, InvPT) (default: A; with
            --compare the one that all folders were evaluated under)
        data_root: data set's folder (default: the one a run was trained on; exports do not know it)
        device: of a run alone: cpu, cuda, ... or auto: cuda if there is one (default: auto)
        precision: of an ONNX package: one it holds, such as int8 (default: its first)
        batch: of a run alone: images it takes at once (default: 1)
        workers: processes that match edges (default: one a core)
        predictions: write the predictions too, into a new folder: the files that the published code of protocol A
            stores and scores, semseg/ID.png, depth/ID.mat, edge/ID.png, ... (default: none is written)
        budget: of a run: a file of m3vit search; of a package or a project with several: the name of one of them. The
            result goes into DIR/budgets/NAME (default: a run as trained, an export's first)
        all_metrics: print every metric, not only the main one of each task
        compare: show two or more folders that were evaluated in one table; evaluates nothing
        baseline: with --compare: the single-task figures that delta_m is over: an evaluated folder, or a published set
            ({baselines}) (default: no delta_m)
        out: with --compare: write the table too: FILE.json, .csv, .md or .tex, LaTeX with booktabs (default: it is
            printed alone)
    """

    folders: tuple[Annotated[Path, Value(metavar="DIR", positional=True)], ...]
    protocol: Literal["A", "B"] | None = None
    data_root: DataRoot | None = None
    device: str | None = None
    precision: str | None = None
    batch: Positive | None = None
    workers: Positive | None = None
    predictions: Folder | None = None
    budget: Annotated[str, Value(metavar="FILE")] | None = None
    all_metrics: bool = False
    compare: bool = False
    baseline: Annotated[str, Value(metavar="NAME")] | None = None
    out: File | None = None


def add_eval(parser: argparse.ArgumentParser) -> None:
    from m3vit.evaluation.gain import BASELINES

    add_options(parser, Eval, baselines=", ".join(BASELINES))


def run_eval(args: argparse.Namespace) -> None:
    wanted = options(Eval, args)
    if wanted.compare:
        others = (wanted.data_root, wanted.workers, wanted.all_metrics, wanted.precision, wanted.device, wanted.batch)
        if any((*others, wanted.predictions, wanted.budget)):
            raise InputError(
                "--compare shows what was evaluated: leave out --data.root, --workers, --all-metrics, --precision, "
                "--device, --batch, --predictions and --budget"
            )
        from m3vit.evaluation.compare import compare
        from m3vit.evaluation.tables import form_of, write_comparison

        if wanted.out:
            form_of(wanted.out)  # refuses other endings before the work
        comparison = compare(list(wanted.folders), wanted.protocol, wanted.baseline)
        print_comparison(comparison)
        if wanted.out:
            write_comparison(comparison, wanted.out)
            say(str(wanted.out))
        return
    if len(wanted.folders) > 1 or wanted.baseline or wanted.out:
        raise InputError("give one folder to evaluate; --compare shows several that were evaluated, delta_m and --out")
    (folder,) = wanted.folders
    with resting():
        from m3vit.api import evaluate
        from m3vit.collectives import rank
        from m3vit.evaluation.artefacts import is_export
        from m3vit.evaluation.meters import TRAINED
        from m3vit.evaluation.scoring import without_untrained

    if is_export(folder) and (wanted.device or wanted.batch):
        raise InputError(
            f"--device and --batch are of a run, and {folder} is an export, which runs on the CPU, an image at a time: "
            "leave them out"
        )
    with progress_bar("evaluating", visible=rank() == 0) as bar:
        result = evaluate(
            folder,
            wanted.protocol or "A",
            data_root=wanted.data_root,
            device=wanted.device or "auto",
            batch=wanted.batch or 1,
            precision=wanted.precision,
            workers=wanted.workers,
            progress=bar,
            predictions=wanted.predictions,
            budget=wanted.budget,
        )
    if result:  # nothing in all but the first of several processes
        columns = ("trivial", "torch") if result["predictor"] == "torch" else (result["predictor"],)
        made = f" ({result['origin']})" if result["origin"] else ""
        caption = f"{result['images']} val images of {result['release']}{made}; protocol {result['protocol']}"
        if labelled := result.get("labelled"):
            caption += "\nimages with a label: " + ", ".join(f"{task} {count}" for task, count in labelled.items())
        beside = without_untrained(result["untrained"])  # but for tasks whose own meter has no such figure
        beside = {
            task: words
            for task, words in beside.items()
            if task in result["tasks"] and TRAINED in result["tasks"][task][columns[-1]]
        }
        caption += "".join(f"\n{words}" for words in beside.values())
        print_scores(result["tasks"], columns, caption, wanted.all_metrics, dict.fromkeys(beside, TRAINED))
        say_changed(result.get("changed_files", []), result.get("changes"))


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
