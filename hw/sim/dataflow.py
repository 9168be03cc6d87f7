"""Timed C-simulation of HLS C++ with dataflow regions: instrumented copies of its sources, built and run. No torch."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from m3vit.errors import InputError
from m3vit.hw.dataflow import Recording
from m3vit.hw.sim.compiler import compiler, run_program
from m3vit.hw.sim.instrument import Loop, instrumented

INCLUDE = Path(__file__).parents[1] / "include" / "dataflow"
# -O1: what is built is run once or twice. -fpermissive: int64_t is long long to Vitis, and long to g++ on Linux.
FLAGS = ("-std=c++17", "-O1", "-w", "-fpermissive")
DEADLOCK = 3  # exit code of a program that came to one


@dataclass(frozen=True)
class Kernel:
    """A program built of instrumented sources, and its pipelined loops by number."""

    program: Path
    loops: list[Loop]

    def run(
        self,
        folder: Path,
        recording: Path,
        arguments: Sequence[str] = (),
        loops: Mapping[int, tuple[int, int]] = MappingProxyType({}),
        depth: int | None = None,
        fifos: int | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Recording:
        """Run it in a folder and return what it recorded in a file. Raises DeadlockError, and InputError if it fails.

        loops: II and depth of some. depth: stages of the pipelines that have products. fifos: depth of every FIFO.
        environment: more variables.
        """
        assumed = recording.with_suffix(".loops")
        assumed.write_text("".join(f"{loop} {ii} {stages}\n" for loop, (ii, stages) in loops.items()))
        env = {"M3VIT_DATAFLOW_TRACE": str(recording.resolve()), "M3VIT_DATAFLOW_LOOPS": str(assumed.resolve())}
        env |= {"M3VIT_DATAFLOW_DEPTH": str(depth)} if depth is not None else {}
        env |= {"M3VIT_DATAFLOW_FIFO": str(fifos)} if fifos is not None else {}
        recording.unlink(missing_ok=True)
        try:
            run_program(
                [str(self.program.resolve()), *arguments],
                folder,
                "the timed program",
                {**os.environ, **environment, **env},
            )
        except InputError:
            if recording.is_file():
                Recording.read(recording)  # its deadlock, if it was one
            raise
        finally:
            assumed.unlink()
        return Recording.read(recording)


def build(
    root: Path,
    sources: Iterable[str],
    units: Sequence[str],
    folder: Path,
    flags: Sequence[str] = (),
    hardware: Iterable[str] = (),
) -> Kernel:
    """Build a program of sources below `root`, of which `units` are compiled, in a folder of its own.

    hardware: those of which what stands under __SYNTHESIS__ is taken. Raises InputError for sources that are no C++.
    """
    loops: list[Loop] = []
    synthesised = set(hardware)
    for name in sources:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            text = (root / name).read_text(errors="replace")
        except OSError as error:
            raise InputError(f"{root / name}: {error.strerror}") from None
        (folder / name).write_text(instrumented(text, name, loops, name in synthesised))
    program = folder / "timed.exe"
    defines = ["-DM3VIT_SYNTHESISED"] if synthesised else []
    includes = [f"-I{INCLUDE}", "-include", str(INCLUDE / "hls_stream.h")]
    command = [*compiler(), *FLAGS, *defines, *includes, *flags, *units, "-o", program.name]
    run_program(command, folder, "building the timed program")
    return Kernel(program, loops)
