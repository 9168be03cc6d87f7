"""C-simulation of an emitted HLS project with a plain C++ compiler: no torch, no hls4ml, no vendor tool.

Of a spatial project in two ways, which must agree: the stand-alone test bench `m3vit_test.cpp`, built as a user
without Python would, and hls4ml's own compile() and predict() on the folder (hls4ml.converters.link_existing_project;
see m3vit.hw.bridge). Of a multiplexed project by its test bench alone, which must agree with
m3vit.export.hls.multiplexed.emulator.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3vit.errors import InputError
from m3vit.files import read_json

NAME = "m3vit"  # of the hls4ml project
MANIFEST = "m3vit.json"
FORMAT = 2  # of the manifest
TESTBENCH = "csim.exe"
FLAGS = ("-O3", "-std=c++17", "-w")  # -w: the bundled ap_types warn by the page
# Of a multiplexed project: machine integers, so the result does not depend on the flags. Its own Makefile has -O3.
MULTIPLEXED_FLAGS = ("-O3", "-march=native", "-std=c++11", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-label")
# -W ignore: hls4ml warns of optional packages it does not find
BRIDGE = (sys.executable, "-W", "ignore", "-m", "m3vit.hw.bridge")
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

    outputs: [n, T, widest task] int32, raw words. expert_ids: for each MoE layer [n, N, K]. counters: for each frame,
    by instruction, bytes by port and `saturated` values. seconds: as SimulationResult's.
    """

    outputs: np.ndarray
    expert_ids: list[np.ndarray]
    counters: list[list[dict[str, int]]]
    seconds: float


def read_manifest(project: Path) -> dict[str, Any]:
    """Return the project's m3vit.json, or raise InputError if `project` is not a project of ours."""
    manifest = read_json(project / MANIFEST, "give a folder written by `m3vit export hls`")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{project / MANIFEST} is not of this version of m3vit: export the project again")
    return manifest


