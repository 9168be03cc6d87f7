"""m3vit predict, serve."""

import argparse
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from m3vit.commands.terminal import progress_bar, say
from m3vit.options import Folder, Value, add_options, options

Package = Annotated[Path, Value(metavar="DIR", positional=True)]


@dataclass(frozen=True)
class Predict:
    """Options of m3vit predict, beside its Options and Loading.

    Attributes:
        package: ONNX package (m3vit export onnx)
        inputs: images, videos, folders (searched recursively, by content; names below them are kept; what looks like a
            picture and is not read is named, with exit code 1), or - for a stream of frames on standard input, in any
            format that FFmpeg recognises without seeking: mjpeg, y4m, mpegts, matroska, ...
        task: task to predict, such as depth, or all
        out: folder for the pictures and videos
    """

    package: Package
    inputs: tuple[Annotated[Path, Value(metavar="INPUT", positional=True)], ...]
    task: str
    out: Folder


def add_predict(parser: argparse.ArgumentParser) -> None:
    from m3vit.export.runtime.options import Loading, Options

    threads = "(default: one a core, two at most for small models)"
    add_options(parser, Predict, Options, Loading, threads=threads)


def leave_sizes_to_us() -> None:
    """Silence pillow's warning of images of more than 89 megapixels: --max-pixels decides."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def run_predict(args: argparse.Namespace) -> int:
    from m3vit.export.runtime.options import Loading, Options
    from m3vit.export.runtime.predict import predict_files
    from m3vit.export.runtime.sources import summaries

    leave_sizes_to_us()
    wanted, loading = options(Predict, args), options(Loading, args)
    if loading.low_memory:
        from m3vit.heap import give_memory_back

        give_memory_back()
    # Not while the paths go into a pipe: the bar would take them along to the terminal.
    with progress_bar("predicting", sys.stderr.isatty() and sys.stdout.isatty()) as bar:
        outcome = predict_files(
            wanted.package,
            wanted.task,
            wanted.inputs,
            wanted.out,
            options(Options, args),
            loading=loading,
            say=say,
            progress=bar,
        )
    if outcome.failures:
        print(f"m3vit predict: {len(outcome.failures)} of the inputs failed:", file=sys.stderr)
        for name, reason in outcome.failures:
            print(f"  {name}: {reason}", file=sys.stderr)
    for name, pace in outcome.paces:
        print(f"m3vit predict: {name}: {pace}", file=sys.stderr)
    for line in summaries(outcome.found):
        print(f"m3vit predict: {line}", file=sys.stderr)
    if outcome.stopped:
        print(f"m3vit predict: stopped by {outcome.stopped.name}; what is listed is complete", file=sys.stderr)
        return 128 + outcome.stopped
    return 1 if outcome.failures or outcome.found.left_out else 0


@dataclass(frozen=True)
class Serve:
    """Options of m3vit serve, beside its Address, Limits and Loading.

    Attributes:
        package: ONNX package (m3vit export onnx)
        tasks: tasks to serve (default: all of the package)
    """

    package: Package
    tasks: tuple[Annotated[str, Value(metavar="TASK")], ...] = ()


def add_serve(parser: argparse.ArgumentParser) -> None:
    from m3vit.export.runtime.options import Address, Limits, Loading

    add_options(parser, Address, Serve, Limits, Loading, threads="of one prediction (default: cores / concurrency)")


def run_serve(args: argparse.Namespace) -> None:
    from m3vit.export.runtime.options import Address, Limits, Loading
    from m3vit.export.runtime.serve import serve
    from m3vit.pool import usable_cores

    leave_sizes_to_us()
    wanted, limits, loading = options(Serve, args), options(Limits, args), options(Loading, args)
    threads = loading.threads or max(1, usable_cores() // limits.concurrency)
    loading = replace(loading, threads=threads)
    serve(wanted.package, options(Address, args), tasks=wanted.tasks, loading=loading, limits=limits, say=say)
