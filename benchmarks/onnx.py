"""What an exported mixture of experts costs on the CPU, as ratios in one run.

    python benchmarks/onnx.py [--size 224 512] [--threads 1 2] [--rounds 15] [--packages DIR] [--json FILE]

ViT-S, random weights (time, size and memory do not depend on training), linear heads, batch 1:

- sparse: 16 experts of the embedding's width in every other block, top-4, as `m3vit export onnx` writes it;
- dense: the same trunk without experts, of equal multiply-accumulates (MACs);
- sparse, 8 kept: the same with half of each layer's experts left out: what pruning does to latency;
- all experts: the static graph, in which every token runs through every expert;
- standard: fp32 with attention in operators of every runtime, instead of onnxruntime's kernel;
- int4-experts: int8, but the experts' weights in 4 bits;
- torch: the same models in eager PyTorch.

Beside each row is what the machine allows: how long its weights take to be read, and its products at the rate of one
large one (`_onnx_limits.py`). Further rows: all five tasks at once against one, throughput of batches, and a film.

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
from functools import partial
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
from _onnx_limits import Limits
from _onnx_packages import PRECISIONS, SMALLEST, TASK, TASKS, build, export, macs, packages
from _onnx_streams import all_tasks, batches, film

from m3vit.export.runtime.ort import onnxruntime
from m3vit.export.runtime.package import ALL, Package

REFERENCE = "dense fp32"
BEST = 0.95  # of torch's time
PAUSE_S = 0.02  # between two variants: onnxruntime's threads go on spinning for a while
LOADS = 3  # fresh processes for each measurement of loading


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
    for name in ("dense", "sparse"):
        variants[f"{name} standard"] = graph(f"{name}-standard", "fp32")
    variants[f"sparse {SMALLEST}"] = graph("sparse", SMALLEST)
    if with_torch:
        import torch

        torch.set_num_threads(threads)
        variants |= {f"{name} torch": partial(eager(build(name == "sparse")), image) for name in ("dense", "sparse")}
    for run in variants.values():  # sessions are made by the first run
        run()
    shuffle, timed = random.Random(0), {name: better_of_two(run) for name, run in variants.items()}
    times, others = undisturbed(lambda: one_of_each(timed, shuffle), rounds, patience)
    found = {"size": size, "threads": threads, "rounds": len(times), "others": others, **ratios_of(times)}
    return found | {"limits": limits_of(folder, size, threads, found["variants"])}


def eager(model: Any) -> Callable[[Any], object]:
    """Return what runs a model in torch on images [B, 3, H, W]."""
    import torch

    def run(images: Any) -> object:
        with torch.inference_mode():
            return model(torch.from_numpy(images), [TASK]).logits[TASK]

    return run


def limits_of(folder: Path, size: int, threads: int, variants: Sequence[str]) -> Figures:
    """Return the machine's rates, and for each graph the ms of reading its weights and of its products."""
    machine_limits, counts, floors = Limits(threads), macs(size), {}
    names = {**packages(size), "dense standard": "dense-standard", "sparse standard": "sparse-standard"}
    for variant in variants:
        title, _, precision = variant.rpartition(" ")
        title, precision = (variant, "fp32") if precision == "standard" else (title, precision)
        if precision == "torch":
            continue
        package = Package.load(folder / names[title], verify=False)
        read = package.entry(TASK)["graphs"][precision]["weight_bytes"]
        # A package tells its MACs at the size that it was traced at: experts left out change none.
        each = counts["all experts" if title == "all experts" else title.split()[0].strip(",")]
        floors[variant] = machine_limits.floor_ms(read, each, size, precision)
    return {"rates": machine_limits.line(), "floors": floors, "macs": counts}


