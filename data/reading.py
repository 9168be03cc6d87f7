"""Readers of one file each: images (by m3vit.images), label pngs, npy arrays. No torch.

Whatever is wrong with a file becomes one InputError that names it, and no header is believed: a file that claims more
than it holds, or more pixels than allowed, is refused before anything of that size is allocated.
"""

import errno
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from m3vit.errors import Defect, InputError
from m3vit.files import not_there, open_regular
from m3vit.images import FORMATS, Unfit, UnfitPixels, check_png, decode, header_size, orientation, png_bits, pointer
from m3vit.tasks import IGNORE

Size = tuple[int, int]  # height, width

# 4096 × 4096, where the published images have at most 640 × 480. Fewer than prediction takes: a loader process holds
# all labels at the image's size, normals in 12 bytes a pixel.
MAX_PIXELS = 1 << 24
MAX_FILE_BYTES = 1 << 28
MAX_DEPTH_M = 100.0  # beyond it the unit is not metres
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
BLOCK_PIXELS = 1 << 20  # of normals decoded at a time: intermediate results take 12 bytes a pixel each


class Impossible(ValueError):  # noqa: N818 (what it says, not that it is an error)
    """A whole file of a wrong type, or with values that cannot be."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever reading `path` raises into one InputError with its `defect`; what is not its fault passes."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError):
        reason = words = not_there(path)
        if reason == "not found":
            reason = f"not found: the data set is incomplete, extract its archive again{_other_case(path)}"
        raise InputError(f"{path} {reason}", defect=Defect(path, "missing", words)) from None
    # Not a list of types: on damaged files Pillow, NumPy and zlib raise a dozen, which change between versions.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in EXHAUSTED:  # it must not be left out for that
            raise
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(words.split())[:300] or type(error).__name__
        reason = f"it {error}" if isinstance(error, Unfit) else reason
        kind = "values" if isinstance(error, Impossible | UnfitPixels) else "unreadable"
        message = f"{path} cannot be read ({reason}): replace the file"
        raise InputError(message, defect=Defect(path, kind, reason)) from None


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


def check_pixels(width: int, height: int) -> None:
    """Raise ValueError for no pixels, or more than may be decoded."""
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it has {height} x {width} pixels, expected 1 to {MAX_PIXELS}")


# ---------------------------------------------------------------------------------------------------------- images


def image_size(path: Path) -> Size:
    """Return the height and width that `read_image` gives, from the file's header."""
    with naming(path), open_regular(path) as file:
        _check_bytes(file)
        return header_size(file, MAX_PIXELS)


