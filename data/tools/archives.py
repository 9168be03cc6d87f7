"""Archives of data sets, unpacked so that a hostile or broken one can do no harm. No torch.

Nothing but plain files and folders comes out, all of it below one new folder, with this process's default permissions,
and no more than an archive of its size can hold of images and labels.
"""

import gzip
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from m3vit.data.opening import expected, layouts_of
from m3vit.data.sample import held
from m3vit.errors import InputError
from m3vit.files import atomic_folder, not_there, open_regular, require_new, special

MAX_MEMBERS = 500_000  # PASCAL_MT, the largest of the releases, has under 100,000
MAX_NAME_CHARS = 1024
MAX_HEADER_BYTES = 1 << 20  # of a long name or an extended header, which tarfile reads into memory
MAX_ROOT_DEPTH = 3  # folders around a data root
MAX_TRAILER_BYTES = 1 << 26  # after the last member; tar pads to a block, some tools to more
# What an archive may unpack to: so many times its own size, and some more, for those of few and small files. Rendered
# scenes, which pack best, take 4 times as much unpacked; deflate reaches 1000, bzip2 far more.
MAX_RATIO, SLACK_BYTES = 100, 1 << 24
ENTRY_BYTES = 1 << 12  # that each file, and each folder on its way, counts besides: empty ones fill a disk too
PIECE_BYTES = 1 << 20
ADVICE = "download it again"

Progress = Callable[[int, int], None]


def extract(archive: Path, out: Path, progress: Progress | None = None) -> Path:
    """Unpack a .tar, .tgz, .tar.gz or .zip of a data set into the new or empty folder `out`; return the data root.

    That is `out` or the one folder in it, at most MAX_ROOT_DEPTH deep, that has a layout's lists of images. An archive
    without such a folder is refused, and so are links, devices, sparse files, absolute names, "..", names that occur
    twice, archives larger than the free disk or than their own size explains, damaged and cut-off ones; then `out`
    stays as it was. The kind of archive is told from its content, not from its name. `progress` is called with the MiB
    of it that are read and their total.
    """
    archive, out = Path(archive), Path(out).resolve()
    if not archive.is_file():
        what = special(archive.stat().st_mode) if archive.exists() else not_there(archive)
        why = "not found or not a file" + (f" ({what})" if what and what != "not found" else "")
        raise InputError(f"{archive} {why}: give an archive (.tgz, .tar.gz, .tar or .zip)")
    require_new(out)
    unpack = _unpack_zip if _kind(archive) == "zip" else _unpack_tar
    with atomic_folder(out) as staging:
        writer = _Writer(archive, staging, shutil.disk_usage(staging).free)
        with _one_line(archive):
            unpack(archive, writer, progress)
        if not writer.files:
            raise InputError(f"{archive} holds no file")
        root = _data_root(archive, staging)
    return out / root


@contextmanager
def _one_line(archive: Path) -> Iterator[None]:
    """Turn whatever reading an archive raises into one InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except EOFError:
        raise InputError(f"{archive} is cut off: {ADVICE}") from None
    except _Sparse:
        raise InputError(f"{archive} holds a sparse file, which no data set does: do not trust this archive") from None
    except MemoryError:
        raise InputError(f"{archive} asks for more memory than there is: do not trust this archive") from None
    except NotImplementedError as error:
        raise InputError(f"{archive} cannot be read ({error}): unpack it with another tool") from None
    # Not a list of types: tarfile, zipfile and the decompressors raise a dozen on damaged archives.
    except Exception as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(words.split())[:200] or type(error).__name__
        raise InputError(f"{archive} is damaged ({reason}): {ADVICE}") from None


def _data_root(archive: Path, folder: Path) -> Path:
    """Return where below `folder` the data set is (relative), or raise InputError unless there is exactly one."""
    roots = list(_roots(folder, MAX_ROOT_DEPTH))
    if len(roots) == 1 and len(layouts_of(roots[0])) == 1:
        return roots[0].relative_to(folder)
    if roots:
        names = ", ".join(f"{root.relative_to(folder)} ({' and '.join(layouts_of(root))})" for root in roots)
        why = f"holds more than one data set: {names}"
    else:
        for _ in range(MAX_ROOT_DEPTH):  # say what is in the only folder
            inner = list(folder.iterdir())
            folder = inner[0] if len(inner) == 1 and inner[0].is_dir() else folder
        why = f"is no data set: it holds {held(folder)}, expected a folder with {expected(' or ')}"
    raise InputError(f"{archive} {why}: nothing was unpacked, use tar or unzip if it is the right archive all the same")


def _roots(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the folders that hold a data set, `folder` itself or at most `depth` below it; none inside another."""
    if layouts_of(folder):
        yield folder
    elif depth:
        with os.scandir(folder) as entries:
            inner = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        for path in inner:
            yield from _roots(Path(path), depth - 1)