def ratios_of(times: list[dict[str, float]]) -> Figures:
    """Return the ratios to the reference, and those that targets are set for."""
    pairs = {
        "sparse fp32 / dense fp32": ("sparse fp32", "dense fp32"),
        "sparse fp32 / all experts fp32": ("sparse fp32", "all experts fp32"),
        "sparse int8 / dense fp32": ("sparse int8", "dense fp32"),
        "sparse fp32 / sparse torch": ("sparse fp32", "sparse torch"),
        "dense fp32 / dense torch": ("dense fp32", "dense torch"),
    }
    targeted = {
        name: statistics.median(each[above] / each[below] for each in times)
        for name, (above, below) in pairs.items()
        if below in times[0]
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
    """Return this process's memory in MB: pss (proportional set size), what of it is anonymous, no file's, and the
    most that was resident so far (peak)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split()[0].rstrip(":"): int(line.split()[1]) * 1024 / 1e6 for line in lines}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024 / 1e6
    return {"pss": sizes["Pss"], "anonymous": sizes["Anonymous"], "peak": peak}


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
    options = dict(options)
    at_once = options.pop("at_once", False)
    opened = Package.load(package, precision=precision, threads=1, verify=False, **options)
    if at_once:
        opened.logits_all(image)  # no session of one alone; the first image's time is among that of loading
    else:
        opened.session(opened.tasks[0])
    load_s = time.perf_counter() - start
    after = []
    for task in [ALL] if at_once else opened.tasks:
        for _ in range(2):
            opened.logits_all(image) if at_once else opened.logits(image, task)
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
        {key: statistics.median(run["memory_mb"][task][key] for run in runs) for key in runs[0]["memory_mb"][0]}
        for task in tasks
    ]
    return {"load_ms": 1000 * statistics.median(run["load_s"] for run in runs), "memory_mb": memory}


def storage(folder: Path, size: int) -> dict[str, Figures]:
    """Return file size, load time and memory of each package and precision, and of the ways to hold several tasks."""
    result: dict[str, Figures] = {}
    for title, name in packages(size).items():
        entry = Package.load(folder / name, verify=False).entry(TASK)
        for precision in entry["graphs"]:
            graph = entry["graphs"][precision]
            result[f"{title} {precision}"] = {
                "file_mb": (graph["bytes"] + graph["weight_bytes"]) / 1e6,
                **loading(folder / name, precision, size, {}),
            }
    for precision in PRECISIONS:
        found = loading(folder / "sparse", precision, size, {"at_once": True})
        result[f"sparse {precision}, all at once"] = found
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
    floors = figures["limits"]["floors"]
    print(f"  {figures['limits']['rates']}; ms that weights take to be read, and products, at these rates:")
    for name, entry in figures["variants"].items():
        low, high = entry["quartiles"]
        floor = "reads {:.1f}, products {:.1f}".format(*floors[name]) if name in floors else ""
        print(
            f"  {name:<20}{entry['ratio']:6.2f} x dense fp32  ({low:.2f} to {high:.2f}){entry['ms']:9.1f} ms  {floor}"
        )
    small = size < 512
    targets = {"sparse fp32 / dense fp32": 1.1 if small else 1.05, "sparse fp32 / all experts fp32": 0.6}
    targets |= {"sparse int8 / dense fp32": 0.45 if small else 0.5}
    targets |= {"sparse fp32 / sparse torch": BEST, "dense fp32 / dense torch": BEST}
    for name, target in targets.items():
        above, below = (counts.get(side.rpartition(" ")[0], 0) for side in name.split(" / "))
        if (value := figures["pairs"].get(name)) is not None:
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
            f"({memory[0]['anonymous']:.0f} anonymous, peak {memory[0]['peak']:.0f}){tasks}{more}"
        )
        if disk := entry.get("disk_mb"):
            print(f"    on disk: one task {disk[0]:.1f} MB, {len(disk)} tasks {disk[-1]:.1f} MB")
        if "low memory" in name:
            print(f"    extra task in low-memory mode: {verdict(per_extra_task(entry, 'pss'), 25)}")


def more_rows(folder: Path, size: int, threads: int, args: argparse.Namespace, counts: dict[str, int]) -> Figures:
    """Time and print all tasks at once, batches, and a film."""
    shuffle, rounds = random.Random(1), max(2, args.rounds // 3)

    def interleave(ways: dict[str, Callable[[], float]]) -> list[dict[str, float]]:
        return undisturbed(lambda: one_of_each(ways, shuffle), rounds, args.patience)[0]

    report: Figures = {"all_tasks": all_tasks(folder / "sparse", size, threads, interleave)}
    found, floor = report["all_tasks"]["ratios"], counts["all tasks"] / counts["sparse"]
    for precision in PRECISIONS:
        at_once, in_turn = (found[f"{precision} {how}"] for how in ("at once", "in turn"))
        print(
            f"  {len(TASKS)} tasks {precision}: at once {at_once:.2f} x one task, {verdict(at_once, 3.2)}; "
            f"in turn {in_turn:.2f} (MACs {floor:.2f})"
        )
    run = None if args.no_torch else eager(build(True))
    batch_sizes = (1, 4, 16) if size < 512 else (1, 4)
    report["batches"] = batches(folder / "sparse", size, threads, batch_sizes, run, interleave)
    for count, rates in report["batches"]["images_per_s"].items():
        print(f"  batch {count}: {', '.join(f'{name} {rate:.1f}' for name, rate in rates.items())} images a second")
    report["film"] = film(folder / "sparse", size, threads)
    for precision, one in report["film"]["film"].items():
        print(f"  film {precision}: {one['pace']}; inference alone {one['inference_alone']:.1f} a second")
    return report


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
        report["latency"], report["switching"], report["more"] = [], [], []
        for size in args.size:
            for threads in args.threads:
                found = latency(folder, size, threads, args.rounds, args.patience, not args.no_torch)
                report["latency"].append(found)
                print_latency(found, report["macs"][size])
                gc.collect()
                found = switching(folder, size, threads, args.rounds, args.patience)
                report["switching"].append(found)
                report["more"].append(more_rows(folder, size, threads, args, report["macs"][size]))
                print(f"  task switch: {found['ratio']:.3f} x the same task again, {verdict(found['ratio'], 1.02)}")
        if not args.no_memory:
            report["storage"] = {size: storage(folder, size) for size in args.size}
            for size, found in report["storage"].items():
                print_storage(size, found)
        save(args.json, report)


if __name__ == "__main__":
    main()
