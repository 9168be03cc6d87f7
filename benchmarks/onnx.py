"""What an exported mixture of experts costs on the CPU, as ratios in one run.

    python benchmarks/onnx.py [--size 224 512] [--threads 1 2] [--rounds 15] [--packages DIR] [--json FILE]

ViT-S, random weights (time, size and memory do not depend on training), linear heads, batch 1:

- sparse: 16 experts of the embedding's width in every other block, top-4, as `m3vit export onnx` writes it;
- dense: the same trunk without experts, of equal multiply-accumulates (MACs);
- sparse, 8 kept: the same with half of each layer's experts left out: what pruning does to latency;
- all experts: the static graph, in which every token runs through every expert;
- torch: the same models in eager PyTorch.

Latencies are ratios to the dense graph in fp32: all variants take turns in shuffled order, and the median over the
rounds of each round's ratio counts. A round during which other processes used the CPU is repeated; if the machine does
not become idle, the least disturbed rounds are used and the output says so. Loading and memory are measured in a fresh
process each. Memory is the proportional set size (a page of a file that is mapped twice counts once), after glibc has
been told to return what is free: it keeps up to hundreds of MB of the last images' activations, or not, by chance. The
JSON file has the figure before that too (`held`).
"""

import argparse
import ctypes
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Python looks for modules in this file's folder first, and this file would be the module onnx: look there last.
sys.path.sort(key=lambda entry: Path(entry or ".").resolve() == Path(__file__).resolve().parent)
import numpy as np
from _bench import (
    BUSY,
    Figures,
    arguments,
    child,
    machine,
    one_of_each,
    ratios,
    save,
    seconds,
    undisturbed,
)

from m3vit.export.runtime.ort import onnxruntime
from m3vit.export.runtime.package import Package

EXPERTS, TOP_K = 16, 4
TASKS = ("depth", "normals", "edge", "semseg")
TASK = "depth"  # one channel: the head that adds least to what is compared
PRECISIONS = ("fp32", "int8")
REFERENCE = "dense fp32"
PAUSE_S = 0.02  # between two variants: onnxruntime's threads go on spinning for a while
LOADS = 3  # fresh processes for each measurement of loading


# --- models and packages ---------------------------------------------------------------------------------------------


def config(moe: bool, size: int = 224) -> Any:
    """Return the configuration of the sparse or the dense model."""
    from m3vit.models.config import ModelConfig

    return ModelConfig(
        trunk="vit_small_patch16_224",
        image_size=(size, size),
        tasks=list(TASKS) if moe else [TASK],
        moe_blocks="odd" if moe else "none",
        num_experts=EXPERTS,
        top_k=TOP_K,
    )


def build(moe: bool) -> Any:
    """Return the model with random weights, in evaluation mode."""
    import torch

    from m3vit.models.initialise import new_model

    torch.manual_seed(0)
    return new_model(config(moe)).eval()