def _kind(archive: Path) -> str:
    """Return "zip" or "tar" (packed with gzip or not) by the first bytes."""
    with open_regular(archive) as file:
        start = file.read(512)
    if start.startswith(b"\x1f\x8b") or start[257:262] == b"ustar":
        return "tar"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"{archive} is a web page, not an archive: the download was refused, open it to see why")
    raise InputError(f"{archive} is not a tar or zip archive (.tgz, .tar.gz, .tar, .zip): {ADVICE}")


class _Writer:
    """Writes members below `staging`, and refuses those that are not plain, or too many, or too large together."""

    def __init__(self, archive: Path, staging: Path, free: int) -> None:
        self.archive, self.staging, self.free = archive, staging, free
        self.members = self.files = self.bytes = self.entries = 0
        self.limit = MAX_RATIO * archive.stat().st_size + SLACK_BYTES

    def refuse(self, name: str, why: str) -> InputError:
        return InputError(
            f"{self.archive}: member {name[:80]!r} {why}: nothing was unpacked, do not trust this archive"
        )

    def check_name(self, name: str) -> tuple[str, ...]:
        """Return the parts of a member's name, or raise InputError if it is not a plain one below the folder."""
        parts = PurePosixPath(name).parts
        if name.startswith(("/", "\\")) or "\\" in name or ":" in name.split("/")[0]:
            raise self.refuse(name, "has an absolute or a Windows path")
        if ".." in parts:
            raise self.refuse(name, "leads out of the folder")
        if not name.isprintable() or len(name) > MAX_NAME_CHARS or any(len(os.fsencode(part)) > 255 for part in parts):
            raise self.refuse(name, "has an impossible name")
        return parts

    def place(self, name: str, size: int) -> Path:
        """Check a member's name and size and return where it belongs."""
        self.members += 1
        if self.members > MAX_MEMBERS:
            raise InputError(
                f"{self.archive} has more than {MAX_MEMBERS} members: no known data set has, nothing unpacked"
            )
        parts = self.check_name(name)
        self.bytes += size
        if size < 0 or self.bytes > self.free:
            raise InputError(
                f"{self.archive} unpacks to more than the {self.free / 1e9:.1f} GB that are free: "
                "give a folder on another disk"
            )
        self.entries += max(1, len(parts)) * ENTRY_BYTES
        if self.bytes + self.entries > self.limit:
            raise InputError(
                f"{self.archive} unpacks to more than {self.limit / 1e9:.2f} GB, more than an archive of its size can "
                "hold of images and labels: nothing was unpacked, do not trust this archive"
            )
        return self.staging.joinpath(*parts)

    def folder(self, name: str) -> None:
        place = self.place(name, 0)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise self.refuse(name, "is a folder where a file was") from None
        except OSError as error:
            raise self.unwritten(name, error) from None

    def file(self, name: str, size: int, source: IO[bytes]) -> Iterator[None]:
        """Write a file of `size` bytes, yielding after each piece."""
        place = self.place(name, size)
        try:
            # No links are ever made, so every folder on the way is one of ours; "x" never follows or overwrites.
            place.parent.mkdir(parents=True, exist_ok=True)
            target = open(place, "xb")
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise self.refuse(name, "is there twice, or a folder and a file") from None
        except OSError as error:
            raise self.unwritten(name, error) from None
        left = size
        try:
            while left:
                piece = source.read(min(PIECE_BYTES, left))
                if not piece:
                    raise EOFError
                with self._writing(name):
                    target.write(piece)
                left -= len(piece)
                yield
        finally:
            with self._writing(name):
                target.close()
        self.files += 1

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.unwritten(name, error) from None

    def unwritten(self, name: str, error: OSError) -> InputError:
        """Return the error for a member that cannot be written: the disk's fault, not the archive's."""
        return InputError(
            f"{self.archive}: member {name[:80]!r} cannot be written below {self.staging.parent} "
            f"({error.strerror or error}): nothing was unpacked, make room or give a folder on another disk"
        )


