"""The readers of single files: conventions by hand, every kind of damage, and fuzzing."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from m3vit.data import reading
from m3vit.data.pascal_context import read_human_parts, read_label_map
from m3vit.data.reading import (
    fitted,
    image_size,
    read_depth_array,
    read_edge_array,
    read_grey,
    read_ids,
    read_image,
    read_mat,
    read_normals_array,
    read_normals_png,
)
from m3vit.errors import InputError
from tests.data.layouts import coded, save_anno, save_label_map, save_palette_png, unit_normals

Reader = Callable[[Path], Any]
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def refuses(reader: Reader, path: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        reader(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and "object at 0x" not in message, message


def ids_40(path: Path) -> Any:
    return read_ids(path, 40)


# ---------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpgs_of_any_mode_are_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (9, 7), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (7, 9, 3) and image.dtype == np.uint8 and image.min() >= 250
    assert image_size(path) == (7, 9)


def test_a_png_image_is_exact(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), rgb)
    save_palette_png(tmp_path / "p.png", GREY)
    assert read_image(tmp_path / "p.png").shape == (16, 16, 3)  # through the palette: a picture, not ids
    rgba = np.dstack([rgb, np.zeros((5, 4), np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "t.png")
    np.testing.assert_array_equal(read_image(tmp_path / "t.png"), rgb)


def test_ids_of_a_palette_png_are_its_indices(tmp_path: Path) -> None:
    for save in (save_palette_png, lambda path, ids: Image.fromarray(ids).save(path)):
        save(tmp_path / "a.png", GREY)
        np.testing.assert_array_equal(read_ids(tmp_path / "a.png", 255), GREY)
    few = (GREY % 4).astype(np.uint8)
    picture = Image.fromarray(few).convert("P")
    picture.putdata(few.reshape(-1).tolist())
    picture.save(tmp_path / "few.png", bits=2)
    assert (tmp_path / "few.png").read_bytes()[24] == 2
    np.testing.assert_array_equal(read_ids(tmp_path / "few.png", 3), few)


def test_the_highest_id(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 40, 255]], np.uint8)).save(path)
    np.testing.assert_array_equal(read_ids(path, 40, ignored=True), [[0, 40, 255]])
    refuses(ids_40, path, r"expected ids 0\.\.40, found 255")
    Image.fromarray(np.array([[0, 41, 255]], np.uint8)).save(path)
    refuses(lambda p: read_ids(p, 40, ignored=True), path, r"expected ids 0\.\.40 or 255, found 41")


def test_grey(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(GREY).save(path)
    np.testing.assert_array_equal(read_grey(path), GREY)
    Image.fromarray(GREY > 99).save(path)  # 1 bit
    np.testing.assert_array_equal(read_grey(path), (GREY > 99) * 255)


def rgb16_png() -> bytes:
    """Return a png of 16 bits a channel, which Pillow reads, as 8 bits, but cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(13))) + chunk(b"IEND", b"")
    )


def test_other_depths_and_modes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(rgb16_png())
    assert np.asarray(Image.open(path)).dtype == np.uint8  # Pillow hides the depth
    for reader in (read_image, read_normals_png, ids_40, read_grey):
        refuses(reader, path, "found 16")
    Image.fromarray(GREY.astype(np.uint16) * 100).save(path)
    for reader in (read_image, ids_40, read_grey):
        refuses(reader, path, "found 16")
    refuses(read_normals_png, path, "expected RGB of 8 bits")
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(path)
    for reader in (ids_40, read_grey):
        refuses(reader, path, "mode RGB")
    Image.fromarray(GREY > 9).save(path)  # 1 bit: not ids
    refuses(ids_40, path, "found 1 bits a channel")
    Image.fromarray(np.zeros((2, 2, 4), np.uint8)).save(path)
    refuses(read_normals_png, path, "mode RGBA")
    Image.fromarray(GREY).save(tmp_path / "b.jpg")  # lossy: never ids
    refuses(ids_40, tmp_path / "b.jpg", "not a PNG picture")
    Image.fromarray(GREY).save(tmp_path / "c.gif")
    refuses(read_image, tmp_path / "c.gif", "not a JPEG or PNG picture")
    refuses(image_size, tmp_path / "c.gif", "not a JPEG or PNG picture")


