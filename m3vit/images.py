"""The one reader of images: training, evaluation, prediction, service and calibration see the same pixels. No torch.

docs/datasets.md lists what it decides about every odd kind of file. No header is believed, and nothing is guessed.
"""

import io
import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from m3vit.errors import InputError, one_line
from m3vit.files import not_there, open_regular
from m3vit.pointers import stands_for

logging.getLogger("PIL").addHandler(logging.NullHandler())  # or it comments on damaged files, on standard error

MAX_PIXELS = 1 << 26  # 67 megapixels; a float32 map of that size has 256 MiB
MAX_FILE_BYTES = 1 << 28
# Of a service's images: many at a time, from strangers. The widest prediction, normals in float32, then has 192 MiB.
WEB_BYTES, WEB_PIXELS = 20 << 20, 1 << 24
# Formats by pillow's name. Not all it knows: some start other programs (EPS), and each is code that strangers reach.
WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # JPEG: MPO too, with a second picture inside
FORMATS = (*WEB_FORMATS, "TIFF", "PPM")

_OPAQUE = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # 8 bits or fewer; pillow's conversions to RGB are the usual ones
_TRANSPARENT = ("LA", "La", "RGBA", "RGBa", "PA")
_ORIENTATION = 0x0112  # EXIF's tag: how the camera was held
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # height and width change places
_TIFF_BITS, _TIFF_KIND, _TIFF_TILE, _TIFF_DNG = 258, 254, (322, 323), 50706
_TIFF_REDUCED = 1  # a bit of the kind: a smaller copy of another picture in the file


class TooManyPixels(InputError):  # noqa: N818 (what it says, not that it is an error)
    """An image whose header claims more pixels than allowed; it was not decoded."""


class Unfit(ValueError):  # noqa: N818 (what it says, not that it is an error)
    """A whole image that is none for us. The words go on from its name: "has another colour space (LAB): ..."."""


class UnfitPixels(Unfit):
    """An image of a kind of pixel that is not taken."""


class UnfitSize(Unfit):
    """An image of no pixels or of too many."""


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image file as RGB uint8 [H, W, 3], or raise InputError naming it; `decode` says how."""
    # A file of more than the usual limit only where its pixels need it.
    limit = max(MAX_FILE_BYTES, 4 * max_pixels)
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > limit:
                raise InputError(f"{path} has {size} bytes: at most {limit} are allowed")
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} {not_there(path)}: give image files") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image: {error.strerror or error}") from error
    return decode_image(data, str(path), max_pixels)


def decode_image(
    source: BinaryIO | bytes, name: str, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> NDArray[np.uint8]:
    """Decode an image as `decode` does. Raises TooManyPixels, and InputError for all else; both name it `name`."""
    try:
        return decode(source if isinstance(source, bytes) else source.read(), max_pixels, formats)
    except UnfitSize as error:
        raise TooManyPixels(f"{name} {error}") from None
    except Unfit as error:
        raise InputError(f"{name} {error}") from None
    except MemoryError:
        raise InputError(f"{name} cannot be read as an image: memory does not suffice") from None
    # Not a list of types: on damaged files pillow and its decoders raise a dozen, which change between versions.
    except Exception as error:
        reason = one_line(error, 200)
        raise InputError(f"{name} cannot be read as an image: {reason}") from error


def decode(data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> NDArray[np.uint8]:
    """Return an image as RGB uint8 [H, W, 3], upright by its EXIF orientation; of several pictures the first.

    Transparent pixels are laid on white, as viewers show them; colour profiles are left out of account. Raises
    UnfitSize before anything of the image's size is allocated, Unfit for more than 8 bits a channel, colour spaces
    without a plain conversion, previews and formats that are not read, and whatever pillow raises for damaged data.
    """
    with _opened(data, formats) as image:
        _check_pixels(image, max_pixels)
        if (bits := _bits(image, data)) > 8 or image.mode.startswith(("I", "F")):
            found = f", found {bits}" if bits > 8 else ""
            raise UnfitPixels(f"has more than 8 bits a channel ({image.mode}): expected 8 bits{found}; convert it")
        if image.mode not in _OPAQUE + _TRANSPARENT:
            raise UnfitPixels(f"has another colour space ({image.mode}): give an 8-bit RGB or grey image")
        if image.format == "PNG":
            check_png(data)
        elif image.format == "TIFF":
            _check_tiff(image, data)
        image.load()  # before it is turned, which would hide where a truncated file ends
        rgb = _opaque(image)
        turn = _UPRIGHT.get(orientation(image))
        return np.array(rgb if turn is None else rgb.transpose(turn))


def header_size(file: BinaryIO, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return the height and width that `decode` gives, from an image's header alone wherever it tells.

    Raises as `decode` does; what comes after the header is not looked at.
    """
    with _opened(file, FORMATS) as image:
        _check_pixels(image, max_pixels)
        # pillow turns TIFFs as it loads them, and notes of a png may follow its pixels.
        if image.format == "TIFF" or (image.format == "PNG" and _notes_follow(file)):
            image.load()
        width, height = image.size
        return (width, height) if orientation(image) in _SIDEWAYS else (height, width)


