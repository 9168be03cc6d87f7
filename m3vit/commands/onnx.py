"""m3vit export onnx."""

import argparse
from pathlib import Path
from typing import Any

from m3vit.commands.terminal import console, count, image_size, positive, progress_bar, say
from m3vit.errors import InputError


def add_export_onnx(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=Path, required=True, help="package folder to write, new, empty or an earlier package"
    )
    parser.add_argument("--tasks", nargs="+", default=[], metavar="T", help="tasks to export (default: all)")
    parser.add_argument("--opset", type=int, default=20, choices=range(20, 24), help="ONNX opset (default: 20)")
    parser.add_argument(
        "--size",
        type=image_size,
        default=None,
        metavar="HEIGHTxWIDTH",
        help="the only image size of the graphs, in pixels (default: any)",
    )
    parser.add_argument(
        "--static", action="store_true", help="no shape depends on the data: all experts run; needs --size"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        default=[],
        metavar="P",
        help="fp32, int8 (all linear layers but routers), int8-mixed, int8-experts; several may share a package, the "
        "first is its default (default: fp32)",
    )
    experts = parser.add_mutually_exclusive_group()
    experts.add_argument(
        "--prune",
        metavar="coverage=X",
        help="keep, of each task and layer, the fewest experts that hold this share of its use, such as 0.99 "
        "(default: all experts)",
    )
    experts.add_argument(
        "--keep",
        type=positive,
        metavar="N",
        help="keep the N most used experts of each task and layer (default: all)",
    )
    parser.add_argument(
        "--top-k",
        metavar="K",
        help="experts per token, for all tasks or by task: depth=1,semseg=2 (default: as trained)",
    )
    parser.add_argument(
        "--one-backbone", action="store_true", help="add one graph of the backbone for all tasks, and one of each head"
    )
    parser.add_argument(
        "--calibrate",
        type=positive,
        default=None,
        metavar="N",
        help="training images that --prune, --keep and --sweep measure use on (default: 64)",
    )
    parser.add_argument(
        "--measure",
        type=count,
        default=None,
        metavar="N",
        help="validation images to score the package on (default: 100 if experts, top-k or precision changed, else 0)",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="write no package, but sweep.json and sweep.png: size, time and metric over precisions, coverages and "
        "top-k",
    )
    parser.add_argument(
        "--check-images",
        type=positive,
        default=None,
        metavar="N",
        help="compare with torch on N images (validation, then training, then noise), each at three sizes with 1 and 2 "
        "threads, hunt for races, reach every expert: minutes to hours (default: a quick check of 2 images a size)",
    )
    parser.add_argument(
        "--data.root",
        dest="data_root",
        metavar="DIR",
        help="data set's folder (default: the one the run was trained on)",
    )


def run_export_onnx(args: argparse.Namespace) -> None:
    from m3vit.export.onnx.from_run import CALIBRATION_IMAGES, Request, export_run
    from m3vit.export.onnx.package import Content
    from m3vit.export.onnx.pruning import read_coverage
    from m3vit.export.onnx.quantize import FLOAT
    from m3vit.models.budget import read_top_k
    from m3vit.run_folder import load_run

    run = load_run(args.run)
    config = run.config.model
    coverage = read_coverage(args.prune) if args.prune else None
    prunes = bool(coverage or args.keep)
    top_k = read_top_k(args.top_k, config.tasks, config.num_experts) if args.top_k else {}
    if args.calibrate and not (prunes or args.sweep):
        raise InputError("--calibrate is of --prune, --keep and --sweep: give one of them, or leave it out")
    request = Request(
        coverage=coverage,
        keep=args.keep,
        top_k=top_k,
        calibration=args.calibrate or CALIBRATION_IMAGES,
        measure=args.measure,
        check_images=args.check_images,
        data_root=args.data_root,
    )
    if args.sweep:
        from m3vit.export.onnx.sweep import sweep

        given = (args.tasks, prunes, top_k, args.static, args.one_backbone, args.precision, args.check_images)
        if any(given):
            raise InputError(
                "--sweep tries precisions, coverages and top-k itself, on all tasks: leave out --tasks, --precision, "
                "--prune, --keep, --top-k, --static, --one-backbone and --check-images"
            )
        with progress_bar("sweeping") as progress:
            result = sweep(run, args.out, request, opset=args.opset, size=args.size, progress=progress)
        print_sweep(result)
        say(f"{args.out / 'sweep.json'}, {args.out / 'sweep.png'}")
        return
    content = Content(
        tasks=tuple(args.tasks),
        opset=args.opset,
        size=args.size,
        static=args.static,
        precisions=tuple(args.precision) or (FLOAT,),
        one_backbone=args.one_backbone,
    )
    bar = (lambda: progress_bar("comparing")) if args.check_images else None
    export_run(run, args.out, content, request, say=say, bar=bar)


def print_sweep(result: dict[str, Any]) -> None:
    """Print, for each task, the graph as trained and the ways that no other one beats."""
    from rich.table import Table

    from m3vit.tasks import TASKS

    screen = console(max(console().width, 100))
    for task, points in result["tasks"].items():
        row = TASKS[task]
        arrow = "↑" if row.higher_is_better else "↓"
        names = ("precision", "coverage", "experts kept", "top-k", "MB", "time", f"{row.metric} ({row.unit}) {arrow}")
        shown = [point for place, point in enumerate(points) if point["pareto"] or place == 0]
        table = Table(*names, title=task, caption=f"{len(points)} ways tried; beside the first, those that none beats")
        for point in [shown[0], *sorted(shown[1:], key=lambda point: -point["bytes"])]:
            coverage = "all" if point["coverage"] is None else f"{point['coverage']:g}"
            cells = (point["precision"], coverage, f"{point['experts']:.1f}", str(point["top_k"]))
            table.add_row(*cells, f"{point['bytes'] / 1e6:.2f}", f"{point['time']:.2f}", f"{point['metric']:.3f}")
        screen.print(table)
    say(
        f"{result['images']} val images, protocol {result['protocol']}; processor time relative to fp32 as trained, "
        f"one thread, batch 1, {result['size'][0]}x{result['size'][1]}"
    )