def test_normals_pngs_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    codes = [[128, 128, 255], [255, 128, 128], [218, 128, 218], [127, 128, 127], [0, 0, 0], [255, 255, 255]]
    Image.fromarray(np.array([codes], np.uint8)).save(path)
    # 2 * 128 / 255 - 1 = 1 / 255; the third is 181 / 255 = 0.7098 twice. Then divided by their lengths.
    z: float = 1 / (1 + 2 / 255**2) ** 0.5
    diagonal: float = 181 / (2 * 181**2 + 1) ** 0.5
    expected = [[z / 255, z / 255, z], [z, z / 255, z / 255], [diagonal, diagonal / 181, diagonal]]
    normals = read_normals_png(path)
    assert normals.dtype == np.float32 and normals.shape == (1, 6, 3)
    np.testing.assert_allclose(normals[0, :3], np.array(expected), atol=1e-6)
    assert not normals[0, 3:].any()  # mid grey, black and white code no unit vector


def test_coded_normals_come_back(tmp_path: Path) -> None:
    normals = unit_normals(np.random.default_rng(0), (40, 50))
    Image.fromarray(coded(normals)).save(tmp_path / "a.png")
    back = read_normals_png(tmp_path / "a.png")
    np.testing.assert_allclose(np.linalg.norm(back, axis=-1), 1, atol=1e-6)
    angle_deg = np.degrees(np.arccos((back * normals).sum(-1).clip(-1, 1)))
    assert angle_deg.max() < np.degrees(3**0.5 / 255) + 0.05  # half a code, 1 / 255, in each of three components


# ------------------------------------------------------------------------------------------------------------- npy


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_arrays_of_any_layout(tmp_path: Path, order: Any, dtype: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([[0, 1.5, 2], [3, 4, 9.5]], dtype, order=order))
    depth = read_depth_array(path)
    assert depth.dtype == np.float32 and depth.dtype.isnative and depth.flags.c_contiguous and depth.flags.writeable
    np.testing.assert_array_equal(depth, [[0, 1.5, 2], [3, 4, 9.5]])


def test_edges_and_normals_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for stored in ([[0.0, 0.4, 0.5, 1.0]], [[0, 0, 1, 255]], [[False, False, True, True]]):
        np.save(path, np.array(stored))
        edge = read_edge_array(path)
        assert edge.dtype == np.uint8 and edge.tolist() == [[0, 0, 1, 1]]
    ahead = [[0, 0, 1]] * 4  # a vector here and there may be short
    np.save(path, np.array([[[0, 0, 0], [0, 3e-1, 4e-1], *ahead]], np.float64))
    normals = read_normals_array(path)
    np.testing.assert_allclose(normals, [[[0, 0, 0], [0, 0.6, 0.8], *ahead]], atol=1e-7)
    assert normals.dtype == np.float32


NPY_DAMAGE: list[tuple[str, Reader, Any, str]] = [
    ("nan", read_depth_array, np.full((2, 3), np.nan, np.float32), "not finite"),
    ("inf", read_normals_array, np.full((2, 3, 3), np.inf, np.float32), "not finite"),
    ("beyond float32", read_depth_array, np.full((2, 3), 1e300), "not finite"),
    ("negative", read_depth_array, np.full((2, 3), -0.1, np.float32), r"expected depths of 0\.\.100 m, found -0.1"),
    ("millimetres", read_depth_array, np.full((2, 3), 2500.0, np.float32), "expected depths"),
    ("integers", read_depth_array, np.ones((2, 3), np.uint16), "expected floating-point numbers, found uint16"),
    ("integer normals", read_normals_array, np.ones((2, 3, 3), np.uint8), "expected floating-point"),
    ("text", read_depth_array, np.full((2, 3), "far"), "expected floating-point"),
    ("complex", read_edge_array, np.ones((2, 3), np.complex64), "expected numbers, found complex64"),
    ("records", read_edge_array, np.zeros((2, 3), [("a", "f4")]), "expected numbers"),
    ("one dimension", read_depth_array, np.ones(6, np.float32), "expected 2 dimensions"),
    ("no rows", read_depth_array, np.ones((0, 3), np.float32), "expected 2 dimensions"),
    ("scalar", read_edge_array, np.float32(1), "expected 2 dimensions"),
    ("two channels", read_normals_array, np.ones((2, 3, 2), np.float32), r"expected \[H, W, 3\]"),
    ("no unit vectors", read_normals_array, np.full((2, 3, 3), 255, np.float32), "expected .* unit vectors"),
    ("negative edge", read_edge_array, np.full((2, 3), -1.0), r"expected edges of 0\.\.1"),
]