def orientation(image: Image.Image) -> int:
    """Return how an image is to be turned, 1 (not at all) to 8, from its EXIF data or XMP as far as they are read.

    Damaged notes say nothing, as in every viewer.
    """
    try:
        # Not pillow's own for png, which decodes the pixels to look behind them.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # of a dozen kinds
        return 1
    return value if value in _UPRIGHT else 1


def check_png(data: bytes) -> None:
    """Raise ValueError if a chunk of a png is damaged: pillow decodes flipped bits without a word."""
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise ValueError(f"a part of it ({kind.decode('latin-1')!r}) does not match its checksum")
        if kind == b"IEND":
            return
        at = end
    raise ValueError("it is truncated: it ends before its last part")


def png_bits(data: bytes) -> int:
    """Return the bits a channel of a png, which pillow widens and narrows to 8 without a word."""
    return data[24] if data[12:16] == b"IHDR" else 8


# --------------------------------------------------------------------------------------------------------- details


def _opened(source: BinaryIO | bytes, formats: tuple[str, ...]) -> Image.Image:
    """Open an image of which only the header is read, or raise Unfit."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if foreign := foreign_kind(head):
        raise Unfit(foreign.advice)
    try:
        return Image.open(file, formats=formats)
    except UnidentifiedImageError:
        kinds = ", ".join(formats)
        raise Unfit(f"cannot be read as an image: damaged from the start, or none of {kinds}") from None
    except Image.DecompressionBombError:  # pillow's own limit, 178,956,970, comes before ours can
        raise UnfitSize("has more pixels than pillow opens: shrink it") from None


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise UnfitSize(f"has {height}x{width} pixels: at most {max_pixels} are allowed; shrink it")
    if width < 1 or height < 1:
        raise UnfitSize(f"has {height}x{width} pixels: give an image with at least one")


def _bits(image: Image.Image, data: bytes) -> int:
    """Return the bits a channel in the file; 8 where pillow could not have narrowed them."""
    if image.format == "PNG":
        return png_bits(data)
    if image.format == "TIFF":
        bits = _tags(image).get(_TIFF_BITS, (8,))
        return int(max(bits)) if isinstance(bits, tuple) else int(bits)
    if image.format == "PPM":
        arguments: Any = image.tile[0][3]  # type: ignore[attr-defined]
        return 16 if isinstance(arguments, tuple) and arguments[-1] > 255 else 8
    return 8


def _tags(image: Image.Image) -> Any:
    return image.tag_v2  # type: ignore[attr-defined]


def _check_tiff(image: Image.Image, data: bytes) -> None:
    """Refuse a camera's raw file, whose first picture is a preview, and tiles beyond the image."""
    tags = _tags(image)
    if tags.get(_TIFF_KIND, 0) & _TIFF_REDUCED or _TIFF_DNG in tags or data[8:10] == b"CR":
        raise Unfit(_not_read("camera raw"))
    tile = [int(tags.get(tag, 1)) for tag in _TIFF_TILE]
    if tile[0] * tile[1] > (image.width + 4096) * (image.height + 4096):
        raise Unfit(f"has tiles of {tile[1]}x{tile[0]} pixels, more than the image itself: save it again")


