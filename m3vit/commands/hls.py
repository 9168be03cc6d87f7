"""m3vit export hls, hw csim."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from m3vit.commands.terminal import print_scores, progress_bar, say, say_changed
from m3vit.options import Positive, RunFolder, Value, add_options, options


@dataclass(frozen=True)
class ExportHls:
    """Options of m3vit export hls, beside its Request.

    Attributes:
        run: run folder
        out: project folder to write, new, empty or an earlier project
        top_k: experts per token, of all tasks (default: as trained)
    """

    run: RunFolder
    out: Path
    top_k: Annotated[str, Value(metavar="K")] | None = None


def add_export_hls(parser: argparse.ArgumentParser) -> None:
    from m3vit.export.hls.options import Request

    add_options(parser, ExportHls, Request)


def run_export_hls(args: argparse.Namespace) -> None:
    from m3vit.export.hls.from_run import export_run
    from m3vit.export.hls.options import Request
    from m3vit.models.budget import read_top_k
    from m3vit.run_folder import load_run

    wanted = options(ExportHls, args)
    run = load_run(wanted.run)
    config = run.config.model
    top_k = read_top_k(wanted.top_k, config.tasks, config.num_experts) if wanted.top_k else None
    info = export_run(run, wanted.out, options(Request, args), top_k=top_k)
    say(f"hls4ml {info['hls4ml']} project with tasks {', '.join(config.tasks)}: {wanted.out}")


@dataclass(frozen=True)
class Csim:
    """Options of m3vit hw csim.

    Attributes:
        project: HLS project (m3vit export hls)
        samples: images to simulate (default: all that are stored)
    """

    project: Annotated[Path, Value(metavar="DIR", positional=True)]
    samples: Positive | None = None


def run_csim(wanted: Csim) -> None:
    from m3vit.export.hls.schedules import schedule_of
    from m3vit.export.hls.verify import verify_project
    from m3vit.hw.manifest import read_manifest

    with progress_bar("C-simulating") as bar:
        report = verify_project(wanted.project, wanted.samples, bar)
    caption = f"{report['images']} images, C-simulation with g++; protocol {report['protocol']}"
    print_scores(report["tasks"], ("torch", "csim"), caption)
    for task, result in report["tasks"].items():
        say(
            f"{task}: worst error {result['worst_error']:.4g}, mean error {result['mean_error']:.4g}, "
            f"{result['flips']} top-k flips in {result['decisions']} routing decisions"
        )
    for line in schedule_of(read_manifest(wanted.project)).said(report):
        say(line)
    say_changed(report["changed_files"])
