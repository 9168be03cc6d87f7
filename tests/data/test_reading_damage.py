"""Damaged files of every kind: cut, empty, flipped, fuzzed; headers that lie; memory."""

import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from m3vit.data import reading
from m3vit.data.pascal_context import read_human_parts, read_label_map
from m3vit.data.reading import (
    image_size,
    read_depth_array,
    read_edge_array,
    read_grey,
    read_image,
    read_normals_array,
    read_normals_png,
)
from m3vit.errors import InputError
from tests.data.damaging import (
    GREY,
    NUMBERS,
    Reader,
    compressed,
    ids_40,
    mat_element,
    mat_file,
    mat_matrix,
    npy,
    refuses,
)
from tests.data.layouts import save_anno, save_label_map, save_palette_png, unit_normals

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

    monkeypatch.setattr(os, "open", deny)  # chmod does not stop root
    refuses(read_depth_array, path, r"cannot be read \(Permission denied\)")


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
