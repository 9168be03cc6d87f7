"""The expert engine in SystemVerilog (hw/rtl): built by Verilator, run on a layer with experts, synthesised by Yosys.

No torch. What is said of it is "RTL (Verilator)": cycles and words of this RTL, which is the loop of the emitted C++
written by hand, and neither Vitis HLS's nor on a board. Its memory is a model of AXI ports and DDR with the latencies
and the bandwidth that timing assumes (m3vit.hw.timed).
"""

import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3vit.errors import InputError
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
BITS_A_CYCLE = 256  # of the model's rate: parts of a byte


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
        "TILES": "distributed" if hardware.tiles_in_lut else "block",
        "INPUTS": "ultra" if hardware.uram else "block",
        "TABLE": TABLE,
    }


def table_text() -> str:
    """Return m3vit_gelu_gap.hex: of each interval its first entry, and what the next one has more."""
    values = next(table for table in TABLES if table.name == "gelu_gap").values()
    mask = (1 << SLOPE_BITS) - 1
    return "".join(
        f"{first << SLOPE_BITS | (second - first & mask):08x}\n"
        for first, second in zip(values, values[1:], strict=False)
    )


def sources() -> list[str]:
    """Return the paths of the engine's sources."""
    return [str(path) for path in sorted(SOURCES.glob("*.sv"))]


def build(folder: Path, hardware: Hardware) -> Path:
    """Build the engine of a configuration with its bench into a folder, and return the bench's path."""
    verilator = find_tool("verilator")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(table_text())
    given = [f'-G{name}="{value}"' if isinstance(value, str) else f"-G{name}={value}" for name, value in parameters_of(hardware).items()]
    command = [verilator, "--cc", "--top-module", TOP, "--Mdir", "model", "--prefix", f"V{TOP}", "-O3", "--inline-mult", "1"]
    command += ["--x-assign", "fast", "--x-initial", "fast", "--noassert", "-Wno-fatal", "-Wno-lint", "-Wno-style"]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        run_program([*command, *given, *sources()], work, "Verilator")
        root = run_program([verilator, "--getenv", "VERILATOR_ROOT"], work, "Verilator").strip()
        runtime = Path(root) / "include"
        units = {"model": sorted((work / "model").glob("*.cpp"))}
        units["bench"] = [SOURCES / "bench.cpp", runtime / "verilated.cpp", runtime / "verilated_threads.cpp"]
        flags = ["-O1", "-std=c++17", "-w", "-Imodel", f"-I{runtime}", f"-I{runtime / 'vltstd'}", "-DVM_COVERAGE=0", "-DVM_SC=0", "-DVM_TRACE=0"]

        def compiled(unit: str) -> str:
            text = "".join(f'#include "{path.resolve()}"\n' for path in units[unit] if path.is_file())
            (work / f"{unit}.cpp").write_text(text)
            run_program([*compiler(), *flags, "-c", f"{unit}.cpp", "-o", f"{unit}.o"], work, "building the RTL's bench")
            return str(work / f"{unit}.o")

        with built(folder / BENCH, "building the RTL's bench") as program, ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, units))
            run_program([*compiler(), *objects, "-pthread", "-latomic", "-o", program.name], folder, "building the RTL's bench")
    return folder / BENCH


@dataclass
class Layer:
    """A layer with experts: its instruction, the memories before it, and the router's choice [N, K] with its weights."""

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
    names = ("experts", "n_in", "n_out", "src", "src_pitch", "dst", "dst_pitch", "weights", "weights_step")
    names += ("params", "params_step", "hidden", "hidden_pitch", "gelu_in", "gelu_out")
    job = {name: getattr(i, name) for name in names} | {f"{name}_base": at for name, at in bases.items()}
    rate = assumed.bandwidth_gb_s * 1e3 * assumed.base.efficiency / assumed.clock_mhz  # bytes a cycle
    moved = 3 * len(memory) + 64 * layer.experts.size * (i.n_in + i.n_out)
    limit = round(100_000 + 4 * moved / min(rate, 1.0))
    job |= {"read": assumed.base.read, "write": assumed.base.write, "rate": round(rate * BITS_A_CYCLE), "limit": limit}
    places, starts = layer.queues()
    with tempfile.TemporaryDirectory(prefix="m3vit-rtl-") as name:
        folder = Path(name)
        (folder / "job.txt").write_text("".join(f"{key} {value}\n" for key, value in job.items()))
        (folder / "memory.bin").write_bytes(memory)
        np.concatenate([[len(places)], places.ravel(), starts]).astype(np.uint32).tofile(folder / "queues.bin")
        shutil.copyfile(bench.parent / TABLE, folder / TABLE)
        said = run_program(
            [str(bench.resolve()), "job.txt", "memory.bin", "queues.bin", "out.bin"], folder, "the RTL's bench"
        )
        left = (folder / "out.bin").read_bytes()
    found: dict[str, Any] = json.loads(said)
    after = {
        name: np.frombuffer(left, parts[name].dtype, parts[name].size, bases[name]).copy() for name in ("narrow", "wide")
    }
    return Result(after["narrow"], after["wide"], found["cycles"], found["passes"], found["words"])
