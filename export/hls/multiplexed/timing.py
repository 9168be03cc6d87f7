"""`m3vit hw csim --timed`: cycles of a multiplexed project's own C++ with the routing of its stored images."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from m3vit.digests import check_listed, file_digests, read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.export.hls.contents import naming, open_project
from m3vit.export.hls.edits import apart, clock_mhz, hardware_of, said_changes
from m3vit.export.hls.schedules import Progress, silent
from m3vit.export.hls.verify import simulated
from m3vit.hw.boards import resources
from m3vit.hw.cost import Assumptions, lines_of
from m3vit.hw.csynth import matched, read_csynth
from m3vit.hw.design import Design
from m3vit.hw.isa import Instruction
from m3vit.hw.manifest import SAMPLES, WEIGHTS, budget_names, find_budget
from m3vit.hw.program import Image
from m3vit.hw.sim import csim
from m3vit.hw.sim.compiler import require_writable
from m3vit.hw.sim.emulator import Emulator
from m3vit.hw.timed import Timed, Trace, assumptions_said, frame_report

RECORD, TRACE = "csim_timed.json", "tb_data/csim_timed.bin"
NOTE = "timed C-simulation; nothing was synthesised, nothing ran on a board"


def record(
    project: Path, samples: int | None = None, progress: Progress = silent, budget: str | None = None
) -> dict[str, Any]:
    """Run the first `samples` stored images (default: one), each for every task, through the timed test bench; return
    what RECORD holds, beside what loops and ports did in TRACE.

    budget: of a project with several (default: the first). RECORD: its name and number, images, frames (image and task
    of each, and of each layer with experts the tokens of those that have any), changed_files, files with digests.
    Raises InputError for another schedule's project, and words that are not the emulator's.
    """
    manifest, changed = open_project(project)
    if manifest.get("schedule") != "multiplexed":
        raise InputError(
            f"{project} is of the spatial schedule, which has no engines: give one of --schedule multiplexed"
        )
    require_writable(project, project / "tb_data")
    with np.load(project / SAMPLES) as stored:
        images = np.array(stored["images"])
    if samples is not None and samples > len(images):
        raise InputError(f"samples {samples}: {project} holds {len(images)} images")
    n, tasks, number = samples or 1, len(manifest["tasks"]), find_budget(manifest, budget)
    with naming(changed):
        progress(0, 1, "g++ builds the timed test bench")
        csim.build_timed(project)
        ids = np.tile(np.arange(tasks), n)
        frames = images[:n].repeat(tasks, axis=0)
        progress(0, 1, "timed test bench")
        result = csim.run_frames(project, frames, ids, project / TRACE, np.full(len(ids), number))
        progress(0, 1, "emulator")
        emulator = Emulator.open(project / WEIGHTS, number)
        expected = [found.outputs for image in images[:n] for found in emulator.run_tasks(image, list(range(tasks)))]
        different = int((np.stack(expected).reshape(result.outputs.shape) != result.outputs).sum())
        if different:
            raise InputError(f"{different} words of the timed C-simulation are not the emulator's")
    queues = [[_queue(ids[frame]) for ids in result.expert_ids] for frame in range(len(frames))]
    found = {
        **({"budget": budget_names(manifest)[number], "number": number} if "budgets" in manifest else {}),
        "images": n,
        "frames": [
            {"image": frame // tasks, "task": frame % tasks, "queues": queues[frame]} for frame in range(n * tasks)
        ],
        "changed_files": changed,
        "files": file_digests(project, [TRACE, *simulated(changed)]),
    }
    write_sealed_json(project / RECORD, found)
    return found


def _queue(experts: np.ndarray) -> list[int]:
    counts = np.bincount(experts[experts >= 0])
    return [int(count) for count in counts if count]


def traced(project: Path, found: dict[str, Any]) -> tuple[Trace, list[Instruction]]:
    """Return what loops and ports did, and the program of the budget that was recorded, whose first pc is 0."""
    trace, image, number = Trace.read(project / TRACE), Image.read(project / WEIGHTS), found.get("number", 0)
    return trace.shifted(image.starts[number]), image.program_of(number)


def recorded(project: Path) -> dict[str, Any]:
    """Return what `record` left. Raises InputError if there is nothing, or it is of other sources than there are."""
    hint = f"run m3vit hw csim {project} --timed"
    _, changed = open_project(project)
    found = read_sealed_json(project / RECORD, hint)
    if other := [name for name in simulated(changed) if name not in found["files"]]:
        raise InputError(f"{project} was edited after it was timed ({', '.join(other)}): {hint}")
    check_listed(project, found["files"], hint)
    return found


def assumptions(
    project: Path, manifest: dict[str, Any], given: Mapping[str, int | None] = MappingProxyType({})
) -> tuple[Timed, Design]:
    """Return what timing assumes of a project: its board, and the clock that its project.tcl asks for, unless `given`
    says another clock, depth, read, write, bus_bits or gap."""
    design = Design(**manifest.get("design", {"board": manifest["board"]}))
    chosen = {name: value for name, value in given.items() if value is not None}
    if "fifo" in chosen:
        raise InputError("--fifo: the engines have no FIFOs between them; leave it out")
    base = replace(Assumptions(), **{key: chosen.pop(key) for key in ("depth", "read", "write") if key in chosen})
    clock = chosen.pop("clock", None) or round(clock_mhz(project))
    bus: dict[str, Any] = chosen
    return Timed(clock, design.target.bandwidth_gb_s, base, **bus), design


def evaluated(
    project: Path,
    found: dict[str, Any],
    given: Mapping[str, int | None] = MappingProxyType({}),
    reported: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return what recorded frames take, as JSON values; no C++ is run. reported: II and depth of loops, by name.

    tasks: of each task its first frame's report, with the closed form of the same routing beside it (modelled_cycles,
    difference), and the least and the most ms over all images.
    """
    manifest, changed = open_project(project)
    hardware, (trace, program) = hardware_of(project, manifest), traced(project, found)
    assumed, design = assumptions(project, manifest, given)
    iis, depths = ({name: pair[place] for name, pair in reported.items()} for place in range(2))
    assumed = replace(assumed, iis=iis, depths=depths)
    if assumed.bus_bits and (assumed.bus_bits > hardware.port_bits or hardware.port_bits % assumed.bus_bits):
        raise InputError(f"--bus-bits {assumed.bus_bits}: a part of the ports' {hardware.port_bits} bits")
    other = apart(project, hardware)
    board = replace(design.target, clock_mhz=assumed.clock_mhz)
    tasks = {}
    for place, entry in enumerate(manifest["tasks"]):
        own = [number for number, frame in enumerate(found["frames"]) if frame["task"] == place]
        reports = [frame_report(trace.of_frame(one), program, hardware, assumed, entry["name"]) for one in own]
        queues = found["frames"][own[0]]["queues"]
        lines = lines_of(program, hardware, board, place, assumed.base, queues)
        modelled = sum(line.cycles for line in lines)
        for engine, part in reports[0]["engines"].items():
            part["modelled_cycles"] = sum(line.cycles for line in lines if line.engine == engine)
        for one, line in zip(reports[0]["instructions"], lines, strict=True):
            one["modelled_cycles"] = line.cycles
        times = [report["ms"] for report in reports]
        tasks[entry["name"]] = {
            **reports[0],
            "ms_over_images": [min(times), max(times)],
            "modelled_cycles": modelled,
            "difference": reports[0]["cycles"] / modelled - 1,
        }
    return {
        **({"budget": found["budget"]} if "budget" in found else {}),
        "note": NOTE,
        "board": board.name,
        "clock_mhz": assumed.clock_mhz,
        "images": found["images"],
        "assumed": assumed.plain(),
        "said": assumptions_said(trace, assumed) + ([f"modelled with {', '.join(other)}"] if other else []),
        "changed_files": changed,
        "changes": said_changes(project, manifest, changed),
        "tasks": tasks,
    }


