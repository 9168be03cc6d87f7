"""The report's hardware section: what a multiplexed project takes of its board, each figure with its level."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from m3vit.errors import InputError
from m3vit.export.hls.multiplexed.costing import of_project
from m3vit.export.hls.multiplexed.rtl import left
from m3vit.export.hls.multiplexed.timing import RECORD, evaluated, recorded
from m3vit.hw.boards import find_board
from m3vit.hw.ops import ENGINES
from m3vit.hw.validate import validate
from m3vit.report import charts

NAMES = {"dsp": "DSP", "bram36": "BRAM36", "uram": "URAM", "lut": "LUT"}
COLOURS = {engine: f"C{place}" for place, engine in enumerate(ENGINES)}


def hardware_part(project: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the page shows of a project's hardware, or None for a schedule that is not modelled.

    levels: ms of each task by level; published: rows of m3vit hw validate; charts with captions; json:
    the figures.
    """
    if manifest.get("schedule") != "multiplexed":
        return None
    tasks = [entry["name"] for entry in manifest["tasks"]]
    try:
        modelled = {task: of_project(project, None, task) for task in tasks}
        timed = evaluated(project, recorded(project)) if (project / RECORD).exists() else None
    except InputError as error:
        return {"note": str(error)}
    first = modelled[tasks[0]]
    shown = f"{first['board']} at {first['clock_mhz']} MHz"
    levels = {task: {"modelled": report["ms"]} for task, report in modelled.items()}
    latency: dict[str, dict[str, float]] = {
        f"{task}, modelled": {engine: part["ms"] for engine, part in report["engines"].items()}
        for task, report in modelled.items()
    }
    if timed:
        per_ms = timed["clock_mhz"] * 1e3
        for task, found in timed["tasks"].items():
            levels[task] |= {
                "modelled, the same routing": found["modelled_cycles"] / per_ms,
                "timed C-sim": found["ms"],
            }
            latency[f"{task}, timed C-sim"] = {engine: part["ms"] for engine, part in found["engines"].items()}
    latency = {key: latency[key] for task in tasks for key in latency if key.rpartition(",")[0] == task}
    published = [
        {
            "what": row.what,
            "ours": f"{row.ours:.4g} {row.unit} ({row.our_level})".replace("  ", " "),
            "theirs": f"{row.theirs:.4g} {row.unit} ({row.their_level})".replace("  ", " "),
            "difference": row.difference,
        }
        for row in validate()
    ]
    traffic, rtl = {"modelled": by_kind(first["bytes"])}, rtl_part(project)
    if timed:
        ports = timed["tasks"][tasks[0]]["ports"]
        traffic["timed C-sim"] = by_kind({port: entry["bytes"] for port, entry in ports.items()})
    return {
        "note": "",
        "board": shown,
        "columns": list(levels[tasks[0]]),
        "levels": levels,
        "published": published,
        "rtl": rtl,
        "without": "" if timed else f"No timed C-simulation: m3vit hw csim {project} --timed.",
        "charts": [
            ("What the engines take of the board, modelled; the line is what may be taken of it.", budget_chart(first)),
            ("A frame by engine, ms.", latency_chart(latency)),
            (
                "Roofline, modelled, first task: each engine's products a second over those it makes of a byte. An "
                "engine below both roofs waits for its own loops.",
                roofline_chart(first),
            ),
            (
                "Traffic of a frame by what it is of, first task: ports that move the same kind of values together.",
                traffic_chart(traffic),
            ),
        ],
        "json": {
            "board": first["board"],
            "clock_mhz": first["clock_mhz"],
            "levels": levels,
            "resources": first["resources"],
            "budget": first["budget"],
            "bytes": traffic,
            "latency_ms": latency,
            "rtl": rtl,
        },
    }


def rtl_part(project: Path) -> dict[str, Any] | None:
    """Return what `m3vit hw rtl` last left: the task, and of each layer with experts its cycles by level."""
    found = left(project)
    if not found:
        return None
    return {
        "task": found["task"],
        "depth": max(found["depths"].values()),
        "layers": [
            {
                "layer": layer["layer"],
                "different": layer["different"],
                "modelled": layer["modelled_cycles"],
                "timed": layer["timed_as_assumed_cycles"],
                "timed with the RTL's depths": layer["timed_cycles"],
                "rtl": layer["cycles"],
            }
            for layer in found["layers"]
        ],
    }


def by_kind(ports: dict[str, int]) -> dict[str, int]:
    """Return bytes by what they are of: the closed form and the C++ have different ports for narrow and wide values."""
    kinds = {"weights": "weights", "keys": "narrow", "narrow": "narrow", "wide": "wide"}
    found: dict[str, int] = {}
    for port, count in ports.items():
        kind = next((kinds[key] for key in kinds if key in port), port)
        found[kind] = found.get(kind, 0) + count
    return found


