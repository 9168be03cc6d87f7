"""m3vit export onnx."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from m3vit.collector import resting
from m3vit.commands.terminal import console, progress_bar, say
from m3vit.errors import InputError
from m3vit.options import RunFolder, Value, add_options, options, words


@dataclass(frozen=True)
class ExportOnnx:
    """Options of m3vit export onnx, beside its Request and the package's Content.

    Attributes:
        run: run folder
        out: package folder to write, new, empty or an earlier package
        sweep: write no package, but sweep.json and sweep.png: size, time and metric over precisions, coverages and
            top-k
        top_k: experts per token, for all tasks or by task: depth=1,semseg=2 (default: as trained)
        prune: keep, of each task and layer, the fewest experts that hold this share of its use, such as 0.99 (default:
            all experts)
        budget_files: experts per token of each task and block, and hidden units, from a file of m3vit search; of
            several, with commas between them, all go into the package around one file of weights, called as their
            files, the first its default; full is the model as trained (default: as trained)
    """

    run: RunFolder
    out: Path
    sweep: bool = False
    top_k: Annotated[str, Value(metavar="K")] | None = None
    prune: Annotated[str, Value(metavar="coverage=X")] | None = None
    budget_files: Annotated[tuple[str, ...], Value(words, "FILE,...", flag="budget")] = ()


def add_export_onnx(parser: argparse.ArgumentParser) -> None:
    from m3vit.export.onnx.options import Content, Request

    add_options(parser, ExportOnnx, Request, Content, exclusive=("prune", "keep", "budget_files"))


def run_export_onnx(args: argparse.Namespace) -> None:
    with resting():
        from m3vit.export.onnx.from_run import export_run
        from m3vit.export.onnx.options import Content, Request
        from m3vit.export.onnx.pruning import read_coverage
        from m3vit.models.budget import read_top_k
        from m3vit.run_folder import load_run

    wanted = options(ExportOnnx, args)
    run = load_run(wanted.run)
    config = run.config.model
    coverage = read_coverage(wanted.prune) if wanted.prune else None
    top_k = read_top_k(wanted.top_k, config.tasks, config.num_experts) if wanted.top_k else {}
    given = set(vars(args))
    if "calibration" in given and not {"prune", "keep", "sweep"} & given:
        raise InputError("--calibrate is of --prune, --keep and --sweep: give one of them, or leave it out")
    request = options(Request, args, coverage=coverage, top_k=top_k)
    content = options(Content, args)
    if wanted.budget_files:
        from m3vit.models.budget_file import read_budgets

        if top_k:
            raise InputError("--budget says how many experts a token goes to: leave out --top-k, or --budget")
        budgets = read_budgets(wanted.budget_files)
        (first, *others) = budgets.values()
        content = replace(content, budgets=budgets) if others else replace(content, budget=first)
    if wanted.sweep:
        from m3vit.export.onnx.sweep import sweep

        if given - {"run", "out", "sweep", "opset", "size", "calibration", "measure", "data_root"}:
            raise InputError(
                "--sweep tries precisions, coverages and top-k itself, on all tasks: leave out --tasks, --precision, "
                "--prune, --keep, --top-k, --static, --one-backbone, --budget and --check-images"
            )
        with progress_bar("sweeping") as progress:
            result = sweep(run, wanted.out, request, opset=content.opset, size=content.size, progress=progress)
        print_sweep(result)
        say(f"{wanted.out / 'sweep.json'}, {wanted.out / 'sweep.png'}")
        return
    bar = (lambda: progress_bar("comparing")) if request.check_images else None
    export_run(run, wanted.out, content, request, say=say, bar=bar)


def print_sweep(result: dict[str, Any]) -> None:
    """Print, for each task, the graph as trained and the ways that no other one beats."""
    from rich.table import Table

    from m3vit.tasks import TASKS

    screen = console(max(console().width, 100))
    for task, points in result["tasks"].items():
        row = TASKS[task]
        arrow = "↑" if row.higher_is_better else "↓"
        own = ("decoder's",) if "decoder_experts" in points[0] else ()
        names = (
            "precision",
            "coverage",
            "experts kept",
            *own,
            "top-k",
            "MB",
            "time",
            f"{row.metric} ({row.unit}) {arrow}",
        )
        shown = [point for place, point in enumerate(points) if point["pareto"] or place == 0]
        table = Table(*names, title=task, caption=f"{len(points)} ways tried; beside the first, those that none beats")
        for point in [shown[0], *sorted(shown[1:], key=lambda point: -point["bytes"])]:
            coverage = "all" if point["coverage"] is None else f"{point['coverage']:g}"
            kept = [f"{point[key]:.1f}" for key in ("experts", "decoder_experts") if key in point]
            cells = (point["precision"], coverage, *kept, str(point["top_k"]))
            table.add_row(*cells, f"{point['bytes'] / 1e6:.2f}", f"{point['time']:.2f}", f"{point['metric']:.3f}")
        screen.print(table)
    say(
        f"{result['images']} val images, protocol {result['protocol']}; processor time relative to fp32 as trained, "
        f"one thread, batch 1, {result['size'][0]}x{result['size'][1]}"
    )
