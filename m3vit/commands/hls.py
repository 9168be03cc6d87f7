"""m3vit export hls, hw csim, hw cost, hw explore."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from m3vit.collector import resting
from m3vit.commands.terminal import print_scores, progress_bar, say, say_changed
from m3vit.errors import InputError
from m3vit.options import File, Positive, RunFolder, Value, add_options, count, options, words


@dataclass(frozen=True)
class ExportHls:
    """Options of m3vit export hls, beside its Request.

    Attributes:
        run: run folder
        out: project folder to write, new, empty or an earlier project
        top_k: experts per token, of all tasks (default: as trained)
        budget_files: hidden units and experts per token from a file of m3vit search; of several, with commas between
            them, each has a program in the project, around one file of weights, called as their files, the first what
            it runs unless told otherwise; full is the model as trained (multiplexed schedule; the spatial one has one
            budget, with the same experts per token for all tasks of a block) (default: as trained)
    """

    run: RunFolder
    out: Path
    top_k: Annotated[str, Value(metavar="K")] | None = None
    budget_files: Annotated[tuple[str, ...], Value(words, "FILE,...", flag="budget")] = ()


def add_export_hls(parser: argparse.ArgumentParser) -> None:
    from m3vit.export.hls.options import Request

    add_options(parser, ExportHls, Request, exclusive=("top_k", "budget_files"))


def run_export_hls(args: argparse.Namespace) -> None:
    with resting():
        from m3vit.export.hls.from_run import export_run
        from m3vit.export.hls.options import Request
        from m3vit.models.budget import in_all_layers, read_top_k
        from m3vit.models.budget_file import read_budgets
        from m3vit.run_folder import load_run

    wanted = options(ExportHls, args)
    run = load_run(wanted.run)
    config = run.config.model
    top_k = read_top_k(wanted.top_k, config.tasks, config.num_experts) if wanted.top_k else {}
    if top_k and not run.model.backbone.moe_indices:
        raise InputError("this model has no experts: leave out --top-k")
    budgets = read_budgets(wanted.budget_files)
    budget = in_all_layers(top_k, run.model.backbone.moe_indices)
    with progress_bar("exporting") as bar:
        info = export_run(run, wanted.out, options(Request, args), budget=budget, budgets=budgets, progress=bar)
    say(f"hls4ml {info['hls4ml']} project with tasks {', '.join(config.tasks)}: {wanted.out}")
    for line in info.get("filled", []):
        say(line)
    if names := [one["name"] for one in info.get("budgets", [])]:
        say(f"budgets: {', '.join(names)}, each a program around one file of weights; {names[0]} unless told otherwise")


@dataclass(frozen=True)
class Csim:
    """Options of m3vit hw csim.

    Attributes:
        project: HLS project (m3vit export hls)
        samples: images to simulate (default: all that are stored; with --timed one)
        budget: with --timed, of a project with several, by its name (default: the first); else all are simulated
        timed: count cycles in the C++ instead, with the routing of each image
        recorded: with --timed, evaluate what was recorded before; no C++ is run
        clock: with --timed, MHz (default: what project.tcl asks for)
        depth: with --timed, cycles to fill and drain a pipelined loop (default: 12)
        fifo: with --timed, words that each FIFO holds (default: what the C++ says; spatial schedule)
        read: with --timed, cycles from a request to its first word (default: 70)
        write: with --timed, cycles from the last word to the answer (default: 40)
        bus_bits: with --timed, width of the AXI buses (default: of the ports)
        gap: with --timed, cycles that a bus loses at each run of consecutive words (default: 0)
        timeline: with --timed, a picture of the frame of the first task (default: none)
        json: with --timed, also write what is printed, by instruction, to this file (default: do not)
    """

    project: Annotated[Path, Value(metavar="DIR", positional=True)]
    samples: Positive | None = None
    budget: Annotated[str, Value(metavar="NAME")] | None = None
    timed: bool = False
    recorded: bool = False
    clock: Positive | None = None
    depth: Annotated[int, Value(count, "N")] | None = None
    fifo: Positive | None = None
    read: Annotated[int, Value(count, "N")] | None = None
    write: Annotated[int, Value(count, "N")] | None = None
    bus_bits: Positive | None = None
    gap: Annotated[int, Value(count, "N")] | None = None
    timeline: File | None = None
    json: File | None = None


def run_csim(wanted: Csim) -> None:
    if wanted.timed:
        from m3vit.commands.hardware import run_timed

        run_timed(wanted)
        return
    rest = {key: value for key, value in vars(wanted).items() if key not in ("project", "samples", "timed")}
    if of_timed := [f"--{key.replace('_', '-')}" for key, value in rest.items() if value not in (None, False)]:
        raise InputError(f"{', '.join(of_timed)}: give --timed too, or leave it out")
    from m3vit.export.hls.schedules import schedule_of
    from m3vit.export.hls.verify import verify_project
    from m3vit.hw.manifest import read_manifest

    with progress_bar("C-simulating") as bar:
        report = verify_project(wanted.project, wanted.samples, bar)
    caption = f"{report['images']} images, C-simulation with g++; protocol {report['protocol']}"
    schedule, further = schedule_of(read_manifest(wanted.project)), report.get("budgets", {})
    for name, found in {report.get("budget", ""): report, **further}.items():
        print_scores(found["tasks"], ("torch", "csim"), f"{caption}; budget {name}" if further else caption)
        for task, result in found["tasks"].items():
            say(
                f"{task}: worst error {result['worst_error']:.4g}, mean error {result['mean_error']:.4g}, "
                f"{result['flips']} top-k flips in {result['decisions']} routing decisions"
            )
        for line in schedule.said(found):
            say(line)
    say_changed(report["changed_files"], report["changes"])


def add_cost_options(parser: Any, exploring: bool = False) -> None:
    """Add what `m3vit hw cost` and `explore` take beside a recipe's keys; parser: argparse's or jsonargparse's."""
    parser.add_argument("--board", type=str, default=None, metavar="NAME", help="default: the project's, else zcu104")
    for name in ("weight", "act"):
        default = "default: all of W8A8, W8A16, W16A16" if exploring else "default: the project's, else 16"
        parser.add_argument(f"--{name}-bits", type=int, default=None, metavar="BITS", help=f"({default})")
    parser.add_argument("--part", type=str, default=None, metavar="PART", help="an FPGA of the board's device")
    parser.add_argument("--clock", type=int, default=None, metavar="MHZ", help="default: the board's")
    parser.add_argument("--array", type=int, default=None, metavar="OUTPUTS", help="default: what is fastest")
    parser.add_argument("--port-bits", type=int, default=None, metavar="BITS", help="of a memory port")
    parser.add_argument("--ports", type=int, default=None, metavar="N", help="1 or 2, of weights")
    parser.add_argument(
        "--residual-bits", type=int, default=None, metavar="BITS", help="32, or 16 with 8-bit activations"
    )
    parser.add_argument(
        "--layer-bits",
        type=str,
        default=None,
        metavar="NAME=BITS,...",
        help="maps with 16-bit inputs beside --act-bits 8",
    )
    if exploring:
        parser.add_argument(
            "--out", type=str, default=None, metavar="FILE", help="write the fastest engines, as --config"
        )
    else:
        parser.add_argument("--engines", type=str, default=None, metavar="FILE", help="what hw explore --out wrote")
        parser.add_argument("--task", type=str, default=None, help="the task of the frame (default: the first)")


