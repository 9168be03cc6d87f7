"""Images of strangers, decoded with limits: no header is believed, and nothing is guessed about odd formats."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from m3vit.errors import InputError

MAX_PIXELS = 1 << 26  # 67 megapixels; a float32 map of that size has 256 MiB
# Of a service's images: many at a time, from strangers. The widest prediction, normals in float32, then has 192 MiB.
WEB_BYTES, WEB_PIXELS = 20 << 20, 1 << 24
# Formats by pillow's name. Not all it knows: some start other programs (EPS), and each is code that strangers reach.
WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # JPEG: MPO too, with a second picture inside
FORMATS = (*WEB_FORMATS, "TIFF", "PPM")
_OPAQUE = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # 8 bits or fewer; pillow's conversions to RGB are the usual ones
_TRANSPARENT = ("LA", "La", "RGBA", "RGBa", "PA")


class TooManyPixels(InputError):  # noqa: N818 (what it says, not that it is an error)
    """An image whose header claims more pixels than allowed; it was not decoded."""


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read an image file as RGB uint8 [H, W, 3], or raise InputError naming it; `decode_image` says how."""
    try:
        with open(path, "rb") as file:
            return decode_image(file, str(path), max_pixels)
    except FileNotFoundError:
        raise InputError(f"{path} not found: give image files") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read as an image: {error.strerror or error}") from error


def decode_image(
    source: BinaryIO | bytes, name: str, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> NDArray[np.uint8]:
    """Decode an image as RGB uint8 [H, W, 3], upright; of an animation its first picture.

    Transparent pixels are laid on white, as viewers show them. Raises TooManyPixels, before anything of the image's
    size is allocated, and InputError for damaged or empty data, another format, more than 8 bits a channel of grey,
    and colour spaces that have no plain conversion; both name the image `name`.
    """
    with _one_line(name, formats):
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise TooManyPixels(f"{name} has {height}x{width} pixels: at most {max_pixels} are allowed; shrink it")
            if width < 1 or height < 1:
                raise InputError(f"{name} has {height}x{width} pixels: give an image with at least one")
            if image.mode not in _OPAQUE + _TRANSPARENT:
                deep = "more than 8 bits a channel" if image.mode.startswith(("I", "F")) else "another colour space"
                raise InputError(f"{name} has {deep} ({image.mode}): give an 8-bit RGB or grey image")
            image.load()  # before the transposition, which would hide where a truncated file ends
            upright: Any = ImageOps.exif_transpose(image)  # cameras note which way they were held
            return np.asarray(_opaque(upright))


def _opaque(image: Image.Image) -> Image.Image:
    """Return an image as RGB, on white where it is transparent."""
    if image.mode not in _TRANSPARENT and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    paper = Image.new("RGB", image.size, (255, 255, 255))
    paper.paste(rgba, mask=rgba.getchannel("A"))
    return paper


@contextmanager
def _one_line(name: str, formats: tuple[str, ...]) -> Iterator[None]:
    """Turn whatever decoding raises into one InputError that names the image."""
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError:
        kinds = ", ".join(formats)
        raise InputError(f"{name} cannot be read as an image: damaged from the start, or none of {kinds}") from None
    except Image.DecompressionBombError:  # pillow's own limit, 178,956,970, comes before ours can
        raise TooManyPixels(f"{name} has more pixels than pillow opens: shrink it") from None
    except MemoryError:
        raise InputError(f"{name} cannot be read as an image: memory does not suffice") from None
    # Not a list of types: on damaged files pillow and its decoders raise a dozen, which change between versions.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name} cannot be read as an image: {reason}") from error
