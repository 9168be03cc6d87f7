"""Files that stay what they were when their folder was opened, or are refused. No torch, no onnxruntime."""

import os
import stat
import weakref
from collections.abc import Mapping
from pathlib import Path

from m3vit.errors import InputError
from m3vit.files import sha256_file

_State = tuple[int, int, int, int, int]  # device, inode, bytes, times of the last change of content and of inode


class PackageChanged(InputError):  # noqa: N818 (what it says, not that it is an error)
    """A file is no longer what it was when its folder was opened: whatever the request, it cannot be met."""


class OpenedFiles:
    """Files of a folder that are to have the digests {name: sha256}, however late they are asked for.

    The folder itself is held open: after a rename its files are still found, and never those of another folder that
    took its name (on Linux; elsewhere a renamed folder is refused). `place` leads to it as long as this object lives.

    A file is read and hashed only if its inode, size or times are not those of the last time, so that a check before
    and after each use costs microseconds. Content decides: a copy that is the same, or a `touch`, is no change.
    `again`: what to do about files that are not as they should be.
    """

    def __init__(self, folder: Path, digests: Mapping[str, str], again: str) -> None:
        self.folder, self.digests, self.again = folder, dict(digests), again
        self.place = folder
        self._checked: dict[str, _State] = {}  # as they were when they were hashed
        self._trusted: dict[str, _State | None] = {}  # as they were when the caller vouched for them; None: not there
        held = _held(folder)
        if held is not None:
            self.place = Path(f"/proc/self/fd/{held}")
            weakref.finalize(self, os.close, held)

    def trust(self) -> None:
        """Take all files for what they should be, unread, as long as they stay as they are now."""
        self._trusted = {name: self._state(name) for name in self.digests}

    def check(self, name: str, *, trusting: bool = True) -> None:
        """Raise InputError unless a file has its digest. `trusting` False: even if the caller vouched for it."""
        state = self._state(name)
        if any(name in known and known[name] == state for known in (self._checked, self._trusted)[: 1 + trusting]):
            return
        if state is None:
            raise self._refused(name, f"{self.folder / name} not found: the package is incomplete")
        actual = sha256_file(self.place / name)
        if actual != self.digests[name]:
            differs = f"sha256 {actual[:12]}, not {self.digests[name][:12]}"
            raise self._refused(
                name, f"{name} does not match manifest.json ({differs}): the package was changed or damaged"
            )
        if self._state(name) == state:  # or it is being written: the next check reads it again
            self._checked[name] = state

    def check_mapped(self, name: str) -> None:
        """Raise InputError if a file that was checked, and mapped into memory, was written into since.

        One that took its name is no matter: what is mapped stays.
        """
        then, now = self._checked.get(name) or self._trusted.get(name), self._state(name)
        if then and now and now[:2] == then[:2] and now[2:4] != then[2:4]:
            self.check(name)

    def _refused(self, name: str, reason: str) -> InputError:
        if name in self._checked or name in self._trusted:
            return PackageChanged(f"{self.folder / name} was replaced or changed since it was opened: load it again")
        return InputError(f"{reason}; {self.again}")

    def _state(self, name: str) -> _State | None:
        """Return what tells a change of a file, or None if there is no regular file of that name."""
        try:
            found = os.stat(self.place / name)
        except (OSError, ValueError):  # ValueError: no name that a file can have
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _held(folder: Path) -> int | None:
    """Return a descriptor of a folder through which its files are found, or None where the system has no such thing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return None
    if os.path.isdir(f"/proc/self/fd/{descriptor}"):
        return descriptor
    os.close(descriptor)
    return None
