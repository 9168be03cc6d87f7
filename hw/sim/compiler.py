"""The C++ compiler that simulates, and the programs it makes: found, run, and stopped. No torch."""

import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from m3vit.errors import InputError
from m3vit.files import atomic_path
from m3vit.staging import sigterm_as_exit

SHOWN_LINES = 3  # of what a failed program said
_running: set[subprocess.Popen] = set()
_lock = threading.Lock()


def find_compiler() -> str:
    """Return the program of `compiler()`."""
    return compiler()[0]


def compiler() -> list[str]:
    """Return the C++ compiler: the environment's CXX, with its arguments if it has some, else g++; an absolute path.

    Raises InputError if there is none.
    """
    wanted = os.environ.get("CXX") or "g++"
    words = [wanted]
    if shutil.which(wanted) is None:
        try:
            words = shlex.split(wanted)
        except ValueError as error:
            raise InputError(f"CXX is {wanted!r}, which cannot be read as a command ({error})") from None
    path = shutil.which(words[0]) if words else None
    if path is None:
        if wanted != "g++":
            raise InputError(f"CXX is {wanted!r}, which is not a program: set it to a C++ compiler or unset it")
        raise InputError("no g++ found: install it (apt-get install g++) or set CXX to a C++ compiler")
    return [os.path.abspath(path), *words[1:]]


def run_program(command: list[str], folder: Path, what: str, env: dict[str, str] | None = None) -> str:
    """Run a program in a folder and return what it printed; `what` it does, for people. It gets no input.

    Raises InputError, with the end of what it said, if it cannot be started, fails or is killed. A program whose caller
    is interrupted is killed, with all it has started.
    """
    started: list[subprocess.Popen] = []
    with sigterm_as_exit():
        try:
            started.append(_start(command, folder, what, env))
            (process,) = started
            out, errors = process.communicate()
        except BaseException:
            for process in started:
                _kill(process)
            raise
        finally:
            with _lock:
                _running.difference_update(started)
    if process.returncode == 0:
        return str(out)
    raise InputError(f"{what} failed: {_ending(command, process.returncode, errors + out)}")


def _start(command: list[str], folder: Path, what: str, env: dict[str, str] | None) -> subprocess.Popen:
    """Start a program in a session of its own: a compiler is several processes, and all are to end."""
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise InputError(f"{what} failed: {command[0]} cannot be run ({error.strerror})") from None
    with _lock:
        _running.add(process)
    return process


def kill_programs() -> None:
    """Kill every program that `run_program` runs now, in any thread, with all it has started."""
    with _lock:
        for process in _running:
            _kill(process)


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _ending(command: list[str], code: int, text: str) -> str:
    """Return how a program ended and what it said of it: lines with the word error, else the last ones."""
    python = "Traceback (most" in text  # hls4ml's, of whose stack only the last line says something
    shown = [line for line in text.splitlines() if not (python and line.startswith(("  ", "Traceback")))]
    lines = [line.strip() for line in shown if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    said = " | ".join(telling[:SHOWN_LINES] or lines[-SHOWN_LINES:]) or "it said nothing"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = ", maybe for want of memory" if name == "SIGKILL" else ""
        return f"{Path(command[0]).name} was killed by {name}{memory}: {said}"
    return f"{Path(command[0]).name} ended with exit code {code}: {said}"


def require_writable(*folders: Path) -> None:
    """Raise InputError unless programs and results can be written into these folders of a project."""
    for folder in folders:
        if not os.access(folder, os.W_OK):
            raise InputError(f"{folder} is not writable, and a simulation is built in it: copy the project elsewhere")


@contextmanager
def built(path: Path, what: str) -> Iterator[Path]:
    """Yield where a compiler is to write a program, which gets the name `path` once it is there.

    So a compiler that makes nothing leaves no older program to be taken for the new one. Raises InputError for it and
    for a folder that cannot be written; those of `run_program` within get the compiler's name.
    """
    require_writable(path.parent)
    with atomic_path(path) as temporary:
        temporary.unlink(missing_ok=True)
        with advising():
            yield temporary
            if not temporary.is_file():
                raise InputError(f"{what} made no program")


@contextmanager
def advising() -> Iterator[None]:
    """Add to an InputError raised within which compiler it was, and what to do."""
    try:
        yield
    except InputError as error:
        named = f"CXX is {os.environ['CXX']!r}" if os.environ.get("CXX") else "the compiler is g++"
        raise InputError(f"{error} ({named}: set CXX to another C++ compiler)") from None
