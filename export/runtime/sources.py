"""The images and videos that `m3vit predict` is given, found by their content. No torch.

In a folder nothing is passed over without a word. What looks like a picture or a video and cannot be read is left out,
with the reason; other files are counted and named. Links to folders are followed, each folder once.
"""

import os
import re
import stat
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from m3vit.errors import InputError
from m3vit.files import PARTIAL, not_there, open_regular, special
from m3vit.images import FORMATS, HEAD_BYTES, POINTER, Foreign, foreign_kind

STREAM = Path("-")  # standard input
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".mjpeg"),
    *(".mjpg", ".y4m", ".3gp", ".3g2", ".flv", ".wmv", ".asf", ".ogv"),
)
_JPEG_STREAMS = (".mjpeg", ".mjpg")  # a row of JPEGs begins as one does
_SOURCE_CODE = (".ts",)  # of TypeScript too
# A camera's raw files are TIFFs that begin with a small preview, as often as not.
_RAW_SUFFIXES = (
    *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(".3fr", ".iiq", ".rwl", ".kdc", ".dcr", ".erf", ".mef", ".mos", ".x3f"),
)
# Of pictures that are not read, where the content does not tell.
_UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".psd", ".psb", ".xcf", ".kra"),
    *(".exr", ".hdr", ".svg", ".svgz", ".eps", ".ico", ".icns", ".tga", ".dds", ".qoi", ".pcx", ".wmf", ".emf"),
    *(".raw", ".bpg", ".flif"),
)
_AUDIO_BRANDS = (b"M4A ", b"M4B ", b"M4P ", b"F4A ")
_FILM_BOXES = (b"moov", b"mdat", b"wide", b"skip", b"pnot")  # QuickTime's older files begin with one of these
_FILM_STARTS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"\0\0\1\xba",  # MPEG program stream
    b"\0\0\1\xb3",  # MPEG-1 or -2 video alone
    b"YUV4MPEG2 ",
    b"FLV\1",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # Windows Media
)
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SHOWN = 3  # names in a message

Kind = Literal["image", "video", "stream"]


@dataclass(frozen=True)
class Source:
    """One input, and the name of its predictions: a path without suffix, relative to the output folder."""

    path: Path
    name: Path
    kind: Kind

    @property
    def label(self) -> str:
        """Return what messages call it."""
        return "standard input" if self.kind == "stream" else str(self.path)


@dataclass
class Found:
    """What the inputs hold: `sources` to predict, in order.

    `left_out`: what looks like a picture or a video in a folder and is not predicted, and why; `others`: files that
    are neither; `hidden`: how many files and folders have names that begin with a dot, which are not looked into.
    """

    sources: list[Source] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hidden: int = 0


def find_sources(inputs: Sequence[Path], out: Path) -> Found:
    """Return every image and video that the inputs name, in order; raises InputError for what is not there."""
    if not inputs:
        raise InputError("no inputs: name images, folders or videos, or - for standard input")
    if sum(path == STREAM for path in inputs) > 1:
        raise InputError("- is given twice: standard input is one stream")
    found = Found()
    for path in inputs:
        if path == STREAM:
            if sys.stdin is None or os.isatty(0):
                raise InputError("- reads a stream of frames from standard input, but nothing is piped into it")
            found.sources.append(Source(path, Path("stdin"), "stream"))
        elif path.is_dir():
            if path.resolve() == out.resolve():
                raise InputError(f"{out} holds the inputs: give another folder for the predictions")
            _Search(path, out, found).run()
        elif path.is_file():
            found.sources.append(_named(path))
        elif path.exists():
            what = special(path.stat().st_mode) or "it is something else"
            raise InputError(f"{path}: {what}, not a regular file: pipe its bytes into m3vit predict ... - instead")
        else:
            raise InputError(f"{path} {not_there(path)}: give image files, folders, videos, or - for standard input")
    return found


def summaries(found: Found) -> list[str]:
    """Return a line about what was left out of the folders, and one about what is neither picture nor video."""
    lines = []
    if found.left_out:
        reasons: dict[str, list[str]] = {}
        for name, reason in found.left_out:
            reasons.setdefault(reason, []).append(name)
        told = "; ".join(f"{_few(names)}: {reason}" for reason, names in reasons.items())
        lines.append(f"left out {len(found.left_out)} that look like pictures or videos: {told}")
    other = [f"{len(found.others)} files that are neither pictures nor videos ({_few(found.others)})"]
    words = (other if found.others else []) + ([f"{found.hidden} hidden files or folders"] if found.hidden else [])
    if words:
        lines.append(f"passed over {' and '.join(words)}")
    return lines


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


# ------------------------------------------------------------------------------------------------------ by content


def _named(path: Path) -> Source:
    """Return a file that was named itself: what it is not, reading it will say."""
    try:
        found = _kind(path)
    except OSError:
        found = None
    if found not in ("image", "video"):
        found = "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image"
    return _source(path, Path(path.name), found)  # type: ignore[arg-type]


def _source(path: Path, name: Path, kind: Kind) -> Source:
    known = name.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *_RAW_SUFFIXES, *_UNREAD_SUFFIXES)
    return Source(path, name.with_suffix("") if known else name, kind)


def _kind(path: Path) -> Literal["image", "video"] | Foreign | None:
    """Return what a file holds, by its first bytes; None: nothing known, or no picture. Raises OSError."""
    with open_regular(path) as file:
        head = file.read(HEAD_BYTES)
    if _is_film(head, path):
        return "video"
    if foreign := foreign_kind(head):
        return foreign
    if _is_image(head, path):
        return "video" if path.suffix.lower() in _JPEG_STREAMS else "image"
    return None


