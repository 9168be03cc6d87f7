"""One reader of images: training and prediction see the same pixels of every odd file, or refuse it alike."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from m3vit.data import reading
from m3vit.data.nyud import NYUD
from m3vit.errors import InputError
from m3vit.images import MAX_PIXELS, WEB_FORMATS, decode_image
from m3vit.images import read_image as predicting
from tests.data.damaging import refuses
from tests.data.layouts import coded, unit_normals

RGB = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
# Written out by hand from the EXIF standard (tag 274): where the first stored row and column lie when viewed.
UPRIGHT: dict[int, Callable[[NDArray], NDArray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],  # row at the top, column at the right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda a: a.swapaxes(0, 1)[::-1],  # left, bottom
}


def exif(turn: int) -> Image.Exif:
    notes = Image.Exif()
    notes[0x0112] = turn
    return notes


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *notes: bytes) -> bytes:
    """A png of a depth that pillow does not write."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *notes, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def xmp_png(turn: int) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", f'<x:xmpmeta tiff:Orientation="{turn}"/>')
    return encoded(Image.fromarray(RGB), pnginfo=notes)


def late_exif_png(turn: int) -> bytes:
    """A png whose EXIF data follow its pixels, as the standard allows."""
    plain = encoded(Image.fromarray(RGB))
    return plain[:-12] + chunk(b"eXIf", exif(turn).tobytes()[6:]) + plain[-12:]


