"""Artefacts are wholly there or not at all, whatever stops the writing."""

import os
from pathlib import Path

import pytest

from m3vit.errors import InputError
from m3vit.files import atomic_folder, atomic_path, is_empty


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
