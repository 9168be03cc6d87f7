"""The expert engine in SystemVerilog (hw/rtl): built by Verilator, run on a layer with experts, synthesised by Yosys.

No torch. What is said of it is "RTL (Verilator)": cycles and words of this RTL, which is the loop of the emitted C++
written by hand, and neither Vitis HLS's nor on a board. Its memory is a model of AXI ports and DDR with the latencies
and the bandwidth that timing assumes (m3vit.hw.timed).
"""

import json
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3vit.errors import InputError
from m3vit.hw import ops
from m3vit.hw.boards import taken
from m3vit.hw.hardware import Hardware
from m3vit.hw.isa import Experts
from m3vit.hw.program import Image
from m3vit.hw.sim.compiler import built, compiler, run_program
from m3vit.hw.tables import TABLES
from m3vit.hw.timed import Timed

SOURCES, TOP, BENCH, TABLE = Path(str(files("m3vit.hw"))) / "rtl", "m3vit_experts", "rtl.exe", "m3vit_gelu_gap.hex"
TOOLS = {"verilator": "VERILATOR", "yosys": "YOSYS"}  # and the variables that name others
SLOPE_BITS = 14  # of what an entry of the table has more than the one before
MOST_FRAC = 23  # fractional bits of what GELU takes, of m3vit_gelu.sv
PAGE = 4096
# Cycles of a pass that are none of its steps and no latency of the memory, if it reads and writes; and of the first,
# which only loads. m3vit_experts.sv: from the first address to the first step, and its stages.
STEP_DEPTH, FIRST_DEPTH = 38, 13
RATE_UNIT = 256  # of the model's rate: parts of a byte
ADDRESSES = 2  # products that addresses take: a token's row times the pitch, in and out
GATES, QUEUES = "gates of two tiles", "choices, queues"  # memories of m3vit.hw.ops
# Modules of which there are many stay functions: a tenth of the code. The model's own warnings are lint.
VERILATED: tuple[str, ...] = (
    "--cc",
    "--top-module",
    TOP,
    "--prefix",
    f"V{TOP}",
    "-O3",
    "--inline-mult",
    "1",
    "--x-assign",
    "fast",
)
VERILATED += ("--x-initial", "fast", "--noassert", "-Wno-fatal", "-Wno-lint", "-Wno-style")
FLAGS = ("-O3", "-std=c++17", "-w", "-DVM_COVERAGE=0", "-DVM_SC=0", "-DVM_TRACE=0")
LEAST: tuple[str, ...] = (
    "proc",
    "opt_expr",
    "opt_clean",
    "opt_muxtree",
    "opt_reduce -fine",
    "opt_merge -share_all",
    "opt_expr",
)
LEAST += ("wreduce", "opt_clean")
LUT_MEMORIES = {"RAM32M16": 8, "RAM64M8": 8, "RAM32M": 4, "RAM64M": 4, "RAM32X1D": 2, "RAM64X1D": 2}  # LUTs of each


def find_tool(name: str) -> str:
    """Return the path of verilator or yosys. Raises InputError, with what to install, if there is none."""
    wanted = os.environ.get(TOOLS[name]) or name
    path = shutil.which(wanted)
    if path is None:
        raise InputError(f"no {wanted} found: install it (apt-get install {name}) or set {TOOLS[name]} to its path")
    return path


def parameters_of(hardware: Hardware) -> dict[str, int | str]:
    """Return the parameters of m3vit_experts.sv for a configuration of the engines."""
    return {
        "PORT_BITS": hardware.port_bits,
        "W_BITS": hardware.weight_word,
        "A_BITS": hardware.act_word,
        "ACT_BITS": hardware.act_bits,
        "PACKED": int(hardware.packed),
        "TILE_IN": hardware.tile_in,
        "TILE_OUT": hardware.tile_out,
        "TOKEN_BLOCK": hardware.token_block,
        "MAX_IN": hardware.max_in,
        "QUEUE": hardware.max_rows * hardware.max_top,
        "MAX_EXPERTS": hardware.max_experts,
        "WEIGHT_PORTS": hardware.weight_ports,
        "RESULTS": hardware.results,
        "TILES": "distributed" if hardware.tiles_in_lut else "block",
        "INPUTS": "ultra" if hardware.uram else "block",
        "TABLE": TABLE,
    }


def table_text() -> str:
    """Return m3vit_gelu_gap.hex: of each interval its first entry, and what the next one has more."""
    values = next(table for table in TABLES if table.name == "gelu_gap").values()
    mask = (1 << SLOPE_BITS) - 1
    return "".join(f"{first << SLOPE_BITS | (second - first & mask):08x}\n" for first, second in pairwise(values))


