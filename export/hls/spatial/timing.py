"""`m3vit hw csim --timed` of a spatial project: cycles of its own C++, whose layers are processes joined by FIFOs."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from m3vit.digests import file_digests, write_sealed_json
from m3vit.errors import InputError
from m3vit.export.hls.contents import naming, open_project
from m3vit.export.hls.edits import clock_mhz, said_changes
from m3vit.export.hls.schedules import Progress, silent
from m3vit.export.hls.verify import REPORT, SimulatedOutputs, simulated
from m3vit.files import atomic_path
from m3vit.hw.cost import Assumptions
from m3vit.hw.dataflow import Recording, Timing, evaluate, programs
from m3vit.hw.manifest import SAMPLES
from m3vit.hw.sim import csim, dataflow
from m3vit.hw.sim.compiler import require_writable

RECORD, TRACE = "csim_timed.json", "tb_data/csim_timed.bin"
NOTE = "timed C-simulation; nothing was synthesised, nothing ran on a board"
FRAMES = 4  # one after the other, as early as they can: enough for the interval to settle
# Synthesis gets hls4ml's own kernels of dense layers. -O0: a frame takes less than building does.
FLAGS = ("-O0", "-DM3VIT_HLS4ML_DENSE", '-DWEIGHTS_DIR="firmware/weights"')


def record(project: Path, samples: int | None = None, progress: Progress = silent) -> dict[str, Any]:
    """Run the first `samples` stored images (default: one), each for every task, and return what RECORD holds, beside
    what the processes did in TRACE.

    RECORD: images, frames (image, task, bytes of its recording), loops (name, whether it only moves values),
    changed_files, files with digests. Raises InputError, and DeadlockError for FIFOs that are too shallow.
    """
    manifest, changed = open_project(project)
    require_writable(project, project / "tb_data")
    with np.load(project / SAMPLES) as stored:
        images = np.array(stored["images"])
    if samples is not None and samples > len(images):
        raise InputError(f"samples {samples}: {project} holds {len(images)} images")
    n, tasks = samples or 1, len(manifest["tasks"])
    frames, recordings = [], []
    with naming(changed), tempfile.TemporaryDirectory(prefix="m3vit-timed-") as name:
        folder, root = Path(name), project.resolve()
        progress(0, n * tasks, "g++ builds the timed test bench")
        kernel = _build(root, folder)
        (folder / "firmware" / "weights").symlink_to(root / "firmware" / "weights")
        (folder / "tb_data").mkdir()
        (folder / "tb_data" / "tb_output_predictions.dat").write_text("0\n")
        tokens = csim.tokenise(images[:n], manifest["patch_size"])
        known = SimulatedOutputs.load(project).outputs if (project / REPORT).is_file() else {}
        for image in range(n):
            for task in range(tasks):
                lines = folder / "tb_data" / "tb_input_features.dat"
                csim.write_input_lines(lines, tokens[image : image + 1], np.array([task]))
                trace = folder / "recording.bin"
                kernel.run(folder, trace, environment=_quiet())
                _check(folder, manifest, known, image, task)
                recordings.append(trace.read_bytes())
                frames.append({"image": image, "task": task, "bytes": len(recordings[-1])})
                progress(len(frames), n * tasks, "timed test bench")
    with atomic_path(project / TRACE) as temporary:
        temporary.write_bytes(b"".join(recordings))
    found = {
        "images": n,
        "frames": frames,
        "loops": [[loop.name, loop.moves] for loop in kernel.loops],
        "changed_files": changed,
        "files": file_digests(project, [TRACE, *simulated(changed)]),
    }
    write_sealed_json(project / RECORD, found)
    return found


def _build(root: Path, folder: Path) -> dataflow.Kernel:
    headers = [*root.glob("firmware/*.h"), *root.glob("firmware/nnet_utils/*.h")]
    units = [f"firmware/{csim.NAME}.cpp", f"{csim.NAME}_test.cpp"]
    firmware = root / "firmware"
    flags = [*FLAGS, f"-I{firmware / 'ap_types'}", f"-I{firmware}"]
    return dataflow.build(root, [*(str(path.relative_to(root)) for path in headers), *units], units, folder, flags)


def _check(folder: Path, manifest: dict[str, Any], known: Mapping[str, np.ndarray], image: int, task: int) -> None:
    """Raise InputError if a frame's outputs are not those that m3vit hw csim left, of images that it simulated.

    The test bench prints six digits.
    """
    entry = manifest["tasks"][task]
    expected = known.get(entry["name"], np.zeros(0))
    if image < len(expected):
        width = expected.shape[-1]
        found = csim.read_outputs(folder / "tb_data" / "csim_results.log", 1, manifest)[0, :, :width]
        apart = np.abs(found - expected[image]) / np.maximum(1, np.abs(expected[image]))
        if apart.max() > 1e-5:
            raise InputError(f"{entry['name']}: outputs of the timed C-simulation are not those of m3vit hw csim")


def _quiet() -> dict[str, str]:
    return {"M3VIT_ROUTING_LOG": os.devnull}


def evaluated(
    project: Path, found: dict[str, Any], given: Mapping[str, int | None] = MappingProxyType({})
) -> dict[str, Any]:
    """Return what recorded frames take, as JSON values; no C++ is run. given: clock, depth, fifo.

    tasks: of each task its first frame: cycles to its first word and to its last, and between frames that follow each
    other as early as they can; its processes with trips and the share of the interval that they are busy; its FIFOs.
    """
    manifest, changed = open_project(project)
    chosen = {name: value for name, value in given.items() if value is not None}
    if other := [f"--{name.replace('_', '-')}" for name in chosen if name not in ("clock", "depth", "fifo")]:
        raise InputError(f"{', '.join(other)}: the spatial schedule has no ports to memory; leave it out")
    clock = chosen.get("clock") or round(clock_mhz(project))
    depth = chosen.get("depth", Assumptions().depth)
    content, place, tasks = (project / TRACE).read_bytes(), 0, {}
    for frame in found["frames"]:
        part, place = content[place : place + frame["bytes"]], place + frame["bytes"]
        name = manifest["tasks"][frame["task"]]["name"]
        if name in tasks:
            continue
        recording = Recording.parse(part)
        loops = {
            loop: (ii, max(1, depth)) for loop, (ii, _, _) in recording.loops.items() if not found["loops"][loop][1]
        }
        depths = {fifo.name: chosen["fifo"] for fifo in recording.fifos} if "fifo" in chosen else {}
        timing = evaluate(recording, FRAMES, depths, loops)
        tasks[name] = _frame(recording, timing, loops, clock)
    names = [name for name, _ in found["loops"]]
    return {
        "note": NOTE,
        "clock_mhz": clock,
        "images": found["images"],
        "said": [_assumed(names, recording, loops), *_fifos_said(next(iter(tasks.values())))],
        "changed_files": changed,
        "changes": said_changes(project, manifest, changed),
        "tasks": tasks,
    }


def _frame(recording: Recording, timing: Timing, loops: Mapping[int, tuple[int, int]], clock: int) -> dict[str, Any]:
    outputs = timing.of_outputs()
    work = programs(recording, loops)
    busy = {
        name: {"cycles": program.again, "share": program.again / outputs.interval}
        for name, program in zip(recording.processes, work, strict=True)
        if program.local
    }
    return {
        **{key: cycles for key, cycles in outputs._asdict().items()},
        **{f"{key}_ms": cycles / (clock * 1e3) for key, cycles in outputs._asdict().items()},
        "processes": busy,
        "fifos": {
            fifo.name: {"depth": fifo.depth, "held": held, "empty": empty, "full": full}
            for fifo, held, (empty, full) in zip(timing.fifos, timing.held(), timing.stalls, strict=True)
            if fifo.depth
        },
    }


def _assumed(names: list[str], recording: Recording, loops: Mapping[int, tuple[int, int]]) -> str:
    kinds: dict[tuple[int, int], list[str]] = {}
    for loop, (ii, depth, _) in recording.loops.items():
        kinds.setdefault(loops.get(loop, (ii, depth)), []).append(names[loop].rpartition("/")[2])
    said = "; ".join(f"II {ii} and depth {depth}: {', '.join(own)}" for (ii, depth), own in kinds.items())
    return f"assumed of loops (their pragmas' II, or 1; not met for sure): {said}"


def _fifos_said(frame: dict[str, Any]) -> list[str]:
    full = {name: fifo["full"] for name, fifo in frame["fifos"].items() if fifo["full"]}
    worst = sorted(full, key=lambda name: -full[name])[:3]
    said = ", ".join(f"{name} {full[name]}" for name in worst)
    return [f"cycles that a process waited for a full FIFO, {FRAMES} frames: {said}"] if said else []
