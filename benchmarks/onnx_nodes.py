"""Where the time of an exported ViT-S goes, by operator: why a row of benchmarks/onnx.py is what it is.

    python benchmarks/onnx_nodes.py --packages DIR [--size 224 512] [--threads 1 2] [--runs 12]

onnxruntime's profile of the packages of `benchmarks/onnx.py --packages DIR` (exported there if they are not), dense and
sparse, in fp32 and int8. Of each node the fastest of the runs counts, which other processes disturb least; the sum over
nodes is near what a run takes on an idle machine. Operators below 1 % of a graph are left out.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# Python looks for modules in this file's folder first, and onnx.py there would be the module onnx: look there last.
sys.path.sort(key=lambda entry: Path(entry or ".").resolve() == Path(__file__).resolve().parent)
import numpy as np
from _bench import machine
from _onnx_packages import PRECISIONS, TASK, export

from m3vit.export.runtime.ort import onnxruntime, session_options
from m3vit.export.runtime.package import Package

LEAST = 0.01  # of a graph's time
END = "_kernel_time"


def node_times(graph: Path, image: Any, threads: int, runs: int) -> dict[str, tuple[str, float]]:
    """Return {node: (operator, ms of its fastest run)}."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "nodes")
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for _ in range(runs):
            session.run(None, {name: image})
        events = json.loads(Path(session.end_profiling()).read_text())
    found: dict[str, tuple[str, float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(END):
            node, ms = event["name"].removesuffix(END), event["dur"] / 1000
            found[node] = event["args"]["op_name"], min(ms, found.get(node, ("", ms))[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", type=int, nargs="+", default=[224, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=12)
    args = parser.parse_args()
    machine()
    export(args.packages, args.size)
    for size in args.size:
        image = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
        for threads in args.threads:
            for name in ("dense", "sparse"):
                for precision in PRECISIONS:
                    graph = Package.load(args.packages / name, verify=False).entry(TASK)["graphs"][precision]["file"]
                    nodes = node_times(args.packages / name / graph, image, threads, args.runs)
                    total = sum(ms for _, ms in nodes.values())
                    times, counts = Counter[str](), Counter(operator for operator, _ in nodes.values())
                    for operator, ms in nodes.values():
                        times[operator] += ms  # type: ignore[assignment]
                    line = ", ".join(
                        f"{operator} {ms:.1f} ({counts[operator]})"
                        for operator, ms in times.most_common()
                        if ms > LEAST * total
                    )
                    print(f"{size}x{size}, {threads} threads, {name} {precision}: {total:.1f} ms: {line}")


if __name__ == "__main__":
    main()
