"""Our timing rules against what Vitis HLS made: HG-PIPE's Verilog under Verilator, OmniSim's logged cosimulations.

Usage: python benchmarks/hls_truth.py [--hg-pipe DIR] [--omnisim DIR] [--blocks HEAD,...] [--cache DIR] [--json FILE]

DIR are clones that you bring (github.com/hguq/HG-PIPE, github.com/ArkaneMoose/omnisim-benchmarks); nothing of them is
in this repository. Their C++ is compiled as it is, with the objects of hw/include/dataflow in the place of its pragmas,
and runs its own test bench. Two columns: with what the C++ says (II of the pragmas; pipelines of 12 stages, 3 if they
only move values), and with the II and depth that Vitis gave each loop, as its log or the states of its Verilog say.
Needs g++ and Verilator.
"""

import argparse
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hls4ml
import numpy as np

from m3vit.errors import InputError
from m3vit.files import write_json
from m3vit.hw.dataflow import Outputs, outputs_of
from m3vit.hw.sim.compiler import run_program
from m3vit.hw.sim.dataflow import Kernel, build
from m3vit.hw.sim.instrument import Loop

# ap_int and ap_fixed, as hls4ml brings them.
TYPES = f"-I{Path(hls4ml.__file__).parent / 'templates' / 'vivado' / 'ap_types'}"
BLOCKS = ("HEAD", "PATCH_EMBED", "MLP0", "ATTN0")
FRAMES = 4
NS = 5  # of OmniSim's clock, hls.tcl
# Words are always there and always taken.
BENCH = """
#include "VTOP.h"
#include "verilated.h"
#include <cstdio>
#include <cstdlib>
int main(int argc, char **argv) {
    VTOP *top = new VTOP;
    long done = 0, frames = atol(argv[1]);
    top->ap_continue = top->o_stream_TREADY = 1;
    for (long cycle = -20; done < frames && cycle < 10000000; cycle++) {
        top->ap_rst_n = cycle >= -10;
        top->ap_start = top->i_stream_TVALID = cycle >= 0;
        top->ap_clk = 0;
        top->eval();
        if (cycle >= 0 && top->o_stream_TVALID)
            printf("%ld\\n", cycle);
        done += cycle >= 0 && top->ap_done;
        top->ap_clk = 1;
        top->eval();
    }
}
"""


@dataclass
class Row:
    """A kernel: what the tool reported, what its RTL took, and what our rules say; cycles."""

    name: str
    what: str
    reported: int | None
    rtl: int | None
    declared: int | str
    informed: int | str
    note: str = ""

    @staticmethod
    def apart(ours: int | str, rtl: int | None) -> str:
        """Return ours, and how far it is from the RTL's."""
        return f"{ours:,} ({ours / rtl - 1:+.2%})" if isinstance(ours, int) and rtl else f"{ours}"


def verilated(verilog: Path, top: str, cache: Path) -> np.ndarray:
    """Return the cycles of all words that leave a block under Verilator, FRAMES frames; kept in the cache."""
    text = verilog.read_bytes()
    folder = cache / hashlib.sha256(text + BENCH.encode()).hexdigest()[:16]
    found = folder / "words.txt"
    if not found.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.cpp").write_text(BENCH)
        options = ["--cc", "--exe", "--build", "-O3", "-Wno-fatal", "-Wno-lint", "--prefix", "VTOP", "-CFLAGS", "-O1"]
        command = ["verilator", *options, "--top-module", top, str(verilog.resolve()), "bench.cpp"]
        run_program(command, folder, "verilator")
        out = run_program([str(folder / "obj_dir" / "VTOP"), str(FRAMES)], folder, "the Verilog")
        found.write_text(out)
    return np.array([line for line in found.read_text().splitlines() if line.isdigit()], np.int64)


def of_states(verilog: str, top: str, loops: Sequence[Loop]) -> dict[int, tuple[int, int]]:
    """Return II and depth of loops as Verilog has them: the states of a pipeline, and those of an iteration.

    A loop is found by its function if that has no other, else by its label. Of several instances the deepest.
    """
    found: dict[int, tuple[int, int]] = {}
    for name, body in re.findall(rf"^module {top}_(\w+)\s*\((.*?)^endmodule", verilog, re.DOTALL | re.MULTILINE):
        states = [int(state) for state in re.findall(r"ap_block_state(\d+)_pp0_stage\d+_iter\d+", body)]
        function, _, labels = re.sub(r"_\d+$", "", name).partition("_Pipeline_")
        own = [place for place, loop in enumerate(loops) if loop.function == re.sub(r"_\d+$", "", function)]
        own = [place for place in own if not labels or len(own) == 1 or labels.endswith(loops[place].label)]
        if not states or (len(own) > 1 and not function.startswith("do_adapt")):
            continue
        ii = len(set(re.findall(r"ap_ST_fsm_pp0_stage(\d+)", body)))
        for place in own:
            before = found.get(place, (1, 1))
            found[place] = (max(ii, before[0]), max(*states, before[1]))
    return found


