"""The time-multiplexed accelerator: seconds a frame of C-simulation and emulator, and bytes between chip and DDR.

    python benchmarks/hls.py [--sizes tiny edge-moe vit-s] [--bits W16A16 W8A16 W8A8] [--repeats 3] [--json FILE]
    python benchmarks/hls.py --export [--sizes vit-s] [--json FILE]

Models have random weights (vit-s: experts up-cycled from the MLPs) and are exported as by `m3vit export hls --schedule
multiplexed`. Each is simulated for one task, with the flags of the project's Makefile (-O3) and with -march=native
added; the emulator runs on one thread and on all, and on one its matrix products are timed alone: what it would take if
all else were free. For an idle machine: ratios are of wall-clock seconds, as C-simulation has one thread. Words are
compared. Nothing is synthesised: bytes are counted by the C++.

With --export what exporting takes instead, by all cores: four tasks, as many images of calibration and samples as
`m3vit export hls` takes by default, in each format, seconds, and megabytes of the test bench.
"""

import math
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from _bench import arguments, machine, save  # says how OpenMP's threads wait: before torch is imported

# isort: split
import numpy as np
import torch

from m3vit.export.hls.from_run import default_images
from m3vit.export.hls.multiplexed.simulation import traffic
from m3vit.export.hls.project import Samples, export_project
from m3vit.hw.manifest import WEIGHTS
from m3vit.hw.sim import csim
from m3vit.hw.sim.emulator import Emulator
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import new_model

COMMON: dict[str, Any] = {"tasks": ["semseg", "depth"], "head": "linear"}
SIZES: dict[str, dict[str, Any]] = {
    # The recipe synthetic-tiny: 192 tokens, 64 channels, 4 layers, 8 experts, top-2.
    "tiny": {
        "trunk": "vit_tiny_patch16_224",
        "trunk_args": {
            "patch_size": 8,
            "embed_dim": 64,
            "depth": 4,
            "num_heads": 4,
            "mlp_ratio": 2,
            "class_token": False,
            "global_pool": "",
        },
        "image_size": (96, 128),
        "num_experts": 8,
        "top_k": 2,
    },
    # Edge-MoE (arXiv 2305.18691): 129 tokens, 192 channels, 12 layers, 16 experts of 384, top-2.
    "edge-moe": {
        "trunk": "vit_tiny_patch16_224",
        "image_size": (128, 256),
        "num_experts": 16,
        "top_k": 2,
        "expert_ratio": 2.0,
    },
    # M3ViT-S (arXiv 2210.14793) on 512 x 512: 1024 tokens and a class token, 384 channels, 16 experts of 384, top-4.
    "vit-s": {
        "trunk": "deit_small_patch16_224",
        "trunk_args": {"num_heads": 12},
        "image_size": (512, 512),
        "num_experts": 16,
        "top_k": 4,
        "init": "upcycle",
        "upcycle_gates": 1.0,
    },
}
MAKEFILE_FLAGS = ("-O3", "-std=c++11")


def images_of(size: tuple[int, int], count: int) -> np.ndarray:
    """Return blotches with noise, uint8 [count, H, W, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (count, size[0] // 8, size[1] // 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return (coarse + rng.integers(0, 56, coarse.shape)).astype(np.uint8)


BITS = {"W16A16": (16, 16), "W8A16": (8, 16), "W8A8": (8, 8)}


def timed(function: Callable[[], Any], who: int, repeats: int) -> tuple[Any, float, float]:
    """Return the result, and the least wall-clock and processor seconds of a call (`who`: this process or children)."""
    walls, processor = [], []
    for _ in range(repeats):
        before, start = resource.getrusage(who), time.perf_counter()
        result = function()
        walls.append(time.perf_counter() - start)
        after = resource.getrusage(who)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return result, min(walls), min(processor)


def products(function: Callable[[], Any]) -> dict[str, float]:
    """Return how many products matrix products take in a call, as the processor multiplies, and their seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    found = [event for event in profile.events() if event.name in ("aten::mm", "aten::_int_mm")]
    shapes = [(*event.input_shapes[0], event.input_shapes[1][1]) for event in found]
    return {"seconds": sum(event.self_cpu_time_total for event in found) / 1e6, "count": sum(map(math.prod, shapes))}


