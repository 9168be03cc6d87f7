"""m3vit predict, serve."""

import argparse
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

from m3vit.commands.terminal import positive, progress_bar, say

_PREDICT_INPUTS = """images, videos, folders (searched recursively, by content; names below them are kept; what looks
like a picture and is not read is named, with exit code 1), or - for a stream of frames on standard input, in any format
that FFmpeg recognises without seeking: mjpeg, y4m, mpegts, matroska, ..."""


def depth_range(text: str) -> tuple[float, float]:
    """Parse "0.5:10" as metres (near, far)."""
    parts = text.split(":")
    try:
        near, far = (float(part) for part in parts)
    except ValueError:
        near, far = 0, 0
    if not 0 <= near < far < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give NEAR:FAR in metres, such as 0.5:10")
    return near, far


def frame_rate(text: str) -> Fraction:
    """Parse frames per second, such as 25, 29.97 or 30000/1001."""
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: give frames per second, up to 1000, such as 30 or 30000/1001")
    return rate


def add_predict(parser: argparse.ArgumentParser) -> None:
    from m3vit.images import MAX_PIXELS

    parser.add_argument("package", type=Path, metavar="DIR", help="ONNX package (m3vit export onnx)")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help=_PREDICT_INPUTS)
    parser.add_argument("--task", required=True, help="task to predict, such as depth, or all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures and videos")
    parser.add_argument(
        "--overlay", action="store_true", help="lay the prediction over the input, with a legend (default: it alone)"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="write the values as .npy too (class ids, metres, unit vectors, probabilities)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite predictions of the same names")
    parser.add_argument(
        "--resize",
        action="store_true",
        help="run at the size of a fixed-size package, or the size trained at: for large images",
    )
    parser.add_argument(
        "--depth-range",
        type=depth_range,
        metavar="NEAR:FAR",
        help="metres that the colours of depth span (default: the image's own; of a video, following its frames)",
    )
    parser.add_argument(
        "--fps",
        type=frame_rate,
        metavar="RATE",
        help="frames per second to assume instead of a video's own times, such as 30 or 30000/1001 (default: its "
        "times, or 25 where it has none)",
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        metavar="N",
        help=f"images and frames of more pixels are refused unread (default: {MAX_PIXELS})",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=None,
        metavar="N",
        help="onnxruntime threads (default: one a core, two at most for small models)",
    )
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add what decides how a package is loaded."""
    parser.add_argument(
        "--precision", metavar="P", help="one that the package holds, such as int8 (default: its first)"
    )
    parser.add_argument(
        "--one-backbone", action="store_true", help="one graph for all tasks, if the package was exported with it"
    )
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="read weights from the mapped file, shared by tasks and processes: less memory, slower",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep weights laid out for this processor in DIR, to load sooner the next time; not with --low-memory "
        "(default: none)",
    )


def loading(args: argparse.Namespace, threads: int | None) -> dict[str, Any]:
    """Return these arguments as Package.load takes them."""
    names = ("precision", "one_backbone", "low_memory", "cache")
    return {"threads": threads, **{name: getattr(args, name) for name in names}}


def leave_sizes_to_us() -> None:
    """Silence pillow's warning of images of more than 89 megapixels: --max-pixels decides."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def run_predict(args: argparse.Namespace) -> int:
    from m3vit.export.runtime.predict import Options, predict_files
    from m3vit.export.runtime.sources import summaries

    leave_sizes_to_us()
    if args.low_memory:
        from m3vit.export.runtime.package import give_memory_back

        give_memory_back()
    options = Options(
        raw=args.raw,
        overlay=args.overlay,
        resize=args.resize,
        force=args.force,
        depth_range=args.depth_range,
        fps=args.fps,
        max_pixels=args.max_pixels,
    )
    # Not while the paths go into a pipe: the bar would take them along to the terminal.
    with progress_bar("predicting", sys.stderr.isatty() and sys.stdout.isatty()) as bar:
        outcome = predict_files(
            args.package,
            args.task,
            args.inputs,
            args.out,
            options,
            loading=loading(args, args.threads),
            say=say,
            progress=bar,
        )
    if outcome.failures:
        print(f"m3vit predict: {len(outcome.failures)} of the inputs failed:", file=sys.stderr)
        for name, reason in outcome.failures:
            print(f"  {name}: {reason}", file=sys.stderr)
    for line in summaries(outcome.found):
        print(f"m3vit predict: {line}", file=sys.stderr)
    if outcome.stopped:
        print(f"m3vit predict: stopped by {outcome.stopped.name}; what is listed is complete", file=sys.stderr)
        return 128 + outcome.stopped
    return 1 if outcome.failures or outcome.found.left_out else 0


def port_number(text: str) -> int:
    """Parse a TCP port; 0 takes a free one."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give a port from 1 to 65535, or 0 for a free one")
    return int(text)


def host_pattern(text: str) -> str:
    """Parse a host's name as `Hosts` takes it."""
    from m3vit.export.runtime.hosts import is_host_pattern

    if not is_host_pattern(text.lower()):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a host's name without scheme or port, such as vision.example.org, *.example.org for all "
            "below one, or * for any"
        )
    return text


def add_serve(parser: argparse.ArgumentParser) -> None:
    from m3vit.images import WEB_BYTES, WEB_PIXELS

    parser.add_argument("package", type=Path, metavar="DIR", help="ONNX package (m3vit export onnx)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine alone; there is no password or encryption: "
        "leave those to a proxy before it)",
    )
    parser.add_argument(
        "--port", type=port_number, default=8000, metavar="N", help="TCP port; 0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--allowed-hosts",
        type=host_pattern,
        nargs="+",
        default=[],
        metavar="NAME",
        help="names that this service has besides localhost, this machine's and --host, such as its proxy's; *.NAME "
        "for all below one, * for any; requests for others are refused, against DNS rebinding (default: none)",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to serve (default: all of the package)")
    parser.add_argument(
        "--concurrency",
        type=positive,
        default=2,
        metavar="N",
        help="predictions at a time, each with --threads (default: 2)",
    )
    parser.add_argument(
        "--queue",
        type=positive,
        default=16,
        metavar="N",
        help="requests that may wait; more are refused with 503 (default: 16)",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=None,
        metavar="N",
        help="onnxruntime threads of one prediction (default: cores / concurrency)",
    )
    parser.add_argument(
        "--max-bytes",
        type=positive,
        default=WEB_BYTES,
        metavar="N",
        help=f"larger images are refused, in bytes as sent (default: {WEB_BYTES})",
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=WEB_PIXELS,
        metavar="N",
        help=f"images of more pixels are refused (default: {WEB_PIXELS})",
    )
    add_loading(parser)


def run_serve(args: argparse.Namespace) -> None:
    from m3vit.export.runtime.serve import Limits, serve
    from m3vit.pool import usable_cores

    leave_sizes_to_us()
    serve(
        args.package,
        host=args.host,
        port=args.port,
        tasks=args.tasks,
        loading=loading(args, args.threads or max(1, usable_cores() // args.concurrency)),
        limits=Limits(args.max_bytes, args.max_pixels, args.concurrency, args.queue),
        allowed_hosts=args.allowed_hosts,
        say=say,
    )
