"""The trace of a spatial project: hls4ml's own (nnet::save_layer_output), put into a copy of its sources.

hls4ml writes these lines when it writes a project for tracing; here they are added to the sources that there are, so
that an edited project is traced as it is.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3vit.errors import InputError
from m3vit.export.hls.schedules import Progress
from m3vit.export.hls.tracing import Found, Layer, Place, Reference
from m3vit.hw.sim import csim

STREAM = re.compile(r"hls::stream<(\w+)> &?(\w+)")
CALL = re.compile(r"^ +nnet::\S.*?\((.*)\); // (\w+)$", re.MULTILINE)
TYPE = re.compile(r"^typedef nnet::array<ap_u?fixed<(\d+),(-?\d+)[^>]*>, *(\d+)\*1> (\w+);", re.MULTILINE)
STORAGE = "    nnet::trace_type_size = element_size;\n"
CLONE = "clone_"
IGNORED = shutil.ignore_patterns("*.so", "*.o", "*.exe", "*.npz")


class Traced(NamedTuple):
    """A layer whose outputs are written down: rows x columns of ap_fixed<bits, integer>."""

    name: str
    rows: int
    columns: int
    bits: int
    integer: int


def trace(
    project: Path,
    manifest: dict[str, Any],
    pixels: np.ndarray,
    task: int,
    reference: Reference | None,
    progress: Progress,
) -> Found:
    """Return what every layer of a frame gave in the C++. See m3vit.export.hls.tracing.trace.

    saturated: values at either end of their format, which C-simulation of ap_fixed does not tell from beyond it.
    """
    progress(0, 1, "g++ builds the bridge with hls4ml's trace")
    with tempfile.TemporaryDirectory(prefix="m3vit-trace-") as name:
        folder = Path(shutil.copytree(project, Path(name) / "project", ignore=IGNORED))
        traced = instrument(folder, manifest)
        csim.build_bridge(folder)
        progress(0, 1, "the bridge")
        values, routing = csim.trace_bridge(folder, csim.tokenise(pixels[None], manifest["patch_size"]), task, traced)
    layers = []
    moes = iter(routing)
    for layer, found in zip(traced, values, strict=True):
        least, most = (np.ldexp(end, layer.integer - layer.bits) for end in _ends(layer.bits))
        saturated = int(((found <= least) | (found >= most)).sum())
        words = [word for word in layer.name.split("_") if not word.isdigit()]
        op = words[-1]  # "blocks_1_norm2" or "add_3"
        width = manifest["tasks"][task]["outputs"] if layer.columns == manifest["outputs"] else layer.columns
        if layer.name.endswith("_moe"):
            experts = {"C++": next(moes)[0]}
            place: Place = (layer.name, "logit")
            layers.append(Layer(f"{layer.name}.route", "route", {}, place, experts=experts))
        kept = found[:, :width] if layer.name in ("head", "pixel_head") else found
        layers.append(Layer(layer.name, op, {"C++": kept}, layer.name, None, saturated))
    return Found(layers, {"simulators": ["C++"]})


def _ends(bits: int) -> tuple[float, float]:
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1


def instrument(folder: Path, manifest: dict[str, Any]) -> list[Traced]:
    """Put hls4ml's trace of every layer into a copy of a project; return the layers in order.

    Raises InputError for sources that are no longer laid out as hls4ml writes them.
    """
    source, bridge = folder / "firmware/m3vit.cpp", folder / "m3vit_bridge.cpp"
    found = TYPE.findall((folder / "firmware/defines.h").read_text())
    types = {name: (int(bits), int(integer), int(columns)) for bits, integer, columns, name in found}
    text = source.read_text()
    streams = {name: kind for kind, name in STREAM.findall(text)}
    made, traced, rows = {"tokens", "task"}, list[Traced](), manifest["tokens"]

    def add(call: re.Match[str]) -> str:
        nonlocal rows
        arguments, name = [word.strip() for word in call[1].split(",")], call[2]
        outputs = [word for word in arguments if word in streams and word not in made]
        made.update(outputs)
        if len(outputs) != 1 or name.startswith(CLONE) or streams[outputs[0]] not in types:
            return call[0]
        (output,), kind = outputs, streams[outputs[0]]
        if name == "position":
            rows += manifest["prefix_tokens"]
        if name == "head":
            rows = manifest["tokens"]
        bits, integer, columns = types[kind]
        traced.append(Traced(name, rows, columns, bits, integer))
        return f'{call[0]}\n    nnet::save_layer_output<{kind}>({output}, "{name}", {rows * columns});'

    source.write_text(CALL.sub(add, text))
    wanted = bridge.read_text()
    if not traced or wanted.count(STORAGE) != 1:
        raise InputError(
            f"{source.name} or {bridge.name} is no longer laid out as hls4ml writes it (a call of a layer a line, its "
            "name in a comment after it), so hls4ml's trace cannot be put in: undo that, or export the project again"
        )
    room = "".join(
        f'    nnet::trace_outputs->insert(std::pair<std::string, void *>("{layer.name}", '
        f"(void *)malloc({layer.rows * layer.columns} * element_size)));\n"
        for layer in traced
    )
    bridge.write_text(wanted.replace(STORAGE, STORAGE + room))
    return traced
