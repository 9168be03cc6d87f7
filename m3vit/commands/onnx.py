"""m3vit export onnx."""

import argparse
from pathlib import Path

from m3vit.commands.terminal import image_size, say


def add_export_onnx(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, help="package folder to write")
    parser.add_argument("--opset", type=int, default=20, choices=range(20, 24), help="ONNX opset (default: 20)")
    parser.add_argument(
        "--size", type=image_size, default=None, help="fix the image size to HEIGHTxWIDTH (default: any)"
    )
    parser.add_argument(
        "--data.root", dest="data_root", help="data root of the parity check's images (default: the run's)"
    )


def run_export_onnx(args: argparse.Namespace) -> None:
    from m3vit.export.onnx.run import export_run
    from m3vit.training.checkpoint import load_run

    run = load_run(args.run)
    export_run(run, args.out, opset=args.opset, size=args.size, data_root=args.data_root, say=say)