def _engines(args: Any) -> dict[str, Any]:
    """Return what is given of the engines, as choose_options takes it."""
    from m3vit.export.hls.options import ENGINES

    return {name: getattr(args, "engines" if name == "config" else name, None) for name in ENGINES}


def run_cost(argv: Sequence[str]) -> None:
    """Print what a project, a run or a recipe costs on a board."""
    from m3vit.commands.terminal import OneLineParser
    from m3vit.hw.cost import render
    from m3vit.hw.manifest import MANIFEST

    if argv and (Path(argv[0]) / MANIFEST).is_file():
        from m3vit.export.hls.multiplexed.costing import of_project

        parser = OneLineParser(prog="m3vit hw cost", allow_abbrev=False)
        parser.add_argument("project", type=Path)
        add_cost_options(parser)
        parser.add_argument("--budget", type=str, default=None, metavar="NAME", help="of a project with several")
        parser.add_argument("--json", type=Path, default=None, metavar="FILE")
        args: Any = parser.parse_args(list(argv))
        if args.weight_bits or args.act_bits:
            raise InputError(f"{args.project} was exported with its bits: leave out --weight-bits and --act-bits")
        if given := [name for name, value in _engines(args).items() if value is not None]:
            option = "engines" if given[0] == "config" else given[0].replace("_", "-")
            raise InputError(f"{args.project} was exported with its engines: leave out --{option}")
        report = of_project(args.project, args.board, args.task, args.budget)
    else:
        config, args = _configured("hw cost", argv)
        from m3vit.export.hls.multiplexed.costing import of_model  # needs torch, which help does not

        report = of_model(config.model, args.weight_bits, args.act_bits, args.board, args.task, _engines(args))
    _report(report, args.json, render(report))


def run_explore(argv: Sequence[str]) -> None:
    """Print what engines a run or a recipe could have on a board; write the fastest."""
    from m3vit.files import write_json
    from m3vit.hw.explore import render
    from m3vit.hw.manifest import MANIFEST

    if argv and (Path(argv[0]) / MANIFEST).is_file():
        raise InputError(f"{argv[0]} is a project, whose engines are chosen: give the run that it is of, or a recipe")
    config, args = _configured("hw explore", argv)
    from m3vit.export.hls.multiplexed.costing import explore_model  # needs torch, which help does not

    report = explore_model(config.model, args.weight_bits, args.act_bits, args.board, _engines(args))
    _report(report, args.json, render(report))
    if args.out is not None:
        write_json(Path(args.out), report["fastest"]["configuration"])
        say(f"{args.out}: the fastest, for m3vit export hls --config")


def _configured(command: str, argv: Sequence[str]) -> tuple[Any, Any]:
    """Return the configuration of a recipe or a run, checked, and the other arguments."""
    from m3vit.commands.training import config_from
    from m3vit.training.effects import check_given

    config, args = config_from(command, argv)
    config.check()
    check_given(config, argv, "profile")
    return config, args


def _report(report: dict[str, Any], path: Path | str | None, text: str) -> None:
    if path is not None:
        from m3vit.files import write_json

        write_json(Path(path), report)
    say(text)
