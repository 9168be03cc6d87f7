"""hls4ml's compile() and predict() on an emitted project, as child processes of m3vit.hw.sim.csim.

Processes of their own, because hls4ml works in the current folder, and because the compiled library keeps its weights
in static variables and is to run beside the stand-alone test bench. In the project's folder,
`python -m m3vit.hw.sim.bridge build` compiles and `... run FOLDER` simulates: FOLDER holds tokens.npy [n, T, P] and
tasks.npy [n, 1], float32, and gets outputs.npy [n, ...]; the seconds predict() took are printed.
"""

import sys
import time
from pathlib import Path

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


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build()
    else:
        run(Path(sys.argv[2]))