def summary(project: Path) -> str:
    """Return one sentence about a recorded timed C-simulation, for people: each level by its name."""
    report = evaluated(project, recorded(project))
    per_ms = report["clock_mhz"] * 1e3
    times = ", ".join(
        f"{task} {found['ms']:.2f} ({found['modelled_cycles'] / per_ms:.2f})" for task, found in report["tasks"].items()
    )
    return (
        f"Timed C-simulation of a frame on {report['board']} at {report['clock_mhz']} MHz, ms, and in brackets "
        f"modelled with the same routing: {times}. Nothing was synthesised."
    )


def synthesised(project: Path, csynth: Path, progress: Progress = silent) -> dict[str, Any]:
    """Return what a report of Vitis HLS says beside what was assumed, as JSON values, and the frame that follows.

    loops: of each of ours, assumed and reported II and depth (None: not in the report). resources: modelled and
    reported. tasks: ms as assumed, and with the report's II and depth. The timed C-simulation that was recorded is
    evaluated; one is recorded if there is none. Raises InputError for a report that has none of the engines' loops.
    """
    manifest, changed = open_project(project)
    synthesis = read_csynth(csynth)
    found = recorded(project) if (project / RECORD).is_file() else record(project, progress=progress)
    trace, hardware = Trace.read(project / TRACE), hardware_of(project, manifest)
    assumed, _ = assumptions(project, manifest)
    pragmas = {trace.loops[loop]: ii for loop, ii in set(trace.records[["loop", "ii"]].tolist())}
    loops = matched(synthesis.loops, trace.loops)
    if not loops:
        raise InputError(f"{csynth} has none of the loops of the engines: give the report of {project}'s own synthesis")
    # Vitis counts depth + II (trips - 1) cycles.
    reported = {name: (loop.ii, max(0, loop.depth - loop.ii)) for name, loop in loops.items()}
    before, after = evaluated(project, found), evaluated(project, found, reported=reported)
    modelled = resources(hardware)
    modelled["bram18"] = 2 * modelled.pop("bram36")
    return {
        "note": "timed C-simulation with what Vitis HLS reports of loops; nothing ran on a board",
        "top": synthesis.top,
        "clock_ns": {
            "project": 1e3 / assumed.clock_mhz,
            "target": synthesis.target_ns,
            "estimated": synthesis.estimated_ns,
        },
        "loops": {
            name: {
                "assumed": {"ii": pragmas.get(name), "depth": assumed.base.depth},
                "reported": {"ii": reported[name][0], "depth": reported[name][1]} if name in reported else None,
                "reported_as": f"{loops[name].module}: {loops[name].name}" if name in loops else None,
            }
            for name in trace.loops
        },
        "resources": {
            kind: {"modelled": modelled.get(kind), "reported": synthesis.resources.get(kind)}
            for kind in ("lut", "ff", "dsp", "bram18", "uram")
        },
        "tasks": {
            task: {"assumed_ms": before["tasks"][task]["ms"], "reported_ms": after["tasks"][task]["ms"]}
            for task in before["tasks"]
        },
        "changed_files": changed,
        "changes": said_changes(project, manifest, changed),
    }
