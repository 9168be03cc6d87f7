"""m3vit data: synth, extract, prepare, check."""

import argparse
from pathlib import Path

from m3vit.commands.terminal import image_size, positive, progress_bar, say
from m3vit.errors import InputError


def add_synth(parser: argparse.ArgumentParser) -> None:
    from m3vit.data.synthetic.scenes.layouts import WRITERS

    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty; becomes a data root")
    parser.add_argument(
        "--layout",
        default="nyud",
        choices=list(WRITERS),
        help="nyud: rooms, as in NYUD_MT; pascal: people and objects, as in PASCAL_MT (default: nyud)",
    )
    parser.add_argument("--train", type=positive, default=400, metavar="N", help="training images (default: 400)")
    parser.add_argument("--val", type=positive, default=100, metavar="N", help="validation images (default: 100)")
    parser.add_argument(
        "--size",
        type=image_size,
        default=(96, 128),
        metavar="HEIGHTxWIDTH",
        help="of the images, in pixels (default: 96x128)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides every scene (default: 0)")
    parser.add_argument("--workers", type=positive, default=None, metavar="N", help="processes (default: one a core)")


def run_synth(args: argparse.Namespace) -> None:
    from m3vit.data.synthetic.dataset import synthesize

    with progress_bar("rendering scenes") as bar:
        synthesize(
            args.out,
            layout=args.layout,
            train=args.train,
            val=args.val,
            size=args.size,
            seed=args.seed,
            workers=args.workers,
            progress=bar,
        )
    say(f"{args.train} training and {args.val} validation scenes in {args.out}")


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "root", type=Path, metavar="ROOT", help="the data set's folder, which holds gt_sets/ or ImageSets/"
    )
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write the whole report as JSON (default: none)"
    )
    parser.add_argument("--workers", type=positive, default=None, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--quick", action="store_true", help="compare lists and names alone, open no file")


def run_check(args: argparse.Namespace) -> int:
    from m3vit.data.tools.check import check, render

    if args.quick and args.workers:
        raise InputError("--quick opens no file, and --workers are processes that open them: leave one of them out")
    with progress_bar("checking samples") as bar:
        report = check(args.root, quick=args.quick, workers=args.workers, progress=bar)
    if args.json is not None:
        from m3vit.files import write_json

        write_json(args.json, report.to_dict())
    say(render(report))
    return 0 if report.ok else 1


def add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=["nyud"], help="nyud: NYUD_MT's files from the official NYU Depth v2")
    parser.add_argument("--labeled", type=Path, required=True, metavar="FILE", help="nyu_depth_v2_labeled.mat (2.8 GB)")
    parser.add_argument(
        "--splits", type=Path, required=True, metavar="FILE", help="splits.mat (official train and test images)"
    )
    parser.add_argument(
        "--classes", type=Path, required=True, metavar="FILE", help="classMapping40.mat (894 labels to 40 classes)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty; becomes a data root")
    parser.add_argument(
        "--depth",
        default="measured",
        choices=["measured", "filled"],
        help="metres; measured: 0 where the Kinect saw nothing; filled: the in-painted depths (default: measured)",
    )
    parser.add_argument(
        "--sha256", action="store_true", help="note the sources' hashes in prepared.json (reads them once more)"
    )
    parser.add_argument("--workers", type=positive, default=None, metavar="N", help="processes (default: one a core)")


def run_prepare(args: argparse.Namespace) -> None:
    from m3vit.data.tools.prepare import prepare_nyud

    with progress_bar("preparing images") as bar:
        notes = prepare_nyud(
            args.labeled,
            args.splits,
            args.classes,
            args.out,
            depth=args.depth,
            sha256=args.sha256,
            workers=args.workers,
            progress=bar,
        )
    counts = notes["counts"]
    remark = "" if notes["official_counts"] else ", which are not the official 795 and 654"
    say(f"{counts['train']} training and {counts['val']} validation images in {args.out}{remark}")


def add_extract(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help=".tgz, .tar.gz, .tar or .zip of a data set")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")


def run_extract(args: argparse.Namespace) -> None:
    from m3vit.data.tools.archives import extract
    from m3vit.data.tools.check import describe

    with progress_bar("unpacking (MiB)") as bar:
        root = extract(args.archive, args.out, bar)
    say(f"{describe(root)}: {root}")
