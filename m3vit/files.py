"""Files: written wholly or not at all, read with limits, and their hashes."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from m3vit.errors import NO_WRITE, InputError, WriteError
from m3vit.pointers import fetches
from m3vit.staging import PARTIAL, aside_of, hidden_stem, staging_folder

MAX_TEXT_BYTES = 1 << 24  # of a JSON or YAML file: ours have some hundred KiB at most; parsed they take 20 times that

os.umask(_umask := os.umask(0))  # it can only be read by being set
_MODE = 0o666 & ~_umask  # that files written here have at least


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
    temporary = path.with_name(f"{hidden_stem(path.name)}{PARTIAL}{path.suffix}")
    kept = "the one of before is kept" if path.exists() else "nothing is left of it"
    try:
        with writing(path, kept, temporary):
            yield temporary
            with suppress(PermissionError):  # a file system that keeps no modes
                temporary.chmod(temporary.stat().st_mode | _MODE)  # safetensors gives 0600, whatever the umask
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def require_empty(out: Path, what: str = "", advice: str = "name a new folder or delete this one") -> None:
    """Raise InputError unless `out` is new or empty; `what` else would be written over if it were in it."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, but must be a folder that is new or empty: name another one")
    if not is_empty(out):
        raise InputError(f"{out} is not empty{f' and holds no {what}' if what else ''}: {advice}")


def require_ending(out: Path, what: str, ending: str) -> None:
    """Raise InputError unless `out` can be a file of this ending: others would be taken for what they are not."""
    if out.suffix.lower() != ending or out.is_dir():
        raise InputError(f"--out {out}: give a file name for the {what}, ending in {ending}")


def require_new(out: Path) -> None:
    """Raise InputError unless `atomic_folder` can make `out` without destroying anything: it must be new or empty."""
    require_empty(out)
    if out.exists() and os.path.ismount(out):
        raise InputError(f"{out} is a mount point, which cannot be replaced at the end: name a new folder in it")


def require_replaceable(out: Path, what: str, manifest: str, own: Callable[[set[str], str], Set[str]]) -> None:
    """Raise InputError if replacing `out` would destroy anything but an earlier `what`, which holds a `manifest`.

    `own` gets the names of all files in `out`, from there, and an advice for its own refusals; it returns those that
    may go. A folder is replaced by removing it: nothing of the user's may be in it.
    """
    advice = "give a new or empty folder"
    if not (out / manifest).is_file():
        require_empty(out, f"{what} (no {manifest})", advice)
        return
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if foreign := sorted(found - own(found, advice)):
        raise InputError(
            f"{out} holds files that are not the {what}'s ({', '.join(foreign[:3])}): move them, or {advice}"
        )


@contextmanager
def atomic_folder(out: Path, last: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; on success it takes its place, on failure `out` stays as it was.

    Missing folders above `out` are made, and removed again on failure.
    A folder cannot be renamed onto a full one: the old one is set aside first, and deleted when the new one is there.
    Check before that nothing in `out` is worth keeping. SIGTERM is a failure like any other; what a SIGKILL leaves, the
    next `atomic_folder` in the same place removes, and after one between the two renames it brings the old folder back
    (`m3vit.staging`).

    With `last`, an empty folder that is there is filled, not replaced: it may be a mount point or the working
    directory. What is named in `last` comes last: until then nothing takes the folder for a whole one.
    """
    out = out.resolve()
    filled = bool(last) and out.exists()
    if not filled and Path.cwd().resolve().is_relative_to(out):
        raise InputError(f"{out} is the working directory or holds it, and would be replaced: give a folder in it")
    made = [above for above in out.parents if not above.exists()]  # from the inside out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write beside {out} ({error.strerror}): name a folder in a writable place") from None
    kept = "what was there is kept" if out.exists() else "nothing is left of it"
    try:
        with staging_folder(out) as folder, writing(out, kept, folder):
            yield folder
            if filled:
                first = [path.name for path in folder.iterdir() if path.name not in last]
                for name in (*first, *last):
                    shutil.move(folder / name, out / name)
                return
            aside = aside_of(folder)
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
        if not out.exists():
            for above in made:
                with suppress(OSError):  # something else may have been put there
                    above.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- reading

_SPECIAL = {
    stat.S_IFIFO: "it is a pipe",
    stat.S_IFSOCK: "it is a socket",
    stat.S_IFCHR: "it is a device",
    stat.S_IFBLK: "it is a device",
}
REGULAR = "not a regular file"


def special(mode: int) -> str | None:
    """Say of a file's mode (`stat`, links followed) what it is, if that is neither a regular file nor a folder."""
    return _SPECIAL.get(stat.S_IFMT(mode))


def not_there(path: Path) -> str:
    """Say why a path leads to nothing: it is absent, or a link to what is (as git-annex and DVC leave them)."""
    if not path.is_symlink():
        return "not found"
    target = os.readlink(path)
    tools = fetches(target) or "git annex get, dvc pull"
    return f"not found: it is a link to {target}, which is not there (fetch it: {tools})"


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; raises OSError, and never waits, if it is a folder, a device, a pipe or a socket.

    Those block, or never end: whatever a user names is opened through here. Links are followed.
    """
    _require_regular(path, os.stat(path).st_mode)  # devices can act on being opened
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)  # it may have been replaced meanwhile
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, f"{os.strerror(errno.EISDIR)}, {REGULAR}", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"{special(mode) or 'it is something else'}, {REGULAR}", str(path))


def read_bounded(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Return a regular file's bytes; raises OSError if it is something else or has more than `limit`."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= limit:
            data = file.read(limit + 1)  # not by its size: those of /proc say 0
            if len(data) <= limit:
                return data
    raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))


def read_text(path: Path, what: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Return a text file (UTF-8, with or without a mark at its start), or raise InputError.

    The message names `what` the file is and how to get it.
    """
    try:
        return read_bounded(path, limit).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} {not_there(path)}: {what}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {what}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not readable as text ({error}): {what}") from None


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file, or raise InputError naming `what` the file is and how to get it."""
    try:
        return json.loads(read_text(path, what))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python converts
        raise InputError(f"{path} is not readable JSON ({error}): {what}") from None


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