def _is_image(head: bytes, path: Path) -> bool:
    if head.startswith(_IMAGE_STARTS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return True
    # Two letters that any text may begin with: a look at the rest of the header.
    if head.startswith(b"BM") or re.match(rb"P[1-6f][\s#]", head):
        try:
            with open_regular(path) as file, Image.open(file, formats=FORMATS):
                return True
        except Exception:  # of a dozen kinds
            return False
    return False


def _is_film(head: bytes, path: Path) -> bool:
    box, brand = head[4:8], head[8:12]
    film = (
        (box == b"ftyp" and brand not in _AUDIO_BRANDS and not foreign_kind(head))
        or box in _FILM_BOXES
        or head.startswith(_FILM_STARTS)
        or (head[:4] == b"RIFF" and brand == b"AVI ")
        or (head[:4] == b"OggS" and b"theora" in head)
        or any(all(head[at : at + 1] == b"G" for at in range(start, 5 * step, step)) for start, step in _PACKETS)
    )
    # The same containers hold sound alone.
    return film and (path.suffix.lower() in VIDEO_SUFFIXES or _has_pictures(path))


_PACKETS = ((0, 188), (4, 192))  # of an MPEG transport stream: where the first begins, and their length


def _has_pictures(path: Path) -> bool:
    try:
        from m3vit.export.runtime.video import has_pictures
    except ModuleNotFoundError:  # without PyAV it is taken for a film, and what to install is said
        return True
    return has_pictures(path)


# ------------------------------------------------------------------------------------------------------- in folders


class _Search:
    """Finds the images and videos below a folder; results are named relative to it, in the order of their names."""

    def __init__(self, folder: Path, out: Path, found: Found) -> None:
        self.folder, self.found = folder, found
        self.seen = {_identity(out)} if out.is_dir() else set()
        self.links: deque[Path] = deque()
        self.files: list[Path] = []

    def run(self) -> None:
        """Add to `found` what the folder holds, or raise InputError if that is no image or video."""
        before = len(self.found.left_out)
        self._walk(self.folder)
        around = {_identity(parent) for parent in self.folder.resolve().parents}
        while self.links:  # after the folders themselves, whose names are the better ones
            link = self.links.popleft()
            identity = _identity(link)
            if identity in self.seen:
                continue
            if identity in around:
                self._leave_out(link, "leads to a folder that holds this one: name that one, or what is wanted of it")
                continue
            self._walk(link)
        sources = []
        for path in sorted(self.files):
            if kind := self._judge(path):
                sources.append(_source(path, path.relative_to(self.folder), kind))
        self.found.sources += sources
        if not sources:
            some = "; ".join(summaries(Found(left_out=self.found.left_out[before:])))
            raise InputError(f"{self.folder} holds no images or videos that can be read{f': {some}' if some else ''}")

    def _walk(self, top: Path) -> None:
        """Collect the files below a folder, and the links to folders."""
        folders = [top]
        while folders:
            folder = folders.pop()
            try:
                identity = _identity(folder)
                if identity in self.seen:
                    continue
                self.seen.add(identity)
                with os.scandir(folder) as entries:
                    listed = list(entries)
            except OSError as error:
                if folder == self.folder:
                    raise InputError(f"{folder} cannot be searched: {error.strerror}") from None
                self._leave_out(folder, f"cannot be searched: {error.strerror}")
                continue
            for entry in listed:
                if PARTIAL in entry.name:
                    continue
                path = folder / entry.name
                if entry.name.startswith("."):
                    self.found.hidden += 1
                elif not _is_folder(path):
                    self.files.append(path)
                elif entry.is_symlink():
                    self.links.append(path)
                else:
                    folders.append(path)
        self.links = deque(sorted(self.links))

    def _judge(self, path: Path) -> Kind | None:
        """Return what a file is to be read as; None if it is left out or passed over, which is noted."""
        suffix = path.suffix.lower()
        ours = suffix in IMAGE_SUFFIXES or (suffix in VIDEO_SUFFIXES and suffix not in _SOURCE_CODE)
        foreign = suffix in _RAW_SUFFIXES or suffix in _UNREAD_SUFFIXES
        try:
            kind = _kind(path)
        except (FileNotFoundError, NotADirectoryError):
            return self._unread(path, not_there(path), ours or foreign or not suffix)
        except OSError as error:
            mode = path.stat().st_mode if path.exists() else 0
            looks = ours or foreign or (stat.S_ISREG(mode) and not suffix)
            return self._unread(path, f"cannot be read: {error.strerror}", looks)
        if suffix in _RAW_SUFFIXES and kind in ("image", None):
            kind = Foreign("camera raw", "is a camera's raw file, which is not read: convert it")
        if isinstance(kind, Foreign):
            return self._unread(path, kind.advice, kind.kind != POINTER or ours or foreign)
        if kind is None and ours:  # damaged: reading it says how
            return "video" if suffix in VIDEO_SUFFIXES else "image"
        if kind is None:
            return self._unread(path, f"is a picture of a kind that is not read ({suffix}): convert it", foreign)
        return kind

    def _unread(self, path: Path, reason: str, looks_like_one: bool) -> Kind | None:
        if looks_like_one:
            self._leave_out(path, reason)
        else:
            self.found.others.append(str(path))
        return None

    def _leave_out(self, path: Path, reason: str) -> None:
        self.found.left_out.append((str(path), reason))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
