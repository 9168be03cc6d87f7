"""m3vit hw trace, hw validate."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from m3vit.commands.terminal import console, progress_bar, say, say_changed
from m3vit.options import File, Folder, Value


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
        run: the run that the project came from (default: if it lies beside the project)
        bound: of a layer's own error against torch, over the standard deviation of its values
        json: also write the trace to this file (default: do not)
    """

    project: Annotated[Path, Value(metavar="DIR", positional=True)]
    image: File | None = None
    task: Annotated[str, Value(metavar="TASK")] | None = None
    run: Folder | None = None
    bound: Annotated[float, Value(above_zero, "X")] = 0.1
    json: File | None = None


def run_trace(wanted: Trace) -> None:
    from m3vit.export.hls.tracing import trace
    from m3vit.files import write_json

    with progress_bar("tracing") as bar:
        found = trace(wanted.project, wanted.image, wanted.task, wanted.run, wanted.bound, bar)
    if wanted.json:
        write_json(wanted.json, found)
    print_trace(found)


def print_trace(found: dict[str, Any]) -> None:
    """Print a trace: a row for each layer."""
    from rich.table import Table

    torch, several = any("own" in layer for layer in found["layers"]), len(found["simulators"]) > 1
    caption = f"{found['image']}, task {found['task']}; {found['torch']}"
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
class Validate:
    """Options of m3vit hw validate.

    Attributes:
        json: also write the rows to this file (default: do not)
    """

    json: File | None = None


def run_validate(wanted: Validate) -> int:
    """Print what must agree; return 1 if anything does not."""
    from rich.table import Table

    from m3vit.files import write_json
    from m3vit.hw.validate import all_hold, plain, validate

    rows = validate()
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
    say(f"{len(rows) - out} of {len(rows)} agree" + (f", {out} are out" if out else ""))
    return 0 if all_hold(rows) else 1
