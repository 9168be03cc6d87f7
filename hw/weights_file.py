"""The header of a weights file (weights.bin). A project's host driver has a copy: this module imports numpy alone.

A file is a header of HEADER_WORDS int64, then three sections, each at a multiple of ALIGNMENT bytes (docs/hls.md).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = 0x3257544956334D  # "M3VITW2": rows are filled up to whole words
MAGIC_TWO = 0x3357544956334D  # "M3VITW3": and some narrow values have two bytes each
KNOWN = (MAGIC, MAGIC_TWO, 0x3157544956334D)  # "M3VITW1": one value after the other
HEADER_WORDS = 20
ALIGNMENT = 64  # bytes: one beat of the widest AXI port


class Header(NamedTuple):
    """The header's words in their order, zeros after them; file_header in m3vit_isa.h.

    For each section its place in bytes and its elements; bits of a stored weight and of a narrow value; what the host
    has to allocate: elements of the narrow, wide and output memories, bytes of an image; tasks; instructions of all
    programs, the ends between them too. Of several programs their number, and where in params (words) it is written
    with which instruction each begins; 0 where there is one, and in older files. Bits of a wide value: 0 for 32, as in
    older files. two_bytes: 1 where instructions read or write narrow values of two bytes each, as MAGIC_TWO says.
    """

    magic: int
    params_at: int
    params_words: int
    weights_at: int
    weights_words: int
    gates_at: int
    gates_words: int
    weight_bits: int
    act_bits: int
    narrow: int
    wide: int
    output: int
    image: int
    tasks: int
    instructions: int
    programs: int = 0
    programs_at: int = 0
    wide_bits: int = 0
    two_bytes: int = 0

    @classmethod
    def read(cls, path: str | Path) -> "Header | None":
        """Return the header of a file, or None if it is not a weights file. Raises OSError if it cannot be read."""
        words = np.fromfile(path, np.int64, HEADER_WORDS).tolist()
        if len(words) < HEADER_WORDS or words[0] not in KNOWN:
            return None
        header = cls(*words[: len(cls._fields)])
        return header if header.weight_bits in (8, 16) and header.wide_bits in (0, 16) and min(header) >= 0 else None

    def words(self) -> np.ndarray:
        """Return int64 [HEADER_WORDS]."""
        return np.array([*self, *[0] * (HEADER_WORDS - len(self))], np.int64)

    def sections(self) -> dict[str, tuple[int, int, np.dtype]]:
        """Return of each section its place in bytes, its elements and their type."""
        return {
            "params": (self.params_at, self.params_words, np.dtype(np.int32)),
            "weights": (self.weights_at, self.weights_words, np.dtype(f"int{self.weight_bits}")),
            "gates": (self.gates_at, self.gates_words, np.dtype(np.int16)),
        }