def _opaque(image: Image.Image) -> Image.Image:
    """Return an image as RGB, on white where it is transparent."""
    if image.mode not in _TRANSPARENT and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    paper = Image.new("RGB", image.size, (255, 255, 255))
    paper.paste(rgba, mask=rgba.getchannel("A"))
    return paper


def _notes_follow(file: BinaryIO) -> bool:
    """Return whether a png has chunks behind its pixels that may say how it is to be turned."""
    place, pixels, at = file.tell(), False, 8
    try:
        while True:
            file.seek(at)
            chunk = file.read(8)
            if len(chunk) < 8:
                return False
            length, kind = struct.unpack(">I4s", chunk)
            pixels |= kind == b"IDAT"
            if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            at += 12 + length
    finally:
        file.seek(place)


# ------------------------------------------------------------------------------------------- kinds that are not read

HEAD_BYTES = 4096  # that tell a kind
POINTER = "pointer"  # the kind of a file that stands for a picture


class Foreign(NamedTuple):
    """A kind of file that holds a picture or stands for one, and is not read; the advice goes on from its name."""

    kind: str
    advice: str


_CONVERTERS = {
    "HEIC": "heif-convert IN OUT.jpg, sips -s format jpeg IN --out OUT.jpg on a Mac, or magick IN OUT.jpg",
    "AVIF": "avifdec IN OUT.png, or magick IN OUT.png",
    "JPEG XL": "djxl IN OUT.png",
    "camera raw": "dcraw -c -w IN > OUT.ppm, or darktable-cli IN OUT.png",
    "SVG": "rsvg-convert IN -o OUT.png",
}
# Of ISO base media files (mp4 and its kin), by the brands they name: pictures, not films.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
    **dict.fromkeys((b"mif1", b"mif2", b"msf1", b"miaf"), "HEIC"),  # last: AVIFs name them too
    b"crx ": "camera raw",
}
_STARTS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS": "PSD",
    b"gimp xcf": "XCF",
    b"v/1\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"qoif": "QOI",
    b"DDS ": "DDS",
    b"icns": "ICNS",
    b"\0\0\1\0": "ICO",
    b"FUJIFILMCCD-RAW": "camera raw",
    b"IIU\0": "camera raw",
    b"IIRO": "camera raw",
    b"IIRS": "camera raw",
    b"MMOR": "camera raw",
}


def pointer(head: bytes) -> Foreign | None:
    """Return what to do about a file that begins so, if it stands in place of one that is to be fetched."""
    words = stands_for(head)
    return Foreign(POINTER, f"is {words}") if words else None


def foreign_kind(head: bytes) -> Foreign | None:
    """Return which kind of file that is not read begins so (`HEAD_BYTES` suffice), or None: read, or no picture."""
    if found := pointer(head):
        return found
    kind = next((kind for start, kind in _STARTS.items() if head.startswith(start)), None)
    if head[4:8] == b"ftyp":
        brands = [head[at : at + 4] for at in (8, *range(16, min(len(head), int.from_bytes(head[:4], "big")), 4))]
        if brands[0] in _BRANDS:  # a film may name them among its compatible ones
            kind = next(name for brand, name in _BRANDS.items() if brand in brands)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith((b"<svg", b"<?xml", b"<!DOCTYPE svg")) and b"<svg" in text:
        kind = "SVG"
    return Foreign(kind, _not_read(kind)) if kind else None


def _not_read(kind: str) -> str:
    how = _CONVERTERS.get(kind, "magick IN OUT.png (ImageMagick)")
    return f"is a picture in the format {kind}, which is not read: convert it, for example with {how}"
