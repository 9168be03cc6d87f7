"""Labels as people have them: masks of any bits and of palettes, depth in any unit, normals of any axes. No torch.

Files are png, npy or tiff, told apart by their content; whatever is wrong with one becomes an InputError that names it.
"""

import io
import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3vit.data.own.description import AXES, TaskFiles
from m3vit.data.reading import Impossible, Size, check_pixels, contents, fitted, label_png, naming
from m3vit.errors import Defect, InputError
from m3vit.files import open_regular
from m3vit.images import orientation, png_bits
from m3vit.tasks import IGNORE

OUT_OF_RANGE = -1
MAX_METRES = 1000.0  # beyond it the unit is another
NAMED_IDS = 6  # of those out of range
# EXIF orientations that swap rows and columns -> what makes an array [H, W] upright.
ON_ITS_SIDE: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    5: lambda values: values.T,
    6: lambda values: np.rot90(values, -1),
    7: lambda values: np.rot90(values, 2).T,
    8: lambda values: np.rot90(values, 1),
}


def read_label(path: Path, task: TaskFiles, size: Size, turn: Callable[[], int] = lambda: 1) -> NDArray[Any]:
    """Return a label in the conventions of m3vit.tasks, at its image's size: the nearest pixel where it has another.

    `turn` gives the EXIF orientation of the image. Of one stored on its side, a label that fits it as stored is turned
    as the image is: a program that drew it did not look at EXIF. Vectors would turn with it, and are refused.
    """
    with naming(path):
        stored = stored_values(path)
        label: NDArray[Any] = READERS[task.kind](path, stored, task)
    lies = (label.shape[0] > label.shape[1]) != (size[0] > size[1]) and label.shape[0] != label.shape[1]
    if lies and task.kind != "normals":
        label = ON_ITS_SIDE.get(turn(), lambda values: values)(label)
    return fitted(path, np.ascontiguousarray(label), size)


def stored_values(path: Path) -> NDArray[Any]:
    """Return what a file holds, [H, W] or [H, W, C]: grey of fewer than 8 bits as it is, of a palette the indices."""
    data = contents(path)
    if data.startswith(b"\x93NUMPY"):
        return _npy(data)
    picture: Image.Image
    if data.startswith((b"II*\0", b"MM\0*")):
        picture = Image.open(io.BytesIO(data), formats=("TIFF",))
        check_pixels(*picture.size)
        picture.load()
        bits = 8
        if (turn := orientation(picture)) != 1:
            raise Impossible(f"expected a label stored upright, found orientation {turn}")
    else:
        picture, bits = label_png(data)
    if picture.mode not in ("1", "L", "P", "I", "F", "I;16", "I;16L", "I;16B", "LA", "RGB", "RGBA"):
        raise Impossible(f"expected grey, a palette or RGB, found mode {picture.mode}")
    values = np.array(picture)
    if bits < 8 and picture.mode == "L":  # Pillow stretches them to 0..255
        values //= np.uint8(255 // (2**bits - 1))
    if picture.mode in ("RGB", "RGBA") and picture.format == "PNG" and png_bits(data) > 8:
        raise Impossible("it has more than 8 bits a channel in several channels, which are read from npy alone")
    values = values.astype(np.uint8) if values.dtype == np.bool_ else values
    if picture.mode == "LA":
        return values[..., 0]
    return values[..., :3] if picture.mode == "RGBA" else values


