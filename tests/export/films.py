"""Short videos and streams, made with PyAV or by hand."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

RATE = Fraction(30000, 1001)


def pictures(count: int, height: int = 24, width: int = 32) -> list[NDArray[np.uint8]]:
    """A red bar that grows over a grey ground: [H, W, 3] each."""
    made = []
    for index in range(count):
        picture = np.full((height, width, 3), 90, np.uint8)
        picture[:, : 2 + index % width] = (200, 30, 30)
        made.append(picture)
    return made


def write_film(
    path: Path,
    frames: Sequence[NDArray[np.uint8]],
    *,
    codec: str = "libx264",
    container: str | None = None,
    rate: Fraction = RATE,
    times: Sequence[int] | None = None,
) -> Path:
    """Write a film; `times` of the frames in units of 1 / rate (default: 0, 1, 2, ...)."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = {"mjpeg": "yuvj420p", "ffv1": "bgr0"}.get(codec, "yuv420p")
        if codec == "libx264":
            stream.options = {"g": "5"}  # a key frame now and then: after a hole the film goes on
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (times[index] if times else index), 1 / rate
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def y4m(count: int, height: int = 24, width: int = 32, rate: str = "12:1") -> bytes:
    """YUV4MPEG2 by hand: flat grey pictures that get brighter."""
    head = f"YUV4MPEG2 W{width} H{height} F{rate} Ip A1:1 C420jpeg\n".encode()
    chroma = bytes([128]) * (height * width // 2)
    return head + b"".join(b"FRAME\n" + bytes([10 * index]) * (height * width) + chroma for index in range(count))


def read_film(path: Path) -> tuple[list[NDArray[np.uint8]], list[float], Fraction]:
    """Return a film's frames [H, W, 3], their times in seconds, and its rate."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = list(file.decode(stream))
        assert stream.average_rate is not None
        return (
            [frame.to_ndarray(format="rgb24") for frame in frames],
            [float(frame.pts * frame.time_base) for frame in frames],  # type: ignore[operator]
            Fraction(stream.average_rate),
        )