def tokenise(images: np.ndarray, patch: int) -> np.ndarray:
    """Cut images uint8 [n, H, W, 3] into tokens float32 [n, T, 3 p^2] of pixel / 256, in the order (colour, y, x)."""
    n, height, width, _ = images.shape
    grid = images.reshape(n, height // patch, patch, width // patch, patch, 3).transpose(0, 1, 3, 5, 2, 4)
    return np.ascontiguousarray(grid.reshape(n, -1, 3 * patch * patch), dtype=np.float32) / PIXEL_SCALE


def find_compiler() -> str:
    """Return the C++ compiler: the environment's CXX, else g++. Raises InputError if there is none."""
    wanted = os.environ.get("CXX") or "g++"
    path = shutil.which(wanted)
    if path is None:
        if wanted != "g++":
            raise InputError(f"CXX is {wanted!r}, which is not a program: set it to a C++ compiler or unset it")
        raise InputError("no g++ found: install it (apt-get install g++) or set CXX to a C++ compiler")
    return path


def _call(command: list[str], folder: Path, what: str, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed, or raise RuntimeError with the end of it."""
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(f"{what} failed (exit code {done.returncode}): " + " | ".join(errors[-5:]))
    return done.stdout


def build_testbench(project: Path) -> Path:
    """Build the stand-alone test bench with one compiler call and return its path (about 20 s)."""
    sources = [f"firmware/{NAME}.cpp", f"{NAME}_test.cpp"]
    defines = ["-Ifirmware/ap_types", '-DWEIGHTS_DIR="firmware/weights"']
    _call([find_compiler(), *FLAGS, *defines, *sources, "-o", TESTBENCH], project, "building the test bench")
    return project / TESTBENCH


def build_bridge(project: Path) -> Path:
    """Build the bridge library with hls4ml's compile() and return its path (about 10 s)."""
    compiler = find_compiler()
    with tempfile.TemporaryDirectory() as folder:
        # build_lib.sh says g++: give it our compiler under that name.
        (Path(folder) / "g++").symlink_to(compiler)
        env = {**os.environ, "PATH": folder + os.pathsep + os.environ.get("PATH", "")}
        _call([*BRIDGE, "build"], project, "hls4ml's compile()", env)
    return max((project / "firmware").glob(f"{NAME}-*.so"), key=lambda path: path.stat().st_mtime)


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
        raise RuntimeError(f"the routing log holds {[len(layer) for layer in lines]} runs a layer instead of {runs}")
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
        _call([str((project / TESTBENCH).resolve())], folder, "the test bench", env)
        seconds = time.perf_counter() - start
        text = (data / "csim_results.log").read_text()
        outputs = np.fromstring(text, dtype=np.float32, sep=" ").reshape(len(tokens), manifest["tokens"], -1)
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
        seconds = float(_call([*BRIDGE, "run", str(folder)], project, "hls4ml's predict()", env))
        outputs = np.load(folder / "outputs.npy").reshape(len(tokens), manifest["tokens"], manifest["outputs"])
        return SimulationResult(outputs, _read_routing(folder, manifest, len(tokens)), seconds)


def build_frames(project: Path) -> Path:
    """Build the test bench of a multiplexed project and return its path (about 5 s)."""
    sources = [f"{NAME}_test.cpp", f"firmware/{NAME}.cpp"]
    _call([find_compiler(), *MULTIPLEXED_FLAGS, "-I.", *sources, "-o", TESTBENCH], project, "building the test bench")
    return project / TESTBENCH


def run_frames(project: Path, images: np.ndarray, task_ids: np.ndarray) -> FrameResult:
    """Simulate frames uint8 [n, H, W, 3], each for a task id of [n], with the test bench built before."""
    manifest = read_manifest(project)
    task_ids, size = np.asarray(task_ids), (*manifest["image_size"], 3)
    if images.dtype != np.uint8 or images.shape[1:] != size or task_ids.shape != images.shape[:1]:
        raise InputError(
            f"frames {images.dtype} {images.shape} and task ids {task_ids.shape}: give uint8 [n, {size[0]}, {size[1]}, "
            "3] and [n]"
        )
    if len(task_ids) and not 0 <= task_ids.min() <= task_ids.max() < 256:
        raise InputError(f"task ids {sorted(set(task_ids.tolist()))}: give 0 to 255")
    with tempfile.TemporaryDirectory(prefix="m3vit-csim-") as name:
        folder = Path(name)
        images.tofile(folder / "images.bin")
        task_ids.astype(np.uint8).tofile(folder / "tasks.bin")
        weights = project.resolve() / "firmware" / "weights" / "weights.bin"
        names = ("images.bin", "tasks.bin", "outputs.bin", "counters.json", "routing.bin")
        start = time.perf_counter()
        _call([str(project.resolve() / TESTBENCH), str(weights), *names], folder, "the test bench")
        seconds = time.perf_counter() - start
        outputs = np.fromfile(folder / "outputs.bin", np.int32).reshape(len(images), manifest["tokens"], -1)
        routing = np.fromfile(folder / "routing.bin", np.uint16).astype(np.int64)
        lines = [json.loads(line) for line in (folder / "counters.json").read_text().splitlines()]
    rows = manifest["tokens"] + manifest["prefix_tokens"]
    experts, place = [], 0
    frame_words = routing.size // max(1, len(images))
    frames = routing.reshape(len(images), frame_words)
    for layer in manifest["moe_layers"]:
        words = rows * layer["top_k"]
        experts.append(frames[:, place : place + words].reshape(len(images), rows, layer["top_k"]))
        place += words
    if place != frame_words:
        raise RuntimeError(f"the routing log holds {frame_words} words a frame instead of {place}")
    counters: list[list[dict[str, int]]] = [[] for _ in images]
    for line in lines:
        counters[line.pop("frame")].append(line)
    return FrameResult(outputs, experts, counters, seconds)
