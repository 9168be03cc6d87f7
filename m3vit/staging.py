"""Folders that are being written, and what a killed process left of them.

A folder is written under a hidden name beside the one it is to get, with a lock file beside it that the writing process
holds: the system frees it when that process ends, however it ends. The next writer in the same place removes folders
whose lock is free, and leaves those alone that somebody still writes. Where files cannot be locked nothing is removed.
"""

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from m3vit.errors import NO_WRITE, InputError

try:
    import fcntl
except ImportError:  # not a POSIX system: leftovers stay
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"  # in the names of files and folders that are being written
OLD = ".old"  # the folder that a new one takes the place of, while it does
LOCK = ".lock"
NAME_BYTES = 200  # of a target's name kept in a hidden one: file systems allow 255 in all


def hidden_stem(name: str) -> str:
    """Return what a hidden name beside a file or folder called `name` begins with."""
    return f".{name if len(os.fsencode(name)) <= NAME_BYTES else hashlib.sha256(os.fsencode(name)).hexdigest()}"


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Within `with`, SIGTERM ends this process by SystemExit (143, as shells count): it cleans up behind itself.

    Only where SIGTERM would kill it outright, in the main thread; forked children are still killed outright.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the cleaning
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `out` to write into; it is removed in the end, if it has not been renamed.

    Before, what killed processes left in the folder above `out` is removed. The yielded folder's name with OLD appended
    is the caller's too: to put the old `out` aside. If the caller is killed while it is there and `out` is not, the
    next writer brings it back.
    """
    clean_leftovers(out.parent)
    with sigterm_as_exit():
        folder, lock, held = _claim(out)
        try:
            folder.mkdir()
            folder.chmod(0o755)  # whatever the umask
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists() and not aside_of(folder).exists():
                lock.unlink(missing_ok=True)
            os.close(held)


def aside_of(folder: Path) -> Path:
    """Return where the old folder is put while a staging folder takes its place."""
    return folder.with_name(folder.name + OLD)


def clean_leftovers(parent: Path) -> None:
    """Remove what killed processes left in a folder; bring back an old folder whose new one never took its place."""
    for lock in parent.glob(f".*{PARTIAL}{LOCK}"):
        held = _hold(lock)
        if held is None:
            continue
        try:
            folder = lock.with_name(lock.name.removesuffix(LOCK))
            aside, name = aside_of(folder), os.fsdecode(os.read(held, 4096))
            if aside.exists() and name and Path(name).name == name and not (parent / name).exists():
                os.replace(aside, parent / name)
            for left in (folder, aside):
                shutil.rmtree(left, ignore_errors=True)
            if not folder.exists() and not aside.exists():
                lock.unlink(missing_ok=True)
        except OSError:  # another user's, or a file system that became read-only
            pass
        finally:
            os.close(held)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process holds a folder, and hold it; where that cannot be done, go on without."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _claim(out: Path) -> tuple[Path, Path, int]:
    """Return a free hidden name beside `out`, its lock file and the descriptor that holds it."""
    while True:
        folder = out.with_name(f"{hidden_stem(out.name)}.{os.urandom(4).hex()}{PARTIAL}")
        lock = folder.with_name(folder.name + LOCK)
        try:
            held = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(out, error) from None
        taken = False  # by somebody who takes it for a leftover before it is locked
        try:
            if fcntl is not None:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:  # a file system without locks: nobody else gets this one either
            pass
        if not taken and _is_at(held, lock):
            try:
                os.write(held, os.fsencode(out.name))
            except OSError as error:  # a full disk, on which empty files can still be made
                lock.unlink(missing_ok=True)
                os.close(held)
                raise _unwritable(out, error) from None
            return folder, lock, held
        os.close(held)


def _unwritable(out: Path, error: OSError) -> InputError:
    advice = NO_WRITE.get(error.errno or 0, "name a folder in a writable place")
    return InputError(f"cannot write beside {out} ({error.strerror}): {advice}")


def _hold(lock: Path) -> int | None:
    """Return a descriptor that holds a lock file, or None if a live process does or it cannot be told."""
    if fcntl is None:
        return None
    try:
        held = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(held, lock):
            return held
    except OSError:
        pass
    os.close(held)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still what lies at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
