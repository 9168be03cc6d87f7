"""Memory of a process that predicts images of many sizes in low-memory mode, with and without give_memory_back().

    python benchmarks/memory.py PACKAGE [--images 48] [--json FILE]

PACKAGE is what `m3vit export onnx` wrote for any image size. Each way runs in a process of its own, on the same images
of 96 to 704 pixels a side, the tasks in turn. Anonymous memory: the mapped weights do not count.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from _bench import arguments, child, save

from m3vit.export.runtime.package import Package
from m3vit.heap import give_memory_back

WAYS = ("as it is", "give_memory_back")


def anonymous_mib() -> float:
    """Return this process's anonymous memory in MiB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def measure(package_dir: Path, way: str, images: int) -> dict[str, float]:
    """Return the memory after loading, and its median and maximum after each image, in MiB."""
    if way == WAYS[1]:
        give_memory_back()
    package = Package.load(package_dir, low_memory=True)
    for task in package.tasks:
        package.predict(np.zeros((224, 224, 3), np.uint8), task)
    rng, loaded, seen = np.random.default_rng(0), anonymous_mib(), []
    for index in range(images):
        height, width = (int(side) for side in 16 * rng.integers(6, 45, 2))
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        package.predict(image, package.tasks[index % len(package.tasks)])
        seen.append(anonymous_mib())
    return {"loaded_mib": loaded, "median_mib": statistics.median(seen), "max_mib": max(seen)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("package", type=Path, metavar="PACKAGE")
    parser.add_argument("--images", type=int, default=48, help="images to predict (default: 48)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # one of them, in this process
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.package, args.way, args.images)))
        return
    results = {}
    for way in WAYS:
        results[way] = child([args.package, "--images", args.images, "--way", way])
        print(way, {name: round(value) for name, value in results[way].items()}, flush=True)
    save(args.json, results)


if __name__ == "__main__":
    main()
