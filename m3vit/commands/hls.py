"""m3vit export hls, hw csim."""

import argparse
from pathlib import Path

from m3vit.commands.terminal import positive, print_scores, progress_bar, say, say_changed


def add_export_hls(parser: argparse.ArgumentParser) -> None:
    from m3vit.export.hls.schedules import SCHEDULES

    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", type=Path, required=True, help="project folder to write, new, empty or an earlier project"
    )
    parser.add_argument(
        "--data.root",
        dest="data_root",
        metavar="DIR",
        help="data set's folder (default: the one the run was trained on)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=None,
        metavar="N",
        help="validation images to store for m3vit hw csim (default: 100, or all if there are fewer)",
    )
    parser.add_argument(
        "--schedule",
        choices=list(SCHEDULES),
        default="spatial",
        help="spatial: a kernel for each layer, for models that fit on chip; multiplexed: one engine of each "
        "kind and weights in DDR, for models of any depth and any number of experts (default: spatial)",
    )
    parser.add_argument(
        "--board",
        default=None,
        metavar="NAME",
        help="of the multiplexed schedule alone: zcu104, zcu102 or kv260 (default: zcu104)",
    )
    parser.add_argument(
        "--weight-bits",
        type=positive,
        default=16,
        metavar="BITS",
        help="width of weights: spatial 6 to 24, multiplexed 8, 12 or 16 (default: 16)",
    )
    parser.add_argument(
        "--act-bits",
        type=positive,
        default=None,
        metavar="BITS",
        help="width of feature maps: spatial 8 to 24 (default: 20), multiplexed 8, 10, 12, 14 or 16 (default: 16)",
    )
    parser.add_argument("--top-k", metavar="K", help="experts per token, of all tasks (default: as trained)")


def run_export_hls(args: argparse.Namespace) -> None:
    from m3vit.export.hls.from_run import export_run
    from m3vit.models.budget import read_top_k
    from m3vit.run_folder import load_run

    run = load_run(args.run)
    config = run.config.model
    info = export_run(
        run,
        args.out,
        data_root=args.data_root,
        samples=args.samples,
        schedule=args.schedule,
        weight_bits=args.weight_bits,
        act_bits=args.act_bits,
        board=args.board,
        top_k=read_top_k(args.top_k, config.tasks, config.num_experts) if args.top_k else None,
    )
    say(f"hls4ml {info['hls4ml']} project with tasks {', '.join(config.tasks)}: {args.out}")


def add_csim(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("project", type=Path, metavar="DIR", help="HLS project (m3vit export hls)")
    parser.add_argument(
        "--samples", type=positive, default=None, metavar="N", help="images to simulate (default: all that are stored)"
    )


def run_csim(args: argparse.Namespace) -> None:
    from m3vit.export.hls.schedules import schedule_of
    from m3vit.export.hls.verify import verify_project
    from m3vit.hw.manifest import read_manifest

    with progress_bar("C-simulating") as bar:
        report = verify_project(args.project, args.samples, bar)
    caption = f"{report['images']} images, C-simulation with g++; protocol {report['protocol']}"
    print_scores(report["tasks"], ("torch", "csim"), caption)
    for task, result in report["tasks"].items():
        say(
            f"{task}: worst error {result['worst_error']:.4g}, mean error {result['mean_error']:.4g}, "
            f"{result['flips']} top-k flips in {result['decisions']} routing decisions"
        )
    for line in schedule_of(read_manifest(args.project)).said(report):
        say(line)
    say_changed(report["changed_files"])