def simulate(project: Path, images: np.ndarray, flags: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """Build with `flags` and time one frame of task 0."""
    csim.MULTIPLEXED_FLAGS = flags
    csim.build_frames(project)
    ids = np.zeros(1, dtype=int)
    result, wall, processor = timed(
        lambda: csim.run_frames(project, images[:1], ids), resource.RUSAGE_CHILDREN, repeats
    )
    return {"result": result, "seconds": wall, "processor_seconds": processor}


def measure(name: str, bits: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Export a model of one size and format, and return its figures."""
    torch.manual_seed(0)
    config = ModelConfig(**COMMON, **SIZES[name])
    model = new_model(config).eval()
    images = images_of(config.image_size, 1)
    labels = {"depth": np.ones(config.image_size, np.float32), "semseg": np.zeros(config.image_size, np.uint8)}
    start = time.perf_counter()
    weight_bits, act_bits = BITS[bits]
    options: dict[str, Any] = {"schedule": "multiplexed", "weight_bits": weight_bits, "act_bits": act_bits}
    export_project(model, folder, calibration=images, samples=Samples(["0"], images, [labels]), **options)
    export_seconds = time.perf_counter() - start
    ways = {"makefile": MAKEFILE_FLAGS, "native": (*MAKEFILE_FLAGS, "-march=native")}
    simulations = {way: simulate(folder, images, flags, repeats) for way, flags in ways.items()}
    emulator, threads = Emulator.open(folder / WEIGHTS), torch.get_num_threads()
    emulations: dict[int, dict[str, float]] = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        emulator.run(images[0], 0)  # warms up
        emulated, wall, processor = timed(lambda: emulator.run(images[0], 0), resource.RUSAGE_SELF, repeats)
        emulations[count] = {"seconds": wall, "processor_seconds": processor}
        if count == 1:
            multiplied = products(lambda: emulator.run(images[0], 0))
        for simulation in simulations.values():
            assert np.array_equal(simulation["result"].outputs.ravel(), emulated.outputs), "words differ"
    torch.set_num_threads(threads)
    moved = traffic(simulations["native"]["result"].counters)
    weights = (folder / WEIGHTS).stat().st_size
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "export_seconds": export_seconds,
        "weights_bytes": weights,
        "csim": {way: {k: v for k, v in found.items() if k != "result"} for way, found in simulations.items()},
        "emulator": emulations,
        "emulator_products": multiplied,
        "ddr_bytes": moved,
        "saturated": sum(line["saturated"] for line in simulations["native"]["result"].counters[0]),
    }
    result["emulator_is_faster"] = {
        way: {count: found["seconds"] / times["seconds"] for count, times in emulations.items()}
        for way, found in simulations.items()
    }
    return result


def exports(name: str, folder: Path) -> dict[str, dict[str, float]]:
    """Export a model of one size with four tasks in each format, and return seconds and megabytes; print them."""
    torch.manual_seed(0)
    model = new_model(ModelConfig(**COMMON | {"tasks": ["semseg", "depth", "normals", "edge"]}, **SIZES[name])).eval()
    few, stored = default_images(model)
    images = images_of(model.config.image_size, few + stored)
    height, width = model.config.image_size
    labels = {
        **{"semseg": np.zeros((height, width), np.uint8), "depth": np.ones((height, width), np.float32)},
        **{"normals": np.ones((height, width, 3), np.float32), "edge": np.zeros((height, width), bool)},
    }
    found = {}
    for bits, (weight_bits, act_bits) in BITS.items():
        samples = Samples([str(place) for place in range(stored)], images[few:], [labels] * stored)
        options: dict[str, Any] = {"schedule": "multiplexed", "weight_bits": weight_bits, "act_bits": act_bits}
        options |= {"calibration": images[:few], "samples": samples}
        project = folder / bits
        export = partial(export_project, model, project, **options)
        _, wall, processor = timed(export, resource.RUSAGE_SELF, repeats=1)
        bench = sum(path.stat().st_size for path in (project / "tb_data").rglob("*") if path.is_file()) / 1e6
        found[bits] = {"seconds": wall, "processor_seconds": processor, "test_bench_mb": bench}
        print(
            f"{name}, {bits}, {few} images and {stored} samples: export {wall:.1f} s ({processor:.1f} s of processor), "
            f"test bench {bench:.1f} MB"
        )
    return found


def show(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: {found['parameters'] / 1e6:.2f} M parameters, weights.bin {found['weights_bytes'] / 1e6:.1f} MB")
    print(f"  export {found['export_seconds']:.1f} s; {found['saturated']} values saturated; words equal")
    for way, times in found["csim"].items():
        faster = (
            f"{ratio:.1f} x the emulator's on {count}" for count, ratio in found["emulator_is_faster"][way].items()
        )
        print(
            f"  C-sim, {way} flags: {times['seconds']:.2f} s a frame "
            f"({times['processor_seconds']:.2f} s of processor), {', '.join(faster)}"
        )
    for threads, times in found["emulator"].items():
        print(
            f"  emulator, {threads} thread{'s' if threads > 1 else ''}: {times['seconds']:.2f} s a frame "
            f"({times['processor_seconds']:.2f} s of processor)"
        )
    multiplied = found["emulator_products"]
    limits = (times["seconds"] / multiplied["seconds"] for times in found["csim"].values())
    print(
        f"  of which on one thread {multiplied['count'] / 1e9:.1f} G products: {multiplied['seconds']:.2f} s; were all "
        f"else free, C-sim would take {' and '.join(f'{limit:.1f}' for limit in limits)} x as long"
    )
    total = sum(found["ddr_bytes"].values())
    parts = ", ".join(f"{port} {bytes_ / 1e6:.2f}" for port, bytes_ in found["ddr_bytes"].items())
    print(f"  DDR, MB a frame: {total / 1e6:.1f} ({parts})")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--bits", nargs="+", choices=list(BITS), help="formats that are simulated (default: W16A16)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--export", action="store_true", help="time exports alone")
    args = parser.parse_args()
    if args.export and args.bits:
        parser.error("--bits: --export times every format; leave one of the two options out")
    compiler = subprocess.run([csim.find_compiler(), "--version"], capture_output=True, text=True).stdout.splitlines()
    results: dict[str, Any] = {"machine": machine(), "compiler": compiler[0]}
    print(compiler[0])
    for name in args.sizes if args.export else ():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = exports(name, Path(folder))
    for name, bits in () if args.export else product(args.sizes, args.bits or ["W16A16"]):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(name, bits, args.repeats, Path(folder) / "project")
        results.setdefault(name, {})[bits] = found
        show(f"{name}, {bits}", found)
    save(args.json, results)


if __name__ == "__main__":
    main()
