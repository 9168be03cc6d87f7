"""C-simulation of a multiplexed project beside its emulator: every word of both must be the same."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from m3vit.errors import InputError
from m3vit.export.hls.schedules import Progress, Simulated
from m3vit.hw.manifest import WEIGHTS, budget_names
from m3vit.hw.ops import PORTS
from m3vit.hw.output_memory import OutputLayout
from m3vit.hw.program import Image
from m3vit.hw.sim import csim
from m3vit.hw.sim.emulator import Emulator

CHUNK_FRAMES = 4  # simulated by one call of the test bench, which then reads the weights again


def real_outputs(words: np.ndarray, manifest: dict[str, Any]) -> np.ndarray:
    """Return output memories int32 [n, R, T, token_pitch] as numbers, float32 [n, R, T, C]; outputs beyond a task's
    width are zero."""
    layout = OutputLayout.of(manifest)
    found = np.zeros((*words.shape[:3], manifest["outputs"]), np.float32)
    for task, frac in enumerate(manifest["output_fracs"]):
        own = layout.outputs(words[:, task], task)
        found[:, task, :, : own.shape[-1]] = np.ldexp(own.astype(np.float64), -frac)
    return found


def simulate(project: Path, images: np.ndarray, manifest: dict[str, Any], progress: Progress | None) -> Simulated:
    """Return what test bench and emulator agree on, of every budget: one run goes through all budgets and tasks of an
    image before the next.

    Facts, of each budget: s_per_image {testbench, emulator}, different_words (between the two: 0 unless something is
    broken), words, saturated {engine: values beyond their format, of all frames}, traffic {task: {port: bytes a frame,
    mean}}. Raises InputError if the two differ.
    """
    names = budget_names(manifest)
    weights = Image.read(project / WEIGHTS)
    emulators = [Emulator(weights, budget) for budget in range(len(names))]
    tasks, total = [task["name"] for task in manifest["tasks"]], len(images)
    if progress:
        progress(0, total, "g++ builds the test bench")
    csim.build_frames(project)
    found = [_Budget(emulator, weights.starts[budget]) for budget, emulator in enumerate(emulators)]
    ids, budgets = np.tile(np.arange(len(tasks)), len(names)), np.arange(len(names)).repeat(len(tasks))
    for start in range(0, total, CHUNK_FRAMES):
        frames = images[start : start + CHUNK_FRAMES]
        n = len(frames)
        result = csim.run_frames(project, frames.repeat(len(ids), axis=0), np.tile(ids, n), budgets=np.tile(budgets, n))
        for budget, one in enumerate(found):
            one.add(result, frames, np.flatnonzero(np.tile(budgets, n) == budget), len(tasks))
        if progress:
            progress(min(start + CHUNK_FRAMES, total), total, "test bench and emulator")
    if different := sum(one.different for one in found):
        words = sum(part.size for one in found for part in one.outputs)
        raise InputError(f"{different} of {words} words of the C-simulation are not the emulator's")
    first, *others = (one.simulated(manifest, tasks, total) for one in found)
    return first._replace(others=dict(zip(names[1:], others, strict=True)))


class _Budget:
    """What test bench and emulator gave of one budget."""

    def __init__(self, emulator: Emulator, start: int) -> None:
        self.emulator, self.start = emulator, start
        self.seconds = {"testbench": 0.0, "emulator": 0.0}
        self.outputs: list[np.ndarray] = []
        self.experts: list[list[np.ndarray]] = []
        self.counters: list[list[dict[str, int]]] = []
        self.different = 0

    def add(self, result: csim.FrameResult, frames: np.ndarray, own: np.ndarray, tasks: int) -> None:
        """Compare the frames `own` of a run, which are those of images [n, H, W, 3] for all tasks."""
        self.seconds["testbench"] += result.seconds * len(own) / len(result.outputs)
        begin = time.perf_counter()
        expected = [found for frame in frames for found in self.emulator.run_tasks(frame, list(range(tasks)))]
        self.seconds["emulator"] += time.perf_counter() - begin
        outputs, counters = result.outputs[own], [result.counters[frame] for frame in own]
        words = np.stack([found.outputs for found in expected]).reshape(outputs.shape)
        self.different += int((words != outputs).sum())
        for layer, ids in enumerate(result.expert_ids):
            for of, frame in zip(expected, ids[own], strict=True):
                chosen = of.expert_ids[layer]
                self.different += int((chosen != frame[:, : chosen.shape[1]]).sum())
        counted = [sum(line["saturated"] for line in frame) for frame in counters]
        self.different += sum(a != sum(b.saturated.values()) for a, b in zip(counted, expected, strict=True))
        self.outputs.append(outputs)
        self.experts.append([ids[own] for ids in result.expert_ids])
        self.counters += counters

    def simulated(self, manifest: dict[str, Any], tasks: list[str], total: int) -> Simulated:
        """Return it of `total` images."""
        outputs = np.concatenate(self.outputs)
        facts = {
            "s_per_image": {way: value / total for way, value in self.seconds.items()},
            "different_words": self.different,
            "words": int(outputs.size),
            "saturated": saturations(self.counters, self.emulator, self.start),
            "traffic": {name: traffic(self.counters[place :: len(tasks)]) for place, name in enumerate(tasks)},
        }
        layers = [np.concatenate(layer) for layer in zip(*self.experts, strict=True)]
        shaped = [ids.reshape(total, len(tasks), *ids.shape[1:]) for ids in layers]
        return Simulated(real_outputs(outputs.reshape(total, len(tasks), *outputs.shape[1:]), manifest), shaped, facts)


def saturations(counters: list[list[dict[str, int]]], emulator: Emulator, start: int = 0) -> dict[str, int]:
    """Return how many values were beyond their format, by engine, over all frames; engines without any left out.

    start: the instruction that the emulator's program begins with.
    """
    found: Counter[str] = Counter()
    for frame in counters:
        for line in frame:
            if line["saturated"]:
                found[emulator.program[line["pc"] - start].op.name.lower()] += line["saturated"]
    return dict(found)


def traffic(counters: list[list[dict[str, int]]]) -> dict[str, float]:
    """Return the bytes that went through each port in a frame, mean over frames."""
    return {port: sum(line[port] for frame in counters for line in frame) / len(counters) for port in PORTS}
