"""The command line. Parsing needs no torch: a command's modules are imported only when it runs."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from m3vit import __version__
from m3vit.errors import InputError


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake on one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def image_size(text: str) -> tuple[int, int]:
    """Parse "96x128" as (height, width)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"size {text!r}: give HEIGHTxWIDTH, such as 96x128")
    return int(parts[0]), int(parts[1])


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a positive whole number")
    return int(text)


@contextmanager
def progress_bar(title: str, visible: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar; the yielded function takes (done, total, text beside the bar = "")."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as bar:
        task = bar.add_task(title, total=None, text="")
        yield lambda done, total, text="": bar.update(task, completed=done, total=total, text=text)


def say(text: str) -> None:
    """Print a line of result."""
    print(text, flush=True)


# --- data -----------------------------------------------------------------------------------------------------------


def add_synth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write; becomes a data root")
    parser.add_argument(
        "--layout",
        default="nyud",
        choices=["nyud", "pascal"],
        help="nyud: rooms, as the NYUD_MT release (default); pascal: people and objects, as the PASCAL_MT release",
    )
    parser.add_argument("--train", type=positive, default=400, help="training images (default: 400)")
    parser.add_argument("--val", type=positive, default=100, help="validation images (default: 100)")
    parser.add_argument("--size", type=image_size, default=(96, 128), help="HEIGHTxWIDTH in pixels (default: 96x128)")
    parser.add_argument("--seed", type=int, default=0, help="decides every scene (default: 0)")
    parser.add_argument("--workers", type=positive, default=None, help="processes (default: one a core)")


def run_synth(args: argparse.Namespace) -> None:
    from m3vit.data.synthetic import synthesize

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
    parser.add_argument("root", type=Path, metavar="ROOT", help="the folder that holds gt_sets/ or ImageSets/")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the whole report as JSON")
    parser.add_argument("--workers", type=positive, default=None, help="processes (default: one a core)")
    parser.add_argument("--quick", action="store_true", help="only which data set it is, its lists and missing files")


def run_check(args: argparse.Namespace) -> int:
    from m3vit.data.check import check, render

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
    parser.add_argument("--splits", type=Path, required=True, metavar="FILE", help="splits.mat")
    parser.add_argument("--classes", type=Path, required=True, metavar="FILE", help="classMapping40.mat")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty; becomes a data root")
    parser.add_argument(
        "--depth",
        default="measured",
        choices=["measured", "filled"],
        help="measured: 0 where the Kinect saw nothing; filled: the in-painted depths (default: measured)",
    )
    parser.add_argument("--sha256", action="store_true", help="note the sources' hashes in prepared.json")
    parser.add_argument("--workers", type=positive, default=None, help="processes (default: one a core)")


def run_prepare(args: argparse.Namespace) -> None:
    from m3vit.data.prepare import prepare_nyud

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
    from m3vit.data.archives import extract
    from m3vit.data.check import describe

    with progress_bar("unpacking (MiB)") as bar:
        root = extract(args.archive, args.out, bar)
    say(f"{describe(root)}: {root}")


# --- train, init ----------------------------------------------------------------------------------------------------


def config_from(command: str, argv: Sequence[str]) -> tuple[Any, Any]:
    """Parse `RECIPE [--config FILE] [--any.dotted.key VALUE] ...` into (Config, the other arguments)."""
    import jsonargparse

    from m3vit.training.config import Config, read_config, recipe_names, recipe_path

    recipe = argv[0] if argv and not argv[0].startswith("-") else None
    start = None
    if recipe and command == "profile" and recipe not in recipe_names() and Path(recipe).is_dir():
        start = Path(recipe) / "config.yaml"
        read_config(start)  # its messages are clearer than those of the parser below
    elif recipe:
        start = recipe_path(recipe)
    parser = jsonargparse.ArgumentParser(
        prog=f"m3vit {command} RECIPE",
        exit_on_error=False,
        default_config_files=[str(start)] if start else None,
        description=f"{COMMANDS[command][0]} RECIPE: {', '.join(recipe_names())}. "
        "Later sources win: recipe, --config, dotted keys. A mapping in a file replaces the recipe's; a dotted key "
        "changes one entry of it.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of the same keys, read after the recipe")
    if command == "profile":
        parser.add_argument("--task", default=None, help="show this task alone (default: all of them)")
        parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures as JSON")
    else:
        parser.add_argument("--out", type=Path, required=True, help="the run folder")
    if command == "train":
        parser.add_argument("--resume", action="store_true", help="continue the run in --out where it stopped")
    for section in fields(Config):
        parser.add_class_arguments(section.default_factory, section.name)  # type: ignore[arg-type]
    if recipe is None and not {"-h", "--help"} & set(argv):
        rest = " (or a run folder)" if command == "profile" else " --out RUN"
        raise InputError(f"give a recipe first: m3vit {command} RECIPE{rest}, with one of {', '.join(recipe_names())}")
    words = list(argv[1:] if recipe else argv)
    if "--config" in words[:-1]:  # to the front: dotted keys win over it wherever they stand
        place = words.index("--config")
        words = words[place : place + 2] + words[:place] + words[place + 2 :]
    try:
        parsed = parser.instantiate(parser.parse_args(words))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise InputError(f"m3vit {command}: {' '.join(str(error).split())}") from None
    config = Config(model=parsed.model, data=parsed.data, train=parsed.train)
    return config, parsed


def run_train(argv: Sequence[str]) -> int:
    config, args = config_from("train", argv)
    config.check()
    from m3vit.distributed import rank
    from m3vit.training.loop import train
    from m3vit.training.stopping import Stopped

    first = rank() == 0  # of several processes: the one that speaks
    try:
        with progress_bar("training", visible=first) as bar:
            unreadable = train(config, args.out, resume=args.resume, progress=bar)
    except Stopped as stopped:
        if first:
            print(f"m3vit: {stopped}", file=sys.stderr)
        return stopped.exit_code
    if first:
        say(f"trained for {config.train.epochs} epochs: {args.out}")
        if unreadable:
            say(f"{unreadable} training images could not be read and were left out: see metrics.jsonl")
    return 0


def run_init(argv: Sequence[str]) -> None:
    config, args = config_from("init", argv)
    from m3vit.training.loop import initialise

    initialise(config, args.out)
    say(f"untrained weights: {args.out}")


def run_profile(argv: Sequence[str]) -> None:
    config, args = config_from("profile", argv)
    config.check()
    from m3vit.profiling import profile, render

    report = profile(config.model, args.task)
    if args.json is not None:
        from m3vit.files import write_json

        write_json(args.json, report)
    say(render(report))


# --- eval -----------------------------------------------------------------------------------------------------------


def add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="run folder, ONNX package or HLS project")
    parser.add_argument(
        "--protocol",
        choices=["A", "B"],
        default=None,
        help="A: resized to the label's size (Vandenhende, M3ViT; default); B: padded (ATRC, InvPT)",
    )
    parser.add_argument("--data.root", dest="data_root", help="data root (default: the one a run was trained on)")
    parser.add_argument("--device", default="auto", help="of a run: cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--batch", type=positive, default=1, help="images a run takes at once (default: 1)")
    parser.add_argument("--workers", type=positive, default=None, help="processes matching edges (default: one a core)")
    parser.add_argument("--all-metrics", action="store_true", help="print every metric, not the headline one alone")
    parser.add_argument("--compare", action="store_true", help="show two or more evaluated folders in one table")
    parser.add_argument("--baseline", default=None, help="with --compare: delta_m over a folder's or published figures")