def _npy(data: bytes) -> NDArray[Any]:
    """Return the array of a npy file, whose header is not believed."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise Impossible(f"expected format version 1.0 or 2.0, found {version}")
    shape, fortran_order, dtype = readers[version](file)
    if dtype.kind not in "fiub" or len(shape) not in (2, 3) or min(shape) < 1:
        raise Impossible(f"expected numbers [H, W] or [H, W, C], found {dtype} {list(shape)}")
    check_pixels(shape[1], shape[0])
    promised, found = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if promised != found:
        raise ValueError(f"its header promises {promised} bytes ({shape} of {dtype}), it holds {found}")
    array = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
    return array.astype(np.uint8) if dtype.kind == "b" else array


def one_channel(values: NDArray[Any]) -> NDArray[Any]:
    """Return values [H, W], also of three equal channels, or raise Impossible."""
    if values.ndim == 2:
        return values
    if (values == values[..., :1]).all():
        return np.ascontiguousarray(values[..., 0])
    raise Impossible(
        "expected one channel of ids or a palette, found colours: convert them to ids, as docs/own-data.md says"
    )


def read_classes(path: Path, stored: NDArray[Any], task: TaskFiles) -> NDArray[np.uint8]:
    """Return class ids [H, W] uint8, IGNORE among them."""
    ids = _segment_ids(path, stored, task) if task.segments else one_channel(stored)
    if ids.dtype.kind == "f":
        if not (ids == np.trunc(ids)).all():
            raise Impossible("expected whole numbers, found fractions")
        ids = ids.astype(np.int64)
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= 1 << 16:
        raise Impossible(f"expected ids of data.yaml, found {least} to {most}")
    table = _table(tuple(task.ids.items()))
    label = table[ids]
    if (label == OUT_OF_RANGE).any():
        wrong = [int(one) for one in np.unique(ids[label == OUT_OF_RANGE])]
        more = f" and {len(wrong) - NAMED_IDS} more" if len(wrong) > NAMED_IDS else ""
        named = ", ".join(map(str, wrong[:NAMED_IDS]))
        raise Impossible(f"its ids {named}{more} are neither in classes nor in ignore or remap of tasks.{task.name}")
    return label.astype(np.uint8)


@lru_cache(8)
def _table(ids: tuple[tuple[int, int], ...]) -> NDArray[np.int16]:
    table = np.full(1 << 16, OUT_OF_RANGE, np.int16)
    for stored, place in ids:
        table[stored] = place
    return table


def _segment_ids(path: Path, stored: NDArray[Any], task: TaskFiles) -> NDArray[Any]:
    """Return the category [H, W] of each pixel of a COCO panoptic png, whose colours are numbers of segments; 0: none.

    The number is R + 256 G + 256^2 B; which category a segment is of stands in the JSON file
    (cocodataset.org/#format-data, 4. Panoptic Segmentation).
    """
    if stored.ndim != 3 or stored.dtype != np.uint8:
        raise Impossible("expected a COCO panoptic png of RGB")
    # The same name may be in the files of two splits: one that is called as the png's folder is of it.
    files = [file for file in task.segments if Path(file).stem in path.parts] or task.segments
    source = next((file for file in files if path.name in segments_of(file)), None)
    if source is None:
        raise Impossible(f"{', '.join(Path(file).name for file in files)} has no annotation with its file_name")
    numbers = stored.astype(np.int64) @ np.array([1, 256, 65536])
    table = segments_of(source)[path.name]
    found, inverse = np.unique(numbers, return_inverse=True)
    if missing := [int(one) for one in found if one and int(one) not in table]:
        raise Impossible(f"{source} names no segment {missing[0]} of it")
    return np.array([table.get(int(one), 0) for one in found], np.int64)[inverse].reshape(numbers.shape)


def segments_of(file: str) -> dict[str, dict[int, int]]:
    """Return by file name which category each segment is of, or raise InputError."""
    path = Path(file)
    with naming(path):
        found = path.stat()
    return _segments(path, found.st_mtime_ns, found.st_size)


@lru_cache(4)
def _segments(path: Path, _changed: int, _size: int) -> dict[str, dict[int, int]]:
    try:
        with open_regular(path) as opened:
            content = json.load(opened)
        return {
            one["file_name"]: {part["id"]: part["category_id"] for part in one["segments_info"]}
            for one in content["annotations"]
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        words = f"is no COCO panoptic JSON ({type(error).__name__}: {error})"
        raise InputError(f"{path} {words}: replace it", defect=Defect(path, "unreadable", words)) from None


def read_depth(path: Path, stored: NDArray[Any], task: TaskFiles) -> NDArray[np.float32]:
    """Return depths [H, W] in metres, 0 where they are not known."""
    values = one_channel(stored).astype(np.float64)
    unknown = ~np.isfinite(values) | np.isin(values, task.invalid)
    depth = np.where(unknown, 0, values) * task.metres
    if task.farthest is not None:
        depth = np.where(depth > task.farthest, 0, depth)
    if depth.min() < 0 or depth.max() > MAX_METRES:
        raise Impossible(
            f"expected depths of 0 to {MAX_METRES:g} m, found {depth.min():g} to {depth.max():g}: mend unit or invalid "
            f"of tasks.{task.name}, or give farthest"
        )
    return depth.astype(np.float32)


def read_normals(path: Path, stored: NDArray[Any], task: TaskFiles) -> NDArray[np.float32]:
    """Return unit vectors [H, W, 3], x right, y up, z towards the camera; zero where they are not known.

    Of integers n = 2 v / 255 - 1, or 65535 for 16 bits; mid grey and black are none, as in m3vit.data.reading.
    """
    if stored.ndim != 3 or stored.shape[2] != 3:
        raise Impossible(f"expected [H, W, 3], found {list(stored.shape)}")
    values = stored.astype(np.float32)
    if stored.dtype.kind in "iu":
        values = values * np.float32(2 / (65535 if stored.dtype.itemsize > 1 else 255)) - 1
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    valid = np.isfinite(lengths) & (lengths > 0.5) & (lengths < 1.5)
    if stored.dtype.kind == "f" and valid.mean() < 0.5 and (lengths > 1e-6).mean() > 0.5:
        raise Impossible("expected unit vectors, found most of another length")
    vectors = np.where(valid, values / np.where(valid, lengths, 1), 0).astype(np.float32)
    turned, pairs = np.zeros_like(vectors), [pair.split() for pair in AXES]
    for place, word in enumerate(task.axes):
        axis = next(index for index, pair in enumerate(pairs) if word in pair)
        turned[..., axis] = vectors[..., place] * (1 if word == pairs[axis][0] else -1)
    return turned


def read_probability(path: Path, stored: NDArray[Any], task: TaskFiles) -> NDArray[np.uint8]:
    """Return 0 and 1 [H, W], IGNORE among them: 1 from half of the range on, which of a file of 0 and 1 ends at 1."""
    values = one_channel(stored)
    most = 1 if values.max() <= 1 else 65535 if values.max() > 255 else 255
    label = (values >= most / 2).astype(np.uint8)
    label[np.isin(values, task.ignore)] = IGNORE
    return label


READERS: dict[str, Callable[[Path, NDArray[Any], TaskFiles], NDArray[Any]]] = {
    "classes": read_classes,
    "depth": read_depth,
    "normals": read_normals,
    "probability": read_probability,
}
