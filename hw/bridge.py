"""Child process of csim.run_bridge: loads a project's bridge library and runs it as hls4ml's ModelGraph.predict does.

A process of its own, because the library keeps its weights in static variables, cannot be unloaded safely, and is to
run beside the stand-alone test bench. Usage: python -m m3vit.hw.bridge LIBRARY FOLDER; FOLDER holds tokens.npy
[n, T, P] float32 and tasks.npy [n] float32, and gets outputs.npy; argv 3 is the number of outputs of one run.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np


def run(library: Path, folder: Path, num_outputs: int) -> None:
    """Simulate every row of tokens.npy and write outputs.npy [n, num_outputs] float32."""
    top = ctypes.CDLL(str(library)).m3vit_float
    array = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    top.restype, top.argtypes = None, [array, array, array]
    tokens, tasks = np.load(folder / "tokens.npy"), np.load(folder / "tasks.npy")
    outputs = np.zeros((len(tokens), num_outputs), dtype=np.float32)
    for row, task, output in zip(tokens, tasks, outputs, strict=True):
        top(row.ravel(), np.array([task], dtype=np.float32), output)
    np.save(folder / "outputs.npy", outputs)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
