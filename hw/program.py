"""Programs of the time-multiplexed accelerator, and the file that holds one with its weights. No torch.

A file (weights.bin) is a header of HEADER 64-bit words, then three sections, each at a multiple of 64 bytes: `params`
(int32: the program, biases, shifts, LayerNorm and position tables), `weights` (int8 or int16) and `gates` (int16: the
routers). docs/hls.md has the whole format; hw/include/engine/m3vit_engine.h is what reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3vit.errors import InputError

MAGIC = 0x3157544956334D  # "M3VITW1"
HEADER = 20
ALIGNMENT = 64  # bytes: one beat of the widest AXI port
WORDS = 24  # of an instruction: instruction_words in m3vit_engine.h
SCORE_FRAC = 12
CONTEXT_DROP = 8
KEY_BLOCK = 64  # keys an attention step takes at once; decides how sums are rounded
MAX_TOKENS = 8192  # token ids are 16 bits, row offsets 32; above this, queues would not be small
ROW_WORDS = 2  # of each output of a linear map in params: bias, shifts
SHIFT_OFFSET = 64


class Op(IntEnum):
    """What an instruction does: `opcode` in m3vit_engine.h."""

    END = 0
    IMAGE = 1
    LINEAR = 2
    GATE = 3
    POSITION = 4
    NORM = 5
    ATTENTION = 6
    ROUTE = 7
    EXPERTS = 8


class Mode(IntEnum):
    """Where results go: `output_mode` in m3vit_engine.h."""

    NARROW = 0
    WIDE = 1
    RESIDUAL = 2
    OUTPUT = 3
    QUEUE = 4


@dataclass
class Instruction:
    """One instruction. Offsets and pitches count elements of the memory they are in; a0 to a4 depend on the opcode."""

    op: int
    task: int = -1
    rows: int = 0
    n_in: int = 0
    n_out: int = 0
    src: int = 0
    src_pitch: int = 0
    dst: int = 0
    dst_pitch: int = 0
    weights: int = 0
    params: int = 0
    mode: int = 0
    gelu_in: int = -1
    gelu_out: int = 0
    a0: int = 0
    a1: int = 0
    a2: int = 0
    a3: int = 0
    a4: int = 0
    constant: int = 0

    def encode(self) -> np.ndarray:
        """Return its int32 words [WORDS]."""
        values = [int(getattr(self, field.name)) for field in fields(self)]
        *words, constant = values
        words += [constant & 0xFFFFFFFF, constant >> 32]
        packed = np.array([word & 0xFFFFFFFF for word in words], dtype=np.uint32).view(np.int32)
        return np.pad(packed, (0, WORDS - len(words)))

    @classmethod
    def decode(cls, words: np.ndarray) -> "Instruction":
        """Return the instruction of int32 words [WORDS]."""
        names = [field.name for field in fields(cls)][:-1]
        plain = dict(zip(names, (int(word) for word in words), strict=False))
        return cls(**plain, constant=(int(words[19]) & 0xFFFFFFFF) | int(words[20]) << 32)


def row_words(bias: np.ndarray, bias_shift: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return the parameters int32 [2 n] of n outputs: y = round((sum + bias * 2^bias_shift) * 2^-shift)."""
    assert bias_shift.min(initial=0) >= 0 and bias_shift.max(initial=0) < 64
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
    """A program and its weights, as they lie in DDR."""

    params: np.ndarray
    weights: np.ndarray
    gates: np.ndarray
    memory: Memory
    act_bits: int  # of a narrow value; it is stored in 8 bits or in 16

    @property
    def program(self) -> list[Instruction]:
        """The instructions, without the end."""
        found = []
        for start in range(0, len(self.params), WORDS):
            instruction = Instruction.decode(self.params[start : start + WORDS])
            if instruction.op == Op.END:
                break
            found.append(instruction)
        return found

    def write(self, path: Path) -> None:
        """Write the file."""
        sections = [self.params.astype(np.int32), self.weights, self.gates.astype(np.int16)]
        places, place = [], HEADER * 8
        for section in sections:
            place = -(-place // ALIGNMENT) * ALIGNMENT
            places += [place, section.size]
            place += section.nbytes
        memory = self.memory
        header = [
            MAGIC,
            *places,
            self.weights.itemsize * 8,
            self.act_bits,
            *(memory.narrow, memory.wide, memory.output, memory.image, memory.tasks),
            len(self.program),
        ]
        with open(path, "wb") as file:
            file.write(np.array(header + [0] * (HEADER - len(header)), dtype=np.int64).tobytes())
            for section, start in zip(sections, places[::2], strict=True):
                file.write(b"\0" * (start - file.tell()))
                file.write(section.tobytes())

    @classmethod
    def read(cls, path: Path) -> "Image":
        """Read a file, or raise InputError if it is not one."""
        try:
            header = np.fromfile(path, dtype=np.int64, count=HEADER)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): export the project again") from None
        if len(header) < HEADER or header[0] != MAGIC or header[7] not in (8, 16):
            raise InputError(f"{path} is not a weights file of this version of m3vit: export the project again")
        types = (np.int32, np.int8 if header[7] == 8 else np.int16, np.int16)
        sizes = [int(header[2 * i + 2]) * np.dtype(kind).itemsize for i, kind in enumerate(types)]
        ends = [int(header[2 * i + 1]) + size for i, size in enumerate(sizes)]
        if min(*header[1:7], *header[8:14]) < 0 or max(ends) > path.stat().st_size:
            raise InputError(f"{path} is cut short or damaged: export the project again")
        sections = [
            np.fromfile(path, dtype=kind, count=int(header[2 * i + 2]), offset=int(header[2 * i + 1]))
            for i, kind in enumerate(types)
        ]
        params, weights, gates = sections
        return cls(params, weights, gates, Memory(*(int(value) for value in header[9:14])), int(header[8]))


class Builder:
    """Collects the sections of an Image. Offsets in params are those without the program, which `build` puts first."""

    def __init__(self, weight_bits: int, act_bits: int) -> None:
        self.act_bits = act_bits
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

    def build(self, program: Sequence[Instruction], memory: Memory) -> Image:
        """Return the image of a program (without its end)."""
        room = program_words(len(program))
        moved = [replace(instruction, params=instruction.params + room) for instruction in program]
        words = np.concatenate([instruction.encode() for instruction in [*moved, Instruction(Op.END)]])
        params, weights, gates = (np.concatenate(self.sections[name]) for name in self.kinds)
        head = np.pad(words, (0, room - len(words)))
        return Image(np.concatenate([head, params]), weights, gates, memory, self.act_bits)


def program_words(instructions: int) -> int:
    """Return how many words of params a program takes, its end and the gap after it included."""
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