def image_turn(path: Path) -> int:
    """Return the EXIF orientation of an image, by which `read_image` turns it upright; 1: it is."""
    with naming(path), Image.open(io.BytesIO(contents(path)), formats=FORMATS) as picture:
        return orientation(picture)


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return an image as RGB [H, W, 3], upright; m3vit.images decides about every other kind of pixel."""
    with naming(path):
        return decode(contents(path), MAX_PIXELS)


def label_png(data: bytes) -> tuple[Image.Image, int]:
    """Return the decoded png that a label file holds, and the bits per channel in it."""
    try:
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
    except UnidentifiedImageError:
        raise ValueError("it is not a PNG picture") from None
    check_pixels(*picture.size)
    check_png(data)
    picture.load()
    if (turn := orientation(picture)) != 1:
        # The published loaders would not turn it, viewers would, and the vectors of normals would turn with it.
        raise Impossible(f"expected a label stored upright, found EXIF orientation {turn}")
    return picture, png_bits(data)


def read_ids(path: Path, highest: int, ignored: bool = False) -> NDArray[np.uint8]:
    """Return the ids [H, W] of a label png: 0..highest, and 255 if `ignored`; of a palette png, the indices."""
    with naming(path):
        picture, bits = label_png(contents(path))
        # Grey of fewer bits would come out of Pillow stretched to 0..255; palette indices come out as they are.
        if not (picture.mode == "P" or (picture.mode == "L" and bits == 8)):
            raise Impossible(f"expected 8-bit ids in one channel, found {bits} bits a channel (mode {picture.mode})")
        ids = np.array(picture)
        wrong = ids > highest
        if ignored:
            wrong &= ids != IGNORE
        if wrong.any():
            also = f" or {IGNORE}" if ignored else ""
            raise Impossible(f"expected ids 0..{highest}{also}, found {ids[wrong].max()}")
        return ids


def read_grey(path: Path) -> NDArray[np.uint8]:
    """Return the values 0..255 [H, W] of a png of one channel."""
    with naming(path):
        picture, bits = label_png(contents(path))
        if bits > 8 or picture.mode not in ("L", "P", "1"):
            raise Impossible(f"expected one channel of 8 bits, found {bits} bits a channel (mode {picture.mode})")
        if picture.mode == "1":
            picture = picture.convert("L")
        values = np.array(picture)
        if values.max() == 1:  # a mask written as 0/1 would read as empty
            raise Impossible("expected values 0..255, found 0 and 1")
        return values


def read_normals_png(path: Path) -> NDArray[np.float32]:
    """Return the normals [H, W, 3] coded in an RGB png as n = 2 v / 255 - 1, of unit length, or the zero vector.

    No code is exactly 0, so "none" is a length that no coded unit vector has, outside 0.5..1.5: mid grey (127 or 128
    in every channel, 0.007) and black (1.73).
    """
    with naming(path):
        picture, bits = label_png(contents(path))
        if bits != 8 or picture.mode != "RGB":
            raise Impossible(f"expected RGB of 8 bits a channel, found {bits} (mode {picture.mode})")
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
            raise Impossible(f"expected format version 1.0 or 2.0, found {version}")
        if dtype.hasobject:
            raise ValueError("it holds pickled Python objects, which are never loaded")
        if dtype.kind not in kinds:
            raise Impossible(f"expected {'floating-point ' if kinds == 'f' else ''}numbers, found {dtype}")
        if len(shape) != ndim or min(shape) < 1:
            raise Impossible(f"expected {ndim} dimensions, found shape {shape}")
        promised, found = math.prod(shape) * dtype.itemsize, size - file.tell()
        if promised != found:
            raise ValueError(f"its header promises {promised} bytes ({shape} of {dtype}), it holds {found}")
        check_pixels(shape[1], shape[0])
        stored = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
    with np.errstate(over="ignore"):  # beyond float32 is infinity, refused below
        array = stored.astype(np.float32, order="C")
    if not np.isfinite(array).all():
        raise Impossible("it holds values that are not finite numbers")
    return array


def read_depth_array(path: Path) -> NDArray[np.float32]:
    """Return depths [H, W] in metres, 0 where there is none."""
    with naming(path):
        depth = _array(path, "f", 2)
        if depth.min() < 0 or depth.max() > MAX_DEPTH_M:
            raise Impossible(f"expected depths of 0..{MAX_DEPTH_M:g} m, found {depth.min():g}..{depth.max():g}")
        return depth


def read_normals_array(path: Path) -> NDArray[np.float32]:
    """Return normals [H, W, 3] of unit length, the zero vector where there is none."""
    with naming(path):
        normals = _array(path, "f", 3)
        if normals.shape[2] != 3 or abs(normals).max() > 1.5:  # 1.5: interpolation may have overshot 1
            raise Impossible(f"expected [H, W, 3] of unit vectors, found {normals.shape} up to {abs(normals).max():g}")
        lengths = np.linalg.norm(normals, axis=-1, keepdims=True)
        valid = lengths > 1e-6
        # Interpolation shortens a vector here and there. Where many are far from unit length the file holds something
        # else, such as (n + 1) / 2.
        odd = valid & ((lengths < 0.9) | (lengths > 1.1))
        if odd.sum() > 0.2 * valid.sum():
            raise Impossible(f"expected unit vectors, found {odd.sum() / valid.sum():.0%} of another length")
        return np.where(valid, normals / lengths.clip(1e-6), np.float32(0))


def read_edge_array(path: Path) -> NDArray[np.uint8]:
    """Return edges [H, W] 0/1: 1 where the stored number is at least 0.5."""
    with naming(path):
        edge = _array(path, "fiub", 2)
        if edge.min() < 0 or edge.max() > 255:
            raise Impossible(f"expected edges of 0..1, found {edge.min():g}..{edge.max():g}")
        return (edge >= 0.5).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------- resizing


def check_size(path: Path, label: NDArray, size: Size) -> None:
    """Raise InputError unless the label has the height and width of its image."""
    if label.shape[:2] != size:
        words = f"has shape {label.shape}, its image {size}"
        raise InputError(f"{path} {words}: replace the file", defect=Defect(path, "size", words))


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
        words = f"has shape {label.shape}, its image {size}: it labels another picture, replace it"
        raise InputError(f"{path} {words}", defect=Defect(path, "size", words))
    return label[_nearest(height, rows)[:, None], _nearest(width, columns)]


def _nearest(length: int, wanted: int) -> NDArray[np.intp]:
    # In double precision like OpenCV, which so misses some whole results by one: 103 * 1355 / 515 = 271 becomes 270.
    return np.minimum(np.floor(np.arange(wanted) * (1.0 / (wanted / length))), length - 1).astype(np.intp)


def __getattr__(name: str) -> Any:
    """Give read_mat its public name among the readers; its module builds on this one."""
    if name == "read_mat":
        from m3vit.data.matlab import read_mat

        return read_mat
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
