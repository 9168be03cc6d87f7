"""`m3vit hw rtl`: the expert engine in SystemVerilog on the layers with experts of a project's first stored image."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from m3vit.digests import read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.export.hls.contents import naming, open_project
from m3vit.export.hls.edits import hardware_of, said_changes
from m3vit.export.hls.multiplexed.timing import RECORD, TRACE, assumptions, record, recorded
from m3vit.export.hls.schedules import Progress, silent
from m3vit.files import sha256_file
from m3vit.hw import ops
from m3vit.hw.isa import Experts
from m3vit.hw.manifest import SAMPLES, WEIGHTS
from m3vit.hw.sim import rtl
from m3vit.hw.sim.compiler import require_writable
from m3vit.hw.sim.emulator import Emulator
from m3vit.hw.timed import Trace, evaluate

FOLDER = "rtl"
LEFT = f"{FOLDER}/rtl.json"
NOTE = "RTL (Verilator): the expert engine by hand; nothing was synthesised by Vitis HLS, nothing ran on a board"
LOOPS = ("linear_first", "compute_step")
UNBOUNDED = 1e4  # GB/s: ports alone bound
DEPTHS: Mapping[str, int] = MappingProxyType(dict(zip(LOOPS, (rtl.FIRST_DEPTH, rtl.STEP_DEPTH), strict=True)))


def layers_of(emulator: Emulator, pixels: np.ndarray, task: int) -> Iterator[tuple[int, rtl.Layer, np.ndarray]]:
    """Yield of each layer with experts its instruction's place, the layer, and the wide memory after it, by the
    emulator."""
    image = emulator.image
    kind = np.int8 if image.act_bits <= 8 else np.int16
    of_wide = np.int16 if image.wide_bits == 16 else np.int32
    narrow, wide = np.zeros(0, kind), np.zeros(0, of_wide)
    for pc, state in emulator.steps(pixels, task):
        instruction, after = image.program[pc], state.wide.numpy().astype(of_wide)
        if isinstance(instruction, Experts):
            yield pc, rtl.Layer(image, instruction, narrow, wide, state.experts, state.scores), after
        narrow, wide = state.narrow.numpy().astype(kind), after


def different(layer: rtl.Layer, expected: np.ndarray, result: rtl.Result) -> int:
    """Return how many words of the memories are not as they should be: all but hidden channels, which are no result."""
    i = layer.instruction
    kept = np.ones(layer.narrow.size, bool)
    kept[i.hidden : i.hidden + layer.experts.size * i.hidden_pitch] = False
    return int((result.wide != expected).sum() + (result.narrow != layer.narrow)[kept].sum())


def simulate(
    project: Path, task: str | None = None, layer: int | None = None, synth: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Run the layers with experts (or one, from 1 on) of the first stored image for a task (default: the first).

    Returns JSON values: of each layer the words that are not the emulator's, and its cycles: RTL and timed C-simulation
    with the RTL's depths, with a memory that is no bound and (at_bandwidth) with the board's; timed C-simulation as it
    is assumed, and modelled. The timed C-simulation that was recorded is evaluated; one is recorded if there is none.
    synth: also the resources by Yosys beside the closed form. Raises InputError for another schedule's project, and
    without Verilator.
    """
    manifest, changed = open_project(project)
    if manifest.get("schedule") != "multiplexed":
        raise InputError(f"{project} is of the spatial schedule: the RTL is of --schedule multiplexed")
    names, count = [entry["name"] for entry in manifest["tasks"]], len(manifest["moe_layers"])
    if not count:
        raise InputError(f"{project} has no layers with experts, and the RTL is of the expert engine")
    if task is not None and task not in names:
        raise InputError(f"--task {task}: choose from {', '.join(names)}")
    if layer is not None and not 1 <= layer <= count:
        raise InputError(f"--layer {layer}: give 1 to {count}")
    for tool in ("verilator", *(("yosys",) if synth else ())):
        rtl.find_tool(tool)
    require_writable(project)
    place = names.index(task) if task else 0
    hardware = hardware_of(project, manifest)
    folder = project / FOLDER
    with naming(changed):
        found = recorded(project) if (project / RECORD).is_file() else record(project, progress=progress)
        progress(0, 1, "Verilator and g++ build the engine")
        bench = rtl.build(folder, hardware)
        trace = Trace.read(project / TRACE).of_frame(place)  # the first image's frames come first, a task each
        assumed, design = assumptions(project, manifest)
        # The RTL waits for each word where it needs it; timed C-simulation has the memory's bandwidth for a whole pass
        # alone. So both are compared with ports alone, too.
        own_depths = replace(assumed, depths=DEPTHS)
        unbounded = replace(own_depths, bandwidth_gb_s=UNBOUNDED)
        cycles = {
            "timed": evaluate(trace, hardware, unbounded).total,
            "timed_at_bandwidth": evaluate(trace, hardware, own_depths).total,
            "timed_as_assumed": evaluate(trace, hardware, assumed).total,
        }
        loops = np.isin(trace.records["loop"], [trace.loops.index(loop) for loop in LOOPS])
        with np.load(project / SAMPLES) as stored:
            pixels = np.array(stored["images"][0])
        layers = []
        for number, (pc, one, expected) in enumerate(
            layers_of(Emulator.open(project / WEIGHTS), pixels, place), start=1
        ):
            if layer not in (None, number):
                continue
            progress(number - 1, count, "RTL")
            result, slower = (rtl.run(bench, one, memory) for memory in (unbounded, own_depths))
            own = loops & (trace.records["pc"] == pc)
            passes = cycles["timed"][own]
            modelled = ops.OPS[one.instruction.op].cycles(one.instruction, hardware, one.queue, assumed.base.timing)
            timed, at_bandwidth, as_assumed = (int(values[own].sum()) for values in cycles.values())
            layers.append(
                {
                    "layer": number,
                    "pc": pc,
                    "tokens": one.queue,
                    "different": different(one, expected, result) + different(one, expected, slower),
                    "cycles": result.cycles,
                    "timed_cycles": timed,
                    "at_bandwidth": {
                        "cycles": slower.cycles,
                        "timed_cycles": at_bandwidth,
                        "difference": slower.cycles / at_bandwidth - 1,
                    },
                    "timed_as_assumed_cycles": as_assumed,
                    "modelled_cycles": modelled,
                    "difference": result.cycles / timed - 1,
                    "passes": len(result.passes),
                    "worst_pass_cycles": int(np.abs(np.array(result.passes) - passes).max()),
                    "words": result.words,
                }
            )
        report = {
            "note": NOTE,
            "board": design.target.name,
            "clock_mhz": assumed.clock_mhz,
            "task": names[place],
            "queues_recorded": found["frames"][place]["queues"],
            "assumed": assumed.plain(),
            "depths": dict(DEPTHS),
            "parameters": rtl.parameters_of(hardware),
            "layers": layers,
            "changed_files": changed,
            "changes": said_changes(project, manifest, changed),
        }
        if synth:
            progress(0, 1, "Yosys")
            levels = {"yosys": rtl.synthesise(folder, hardware), "modelled": rtl.modelled(hardware)}
            report["resources"] = {level: one._asdict() for level, one in levels.items()}
        write_sealed_json(project / LEFT, report | {"trace": sha256_file(project / TRACE)})
    return report


def left(project: Path) -> dict[str, Any] | None:
    """Return what `simulate` last returned, or None if it was not called since the timed C-simulation was recorded.

    Raises InputError if the file is damaged.
    """
    path, trace = project / LEFT, project / TRACE
    if not path.is_file() or not trace.is_file():
        return None
    found = read_sealed_json(path, f"run m3vit hw rtl {project}")
    return found if found["trace"] == sha256_file(trace) else None