@pytest.mark.parametrize(
    ("reader", "array", "words"), [row[1:] for row in NPY_DAMAGE], ids=[row[0] for row in NPY_DAMAGE]
)
def test_bad_arrays_are_refused(tmp_path: Path, reader: Reader, array: Any, words: str) -> None:
    np.save(tmp_path / "a.npy", array)
    refuses(reader, tmp_path / "a.npy", words)


class Bomb:
    """A pickle that would create a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([[Bomb(tmp_path / "gone off")]], dtype=object), allow_pickle=True)
    for reader in (read_depth_array, read_normals_array, read_edge_array):
        refuses(reader, path, "pickled Python objects")
    assert not (tmp_path / "gone off").exists()


def npy(shape: tuple[int, ...], data: bytes = b"", dtype: str = "<f4") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue() + data


def test_a_header_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for contents in (npy((10**6, 10**6)), npy((2**62, 2**62)), npy((2, 3), bytes(23)), npy((2, 3), bytes(25))):
        path.write_bytes(contents)
        refuses(read_depth_array, path, "its header promises")
    path.write_bytes(npy((-2, 3), bytes(24)))
    refuses(read_depth_array, path, "expected 2 dimensions")
    path.write_bytes(b"\x93NUMPY\x03\x00" + bytes(60))
    refuses(read_depth_array, path, "expected format version")
    path.write_bytes(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535)
    refuses(read_depth_array, path, "cannot be read")


# ---------------------------------------------------------------------------------------------------------- MATLAB


@pytest.mark.parametrize("compressed", [True, False])
def test_mat_agrees_with_scipy(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "a.mat"
    rng = np.random.default_rng(0)
    stored: dict[str, Any] = {
        f"a_{kind}": rng.integers(0, 100, (3, 4)).astype(kind)
        for kind in ("u1", "i1", "u2", "i2", "i4", "i8", "f4", "f8")
    }
    stored |= {"yes": rng.random((2, 5)) > 0.5, "deep": rng.random((2, 3, 4)), "empty": np.zeros((0, 3)), "one": 7.0}
    scipy.io.savemat(path, {**stored, "word": "Zürich"}, do_compression=compressed)
    expected = scipy.io.loadmat(path)
    for name in stored:
        found = read_mat(path, name)
        np.testing.assert_array_equal(found, expected[name])
        assert found.dtype == expected[name].dtype and found.shape == expected[name].shape, name
    assert read_mat(path, "word") == expected["word"][0]
    refuses(lambda p: read_mat(p, "LabelMap"), path, "it holds no LabelMap, only a_u1, ")


def test_structures(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    upper, lower = np.eye(3, dtype=np.bool_), ~np.eye(3, dtype=np.bool_)
    save_anno(path, "x", [("dog", 12, upper, []), ("person", 15, lower, [("hair", upper), ("lfoot", lower)])])
    (anno,) = read_mat(path, "anno")
    assert anno["imname"] == "x" and [thing["class"] for thing in anno["objects"]] == ["dog", "person"]
    dog, person = anno["objects"]
    assert dog["parts"].shape == (0, 0) and person["class_ind"].tolist() == [[15]]
    assert [part["part_name"] for part in person["parts"]] == ["hair", "lfoot"]
    np.testing.assert_array_equal(person["parts"][0]["mask"], upper)
    save_anno(path, "x", [])
    assert read_mat(path, "anno")[0]["objects"].shape == (0, 0)


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


def test_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    # uint16 2 × 3 column by column, stored as the smallest type that holds them, as MATLAB does: uint8
    body = mat_matrix(11, (2, 3), mat_element(2, bytes([1, 2, 3, 4, 5, 6]), ">"), ">")
    path.write_bytes(mat_file(body, order=">"))
    np.testing.assert_array_equal(scipy.io.loadmat(path)["LabelMap"], [[1, 3, 5], [2, 4, 6]])
    found = read_mat(path, "LabelMap")
    assert found.dtype == np.uint16 and found.tolist() == [[1, 3, 5], [2, 4, 6]]


NUMBERS = mat_element(2, bytes(6))
STRUCT = mat_element(5, struct.pack("<i", 4)) + mat_element(1, b"a\0\0\0")
MAT_DAMAGE = {
    "hdf5": (b"MATLAB 7.3 MAT-file".ljust(512) + b"\x89HDF\r\n\x1a\n", r"MATLAB 7\.3"),
    "hdf5 itself": (b"\x89HDF\r\n\x1a\n" + bytes(200), r"MATLAB 7\.3"),
    "version 4": (struct.pack("<5i", 0, 2, 3, 0, 2) + b"a\0" + bytes(48), "version 5 to 7"),
    "junk": (b"x" * 300, "version 5 to 7"),
    "short": (b"x", "version 5 to 7"),
    "header alone": (mat_file(), "only nothing"),
    "too few numbers": (mat_file(mat_matrix(9, (2, 4), NUMBERS)), r"of \(2, 4\) holds 6 numbers"),
    "gigantic": (mat_file(mat_matrix(9, (2**30, 2**30), NUMBERS)), "holds 6 numbers"),
    "gigantic text": (mat_file(compressed(mat_matrix(4, (30000, 30000), mat_element(1, b"")))), "holds 0 characters"),
    "gigantic structure": (mat_file(mat_matrix(2, (2**30, 2**30), STRUCT)), "truncated"),
    "negative": (mat_file(mat_matrix(9, (-2, -3), NUMBERS)), "damaged header"),
    "complex": (mat_file(mat_matrix(9, (2, 3), NUMBERS + NUMBERS, flags=0x0800)), "complex"),
    "sparse": (mat_file(mat_matrix(5, (2, 3), NUMBERS)), "found MATLAB class 5"),
    "cells": (mat_file(mat_matrix(1, (1, 1), mat_element(14, b""))), "found MATLAB class 1"),
    "no numbers": (mat_file(mat_matrix(9, (2, 3), b"")), "truncated"),
    "text for numbers": (mat_file(mat_matrix(9, (2, 3), mat_element(16, bytes(6)))), "expected numbers"),
    "not a matrix": (mat_file(mat_element(5, bytes(8))), "expected a matrix"),
    "bad compression": (mat_file(struct.pack("<II", 15, 9) + b"not zlib!"), "decompressing"),
    "cut compression": (mat_file(struct.pack("<II", 15, 20) + zlib.compress(bytes(999))[:9] + bytes(11)), "cannot"),
    "longer than the file": (mat_file(struct.pack("<II", 14, 0xFFFFFFF0)), "truncated"),
}


@pytest.mark.parametrize("name", MAT_DAMAGE)
def test_bad_mats_are_refused(tmp_path: Path, name: str) -> None:
    contents, words = MAT_DAMAGE[name]
    (tmp_path / "a.mat").write_bytes(contents)
    refuses(read_label_map, tmp_path / "a.mat", words)


def test_a_mat_that_inflates_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_MAT_BYTES", 10_000)
    path = tmp_path / "a.mat"
    path.write_bytes(mat_file(compressed(mat_matrix(9, (3000, 3000), mat_element(2, bytes(9_000_000))))))
    refuses(read_label_map, path, "holds more than 10000 bytes")
    small = compressed(mat_matrix(9, (60, 60), mat_element(2, bytes(3600)))).replace(b"LabelMap", b"labelmap")
    path.write_bytes(mat_file(*[compressed(mat_element(14, bytes(4000)))] * 4, small))
    refuses(read_label_map, path, "cannot be read")


def test_deep_nesting(tmp_path: Path) -> None:
    value = mat_matrix(9, (1, 1), mat_element(2, b"\1"))
    for _ in range(2000):
        value = mat_matrix(2, (1, 1), STRUCT + value)
    (tmp_path / "a.mat").write_bytes(mat_file(value))
    refuses(read_label_map, tmp_path / "a.mat", "nests structures deeper")


def test_label_maps(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    save_label_map(path, np.array([[0, 1], [300, 459]]))
    np.testing.assert_array_equal(read_label_map(path), [[0, 1], [300, 459]])
    scipy.io.savemat(path, {"LabelMap": np.array([[1.0, 459.0]])})
    np.testing.assert_array_equal(read_label_map(path), [[1, 459]])
    bad: Any
    for bad in ([[460]], [[-1]], [[1.5]], [[np.nan]], [[np.inf]]):
        scipy.io.savemat(path, {"LabelMap": np.array(bad)})
        refuses(read_label_map, path, r"expected class ids 0\.\.459")
    for bad in ("text", np.zeros((2, 3, 4)), np.zeros((0, 0)), {"a": 1}):
        scipy.io.savemat(path, {"LabelMap": bad})
        refuses(read_label_map, path, "expected LabelMap to be a matrix")


# --------------------------------------------------------------------------------------------------- any kind of file


READERS: dict[str, tuple[Reader, Callable[[Path], None]]] = {
    "jpg": (read_image, lambda path: Image.fromarray(GREY).convert("RGB").save(path)),
    "size.jpg": (image_size, lambda path: Image.fromarray(GREY).convert("RGB").save(path)),
    "rgb.png": (read_normals_png, lambda path: Image.fromarray(np.dstack([GREY] * 3)).save(path)),
    "ids.png": (ids_40, lambda path: save_palette_png(path, (GREY % 41).astype(np.uint8))),
    "grey.png": (read_grey, lambda path: Image.fromarray(GREY).save(path)),
    "depth.npy": (read_depth_array, lambda path: np.save(path, GREY.astype(np.float32) / 30)),
    "normals.npy": (read_normals_array, lambda path: np.save(path, unit_normals(np.random.default_rng(0), (6, 7)))),
    "edge.npy": (read_edge_array, lambda path: np.save(path, GREY > 99)),
    "map.mat": (read_label_map, lambda path: save_label_map(path, GREY)),
    "plain.mat": (read_label_map, lambda path: save_label_map(path, GREY, compressed=False)),
    "parts.mat": (
        read_human_parts,
        lambda path: save_anno(path, "x", [("person", 15, GREY > 9, [("hair", GREY > 99)])], compressed=False),
    ),
    "packed.mat": (
        read_human_parts,
        lambda path: save_anno(path, "x", [("person", 15, GREY > 9, [("hair", GREY > 99)])]),
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    """One intact file of each kind, with its contents."""
    folder = tmp_path_factory.mktemp("whole")
    for name, (_, write) in READERS.items():
        path = folder / (name if "." in name else f"a.{name}")
        write(path)
        path.rename(folder / name)
    return {name: (folder / name, (folder / name).read_bytes()) for name in READERS}


@pytest.mark.parametrize("name", READERS)
def test_missing_empty_truncated(tmp_path: Path, whole: dict[str, tuple[Path, bytes]], name: str) -> None:
    reader, contents = READERS[name][0], whole[name][1]
    assert reader(whole[name][0]) is not None
    path = tmp_path / name
    refuses(reader, path, "not found")
    refuses(reader, whole[name][0] / "below a file", "not found")
    path.mkdir()
    refuses(reader, path, "not a regular file")
    path.rmdir()
    path.write_bytes(b"")
    refuses(reader, path, "it has 0 bytes")
    path.write_text("<html>404 not found</html>" * 20)
    refuses(reader, path, "cannot be read")
    # The last 24 bytes of a png are checksums and the end mark, without which Pillow may have all pixels: or none.
    needed = 3 if name == "size.jpg" else min(len(contents) * 9 // 10, len(contents) - 24)
    for length in range(1, len(contents), max(1, len(contents) // 200)):
        path.write_bytes(contents[:length])
        try:
            value = reader(path)
        except InputError as error:
            assert str(error).startswith(f"{path} cannot be read")
        else:
            assert length > needed
            np.testing.assert_array_equal(value, reader(whole[name][0]))


def valid(name: str, value: Any) -> bool:
    """Return whether a reader's result keeps the promises of its docstring."""
    if name == "size.jpg":
        return min(value) > 0
    if value is None:
        return name in ("parts.mat", "packed.mat")
    if value.dtype == np.float32:
        lengths = np.linalg.norm(value, axis=-1)
        return bool(
            np.isfinite(value).all()
            and (value.min() >= 0 if value.ndim == 2 else ((abs(lengths - 1) < 1e-4) | (lengths == 0)).all())
        )
    highest = {"ids.png": 40, "map.mat": 459, "plain.mat": 459, "parts.mat": 6, "packed.mat": 6, "edge.npy": 1}
    return value.min() >= 0 and value.max() <= highest.get(name, 255)