def run_eval(args: argparse.Namespace) -> None:
    if args.compare:
        if args.data_root or args.workers or args.all_metrics:
            raise InputError("--compare shows what was evaluated: leave out --data.root, --workers and --all-metrics")
        from m3vit.evaluation.compare import compare

        print_comparison(compare(args.folders, args.protocol, args.baseline))
        return
    if len(args.folders) > 1 or args.baseline:
        raise InputError("give one folder to evaluate; --compare shows several that were evaluated, and delta_m")
    (folder,) = args.folders
    from m3vit.distributed import rank
    from m3vit.evaluation.scoring import score
    from m3vit.export.predictors import choose_device, open_predictor

    predictor, info, root = open_predictor(folder, choose_device(args.device), args.batch)
    if not (args.data_root or root):
        raise InputError(f"{folder} does not say where its data are: give --data.root DIR")
    is_run = predictor.name == "torch"
    with progress_bar("evaluating", visible=rank() == 0) as bar:
        result = score(
            predictor,
            folder,
            args.data_root or root,
            args.protocol or "A",
            trivial=is_run,
            info=info,
            workers=args.workers,
            progress=bar,
        )
    if result:  # None in all but the first of several processes
        columns = ("trivial", "torch") if is_run else (predictor.name,)
        made = f" ({result['origin']})" if result["origin"] else ""
        caption = f"{result['images']} val images of {result['release']}{made}; protocol {result['protocol']}"
        print_scores(result["tasks"], columns, caption, args.all_metrics)


