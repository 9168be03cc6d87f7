"""m3vit hw csim --timed, hw trace, hw rtl, hw validate, hw report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from m3vit.commands.terminal import console, progress_bar, say, say_changed
from m3vit.options import File, Folder, Positive, Value


def above_zero(text: str) -> float:
    """Parse a bound of errors, above 0."""
    import argparse

    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0")
    return value


@dataclass(frozen=True)
class Trace:
    """Options of m3vit hw trace.

    Attributes:
        project: HLS project (m3vit export hls)
        image: image to trace (default: the first that the project has stored)
        task: the task of the frame (default: the first)
        budget: of a project with several, by its name (default: the first)
        run: the run that the project came from (default: if it lies beside the project)
        bound: of a layer's own error against torch, over the standard deviation of its values
        json: also write the trace to this file (default: do not)
    """

    project: Annotated[Path, Value(metavar="DIR", positional=True)]
    image: File | None = None
    task: Annotated[str, Value(metavar="TASK")] | None = None
    budget: Annotated[str, Value(metavar="NAME")] | None = None
    run: Folder | None = None
    bound: Annotated[float, Value(above_zero, "X")] = 0.1
    json: File | None = None


def run_trace(wanted: Trace) -> None:
    from m3vit.export.hls.tracing import trace
    from m3vit.files import write_json

    with progress_bar("tracing") as bar:
        found = trace(wanted.project, wanted.image, wanted.task, wanted.run, wanted.bound, wanted.budget, bar)
    if wanted.json:
        write_json(wanted.json, found)
    print_trace(found)


def print_trace(found: dict[str, Any]) -> None:
    """Print a trace: a row for each layer."""
    from rich.table import Table

    torch, several = any("own" in layer for layer in found["layers"]), len(found["simulators"]) > 1
    budget = f", budget {found['budget']}" if "budget" in found else ""
    caption = f"{found['image']}, task {found['task']}{budget}; {found['torch']}"
    caption += "\nerrors: root mean squares, in standard deviations of torch's values" if torch else ""
    table = Table(caption=caption)
    for title in ("layer", "what"):
        table.add_column(title, no_wrap=True)
    titles = [f"{' and '.join(found['simulators'])} differ"] if several else []
    titles += ["saturated" if several else "at an end"]
    titles += ["worst error", "error", "own error", "top-k flips", "own flips"] if torch else []
    for title in titles:
        table.add_column(title, justify="right")
    for layer in found["layers"]:
        cells = [str(layer.get("different", ""))] if several else []
        cells.append(str(layer["saturated"] or ""))
        if torch:
            cells += [f"{layer[key]:.2g}" if key in layer else "" for key in ("worst", "error", "own")]
            cells += [f"{layer[key]} of {layer['decisions']}" if key in layer else "" for key in ("flips", "own_flips")]
        table.add_row(layer["name"], layer["op"], *cells)
    console(max(console().width, 140)).print(table)
    first = found["first"]
    if several:
        whole = found["whole_frame_different"]
        said = f"differ first in {first['different']}" if first["different"] else "have the same words in every layer"
        say(f"{' and '.join(found['simulators'])} {said}; {whole} output words differ when the frame runs as a whole")
    if torch:
        where = first["out_of_bounds"]
        bounded = f"the first layer whose own error is above {found['bound']:g} standard deviations: {where}"
        say(bounded if where else f"no layer's own error is above {found['bound']:g} standard deviations")
    say_changed(found["changed_files"], found["changes"])


@dataclass(frozen=True)
class Rtl:
    """Options of m3vit hw rtl.

    Attributes:
        project: HLS project of the multiplexed schedule (m3vit export hls)
        layer: the layer with experts, from 1 on (default: all)
        task: the task of the frame (default: the first)
        synth: also the engine's resources, by Yosys beside the closed form
        json: also write what is printed to this file (default: do not)
    """

    project: Annotated[Path, Value(metavar="DIR", positional=True)]
    layer: Positive | None = None
    task: Annotated[str, Value(metavar="TASK")] | None = None
    synth: bool = False
    json: File | None = None


def run_rtl(wanted: Rtl) -> int:
    """Print the RTL's words and cycles beside the other levels; return 1 if a word or a layer's cycles are out."""
    from m3vit.export.hls.multiplexed.rtl import simulate
    from m3vit.files import write_json
    from m3vit.hw.validate import rtl_rows

    with progress_bar("RTL") as bar:
        found = simulate(wanted.project, wanted.task, wanted.layer, wanted.synth, bar)
    if wanted.json:
        write_json(wanted.json, found)
    print_rtl(found)
    rows = list(rtl_rows(wanted.project.resolve().name, found))
    return int(not all(row.holds for row in rows) or any(layer["different"] for layer in found["layers"]))


def print_rtl(found: dict[str, Any]) -> None:
    """Print what the RTL did: a row for each layer with experts."""
    from rich.table import Table

    table = Table(caption=f"{found['board']} at {found['clock_mhz']} MHz, task {found['task']}; {found['note']}")
    titles: tuple[str, ...] = ("layer", "experts, tokens", "words differ", "RTL cycles", "timed C-sim", "against")
    titles += ("RTL at bandwidth", "timed C-sim", "against", "as assumed", "modelled")
    for title in titles:
        table.add_column(title, justify="right")
    for layer in found["layers"]:
        tokens = f"{len(layer['tokens'])}, {min(layer['tokens'])} to {max(layer['tokens'])}"
        cells = [str(layer["layer"]), tokens, str(layer["different"]), str(layer["cycles"]), str(layer["timed_cycles"])]
        slower = layer["at_bandwidth"]
        cells += [f"{100 * layer['difference']:+.3f} %", str(slower["cycles"]), str(slower["timed_cycles"])]
        cells += [f"{100 * slower['difference']:+.3f} %", str(layer["timed_as_assumed_cycles"])]
        table.add_row(*cells, str(layer["modelled_cycles"]))
    console(max(console().width, 160)).print(table)
    depths = ", ".join(f"{loop} {depth}" for loop, depth in found["depths"].items())
    assumed = f"as assumed: {found['assumed']['depth']} for every loop"
    say(f"timed C-sim: with the RTL's own depths ({depths}), memory no bound, then the board's bandwidth; {assumed}")
    say("words differ: from the emulator's")
    if "resources" in found:
        yosys, modelled = (found["resources"][level] for level in ("yosys", "modelled"))
        said = "; ".join(
            f"{kind} {yosys[kind]} by Yosys, {modelled[kind]} modelled" for kind in ("dsp", "bram18", "uram")
        )
        say(f"resources of the expert engine: {said}; by Yosys {yosys['lut']} LUTs, {yosys['ff']} registers")
    say_changed(found["changed_files"], found["changes"])


@dataclass(frozen=True)
class Validate:
    """Options of m3vit hw validate.

    Attributes:
        project: an HLS project of the multiplexed schedule, whose timed C-simulation is run too, and its experts as
            RTL if there is a Verilator (default: none)
        json: also write the rows to this file (default: do not)
    """

    project: Folder | None = None
    json: File | None = None


def run_validate(wanted: Validate) -> int:
    """Print what must agree; return 1 if anything does not."""
    from rich.table import Table

    from m3vit.files import write_json
    from m3vit.hw.validate import all_hold, plain, validate

    projects, engines, missing = {}, {}, ""
    if wanted.project:
        from m3vit.errors import InputError
        from m3vit.export.hls.multiplexed.rtl import simulate
        from m3vit.export.hls.multiplexed.timing import evaluated, record
        from m3vit.hw.sim.rtl import find_tool

        name = wanted.project.resolve().name
        with progress_bar("timing") as bar:
            projects[name] = evaluated(wanted.project, record(wanted.project, progress=bar))
        try:
            find_tool("verilator")
        except InputError as error:
            missing = f"no row of the RTL: {error}"
        else:
            with progress_bar("RTL") as bar:
                engines[name] = simulate(wanted.project, progress=bar)
    rows = validate(projects, engines)
    if wanted.json:
        write_json(wanted.json, plain(rows))
    table = Table(caption="nothing was synthesised, nothing ran on a board")
    for title in ("what", "ours", "theirs", "difference", "allowed", ""):
        table.add_column(title, justify="right" if title in ("difference", "allowed") else "left")
    for row in rows:
        ours, theirs = (f"{value:.2f} {row.unit}".strip() for value in (row.ours, row.theirs))
        allowed = f"{100 * row.low:+.4g} to {100 * row.high:+.4g} %"
        said = (f"{ours} ({row.our_level})", f"{theirs} ({row.their_level})", f"{100 * row.difference:+.3f} %", allowed)
        table.add_row(row.what, *said, "" if row.holds else "OUT")
    console(max(console().width, 180)).print(table)
    out = sum(not row.holds for row in rows)
    if missing:
        say(missing)
    say(f"{len(rows) - out} of {len(rows)} agree" + (f", {out} are out" if out else ""))
    return 0 if all_hold(rows) else 1


ASSUMED = ("clock", "depth", "fifo", "read", "write", "bus_bits", "gap")


def run_timed(wanted: Any) -> None:
    """Run, or evaluate again, the timed C-simulation of a project, and print what it takes; wanted: hls.Csim."""
    from m3vit.errors import InputError
    from m3vit.export.hls.multiplexed import timing as multiplexed
    from m3vit.export.hls.spatial import timing as spatial
    from m3vit.files import write_json
    from m3vit.hw.manifest import read_manifest
    from m3vit.report.timeline import check_form, timeline

    if wanted.timeline:
        check_form(wanted.timeline)
    if wanted.recorded and (wanted.samples or wanted.budget):
        raise InputError("--recorded evaluates what was recorded: leave out --samples and --budget")
    given = {name: getattr(wanted, name) for name in ASSUMED}
    of_layers = read_manifest(wanted.project).get("schedule", "spatial") == "spatial"
    if of_layers and wanted.timeline:
        raise InputError("--timeline: the spatial schedule has no engines that take turns; leave it out")
    if of_layers and wanted.budget:
        raise InputError("--budget: a project of the spatial schedule has one budget; leave it out")
    schedule = spatial if of_layers else multiplexed
    with progress_bar("timing") as bar:
        if wanted.recorded:
            found = multiplexed.recorded(wanted.project)
        elif of_layers:
            found = spatial.record(wanted.project, wanted.samples, bar)
        else:
            found = multiplexed.record(wanted.project, wanted.samples, bar, wanted.budget)
        report = schedule.evaluated(wanted.project, found, given)
    if wanted.json:
        write_json(wanted.json, report)
    (print_layers if of_layers else print_timed)(report)
    if wanted.timeline:
        timeline(wanted.project, given, wanted.timeline)
        say(str(wanted.timeline))
    say_changed(report["changed_files"], report["changes"])


def print_layers(report: dict[str, Any]) -> None:
    """Print when frames of each task leave a spatial project, and which layers and FIFOs decide that."""
    from rich.table import Table

    table = Table(caption=f"at {report['clock_mhz']:g} MHz; {report['note']}")
    for title in (
        "task",
        "first word, cycles",
        "a frame",
        "between frames",
        "ms a frame",
        "frames a second",
        "busiest",
    ):
        table.add_column(title, justify="left" if title in ("task", "busiest") else "right")
    for task, found in report["tasks"].items():
        name, busiest = max(found["processes"].items(), key=lambda item: item[1]["share"])
        cells = [f"{found[key]:,}" for key in ("first", "latency", "interval")]
        cells += [f"{found['latency_ms']:.3f}", f"{1e3 / found['interval_ms']:,.0f}"]
        table.add_row(task, *cells, f"{name} {busiest['share']:.0%}")
    console(max(console().width, 140)).print(table)
    for line in report["said"]:
        say(line)


def print_timed(report: dict[str, Any]) -> None:
    """Print the cycles of a frame of each task by engine, beside the closed form of the same routing."""
    from rich.table import Table

    tasks = report["tasks"]
    engines = list(dict.fromkeys(engine for found in tasks.values() for engine in found["engines"]))
    caption = f"{report['board']} at {report['clock_mhz']:g} MHz; {report['note']}; ms over {report['images']} images"
    if "budget" in report:
        caption += f"; budget {report['budget']}"
    table = Table(caption=caption)
    titles = (
        "task",
        *(f"{engine} ms" for engine in engines),
        "loops ms",
        "ms",
        "least, most",
        "modelled ms",
        "against",
    )
    for title in titles:
        table.add_column(title, justify="left" if title == "task" else "right")
    for task, found in tasks.items():
        per_ms = report["clock_mhz"] * 1e3
        cells = [f"{found['engines'].get(engine, {'ms': 0.0})['ms']:.3f}" for engine in engines]
        cells += [f"{found['loops_ms']:.3f}", f"{found['ms']:.3f}"]
        cells += [", ".join(f"{value:.3f}" for value in found["ms_over_images"])]
        cells += [f"{found['modelled_cycles'] / per_ms:.3f}", f"{100 * found['difference']:+.2f} %"]
        table.add_row(task, *cells)
    console(max(console().width, 160)).print(table)
    first = next(iter(tasks.values()))
    ports = ", ".join(
        f"{port} {entry['bytes'] / 1e6:.2f} MB in {entry['runs']} runs of {entry['words']} words"
        for port, entry in first["ports"].items()
    )
    say(f"ports, first task: {ports}")
    say(
        f"passes of loops, first task: {first['passes']}; {first['waiting_for_buses']} wait for a bus, "
        f"{first['waiting_for_memory']} for the memory's bandwidth"
    )
    for line in report["said"]:
        say(line)


@dataclass(frozen=True)
class HwReport:
    """Options of m3vit hw report.

    Attributes:
        project: HLS project of the multiplexed schedule (m3vit export hls)
        csynth: csynth.xml or csynth.rpt that Vitis HLS wrote of it
        json: also write what is printed to this file (default: do not)
    """

    project: Annotated[Path, Value(metavar="DIR", positional=True)]
    csynth: File
    json: File | None = None


def run_hw_report(wanted: HwReport) -> None:
    """Print what a synthesis reported beside what was assumed, and the time that follows."""
    from rich.table import Table

    from m3vit.export.hls.multiplexed.timing import synthesised
    from m3vit.files import write_json

    with progress_bar("timing") as bar:
        found = synthesised(wanted.project, wanted.csynth, bar)
    if wanted.json:
        write_json(wanted.json, found)
    table = Table(caption=found["note"])
    for title in ("loop", "assumed II", "depth", "reported II", "depth", "reported as"):
        table.add_column(title, justify="left" if title in ("loop", "reported as") else "right")
    for name, loop in found["loops"].items():
        cells = [str(loop["assumed"][key] or "-") for key in ("ii", "depth")]
        cells += [str(loop["reported"][key]) if loop["reported"] else "not found" for key in ("ii", "depth")]
        table.add_row(name, *cells, loop["reported_as"] or "")
    console(max(console().width, 120)).print(table)
    shown = [
        f"{kind} {pair['modelled'] if pair['modelled'] is not None else '-'} modelled, {pair['reported']} reported"
        for kind, pair in found["resources"].items()
        if pair["reported"] is not None
    ]
    if shown:
        say(f"resources: {'; '.join(shown)}")
    clock = found["clock_ns"]
    if clock["estimated"] is not None:
        say(f"clock, ns: {clock['project']:.3f} in project.tcl, {clock['estimated']:.3f} estimated by Vitis HLS")
    for task, pair in found["tasks"].items():
        say(f"{task}: {pair['assumed_ms']:.3f} ms as assumed, {pair['reported_ms']:.3f} ms with the report's loops")
    say_changed(found["changed_files"], found["changes"])
