"""MATLAB files of version 5 to 7, read without believing any header. No torch.

The format is documented: MathWorks, "MAT-File Format", chapter 1, version 5. Not scipy.io.loadmat: it allocates what
a header claims (a file of 176 bytes asks for 6.7 GiB) and does not read whole structures on demand.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.data.reading import MAX_PIXELS, Impossible, contents, naming

MAX_MAT_BYTES = 1 << 28  # of a structure, decompressed; one mask of 500 × 375 is 0.18 MiB, a crowd has hundreds
MAX_MAT_ITEMS = 1 << 16  # variables of a file, values in its structures, characters of a text or name
MAT_MATRIX, MAT_COMPRESSED = 14, 15
# Type of stored numbers -> NumPy's; 16..18 are UTF text.
MAT_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MAT_TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
# Class of a matrix -> NumPy's type of its elements. Numbers are stored in the smallest type that holds them.
MAT_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
MAT_STRUCT, MAT_CHAR = 2, 4
MAT_COMPLEX = 0x0800
MAX_NESTING = 8
MAX_DIMS = 8
HEAD_BYTES = 1 << 17  # of a variable: more than its name, class and dimensions take
PIECE_BYTES = 1 << 23


def read_mat(path: Path, name: str, as_stored: bool = False) -> Any:
    """Return one variable of a MATLAB file of version 5 to 7.

    A numeric or logical array is an array of its class, text a str, and a struct array a list of dicts (column by
    column). MATLAB's [] is an empty array. `as_stored`: arrays have the type they are stored in, the smallest that
    holds their numbers, and may be read-only views of the file. Arrays of more than MAX_PIXELS numbers, and structures
    beyond MAX_MAT_BYTES or MAX_MAT_ITEMS, are refused before they are decompressed.
    """
    with naming(path):
        found = []
        for variable in _variables(contents(path), name, as_stored):
            if variable.name == name:
                return variable.value(0)
            found.append(variable.name)
        raise ValueError(f"it holds no {name}, only {', '.join(found) or 'nothing'}")


def mat_names(path: Path) -> list[str]:
    """Return the names of the variables of a MATLAB file of version 5 to 7."""
    with naming(path):
        return [variable.name for variable in _variables(contents(path), None, True)]


def _variables(data: bytes, name: str | None, as_stored: bool) -> "Iterator[_Matrix]":
    """Yield a file's variables; of those compressed only `name` can be read."""
    if b"\x89HDF\r\n\x1a\n" in (data[:8], data[512:520]) or data.startswith(b"MATLAB 7.3"):
        raise ValueError("it is a MATLAB 7.3 (HDF5) file, expected version 5 to 7: save it with '-v7'")
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None or struct.unpack_from(f"{order}H", data, 124) != (0x0100,):
        raise ValueError("it is not a MATLAB file of version 5 to 7")
    view, at = memoryview(data), 128
    for _ in range(MAX_MAT_ITEMS):
        if at >= len(view):
            return
        kind, payload, at = _element(view, at, order)
        payload = _inflated(payload, order, name) if kind == MAT_COMPRESSED else _contents(kind, payload)
        yield _Matrix(payload, order, _Budget(as_stored))
    raise ValueError(f"it holds more than {MAX_MAT_ITEMS} variables")


def _contents(kind: int, payload: memoryview) -> memoryview:
    if kind != MAT_MATRIX:
        raise Impossible(f"expected a matrix, found an element of type {kind}")
    return payload


def _inflated(packed: memoryview, order: str, name: str | None) -> memoryview:
    """Return the contents of a compressed matrix; of one that is not `name`, or is refused by its head, no more."""
    inflater = zlib.decompressobj()
    plain = bytearray(inflater.decompress(packed, HEAD_BYTES))
    if len(plain) < 8:
        raise ValueError("its compressed data are truncated")
    kind, length = struct.unpack_from(f"{order}II", plain)
    _contents(kind, memoryview(plain))
    if length:
        head = _Matrix(memoryview(bytes(plain[8:])), order, _Budget())
        if head.name != name:
            return memoryview(plain)[8:]
        limit = head.most_bytes()
        if length > limit:
            raise ValueError(f"its {name} holds more than {limit} bytes")
    while not inflater.eof:
        piece = inflater.decompress(inflater.unconsumed_tail, PIECE_BYTES)
        if not piece and not inflater.eof:
            raise ValueError("its compressed data are truncated")
        plain += piece
        if len(plain) > length + 16:  # the tag, and padding
            raise ValueError(f"its {name} holds more than its head says")
    kind, payload, _ = _element(memoryview(plain), 0, order)
    return _contents(kind, payload)


def _element(view: memoryview, at: int, order: str) -> tuple[int, memoryview, int]:
    """Return type and contents of the element at an offset, and the offset of the next."""
    if at + 8 > len(view):
        raise ValueError("it is truncated")
    kind, length = struct.unpack_from(f"{order}II", view, at)
    if kind >> 16:  # up to 4 bytes are stored inside the tag
        kind, length, start, following = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if length > 4:
            raise ValueError(f"a short element has {length} bytes")
    else:
        start = at + 8
        following = start + length + (0 if kind == MAT_COMPRESSED else -length % 8)
    if start + length > len(view):
        raise ValueError("it is truncated")
    return kind, view[start : start + length], following


