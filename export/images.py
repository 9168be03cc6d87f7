"""The reader of images that prediction and service share with training: see m3vit.images, whose names these are."""

from m3vit.images import (
    FORMATS,
    MAX_PIXELS,
    WEB_BYTES,
    WEB_FORMATS,
    WEB_PIXELS,
    TooManyPixels,
    decode_image,
    read_image,
)

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "WEB_BYTES",
    "WEB_FORMATS",
    "WEB_PIXELS",
    "TooManyPixels",
    "decode_image",
    "read_image",
]
