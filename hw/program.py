"""Programs of the time-multiplexed accelerator, and the file that holds them with their weights. No torch.

A file (weights.bin; its header is in m3vit.hw.weights_file) has three sections: `params` (int32: the programs, biases,
shifts, LayerNorm and position tables), `weights` (int8 or int16) and `gates` (int16: the routers). docs/hls.md has the
whole format; hw/include/engine/m3vit_engine.h is what reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3vit.errors import InputError
from m3vit.hw.isa import BIAS_SHIFT_LIMIT, OPCODE, SHARED, SHIFT_OFFSET, WORDS, End, Instruction, Op, decode_program
from m3vit.hw.weights_file import ALIGNMENT, HEADER_WORDS, MAGIC, MAGIC_TWO, Header

MAX_TOKENS = 8192  # token ids are 16 bits, row offsets 32; above this, queues would not be small


def row_words(bias: np.ndarray, bias_shift: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return the parameters int32 [2 n] of n outputs: y = round((sum + bias * 2^bias_shift) * 2^-shift)."""
    assert bias_shift.min(initial=0) >= 0 and bias_shift.max(initial=0) < BIAS_SHIFT_LIMIT
    assert shift.min(initial=0) >= -SHIFT_OFFSET and shift.max(initial=0) < 256 - SHIFT_OFFSET
    packed = np.stack([bias, bias_shift << 8 | (shift + SHIFT_OFFSET)], axis=1)
    return packed.astype(np.int32).ravel()


class Memory(NamedTuple):
    """Elements of the accelerator's memories, and its inputs: what a host has to allocate."""

    narrow: int
    wide: int
    output: int
    image: int  # bytes
    tasks: int


@dataclass
class Image:
    """Programs around one set of weights, as they lie in DDR. starts: the instruction that each program begins with."""

    params: np.ndarray
    weights: np.ndarray
    gates: np.ndarray
    memory: Memory
    act_bits: int  # of a narrow value; it is stored in 8 bits or in 16
    starts: tuple[int, ...] = (0,)
    starts_at: int = 0  # in params, of several programs
    wide_bits: int = 32  # of a wide value

    @property
    def program(self) -> list[Instruction]:
        """The instructions of the first program, without the end."""
        return self.program_of(0)

    def program_of(self, place: int) -> list[Instruction]:
        """Return the instructions of a program, without the end."""
        return list(decode_program(self.params[self.starts[place] * WORDS :]))

    @property
    def two_bytes(self) -> bool:
        """Whether some narrow values have two bytes each."""
        every = [i for place in range(len(self.starts)) for i in self.program_of(place)]
        return any(getattr(i, name, 0) for i in every for name in ("src_low", "dst_low"))

    def write(self, path: Path) -> None:
        """Write the file."""
        sections = [self.params.astype(np.int32), self.weights, self.gates.astype(np.int16)]
        places, place = [], HEADER_WORDS * 8
        for section in sections:
            place = -(-place // ALIGNMENT) * ALIGNMENT
            places += [place, section.size]
            place += section.nbytes
        bits = [self.weights.itemsize * 8, self.act_bits]
        several = len(self.starts) if len(self.starts) > 1 else 0
        instructions = self.starts[-1] + len(self.program_of(len(self.starts) - 1))
        wide = self.wide_bits % 32
        two = self.two_bytes
        facts = [*bits, *self.memory, instructions, several, self.starts_at, wide, int(two)]
        header = Header._make([MAGIC_TWO if two else MAGIC, *places, *facts])
        with open(path, "wb") as file:
            file.write(header.words().tobytes())
            for section, start in zip(sections, places[::2], strict=True):
                file.write(b"\0" * (start - file.tell()))
                file.write(section.tobytes())

    @classmethod
    def read(cls, path: Path) -> "Image":
        """Read a file, or raise InputError if it is not one."""
        try:
            header = Header.read(path)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): export the project again") from None
        if header is None:
            raise InputError(f"{path} is not a weights file of this version of m3vit: export the project again")
        sections = header.sections()
        if max(start + count * kind.itemsize for start, count, kind in sections.values()) > path.stat().st_size:
            raise InputError(f"{path} is cut short or damaged: export the project again")
        params, weights, gates = (
            np.fromfile(path, kind, count, offset=start) for start, count, kind in sections.values()
        )
        memory = Memory(header.narrow, header.wide, header.output, header.image, header.tasks)
        starts = params[header.programs_at : header.programs_at + header.programs] if header.programs else np.zeros(1)
        if not starts.size or starts.min() < 0 or int(starts.max() + 1) * WORDS > params.size:
            raise InputError(f"{path} is damaged (its programs): export the project again")
        own = (header.act_bits, tuple(map(int, starts)), header.programs_at, header.wide_bits or 32)
        return cls(params, weights, gates, memory, *own)


