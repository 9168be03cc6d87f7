"""hls4ml's compile() and predict() on an emitted project, as child processes of m3vit.hw.sim.csim.

Processes of their own, because hls4ml works in the current folder, and because the compiled library keeps its weights
in static variables and is to run beside the stand-alone test bench. In the project's folder,
`python -m m3vit.hw.sim.bridge build` compiles, `... run FOLDER` simulates and `... trace FOLDER` says what each layer
gave: FOLDER holds tokens.npy [n, T, P] and
tasks.npy [n, 1], float32, and gets outputs.npy [n, ...]; the seconds predict() took are printed.
"""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import hls4ml
import numpy as np


def build() -> None:
    """Build the library with hls4ml's compile(), which runs build_lib.sh."""
    hls4ml.converters.link_existing_project(".").compile()


def run(folder: Path) -> None:
    """Simulate every row of tokens.npy with hls4ml's predict() and write outputs.npy."""
    library = max(Path("firmware").glob("*.so"), key=lambda path: path.stat().st_mtime)
    model = hls4ml.converters.link_existing_project(".")
    model.config.backend.compile = lambda _: f"./{library}"  # compile() would build again what build() has built
    model.compile()
    inputs = [np.load(folder / "tokens.npy"), np.load(folder / "tasks.npy")]
    start = time.perf_counter()
    np.save(folder / "outputs.npy", model.predict(inputs))
    print(time.perf_counter() - start)


class _TraceData(ctypes.Structure):
    """trace_data of the bridge."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p)]


def trace(folder: Path) -> None:
    """Simulate the first row of tokens.npy and tasks.npy, float64, and write what every layer gave to layers.npz.

    layers.json: the size of each layer, and of the outputs. As ModelGraph.trace() of hls4ml does, which needs a graph.
    """
    sizes, outputs = json.loads((folder / "layers.json").read_text())
    path = max(Path("firmware").glob("*.so"), key=lambda path: path.stat().st_mtime)
    library = ctypes.cdll.LoadLibrary(str(path.resolve()))
    arrays = [np.load(folder / name)[0].ravel() for name in ("tokens.npy", "tasks.npy")] + [np.zeros(outputs)]
    library.allocate_trace_storage(ctypes.c_size_t(np.dtype(np.float64).itemsize))
    pointers = [array.ctypes.data_as(ctypes.POINTER(ctypes.c_double)) for array in arrays]
    library.m3vit_double(*pointers)
    found = (_TraceData * len(sizes))()
    library.collect_trace_output(found)
    values: dict[str, Any] = {}
    for layer in found:
        name = str(layer.name, "utf-8")
        data = ctypes.cast(layer.data, ctypes.POINTER(ctypes.c_double))
        values[name] = np.ctypeslib.as_array(data, shape=(sizes[name],)).copy()
    np.savez(folder / "layers.npz", **values)
    library.free_trace_storage()


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build()
    else:
        {"run": run, "trace": trace}[sys.argv[1]](Path(sys.argv[2]))
