"""Readers, files to damage, and what a refusal must look like: shared by the tests of single files."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3vit.data.reading import read_ids
from m3vit.errors import InputError

Reader = Callable[[Path], Any]
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def refuses(reader: Reader, path: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        reader(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and "object at 0x" not in message, message


def ids_40(path: Path) -> Any:
    return read_ids(path, 40)


def npy(shape: tuple[int, ...], data: bytes = b"", dtype: str = "<f4") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue() + data


def mat_element(kind: int, data: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}II", kind, len(data)) + data + bytes(-len(data) % 8)


def mat_file(*elements: bytes, order: str = "<") -> bytes:
    endian = b"IM" if order == "<" else b"MI"
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", 0x0100) + endian + b"".join(elements)


def mat_matrix(kind: int, dims: tuple[int, ...], rest: bytes, order: str = "<", flags: int = 0) -> bytes:
    head = mat_element(6, struct.pack(f"{order}II", kind | flags, 0), order)
    head += mat_element(5, struct.pack(f"{order}{len(dims)}i", *dims), order) + mat_element(1, b"LabelMap", order)
    return mat_element(14, head + rest, order)


def compressed(element: bytes) -> bytes:
    data = zlib.compress(element)
    return struct.pack("<II", 15, len(data)) + data


NUMBERS = mat_element(2, bytes(6))
STRUCT = mat_element(5, struct.pack("<i", 4)) + mat_element(1, b"a\0\0\0")
