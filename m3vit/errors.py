"""The one exception that means "the user gave us something we cannot use", and words that its messages share."""

import errno
from pathlib import Path
from typing import Any, NamedTuple

# What a write fails with: errno -> what to do about it.
NO_WRITE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in the quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "name another place",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the mount",
}


class Defect(NamedTuple):
    """What is wrong with a file of a data set: one of m3vit.data.tools.check.PROBLEMS, words without the path."""

    path: Path
    kind: str
    words: str


class InputError(ValueError):
    """Bad input: a file, key or value of the user's.

    The message says what was given, what is allowed and what to do, on one line. The command line prints it
    and exits with code 2; any other exception is a defect of ours and keeps its traceback. `everywhere`: every process
    of a torchrun raises the same, and one of them printing it is enough. `defect`: what a reader found in a file.
    """

    def __init__(self, message: str, everywhere: bool = False, defect: Defect | None = None) -> None:
        super().__init__(message)
        self.everywhere, self.defect = everywhere, defect


class WriteError(InputError):
    """A file cannot be written: the disk is full, a limit is reached. See m3vit.files.writing."""


def short(value: Any, most: int = 120) -> str:
    """Return a value in an error's words, not pages of it."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) < most else f"{text[: most - 3]}..."


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, with the next one after a colon; its name if it has none."""
    lines = str(error).splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def one_line(error: BaseException, most: int | None = None) -> str:
    """Return an exception's text on one line, so many characters of it; its name if it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class UncheckedWarning(UserWarning):
    """A file carries no digest (m3vit.digests): whether it is as it was written cannot be told."""


def install(extra: str) -> str:
    """Return the command that brings an extra of pyproject.toml: m3vit is on no package index, but in its checkout."""
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install '.[{extra}]' in the checkout of m3vit (it is on no package index)"
