"""Standard output and error: whatever they are, printing to them ends no command in a stack trace. No torch.

- A terminal or file of another encoding than UTF-8 gets plain signs for those of ours, and others escaped; a file name
  that is no UTF-8 (its bytes come as surrogates) is printed as its bytes.
- A pipe whose reader has gone (`| head`) ends the command quietly, with the exit code that the shell gives a program
  killed by SIGPIPE.
- Standard streams that are closed (`>&-`) are replaced by nothing: the next file opened would get their place.
"""

import codecs
import os
import select
import sys
from contextlib import suppress
from typing import IO

PIPE_CLOSED = 128 + 13  # SIGPIPE
# Of the signs in our own texts.
_PLAIN = {
    "\u2191": "^",
    "\u2193": "v",
    "\u00b1": "+-",
    "\u00d7": "x",
    "\u2013": "-",
    "\u2212": "-",
    "\u2026": "...",
    "\u2019": "'",
    "\u00b7": ".",
    "\u0394": "D",
    "\u2265": ">=",
    "\u2264": "<=",
    "\u2192": "->",
}


def prepare() -> None:
    """Make the standard streams safe to print to."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    codecs.register_error("m3vit", _encode)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not what a notebook or a test puts in their place
            with suppress(ValueError):  # closed
                stream.reconfigure(errors="m3vit")


def _encode(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = []
    for sign in error.object[error.start : error.end]:
        if 0xDC80 <= ord(sign) <= 0xDCFF:
            parts.append(bytes([ord(sign) - 0xDC00]))
        else:
            parts.append(_plain(sign).encode("ascii"))
    return b"".join(parts), error.end


def _plain(sign: str) -> str:
    if 0x2500 <= ord(sign) <= 0x257F:  # lines of tables
        return "-" if sign in "\u2500\u2501\u2550" else "|" if sign in "\u2502\u2503\u2551" else "+"
    return _PLAIN.get(sign, ascii(sign)[1:-1])


def flush() -> None:
    """Write what is buffered now: at the interpreter's end nobody could catch what fails."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def are_stuck() -> bool:
    """Return whether standard output or error takes no more: what it did not take is still buffered."""
    try:
        flush()
    except OSError:
        return True
    return reader_is_gone()


def reader_is_gone() -> bool:
    """Return whether standard output or error is a pipe that nobody reads any more."""
    return any(_is_broken(stream) for stream in (sys.stdout, sys.stderr))


def _is_broken(stream: IO[str]) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are always told
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no file
        return False


def discard() -> None:
    """Send what is still buffered, and all that follows, to nowhere."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        with suppress(OSError, ValueError):
            stream.flush()
            continue
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