PICTURE = Image.fromarray(RGB)
WORDS = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0six\0\0\0\0\0"  # one entry: tag 274, text
ALPHA = Image.fromarray(np.dstack([RGB, np.arange(60, dtype=np.uint8).reshape(6, 10) * 4]))
PALETTE = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
GREY = PICTURE.convert("L")
# Name -> bytes, and what becomes of them: the picture as pillow converts it, or words of the refusal.
ODD: dict[str, tuple[bytes, Image.Image | NDArray | str | None]] = {
    "grey": (encoded(GREY), GREY),
    "grey with alpha": (encoded(ALPHA.convert("LA")), None),
    "alpha": (encoded(ALPHA), None),
    "premultiplied alpha": (encoded(ALPHA, "TIFF"), None),
    "palette": (encoded(PALETTE), PALETTE),
    "palette, one colour clear": (encoded(PALETTE, transparency=0), None),
    "palette, all colours half clear": (encoded(PALETTE, transparency=bytes([128] * 16)), None),
    "colour key": (encoded(PICTURE, transparency=tuple(int(value) for value in RGB[0, 0])), None),
    "grey key": (encoded(GREY, transparency=int(np.asarray(GREY)[0, 0])), None),
    "1 bit": (encoded(PICTURE.convert("1")), PICTURE.convert("1")),
    "1 bit with a key": (png(8, 1, 1, 0, b"\0\xf0", chunk(b"tRNS", b"\0\0")), np.full((1, 8, 3), 255, np.uint8)),
    "2 bits of grey": (png(4, 1, 2, 0, b"\0\x1b"), np.array([0, 85, 170, 255], np.uint8)[None, :, None].repeat(3, 2)),
    "16 bits of grey": (encoded(Image.fromarray(RGB[..., 0].astype(np.uint16) * 256)), "more than 8 bits"),
    "16 bits of colour": (png(2, 1, 16, 2, bytes(13)), "more than 8 bits a channel .* found 16"),
    "16 bits and alpha": (png(2, 1, 16, 6, bytes(17)), "more than 8 bits"),
    "16 bits, grey and alpha": (png(2, 1, 16, 4, bytes(9)), "more than 8 bits"),
    "16-bit ppm": (b"P6 2 1 65535\n" + bytes(12), "more than 8 bits"),
    "10-bit ppm": (b"P6 2 1 1023\n" + bytes(12), "more than 8 bits"),
    "16-bit pgm": (b"P5 2 1 65535\n" + bytes(4), "more than 8 bits"),
    "7-bit ppm": (b"P6 1 1 127\n" + bytes([127, 0, 127]), np.array([[[255, 0, 255]]], np.uint8)),
    "float tiff": (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "more than 8 bits"),
    "whole numbers of 32 bits": (encoded(Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF"), "more than 8 bits"),
    "lab": (encoded(Image.new("LAB", (4, 4)), "TIFF"), "another colour space"),
    "cmyk jpg": (encoded(PICTURE.convert("CMYK"), "JPEG"), None),
    "cmyk tiff": (encoded(PICTURE.convert("CMYK"), "TIFF"), PICTURE.convert("CMYK")),
    "ycbcr tiff": (encoded(PICTURE.convert("YCbCr"), "TIFF"), PICTURE.convert("YCbCr")),
    "bmp": (encoded(PICTURE, "BMP"), RGB),
    "webp": (encoded(PICTURE, "WEBP", lossless=True), RGB),
    "gif": (encoded(PALETTE, "GIF"), PALETTE),
    "animation": (encoded(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[ALPHA.convert("RGB")]), RGB),
    "apng": (encoded(PICTURE, save_all=True, append_images=[Image.new("RGB", (10, 6))]), RGB),
    "pages": (encoded(PICTURE, "TIFF", save_all=True, append_images=[Image.new("RGB", (3, 4))]), RGB),
    "two pictures": (encoded(PICTURE, "MPO", save_all=True, append_images=[Image.new("RGB", (10, 6))]), None),
    "profile": (encoded(PICTURE, icc_profile=b"not looked at"), RGB),
    "gamma": (png(1, 1, 8, 2, b"\0\1\2\3", chunk(b"gAMA", struct.pack(">I", 100_000))), np.array([[[1, 2, 3]]])),
    "exif that is none": (encoded(PICTURE, "WEBP", lossless=True, exif=b"Exif\0\0nonsense"), RGB),
    "orientation 0": (encoded(PICTURE, exif=exif(0)), RGB),
    "orientation 9": (encoded(PICTURE, exif=exif(9)), RGB),
    "orientation in words": (encoded(PICTURE, exif=WORDS), RGB),
    "xmp orientation": (xmp_png(6), UPRIGHT[6](RGB)),
    "late exif": (late_exif_png(8), UPRIGHT[8](RGB)),
    "turned and clear": (encoded(ALPHA, exif=exif(5)), None),
    "a raw file's preview": (encoded(PICTURE, "TIFF", tiffinfo={254: 1}), "format camera raw"),
    "dng": (encoded(PICTURE, "TIFF", tiffinfo={50706: b"\1\4\0\0"}), "format camera raw"),
    "truncated jpg": (encoded(PICTURE, "JPEG")[:-60], "truncated"),
    "truncated png": (encoded(PICTURE)[:-30], "truncated|checksum"),
    "png without its end": (encoded(PICTURE)[:-12], "truncated"),
    "png with a flipped bit": (damaged(encoded(PICTURE), 60), "does not match its checksum"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "format HEIC, which is not read: convert it.*heif-convert"),
    "heic by its kin": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "format HEIC"),
    "avif": (b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf", "format AVIF"),
    "avif by its kin": (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "format AVIF"),
    "jpeg xl": (b"\xff\x0a" + bytes(20), "format JPEG XL"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS.*git lfs pull"),
    "svg": (b"<?xml version='1.0'?>\n<svg/>", "format SVG"),
    "text": (b"hello", "none of JPEG"),
    "too many pixels": (png(9000, 9000, 8, 2, b""), "has 9000x9000 pixels"),
    "no pixels": (png(0, 9, 8, 2, b""), "."),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore::UserWarning")  # pillow's, of damaged notes
def test_odd_files_are_the_same_to_all(tmp_path: Path, name: str) -> None:
    data, expected = ODD[name]
    path = tmp_path / "0001.jpg"
    path.write_bytes(data)
    if isinstance(expected, str):
        words = []
        for reader in (reading.read_image, predicting):
            refuses(reader, path, expected)
            with pytest.raises(InputError) as caught:
                reader(path)
            words.append(str(caught.value))
        with pytest.raises(InputError, match=f"{expected}|none of JPEG, PNG, WEBP, GIF, BMP$"):
            decode_image(data, "the image", formats=WEB_FORMATS)
        core = (
            words[1].removeprefix(str(path)).removeprefix(" cannot be read as an image:").strip().split(" at most")[0]
        )
        assert core in words[0], f"one reason for both: {words}"
        return
    trained, predicted = reading.read_image(path), predicting(path)
    np.testing.assert_array_equal(trained, predicted)
    assert trained.dtype == np.uint8 and trained.flags.writeable and trained.flags.c_contiguous
    assert reading.image_size(path) == trained.shape[:2]
    if expected is not None:
        wanted = expected if isinstance(expected, np.ndarray) else np.asarray(expected.convert("RGB"))
        np.testing.assert_array_equal(trained, wanted)
    if data[:2] not in (b"II", b"MM", b"P6"):  # formats that the service does not take
        np.testing.assert_array_equal(decode_image(data, "x", formats=WEB_FORMATS), trained)


@pytest.mark.parametrize("turn", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "late png"])
def test_every_orientation_of_every_format(tmp_path: Path, kind: str, turn: int) -> None:
    path = tmp_path / "0001.jpg"
    options: dict[str, Any] = {"exif": exif(turn), **({"lossless": True} if kind == "WEBP" else {})}
    path.write_bytes(late_exif_png(turn) if kind == "late png" else encoded(PICTURE, kind, **options))
    stored = np.asarray(Image.open(io.BytesIO(encoded(PICTURE, "JPEG")))) if kind == "JPEG" else RGB
    for reader in (reading.read_image, predicting):
        np.testing.assert_array_equal(reader(path), UPRIGHT[turn](stored))
    assert reading.image_size(path) == UPRIGHT[turn](stored).shape[:2]


@pytest.mark.parametrize("options", [{}, {"quality": 97, "subsampling": 0}, {"progressive": True}, {"quality": 30}])
def test_plain_jpgs_are_read_as_pillow_reads_them(tmp_path: Path, options: dict[str, Any]) -> None:
    for picture in (PICTURE, GREY):
        picture.resize((64, 48)).save(tmp_path / "a.jpg", **options)
        expected = np.array(Image.open(tmp_path / "a.jpg").convert("RGB"))
        np.testing.assert_array_equal(reading.read_image(tmp_path / "a.jpg"), expected)


def test_labels_fit_the_upright_picture(make_data: Callable[..., Path], tmp_path: Path) -> None:
    """A photo that was held sideways is trained on as it is viewed, and its labels must be stored so."""
    root = make_data(tmp_path / "data", train=2, val=1)
    image = root / "images" / "0000.jpg"
    pixels = np.asarray(Image.open(image))
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(image, quality=97, exif=exif(6))
    sample = NYUD(root, "train").load(0)
    assert sample.image.shape == pixels.shape and abs(sample.image.astype(int) - pixels).mean() < 4
    assert NYUD(root, "train").edge_truth(0).shape == pixels.shape[:2]  # by the header alone
    Image.fromarray(pixels).save(image, exif=exif(6))
    with pytest.raises(InputError, match=r"its image \(48, 32\)"):
        NYUD(root, "train").load(0)


@pytest.mark.parametrize("turn", range(2, 9))
def test_labels_are_never_turned(tmp_path: Path, turn: int) -> None:
    path = tmp_path / "a.png"
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(ids).save(path, exif=exif(turn))
    for reader in (reading.read_grey, lambda p: reading.read_ids(p, 40)):
        refuses(reader, path, f"expected a label stored upright, found EXIF orientation {turn}")
    Image.fromarray(coded(unit_normals(np.random.default_rng(0), (3, 4)))).save(path, exif=exif(turn))
    refuses(reading.read_normals_png, path, "stored upright")
    Image.fromarray(ids).save(path, exif=exif(1))
    np.testing.assert_array_equal(reading.read_ids(path, 40), ids)


def test_limits_have_the_same_words(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (4097, 4096)).save(path)
    refuses(reading.read_image, path, f"has 4096x4097 pixels: at most {reading.MAX_PIXELS} are allowed")
    with pytest.raises(InputError, match=f"has 4096x4097 pixels: at most {reading.MAX_PIXELS} are allowed"):
        predicting(path, reading.MAX_PIXELS)
    assert predicting(path).shape == (4096, 4097, 3) and reading.MAX_PIXELS < MAX_PIXELS


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "gone.jpg").symlink_to(".git/annex/objects/xx/yy/key/key")
    for name, words in (("pipe", "it is a pipe"), ("device", "it is a device"), ("gone", "which is not there .*annex")):
        for reader in (reading.read_image, reading.image_size, predicting, reading.read_depth_array):
            refuses(reader, tmp_path / f"{name}.jpg", words)
