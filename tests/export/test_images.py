"""Images of strangers: what is read, and what is refused before memory is taken for it."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from m3vit.errors import InputError
from m3vit.images import WEB_FORMATS, TooManyPixels, decode_image, read_image


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A png that claims a size and holds nothing of it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_come_back_as_they_were(kind: str) -> None:
    image = noise(5, 7)
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(image), kind, **options), "x"), image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_modes_become_rgb(mode: str) -> None:
    picture = Image.fromarray(np.full((4, 6, 3), 255, np.uint8)).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    data = encoded(picture, kind)
    decoded = decode_image(data, "x")
    assert decoded.shape == (4, 6, 3) and decoded.dtype == np.uint8 and (decoded >= 254).all()


def test_transparent_pixels_are_white() -> None:
    image = np.zeros((1, 3, 4), np.uint8)
    image[0, :, 0], image[0, :, 3] = 200, (0, 255, 51)  # alpha 0, 1 and 0.2
    decoded = decode_image(encoded(Image.fromarray(image)), "x")
    assert decoded.tolist() == [[[255, 255, 255], [200, 0, 0], [244, 204, 204]]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    decoded = decode_image(encoded(palette, transparency=0), "x")
    assert decoded.tolist() == [[[255, 255, 255], [50, 60, 70]]]


def test_images_are_upright_and_animations_their_first_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to view
    image = noise(4, 6)
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), np.rot90(image, -1))
    black, white = (Image.new("L", (4, 4), value) for value in (0, 255))
    black.save(tmp_path / "two.gif", save_all=True, append_images=[white])
    assert not read_image(tmp_path / "two.gif").any()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "or none of JPEG"),
    "text": (lambda: b"hello", "or none of JPEG"),
    "torn": (
        lambda: encoded(Image.fromarray(noise(40, 40)), "JPEG")[:-100],
        "x cannot be read as an image: .*truncated",
    ),
    "16 bits": (lambda: encoded(Image.fromarray(np.zeros((4, 4), np.uint16))), r"more than 8 bits a channel \(I;16"),
    "float": (lambda: encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), r"more than 8 bits .*\(F\)"),
    "lab": (lambda: encoded(Image.new("LAB", (4, 4)), "TIFF"), r"another colour space \(LAB\)"),
    "no pixels": (lambda: png_header(0, 10), "x "),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "or none of JPEG"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_line(case: str) -> None:
    make, match = REFUSED[case]
    with pytest.raises(InputError, match=match) as caught:
        decode_image(make(), "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(10_000, 10_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_absurd_sizes_are_refused_before_memory_is_taken(size: tuple[int, int]) -> None:
    tracemalloc.start()
    with pytest.raises(TooManyPixels, match="x has"):
        decode_image(png_header(*size), "x", 1 << 24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_limit_is_exact() -> None:
    data = encoded(Image.fromarray(noise(10, 10)))
    assert decode_image(data, "x", 100).shape == (10, 10, 3)
    with pytest.raises(TooManyPixels, match="x has 10x10 pixels: at most 99 are allowed"):
        decode_image(data, "x", 99)


def test_the_service_takes_fewer_formats() -> None:
    data = encoded(Image.fromarray(noise(4, 4)), "TIFF")
    with pytest.raises(InputError, match="or none of"):
        decode_image(data, "x", formats=WEB_FORMATS)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.png not found"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="cannot be read as an image: Is a directory"):
        read_image(tmp_path)


GOOD = [encoded(Image.fromarray(noise(9, 11)), kind) for kind in WEB_FORMATS]
CHANGES = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8)


@given(
    st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8), st.integers(0)
)
def test_damaged_bytes_give_an_image_or_an_input_error(good: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(good)
    for place, value in changes:
        data[place % len(data)] = value
    try:
        decoded = decode_image(bytes(data[: len(data) - cut % len(data)]), "x", 1 << 16)
    except InputError:
        return
    assert decoded.dtype == np.uint8 and decoded.ndim == 3 and decoded.size
