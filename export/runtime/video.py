"""Video files and streams, a frame at a time (PyAV, an extra: m3vit[video])."""

import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from m3vit.errors import InputError

DEFAULT_RATE = Fraction(25)  # frames per second of a stream that says nothing; FFmpeg's own assumption
_PROBE_BYTES = 1 << 16  # that tell a format; by FFmpeg's default a stream of JPEGs waits for its first megabyte
_NO_PICTURES = "holds no video: give one with pictures"
_POLL_S = 0.2  # how soon a stream that sends nothing notices that it is to stop


@dataclass(frozen=True)
class Frame:
    """A picture uint8 [H, W, 3], upright, and its time since the first one, in units of the film's `time_base`."""

    picture: NDArray[np.uint8]
    time: int


class StandardInput:
    """Bytes of standard input for PyAV. They end early when `stopped()`, so that what was sent can be finished."""

    name = "standard input"

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped, self.descriptor = stopped, 0

    def read(self, size: int) -> bytes:
        """Return some bytes, at most `size`; none at the end."""
        while not self.stopped():
            if select.select([self.descriptor], [], [], _POLL_S)[0]:
                return os.read(self.descriptor, size)
        return b""


class Film:
    """The upright frames of an opened video, all of the first one's size. Can be iterated once.

    `rate`: frames per second; `time_base`: seconds; `frames`: their number as the header says, if it does. A stream of
    other frames ends where the size changes.
    """

    def __init__(self, container: Any, fps: Fraction | None) -> None:
        self._container, self._timed = container, fps is None
        self._stream: VideoStream = container.streams.video[0]
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.rate = fps or (Fraction(rate) if rate else DEFAULT_RATE)
        self.time_base = Fraction(self._stream.time_base or 1 / self.rate) if self._timed else 1 / self.rate
        self.frames = self._stream.frames or None
        self._damaged, self._ended = 0, ""

    @property
    def problems(self) -> list[str]:
        """Return what was wrong, up to where iteration has come; one line each."""
        damaged = [f"{self._damaged} packets cannot be decoded"] if self._damaged else []
        return damaged + ([self._ended] if self._ended else [])

    def __iter__(self) -> Iterator[Frame]:
        first: int | None = None
        last, shape = -1, None
        step = max(1, round(1 / (self.rate * self.time_base)))
        for frame in self._decoded():
            turns = round((frame.rotation or 0) / 90) % 4
            pixels = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
            picture = np.ascontiguousarray(np.rot90(pixels, turns))
            shape = shape or picture.shape
            if picture.shape != shape:
                self._ended = f"the size changes from {_size(shape)} to {_size(picture.shape)}"
                return
            time = last + step if last >= 0 else 0
            if self._timed and frame.pts is not None:
                first = frame.pts if first is None else first
                time = max(frame.pts - first, last + 1)  # time never stands still, or no file can be written
            last = time
            yield Frame(picture, time)

    def _decoded(self) -> Iterator[VideoFrame]:
        """Yield the frames, passing over packets that cannot be decoded."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            # The container is torn here: nothing after it can be found. OSError: FFmpeg seeks to where no file can.
            except (av.error.FFmpegError, OSError) as error:
                self._ended = f"it is damaged ({error.strerror})"
                return
            try:
                yield from packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                self._damaged += 1


@contextmanager
def open_film(source: Path | StandardInput, max_pixels: int, fps: Fraction | None = None) -> Iterator[Film]:
    """Open a video file, or a stream of any format that FFmpeg recognises without seeking.

    `fps`: count frames at this rate instead of reading their times. Raises InputError for what is no video, and for
    frames of more than `max_pixels`, before any is allocated.
    """
    name = str(source) if isinstance(source, Path) else source.name
    file: BinaryIO | StandardInput
    try:
        file = open(source, "rb") if isinstance(source, Path) else source
    except OSError as error:
        raise InputError(f"{name} cannot be opened: {error.strerror}") from error
    # FFmpeg counts the blocks at the edges in, so twice the limit; what a header says is checked exactly below.
    bound = {"max_pixels": str(2 * max_pixels + (1 << 16))}
    options = {
        "protocol_whitelist": "none",  # the bytes come from here, and playlists would open other files and addresses
        "formatprobesize": str(_PROBE_BYTES),
        **bound,  # checked before anything is allocated, here to look for sizes and rates
    }
    try:
        container: Any = av.open(file, options=options)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        _close(file)
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name} cannot be read as a video: {reason}") from error
    try:
        if not container.streams.video:
            raise InputError(f"{name} {_NO_PICTURES}")
        codec = container.streams.video[0].codec_context
        if codec is None:
            raise InputError(f"{name} cannot be read as a video: its pictures are coded in a way that is not known")
        if codec.width * codec.height > max_pixels:
            raise InputError(f"{name} has {codec.height}x{codec.width} pixels: at most {max_pixels} are allowed")
        codec.options = bound  # and here to decode: streams can change their size
        yield Film(container, fps)
    finally:
        container.close()
        _close(file)


def has_pictures(path: Path) -> bool:
    """Return whether a film's file has more than sound; True too if it is damaged, which opening it will say."""
    try:
        with open_film(path, 1 << 40):
            return True
    except InputError as error:
        return not str(error).endswith(_NO_PICTURES)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _close(file: BinaryIO | StandardInput) -> None:
    if not isinstance(file, StandardInput):
        file.close()


class FilmWriter:
    """Writes pictures of one size to an MP4 file (H.264, or MPEG-4 where PyAV lacks an encoder for it); no sound.

    Used with `with`; the file is playable after it. Odd sizes lose nothing: a last row or column is repeated, since
    the colours of these formats are stored for 2 x 2 pixels.
    """

    def __init__(self, path: Path, rate: Fraction, time_base: Fraction, size: tuple[int, int]) -> None:
        self.path, self.size = path, size
        self._container = av.open(str(path), "w", format="mp4")
        modern = "libx264" in av.codecs_available
        # MPEG-4's clock has 16 bits.
        self.time_base = time_base if modern and time_base >= Fraction(1, 1 << 24) else 1 / rate.limit_denominator(1001)
        self._from = time_base
        stream: Any = self._container.add_stream("libx264" if modern else "mpeg4", rate=rate.limit_denominator(1001))
        stream.height, stream.width = (-(-side // 2) * 2 for side in size)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"} if modern else {"qscale": "3"}
        stream.codec_context.time_base = self.time_base
        self._stream = stream
        self._last = -1

    def __enter__(self) -> "FilmWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        try:
            if kind is None:
                for packet in self._stream.encode():
                    self._container.mux(packet)
        finally:
            self._container.close()

    def write(self, picture: NDArray[np.uint8], time: int) -> None:
        """Append a picture uint8 [H, W, 3] at a time in the units of the film it was read from."""
        height, width = self.size
        padded = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
        self._last = max(self._last + 1, round(time * self._from / self.time_base))
        frame.pts, frame.time_base = self._last, self.time_base
        for packet in self._stream.encode(frame):
            self._container.mux(packet)
