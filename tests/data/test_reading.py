"""The readers of images, label pngs and npy arrays: conventions by hand, and what they refuse."""

import errno
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3vit.data import reading
from m3vit.data.reading import (
    fitted,
    image_size,
    read_depth_array,
    read_edge_array,
    read_grey,
    read_ids,
    read_image,
    read_normals_array,
    read_normals_png,
)
from m3vit.errors import InputError
from tests.data.damaging import GREY, Reader, ids_40, npy, refuses
from tests.data.layouts import coded, save_palette_png, unit_normals

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
    assert (read_image(tmp_path / "t.png") == 255).all()  # transparent: white paper, as predict shows it


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
    refuses(ids_40, tmp_path / "c.gif", "not a PNG picture")
    assert image_size(tmp_path / "c.gif") == (16, 16)  # a picture of any format that predict reads
    (tmp_path / "d.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    for reader in (read_image, image_size):
        refuses(reader, tmp_path / "d.jpg", "none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM")


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


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_what_is_not_the_files_fault_is_not_blamed_on_it(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, reading.naming(Path("whole.png")):
        raise error
    assert caught.value is error, "data.on_error skip would leave a whole file out"
