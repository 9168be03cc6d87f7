"""C-simulation of a multiplexed project beside its emulator: every word of both must be the same."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from m3vit.errors import InputError
from m3vit.export.hls.schedules import Progress, Simulated
from m3vit.hw.manifest import WEIGHTS
from m3vit.hw.ops import PORTS
from m3vit.hw.sim import csim
from m3vit.hw.sim.emulator import Emulator

CHUNK_FRAMES = 4  # simulated by one call of the test bench, which then reads the weights again


def real_outputs(words: np.ndarray, manifest: dict[str, Any]) -> np.ndarray:
    """Return raw outputs [n, R, T, C] int32 as numbers, float32; outputs beyond a task's width are zero."""
    fracs = np.array(manifest["output_fracs"])[:, None, None]
    return np.ldexp(words.astype(np.float64), -fracs).astype(np.float32)


def simulate(project: Path, images: np.ndarray, manifest: dict[str, Any], progress: Progress | None) -> Simulated:
    """Return what test bench and emulator agree on.

    Facts: s_per_image {testbench, emulator}, different_words (between the two: 0 unless something is broken), words,
    saturated {engine: values beyond their format, of all frames}, traffic {task: {port: bytes a frame, mean}}. Raises
    InputError if the two differ.
    """
    emulator = Emulator.open(project / WEIGHTS)
    names = [task["name"] for task in manifest["tasks"]]
    tasks, total = len(names), len(images)
    if progress:
        progress(0, total, "g++ builds the test bench")
    csim.build_frames(project)
    seconds = {"testbench": 0.0, "emulator": 0.0}
    parts, experts, counters = [], [], []
    different = 0
    for start in range(0, total, CHUNK_FRAMES):
        frames = images[start : start + CHUNK_FRAMES]
        result = csim.run_frames(project, frames.repeat(tasks, axis=0), np.tile(np.arange(tasks), len(frames)))
        seconds["testbench"] += result.seconds
        begin = time.perf_counter()
        expected = [found for frame in frames for found in emulator.run_tasks(frame, list(range(tasks)))]
        seconds["emulator"] += time.perf_counter() - begin
        words = np.stack([found.outputs for found in expected]).reshape(result.outputs.shape)
        different += int((words != result.outputs).sum())
        for layer, ids in enumerate(result.expert_ids):
            different += int((np.stack([found.expert_ids[layer] for found in expected]) != ids).sum())
        counted = [sum(line["saturated"] for line in frame) for frame in result.counters]
        different += sum(a != sum(b.saturated.values()) for a, b in zip(counted, expected, strict=True))
        parts.append(result.outputs)
        experts.append(result.expert_ids)
        counters += result.counters
        if progress:
            progress(min(start + CHUNK_FRAMES, total), total, "test bench and emulator")
    outputs = np.concatenate(parts)
    if different:
        raise InputError(f"{different} of {outputs.size} words of the C-simulation are not the emulator's")
    facts = {
        "s_per_image": {way: value / total for way, value in seconds.items()},
        "different_words": different,
        "words": int(outputs.size),
        "saturated": saturations(counters, emulator),
        "traffic": {name: traffic(counters[place::tasks]) for place, name in enumerate(names)},
    }
    shaped = [np.concatenate(layer).reshape(total, tasks, *layer[0].shape[1:]) for layer in zip(*experts, strict=True)]
    return Simulated(real_outputs(outputs.reshape(total, tasks, *outputs.shape[1:]), manifest), shaped, facts)


def saturations(counters: list[list[dict[str, int]]], emulator: Emulator) -> dict[str, int]:
    """Return how many values were beyond their format, by engine, over all frames; engines without any left out."""
    found: Counter[str] = Counter()
    for frame in counters:
        for line in frame:
            if line["saturated"]:
                found[emulator.program[line["pc"]].op.name.lower()] += line["saturated"]
    return dict(found)


def traffic(counters: list[list[dict[str, int]]]) -> dict[str, float]:
    """Return the bytes that went through each port in a frame, mean over frames."""
    return {port: sum(line[port] for frame in counters for line in frame) / len(counters) for port in PORTS}
