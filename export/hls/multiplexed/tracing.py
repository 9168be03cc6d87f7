"""The trace of a multiplexed project: the emulator and the C++, instruction by instruction."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3vit.errors import InputError
from m3vit.export.hls.multiplexed.scheduler import BLOCK, Units
from m3vit.export.hls.schedules import Progress
from m3vit.export.hls.tracing import Found, Layer, Place, Reference
from m3vit.hw import isa
from m3vit.hw.hardware import row_unit, stored_bits
from m3vit.hw.isa import Instruction, Mode
from m3vit.hw.manifest import WEIGHTS
from m3vit.hw.sim import csim
from m3vit.hw.sim.emulator import Emulator
from m3vit.hw.sim.stepping import step_frame


class Region(NamedTuple):
    """Where an instruction leaves its results: rows x columns in a memory.

    The columns of a row lie side by side, or in so many groups of one size, group_pitch apart.
    """

    memory: str
    rows: int
    columns: int
    offset: int
    pitch: int
    groups: int = 1
    group_pitch: int = 0
    low: int = 0  # of values of two bytes: dst_low

    def of(self, words: np.ndarray) -> np.ndarray:
        """Return them [rows, columns] from a flat memory."""
        group, places = np.divmod(np.arange(self.columns), self.columns // self.groups)
        if self.low:
            places = 2 * places - places % self.low
        index = self.offset + self.pitch * np.arange(self.rows)[:, None] + group * self.group_pitch + places
        return words[index].astype(np.int32) * 256 + words[index + self.low] if self.low else words[index]


def region_of(i: Instruction) -> Region | None:
    """Return where an instruction leaves its results, or None for one that leaves them in no memory."""
    if isinstance(i, isa.Route | isa.End):
        return None
    memory = "narrow"
    mode = getattr(i, "mode", None)
    if mode in (Mode.WIDE, Mode.RESIDUAL, Mode.QUEUE) or isinstance(i, isa.Position):
        memory = "wide"
    if mode == Mode.OUTPUT:
        memory = "output"
    rows, columns = i.rows, i.n_out if hasattr(i, "n_out") else i.n_in  # type: ignore[attr-defined]
    if isinstance(i, isa.Experts):
        columns = i.n_in
    if isinstance(i, isa.Conv):  # a row is a pixel
        pixels = i.upscale**2
        return Region(memory, rows // pixels, columns * pixels, i.dst, i.dst_pitch, pixels, i.pixel_pitch or columns)
    low = getattr(i, "dst_low", 0) if memory == "narrow" else 0
    return Region(memory, rows, columns, i.dst, i.dst_pitch, low=low)  # type: ignore[attr-defined]


class Described(NamedTuple):
    """What an instruction gives: a layer's name, its place in the lowered model, fractional bits, and the columns of
    its region that hold it (heads of attention may have unused places between them)."""

    name: str
    place: Place | None = None
    frac: int | np.ndarray | None = None
    columns: np.ndarray | None = None


def names_of(project: Path) -> dict[tuple[str, int], str]:
    """Return what lies where in the weights file, by section and offset: "blocks_0_qkv.weight" say."""
    path = project / "weights_map.json"
    try:
        tensors = json.loads(path.read_text())["tensors"]
        return {(one["section"], one["offset"]): str(one["name"]) for one in tensors}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): export the project again") from None


def describe(
    program: list[Instruction],
    names: dict[tuple[str, int], str],
    manifest: dict[str, Any],
    task: int,
    reference: Reference | None,
) -> list[Described]:
    """Return what each instruction gives; the exporter wrote them in the order of the model's layers."""
    formats, wide = manifest["precision"]["layers"], int(manifest["precision"]["wide_frac"])
    output = int(manifest["output_fracs"][task])
    found: list[Described] = []
    alone: set[str] = set()  # linear maps to wide tokens that are added to nothing
    dim, layer = 0, ""  # of the LayerNorm before, and the layer of the weights before

    def after(name: str) -> str | None:
        return reference.after(name) if reference else None

    for pc, i in enumerate(program):
        section = "gates" if isinstance(i, isa.Gate) else "weights"
        key = next((k for k in ((section, getattr(i, "weights", -1)), ("params", getattr(i, "params", -1)))
                    if k in names), None)  # fmt: skip
        full = names[key].rpartition(".")[0] if key else ""  # without ".weight", ".table", ".scale_bias"
        base = names[key].partition(".")[0] if key else layer
        following = program[pc + 1] if pc + 1 < len(program) else None
        wide = int(formats.get(base, {}).get("stream", wide))
        match i:
            case isa.Patches():
                found.append(Described("image", None, 8))
            case isa.Position():
                found.append(Described(base, base, wide))
            case isa.Norm():
                dim = i.n_in
                inner = full.endswith(".norm")
                place: Place = (base, "normed") if inner else base
                frac = wide if i.mode == Mode.WIDE else int(formats[base]["normed" if inner else "result"])
                found.append(Described(f"{base}.norm" if inner else base, place, frac))
            case isa.Linear() if isinstance(following, isa.Attention):
                attention = after(base)
                # Of the attention layer, whose name differs in the last word alone.
                kinds = formats[attention or base.removesuffix("qkv") + "attn"]
                fracs = np.repeat([int(kinds[kind]) for kind in ("query", "key", "value")], dim)
                columns = _heads(3 * following.heads, i.n_out, 3 * dim)
                found.append(Described(base, base, fracs, columns))
            case isa.Attention():
                name = after(layer) or layer.removesuffix("qkv") + "attn"
                columns = _heads(i.heads, i.n_out, dim)
                found.append(Described(name, name, int(formats[name]["result"]), columns))
            case isa.Gate():
                found.append(Described(f"{base}.gate", (base, "logit"), int(formats[base]["logit"])))
            case isa.Route():
                found.append(Described(f"{layer}.route", (layer, "logit")))
            case isa.Experts():  # of hidden units in parts, the last gives the sum
                partial = isinstance(following, isa.Experts)
                found.append(Described(full.removesuffix(".experts"), None if partial else after(base), wide))
            case isa.Conv():
                found.append(Described(full, base, output))
            case isa.Linear() if i.mode == Mode.OUTPUT:
                found.append(Described(full, base, output))
            case isa.Linear() if i.mode == Mode.NARROW and i.gelu_in >= 0:
                found.append(Described(base, after(base), i.gelu_out, _units(manifest, base, i.n_out)))
            case isa.Linear() if i.mode == Mode.NARROW:  # of a head whose outputs a convolution takes
                found.append(Described(full, None, int(formats[base][f"output{task}"])))
            case isa.Linear():
                # Of one in parts the last gives the sum; the first says whether it was added to something before.
                if i.mode == Mode.WIDE:
                    alone.add(base)
                next_name = names.get(("weights", following.weights), "") if isinstance(following, isa.Linear) else ""
                partial = ".part" in full and next_name.startswith(f"{base}.part")
                where: Place | None = base if base in alone else after(base)
                found.append(Described(full, None if partial else where, wide))
            case _:
                raise AssertionError(f"no description of {i}")
        layer = base
    return found