def print_comparison(comparison: dict[str, Any]) -> None:
    """Print evaluations side by side, a row for each task, with their intervals."""
    from rich.console import Console
    from rich.table import Table

    from m3vit.tasks import TASKS

    rows = comparison["rows"]
    caption = (
        f"{comparison['images']} val images; protocol {comparison['protocol']}\n95 % intervals over images "
        f"({comparison['resamples']} resamples); second lines: difference to {rows[0]['name']}, paired"
    )
    caption += "".join(f"\n{note}" for note in comparison["notes"])
    caption += f"\ndata: {comparison['origin']}" if comparison["origin"] else ""
    if comparison["baseline"]:
        caption += f"\ndelta_m over {comparison['baseline']['name']} ({comparison['baseline']['source']})"
    table = Table("task", "metric", caption=caption)
    for row in rows:
        table.add_column(row["name"], justify="right")
    for task, first in rows[0]["tasks"].items():
        arrow = "↑" if TASKS[task].higher_is_better else "↓"
        cells = []
        for row in rows:
            cell = row["tasks"][task]
            low, high = cell["interval"]
            text = f"{cell['value']:.3f} [{low:.3f}, {high:.3f}]"
            if "difference" in cell:
                low, high = cell["difference_interval"]
                text += f"\n{cell['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            cells.append(text)
        table.add_row(task, f"{first['metric']} ({TASKS[task].unit}) {arrow}", *cells)
    if comparison["baseline"]:
        table.add_row("all", "delta_m (%) ↑", *(f"{row['delta_m']:+.2f}" for row in rows))
    Console(width=max(Console().width, 60 + 36 * len(rows))).print(table)


def print_scores(tasks: dict[str, Any], columns: Sequence[str], caption: str, all_metrics: bool = False) -> None:
    """Print the headline metric of each task, or all its metrics, a column for each predictor."""
    from rich.console import Console
    from rich.table import Table

    from m3vit.tasks import TASKS

    table = Table(caption=caption)
    table.add_column("task")
    table.add_column("metric")
    for column in columns:
        table.add_column(column, justify="right")
    for task, scores in tasks.items():
        row = TASKS[task]
        found = [scores.get(column) for column in columns]
        arrow = "↑" if row.higher_is_better else "↓"
        names = {row.metric: f"{row.metric} ({row.unit}) {arrow}"}
        if all_metrics and isinstance(found[-1], dict):
            names |= {name: name for name in found[-1] if name != row.metric}
        for place, (metric, title) in enumerate(names.items()):
            values = [
                "-" if value is None else f"{value[metric] if isinstance(value, dict) else value:.3f}"
                for value in found
            ]
            table.add_row("" if place else task, title, *values)
    Console(width=max(Console().width, 100)).print(table)


# --- export, predict ------------------------------------------------------------------------------------------------


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


def add_export_hls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, help="project folder to write")
    parser.add_argument("--data.root", dest="data_root", help="data root, if not the one trained on")
    parser.add_argument(
        "--samples", type=positive, default=None, help="val images to store for csim (default: 100, or all)"
    )
    parser.add_argument("--weight-bits", type=positive, default=16, help="width of weights, 6 to 24 (default: 16)")
    parser.add_argument("--act-bits", type=positive, default=20, help="width of feature maps, 8 to 24 (default: 20)")


def run_export_hls(args: argparse.Namespace) -> None:
    from m3vit.export.hls.run import export_run
    from m3vit.training.checkpoint import load_run

    run = load_run(args.run)
    info = export_run(
        run,
        args.out,
        data_root=args.data_root,
        samples=args.samples,
        weight_bits=args.weight_bits,
        act_bits=args.act_bits,
    )
    say(f"hls4ml {info['hls4ml']} project with tasks {', '.join(run.config.model.tasks)}: {args.out}")


# --- hardware, report, demo -----------------------------------------------------------------------------------------