def budget_chart(report: dict[str, Any]) -> str:
    """Draw the modelled resources as shares of the board's."""
    board = find_board(report["board"])
    kinds = [kind for kind in NAMES if getattr(board, kind)]
    figure, axes = plt.subplots(figsize=(6.2, 0.34 * len(kinds) + 0.5))
    for row, kind in enumerate(kinds):
        used, whole, may = report["resources"][kind], getattr(board, kind), report["budget"][kind]
        axes.barh(row, 100 * used / whole, color=charts.STRONG if used <= may else charts.WARNING, height=0.62)
        axes.plot([100 * may / whole] * 2, [row - 0.4, row + 0.4], color="black", linewidth=1.2)
        axes.text(101, row, f"{used:,} of {whole:,}", va="center")
    axes.set(xlim=(0, 100), xlabel=f"% of {report['board']}")
    axes.set_yticks(range(len(kinds)), [NAMES[kind] for kind in kinds])
    axes.invert_yaxis()
    return charts.svg(figure)


def latency_chart(latency: dict[str, dict[str, float]]) -> str:
    """Draw a bar for each task and level, made of its engines."""
    figure, axes = plt.subplots(figsize=(7.2, 0.34 * len(latency) + 0.9))
    for row, engines in enumerate(latency.values()):
        left = 0.0
        for engine, ms in engines.items():
            axes.barh(row, ms, left=left, color=COLOURS[engine], height=0.66)
            left += ms
        axes.text(left, row, f" {left:.3g}", va="center")
    used = [engine for engine in ENGINES if any(engine in engines for engines in latency.values())]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[engine]) for engine in used]
    axes.legend(handles, used, ncols=len(used), frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    axes.set_yticks(range(len(latency)), list(latency))
    axes.set_xlabel("ms")
    axes.invert_yaxis()
    return charts.svg(figure)


def roofline_chart(report: dict[str, Any]) -> str:
    """Draw products a second against products a byte: an engine each, under the array's and the memory's roof."""
    board, clock = find_board(report["board"]), report["clock_mhz"] * 1e6
    engines = {name: part for name, part in report["engines"].items() if part["macs"] and part["bytes"]}
    peak = max(part["products_a_cycle"] for part in engines.values()) * clock / 1e9
    bandwidth = board.bandwidth_gb_s * report["assumed"]["efficiency"]
    points = {name: (part["macs"] / part["bytes"], part["macs"] / part["ms"] / 1e6) for name, part in engines.items()}
    ridge = peak / bandwidth
    low = min([ridge / 4, *(x / 2 for x, _ in points.values())])
    high = max([ridge * 4, *(x * 2 for x, _ in points.values())])
    figure, axes = plt.subplots(figsize=(5.6, 3.0))
    axes.loglog([low, ridge, high], [low * bandwidth, peak, peak], color="black", linewidth=1.2)
    for name, (x, y) in points.items():
        axes.loglog([x], [y], "o", color=COLOURS[name])
        axes.annotate(name, (x, y), xytext=(5, -3), textcoords="offset points")
    axes.annotate(f"array, {peak:.0f} GMAC/s", (high, peak), ha="right", va="bottom")
    axes.annotate(
        f"memory, {bandwidth:.1f} GB/s",
        (low, low * bandwidth),
        rotation=0,
        va="top",
        ha="left",
        xytext=(8, 0),
        textcoords="offset points",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="products a byte", ylabel="GMAC/s", xlim=(low, high))
    return charts.svg(figure)


def traffic_chart(traffic: dict[str, dict[str, int]]) -> str:
    """Draw the megabytes of each port, a bar for each level."""
    ports = [port for port in next(iter(traffic.values())) if any(level.get(port) for level in traffic.values())]
    figure, axes = plt.subplots(figsize=(6.2, 0.3 * len(ports) * len(traffic) + 0.7))
    height = 0.8 / len(traffic)
    for place, (level, counts) in enumerate(traffic.items()):
        rows = [row + (place - (len(traffic) - 1) / 2) * height for row in range(len(ports))]
        values = [counts.get(port, 0) / 1e6 for port in ports]
        axes.barh(rows, values, height=height, label=level, color=(charts.STRONG, charts.PALE)[place])
        for row, value in zip(rows, values, strict=True):
            axes.text(value, row, f" {value:.3g}", va="center")
    axes.set_yticks(range(len(ports)), ports)
    axes.set_xlabel("MB")
    axes.legend(frameon=False)
    axes.invert_yaxis()
    return charts.svg(figure)