def _units(manifest: dict[str, Any], name: str, places: int) -> np.ndarray | None:
    """Return the columns that hold a block's hidden units, where budgets have them in parts (default: all)."""
    block, hardware = BLOCK.match(name), manifest["hardware"]
    if block is None or "budgets" not in manifest:
        return None
    counts = {budget["width"][int(block[1])] for budget in manifest["budgets"]} - {0}
    unit = row_unit(stored_bits(hardware["weight_bits"]), stored_bits(hardware["act_bits"]), hardware["port_bits"])
    units = Units(tuple(sorted(counts)), unit)
    parts = zip(units.spans, units.places, strict=False)
    columns = np.concatenate([place + np.arange(end - start) for (start, end), place in parts])
    return columns[columns < places]


def _heads(groups: int, places: int, values: int) -> np.ndarray:
    """Return the columns that hold values: the first ones of each group of places."""
    group, width = places // groups, values // groups
    return (np.arange(groups)[:, None] * group + np.arange(width)).ravel()


def trace(
    project: Path,
    manifest: dict[str, Any],
    pixels: np.ndarray,
    task: int,
    reference: Reference | None,
    progress: Progress,
    budget: int = 0,
) -> Found:
    """Return what every instruction of a frame gave, in the emulator and in the C++, and whether the frame as a whole
    has the same outputs. See m3vit.export.hls.tracing.trace."""
    emulator = Emulator.open(project / WEIGHTS, budget)
    program = emulator.program
    described = describe(program, names_of(project), manifest, task, reference)
    progress(0, len(program), "g++ builds the test bench")
    csim.build_frames(project)
    layers, output, before = [], np.zeros(0, np.int32), 0
    steps = zip(emulator.steps(pixels, task), step_frame(project, emulator.image, pixels, task, budget), strict=True)
    for (pc, state), (_, memories) in steps:
        i, what, region = program[pc], described[pc], region_of(program[pc])
        total = sum(state.saturated.values())
        saturated, before = max(total - before, memories.saturated), total
        op = i.op.name.lower()
        if region is None:
            assert memories.experts is not None
            experts = {"emulator": state.expert_ids[-1], "C++": memories.experts}
            layers.append(Layer(what.name, op, {}, what.place, experts=experts, saturated=saturated))
        else:
            words = {
                simulator: region.of(getattr(of, region.memory))
                for simulator, of in (("emulator", _arrays(state)), ("C++", memories))
            }
            if what.columns is not None:
                words = {simulator: values[:, what.columns] for simulator, values in words.items()}
            layers.append(Layer(what.name, op, words, what.place, what.frac, saturated))
            if region.memory == "output":
                output = memories.output
        progress(pc + 1, len(program), "emulator and C++")
    whole = csim.run_frames(project, pixels[None], np.array([task]), budgets=np.array([budget])).outputs.ravel()
    facts = {"simulators": ["emulator", "C++"], "whole_frame_different": int((whole != output).sum())}
    return Found(layers, facts)


class _Arrays(NamedTuple):
    narrow: np.ndarray
    wide: np.ndarray
    output: np.ndarray


def _arrays(state: Any) -> _Arrays:
    """Return the emulator's memories, which are tensors of whole numbers."""
    return _Arrays(*(getattr(state, name).numpy() for name in _Arrays._fields))
