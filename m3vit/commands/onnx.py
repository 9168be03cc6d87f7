"""m3vit export onnx, predict."""

import argparse
from pathlib import Path

from m3vit.commands.terminal import image_size, positive, progress_bar, say


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
    parser.add_argument(
        "--check-images",
        type=positive,
        default=None,
        metavar="N",
        help="compare with torch on N images (validation, then training, then noise), each at three sizes with 1 and 2 "
        "threads, hunt for races, reach every expert: minutes to hours (default: a quick check of 2 images a size)",
    )


def run_export_onnx(args: argparse.Namespace) -> None:
    from m3vit.export.onnx.run import export_run
    from m3vit.training.checkpoint import load_run

    run = load_run(args.run)
    export_run(
        run,
        args.out,
        opset=args.opset,
        size=args.size,
        data_root=args.data_root,
        check_images=args.check_images,
        say=say,
        bar=(lambda: progress_bar("comparing")) if args.check_images else None,
    )


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