def hg_pipe(root: Path, blocks: Sequence[str], cache: Path) -> list[Row]:
    """Compare blocks of HG-PIPE: the interval of frames, and when the first word and the first frame leave."""
    rows = []
    for block in blocks:
        verilog = root / "SPINAL" / "src" / "main" / "verilog" / block / "all.v"
        folder = cache / "hg-pipe" / block
        headers = [str(path.relative_to(root)) for path in sorted((root / "src").glob("*.h"))]
        unit = f"case/{block}.cpp"
        if not verilog.is_file() or not (root / unit).is_file():
            raise InputError(f"{root} has no {unit} with its Verilog: give a clone of github.com/hguq/HG-PIPE")
        references = folder / "case" / "refs"
        references.parent.mkdir(parents=True, exist_ok=True)
        if not references.is_symlink():
            references.symlink_to((root / "case" / "refs").resolve())
        kernel = build(root, [*headers, unit], [unit], folder, [TYPES])
        text = verilog.read_text(errors="replace")
        reported = {key: int(value) for key, value in re.findall(r"HLS_SYN_(LAT|TPT)=(\d+)", text)}
        informed = of_states(text, block, kernel.loops)
        rtl = outputs_of(verilated(verilog, block, cache), FRAMES)
        ours, ours_informed = (outputs(kernel, folder, loops) for loops in ({}, informed))
        unmet = [f"{kernel.loops[loop].name}: II {ii}" for loop, (ii, _) in informed.items() if ii > 1]
        note = "Vitis did not meet the pragma at " + "; ".join(unmet) if unmet else ""
        for place, what in enumerate(("first word", "first frame", "interval")):
            says = (None, reported.get("LAT"), reported.get("TPT"))[place]
            rows.append(Row(block, what, says, rtl[place], ours[place], ours_informed[place], note))
    return rows


def outputs(kernel: Kernel, folder: Path, loops: dict[int, tuple[int, int]]) -> Outputs:
    """Return when frames leave a kernel of which one FIFO leads outside."""
    recording = kernel.run(folder, folder / "recording.bin", loops=loops)
    (cycles,) = recording.cycles.values()
    return outputs_of(cycles, recording.frames)


def omnisim(root: Path, cache: Path) -> list[Row]:
    """Compare OmniSim's kernels: cycles of a run, in the log of the cosimulation of Vitis HLS."""
    rows = []
    kernels = sorted(path.parent for path in root.glob("*/kernel.cpp"))
    if not kernels:
        raise InputError(f"{root} has no */kernel.cpp: give a clone of github.com/ArkaneMoose/omnisim-benchmarks")
    for own in kernels:
        folder = cache / "omnisim" / own.name
        sources = ["kernel.cpp", "kernel.hpp", "testbench.cpp"]
        kernel = build(own, sources, ["kernel.cpp", "testbench.cpp"], folder, [TYPES], ["kernel.cpp"])
        log = (own / "vitis_hls.log").read_text()
        by_line = {
            int(line): (int(ii), int(depth))
            for ii, depth, line in re.findall(r"Final II = (\d+), Depth = (\d+), loop 'VITIS_LOOP_(\d+)_\d+'", log)
        }
        informed = {n: by_line[loop.line] for n, loop in enumerate(kernel.loops) if loop.line in by_line}
        stamps = [int(stamp) for stamp in re.findall(r'RTL Simulation : \d+ / 1 \[[^]]*\] @ "(\d+)"', log)]
        rtl = (stamps[1] - stamps[0]) // (1000 * NS) if len(stamps) > 1 else None
        took = re.search(r"Took (\d+) cycles", (own / "omnisim.log").read_text())
        note = "cosimulation: " + (
            "deadlock" if "Blocked by empty" in log else f"OmniSim says {took[1]}" if took else ""
        )
        rows.append(
            Row(
                own.name,
                "cycles",
                None,
                rtl,
                ended(kernel, own, folder, {}),
                ended(kernel, own, folder, informed),
                note,
            )
        )
    return rows


def ended(kernel: Kernel, own: Path, folder: Path, loops: dict[int, tuple[int, int]]) -> int | str:
    """Return the cycles of a run, or the deadlock that it came to."""
    try:
        return kernel.run(own, folder / "recording.bin", loops=loops).end
    except InputError as error:
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hg-pipe", type=Path)
    parser.add_argument("--omnisim", type=Path)
    parser.add_argument("--blocks", default=",".join(BLOCKS), help="of HG-PIPE (default: %(default)s)")
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "m3vit" / "hls_truth"
    parser.add_argument("--cache", type=Path, default=default, help="builds and RTL runs (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    if not wanted.hg_pipe and not wanted.omnisim:
        parser.error("give --hg-pipe DIR, --omnisim DIR, or both")
    rows: list[Row] = []
    try:
        if wanted.hg_pipe:
            rows += hg_pipe(wanted.hg_pipe, wanted.blocks.split(","), wanted.cache)
        if wanted.omnisim:
            rows += omnisim(wanted.omnisim, wanted.cache)
    except InputError as error:
        parser.error(str(error))
    print("| kernel | | Vitis reports | its RTL | ours, as declared | ours, with II and depth as Vitis made them | |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        shown = [f"{count:,}" if count else "" for count in (row.reported, row.rtl)]
        ours = [Row.apart(count, row.rtl) for count in (row.declared, row.informed)]
        print("| " + " | ".join([row.name, row.what, *shown, *ours, row.note]) + " |")
    if wanted.json:
        keys: dict[str, Any] = {"rows": [vars(row) for row in rows]}
        write_json(wanted.json, keys)


if __name__ == "__main__":
    main()
