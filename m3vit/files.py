"""Files that are either wholly there or not there at all, and their hashes."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from m3vit.errors import InputError, WriteError

PARTIAL = ".partial"  # in the names of files that are being written

# What a write fails with: errno -> what to do about it.
NO_WRITE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in the quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "name another place",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the mount",
}


@contextmanager
def writing(path: Path, kept: str = "", draft: Path | None = None) -> Iterator[None]:
    """Turn what any library raises for a write to `path` that fails into one WriteError naming it and the cause.

    `kept` says what there is all the same; `draft` is the temporary file or folder that is written in its stead.
    Libraries in C++ and Rust raise kinds of their own, without an errno: some bytes are then appended to the draft, to
    see whether that fails. Errors that are not about writing pass.
    """
    place = draft or path
    try:
        yield
    except WriteError as error:  # of a file in it
        raise WriteError(str(error).replace(str(place), str(path))) from None
    except InputError:
        raise
    except Exception as error:
        cause = error if isinstance(error, OSError) else None
        if cause is not None and isinstance(cause.filename, str | bytes):
            if not Path(os.fsdecode(cause.filename)).is_relative_to(place):
                raise
        elif cause is None or cause.errno not in NO_WRITE:
            if draft is None or (cause is not None and cause.errno is not None):  # of something else: a pipe, a socket
                raise
            cause = _append(draft)
            if cause is None:
                raise
        words = "; ".join(text for text in (kept, NO_WRITE.get(cause.errno or 0, "")) if text)
        raise WriteError(
            f"{path} cannot be written ({cause.strerror or cause}){': ' if words else ''}{words}"
        ) from None


def _append(path: Path) -> OSError | None:
    """Return why no more can be written to a file, or to the largest one in a folder, which is about to be deleted."""
    try:
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file()]
            path = max(files, key=lambda file: file.stat().st_size, default=path / "probe")
        with open(path, "ab") as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def is_empty(folder: Path) -> bool:
    """Return whether a folder is missing or holds nothing but half-written files of an earlier, killed attempt."""
    return not folder.exists() or all(PARTIAL in path.name for path in folder.iterdir())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on failure it is deleted.

    The rename is atomic and the data are flushed to disk first, so a kill at any moment leaves either the old
    file or the new one. Raises WriteError if the disk is full or a write fails otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for each target: what a kill leaves behind, the next write of the same file replaces.
    temporary = path.with_name(f".{path.name}{PARTIAL}{path.suffix}")
    kept = "the one of before is kept" if path.exists() else "nothing is left of it"
    try:
        with writing(path, kept, temporary):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_new(out: Path) -> None:
    """Raise InputError unless `atomic_folder` can make `out` without destroying anything: it must be new or empty."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, but must be a folder that is new or empty: name another one")
    if not is_empty(out):
        raise InputError(f"{out} is not empty: name a new folder or delete this one")
    if out.exists() and os.path.ismount(out):
        raise InputError(f"{out} is a mount point, which cannot be replaced at the end: name a new folder in it")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; on success it takes its place, on failure `out` stays as it was.

    Missing folders above `out` are made, and removed again on failure.
    A folder cannot be renamed onto a full one: the old one is set aside first, and deleted when the new one is there.
    Check before that nothing in `out` is worth keeping. A SIGKILL between the two renames leaves the old folder beside
    `out` under a hidden name.
    """
    out = out.resolve()
    if Path.cwd().resolve().is_relative_to(out):
        raise InputError(f"{out} is the working directory or holds it, and would be replaced: give a folder in it")
    made = [above for above in out.parents if not above.exists()]  # from the inside out
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    aside = folder.with_name(folder.name + ".old")
    kept = "what was there is kept" if out.exists() else "nothing is left of it"
    try:
        folder.chmod(0o755)  # mkdtemp gives 0700
        with writing(out, kept, folder):
            yield folder
            try:
                if out.exists():
                    os.replace(out, aside)
                os.replace(folder, out)
            except BaseException:  # Ctrl-C too: the old folder comes back
                if aside.exists() and not out.exists():
                    os.replace(aside, out)
                raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not out.exists():
            for above in made:
                with suppress(OSError):  # something else may have been put there
                    above.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file, or raise InputError naming `what` the file is and how to get it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} not found: {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): {what}") from None


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
