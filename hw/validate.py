"""Numbers that must agree, from levels that do not know each other: `m3vit hw validate`. No torch."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from m3vit.hw.published import (
    EDGE_MOE_MS,
    EDGE_MOE_QUEUES,
    HG_PIPE,
    TABLE4_MIB,
    TABLE4_MS,
    TOKENS,
    EdgeMoe,
    Table4,
)

ROW, REORDERING = 0.007, 0.0003  # of a row of table 4, and of what its memory and its reordering alone explain
EDGE_MOE = (-0.10, 0.05)
TABLE4, MEASURED = Table4(), EdgeMoe()
HALF = (0.45, 0.55)
TIMED, RTL, INTERVAL = 0.05, 0.005, 0.01
AT_BANDWIDTH = 0.08  # timed C-simulation spreads a pass's bytes over it, the RTL waits where it needs them


class Row(NamedTuple):
    """One number of ours against another: `low` to `high` is where ours over theirs, less 1, has to be."""

    what: str
    unit: str
    ours: float
    our_level: str
    theirs: float
    their_level: str
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.ours / self.theirs - 1

    @property
    def holds(self) -> bool:
        return self.low <= self.difference <= self.high


def table4_rows(model: Table4 = TABLE4) -> Iterator[Row]:
    """Yield M3ViT's table 4: its rows, and what reordering is in them."""
    levels = {"dense": model.dense_ms, "experts, reordered": model.reordered_ms}
    ours, theirs = "modelled: reproduces the paper's model", "estimated by its authors"

    def row(what: str, unit: str, found: float, printed: float, within: float) -> Row:
        return Row(f"M3ViT table 4, {what}", unit, found, ours, printed, theirs, -within, within)

    for name, printed in TABLE4_MS.items():
        for data, tokens in TOKENS.items():
            found = levels[name](tokens) if name in levels else model.reordered_ms(tokens) + model.penalty_ms(tokens)
            yield row(f"{name}, {data}", "ms", found, printed[data], ROW)
    whole = TABLE4_MIB["reordered"] + model.experts_mib
    yield row("memory with all experts", "MiB", whole, TABLE4_MIB["all experts"], REORDERING)
    for data, tokens in TOKENS.items():
        slow, fast = (TABLE4_MS[f"experts, {name}"][data] for name in ("not reordered", "reordered"))
        yield row(f"what reordering saves, {data}", "ms", model.penalty_ms(tokens), slow - fast, REORDERING)


def edge_moe_rows(model: EdgeMoe = MEASURED) -> Iterator[Row]:
    """Yield Edge-MoE's latency by its structure, and attention's share of it, which its paper calls half."""
    ours = "modelled from its source, nothing fitted"
    for name, queues in EDGE_MOE_QUEUES.items():
        what = f"Edge-MoE, ZCU102, {name}"
        yield Row(what, "ms", model.ms(queues), ours, EDGE_MOE_MS, "measured by its authors", *EDGE_MOE)
    cycles = model.cycles(EDGE_MOE_QUEUES["task 0"])
    share = (cycles["queries x keys"] + cycles["weights x values"]) / sum(cycles.values())
    low, high = (end / 0.5 - 1 for end in HALF)
    yield Row("Edge-MoE, share of attention's products", "", share, ours, 0.5, 'published: "half"', low, high)


def hg_pipe_rows() -> Iterator[Row]:
    """Yield the cycles between frames of HG-PIPE's blocks: a loop's trips, and the one that ends it."""
    for block, (trips, rtl) in HG_PIPE.items():
        levels = (trips + 1, "modelled: trips and one", rtl, "RTL (Verilator)")
        yield Row(f"HG-PIPE, {block}, between frames", "cycles", *levels, -INTERVAL, INTERVAL)


def timed_rows(name: str, report: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the cycles of a project's timed C-simulation (m3vit.export.hls.multiplexed.timing) beside the closed form
    of the same routing: of each task's frame and of each engine in it."""
    per_ms = report["clock_mhz"] * 1e3
    for task, found in report["tasks"].items():
        parts = {"frame": (found["cycles"], found["modelled_cycles"])}
        parts |= {engine: (entry["cycles"], entry["modelled_cycles"]) for engine, entry in found["engines"].items()}
        for part, (timed, modelled) in parts.items():
            levels = (timed / per_ms, "timed C-sim", modelled / per_ms, "modelled, the same routing")
            yield Row(f"{name}, {task}, {part}", "ms", *levels, -TIMED, TIMED)


def rtl_rows(name: str, report: Mapping[str, Any]) -> Iterator[Row]:
    """Yield of each layer with experts the cycles of timed C-simulation beside those of the expert engine's RTL
    (m3vit.export.hls.multiplexed.rtl), both with the RTL's depths."""
    per_ms, levels = report["clock_mhz"] * 1e3, ("timed C-sim with the RTL's depths", "RTL (Verilator)")
    for layer in report["layers"]:
        what = f"{name}, {report['task']}, experts {layer['layer']}"
        for case, within in ((layer, RTL), (layer["at_bandwidth"], AT_BANDWIDTH)):
            timed, cycles = case["timed_cycles"] / per_ms, case["cycles"] / per_ms
            yield Row(what, "ms", timed, levels[0], cycles, levels[1], -within, within)
            what += ", at the board's bandwidth"


def validate(
    projects: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    engines: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> list[Row]:
    """Return all rows; projects: timed C-simulations by name, engines: what the RTL of their experts did."""
    timed = [row for name, report in projects.items() for row in timed_rows(name, report)]
    rtl = [row for name, report in engines.items() for row in rtl_rows(name, report)]
    return [*table4_rows(), *edge_moe_rows(), *hg_pipe_rows(), *timed, *rtl]


def plain(rows: list[Row]) -> dict[str, Any]:
    """Return rows as JSON values."""
    entries = [{**row._asdict(), "difference": row.difference, "holds": row.holds} for row in rows]
    return {"note": "nothing was synthesised, nothing ran on a board", "rows": entries, "hold": all_hold(rows)}


def all_hold(rows: list[Row]) -> bool:
    """Return whether no row is out."""
    return all(row.holds for row in rows)
