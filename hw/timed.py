"""Cycles of timed C-simulation: what loops and ports of the emitted C++ did, under assumptions. No torch.

The C++ (m3vit_timed.h) writes a record for each pass of a pipelined loop, with the actual routing of an image: its
trips, and the words and runs of words through each port. Time is made here, as often as wanted: another clock, depth,
latency or bus is another evaluation of the same records.

A pass takes trips times II; or, if that is more, what the busiest bus takes for its words (and `gap` for each run of
consecutive ones, which is a burst), or the memory for all bytes; and depth cycles to fill and drain the pipeline, once
the latency of a read if it reads, and what is left of a write's when the trips after the last write are done (requests
are made ahead within a pass). One pass follows the other: there is one program and no dataflow region.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m3vit.errors import InputError
from m3vit.hw.boards import Board
from m3vit.hw.cost import Assumptions
from m3vit.hw.hardware import Hardware
from m3vit.hw.isa import Instruction
from m3vit.hw.ops import ENGINES, OPS

# Ports by the AXI bus that they share (PORTS of m3vit.export.hls.multiplexed.sources), and those that write.
BUSES = {"image": "io", "output": "io", "gates": "tables", "params": "tables"}
WRITING = ("narrow_out", "wide", "more_wide", "output")  # a bus reads and writes at the same time


@dataclass(frozen=True)
class Timed:
    """What timing assumes: those of the closed form, and what differs by loop or bus.

    depths, iis: of loops that have another than base.depth, or than their pragma's. bus_bits: of the AXI buses, if
    narrower than the ports: a word then takes several beats. gap: cycles that a bus loses at each run. clock_mhz,
    bandwidth_gb_s: of the board, or others.
    """

    clock_mhz: int
    bandwidth_gb_s: float
    base: Assumptions = field(default_factory=Assumptions)
    depths: Mapping[str, int] = field(default_factory=dict)
    iis: Mapping[str, int] = field(default_factory=dict)
    bus_bits: int | None = None
    gap: int = 0

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self.base), **{key: value for key, value in vars(self).items() if key != "base"}}


@dataclass(frozen=True)
class Trace:
    """Records of frames: for each pass `frame`, `pc`, `loop`, `ii`, `trips`, `written` (the last trip that wrote, from
    1 on; 0: none), and of each port `words` and `runs`."""

    loops: list[str]
    ports: list[str]
    records: np.ndarray

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """Read what the timed test bench wrote. Raises InputError for anything else."""
        try:
            with open(path, "rb") as file:
                names = json.loads(file.readline())
                kind = np.dtype(
                    [(name, "<u4") for name in ("frame", "pc", "loop", "ii", "trips", "written")]
                    + [(name, "<u4", (len(names["ports"]),)) for name in ("words", "runs")]
                )
                data = file.read()
            return cls(names["loops"], names["ports"], np.frombuffer(data, kind))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a trace of timed C-simulation ({error}): run m3vit hw csim --timed"
            ) from None

    def of_frame(self, frame: int) -> "Trace":
        """Return the records of one frame."""
        return Trace(self.loops, self.ports, self.records[self.records["frame"] == frame])

    def widths(self, hardware: Hardware) -> np.ndarray:
        """Return the bytes of a word of each port, int64 [ports]."""
        return np.array([hardware.pixels if port == "image" else hardware.port_bits // 8 for port in self.ports])

    def shifted(self, start: int) -> "Trace":
        """Return it with `pc` counted from an instruction: that of the program's start."""
        records = self.records.copy()
        records["pc"] -= start
        return Trace(self.loops, self.ports, records)

    def bytes(self, hardware: Hardware) -> np.ndarray:
        """Return the bytes of each pass and port, int64 [passes, ports]."""
        return self.records["words"].astype(np.int64) * self.widths(hardware)


@dataclass(frozen=True)
class Cycles:
    """Of each pass of a trace: `total`, the `loops` alone, the busiest `bus` alone, and the `memory` alone."""

    total: np.ndarray
    loops: np.ndarray
    bus: np.ndarray
    memory: np.ndarray