def contents(sizes: Sequence[int]) -> dict[str, Any]:
    """Return what each package holds, by its name."""
    from m3vit.export.onnx.package import Content
    from m3vit.models.budget import Budget

    both = Content(precisions=PRECISIONS)
    kept = dict.fromkeys(range(1, 12, 2), tuple(range(EXPERTS // 2)))
    every = {"sparse": both, "dense": both, "kept": replace(both, budget=Budget(kept={TASK: kept}))}
    return every | {f"all-{size}": replace(both, size=(size, size), static=True) for size in sizes}


def export(folder: Path, sizes: Sequence[int]) -> float:
    """Write the packages that are not in `folder` yet; return the seconds that a task of the sparse model took."""
    from m3vit.export.onnx.package import export_package
    from m3vit.models.initialise import new_model

    seconds = 0.0
    for name, content in contents(sizes).items():
        if (folder / name / "manifest.json").is_file():
            continue
        print(f"exporting {name}", file=sys.stderr, flush=True)
        model = build(name != "dense")
        if name not in ("sparse", "dense"):  # one task is enough
            only = new_model(replace(model.config, tasks=[TASK]))
            only.load_state_dict({key: value for key, value in model.state_dict().items() if key in only.state_dict()})
            model = only.eval()
        start = time.perf_counter()
        export_package(model, folder / name, content, info={})
        if name == "sparse":
            seconds = (time.perf_counter() - start) / len(TASKS)
    return seconds


def packages(size: int) -> dict[str, str]:
    """Return the package of each kind of graph."""
    return {"dense": "dense", "sparse": "sparse", "sparse, 8 kept": "kept", "all experts": f"all-{size}"}


def macs(size: int) -> dict[str, int]:
    """Return the MACs of one image of a task, head included."""
    from m3vit.profiling import profile

    configs = {
        "dense": config(False, size),
        "sparse": config(True, size),
        "all experts": replace(config(True, size), top_k=EXPERTS),
    }
    return {name: profile(each, TASK)["tasks"][TASK]["macs"]["total"] for name, each in configs.items()}


# --- interleaved timing ----------------------------------------------------------------------------------------------


def better_of_two(run: Callable[[], object]) -> Callable[[], float]:
    """Return what times a run: the better of two, as the first finds cold caches."""

    def measure() -> float:
        time.sleep(PAUSE_S)
        return min(seconds(run), seconds(run))

    return measure


def latency(folder: Path, size: int, threads: int, rounds: int, patience: int, with_torch: bool) -> Figures:
    """Time all variants at one image size and number of threads."""
    image = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    variants: dict[str, Callable[[], object]] = {}

    def graph(name: str, precision: str) -> Callable[[], object]:
        package = Package.load(folder / name, precision=precision, threads=threads, verify=False)
        return lambda: package.logits(image, TASK)

    for title, name in packages(size).items():
        for precision in PRECISIONS:
            variants[f"{title} {precision}"] = graph(name, precision)
    if with_torch:
        import torch

        torch.set_num_threads(threads)
        tensor = torch.from_numpy(image)

        def eager(model: Any) -> Callable[[], object]:
            def run() -> object:
                with torch.inference_mode():
                    return model(tensor, [TASK]).logits[TASK]

            return run

        variants |= {f"{name} torch": eager(build(name == "sparse")) for name in ("dense", "sparse")}
    for run in variants.values():  # sessions are made by the first run
        run()
    shuffle, timed = random.Random(0), {name: better_of_two(run) for name, run in variants.items()}
    times, others = undisturbed(lambda: one_of_each(timed, shuffle), rounds, patience)
    return {"size": size, "threads": threads, "rounds": len(times), "others": others, **ratios_of(times)}


def ratios_of(times: list[dict[str, float]]) -> Figures:
    """Return the ratios to the reference, and those that targets are set for."""
    pairs = {
        "sparse fp32 / dense fp32": ("sparse fp32", "dense fp32"),
        "sparse fp32 / all experts fp32": ("sparse fp32", "all experts fp32"),
        "sparse int8 / dense fp32": ("sparse int8", "dense fp32"),
    }
    targeted = {
        name: statistics.median(each[above] / each[below] for each in times) for name, (above, below) in pairs.items()
    }
    return {"variants": ratios(times, REFERENCE), "pairs": targeted}


def switching(folder: Path, size: int, threads: int, rounds: int, patience: int) -> Figures:
    """Return what running another task than the last time costs, as a ratio to running the same one again."""
    package = Package.load(folder / "sparse", threads=threads, verify=False)
    image = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    first, second = TASKS[:2]

    def run(task: str) -> float:
        return seconds(lambda: package.logits(image, task))

    def ratio() -> float:
        """Run each task once after itself and once after the other, twice."""
        run(first)
        same, switched = 0.0, 0.0
        for _ in range(2):
            same += run(first)
            switched += run(second)
            same += run(second)
            switched += run(first)
        return switched / same

    ratio()  # makes the sessions
    found, others = undisturbed(ratio, rounds, patience)
    return {"size": size, "threads": threads, "ratio": statistics.median(found), "others": others}


# --- loading and memory, in processes of their own -------------------------------------------------------------------


def memory_mb() -> dict[str, float]:
    """Return this process's memory in MB: pss (proportional set size) and what of it is anonymous, no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split()[0].rstrip(":"): int(line.split()[1]) * 1024 / 1e6 for line in lines}
    return {"pss": sizes["Pss"], "anonymous": sizes["Anonymous"]}


def return_free_memory() -> None:
    """Give the free parts of the heap back to the system, where the C library can (glibc)."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def load_in_this_process(package: Path, precision: str, size: int, options: dict[str, Any]) -> Figures:
    """Open a package, run one task after the other, and return what that took."""
    # Noise: the tokens of a plain image would use few experts, and what is mapped is in memory once it is used.
    image = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    before = memory_mb()
    start = time.perf_counter()
    opened = Package.load(package, precision=precision, threads=1, verify=False, **options)
    opened.session(opened.tasks[0])
    load_s = time.perf_counter() - start
    after = []
    for task in opened.tasks:
        for _ in range(2):
            opened.logits(image, task)
        held = memory_mb()["pss"]
        return_free_memory()
        now = memory_mb()
        after.append({key: now[key] - before[key] for key in now} | {"held": held - before["pss"]})
    return {"load_s": load_s, "memory_mb": after}


def loading(package: Path, precision: str, size: int, options: dict[str, Any]) -> Figures:
    """Measure loading and memory in fresh processes: the median of each."""
    runs = [child(["--child", json.dumps([str(package), precision, size, options])]) for _ in range(LOADS)]
    tasks = range(len(runs[0]["memory_mb"]))
    memory = [
        {key: statistics.median(run["memory_mb"][task][key] for run in runs) for key in ("pss", "anonymous", "held")}
        for task in tasks
    ]
    return {"load_ms": 1000 * statistics.median(run["load_s"] for run in runs), "memory_mb": memory}


def storage(folder: Path, size: int) -> dict[str, Figures]:
    """Return file size, load time and memory of each package and precision, and of the ways to hold several tasks."""
    result: dict[str, Figures] = {}
    for title, name in packages(size).items():
        entry = Package.load(folder / name, verify=False).entry(TASK)
        for precision in PRECISIONS:
            graph = entry["graphs"][precision]
            result[f"{title} {precision}"] = {
                "file_mb": (graph["bytes"] + graph["weight_bytes"]) / 1e6,
                **loading(folder / name, precision, size, {}),
            }
    result["sparse fp32"]["disk_mb"] = on_disk(folder / "sparse", "fp32")
    with tempfile.TemporaryDirectory() as cache:
        ways: dict[str, dict[str, Any]] = {"low memory": {"low_memory": True}, "cache": {"cache": cache}}
        for way, options in ways.items():
            if way == "cache":  # made by the first process that asks
                loading(folder / "sparse", "fp32", size, options)
            for precision in PRECISIONS:
                result[f"sparse {precision}, {way}"] = loading(folder / "sparse", precision, size, options)
    return result


def on_disk(package: Path, precision: str) -> list[float]:
    """Return the MB that the first task, the first two, ... need on disk: their graphs, and each stored tensor once."""
    import onnx

    tasks = Package.load(package, verify=False).manifest["tasks"]
    tensors: dict[str, int] = {}
    graphs, sizes = 0, []
    for entry in tasks.values():
        path = package / entry["graphs"][precision]["file"]
        graphs += path.stat().st_size
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            place = {item.key: item.value for item in tensor.external_data}
            tensors |= {place["offset"]: int(place["length"])} if place else {}
        sizes.append((graphs + sum(tensors.values())) / 1e6)
    return sizes


def per_extra_task(figures: Figures, key: str) -> float:
    """Return the MB that each task after the first adds."""
    memory = [entry[key] for entry in figures["memory_mb"]]
    return (memory[-1] - memory[0]) / (len(memory) - 1)


# --- the command -----------------------------------------------------------------------------------------------------


def verdict(value: float, target: float) -> str:
    return f"target {target:g}: {'met' if value <= target else 'MISSED'}"


def print_latency(figures: Figures, counts: dict[str, int]) -> None:
    size, threads = figures["size"], figures["threads"]
    print(f"\nlatency, {size}x{size}, {threads} thread{'s' * (threads > 1)}, {figures['rounds']} rounds")
    if figures["others"] > BUSY:
        print(f"  the machine was busy (others used up to {figures['others']:.2f} cores): do not quote these")
    for name, entry in figures["variants"].items():
        low, high = entry["quartiles"]
        print(f"  {name:<20}{entry['ratio']:6.2f} x dense fp32  ({low:.2f} to {high:.2f}){entry['ms']:9.1f} ms")
    targets = {"sparse fp32 / dense fp32": 1.05, "sparse fp32 / all experts fp32": 0.6}
    targets |= {"sparse int8 / dense fp32": 0.5} if size == 224 else {}
    for name, target in targets.items():
        above, below = (counts[side.rpartition(" ")[0]] for side in name.split(" / "))
        value = figures["pairs"][name]
        print(f"  {name}: {value:.3f}, {verdict(value, target)} (MACs {above / below:.3f})")


def print_storage(size: int, found: dict[str, Figures]) -> None:
    print(
        f"\nsize and memory, {size}x{size}, 1 thread; memory after running the tasks, less that of the process before"
    )
    for name, entry in found.items():
        memory = entry["memory_mb"]
        file = f"{entry['file_mb']:7.1f} MB file," if "file_mb" in entry else " " * 16
        tasks = f", {len(memory)} tasks {memory[-1]['pss']:.0f}" if len(memory) > 1 else ""
        more = f", an extra task {per_extra_task(entry, 'pss'):.1f} MB" if len(memory) > 1 else ""
        print(
            f"  {name:<25}{file} load {entry['load_ms']:5.0f} ms, memory {memory[0]['pss']:.0f} MB "
            f"({memory[0]['anonymous']:.0f} anonymous){tasks}{more}"
        )
        if disk := entry.get("disk_mb"):
            print(f"    on disk: one task {disk[0]:.1f} MB, {len(disk)} tasks {disk[-1]:.1f} MB")
        if "low memory" in name:
            print(f"    extra task in low-memory mode: {verdict(per_extra_task(entry, 'pss'), 25)}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, nargs="+", default=[224, 512], help="image sides, multiples of 16")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15, help="undisturbed rounds of each comparison")
    parser.add_argument("--patience", type=int, default=4, help="run at most so many times as many rounds")
    parser.add_argument("--packages", type=Path, default=None, help="folder to keep the packages in, and to reuse")
    parser.add_argument("--no-torch", action="store_true", help="leave eager PyTorch out")
    parser.add_argument("--no-memory", action="store_true", help="leave loading and memory out")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        package, precision, size, options = json.loads(args.child)
        print(json.dumps(load_in_this_process(Path(package), precision, size, options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.packages or Path(temporary)
        report: Figures = {"machine": machine(), "onnxruntime": onnxruntime.__version__}
        report["export_s"] = export(folder, args.size)
        if report["export_s"]:
            print(f"export of one task in both precisions: {report['export_s']:.1f} s")
        report["macs"] = {size: macs(size) for size in args.size}
        for size, counts in report["macs"].items():
            parts = (f"{name} {count / 1e9:.2f} ({count / counts['dense']:.3f} x)" for name, count in counts.items())
            print(f"GMAC, {size}x{size}: {', '.join(parts)}")
        report["latency"], report["switching"] = [], []
        for size in args.size:
            for threads in args.threads:
                found = latency(folder, size, threads, args.rounds, args.patience, not args.no_torch)
                report["latency"].append(found)
                print_latency(found, report["macs"][size])
                gc.collect()
                found = switching(folder, size, threads, args.rounds, args.patience)
                report["switching"].append(found)
                print(f"  task switch: {found['ratio']:.3f} x the same task again, {verdict(found['ratio'], 1.02)}")
        if not args.no_memory:
            report["storage"] = {size: storage(folder, size) for size in args.size}
            for size, found in report["storage"].items():
                print_storage(size, found)
        save(args.json, report)


if __name__ == "__main__":
    main()