# --- tar ------------------------------------------------------------------------------------------------------------


class _Sparse(tarfile.ReadError):
    """A file of which an archive holds a part, with a map of its holes. No data set has one."""


class _Member(tarfile.TarInfo):
    """A tar header whose extensions (long names, pax records) are small: tarfile reads them into memory whole.

    Sparse files are refused by their header: tarfile collects their maps, of any length, in memory.
    """

    EXTENSIONS = (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        header = super().frombuf(buf, encoding, errors)
        if header.type in cls.EXTENSIONS and not 0 <= header.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {header.size} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _Sparse
        return header

    def _refuse_sparse(self, *_: object) -> None:
        raise _Sparse

    # Where tarfile follows the pax records of a sparse file. Not its public interface: `_check_member` looks again.
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Tail:
    """A readable stream that remembers its last 1,024 bytes: a whole tar ends with as many zeros."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.last = stream, b""

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.last = (self.last + data)[-1024:] if len(data) < 1024 else data[-1024:]
        return data


def _unpack_tar(archive: Path, writer: _Writer, progress: Progress | None) -> None:
    total = archive.stat().st_size
    with open_regular(archive) as packed:
        packed_tar = packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        stream = _Tail(cast(IO[bytes], gzip.GzipFile(fileobj=packed)) if packed_tar else packed)
        # "r|": one pass, no seeking.
        with tarfile.open(fileobj=cast(Any, stream), mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every header in memory
                writer.check_name(member.name)  # before tarfile's own filter, which stumbles over some
                _check_member(member, writer)
                if member.isdir():
                    writer.folder(member.name)
                else:
                    source = cast(IO[bytes], tar.extractfile(member))
                    for _ in writer.file(member.name, member.size, source):
                        _report(progress, packed.tell(), total)
                _report(progress, packed.tell(), total)
        # tarfile takes the end of the file for the end of the archive; only gzip's checksum and tar's zeros prove it.
        for _ in range(MAX_TRAILER_BYTES // PIECE_BYTES):
            if not stream.read(PIECE_BYTES):
                break
        else:
            raise InputError(f"{archive} goes on long after its last member: {ADVICE}")
        if stream.last != bytes(1024):
            raise EOFError
        _report(progress, total, total)


def _check_member(member: tarfile.TarInfo, writer: _Writer) -> None:
    """Refuse all but plain files and folders; ask Python's own filter too, if it has one (3.10.12, 3.11.4, 3.12)."""
    if member.issym() or member.islnk():
        raise writer.refuse(member.name, f"is a link to {member.linkname[:80]!r}")
    if member.issparse():
        raise writer.refuse(member.name, "is a sparse file, of which an archive holds a part")
    if not (member.isreg() or member.isdir()):
        raise writer.refuse(member.name, "is a device or another special file")
    if hasattr(tarfile, "data_filter"):
        try:
            tarfile.data_filter(member, str(writer.staging))
        except tarfile.FilterError as error:
            raise writer.refuse(member.name, f"is refused by tarfile ({error})") from None


# --- zip ------------------------------------------------------------------------------------------------------------


def _unpack_zip(archive: Path, writer: _Writer, progress: Progress | None) -> None:
    with open_regular(archive) as file, zipfile.ZipFile(file) as packed:
        members = packed.infolist()
        total = sum(member.compress_size for member in members)
        done = 0
        for member in members:
            name = member.orig_filename  # filename ends at a NUL and has its separators replaced
            kind = member.external_attr >> 16 & 0o170000  # Unix file type, 0 if made elsewhere
            if kind not in (0, 0o100000, 0o040000):
                raise writer.refuse(name, "is a link, a device or another special file")
            if name.endswith("/"):
                writer.folder(name)
            elif member.flag_bits & 1:
                raise InputError(f"{archive} is encrypted, which is not supported: unpack it with another tool")
            else:
                with packed.open(member) as source:
                    for _ in writer.file(name, member.file_size, source):
                        pass
                    source.read(1)  # at its end the checksum is compared
            done += member.compress_size
            _report(progress, done, total)


def _report(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done >> 20, max(1, total >> 20))
