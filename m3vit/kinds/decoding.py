"""What logits mean: from a network's outputs to predictions. numpy alone, nothing of m3vit: a board has a copy of this.

Shapes: B images, C channels, H x W pixels, T tokens, s outputs a token and side.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def argmax(logits: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return class ids [B, H, W]."""
    return logits.argmax(axis=1).astype(np.uint8)


def identity(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the value itself [B, H, W]."""
    return logits[:, 0]


def unit_vector(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return vectors of length 1 [B, H, W, 3]."""
    return unit(logits.transpose(0, 2, 3, 1))


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return probabilities 0..1 [B, H, W]."""
    # exp of a negative number only: no overflow.
    small = np.exp(-np.abs(logits[:, 0]))
    return np.where(logits[:, 0] >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


# What a board's host driver can decode, by kind (m3vit.kinds).
DECODINGS: dict[str, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "argmax": argmax,
    "identity": identity,
    "unit_vector": unit_vector,
    "sigmoid": sigmoid,
}


def decode(logits: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Turn logits [B, C, H, W] into predictions [B, H, W] or, for unit_vector, [B, H, W, 3].

    Raises ValueError for a kind that was added to m3vit from outside.
    """
    if kind not in DECODINGS:
        raise ValueError(f"{kind} is decoded by what added it to m3vit, not here: take what run() returns")
    return DECODINGS[kind](logits)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale vectors [..., 3] to length 1; a zero vector stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, np.float32(1e-12)), dtype=np.float32)


def _axis(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return the two neighbours of each of `target` pixel centres among `source` ones, and the second's share."""
    place = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    first = np.minimum(place.astype(np.int64), source - 1)
    return first, np.minimum(first + 1, source - 1), (place - first).astype(np.float32)


def resize_bilinear(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return values [..., h, w] resized to [..., *size], as torch does (bilinear, corners not aligned)."""
    top, bottom, down = _axis(values.shape[-2], size[0])
    left, right, across = _axis(values.shape[-1], size[1])
    rows = values[..., top, :] * (1 - down[:, None]) + values[..., bottom, :] * down[:, None]
    return np.asarray(rows[..., left] * (1 - across) + rows[..., right] * across, dtype=np.float32)


def assemble(
    outputs: NDArray[np.float32], grid: tuple[int, int], upscale: int, size: tuple[int, int], pixels_first: bool = False
) -> NDArray[np.float32]:
    """Lay a head's outputs [T, C s^2] of each token out as logits [C, *size] (pixel shuffle, bilinear).

    pixels_first: a token's outputs are ordered [s, s, C], else [C, s, s].
    """
    rows, columns = grid
    if pixels_first:
        parts = outputs.reshape(rows, columns, upscale, upscale, -1).transpose(4, 0, 2, 1, 3)
    else:
        parts = outputs.reshape(rows, columns, -1, upscale, upscale).transpose(2, 0, 3, 1, 4)
    return resize_bilinear(parts.reshape(-1, rows * upscale, columns * upscale), size)
