"""A timeline of one frame of timed C-simulation: when each engine works, and when each port moves words."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from m3vit.errors import InputError
from m3vit.export.hls.contents import open_project
from m3vit.export.hls.edits import hardware_of
from m3vit.export.hls.multiplexed.timing import assumptions, recorded, traced
from m3vit.files import atomic_path
from m3vit.hw.isa import Instruction
from m3vit.hw.ops import ENGINES, OPS
from m3vit.hw.timed import Cycles, Trace, evaluate

FORMS = (".png", ".svg", ".pdf")
BINS = 600  # of a frame, in which a port's share of busy cycles is shown


def check_form(path: Path) -> None:
    """Raise InputError for a picture of another form."""
    if path.suffix not in FORMS:
        raise InputError(f"--timeline {path}: give a name that ends in {', '.join(FORMS)}")


def draw(path: Path, trace: Trace, cycles: Cycles, program: list[Instruction], clock_mhz: int, title: str) -> None:
    """Draw one frame's records. Loads and computation overlap within a pass: a port's line is dark where it moves a
    word in every cycle."""
    ends = np.cumsum(cycles.total)
    starts, per_ms = ends - cycles.total, clock_mhz * 1e3
    engines = [OPS[program[pc].op].engine if pc < len(program) else "" for pc in range(len(program) + 1)]
    used = [port for place, port in enumerate(trace.ports) if trace.records["words"][:, place].any()]
    rows = [*ENGINES, *used]
    figure = Figure(figsize=(12, 0.36 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for row, engine in enumerate(ENGINES):
        chosen = np.array([engines[min(pc, len(program))] == engine for pc in trace.records["pc"]])
        spans = list(zip(starts[chosen] / per_ms, cycles.total[chosen] / per_ms, strict=True))
        axes.broken_barh(spans, (row - 0.4, 0.8), color=f"C{row}", linewidth=0)
    edges = np.linspace(0, ends[-1], BINS + 1)
    for row, port in enumerate(used, start=len(ENGINES)):
        # Words of a pass are spread evenly over it.
        moved = np.concatenate([[0], np.cumsum(trace.records["words"][:, trace.ports.index(port)].astype(np.float64))])
        share = np.diff(np.interp(edges, np.concatenate([[0], ends]), moved)) / np.diff(edges)
        shown = np.clip(share, 0, 1)[None]
        extent = (0, ends[-1] / per_ms, row + 0.4, row - 0.4)
        axes.imshow(shown, extent=extent, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlim=(0, ends[-1] / per_ms), ylim=(len(rows) - 0.5, -0.5), xlabel="ms", title=title)
    axes.set_yticks(range(len(rows)), [*ENGINES, *(f"port {port}" for port in used)])
    axes.axhline(len(ENGINES) - 0.5, color="0.5", linewidth=0.8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120)


def timeline(project: Path, given: Mapping[str, int | None], path: Path) -> None:
    """Draw the first frame that was recorded of a project; given: as of m3vit.export.hls.multiplexed.timing."""
    manifest, _ = open_project(project)
    assumed, _ = assumptions(project, manifest, given)
    trace, program = traced(project, recorded(project))
    trace = trace.of_frame(0)
    cycles = evaluate(trace, hardware_of(project, manifest), assumed)
    title = f"timed C-simulation, {assumed.clock_mhz} MHz, task {manifest['tasks'][0]['name']}"
    draw(path, trace, cycles, program, assumed.clock_mhz, title)
