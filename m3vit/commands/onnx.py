"""m3vit export onnx, predict."""

import argparse
from pathlib import Path
from typing import Any

from m3vit.commands.terminal import count, image_size, positive, progress_bar, say
from m3vit.errors import InputError


def add_export_onnx(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, help="package folder to write")
    parser.add_argument("--opset", type=int, default=20, choices=range(20, 24), help="ONNX opset (default: 20)")
    parser.add_argument(
        "--size", type=image_size, default=None, help="fix the image size to HEIGHTxWIDTH (default: any)"
    )
    parser.add_argument(
        "--static", action="store_true", help="no shape depends on the data: all experts run; needs --size"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        default=["fp32"],
        metavar="P",
        help="fp32, int8 (all linear layers but routers), int8-mixed, int8-experts; several may share a package, the "
        "first is its default (default: fp32)",
    )
    experts = parser.add_mutually_exclusive_group()
    experts.add_argument(
        "--prune", metavar="coverage=X", help="keep the fewest experts a task and layer that hold this share of its use"
    )
    experts.add_argument(
        "--keep", type=positive, metavar="N", help="keep the N most used experts of each task and layer"
    )
    parser.add_argument("--top-k", metavar="K", help="experts per token, for all tasks or by task: depth=1,semseg=2")
    parser.add_argument("--one-backbone", action="store_true", help="add one graph that serves all tasks, and heads")
    parser.add_argument(
        "--calibrate", type=positive, default=64, metavar="N", help="training images to measure use on (default: 64)"
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
        help="write no package, but the trade-off of size, time and metric over precisions, coverages and top-k",
    )
    parser.add_argument(
        "--check-images",
        type=positive,
        default=None,
        metavar="N",
        help="compare with torch on N images (validation, then training, then noise), each at three sizes with 1 and 2 "
        "threads, hunt for races, reach every expert: minutes to hours (default: a quick check of 2 images a size)",
    )
    parser.add_argument("--data.root", dest="data_root", help="data root (default: the run's)")


def run_export_onnx(args: argparse.Namespace) -> None:
    from m3vit.export.onnx.package import Content
    from m3vit.export.onnx.pruning import Prune, read_coverage, read_top_k
    from m3vit.export.onnx.run import Request, export_run
    from m3vit.training.checkpoint import load_run

    run = load_run(args.run)
    config = run.config.model
    prune = Prune(read_coverage(args.prune), args.keep) if args.prune or args.keep else None
    top_k = read_top_k(args.top_k, config.tasks, config.num_experts) if args.top_k else {}
    request = Request(prune, top_k, args.calibrate, args.measure, args.check_images, args.data_root)
    if args.sweep:
        from m3vit.export.onnx.sweep import sweep

        if prune or top_k or args.static or args.one_backbone or args.precision != ["fp32"]:
            raise InputError(
                "--sweep tries precisions, coverages and top-k itself: leave out --precision, --prune, --keep, "
                "--top-k, --static and --one-backbone"
            )
        with progress_bar("sweeping") as bar:
            result = sweep(run, args.out, request, opset=args.opset, size=args.size, progress=bar)
        print_sweep(result)
        say(f"{args.out / 'sweep.json'}, {args.out / 'sweep.png'}")
        return
    content = Content(
        opset=args.opset,
        size=args.size,
        static=args.static,
        precisions=tuple(args.precision),
        one_backbone=args.one_backbone,
    )
    bar = (lambda: progress_bar("comparing")) if args.check_images else None
    export_run(run, args.out, content, request, say=say, bar=bar)


def print_sweep(result: dict[str, Any]) -> None:
    """Print the trade-off, a table for each task, the choices no other one beats in bold."""
    from rich.console import Console
    from rich.table import Table

    from m3vit.tasks import TASKS

    caption = (
        f"{result['images']} val images, protocol {result['protocol']}; time relative to fp32 as trained, "
        f"{result['threads']} thread, batch 1, {result['size'][0]}x{result['size'][1]}; bold: not beaten"
    )
    console = Console(width=max(Console().width, 100))
    for task, points in result["tasks"].items():
        row = TASKS[task]
        arrow = "↑" if row.higher_is_better else "↓"
        names = ("precision", "coverage", "experts kept", "top-k", "MB", "time", f"{row.metric} ({row.unit}) {arrow}")
        table = Table(*names, title=task, caption=caption)
        for point in points:
            coverage = "all" if point["coverage"] is None else f"{point['coverage']:g}"
            cells = (point["precision"], coverage, f"{point['experts']:.1f}", str(point["top_k"]))
            figures = (f"{point['bytes'] / 1e6:.2f}", f"{point['time']:.2f}", f"{point['metric']:.3f}")
            table.add_row(*cells, *figures, style="bold" if point["pareto"] else "dim")
        console.print(table)


def add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", type=Path, metavar="DIR", help="ONNX package (m3vit export onnx)")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--task", required=True, help="task to predict")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--raw", action="store_true", help="write the values as .npy too")
    parser.add_argument(
        "--resize",
        action="store_true",
        help="run at the size of a fixed-size package, or the size trained at: for large images",
    )
    parser.add_argument("--threads", type=positive, default=1, help="onnxruntime threads (default: 1)")


def run_predict(args: argparse.Namespace) -> None:
    from m3vit.export.predict import predict_files

    for path in predict_files(
        args.package, args.task, args.images, args.out, raw=args.raw, resize=args.resize, threads=args.threads
    ):
        say(str(path))