class Builder:
    """Collects the sections of an Image. Offsets in params are those without the program, which `build` puts first."""

    def __init__(self, weight_bits: int, act_bits: int, wide_bits: int = 32) -> None:
        self.act_bits, self.wide_bits = act_bits, wide_bits
        kind = np.int8 if weight_bits <= 8 else np.int16
        self.kinds: dict[str, type] = {"params": np.int32, "weights": kind, "gates": np.int16}
        self.sections: dict[str, list[np.ndarray]] = {name: [np.zeros(0, kind)] for name, kind in self.kinds.items()}
        self.sizes = dict.fromkeys(self.kinds, 0)

    def put(self, section: str, values: np.ndarray) -> int:
        """Append values to a section, at a multiple of ALIGNMENT bytes, and return their offset in elements."""
        kind = self.kinds[section]
        typed: np.ndarray = values.astype(kind).ravel()
        assert np.array_equal(typed, values.ravel()), f"values beyond {kind.__name__}"
        gap = -self.sizes[section] % (ALIGNMENT // np.dtype(kind).itemsize)
        place = self.sizes[section] + gap
        self.sections[section] += [np.zeros(gap, kind), typed]
        self.sizes[section] = place + typed.size
        return place

    def build(self, program: Sequence[Instruction], memory: Memory, *others: Sequence[Instruction]) -> Image:
        """Return the image of a program and others around the same weights (without their ends)."""
        together = [one for each in (program, *others) for one in (*each, End())]
        starts = np.cumsum([0, *(len(each) + 1 for each in (program, *others))])[:-1]
        room = program_words(len(together) - 1)
        words = np.stack([instruction.encode() for instruction in together])
        words[words[:, OPCODE] != Op.END, SHARED["params"]] += room  # an opcode without params does not read it
        table = room + self.put("params", starts) if others else 0
        for name in self.kinds:  # a port reads whole words
            self.put(name, np.zeros(0))
        params, weights, gates = (np.concatenate(self.sections[name]) for name in self.kinds)
        head = np.pad(words.ravel(), (0, room - words.size))
        together_params = np.concatenate([head, params])
        own = (self.act_bits, tuple(map(int, starts)), table, self.wide_bits)
        return Image(together_params, weights, gates, memory, *own)


def program_words(instructions: int) -> int:
    """Return how many words of params so many instructions take, one more end and the gap after it included."""
    unit = ALIGNMENT // 4
    return -(-(instructions + 1) * WORDS // unit) * unit


def allocate(buffers: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Place buffers (size, first use, last use; uses inclusive) in one memory: their offsets, and the size needed.

    First fit in the order given, at multiples of ALIGNMENT elements; buffers whose uses overlap in time do not overlap
    in memory.
    """
    offsets: list[int] = []
    for index, (size, first, last) in enumerate(buffers):
        taken = sorted(
            (offsets[other], offsets[other] + buffers[other][0])
            for other in range(index)
            if buffers[other][1] <= last and first <= buffers[other][2]
        )
        place = 0
        for start, end in taken:
            if place + size <= start:
                break
            place = max(place, -(-end // ALIGNMENT) * ALIGNMENT)
        offsets.append(place)
    return offsets, max((place + size for place, (size, *_) in zip(offsets, buffers, strict=True)), default=0)
