"""The reader of MATLAB files: against scipy, by hand, and what it refuses."""

import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io

from m3vit.data import matlab
from m3vit.data.matlab import mat_names, read_mat
from m3vit.data.pascal_context import read_label_map
from tests.data.damaging import NUMBERS, STRUCT, compressed, mat_element, mat_file, mat_matrix, refuses
from tests.data.layouts import save_anno, save_label_map


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


def test_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    # uint16 2 × 3 column by column, stored as the smallest type that holds them, as MATLAB does: uint8
    body = mat_matrix(11, (2, 3), mat_element(2, bytes([1, 2, 3, 4, 5, 6]), ">"), ">")
    path.write_bytes(mat_file(body, order=">"))
    np.testing.assert_array_equal(scipy.io.loadmat(path)["LabelMap"], [[1, 3, 5], [2, 4, 6]])
    found = read_mat(path, "LabelMap")
    assert found.dtype == np.uint16 and found.tolist() == [[1, 3, 5], [2, 4, 6]]


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
    monkeypatch.setattr(matlab, "MAX_MAT_BYTES", 10_000)
    path = tmp_path / "a.mat"
    path.write_bytes(mat_file(compressed(mat_matrix(9, (3000, 3000), mat_element(2, bytes(9_000_000))))))
    refuses(read_label_map, path, "holds more than 10000 bytes")
    small = compressed(mat_matrix(9, (60, 60), mat_element(2, bytes(3600)))).replace(b"LabelMap", b"labelmap")
    path.write_bytes(mat_file(*[compressed(mat_element(14, bytes(4000)))] * 4, small))
    refuses(read_label_map, path, "cannot be read")


def zeros(kind: int, count: int, dims: tuple[int, ...] | None = None) -> bytes:
    """A compressed LabelMap of `count` zeros in single bytes."""
    return compressed(mat_matrix(kind, dims or (count, 1), mat_element(2, bytes(count))))


def structure(count: int, field: bytes) -> bytes:
    """A compressed structure of `count` elements with one field."""
    return compressed(mat_matrix(2, (count, 1), STRUCT + field * count))


EMPTY = mat_element(14, b"")
MAT_BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "numbers": (lambda: zeros(6, (1 << 24) + 1), "has more than 16777216 numbers"),
    "claimed numbers": (lambda: zeros(6, 8, (1 << 30, 1 << 30)), "has more than 16777216 numbers"),
    "more than its dimensions": (lambda: zeros(9, 1 << 23, (10, 10)), "LabelMap holds more than"),
    "empty structures": (lambda: structure(1 << 20, EMPTY), "holds more than 65536 values"),
    "a mask in a structure": (
        lambda: structure(1, mat_matrix(9, ((1 << 24) + 1, 1), mat_element(2, bytes((1 << 24) + 1)))),
        "has more than 16777216 numbers",
    ),
    "many masks in a structure": (
        lambda: compressed(struct.pack("<II", 14, 1 << 29) + mat_matrix(2, (20, 1), STRUCT)[8:]),
        "LabelMap holds more than 268435456 bytes",
    ),
    "field names": (
        lambda: compressed(mat_matrix(2, (1, 1), mat_element(5, b"\1\0\0\0") + mat_element(1, b"a" * (1 << 23)))),
        "holds more than 65536 values",
    ),
    "text": (lambda: compressed(mat_matrix(4, (1 << 23, 1), mat_element(16, b"a" * (1 << 23)))), "as long a text"),
    "dimensions": (lambda: compressed(mat_matrix(9, (1,) * 100_000, NUMBERS)), "cannot be read"),
    "no matrix": (lambda: compressed(mat_element(2, bytes(1 << 26))), "expected a matrix"),
}


@pytest.mark.parametrize("name", MAT_BOMBS)
def test_small_files_do_not_take_large_memories(tmp_path: Path, name: str) -> None:
    make, words = MAT_BOMBS[name]
    path = tmp_path / "a.mat"
    path.write_bytes(mat_file(make()))
    tracemalloc.start()
    refuses(read_label_map, path, words)
    peak = tracemalloc.get_traced_memory()[1] - path.stat().st_size
    tracemalloc.stop()
    assert peak < 100 << 20, f"{peak >> 20} MiB"


def test_a_file_of_countless_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matlab, "MAX_MAT_ITEMS", 50)
    (tmp_path / "a.mat").write_bytes(mat_file(mat_matrix(9, (0, 0), b"").replace(b"LabelMap", b"labelmap") * 51))
    refuses(read_label_map, tmp_path / "a.mat", "it holds more than 50 variables")


def test_the_largest_map_takes_little_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(mat_file(zeros(6, 1 << 24, (4096, 4096))))  # 16 MiB of bytes, as doubles 128 MiB
    tracemalloc.start()
    assert not read_label_map(path).any()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20, f"{peak >> 20} MiB"


def test_what_is_not_asked_for_is_not_decompressed(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    other = compressed(mat_matrix(6, (1 << 26, 1), mat_element(2, bytes(1 << 26))).replace(b"LabelMap", b"Pictures"))
    path.write_bytes(mat_file(other, compressed(mat_matrix(9, (2, 3), NUMBERS))))
    tracemalloc.start()
    assert read_label_map(path).shape == (2, 3) and mat_names(path) == ["Pictures", "LabelMap"]
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["u1", "u2", "i4", "f4", "f8"])
def test_as_stored(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.mat"
    numbers = np.arange(12).reshape(3, 4).astype(kind)
    scipy.io.savemat(path, {"LabelMap": numbers}, do_compression=True)
    np.testing.assert_array_equal(read_mat(path, "LabelMap", as_stored=True), numbers)
    path.write_bytes(mat_file(mat_matrix(6, (2, 3), NUMBERS)))  # doubles in bytes
    assert read_mat(path, "LabelMap", as_stored=True).dtype == np.uint8
    assert read_mat(path, "LabelMap").dtype == np.float64


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


def test_it_is_among_the_readers() -> None:
    from m3vit.data import reading

    assert reading.read_mat is read_mat and not hasattr(reading, "read_math")