def _numbers(kind: int, payload: memoryview, order: str) -> NDArray:
    if kind not in MAT_NUMBERS:
        raise Impossible(f"expected numbers, found an element of type {kind}")
    return np.frombuffer(payload, order + MAT_NUMBERS[kind])


class _Budget:
    """What reading one variable may still take, shared by all matrices in it."""

    def __init__(self, as_stored: bool = False) -> None:
        self.as_stored, self.items = as_stored, MAX_MAT_ITEMS

    def take(self, items: int) -> None:
        self.items -= items
        if self.items < 0:
            raise ValueError(f"it holds more than {MAX_MAT_ITEMS} values in its structures, or as long a text")


class _Matrix:
    """One matrix: its name, class and dimensions; `value` reads the rest."""

    def __init__(self, view: memoryview, order: str, budget: _Budget) -> None:
        self.view, self.order, self.budget, self.at = view, order, budget, 0
        self.kind, self.name = 6, ""
        self.dims: tuple[int, ...] = (0, 0)  # no contents at all is []
        if not len(view):
            return
        flags = self._next_numbers()
        dims = self._next_numbers()
        name = self._next()[1]
        if len(flags) != 2 or not 2 <= len(dims) <= MAX_DIMS or dims.dtype.kind not in "iu" or dims.min() < 0:
            raise ValueError("a matrix has a damaged header")
        if len(name) > MAX_MAT_ITEMS:
            raise ValueError("a matrix has a damaged name")
        self.name = bytes(name).decode("latin-1")
        self.kind = int(flags[0]) & 0xFF
        self.dims = tuple(int(side) for side in dims)
        if int(flags[0]) & MAT_COMPLEX:
            raise ValueError("it holds complex numbers")

    def most_bytes(self) -> int:
        """Return how many bytes the matrix can have, or raise ValueError if it is larger than allowed."""
        return min(MAX_MAT_BYTES, self._count() * 8 + HEAD_BYTES) if self.kind in MAT_CLASSES else MAX_MAT_BYTES

    def _count(self) -> int:
        """Return the number of numbers, which is at most that of the pixels of a label."""
        if (count := math.prod(self.dims)) > MAX_PIXELS:
            raise ValueError(f"a matrix of {self.dims} has more than {MAX_PIXELS} numbers")
        return count

    def _next(self) -> tuple[int, memoryview]:
        kind, payload, self.at = _element(self.view, self.at, self.order)
        return kind, payload

    def _next_numbers(self) -> NDArray:
        return _numbers(*self._next(), self.order)

    def value(self, nesting: int) -> Any:
        """Read the contents (once)."""
        if nesting > MAX_NESTING:
            raise ValueError(f"it nests structures deeper than {MAX_NESTING}")
        count = math.prod(self.dims)
        if self.kind == MAT_STRUCT:
            return self._structs(count, nesting)
        if self.kind == MAT_CHAR:
            return self._text(count)
        if self.kind not in MAT_CLASSES:
            raise Impossible(f"expected numbers, text or structures, found MATLAB class {self.kind}")
        if not len(self.view):
            return np.zeros(self.dims)
        numbers = self._next_numbers()
        if len(numbers) != count:
            raise ValueError(f"a matrix of {self.dims} holds {len(numbers)} numbers")
        self._count()
        if not self.budget.as_stored:
            numbers = numbers.astype(MAT_CLASSES[self.kind], copy=False)
        return numbers.reshape(self.dims, order="F")

    def _text(self, count: int) -> str:
        kind, payload = self._next()
        if kind not in MAT_TEXT:
            raise Impossible(f"expected text, found an element of type {kind}")
        self.budget.take(len(payload))
        coding = MAT_TEXT[kind]
        if coding in ("utf-16", "utf-32"):
            coding += "-le" if self.order == "<" else "-be"
        text = bytes(payload).decode(coding)
        if len(text) != count:
            raise ValueError(f"a text of {self.dims} holds {len(text)} characters")
        return text

    def _structs(self, count: int, nesting: int) -> list[dict[str, Any]]:
        lengths = self._next_numbers()
        packed = self._next()[1]
        if len(lengths) != 1 or not 0 < (length := int(lengths[0])) or len(packed) % length:
            raise ValueError("a structure has damaged field names")
        self.budget.take(len(packed) // length)
        names = bytes(packed)
        fields = [names[at : at + length].split(b"\0")[0].decode("latin-1") for at in range(0, len(names), length)]
        if not fields:
            return []
        if count * len(fields) * 8 > len(self.view) - self.at:  # each value has a tag of 8 bytes
            raise ValueError("it is truncated")
        self.budget.take(count * len(fields))
        return [{field: self._field(nesting) for field in fields} for _ in range(count)]

    def _field(self, nesting: int) -> Any:
        kind, payload = self._next()
        if kind != MAT_MATRIX:
            raise Impossible(f"expected a matrix, found an element of type {kind}")
        return _Matrix(payload, self.order, self.budget).value(nesting + 1)