def add_csim(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("project", type=Path, metavar="DIR", help="HLS project (m3vit export hls)")
    parser.add_argument("--samples", type=positive, default=None, help="images to simulate (default: all stored)")


def run_csim(args: argparse.Namespace) -> None:
    from m3vit.export.hls.verify import verify_project

    with progress_bar("C-simulating") as bar:
        report = verify_project(args.project, args.samples, bar)
    caption = f"{report['images']} images, hls4ml C-simulation with g++; protocol {report['protocol']}"
    print_scores(report["tasks"], ("torch", "csim"), caption)
    for task, result in report["tasks"].items():
        say(
            f"{task}: worst error {result['worst_error']:.4g}, mean error {result['mean_error']:.4g}, "
            f"{result['flips']} top-k flips in {result['decisions']} routing decisions"
        )


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, evaluated with m3vit eval")
    parser.add_argument("--onnx", type=Path, default=None, help="ONNX package (default: onnx/ beside RUN)")
    parser.add_argument("--hls", type=Path, default=None, help="HLS project, simulated (default: hls/ beside RUN)")
    parser.add_argument("--out", type=Path, default=None, help="page to write (default: RUN/report.html)")
    parser.add_argument("--data.root", dest="data_root", help="data root, if not the one evaluated on")
    parser.add_argument("--images", type=positive, default=4, help="validation images to show (default: 4)")
    parser.add_argument("--protocol", choices=["A", "B"], default=None, help="of the figures (default: last evaluated)")


def run_report(args: argparse.Namespace) -> None:
    from m3vit.report.page import write_report
    from m3vit.training.checkpoint import load_run

    run = load_run(args.run)
    onnx, hls = args.onnx or args.run.parent / "onnx", args.hls or args.run.parent / "hls"
    out = args.out or args.run / "report.html"
    with progress_bar("drawing report") as bar:
        report = write_report(run, onnx, hls, out, args.images, args.data_root, args.protocol, bar)
    print_scores(
        report["tasks"],
        ("trivial", "torch", "onnx", "csim"),
        f"{report['images']} val images; protocol {report['protocol']}",
    )
    say(str(out))


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and training (default: 0)")


def run_demo(args: argparse.Namespace) -> None:
    from m3vit.demo import demo

    demo(args.out, args.seed)


# What it does, its arguments, and what runs it; that returns an exit code, or None for 0.
Command = tuple[str, Callable[[argparse.ArgumentParser], None] | None, Callable[[Any], int | None]]
COMMANDS: dict[str, Command] = {
    "data synth": ("Render a small data set of indoor scenes with exact labels.", add_synth, run_synth),
    "data extract": ("Unpack a data set's archive safely and say which it is.", add_extract, run_extract),
    "data prepare": ("Make NYUD_MT's files from the official NYU Depth v2 release.", add_prepare, run_prepare),
    "data check": ("Open every file of a data set and report what is wrong with it.", add_check, run_check),
    "train": ("Train a recipe into a run folder.", None, run_train),
    "init": ("Write the run folder of a recipe with untrained weights.", None, run_init),
    "profile": ("Count parameters and multiply-accumulates of a recipe or a run.", None, run_profile),
    "eval": ("Score a run, an ONNX package or an HLS project; compare scores.", add_eval, run_eval),
    "export onnx": ("Write one small ONNX graph per task around one weights.bin.", add_export_onnx, run_export_onnx),
    "predict": ("Predict with an ONNX package: onnxruntime only, no torch.", add_predict, run_predict),
    "export hls": ("Write an hls4ml project with all tasks, switched at run time.", add_export_hls, run_export_hls),
    "hw csim": ("C-simulate an HLS project with g++ and compare it with torch.", add_csim, run_csim),
    "report": ("Draw one self-contained HTML page about a run.", add_report, run_report),
    "demo": ("Everything above in a row, on rendered scenes.", add_demo, run_demo),
}


def usage() -> str:
    """Return the help of `m3vit` alone."""
    lines = "\n".join(f"  {name:<13}{text}" for name, (text, _, _) in COMMANDS.items())
    title = f"m3vit {__version__}: task-gated mixture-of-experts vision transformers"
    return f"{title}\n\n{lines}\n\nm3vit COMMAND --help tells more."


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit code; raises InputError for a user's mistake."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    name = next((" ".join(argv[:n]) for n in (2, 1) if " ".join(argv[:n]) in COMMANDS), None)
    group = [command for command in COMMANDS if command.split()[0] == argv[0]]
    if name is None and group and set(argv[1:]) & {"-h", "--help"}:
        print("\n".join(f"m3vit {command:<13}{COMMANDS[command][0]}" for command in group))
        return 0
    if name is None and group:
        raise InputError(f"give a whole command: m3vit {' or m3vit '.join(group)}")
    if name is None:
        raise InputError(f"unknown command {' '.join(argv[:2])!r}: choose from {', '.join(COMMANDS)}")
    text, add_arguments, execute = COMMANDS[name]
    rest = list(argv[len(name.split()) :])
    if add_arguments is None:
        return execute(rest) or 0
    parser = OneLineParser(prog=f"m3vit {name}", description=text, allow_abbrev=False)
    add_arguments(parser)
    return execute(parser.parse_args(rest)) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a mistake or an unusable file, 130 for Ctrl-C.

    `m3vit data check` returns 1 if the data set has problems; `m3vit train` 128 + the number of the signal that stopped
    it (SIGTERM 143, SIGUSR1 138).
    """
    # Before torch loads OpenMP: threads that wait by spinning slow training down many times over as soon as another
    # process wants one of the cores; sleeping ones lose little.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # or DDP comments at length on m3vit.training.launch
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        if not error.everywhere or os.environ.get("RANK", "0") == "0":
            print(f"m3vit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        # Commands beyond `predict` need an extra; which one depends on the module.
        extra = "export" if error.name and error.name.split(".")[0] in ("onnx", "onnxscript", "hls4ml") else "train"
        if error.name and error.name.startswith("m3vit"):
            raise
        print(f"m3vit: error: this command needs {error.name}: pip install 'm3vit[{extra}]'", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"m3vit: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("m3vit: interrupted; m3vit train goes on with --resume, other commands start over", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
