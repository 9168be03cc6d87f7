"""C-simulation of an emitted HLS project with a plain C++ compiler: no torch, no hls4ml, no vendor tool.

Of a spatial project in two ways, which must agree: the stand-alone test bench `m3vit_test.cpp`, built as a user
without Python would, and hls4ml's own compile() and predict() on the folder (hls4ml.converters.link_existing_project;
see m3vit.hw.sim.bridge). Of a multiplexed project by its test bench alone, which must agree with
m3vit.hw.sim.emulator.
"""

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3vit.errors import InputError
from m3vit.hw.manifest import FORMAT, MANIFEST, WEIGHTS, budget_names, read_manifest, top_ks
from m3vit.hw.output_memory import OutputLayout
from m3vit.hw.sim.compiler import advising, built, compiler, find_compiler, require_writable, run_program

__all__ = ["FORMAT", "MANIFEST", "find_compiler", "read_manifest"]  # used from here by others

NAME = "m3vit"  # of the hls4ml project
TESTBENCH, TIMED_BENCH = "csim.exe", "csim_timed.exe"
TIMED_HEADER = "firmware/nnet_utils/m3vit_timed.h"
FLAGS = ("-O3", "-std=c++17", "-w")  # -w: the bundled ap_types warn by the page
# Of a multiplexed project: machine integers, so the result does not depend on the flags. Its own Makefile has -O3.
MULTIPLEXED_FLAGS = ("-O3", "-march=native", "-std=c++11", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-label")
# -W ignore: hls4ml warns of optional packages it does not find
BRIDGE = (sys.executable, "-W", "ignore", "-m", "m3vit.hw.sim.bridge")
PIXEL_SCALE = 256  # the accelerator's input is pixel / 256, exact in ap_ufixed<8, 0>
PIXELS = np.array([repr(value / PIXEL_SCALE) for value in range(256)])  # as text, exactly


class SimulationResult(NamedTuple):
    """What a C-simulation of n runs returned.

    outputs: [n, T, n_out] float32, zero beyond the width of the run's task.
    expert_ids: for each MoE layer [n, N, K] int64, best first; N counts prefix tokens too.
    seconds: wall-clock time of the simulation, without building and file conversion.
    """

    outputs: np.ndarray
    expert_ids: list[np.ndarray]
    seconds: float


class FrameResult(NamedTuple):
    """What the C-simulation of n frames of a multiplexed project returned.

    outputs: [n, T, token_pitch] int32, the output memory (m3vit.hw.output_memory). expert_ids: for each MoE layer
    [n, N, K], K the most of any frame, -1 beyond a frame's own. counters: for each frame, by instruction (of all
    programs together), bytes by port and `saturated` values. seconds: as SimulationResult's.
    """

    outputs: np.ndarray
    expert_ids: list[np.ndarray]
    counters: list[list[dict[str, int]]]
    seconds: float


def tokenise(images: np.ndarray, patch: int) -> np.ndarray:
    """Cut images uint8 [n, H, W, 3] into tokens float32 [n, T, 3 p^2] of pixel / 256, in the order (colour, y, x)."""
    n, height, width, _ = images.shape
    grid = images.reshape(n, height // patch, patch, width // patch, patch, 3).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(grid.reshape(n, -1, 3 * patch * patch), dtype=np.float32) / PIXEL_SCALE


def build_testbench(project: Path) -> Path:
    """Build the stand-alone test bench with one compiler call and return its path (about 20 s)."""
    sources = [f"firmware/{NAME}.cpp", f"{NAME}_test.cpp"]
    defines = ["-Ifirmware/ap_types", '-DWEIGHTS_DIR="firmware/weights"']
    return _build(project, [*FLAGS, *defines, *sources])


def _build(project: Path, arguments: list[str], name: str = TESTBENCH) -> Path:
    """Build a test bench with the arguments of a compiler, and return its path."""
    what = "building the test bench"
    with built(project / name, what) as program:
        run_program([*compiler(), *arguments, "-o", program.name], project, what)
    return project / name


def build_bridge(project: Path) -> Path:
    """Build the bridge library with hls4ml's compile() and return its path (about 10 s)."""
    what, firmware = "hls4ml's compile()", project / "firmware"
    require_writable(project, firmware)
    for old in firmware.glob(f"{NAME}-*.so"):
        old.unlink()
    words = compiler()
    with tempfile.TemporaryDirectory() as name, advising():
        # build_lib.sh says g++: give it our compiler under that name, and a compiler that is a script the PATH that it
        # had, or the g++ that it calls would be the stand-in again.
        path = os.environ.get("PATH", "")
        stand_in = Path(name) / "g++"
        stand_in.write_text(f'#!/bin/sh\nPATH={shlex.quote(path)}\nexport PATH\nexec {shlex.join(words)} "$@"\n')
        stand_in.chmod(0o755)
        env = {**os.environ, "PATH": name + os.pathsep + path}
        run_program([*BRIDGE, "build"], project, what, env)
        libraries = list(firmware.glob(f"{NAME}-*.so"))
        if not libraries:
            raise InputError(f"{what} made no library")
    return libraries[0]


@contextmanager
def _workplace() -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a scratch folder and an environment that makes the kernels log their routing into it."""
    with tempfile.TemporaryDirectory(prefix="m3vit-csim-") as name:
        folder = Path(name)
        yield folder, {**os.environ, "M3VIT_ROUTING_LOG": str(folder / "routing.log")}


def _read_routing(folder: Path, manifest: dict[str, Any], runs: int) -> list[np.ndarray]:
    """Return the expert ids [runs, N, K] of each MoE layer from a routing log (lines `layer expert expert ...`)."""
    lines: list[list[np.ndarray]] = [[] for _ in manifest["moe_layers"]]
    path = folder / "routing.log"
    for line in path.read_text().splitlines() if path.exists() else []:
        layer, *experts = line.split()
        lines[int(layer)].append(np.array(experts, dtype=np.int64))
    if any(len(layer) != runs for layer in lines):
        raise InputError(f"the simulation logged the routing of {[len(layer) for layer in lines]} runs, not of {runs}")
    return [
        np.stack(layer).reshape(runs, -1, info["top_k"]) if runs else np.zeros((0, 0, info["top_k"]), np.int64)
        for layer, info in zip(lines, manifest["moe_layers"], strict=True)
    ]


def _check(tokens: np.ndarray, task_ids: np.ndarray, manifest: dict[str, Any]) -> None:
    expected = (manifest["tokens"], manifest["token_width"])
    if tokens.ndim != 3 or tokens.shape[1:] != expected or task_ids.shape != tokens.shape[:1]:
        raise InputError(
            f"tokens {tokens.shape} and task ids {task_ids.shape}: give [n, {expected[0]}, {expected[1]}] and [n]"
        )
    if len(task_ids) and not 0 <= task_ids.min() <= task_ids.max() < len(manifest["tasks"]):
        raise InputError(
            f"task ids {sorted(set(task_ids.tolist()))}: this project has 0 to {len(manifest['tasks']) - 1}"
        )


def _pixels(tokens: np.ndarray) -> np.ndarray:
    pixels = np.rint(tokens * PIXEL_SCALE).astype(np.int64)
    if not np.array_equal(pixels.astype(np.float32) / PIXEL_SCALE, tokens) or pixels.min() < 0 or pixels.max() > 255:
        raise InputError(
            "tokens hold values other than pixel / 256 with pixel 0 to 255: that is the accelerator's input"
        )
    return pixels


def write_input_lines(path: Path, tokens: np.ndarray, task_ids: np.ndarray) -> None:
    """Write the test bench's input: a line a run, the tokens [T, P] flattened (pixel / 256), then the task id."""
    with open(path, "w") as file:
        for pixels, task_id in zip(_pixels(tokens), task_ids, strict=True):
            file.write(" ".join(PIXELS[pixels.ravel()]) + f" {int(task_id)}\n")


def run_testbench(project: Path, tokens: np.ndarray, task_ids: np.ndarray) -> SimulationResult:
    """Simulate tokens [n, T, P] float32 (pixel / 256) with task ids [n] through the test bench built before.

    Outputs come from its text log, so they carry six significant digits.
    """
    manifest = read_manifest(project)
    task_ids = np.asarray(task_ids)
    _check(tokens, task_ids, manifest)
    with _workplace() as (folder, env):
        (folder / "firmware").symlink_to((project / "firmware").resolve())
        data = folder / "tb_data"
        data.mkdir()
        write_input_lines(data / "tb_input_features.dat", tokens, task_ids)
        (data / "tb_output_predictions.dat").write_text("0\n" * len(tokens))  # it insists on a line a run
        start = time.perf_counter()
        run_program([str((project / TESTBENCH).resolve())], folder, "the test bench", env)
        seconds = time.perf_counter() - start
        outputs = read_outputs(data / "csim_results.log", len(tokens), manifest)
        return SimulationResult(outputs, _read_routing(folder, manifest, len(tokens)), seconds)


def run_bridge(project: Path, tokens: np.ndarray, task_ids: np.ndarray) -> SimulationResult:
    """Simulate tokens [n, T, P] float32 (pixel / 256) with task ids [n] by hls4ml's predict(); built before."""
    manifest = read_manifest(project)
    task_ids = np.asarray(task_ids)
    _check(tokens, task_ids, manifest)
    _pixels(tokens)
    with _workplace() as (folder, env):
        np.save(folder / "tokens.npy", np.ascontiguousarray(tokens, dtype=np.float32))
        np.save(folder / "tasks.npy", task_ids[:, None].astype(np.float32))
        seconds = float(run_program([*BRIDGE, "run", str(folder)], project, "hls4ml's predict()", env))
        outputs = np.load(folder / "outputs.npy").reshape(len(tokens), manifest["tokens"], manifest["outputs"])
        return SimulationResult(outputs, _read_routing(folder, manifest, len(tokens)), seconds)


def trace_bridge(
    project: Path, tokens: np.ndarray, task: int, layers: Sequence[Any]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Run tokens [1, T, P] for a task by hls4ml's trace, in a project that was instrumented for it and built.

    layers: their name, rows and columns. Returns what each gave, float64 [rows, columns], and the expert ids [1, N, K]
    of each MoE layer.
    """
    manifest = read_manifest(project)
    with _workplace() as (folder, env):
        np.save(folder / "tokens.npy", np.ascontiguousarray(tokens, dtype=np.float64))
        np.save(folder / "tasks.npy", np.array([[task]], np.float64))
        sizes = {layer.name: layer.rows * layer.columns for layer in layers}
        (folder / "layers.json").write_text(json.dumps([sizes, manifest["tokens"] * manifest["outputs"]]))
        run_program([*BRIDGE, "trace", str(folder)], project, "hls4ml's trace", env)
        with np.load(folder / "layers.npz") as found:
            values = [found[layer.name].reshape(layer.rows, layer.columns) for layer in layers]
        return values, _read_routing(folder, manifest, 1)


def read_outputs(log: Path, runs: int, manifest: dict[str, Any]) -> np.ndarray:
    """Read the text log of a spatial project's test bench: outputs [n, T, n_out] float32."""
    shape = (runs, manifest["tokens"], manifest["outputs"])
    try:
        outputs = np.array(log.read_text().split(), dtype=np.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"the test bench wrote outputs that cannot be read ({error})") from None
    if outputs.size != np.prod(shape):
        raise InputError(f"the test bench wrote {outputs.size} values instead of {np.prod(shape)}")
    return outputs.reshape(shape)


def _by_layer(routing: np.ndarray, counts: list[list[int]], rows: int, layers: int) -> list[np.ndarray]:
    """Return for each MoE layer expert ids [n, N, K]; routing: frame by frame; counts: experts of frame and layer."""
    found = [
        np.full((len(counts), rows, max((frame[layer] for frame in counts), default=1)), -1) for layer in range(layers)
    ]
    place = 0
    for number, frame in enumerate(counts):
        for layer, count in enumerate(frame):
            found[layer][number, :, :count] = routing[place : place + rows * count].reshape(rows, count)
            place += rows * count
    return found


def read_counters(path: Path) -> list[dict[str, int]]:
    """Return what the test bench counted: of each frame and instruction a line. Raises OSError, ValueError."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def build_frames(project: Path) -> Path:
    """Build the test bench of a multiplexed project and return its path (about 5 s)."""
    return _build(project, [*MULTIPLEXED_FLAGS, "-I.", f"{NAME}_test.cpp", f"firmware/{NAME}.cpp"])


def build_timed(project: Path) -> Path:
    """Build the test bench whose loops and ports write down what they do, and return its path.

    Raises InputError for a project of engines that have no timed C-simulation.
    """
    if not (project / TIMED_HEADER).is_file():
        raise InputError(f"{project} was written by an older version, whose engines cannot be timed: export it again")
    arguments = [*MULTIPLEXED_FLAGS, "-DM3VIT_TIMED", "-I.", f"{NAME}_test.cpp", f"firmware/{NAME}.cpp"]
    return _build(project, arguments, TIMED_BENCH)


def run_frames(
    project: Path,
    images: np.ndarray,
    task_ids: np.ndarray,
    timed: Path | None = None,
    budgets: np.ndarray | None = None,
) -> FrameResult:
    """Simulate frames uint8 [n, H, W, 3], each for a task id of [n], with the test bench built before.

    budgets: the number of each frame's budget [n] (default: the first). timed: the file for what loops and ports did
    (m3vit.hw.timed), by the timed test bench.
    """
    manifest = read_manifest(project)
    task_ids, size = np.asarray(task_ids), (*manifest["image_size"], 3)
    if images.dtype != np.uint8 or images.shape[1:] != size or task_ids.shape != images.shape[:1]:
        raise InputError(
            f"frames {images.dtype} {images.shape} and task ids {task_ids.shape}: give uint8 [n, {size[0]}, {size[1]}, "
            "3] and [n]"
        )
    if len(task_ids) and not 0 <= task_ids.min() <= task_ids.max() < 256:
        raise InputError(f"task ids {sorted(set(task_ids.tolist()))}: give 0 to 255")
    used = np.zeros(len(images), np.int64) if budgets is None else np.asarray(budgets)
    if used.shape != task_ids.shape or (len(used) and not 0 <= used.min() <= used.max() < len(budget_names(manifest))):
        raise InputError(f"budgets {used.tolist()}: give each frame one, 0 to {len(budget_names(manifest)) - 1}")
    with tempfile.TemporaryDirectory(prefix="m3vit-csim-") as name:
        folder = Path(name)
        images.tofile(folder / "images.bin")
        np.concatenate([task_ids, used]).astype(np.uint8).tofile(folder / "tasks.bin")
        weights = project.resolve() / WEIGHTS
        names = ("images.bin", "tasks.bin", "outputs.bin", "counters.json", "routing.bin")
        start = time.perf_counter()
        bench = project.resolve() / (TIMED_BENCH if timed else TESTBENCH)
        env = {**os.environ, "M3VIT_TIMED_TRACE": str(timed.resolve())} if timed else None
        run_program([str(bench), str(weights), *names], folder, "the test bench", env)
        seconds = time.perf_counter() - start
        try:
            outputs = np.fromfile(folder / "outputs.bin", np.int32).reshape(len(images), manifest["tokens"], -1)
            routing = np.fromfile(folder / "routing.bin", np.uint16).astype(np.int64)
            lines = read_counters(folder / "counters.json")
        except (OSError, ValueError) as error:
            raise InputError(f"the test bench wrote outputs that cannot be read ({error})") from None
    rows = manifest["tokens"] + manifest["prefix_tokens"]
    # An unknown task counts as the first.
    counts = [top_ks(manifest, budget) for budget in range(len(budget_names(manifest)))]
    tasks = len(manifest["tasks"])
    by_frame = [
        [layer[task if task < tasks else 0] for layer in counts[budget]]
        for task, budget in zip(task_ids.tolist(), used.tolist(), strict=True)
    ]
    words = rows * sum(sum(frame) for frame in by_frame)
    pitch = OutputLayout.of(manifest).token_pitch
    if outputs.shape[-1] != pitch or routing.size != words:
        raise InputError(
            f"the test bench wrote {outputs.shape[-1]} values a token and {routing.size} routing words instead of "
            f"{pitch} and {words}"
        )
    experts = _by_layer(routing, by_frame, rows, len(manifest["moe_layers"]))
    counters: list[list[dict[str, int]]] = [[] for _ in images]
    for line in lines:
        counters[line.pop("frame")].append(line)
    return FrameResult(outputs, experts, counters, seconds)