def write_sources(folder: Path, hardware: Hardware) -> list[str]:
    """Write the engine's sources, its parameters those of a configuration, and its table; return the sources' names."""
    if hardware.folded:
        raise InputError(
            "folded tiles: the RTL has none; give engines without (hw explore --out FILE, in it folded false, and "
            "export hls --config FILE)"
        )
    if hardware.two_bytes:
        raise InputError("inputs of two bytes: the RTL has those of one: export without --layer-bits")
    if hardware.wide_bits != 32:
        raise InputError(
            f"a residual stream of {hardware.wide_bits} bits: the RTL has 32 (export hls --residual-bits 32)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(table_text())
    names = []
    for path in sorted(SOURCES.glob("*.sv")):
        text = path.read_text()
        if path.stem == TOP:
            for name, value in parameters_of(hardware).items():
                given = f'"{value}"' if isinstance(value, str) else str(value)
                text, count = re.subn(rf"(\bparameter (?:int )?{name} = )[^,]+,", rf"\g<1>{given},", text)
                assert count == 1, f"{TOP}.sv has no parameter {name}"
        (folder / path.name).write_text(text)
        names.append(path.name)
    return names


def build(folder: Path, hardware: Hardware) -> Path:
    """Build the engine of a configuration with its bench into a folder, and return the bench's path."""
    verilator = find_tool("verilator")
    if hardware.token_block & hardware.token_block - 1:
        raise InputError(f"token_block {hardware.token_block}: the RTL takes powers of two")
    what, folder = "building the RTL's bench", folder.resolve()
    names = write_sources(folder, hardware)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        work = Path(temporary)
        paths = [str(folder / name) for name in names]
        run_program([verilator, *VERILATED, "--Mdir", "model", *paths], work, "Verilator")
        root = run_program([verilator, "--getenv", "VERILATOR_ROOT"], work, "Verilator").strip()
        runtime = Path(root) / "include"
        units = {
            "model": sorted((work / "model").glob("*.cpp")),
            "bench": [SOURCES / "bench.cpp", runtime / "verilated.cpp", runtime / "verilated_threads.cpp"],
        }
        flags = [*FLAGS, "-Imodel", f"-I{runtime}", f"-I{runtime / 'vltstd'}"]

        def compiled(unit: str) -> str:
            text = "".join(f'#include "{path.resolve()}"\n' for path in units[unit] if path.is_file())
            (work / f"{unit}.cpp").write_text(text)
            run_program([*compiler(), *flags, "-c", f"{unit}.cpp", "-o", f"{unit}.o"], work, what)
            return str(work / f"{unit}.o")

        with built(folder / BENCH, what) as program, ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, units))
            run_program([*compiler(), *objects, "-pthread", "-o", program.name], folder, what)
    return folder / BENCH


class Resources(NamedTuple):
    """What Yosys maps to: DSPs, BRAM in halves (a BRAM36 is two), URAMs; and LUTs, those of memories among them, and
    registers, if all of it was synthesised (else 0)."""

    dsp: int
    bram18: int
    uram: int
    lut: int = 0
    ff: int = 0


def synthesise(folder: Path, hardware: Hardware, whole: bool = True) -> Resources:
    """Return the resources of the engine of a configuration by Yosys for UltraScale+; its sources go into a folder.

    whole: `synth_xilinx -family xcup` as it is. Else its mapping of DSPs and memories alone, with the least of what
    comes before: the same DSPs and BRAMs in a tenth of the time. Modules are mapped one by one, each once.
    """
    yosys = find_tool("yosys")
    names = write_sources(folder, hardware)
    synth = f"synth_xilinx -family xcup -noiopad -noclkbuf{' -uram' if hardware.uram else ''} -top {TOP}"
    steps = [f"{synth} -run :check"] if whole else [f"{synth} -run begin:prepare", *LEAST]
    if not whole:
        steps += [f"{synth} -run map_dsp:coarse", "memory -nomap", f"{synth} -run map_memory:map_ffram"]
    reading = [f"read_verilog -sv {' '.join(names)}", f"hierarchy -check -top {TOP}"]
    run_program([yosys, "-q", "-p", "; ".join([*reading, *steps, "tee -q -o yosys.txt stat"])], folder, "Yosys")
    # Of the whole hierarchy: a kind of cell and its number, or, in later versions, the number first.
    text = (folder / "yosys.txt").read_text().rpartition("=== design hierarchy ===")[2]
    pairs = re.findall(r"^ +([A-Z]\w+) +(\d+)$", text, re.MULTILINE)
    pairs += [pair[::-1] for pair in re.findall(r"^ +(\d+) +([A-Z]\w+)$", text, re.MULTILINE)]
    cells = {name: int(number) for name, number in pairs}

    def count(*prefixes: str) -> int:
        return sum(number for name, number in cells.items() if name.startswith(prefixes))

    memories = sum(cells.get(name, 0) * luts for name, luts in LUT_MEMORIES.items())
    logic = (count("LUT") + count("SRL") + memories, count("FD")) if whole else (0, 0)
    return Resources(count("DSP48E2"), 2 * count("RAMB36E2") + count("RAMB18E2"), count("URAM"), *logic)


