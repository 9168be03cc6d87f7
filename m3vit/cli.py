"""The command line: the table of commands, and what becomes of their errors.

Parsing needs no torch: a command's modules are imported only when it runs.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from m3vit import __version__, plugins, streams
from m3vit.commands import data, evaluation, hardware, hls, onnx, predict, report, routing, search, sweep, training
from m3vit.commands.terminal import PLUGIN_HELP, OneLineParser
from m3vit.errors import NO_WRITE, InputError, UncheckedWarning, install
from m3vit.launched import speaks
from m3vit.options import command
from m3vit.pool import follow_quota

# What it does, its arguments, and what runs it; that returns an exit code, or None for 0.
Command = tuple[str, Callable[[argparse.ArgumentParser], None] | None, Callable[[Any], int | None]]
COMMANDS: dict[str, Command] = {
    "data synth": ("Render a data set of made-up scenes with exact labels.", *command(data.Synth, data.run_synth)),
    "data extract": (
        "Unpack a data set's archive safely and say what came out.",
        *command(data.Extract, data.run_extract),
    ),
    "data prepare": (
        "Make NYUD_MT's files from the official NYU Depth v2 release.",
        *command(data.Prepare, data.run_prepare),
    ),
    "data init": (
        "Look at a folder of your own data and write a first data.yaml, which describes it.",
        *command(data.Begin, data.run_begin),
    ),
    "data check": (
        "Open every file of a data set and report what is wrong with it. Exit code 1 if anything is.",
        *command(data.Check, data.run_check),
    ),
    "data show": (
        "Draw a contact sheet of a data set: images, labels in their colours, class shares, coverage.",
        *command(data.Show, data.run_show),
    ),
    "train": (training.TITLES["train"], None, training.run_train),
    "init": (training.TITLES["init"], None, training.run_init),
    "profile": (training.TITLES["profile"], None, training.run_profile),
    "sweep": (sweep.TITLE, None, sweep.run_sweep),
    "eval": (
        "Score a run, an ONNX package or an HLS project on the val split (into its eval.json); compare scores.",
        evaluation.add_eval,
        evaluation.run_eval,
    ),
    "search": (
        "Find how many experts each task needs in each block for a share of the compute (into a budget file).",
        *command(search.Search, search.run_search),
    ),
    "routing": (
        "Measure and draw which experts a run's tasks use on a split (into its routing/).",
        *command(routing.Routing, routing.run_routing),
    ),
    "panel": (
        "Draw one small picture of an image: its predictions side by side, and which experts made them.",
        *command(routing.Panel, routing.run_panel),
    ),
    "export onnx": (
        "Write one small ONNX graph per task around one weights.bin.",
        onnx.add_export_onnx,
        onnx.run_export_onnx,
    ),
    "predict": (
        "Predict images and videos with an ONNX package: onnxruntime only, no torch.",
        predict.add_predict,
        predict.run_predict,
    ),
    "serve": ("Serve an ONNX package over HTTP, with a page to try it on.", predict.add_serve, predict.run_serve),
    "export hls": (
        "Write an hls4ml project with all tasks, switched at run time.",
        hls.add_export_hls,
        hls.run_export_hls,
    ),
    "hw csim": ("C-simulate an HLS project with g++ and compare it with torch.", *command(hls.Csim, hls.run_csim)),
    "hw trace": (
        "Compare torch, emulator and C++ of an HLS project on one image, layer by layer.",
        *command(hardware.Trace, hardware.run_trace),
    ),
    "hw rtl": (
        "Run the expert engine's SystemVerilog under Verilator: words, cycles, resources. Exit code 1 if one is out.",
        *command(hardware.Rtl, hardware.run_rtl),
    ),
    "hw validate": (
        "Print numbers of the accelerator that must agree with published ones. Exit code 1 if one is out.",
        *command(hardware.Validate, hardware.run_validate),
    ),
    "hw report": (
        "Set what Vitis HLS reports of a project beside what was assumed, and time its frames with it.",
        *command(hardware.HwReport, hardware.run_hw_report),
    ),
    "hw cost": (training.TITLES["hw cost"], None, hls.run_cost),
    "hw explore": (training.TITLES["hw explore"], None, hls.run_explore),
    "report": (
        "Draw one self-contained HTML page about a run and its exports, and write its figures as JSON.",
        *command(report.Report, report.run_report),
    ),
    "demo": (
        "Run the path from data to report on rendered scenes, in minutes on a CPU.",
        *command(report.Demo, lambda wanted: report.run_demo(wanted, run)),
    ),
}

# Commands that take --plugin and look for installed plug-ins. Packages are predicted without, unless one is asked for.
PLUGGABLE = (
    "train",
    "init",
    "profile",
    "sweep",
    "eval",
    "search",
    "routing",
    "export onnx",
    "export hls",
    "hw csim",
    "hw trace",
    "hw rtl",
    "hw report",
    "hw cost",
    "hw explore",
    "report",
    "data check",
    "data show",
)
ASKED = ("predict", "serve")

# The extra (pyproject.toml) that brings a module; of others it is `train`.
EXTRAS = {
    **dict.fromkeys(("onnx", "onnxscript", "hls4ml"), "export"),
    "optuna": "sweep",
    **dict.fromkeys(("wandb", "mlflow", "pytorch_lightning"), "loggers"),
    "av": "video",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "python_multipart", "prometheus_client"), "serve"),
}


def usage() -> str:
    """Return the help of `m3vit` alone."""
    lines = "\n".join(f"  {name:<13}{text}" for name, (text, _, _) in COMMANDS.items())
    title = f"m3vit {__version__}: task-gated mixture-of-experts vision transformers"
    return (
        f"{title}\n\n{lines}\n\nm3vit COMMAND --help tells more; m3vit --version tells the version; "
        "docs/plugins.md tells of --plugin."
    )


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
    try:
        if name in PLUGGABLE:
            plugins.load_installed()
        if name in PLUGGABLE + ASKED:
            rest = plugins.take(rest)
    except InputError as error:
        error.everywhere = True  # the processes of a torchrun are given the same words
        raise
    if add_arguments is None:
        return execute(rest) or 0
    epilog = PLUGIN_HELP if name in PLUGGABLE + ASKED else None
    parser = OneLineParser(prog=f"m3vit {name}", description=text, epilog=epilog, allow_abbrev=False)
    add_arguments(parser)
    return execute(parser.parse_args(rest)) or 0


def _one_line_each() -> Callable[..., str]:
    """Return what formats warnings for people: their words alone, which say what to do, and nothing the second time.

    Several steps of a command open the same file, and so do all processes of a torchrun. Python itself shows a warning
    once for each place in the code, and again after any `catch_warnings`.
    """
    said: set[str] = set()

    def format_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
        text = f"m3vit: warning: {' '.join(str(message).split())}\n"
        new = text not in said and (category is not UncheckedWarning or speaks())
        said.add(text)
        return text if new else ""

    return format_warning


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for a mistake or an unusable file, 130 for Ctrl-C.

    `m3vit data check` returns 1 if the data set has problems, `m3vit predict` if an input could not be predicted;
    `m3vit predict` and `m3vit train` 128 + the number of the signal that stopped them (SIGTERM
    143, SIGUSR1 138); every command 141 if the reader of its output has gone.
    """
    # Before torch loads OpenMP: threads that wait by spinning slow training down many times over as soon as another
    # process wants one of the cores; sleeping ones lose little.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    follow_quota()
    if {"TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"} & set(os.environ):  # or DDP comments at length on m3vit.training.launch
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.formatwarning = _one_line_each()
    streams.prepare()
    try:
        try:
            code = tell_errors(sys.argv[1:] if argv is None else argv)
        except SystemExit:  # of argparse: help, or wrong arguments
            streams.flush()
            raise
        streams.flush()
        return code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and streams.reader_is_gone():
            streams.discard()
            return streams.PIPE_CLOSED
        streams.discard()
        print(f"m3vit: error: standard output cannot be written ({error.strerror or error})", file=sys.stderr)
        return 2


def tell_errors(argv: Sequence[str]) -> int:
    """Run one command, print what stops it on one line, and return the exit code."""
    try:
        return run(argv)
    except InputError as error:
        if not error.everywhere or speaks():
            print(f"m3vit: error: {' '.join(str(error).split())}{plugins.advice()}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        # All but `predict` of images needs an extra; which one depends on the module.
        extra = EXTRAS.get((error.name or "").split(".")[0], "train")
        if error.name and error.name.startswith("m3vit"):
            raise
        print(f"m3vit: error: this command needs {error.name}: {install(extra)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None and streams.are_stuck():  # it was about printing
            raise
        where = f"{error.filename}: " if error.filename else ""
        advice = f": {NO_WRITE[error.errno]}" if error.errno in NO_WRITE else ""
        print(f"m3vit: error: {where}{error.strerror or error}{advice}", file=sys.stderr)
        return 2
    except MemoryError as error:
        words = " ".join(str(error).split()) or "an allocation failed"
        print(f"m3vit: error: out of memory ({words}): give smaller batches or images, or more memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("m3vit: interrupted; m3vit train goes on with --resume, other commands start over", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
