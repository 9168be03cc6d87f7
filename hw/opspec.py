"""What is said of an opcode and of an engine for their costs: m3vit.hw.ops has both tables. No torch."""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

from m3vit.hw.hardware import Hardware
from m3vit.hw.isa import Instruction

Queue = Sequence[int]
Bytes = dict[str, int]


class Timing(NamedTuple):
    """Cycles that each entry of a pipelined loop costs beside its trips; reads, writes: if it begins bursts of them.

    bytes_a_cycle: what the memory gives; it may hold up a pass of a tile though the whole instruction asks for less.
    """

    depth: int = 0
    read: int = 0
    write: int = 0
    bytes_a_cycle: float = inf

    def loop(self, trips: int, ii: int = 1, reads: bool = False, writes: bool = False, after: int = 0) -> int:
        """Return the cycles of one pass of a pipelined loop; after: cycles of its trips after the last write."""
        return trips * ii + self.depth + reads * self.read + writes * max(0, self.write - after)


LOOPS = Timing()  # trips alone


class OnChip(NamedTuple):
    """Memories of one shape: how many, bits a word, words; "any": in LUTs if they are few words, else in BRAM."""

    name: str
    copies: int
    bits: int
    words: int
    kind: str = "any"  # or lut, bram, uram


class Engine(NamedTuple):
    """A part of the hardware, of which there is one: its memories and multipliers for a configuration.

    dsps: what products beside the array take. shifters: values that are rounded and held side by side in a cycle.
    luts: what takes LUTs in other ways.
    """

    memories: Callable[[Hardware], list[OnChip]]
    multipliers: Callable[[Hardware], int] = lambda h: 0
    dsps: Callable[[Hardware], int] = lambda h: 0
    shifters: Callable[[Hardware], int] = lambda h: 0
    luts: Callable[[Hardware], int] = lambda h: 0


class OpSpec(NamedTuple):
    """An opcode: its fields, the engine that it runs on (a key of ENGINES), its cycles and the bytes by port.

    needs: the least buffers of Hardware for an instruction, but for max_rows. macs: multiply-accumulates.
    """

    instruction: type[Instruction]
    engine: str
    cycles: Callable[[Any, Hardware, Queue, Timing], int]
    traffic: Callable[[Any, Hardware, Queue], Bytes]
    needs: Callable[[Any], dict[str, int]] = lambda i: {}
    macs: Callable[[Any, Queue], int] = lambda i, queue: 0
