"""A frame through the C++ of a multiplexed project, instruction by instruction: its memories after each. No torch.

The test bench runs a program and writes the memories that it leaves. So it is given one instruction at a time, and the
memories that the one before left: no source of the project is changed, and one that was edited is traced as it is.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m3vit.errors import InputError
from m3vit.hw.isa import End, Experts, Instruction, Route
from m3vit.hw.manifest import WEIGHTS
from m3vit.hw.program import Image
from m3vit.hw.sim.compiler import run_program
from m3vit.hw.sim.csim import TESTBENCH, read_counters
from m3vit.hw.weights_file import Header

NAMES = ("weights.bin", "image.bin", "task.bin", "outputs.bin", "counters.json", "routing.bin", "memories.bin")


@dataclass
class Memories:
    """What the C++ left after an instruction: raw words, and of that instruction the values that were beyond their
    format, and the experts that a Route chose [N, K]."""

    narrow: np.ndarray
    wide: np.ndarray
    output: np.ndarray
    saturated: int
    experts: np.ndarray | None


def step_frame(
    project: Path, image: Image, pixels: np.ndarray, task: int, budget: int = 0
) -> Iterator[tuple[int, Memories]]:
    """Yield each instruction that a frame uint8 [H, W, 3] of a task and budget runs, and the memories after it.

    The test bench was built before. Raises InputError if it fails, or does not write memories.
    """
    memory, kind = image.memory, np.dtype("int8" if image.act_bits <= 8 else "int16")
    of_wide = np.dtype(f"int{image.wide_bits}")
    program = image.program_of(budget)
    with tempfile.TemporaryDirectory(prefix="m3vit-trace-") as name:
        folder = Path(name)
        weights = folder / NAMES[0]
        shutil.copyfile(project / WEIGHTS, weights)
        header = Header.read(weights)
        assert header is not None
        pixels.tofile(folder / NAMES[1])
        np.array([task], np.uint8).tofile(folder / NAMES[2])
        state = np.zeros(memory.narrow * kind.itemsize + memory.wide * of_wide.itemsize, np.uint8)
        route: Instruction | None = None
        for pc, instruction in enumerate(program):
            if instruction.task not in (-1, task):
                continue
            # The queues of experts are no memory: they last as long as the run that has made them.
            own = [route, instruction] if isinstance(instruction, Experts) and route is not None else [instruction]
            _put_program(weights, header.params_at, own)
            state.tofile(folder / "start.bin")
            command = [str(project.resolve() / TESTBENCH), *NAMES, "start.bin"]
            run_program(command, folder, "the test bench")
            found = _read(folder, (memory.narrow, kind), (memory.wide, of_wide), len(own) - 1)
            if isinstance(instruction, Route):
                route = instruction
                choice = np.fromfile(folder / NAMES[5], np.uint16).astype(np.int64)
                found.experts = choice.reshape(-1, instruction.top_k)
            state = np.fromfile(folder / NAMES[6], np.uint8)
            yield pc, found


def _put_program(weights: Path, params_at: int, program: Sequence[Instruction]) -> None:
    """Overwrite the start of a weights file's program; params are addressed from their section's start, not from it."""
    with open(weights, "r+b") as file:
        file.seek(params_at)
        for instruction in [*program, End()]:
            file.write(instruction.encode().tobytes())


def _read(folder: Path, narrow: tuple[int, np.dtype], wide: tuple[int, np.dtype], place: int) -> Memories:
    """Read what one run left: memories of so many values of a type; `place`: of the instruction in its program."""
    try:
        with open(folder / NAMES[6], "rb") as file:
            found = Memories(
                np.fromfile(file, narrow[1], narrow[0]),
                np.fromfile(file, wide[1], wide[0]),
                np.fromfile(folder / NAMES[3], np.int32),
                next(line["saturated"] for line in read_counters(folder / NAMES[4]) if line["pc"] == place),
                None,
            )
    except (OSError, ValueError, StopIteration) as error:
        raise InputError(f"the test bench wrote memories that cannot be read ({error})") from None
    if (found.narrow.size, found.wide.size) != (narrow[0], wide[0]):
        raise InputError(
            f"the test bench wrote {found.narrow.size} and {found.wide.size} words of memories instead of {narrow[0]} "
            f"and {wide[0]}: a project by an older version, or its test bench was changed: export it again"
        )
    return found
