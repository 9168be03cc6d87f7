"""Compilers that fail in every way, and programs that do: one line each, nothing older taken for their work."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from m3vit.errors import InputError
from m3vit.hw.sim import compiler
from m3vit.hw.sim.compiler import built, kill_programs, run_program

pytestmark = pytest.mark.slow

Script = Callable[[str], Path]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Write a program of the shell and return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "my compiler"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    return write


def build(folder: Path) -> Path:
    """Build a program as test benches are built."""
    (folder / "main.cpp").write_text("int main() { return 0; }\n")
    with built(folder / "csim.exe", "building") as program:
        run_program([*compiler.compiler(), "main.cpp", "-o", program.name], folder, "building")
    return folder / "csim.exe"


def test_arguments_in_cxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
    monkeypatch.setenv("CXX", "g++ -O0 '-DNAME=\"a b\"'")
    assert compiler.compiler()[1:] == ["-O0", '-DNAME="a b"'] and os.path.isabs(compiler.find_compiler())
    assert build(tmp_path).stat().st_mode & 0o100
    path = script('exec g++ "$@"')  # with a space in its name
    for text in (str(path), f"'{path}' -O0", os.path.relpath(path)):
        monkeypatch.setenv("CXX", text)
        build(tmp_path).unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit 1", r"building failed: my compiler ended with exit code 1: it said nothing \(CXX is '.*my compiler'"),
        ("kill -9 $$", "my compiler was killed by SIGKILL, maybe for want of memory"),
        ("kill -11 $$", "my compiler was killed by SIGSEGV"),
        ("exit 0", "building made no program"),
        ("for n in 1 2 3 4 5; do echo line $n >&2; done; exit 4", r"exit code 4: line 3 \| line 4 \| line 5"),
        (
            "echo 'x.cpp:1: error: no' >&2; echo compilation terminated. >&2; exit 1",
            r"exit code 1: x\.cpp:1: error: no \(",
        ),
        (
            "printf 'Traceback (most recent call last):\\n  raise Error\\nException: no\\n' >&2; exit 1",
            r"exit code 1: Exception: no \(",
        ),
        ("printf '\\377error\\n' >&2; exit 1", "error"),
        ("cat; exit 5", "exit code 5"),  # reads its input: there is none, and nothing hangs
    ],
)
def test_failing_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script, text: str, message: str
) -> None:
    old = build(tmp_path).read_bytes()
    monkeypatch.setenv("CXX", str(script(text)))
    with pytest.raises(InputError, match=message) as refused:
        build(tmp_path)
    assert "set CXX to another C++ compiler" in str(refused.value)
    assert (tmp_path / "csim.exe").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["csim.exe", "main.cpp", "my compiler"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no-such-compiler", "CXX is 'no-such-compiler', which is not a program"),
        ("no-such-compiler -O2", "which is not a program"),
        ("g++ 'unfinished", "cannot be read as a command"),
        (" ", "which is not a program"),
        ("/", "which is not a program"),
    ],
)
def test_compilers_that_are_none(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv("CXX", value)
    with pytest.raises(InputError, match=message):
        compiler.find_compiler()


def test_programs_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "csim.exe").write_text("nonsense")
    with pytest.raises(InputError, match=r"the test bench failed: .*csim\.exe cannot be run \(Permission denied\)"):
        run_program([str(tmp_path / "csim.exe")], tmp_path, "the test bench")
    (tmp_path / "csim.exe").chmod(0o755)
    with pytest.raises(InputError, match=r"cannot be run \(Exec format error\)"):
        run_program([str(tmp_path / "csim.exe")], tmp_path, "the test bench")


def test_a_folder_without_leave_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InputError, match="is not writable, and a simulation is built in it: copy the project"):
        build(tmp_path)


def alive(pid: int) -> bool:
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("way", ["from outside", "SIGINT", "SIGTERM"])
def test_what_runs_ends_with_all_it_started(tmp_path: Path, script: Script, way: str) -> None:
    path = script("sleep 60 & echo $! > child; wait")
    failures: list[BaseException] = []

    def run() -> None:
        try:
            run_program([str(path)], tmp_path, "waiting")
        except BaseException as error:
            failures.append(error)

    def stop() -> None:
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().strip():
            time.sleep(0.01)
        time.sleep(0.5)  # the program runs, but who started it may not have come to wait for it
        if way == "from outside":
            kill_programs()
        else:
            os.kill(os.getpid(), getattr(signal, way))

    stopper = threading.Thread(target=stop)
    stopper.start()
    run()
    stopper.join()
    expected = {"from outside": InputError, "SIGINT": KeyboardInterrupt, "SIGTERM": SystemExit}
    assert isinstance(failures[0], expected[way])
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)