def evaluate(trace: Trace, hardware: Hardware, assumed: Timed) -> Cycles:
    """Return the cycles of each pass."""
    records, words = trace.records, trace.records["words"].astype(np.int64)
    gaps = assumed.gap * records["runs"].astype(np.int64)
    changed = np.array([assumed.iis.get(name, 0) for name in trace.loops])[records["loop"]]
    iis = np.where(changed > 0, changed, records["ii"])
    loops = records["trips"].astype(np.int64) * iis
    after = (records["trips"].astype(np.int64) - records["written"]) * iis  # the last write
    widths, bits = 8 * trace.widths(hardware), assumed.bus_bits or hardware.port_bits
    buses: dict[str, np.ndarray] = {}
    for place, port in enumerate(trace.ports):
        bus, beats = BUSES.get(port, port), -(-widths[place] // bits)
        buses[bus] = buses.get(bus, 0) + words[:, place] * beats + gaps[:, place]
    busiest = np.max(list(buses.values()), axis=0)
    a_cycle = assumed.bandwidth_gb_s * 1e3 * assumed.base.efficiency / assumed.clock_mhz
    memory = np.ceil(trace.bytes(hardware).sum(axis=1) / a_cycle).astype(np.int64)
    depths = np.array([assumed.depths.get(name, assumed.base.depth) for name in trace.loops])
    writing = np.array([port in WRITING for port in trace.ports])
    reads, writes = (words[:, chosen].any(axis=1) for chosen in (~writing, writing))
    answers = writes * np.maximum(assumed.base.write - after, 0)
    waits = depths[records["loop"]] + reads * assumed.base.read + answers
    return Cycles(np.maximum(np.maximum(loops, busiest), memory) + waits, loops, busiest, memory)


def by_instruction(trace: Trace, cycles: Cycles, program: Sequence[Instruction]) -> list[dict[str, Any]]:
    """Return the cycles of each instruction of one frame, fetches included, and of the loops in it."""
    pcs, names = trace.records["pc"], np.array(trace.loops)
    entries = []
    for pc, instruction in enumerate(program):
        own = pcs == pc
        loops = {}
        for loop in np.unique(trace.records["loop"][own]):
            chosen = own & (trace.records["loop"] == loop)
            loops[str(names[loop])] = {
                "passes": int(chosen.sum()),
                "trips": int(trace.records["trips"][chosen].sum()),
                "cycles": int(cycles.total[chosen].sum()),
            }
        entries.append(
            {
                "pc": pc,
                "op": instruction.op.name.lower(),
                "engine": OPS[instruction.op].engine,
                "cycles": int(cycles.total[own].sum()),
                "loops_cycles": int(cycles.loops[own].sum()),
                "loops": loops,
            }
        )
    return entries


def frame_report(
    trace: Trace, program: Sequence[Instruction], hardware: Hardware, assumed: Timed, task: str
) -> dict[str, Any]:
    """Return what one frame takes, as JSON values: cycles by instruction and engine, bytes and runs by port."""
    cycles = evaluate(trace, hardware, assumed)
    instructions = by_instruction(trace, cycles, program)
    total, per_ms = int(cycles.total.sum()), assumed.clock_mhz * 1e3
    engines = {
        engine: sum(entry["cycles"] for entry in instructions if entry["engine"] == engine) for engine in ENGINES
    }
    bytes_ = trace.bytes(hardware).sum(axis=0)
    words, runs = (trace.records[name].astype(np.int64).sum(axis=0) for name in ("words", "runs"))
    return {
        "task": task,
        "cycles": total,
        "ms": total / per_ms,
        "loops_ms": int(cycles.loops.sum()) / per_ms,
        "waiting_for_buses": int((cycles.bus > cycles.loops).sum()),
        "waiting_for_memory": int((cycles.memory > np.maximum(cycles.loops, cycles.bus)).sum()),
        "passes": len(trace.records),
        "engines": {engine: {"cycles": count, "ms": count / per_ms} for engine, count in engines.items() if count},
        "ports": {
            port: {"bytes": int(bytes_[place]), "words": int(words[place]), "runs": int(runs[place])}
            for place, port in enumerate(trace.ports)
            if runs[place]
        },
        "instructions": instructions,
    }


def assumed_of(board: Board, clock_mhz: int) -> Timed:
    """Return the assumptions for a board at a clock."""
    return Timed(clock_mhz, board.bandwidth_gb_s)


def assumptions_said(trace: Trace, assumed: Timed) -> list[str]:
    """Return lines with every II, depth and latency that is assumed."""
    kinds: dict[tuple[int, int], list[str]] = {}
    for loop, ii in sorted({(int(loop), int(ii)) for loop, ii in trace.records[["loop", "ii"]].tolist()}):
        name = trace.loops[loop]
        kinds.setdefault((assumed.iis.get(name, ii), assumed.depths.get(name, assumed.base.depth)), []).append(name)
    loops = "; ".join(f"II {ii} and depth {depth}: {', '.join(names)}" for (ii, depth), names in kinds.items())
    bus = f"buses of {assumed.bus_bits} bits" if assumed.bus_bits else "buses as wide as the ports"
    base = assumed.base
    return [
        f"assumed of loops (their pragmas' II, not met for sure): {loops}",
        f"assumed of memory: {base.read} cycles to a pass's first word, {base.write} to the answer of its last write, "
        f"requests made ahead, {bus}, {assumed.gap} cycles lost at each run of consecutive words, "
        f"{base.efficiency:.0%} of {assumed.bandwidth_gb_s:g} GB/s at {assumed.clock_mhz} MHz",
    ]
