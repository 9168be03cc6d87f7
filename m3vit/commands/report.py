"""m3vit report, demo."""

import argparse
from pathlib import Path

from m3vit.commands.terminal import positive, print_scores, progress_bar, say


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, evaluated with m3vit eval")
    parser.add_argument("--onnx", type=Path, default=None, help="ONNX package (default: onnx/ beside RUN)")
    parser.add_argument(
        "--hls",
        type=Path,
        default=None,
        help="HLS project that m3vit hw csim or m3vit eval was run on (default: hls/ beside RUN)",
    )
    parser.add_argument("--out", type=Path, default=None, help="page to write (default: RUN/report.html)")
    parser.add_argument("--data.root", dest="data_root", help="data root, if not the one evaluated on")
    parser.add_argument("--images", type=positive, default=4, help="validation images to show (default: 4)")
    parser.add_argument("--protocol", choices=["A", "B"], default=None, help="of the figures (default: last evaluated)")


def run_report(args: argparse.Namespace) -> None:
    from m3vit.report.page import columns_of, write_report
    from m3vit.training.checkpoint import load_run

    run = load_run(args.run)
    onnx, hls = args.onnx or args.run.parent / "onnx", args.hls or args.run.parent / "hls"
    out = args.out or args.run / "report.html"
    with progress_bar("drawing report") as bar:
        report = write_report(run, onnx, hls, out, args.images, args.data_root, args.protocol, bar)
    print_scores(
        report["tasks"],
        columns_of(report),
        f"{report['images']} val images; protocol {report['protocol']}",
    )
    say(str(out))


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and training (default: 0)")


def run_demo(args: argparse.Namespace) -> None:
    from m3vit.demo import demo

    demo(args.out, args.seed)
