"""How much a bus that loses cycles between bursts costs: timed C-simulation of a ViT with random weights.

Usage: python benchmarks/bursts.py [--weight-bits 8] [--act-bits 8] [--gaps 0 1 8]

The network is Edge-MoE's (129 tokens of 192 channels, 3 heads, 12 blocks, 16 experts of 384, top-2) on the engines
that `m3vit export hls` would fit to a ZCU102, with the routing of random routers. Printed are milliseconds by opcode
for each gap (cycles lost at each run of consecutive words), and of each port the words and how many a run has. Nothing
was synthesised.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from m3vit.hw.boards import find_board
from m3vit.hw.fit import fit
from m3vit.hw.timed import Trace, assumed_of, frame_report
from tests.hw.programs import Shape, Simulator, frames_of, random_vit

SHAPE = {"grid": (8, 16), "patch": 16, "dim": 192, "depth": 12, "heads": 3, "mlp": 768, "experts": 16, "hidden": 384}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--gaps", type=int, nargs="+", default=[0, 1, 8])
    options = parser.parse_args()
    bits, board = (options.weight_bits, options.act_bits), find_board("zcu102")
    shape = Shape(**SHAPE, top_k=2, tasks=1, weight_bits=bits[0], act_bits=bits[1])  # type: ignore[arg-type]
    image, _ = random_vit(shape)
    hardware = fit(image.program, *bits, board)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulator = Simulator.build(folder / "build", hardware, ["-O2", "-DM3VIT_TIMED"])
        os.environ["M3VIT_TIMED_TRACE"] = str(folder / "trace.bin")
        simulator.run(folder, image, frames_of(shape, 1), [0])
        trace = Trace.read(folder / "trace.bin").of_frame(0)
    for gap in options.gaps:
        assumed = replace(assumed_of(board, board.clock_mhz), gap=gap)
        report = frame_report(trace, image.program, hardware, assumed, "the task")
        ms: dict[str, float] = {}
        for entry in report["instructions"]:
            ms[entry["op"]] = ms.get(entry["op"], 0.0) + entry["cycles"] / assumed.clock_mhz / 1e3
        parts = ", ".join(f"{op} {value:.2f}" for op, value in ms.items())
        print(f"gap {gap}: {report['ms']:.2f} ms ({parts})")
    for port, moved in report["ports"].items():
        print(f"{port:>14}: {moved['words']:7d} words, {moved['words'] / moved['runs']:7.1f} a run")


if __name__ == "__main__":
    main()
