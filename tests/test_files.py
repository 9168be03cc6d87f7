"""Artefacts are wholly there or not at all, whatever stops the writing."""

import os
import socket
from pathlib import Path

import pytest

from m3vit.errors import InputError
from m3vit.files import atomic_folder, atomic_path, is_empty, not_there, read_bounded, read_json, read_text, sha256_file


def fill(folder: Path, text: str) -> None:
    (folder / "file").write_text(text)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_what_a_kill_leaves_is_reused_by_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_path(path) as temporary:
        leftover = temporary
        temporary.write_text("one")
    leftover.write_text("half")  # as a kill would leave it
    assert not is_empty(tmp_path)
    with atomic_path(path) as temporary:
        temporary.write_text("two")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "two"


def test_a_folder_with_only_half_written_files_counts_as_empty(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt") as temporary:
        name = temporary.name
        raise RuntimeError
    (tmp_path / name).write_text("half")
    assert is_empty(tmp_path) and is_empty(tmp_path / "none")


def test_folder_is_replaced_or_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        fill(folder, "one")
    with atomic_folder(out) as folder:
        fill(folder, "two")
    assert (out / "file").read_text() == "two"
    with pytest.raises(KeyboardInterrupt), atomic_folder(out) as folder:
        fill(folder, "three")
        raise KeyboardInterrupt
    assert (out / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_folders_above_are_removed_after_a_failure_if_they_were_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    out = tmp_path / "there" / "new" / "newer" / "out"
    with pytest.raises(KeyboardInterrupt), atomic_folder(out) as folder:
        fill(folder, "x")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]
    with pytest.raises(KeyboardInterrupt), atomic_folder(out):
        (tmp_path / "there" / "new" / "other").write_text("another program's")
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "there").rglob("*")] == ["new", "other"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_between_the_renames_the_old_folder_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        fill(folder, "old")
    replace, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(error), atomic_folder(out) as folder:
        fill(folder, "new")
    assert (out / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for out in (Path("."), Path("..")):
        with pytest.raises(InputError, match="working directory"), atomic_folder(out):
            pass


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """Nothing waits for a pipe's writer or reads a device without end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, words in (
            ("pipe", "it is a pipe"),
            ("zero", "it is a device"),
            ("null", "it is a device"),
            ("socket", "it is a socket"),
            ("folder", "Is a directory"),
        ):
            for reader in (read_json, read_text):
                with pytest.raises(
                    InputError, match=rf"{name} cannot be read \({words}, not a regular file\): give it"
                ):
                    reader(tmp_path / name, "give it")
            for read in (read_bounded, sha256_file):
                with pytest.raises(OSError, match="not a regular file"):
                    read(tmp_path / name)


def test_what_is_read_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes"):
        read_bounded(path, 4)
    with open(path, "wb") as file:
        file.truncate(1 << 33)  # holes take no disk
    with pytest.raises(InputError, match=r"it has more than 16777216 bytes"):
        read_json(path, "give it")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b"9" * 5000, "not readable JSON"),  # more digits than Python turns into a number
        (b"\xff\xfe", "not readable as text"),
        (b"", "not readable JSON"),
    ],
)
def test_damaged_json_is_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_json(tmp_path / "a", "give it")


def test_what_is_not_there_says_why(tmp_path: Path) -> None:
    assert not_there(tmp_path / "a") == "not found"
    (tmp_path / "a").symlink_to(".git/annex/objects/KEY")
    with pytest.raises(InputError, match=r"link to \.git/annex/objects/KEY, which is not there \(fetch it: git annex"):
        read_json(tmp_path / "a", "give it")
    (tmp_path / "b").write_text("\ufeff{}", encoding="utf-8")
    assert read_json(tmp_path / "b", "") == {}


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "private") as path:
        path.touch(0o600)  # as safetensors leaves it
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with atomic_path(tmp_path / "program") as path:
        path.touch(0o755)
    assert os.access(tmp_path / "program", os.X_OK)