def modelled(hardware: Hardware) -> Resources:
    """Return what the closed form (m3vit.hw.ops, m3vit.hw.boards) counts of what the RTL has: the engine of linear maps
    without the gates of routers, one of the router's two lists of tokens, and the products of addresses."""
    linear = ops.ENGINES["linear"]
    queues = next(memory for memory in ops.route_memories(hardware) if memory.name == QUEUES)
    parts = [memory for memory in linear.memories(hardware) if memory.name != GATES] + [queues._replace(copies=1)]
    used = [taken(memory) for memory in parts]
    addresses = ADDRESSES + (hardware.weight_ports == 2)
    dsp = linear.multipliers(hardware) + linear.dsps(hardware) + addresses
    halves, urams = (sum(one[kind] for one in used) for kind in ("bram36", "uram"))
    return Resources(dsp, round(2 * halves), round(urams))


@dataclass
class Layer:
    """A layer with experts: its instruction, the memories before it, the router's choice [N, K] and its weights."""

    image: Image
    instruction: Experts
    narrow: np.ndarray
    wide: np.ndarray
    experts: np.ndarray
    weights: np.ndarray

    def queues(self) -> tuple[np.ndarray, np.ndarray]:
        """Return token and weight of each place, uint32 [N * K, 2], and where each expert's begin and end [E + 1]."""
        order = np.argsort(self.experts.ravel(), kind="stable")
        tokens = np.repeat(np.arange(len(self.experts)), self.experts.shape[1])[order]
        counts = np.bincount(self.experts.ravel(), minlength=self.instruction.experts)
        places = np.stack([tokens, self.weights.ravel()[order]], axis=1)
        return places.astype(np.uint32), np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)

    @property
    def queue(self) -> list[int]:
        """The tokens of each expert that has any."""
        return [int(count) for count in np.diff(self.queues()[1]) if count]


class Result(NamedTuple):
    """What the RTL left and took: both memories, cycles, those of each pass, and words by port."""

    narrow: np.ndarray
    wide: np.ndarray
    cycles: int
    passes: list[int]
    words: dict[str, int]


def run(bench: Path, layer: Layer, assumed: Timed) -> Result:
    """Run a layer on the built engine, with the memory's latencies and bandwidth as they are assumed.

    Raises InputError for what the engine does not take, and if it does not end.
    """
    i, image = layer.instruction, layer.image
    if i.gelu_in > MOST_FRAC:
        raise InputError(f"GELU's input has {i.gelu_in} fractional bits: the RTL takes up to {MOST_FRAC}")
    parts = {"weights": image.weights, "params": image.params, "narrow": layer.narrow, "wide": layer.wide}
    bases, memory = {}, bytearray()
    for name, values in parts.items():
        memory += bytes(-len(memory) % PAGE)
        bases[name] = len(memory)
        memory += values.tobytes()
    memory += bytes(PAGE)
    names: tuple[str, ...] = ("experts", "n_in", "n_out", "src", "src_pitch", "dst", "dst_pitch", "weights")
    names += ("weights_step", "params", "params_step", "hidden", "hidden_pitch", "gelu_in", "gelu_out")
    job = {name: getattr(i, name) for name in names} | {f"{name}_base": at for name, at in bases.items()}
    rate = assumed.bandwidth_gb_s * 1e3 * assumed.base.efficiency / assumed.clock_mhz  # bytes a cycle
    moved = 3 * len(memory) + 64 * layer.experts.size * (i.n_in + i.n_out)
    limit = round(100_000 + 4 * moved / min(rate, 1.0))
    job |= {"read": assumed.base.read, "write": assumed.base.write, "rate": round(rate * RATE_UNIT), "limit": limit}
    places, starts = layer.queues()
    with tempfile.TemporaryDirectory(prefix="m3vit-rtl-") as name:
        folder = Path(name)
        (folder / "job.txt").write_text("".join(f"{key} {value}\n" for key, value in job.items()))
        (folder / "memory.bin").write_bytes(memory)
        np.concatenate([[len(places)], places.ravel(), starts]).astype(np.uint32).tofile(folder / "queues.bin")
        (folder / TABLE).write_text(table_text())
        said = run_program(
            [str(bench.resolve()), "job.txt", "memory.bin", "queues.bin", "out.bin"], folder, "the RTL's bench"
        )
        left = (folder / "out.bin").read_bytes()
    found: dict[str, Any] = json.loads(said)
    narrow, wide = (
        np.frombuffer(left, parts[name].dtype, parts[name].size, bases[name]).copy() for name in ("narrow", "wide")
    )
    return Result(narrow, wide, found["cycles"], found["passes"], found["words"])
