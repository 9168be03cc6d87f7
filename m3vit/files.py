"""Files that are either wholly there or not there at all, and their hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from m3vit.errors import InputError
from m3vit.staging import PARTIAL, aside_of, hidden_stem, staging_folder


def is_empty(folder: Path) -> bool:
    """Return whether a folder is missing or holds nothing but half-written files of an earlier, killed attempt."""
    return not folder.exists() or all(PARTIAL in path.name for path in folder.iterdir())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on failure it is deleted.

    The rename is atomic and the data are flushed to disk first, so a kill at any moment leaves either the old
    file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for each target: what a kill leaves behind, the next write of the same file replaces.
    temporary = path.with_name(f"{hidden_stem(path.name)}{PARTIAL}{path.suffix}")
    try:
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
    Check before that nothing in `out` is worth keeping. SIGTERM is a failure like any other; what a SIGKILL leaves, the
    next `atomic_folder` in the same place removes, and after one between the two renames it brings the old folder back
    (`m3vit.staging`).
    """
    out = out.resolve()
    if Path.cwd().resolve().is_relative_to(out):
        raise InputError(f"{out} is the working directory or holds it, and would be replaced: give a folder in it")
    made = [above for above in out.parents if not above.exists()]  # from the inside out
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staging_folder(out) as folder:
            yield folder
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
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file, or raise InputError naming `what` the file is and how to get it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} not found: {what}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or an absurd number
        raise InputError(f"{path} is not readable JSON ({error}): {what}") from None


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
