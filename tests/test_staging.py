"""What stopped writers leave is cleaned by themselves or by the next one; what is being written is left alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from m3vit.errors import InputError
from m3vit.files import atomic_folder, atomic_path
from m3vit.staging import LOCK, OLD, PARTIAL, clean_leftovers, sigterm_as_exit

pytestmark = pytest.mark.process

WRITER = """
import sys, time
from pathlib import Path
from m3vit.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def write(out: Path, text: str) -> None:
    with atomic_folder(out) as folder:
        (folder / "file").write_text(text)


def start_writer(out: Path) -> subprocess.Popen:
    """Start a process that is half way through a folder."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_sigterm_cleans_at_once_and_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    writer = start_writer(tmp_path / "out")
    assert len(names(tmp_path)) == 3
    writer.terminate()
    assert writer.wait(10) == 128 + signal.SIGTERM
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "old"


@pytest.mark.parametrize("next_one", ["out", "other"])
def test_sigkill_is_cleaned_by_the_next_writer_there(tmp_path: Path, next_one: str) -> None:
    writer = start_writer(tmp_path / "out")
    writer.kill()
    writer.wait()
    assert [name for name in names(tmp_path) if name.endswith(PARTIAL)]
    write(tmp_path / next_one, "new")
    assert names(tmp_path) == [next_one]


def test_what_a_live_process_writes_is_left_alone(tmp_path: Path) -> None:
    writer = start_writer(tmp_path / "out")
    before = names(tmp_path)
    write(tmp_path / "out", "ours")
    assert names(tmp_path) == sorted([*before, "out"])
    writer.terminate()
    writer.wait(10)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "file").read_text() == "ours"


def test_two_writers_in_one_process(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "one") as first:
        write(tmp_path / "two", "2")
        (first / "file").write_text("1")
    assert names(tmp_path) == ["one", "two"] and (tmp_path / "one" / "file").read_text() == "1"


@pytest.mark.parametrize("there", [True, False])
def test_killed_between_the_renames_the_old_folder_comes_back(tmp_path: Path, there: bool) -> None:
    hidden = tmp_path / f".out.0a1b2c3d{PARTIAL}"
    for folder in (hidden, tmp_path / (hidden.name + OLD), *([tmp_path / "out"] if there else [])):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    (tmp_path / (hidden.name + LOCK)).write_text("out")  # of a process that is no more
    clean_leftovers(tmp_path)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == ("out" if there else hidden.name + OLD)


def test_a_lock_that_names_a_folder_elsewhere_moves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    hidden = tmp_path / "in" / f".out.0a1b2c3d{PARTIAL}"
    (tmp_path / "in" / (hidden.name + OLD)).mkdir()
    (tmp_path / "in" / (hidden.name + LOCK)).write_text("../escaped")
    clean_leftovers(tmp_path / "in")
    assert names(tmp_path) == ["in"] and names(tmp_path / "in") == []


def test_other_hidden_things_stay(tmp_path: Path) -> None:
    for name in (".out.abcd1234", f".out.abcd1234{PARTIAL}", ".git", f"notes{PARTIAL}{LOCK}"):
        (tmp_path / name).mkdir()
    (tmp_path / f".link{PARTIAL}{LOCK}").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / f".fifo{PARTIAL}{LOCK}")
    before = names(tmp_path)
    write(tmp_path / "out", "new")
    assert set(before) - set(names(tmp_path)) <= {f".fifo{PARTIAL}{LOCK}"}


def test_names_as_long_as_file_systems_allow(tmp_path: Path) -> None:
    for name in ("n" * 255, "ü" * 127):
        write(tmp_path / name, "long")
        with atomic_path(tmp_path / name / "f") as path:
            path.write_text("")
        with atomic_path(tmp_path / name / ("f" * 255)) as path:
            path.write_text("")
    assert len(names(tmp_path)) == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(InputError, match=r"cannot write beside .*out \(Permission denied\)"):
        write(tmp_path / "out", "new")


def test_a_full_disk_is_named_and_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:  # empty files can still be made
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InputError, match=r"cannot write beside .*out \(No space left on device\): make room there"):
        write(tmp_path / "out", "new")
    assert names(tmp_path) == []


def test_sigterm_stays_as_somebody_set_it(tmp_path: Path) -> None:
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with sigterm_as_exit():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]
    with pytest.raises(SystemExit) as stopped, sigterm_as_exit():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
