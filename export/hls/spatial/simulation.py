"""C-simulation of a spatial project two ways, side by side: hls4ml's bridge and the test bench, which must agree."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from m3vit.errors import InputError
from m3vit.export.hls.schedules import Progress, Simulated
from m3vit.hw.sim import csim
from m3vit.hw.sim.compiler import kill_programs

CHUNK_IMAGES = 10  # simulated by one process; it then reads the weights again
WAYS: dict[str, tuple[Callable[[Path], Path], Callable[..., csim.SimulationResult]]] = {
    "bridge": (csim.build_bridge, csim.run_bridge),
    "testbench": (csim.build_testbench, csim.run_testbench),
}


def simulate(project: Path, images: np.ndarray, manifest: dict[str, Any], progress: Progress | None) -> Simulated:
    """Return what both ways agree on.

    Facts: s_per_image {way: seconds, all tasks together}, bridge_vs_testbench (largest difference, relative to the
    larger of 1 and the value; the test bench prints six digits, so up to 5e-6).
    """
    n, tasks = len(images), len(manifest["tasks"])
    results = _both_ways(project, images, manifest, progress)
    bridge, bench = results["bridge"].outputs, results["testbench"].outputs
    if not np.isfinite(bridge).all() or not np.isfinite(bench).all():
        raise InputError("the C-simulation has outputs that are not finite")
    for one, other in zip(results["bridge"].expert_ids, results["testbench"].expert_ids, strict=True):
        if not np.array_equal(one, other):
            raise InputError("the bridge and the test bench, built from the same sources, routed tokens differently")
    experts = [ids.reshape(n, tasks, *ids.shape[1:]) for ids in results["bridge"].expert_ids]
    facts = {
        "s_per_image": {way: result.seconds / n for way, result in results.items()},
        "bridge_vs_testbench": float((np.abs(bridge - bench) / np.maximum(1, np.abs(bridge))).max()),
    }
    return Simulated(bridge, experts, facts)


def _both_ways(
    project: Path, images: np.ndarray, manifest: dict[str, Any], progress: Progress | None
) -> dict[str, csim.SimulationResult]:
    """Build and run both ways side by side; runs are (image, task), tasks fastest; outputs [n, R, T, n_out]."""
    tasks, done, lock, stopped = len(manifest["tasks"]), 0, threading.Lock(), threading.Event()
    total = 2 * len(images)

    def report(step: int, text: str) -> None:
        nonlocal done
        with lock:
            done += step
            if progress:
                progress(done, total, text)

    def one_way(way: str) -> csim.SimulationResult:
        build, run = WAYS[way]
        report(0, f"g++ builds {way}")
        build(project)
        parts = []
        for start in range(0, len(images), CHUNK_IMAGES):
            if stopped.is_set():
                raise InputError("stopped: the other way failed")
            tokens = csim.tokenise(images[start : start + CHUNK_IMAGES], manifest["patch_size"])
            ids = np.tile(np.arange(tasks), len(tokens))
            parts.append(run(project, tokens.repeat(tasks, axis=0), ids))
            report(len(tokens), "bridge and test bench")
        outputs = np.concatenate([part.outputs for part in parts])
        return csim.SimulationResult(
            outputs.reshape(len(images), tasks, *outputs.shape[1:]),
            [np.concatenate(layer) for layer in zip(*(part.expert_ids for part in parts), strict=True)],
            sum(part.seconds for part in parts),
        )

    with ThreadPoolExecutor(len(WAYS)) as pool:
        futures = {way: pool.submit(one_way, way) for way in WAYS}
        try:
            return {way: future.result() for way, future in futures.items()}
        except BaseException:  # leaving the pool waits for its threads
            stopped.set()
            kill_programs()
            raise
