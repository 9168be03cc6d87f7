"""Readers of one file each: images (by m3vit.images), label pngs, npy arrays, MATLAB files. No torch.

Whatever is wrong with a file becomes one InputError that names it, and no header is believed: a file that claims more
than it holds, or more pixels than allowed, is refused before anything of that size is allocated.
"""

import errno
import io
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from m3vit.errors import InputError
from m3vit.files import not_there, open_regular
from m3vit.images import Unfit, check_png, decode, header_size, orientation, png_bits, pointer
from m3vit.tasks import IGNORE

Size = tuple[int, int]  # height, width

# 4096 × 4096, where the published images have at most 640 × 480. Fewer than prediction takes: a loader process holds
# all labels at the image's size, normals in 12 bytes a pixel.
MAX_PIXELS = 1 << 24
MAX_FILE_BYTES = 1 << 28
MAX_MAT_BYTES = 1 << 28  # of a structure, decompressed; one mask of 500 × 375 is 0.18 MiB, a crowd has hundreds
MAX_MAT_ITEMS = 1 << 16  # variables of a file, values in its structures, characters of a text or name
MAX_DEPTH_M = 100.0  # beyond it the unit is not metres
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
BLOCK_PIXELS = 1 << 20  # of normals decoded at a time: intermediate results take 12 bytes a pixel each


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever reading `path` raises into one InputError that names the file; what is not its fault passes."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        reason = not_there(path)
        if reason == "not found":
            reason = f"not found: the data set is incomplete, extract its archive again{_other_case(path)}"
        raise InputError(f"{path} {reason}") from None
    except Unfit as error:
        raise InputError(f"{path} cannot be read (it {error}): replace the file") from None
    # Not a list of types: on damaged files Pillow, NumPy and zlib raise a dozen, which change between versions.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in EXHAUSTED:  # it must not be left out for that
            raise
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(words.split())[:300] or type(error).__name__
        raise InputError(f"{path} cannot be read ({reason}): replace the file") from None


def other_spelling(path: Path) -> str | None:
    """Return the name beside a missing file that is its own but for the ending: 0001.JPG or 0001.jpeg of 0001.jpg."""
    with suppress(OSError):
        names = sorted(name for name in os.listdir(path.parent) if Path(name).stem == path.stem)
        return next((name for name in names if ending(name) == path.suffix and name != path.name), None)
    return None


def ending(name: str) -> str:
    """Return a file name's ending as the layouts spell it: in small letters, .jpg for .jpeg."""
    return {".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg"}.get(found := Path(name).suffix.lower(), found)


def _other_case(path: Path) -> str:
    other = other_spelling(path)
    return f"; {other} is there, rename it (endings are read as the layout spells them)" if other else ""


def contents(path: Path) -> bytes:
    """Return the bytes of a regular, non-empty file that fits in memory."""
    with open_regular(path) as file:
        _check_bytes(file)
        return file.read()


def _check_bytes(file: BinaryIO) -> int:
    size = os.fstat(file.fileno()).st_size
    if not 0 < size <= MAX_FILE_BYTES:
        raise ValueError(f"it has {size} bytes, expected 1 to {MAX_FILE_BYTES}")
    if size < 1024 and (found := pointer(file.read(64))):  # of a label as of an image
        raise Unfit(found.advice)
    file.seek(0)
    return size


