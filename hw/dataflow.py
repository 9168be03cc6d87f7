"""Cycles of dataflow regions: what processes and FIFOs did in timed C-simulation, under assumptions. No torch.

m3vit/hw/include/dataflow/hls_stream.h says the rules, keeps them while the C++ runs, and writes down for each process
the loops that it passed through and its accesses to FIFOs, without cycles. `evaluate` makes cycles of it again, for
other IIs, pipelines and depths, for as many frames as wanted; no C++ is run.

An access has a cycle in its process without stalls. A process goes on as a whole: the accesses of one such cycle happen
in the first cycle in which all of them can, and what comes later comes that much later. So a frame is a graph of
accesses; it is walked process by process until nobody can go on, which is its end or a deadlock.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from m3vit.errors import InputError

PASS = np.dtype([("process", "<i4"), ("loop", "<i4"), ("trips", "<i8"), ("ii", "<u4")], align=True)
ACCESS = np.dtype([("pass", "<u4"), ("fifo", "<u4"), ("late", "<u4"), ("iteration", "<u4")])
OUTSIDE = -1  # the loop of what is outside of loops: its trips are cycles


class Stuck(NamedTuple):
    """A process of a deadlock: what it does to which FIFO (of which depth), and who would have to act."""

    process: str
    does: str
    fifo: str
    depth: int
    waits_for: str

    def __str__(self) -> str:
        why = f"full at depth {self.depth}" if self.does == "writes" else "empty"
        return f"{self.process} {self.does} {self.fifo}, {why}: it waits for {self.waits_for or 'its other end'}"


class DeadlockError(InputError):
    """Processes that wait for each other; `stuck` names them and their FIFOs."""

    def __init__(self, stuck: Sequence[Stuck]) -> None:
        self.stuck = list(stuck)
        full = [one for one in self.stuck if one.does == "writes"]
        rest = len(self.stuck) - len(full)
        others = f"; {rest} more wait for words" if full and rest else ""
        super().__init__("deadlock: " + "; ".join(map(str, full or self.stuck)) + others)


@dataclass(frozen=True)
class Fifo:
    """A FIFO: its depth (0: none, it leads to or from outside), the places of its writer and reader (-1: outside)."""

    name: str
    depth: int
    writer: int
    reader: int


@dataclass(frozen=True)
class Recording:
    """What one frame's processes did.

    loops: II, depth and stage of reading of each pipelined loop, as they were assumed. frames: that were run. timed:
    the C++ asked whether a FIFO was full or empty, so what it did is of these cycles only. end: when the last process
    was ready for another frame. cycles: of each FIFO that leads outside, the cycle of each write, of all frames.
    stalls: of each FIFO, cycles that its reader and its writer stood still for it.
    """

    fifos: list[Fifo]
    processes: list[str]
    loops: dict[int, tuple[int, int, int]]
    passes: np.ndarray
    accesses: np.ndarray
    frames: int
    timed: bool
    end: int
    cycles: dict[str, np.ndarray]
    stalls: dict[str, tuple[int, int]]

    @classmethod
    def read(cls, path: Path) -> "Recording":
        """Read what an instrumented program wrote. Raises DeadlockError if it ended in one, InputError for others."""
        try:
            return cls.parse(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except DeadlockError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a recording of timed C-simulation ({error})") from None

    @classmethod
    def parse(cls, content: bytes) -> "Recording":
        """Return what an instrumented program wrote. Raises DeadlockError, and ValueError or the like for others."""
        line, _, data = content.partition(b"\n")
        head = json.loads(line)
        passes = np.frombuffer(data, PASS, head["passes"])
        accesses = np.frombuffer(data, ACCESS, head["accesses"], passes.nbytes)
        fifos = [Fifo(one["name"], one["depth"], one["writer"], one["reader"]) for one in head["fifos"]]
        recording = cls(
            fifos,
            [one["name"] for one in head["processes"]],
            {loop: (ii, depth, first) for loop, ii, depth, first in head["loops"]},
            passes,
            accesses,
            head["frames"],
            head["dynamic"],
            max((one["end"] for one in head["processes"]), default=0),
            {one["name"]: np.array(one["cycles"]) for one in head["fifos"] if "cycles" in one},
            {one["name"]: (one["empty"], one["full"]) for one in head["fifos"]},
        )
        if head["deadlock"]:
            raise DeadlockError([Stuck(*one) for one in head["deadlock"]])
        return recording


@dataclass(frozen=True)
class Program:
    """One process: its accesses by cycle without stalls, where the next frame may begin, and its trips by loop."""

    local: list[int]
    fifo: list[int]
    write: list[bool]
    again: int
    trips: dict[int, int]


@dataclass(frozen=True)
class Timing:
    """Cycles of the writes and reads of each FIFO, all frames; of its stalls those of its reader and of its writer."""

    fifos: list[Fifo]
    wrote: list[np.ndarray]
    taken: list[np.ndarray]
    stalls: list[tuple[int, int]]
    frames: int

    def held(self) -> list[int]:
        """Return the most words that each FIFO holds at the beginning of a cycle (0 of those from or to outside)."""
        most = []
        for fifo, wrote, taken in zip(self.fifos, self.wrote, self.taken, strict=True):
            before = np.searchsorted(taken, wrote, side="right")  # taken when a word has been written
            most.append(int((np.arange(1, len(wrote) + 1) - before).max(initial=0)) if fifo.depth else 0)
        return most

    def of_outputs(self) -> "Outputs":
        """Return when the frames left, by the FIFO that leads outside and ends last."""
        own = [
            place for place, fifo in enumerate(self.fifos) if not fifo.depth and fifo.reader < 0 and fifo.writer >= 0
        ]
        if not own:
            raise InputError("no FIFO leads outside: nothing says when a frame ends")
        return outputs_of(max((self.wrote[place] for place in own), key=lambda cycles: int(cycles[-1])), self.frames)


class Outputs(NamedTuple):
    """Cycles from the start: first word, last word of the first frame; between the ends of the last two frames (0: of
    one frame)."""

    first: int
    latency: int
    interval: int


def outputs_of(cycles: np.ndarray, frames: int) -> Outputs:
    """Return these three of the cycles of all words of some frames."""
    ends = cycles.reshape(frames, -1)[:, -1]
    return Outputs(int(cycles[0]), int(ends[0]), int(ends[-1] - ends[-2]) if frames > 1 else 0)


def programs(recording: Recording, loops: Mapping[int, tuple[int, int]] = MappingProxyType({})) -> list[Program]:
    """Return what each process does, by its own cycles. loops: II and depth of those that have others than recorded."""
    passes, accesses = recording.passes, recording.accesses
    order = np.argsort(accesses["pass"], kind="stable")
    ends = np.searchsorted(accesses["pass"][order], np.arange(len(passes) + 1))
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in recording.processes]
    starts, again = [0] * len(parts), [0] * len(parts)
    trips: list[dict[int, int]] = [{} for _ in parts]
    counts = [0] * len(parts)
    for place, (process, loop, times, ii) in enumerate(passes.tolist()):
        own = accesses[order[ends[place] : ends[place + 1]]]
        begin, counts[process] = starts[process], counts[process] + 1
        if loop == OUTSIDE:
            local = begin + own["iteration"].astype(np.int64)
            starts[process] = again[process] = begin + times
        else:
            _, depth, first = recording.loops[loop]
            ii, depth = loops.get(loop, (ii, depth))
            begins = _begins(own, ii, times)
            stage = np.where(own["fifo"] & 1, depth - 1, min(first, depth - 1))
            local = begin + begins[own["iteration"]] + stage + own["late"]
            last = begin + int(begins[-1])
            starts[process] = last + max(depth, ii) + 1
            # One loop and nothing else: the next frame follows as the next iteration would, after the one that ends it.
            again[process] = last + ii + 1 if counts[process] == 1 else starts[process]
            trips[process][loop] = trips[process].get(loop, 0) + times
        parts[process].append((local, own["fifo"]))
    found = []
    for process, pieces in enumerate(parts):
        local = np.concatenate([piece[0] for piece in pieces]) if pieces else np.zeros(0, np.int64)
        fifo = np.concatenate([piece[1] for piece in pieces]) if pieces else np.zeros(0, np.uint32)
        by_cycle = np.argsort(local, kind="stable")
        local, fifo = local[by_cycle], fifo[by_cycle]
        found.append(
            Program(
                local.tolist(),
                (fifo >> 1).tolist(),
                (fifo & 1).astype(bool).tolist(),
                again[process] if counts[process] == 1 else starts[process],
                trips[process],
            )
        )
    return found


def _begins(own: np.ndarray, ii: int, trips: int) -> np.ndarray:
    """Return when each iteration of a pass begins: II apart, or as often as it accesses one FIFO."""
    if not len(own):
        return ii * np.arange(trips)
    gaps = np.full(trips, ii, np.int64)
    pairs, times = np.unique(np.stack([own["iteration"], own["fifo"]]), axis=1, return_counts=True)
    np.maximum.at(gaps, pairs[0], times)
    return np.concatenate([[0], np.cumsum(gaps[:-1])])


@dataclass
class _Process:
    place: int = 0
    frame: int = 0
    at: int = 0  # the last cycle in which something happened
    local: int = 0  # the same without stalls
    restart: int | None = None


@dataclass
class _State:
    fifos: list[Fifo]
    wrote: list[list[int]] = field(default_factory=list)
    taken: list[list[int]] = field(default_factory=list)
    stalls: list[list[int]] = field(default_factory=list)


def evaluate(
    recording: Recording,
    frames: int = 1,
    depths: Mapping[str, int] = MappingProxyType({}),
    loops: Mapping[int, tuple[int, int]] = MappingProxyType({}),
) -> Timing:
    """Return the cycles of some frames like the recorded one, each as early as the one before lets it.

    depths: of FIFOs, by name, that have others than recorded. loops: see `programs`. Raises DeadlockError,
    and InputError for a recording that holds for its own cycles alone.
    """
    if recording.timed:
        raise InputError(
            "the C++ asks whether FIFOs are full or empty, so what it does depends on cycles: run it again"
        )
    fifos = [_with(fifo, depths) for fifo in recording.fifos]
    work = programs(recording, loops)
    state = _State(fifos, [[] for _ in fifos], [[] for _ in fifos], [[0, 0] for _ in fifos])
    processes = [_Process() for _ in work]
    waiting: dict[int, list[int]] = {}  # FIFO: processes that wait for something to happen to it
    ready = [number for number, program in enumerate(work) if program.local]
    while ready:
        number = ready.pop()
        needs = _advance(work[number], processes[number], state, frames, waiting, ready)
        if needs is not None:
            waiting.setdefault(needs, []).append(number)
    if stuck := [(number, fifo) for fifo, numbers in waiting.items() for number in numbers]:
        raise DeadlockError([_stuck(recording, fifos, work[n], processes[n], n, fifo) for n, fifo in stuck])
    wrote, taken = ([np.array(cycles, np.int64) for cycles in side] for side in (state.wrote, state.taken))
    return Timing(fifos, wrote, taken, [(empty, full) for empty, full in state.stalls], frames)


def _with(fifo: Fifo, depths: Mapping[str, int]) -> Fifo:
    return Fifo(fifo.name, depths.get(fifo.name, fifo.depth) if fifo.depth else 0, fifo.writer, fifo.reader)


def _advance(
    program: Program,
    process: _Process,
    state: _State,
    frames: int,
    waiting: dict[int, list[int]],
    ready: list[int],
) -> int | None:
    """Let a process go on as far as it can; return the FIFO that it then waits for, or None at its end."""
    local, fifo_of, write_of = program.local, program.fifo, program.write
    wrote, taken, fifos = state.wrote, state.taken, state.fifos
    count = len(local)
    while True:
        if process.restart is None and (process.place == count or local[process.place] >= program.again):
            process.restart = process.at + program.again - process.local
        if process.place == count:
            process.frame += 1
            if process.frame == frames:
                return None
            process.at, process.local, process.place = process.restart or 0, 0, 0
            process.restart = None
            continue
        due = local[process.place]
        unhindered = cycle = process.at + due - process.local
        slowest, end = -1, process.place
        done: dict[tuple[int, bool], int] = {}
        while end < count and local[end] == due:
            fifo, write = fifo_of[end], write_of[end]
            own = done.get((fifo, write), 0)
            depth = fifos[fifo].depth
            if write:
                number = len(wrote[fifo]) + own - depth
                if depth and number >= 0:
                    if number >= len(taken[fifo]):
                        return fifo
                    possible = taken[fifo][number] + 1
                else:
                    possible = 0
            elif fifos[fifo].writer < 0:
                possible = 0
            else:
                number = len(taken[fifo]) + own
                if number >= len(wrote[fifo]):
                    return fifo
                possible = wrote[fifo][number] + 1
            if possible > cycle:
                cycle, slowest = possible, end
            done[fifo, write] = own + 1
            end += 1
        for place in range(process.place, end):
            fifo = fifo_of[place]
            (wrote if write_of[place] else taken)[fifo].append(cycle)
            if fifo in waiting:
                ready += waiting.pop(fifo)
        if slowest >= 0:
            state.stalls[fifo_of[slowest]][write_of[slowest]] += cycle - unhindered
        process.at, process.local, process.place = cycle, due, end


def _stuck(
    recording: Recording, fifos: list[Fifo], program: Program, process: _Process, number: int, fifo: int
) -> Stuck:
    """Return what a process waits for: its next access to a FIFO."""
    write = program.write[next(p for p in range(process.place, len(program.local)) if program.fifo[p] == fifo)]
    one = fifos[fifo]
    other = one.reader if write else one.writer
    waits_for = recording.processes[other] if other >= 0 else ""
    return Stuck(recording.processes[number], "writes" if write else "reads", one.name, one.depth, waits_for)
