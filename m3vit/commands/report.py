"""m3vit report, demo."""

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from m3vit.commands.terminal import positive, print_scores, progress_bar, say


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, evaluated with m3vit eval")
    parser.add_argument(
        "--onnx", type=Path, default=None, metavar="DIR", help="ONNX package (default: onnx/ beside RUN)"
    )
    parser.add_argument(
        "--hls",
        type=Path,
        default=None,
        metavar="DIR",
        help="HLS project that m3vit hw csim or m3vit eval was run on (default: hls/ beside RUN)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="FILE",
        help="page to write; its figures go beside it, as .json (default: RUN/report.html)",
    )
    parser.add_argument(
        "--data.root", dest="data_root", metavar="DIR", help="data set's folder (default: the one evaluated on)"
    )
    parser.add_argument(
        "--images", type=positive, default=4, metavar="N", help="validation images to show (default: 4)"
    )
    parser.add_argument(
        "--protocol",
        choices=["A", "B"],
        default=None,
        help="of the figures (default: the last that the run was evaluated under)",
    )


def run_report(args: argparse.Namespace) -> None:
    from m3vit.report.page import columns_of, write_report
    from m3vit.run_folder import load_run

    run = load_run(args.run)
    for option, given in (("--onnx", args.onnx), ("--hls", args.hls)):
        if given is not None and not given.exists():
            warnings.warn(f"{option} {given} not found: the report has no column of it", stacklevel=1)
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
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder to write (default: runs/demo)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides scenes and training (default: 0)")


def run_demo(args: argparse.Namespace, run: Callable[[Sequence[str]], int]) -> None:
    """`run` runs a command, as m3vit.cli does."""
    from m3vit.demo import demo

    demo(args.out, args.seed, run)