@settings(
    max_examples=150, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize("name", READERS)
def test_flipped_bytes(tmp_path: Path, whole: dict[str, tuple[Path, bytes]], name: str, data: st.DataObject) -> None:
    contents = bytearray(whole[name][1])
    flips = st.tuples(
        st.integers(0, len(contents) - 1) | st.integers(0, min(200, len(contents) - 1)), st.integers(0, 255)
    )
    for at, value in data.draw(st.lists(flips, min_size=1, max_size=6)):
        contents[at] = value
    if data.draw(st.booleans()):
        del contents[data.draw(st.integers(0, len(contents) - 1)) :]
    path = tmp_path / name
    path.write_bytes(contents)
    try:
        value = READERS[name][0](path)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        assert valid(name, value)


@settings(max_examples=60, deadline=5000, derandomize=True)
@given(mutated=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes_inside_the_compression(
    tmp_path_factory: pytest.TempPathFactory, mutated: list[tuple[int, int]]
) -> None:
    """Damage of a compressed file stops at zlib's checksum; this is what lies behind it, well packed."""
    folder = tmp_path_factory.mktemp("m")
    save_anno(folder / "a.mat", "x", [("person", 15, GREY > 9, [("hair", GREY > 99)])], compressed=False)
    contents = bytearray((folder / "a.mat").read_bytes()[128:])
    for at, value in mutated:
        contents[at % len(contents)] = value
    (folder / "b.mat").write_bytes(mat_file(compressed(bytes(contents))))
    try:
        read_human_parts(folder / "b.mat")
    except InputError as error:
        assert "b.mat" in str(error)


def png_header(width: int, height: int) -> bytes:
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + bytes(20)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_a_header_claims_is_not_allocated(tmp_path: Path) -> None:
    files: dict[str, tuple[bytes, list[Reader]]] = {
        "a.npy": (npy((4096, 4096), dtype="<f8"), [read_depth_array, read_edge_array]),
        "b.npy": (npy((10**9, 10**9)), [read_depth_array]),
        "a.png": (png_header(10_000, 10_000), [ids_40, read_grey, read_image, read_normals_png, image_size]),
        "b.png": (png_header(2**31 - 1, 2**31 - 1), [ids_40, read_grey, read_image, image_size]),
        "a.mat": (mat_file(compressed(mat_matrix(4, (30000, 30000), mat_element(1, b"")))), [read_label_map]),
        "b.mat": (mat_file(mat_matrix(9, (30000, 30000), NUMBERS)), [read_label_map, read_human_parts]),
    }
    for name, (contents, readers) in files.items():
        (tmp_path / name).write_bytes(contents)
        for reader in readers:
            tracemalloc.start()
            refuses(reader, tmp_path / name, "cannot be read")
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2_000_000, (name, peak)


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 1000)
    for name, (reader, _) in READERS.items():
        (tmp_path / name).write_bytes(bytes(1001))
        refuses(reader, tmp_path / name, "it has 1001 bytes, expected 1 to 1000")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones((2, 3)))

    def deny(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", deny)  # chmod does not stop root
    refuses(read_depth_array, path, r"cannot be read \(Permission denied\)")


# --------------------------------------------------------------------------------------------------------- resizing


def test_resizing_takes_the_nearest_pixel(tmp_path: Path) -> None:
    label = np.arange(12).reshape(2, 6)
    assert fitted(tmp_path, label, (2, 6)) is label
    # Rows floor(i * 2 / 1): 0; columns floor(i * 6 / 3): 0, 2, 4.
    np.testing.assert_array_equal(fitted(tmp_path, label, (1, 3)), [[0, 2, 4]])
    np.testing.assert_array_equal(fitted(tmp_path, label[:1, :2], (2, 4)), [[0, 0, 1, 1], [0, 0, 1, 1]])
    np.testing.assert_array_equal(fitted(tmp_path, label[:, :3], (2, 4)), [[0, 0, 1, 2], [6, 6, 7, 8]])  # one pixel off
    # OpenCV (4.14 and 5.0) takes 270 here, for its 1 / (515 / 1355) is a little less than 1355 / 515 = 271 / 103.
    wide = np.arange(1355)[None].repeat(1355, 0)
    assert fitted(tmp_path, wide, (515, 515))[0, 102:105].tolist() == [268, 270, 273]
    vectors = np.arange(24).reshape(2, 4, 3)
    np.testing.assert_array_equal(fitted(tmp_path, vectors, (1, 2)), vectors[:1, ::2])


@pytest.mark.parametrize("size", [(375, 500), (512, 512), (40, 30), (5000, 6660)])
def test_another_picture_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    label = np.zeros((500, 375) if size != (5000, 6660) else (500, 666), np.uint8)
    with pytest.raises(InputError, match="it labels another picture"):
        fitted(tmp_path / "a.png", label, size)
    assert fitted(tmp_path / "a.png", np.zeros((500, 375)), (498, 375)).shape == (498, 375)


def test_every_flipped_byte_of_a_png_is_noticed(tmp_path: Path) -> None:
    """Pillow decodes many damaged pngs into other pixels without a word; their checksums tell."""
    path = tmp_path / "mask.png"
    rng = np.random.default_rng(0)
    Image.fromarray(np.where(rng.random((24, 32)) < 0.5, 255, 0).astype(np.uint8)).save(path)
    intact = path.read_bytes()
    expected = read_grey(path)
    for place in range(8, len(intact) - 12):
        data = bytearray(intact)
        data[place] ^= 1
        path.write_bytes(data)
        try:
            found = read_grey(path)
        except InputError:
            continue
        np.testing.assert_array_equal(found, expected, err_msg=f"byte {place}")


def test_labels_of_another_coding_are_refused(tmp_path: Path) -> None:
    mask, normals = tmp_path / "mask.png", tmp_path / "normals.npy"
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(mask)
    with pytest.raises(InputError, match=r"expected values 0\.\.255, found 0 and 1"):
        read_grey(mask)
    vectors = np.random.default_rng(0).normal(size=(8, 8, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    for wrong in ((vectors + 1) / 2, 0.1 * vectors):
        np.save(normals, wrong.astype(np.float32))
        with pytest.raises(InputError, match=r"expected unit vectors, found .* of another length"):
            read_normals_array(normals)
    np.save(normals, vectors.astype(np.float32))
    np.testing.assert_allclose(read_normals_array(normals), vectors, atol=1e-6)
