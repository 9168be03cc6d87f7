"""What may be asked of `m3vit predict` and `m3vit serve`, by a program or on the command line."""

import argparse
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

from m3vit.images import MAX_PIXELS, WEB_BYTES, WEB_PIXELS
from m3vit.kinds.pictures import Range
from m3vit.options import Folder, Positive, Value


def depth_range(text: str) -> Range:
    """Parse "0.5:10" as metres (near, far)."""
    parts = text.split(":")
    try:
        near, far = (float(part) for part in parts)
    except ValueError:
        near, far = 0, 0
    if not 0 <= near < far < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give NEAR:FAR in metres, such as 0.5:10")
    return near, far


def frame_rate(text: str) -> Fraction:
    """Parse frames per second, such as 25, 29.97 or 30000/1001."""
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: give frames per second, up to 1000, such as 30 or 30000/1001")
    return rate


def port_number(text: str) -> int:
    """Parse a TCP port; 0 takes a free one."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: give a port from 1 to 65535, or 0 for a free one")
    return int(text)


def host_pattern(text: str) -> str:
    """Parse a host's name as `Hosts` takes it."""
    from m3vit.export.runtime.hosts import is_host_pattern

    if not is_host_pattern(text.lower()):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a host's name without scheme or port, such as vision.example.org, *.example.org for all "
            "below one, or * for any"
        )
    return text


Budget = Annotated[str, Value(metavar="NAME")]
Span = Annotated[Range, Value(depth_range, "NEAR:FAR")]


@dataclass(frozen=True)
class Options:
    """What to write, and how to run.

    Attributes:
        overlay: lay the prediction over the input, with a legend (default: it alone)
        raw: write the values as .npy too (class ids, metres, unit vectors, probabilities)
        force: overwrite predictions of the same names
        resize: run at the size of a fixed-size package, or the size trained at: for large images
        depth_range: metres that the colours of depth span (default: the image's own; of a video, following its frames)
        fps: frames per second to assume instead of a video's own times, such as 30 or 30000/1001 (default: its times,
            or 25 where it has none)
        max_pixels: images and frames of more pixels are refused unread
    """

    raw: bool = False
    overlay: bool = False
    resize: bool = False
    force: bool = False
    depth_range: Span | None = None
    fps: Annotated[Fraction, Value(frame_rate, "RATE")] | None = None
    max_pixels: Positive = MAX_PIXELS


@dataclass(frozen=True)
class Loading:
    """How a package is loaded: the arguments of `Package.load` that a user may give.

    Attributes:
        precision: one that the package holds, such as int8 (default: its first)
        one_backbone: one graph for all tasks, if the package was exported with it
        low_memory: read weights from the mapped file, shared by tasks and processes: less memory, slower
        cache: keep weights laid out for this processor in DIR, to load sooner the next time; not with --low-memory
            (default: none)
        threads: onnxruntime threads {threads}
        budget: one of those that the package holds, by its name (default: its first)
    """

    precision: Annotated[str, Value(metavar="P")] | None = None
    one_backbone: bool = False
    low_memory: bool = False
    cache: Folder | None = None
    threads: Positive | None = None
    budget: Budget | None = None


@dataclass(frozen=True)
class Address:
    """Where a service listens, and for whom.

    Attributes:
        host: address to listen on, by default this machine alone; there is no password or encryption: leave those to a
            proxy before it
        port: TCP port; 0 takes a free one
        allowed_hosts: names that this service has besides localhost, this machine's and --host, such as its proxy's;
            *.NAME for all below one, * for any; requests for others are refused, against DNS rebinding (default: none)
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Value(port_number, "N")] = 8000
    allowed_hosts: tuple[Annotated[str, Value(host_pattern, "NAME")], ...] = ()


@dataclass(frozen=True)
class Limits:
    """Bounds of one service.

    Attributes:
        concurrency: predictions at a time, each with --threads
        queue: requests that may wait; more are refused with 503
        max_bytes: larger images are refused, in bytes as sent
        max_pixels: images of more pixels are refused
        fallback: a budget of the package, smaller than --budget, for requests that name none while others wait for
            their turn; answers say so (default: all have --budget)
    """

    max_bytes: Positive = WEB_BYTES
    max_pixels: Positive = WEB_PIXELS
    concurrency: Positive = 2
    queue: Positive = 16
    fallback: Budget | None = None