def _check_pixels(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it has {height} x {width} pixels, expected 1 to {MAX_PIXELS}")


# ---------------------------------------------------------------------------------------------------------- images


def image_size(path: Path) -> Size:
    """Return the height and width that `read_image` gives, from the file's header."""
    with naming(path), open_regular(path) as file:
        _check_bytes(file)
        return header_size(file, MAX_PIXELS)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return an image as RGB [H, W, 3], upright; m3vit.images decides about every other kind of pixel."""
    with naming(path):
        return decode(contents(path), MAX_PIXELS)


def _label(path: Path) -> tuple[Image.Image, int]:
    """Return a decoded label png and the bits per channel in the file."""
    data = contents(path)
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
    except UnidentifiedImageError:
        raise ValueError("it is not a PNG picture") from None
    _check_pixels(*picture.size)
    check_png(data)
    picture.load()
    if (turn := orientation(picture)) != 1:
        # The published loaders would not turn it, viewers would, and the vectors of normals would turn with it.
        raise ValueError(f"expected a label stored upright, found EXIF orientation {turn}")
    return picture, png_bits(data)


def read_ids(path: Path, highest: int, ignored: bool = False) -> NDArray[np.uint8]:
    """Return the ids [H, W] of a label png: 0..highest, and 255 if `ignored`; of a palette png, the indices."""
    with naming(path):
        picture, bits = _label(path)
        # Grey of fewer bits would come out of Pillow stretched to 0..255; palette indices come out as they are.
        if not (picture.mode == "P" or (picture.mode == "L" and bits == 8)):
            raise ValueError(f"expected 8-bit ids in one channel, found {bits} bits a channel (mode {picture.mode})")
        ids = np.array(picture)
        wrong = ids > highest
        if ignored:
            wrong &= ids != IGNORE
        if wrong.any():
            also = f" or {IGNORE}" if ignored else ""
            raise ValueError(f"expected ids 0..{highest}{also}, found {ids[wrong].max()}")
        return ids


def read_grey(path: Path) -> NDArray[np.uint8]:
    """Return the values 0..255 [H, W] of a png of one channel."""
    with naming(path):
        picture, bits = _label(path)
        if bits > 8 or picture.mode not in ("L", "P", "1"):
            raise ValueError(f"expected one channel of 8 bits, found {bits} bits a channel (mode {picture.mode})")
        if picture.mode == "1":
            picture = picture.convert("L")
        values = np.array(picture)
        if values.max() == 1:  # a mask written as 0/1 would read as empty
            raise ValueError("expected values 0..255, found 0 and 1")
        return values


def read_normals_png(path: Path) -> NDArray[np.float32]:
    """Return the normals [H, W, 3] coded in an RGB png as n = 2 v / 255 - 1, of unit length, or the zero vector.

    No code is exactly 0, so "none" is a length that no coded unit vector has, outside 0.5..1.5: mid grey (127 or 128
    in every channel, 0.007) and black (1.73).
    """
    with naming(path):
        picture, bits = _label(path)
        if bits != 8 or picture.mode != "RGB":
            raise ValueError(f"expected RGB of 8 bits a channel, found {bits} (mode {picture.mode})")
        codes = np.asarray(picture)
        normals = np.empty(codes.shape, np.float32)
        step = max(1, BLOCK_PIXELS // picture.width)
        for top in range(0, len(codes), step):
            rows = codes[top : top + step].astype(np.float32) * np.float32(2 / 255) - np.float32(1)
            lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
            coded = (lengths > 0.5) & (lengths < 1.5)
            normals[top : top + step] = np.where(coded, rows / lengths.clip(0.5), np.float32(0))
        return normals


# ------------------------------------------------------------------------------------------------------------- npy


def _array(path: Path, kinds: str, ndim: int) -> NDArray[np.float32]:
    """Return a npy file as float32, if its dtype is of one of the `kinds` and it has `ndim` dimensions."""
    with open_regular(path) as file:
        size = _check_bytes(file)
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"expected format version 1.0 or 2.0, found {version}")
        if dtype.hasobject:
            raise ValueError("it holds pickled Python objects, which are never loaded")
        if dtype.kind not in kinds:
            raise ValueError(f"expected {'floating-point ' if kinds == 'f' else ''}numbers, found {dtype}")
        if len(shape) != ndim or min(shape) < 1:
            raise ValueError(f"expected {ndim} dimensions, found shape {shape}")
        promised, found = math.prod(shape) * dtype.itemsize, size - file.tell()
        if promised != found:
            raise ValueError(f"its header promises {promised} bytes ({shape} of {dtype}), it holds {found}")
        _check_pixels(shape[1], shape[0])
        stored = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
    with np.errstate(over="ignore"):  # beyond float32 is infinity, refused below
        array = stored.astype(np.float32, order="C")
    if not np.isfinite(array).all():
        raise ValueError("it holds values that are not finite numbers")
    return array


def read_depth_array(path: Path) -> NDArray[np.float32]:
    """Return depths [H, W] in metres, 0 where there is none."""
    with naming(path):
        depth = _array(path, "f", 2)
        if depth.min() < 0 or depth.max() > MAX_DEPTH_M:
            raise ValueError(f"expected depths of 0..{MAX_DEPTH_M:g} m, found {depth.min():g}..{depth.max():g}")
        return depth


def read_normals_array(path: Path) -> NDArray[np.float32]:
    """Return normals [H, W, 3] of unit length, the zero vector where there is none."""
    with naming(path):
        normals = _array(path, "f", 3)
        if normals.shape[2] != 3 or abs(normals).max() > 1.5:  # 1.5: interpolation may have overshot 1
            raise ValueError(f"expected [H, W, 3] of unit vectors, found {normals.shape} up to {abs(normals).max():g}")
        lengths = np.linalg.norm(normals, axis=-1, keepdims=True)
        valid = lengths > 1e-6
        # Interpolation shortens a vector here and there. Where many are far from unit length the file holds something
        # else, such as (n + 1) / 2.
        odd = valid & ((lengths < 0.9) | (lengths > 1.1))
        if odd.sum() > 0.2 * valid.sum():
            raise ValueError(f"expected unit vectors, found {odd.sum() / valid.sum():.0%} of another length")
        return np.where(valid, normals / lengths.clip(1e-6), np.float32(0))


def read_edge_array(path: Path) -> NDArray[np.uint8]:
    """Return edges [H, W] 0/1: 1 where the stored number is at least 0.5."""
    with naming(path):
        edge = _array(path, "fiub", 2)
        if edge.min() < 0 or edge.max() > 255:
            raise ValueError(f"expected edges of 0..1, found {edge.min():g}..{edge.max():g}")
        return (edge >= 0.5).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- MATLAB
# The format is documented: MathWorks, "MAT-File Format", chapter 1, version 5. Not scipy.io.loadmat: it allocates what
# a header claims (a file of 176 bytes asks for 6.7 GiB) and does not read whole structures on demand.

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
        raise ValueError(f"expected a matrix, found an element of type {kind}")
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
        raise ValueError(f"expected numbers, found an element of type {kind}")
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
            raise ValueError(f"expected numbers, text or structures, found MATLAB class {self.kind}")
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
            raise ValueError(f"expected text, found an element of type {kind}")
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
            raise ValueError(f"expected a matrix, found an element of type {kind}")
        return _Matrix(payload, self.order, self.budget).value(nesting + 1)


# --------------------------------------------------------------------------------------------------------- resizing


def check_size(path: Path, label: NDArray, size: Size) -> None:
    """Raise InputError unless the label has the height and width of its image."""
    if label.shape[:2] != size:
        raise InputError(f"{path} has shape {label.shape}, its image {size}: replace the file")


def fitted(path: Path, label: NDArray, size: Size) -> NDArray:
    """Return a label [h, w, ...] at its image's size, by OpenCV's INTER_NEAREST (the floor of i * h / H).

    The public loaders resize so too, but normals by cubic interpolation, which mixes vectors across edges. Raises
    InputError if the aspect differs by more than 2 % (or a pixel) or the scale by more than 8: not the same picture.
    """
    (height, width), (rows, columns) = label.shape[:2], size
    if (height, width) == (rows, columns):
        return label
    skew, allowed = abs(height * columns - width * rows), max(width * rows // 50, rows, columns)
    if skew > allowed or not rows <= 8 * height <= 64 * rows or not columns <= 8 * width <= 64 * columns:
        raise InputError(f"{path} has shape {label.shape}, its image {size}: it labels another picture, replace it")
    return label[_nearest(height, rows)[:, None], _nearest(width, columns)]


def _nearest(length: int, wanted: int) -> NDArray[np.intp]:
    # In double precision like OpenCV, which so misses some whole results by one: 103 * 1355 / 515 = 271 becomes 270.
    return np.minimum(np.floor(np.arange(wanted) * (1.0 / (wanted / length))), length - 1).astype(np.intp)
