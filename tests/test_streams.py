"""Printing ends no command in a stack trace: other encodings, readers that have gone, full disks, closed streams."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from m3vit import streams
from m3vit.commands.terminal import print_scores
from m3vit.errors import WriteError
from m3vit.files import atomic_folder, atomic_path
from m3vit.training.board import Board

pytestmark = pytest.mark.process

MAIN = "import sys; from m3vit.cli import main; sys.exit(main(sys.argv[1:]))"
SCORES = (
    "from m3vit import cli; from m3vit.commands.terminal import print_scores, say\n"
    "def run(argv):\n"
    "    print_scores({'depth': {'torch': {'rmse': 1.0}}}, ['torch'], 'caf\\u00e9 \\u2026')\n"
    "    say('caf\\u00e9 \\u00d7 \\udcff.png')\n"
    "    return 0\n"
    "cli.run = run\n"
) + MAIN


def run(program: str, *words: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, capture_output=True, timeout=60, env=os.environ | variables, check=False)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"PYTHONIOENCODING": "utf-8"}, "caf\u00e9 \u00d7 ".encode() + b"\xff.png"),
        ({"PYTHONIOENCODING": "latin-1"}, b"caf\xe9 \xd7 \xff.png"),
        ({"PYTHONIOENCODING": "ascii"}, b"caf\\xe9 x \xff.png"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"caf\\xe9 x \xff.png"),
    ],
)
def test_every_encoding_gets_what_it_can_show(variables: dict[str, str], line: bytes) -> None:
    done = run(SCORES, **variables)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert line in done.stdout.splitlines()
    assert b"\\u25" not in done.stdout and b"rmse (m)" in done.stdout


@pytest.mark.parametrize("program", [MAIN, SCORES])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_gone_ends_a_command_quietly(program: str, buffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-c", program, "--help"]
    done = subprocess.run(
        words, stdout=writing, stderr=subprocess.PIPE, timeout=60, env=os.environ | {"PYTHONUNBUFFERED": buffered}
    )
    os.close(writing)
    assert done.returncode == 141 and not done.stderr, done.stderr
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", MAIN, "fly"], stdout=subprocess.PIPE, stderr=writing, timeout=60)
    os.close(writing)
    assert done.returncode == 141 and not done.stdout


def test_output_on_a_full_disk_is_named() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-c", MAIN, "--help"]
        for buffered, line in (
            ("", b"m3vit: error: standard output cannot be written (No space left on device)\n"),
            ("1", b"m3vit: error: No space left on device: make room there\n"),
        ):
            variables = os.environ | {"PYTHONUNBUFFERED": buffered}
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, timeout=60, env=variables)
            assert (done.returncode, done.stderr) == (2, line)


def test_closed_streams_are_no_error() -> None:
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(["sh", "-c", f"'{sys.executable}' -c '{MAIN}' --help {closed}"], timeout=60, check=False)
        assert done.returncode == 0


def test_streams_of_others_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    streams.prepare()
    print_scores({"depth": {"torch": {"rmse": 1.0}}}, ["torch"], "caption")
    assert "rmse (m) \u2193" in capsys.readouterr().out
    assert not streams.reader_is_gone() and not streams.are_stuck()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 40 KiB: what a full disk is to every library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


NOISE = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
WRITERS = {
    "torch": lambda path: torch.save({"a": torch.from_numpy(NOISE)}, path),
    "safetensors": lambda path: save_file({"a": torch.from_numpy(NOISE)}, path),
    "npy": lambda path: np.save(open(path, "wb"), NOISE),
    "npz": lambda path: np.savez_compressed(open(path, "wb"), a=NOISE),
    "png": lambda path: Image.fromarray(NOISE).save(path, "PNG"),
    "jpg": lambda path: Image.fromarray(NOISE).save(path, "JPEG", quality=95),
    "text": lambda path: path.write_text("x" * 100_000),
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_write_that_fails_names_the_file_the_cause_and_what_is_kept(
    library: str, tmp_path: Path, small_files: None
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(WriteError) as caught, atomic_path(path) as temporary:
        WRITERS[library](temporary)
    words = "the one of before is kept; raise the limit of a file's size (ulimit -f)"
    assert str(caught.value) == f"{path} cannot be written (File too large): {words}"
    with pytest.raises(WriteError, match=r"folder/in it cannot be written.*nothing is left of it"):
        with atomic_folder(tmp_path / "folder") as folder, atomic_path(folder / "in it") as temporary:
            WRITERS[library](temporary)
    with pytest.raises(WriteError, match=r"folder cannot be written.*nothing is left of it"):
        with atomic_folder(tmp_path / "folder") as folder:
            WRITERS[library](folder / "in it")
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_other_errors_within_a_write_stay_what_they_are(tmp_path: Path) -> None:
    for error in (KeyError("a"), BrokenPipeError(32, "Broken pipe"), FileNotFoundError(2, "No such file", "/none")):
        with pytest.raises(type(error)), atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise error
        with pytest.raises(type(error)), atomic_folder(tmp_path / "folder") as folder:
            (folder / "a").write_text("half")
            raise error
    assert not list(tmp_path.iterdir())


def test_event_files_tell_a_full_disk(tmp_path: Path, small_files: None) -> None:
    board = Board(tmp_path, first_step=1)
    with pytest.raises(WriteError, match=r"events\.out\.tfevents.*File too large.*earlier values are kept"):
        for step in range(1000):
            board.write({f"train/value{number}": 1.0 for number in range(10)}, step)
