"""m3vit report, demo."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from m3vit.collector import resting
from m3vit.commands.terminal import print_scores, progress_bar, say
from m3vit.errors import InputError
from m3vit.options import DataRoot, File, Folder, Number, Positive, RunFolder, Value, words


@dataclass(frozen=True)
class Report:
    """Options of m3vit report.

    Attributes:
        runs: run folder, evaluated with m3vit eval; several are compared on one page
        onnx: ONNX package (default: onnx/ beside RUN)
        hls: HLS project that m3vit hw csim or m3vit eval was run on (default: hls/ beside RUN)
        out: page to write; its figures go beside it, as .json (default: RUN/report.html; of several, required)
        data_root: data set's folder (default: the one evaluated on)
        images: validation images to show
        budget: files of m3vit search, with commas between them: the model is scored and shown under each, beside the
            whole (default: none)
        protocol: of the figures (default: the last that the run was evaluated under)
    """

    runs: tuple[RunFolder, ...]
    onnx: Folder | None = None
    hls: Folder | None = None
    out: File | None = None
    data_root: DataRoot | None = None
    images: Positive = 4
    budget: Annotated[tuple[str, ...], Value(words, "FILE,...")] = ()
    protocol: Literal["A", "B"] | None = None


def run_report(wanted: Report) -> None:
    with resting():
        from m3vit.report.page import columns_of, write_report
        from m3vit.run_folder import load_run

    if len(wanted.runs) > 1:
        return compare_runs(wanted)
    (folder,) = wanted.runs
    run = load_run(folder)
    for option, given in (("--onnx", wanted.onnx), ("--hls", wanted.hls)):
        if given is not None and not given.exists():
            warnings.warn(f"{option} {given} not found: the report has no column of it", stacklevel=1)
    onnx, hls = wanted.onnx or folder.parent / "onnx", wanted.hls or folder.parent / "hls"
    out = wanted.out or folder / "report.html"
    with progress_bar("drawing report") as bar:
        report = write_report(run, onnx, hls, out, wanted.images, wanted.data_root, wanted.protocol, bar, wanted.budget)
    print_scores(
        report["tasks"],
        columns_of(report),
        f"{report['images']} val images; protocol {report['protocol']}",
    )
    say(str(out))


def compare_runs(wanted: Report) -> None:
    """Draw the page about several runs."""
    from m3vit.commands.evaluation import print_comparison
    from m3vit.report.several import write_comparison

    if wanted.onnx or wanted.hls or wanted.budget:
        raise InputError("--onnx, --hls and --budget are of one run's report: leave them out, or give one run")
    if wanted.out is None:
        raise InputError("the page about several runs is in none of their folders: give --out FILE.html")
    with progress_bar("drawing report") as bar:
        found = write_comparison(wanted.runs, wanted.out, wanted.images, wanted.data_root, wanted.protocol, bar)
    print_comparison(found)
    say(str(wanted.out))


@dataclass(frozen=True)
class Demo:
    """Options of m3vit demo.

    Attributes:
        out: folder to write
        seed: decides scenes and training
    """

    out: Folder = Path("runs/demo")
    seed: Number = 0


def run_demo(wanted: Demo, run: Callable[[Sequence[str]], int]) -> None:
    """`run` runs a command, as m3vit.cli does."""
    from m3vit.demo import demo

    demo(**vars(wanted), run=run)
