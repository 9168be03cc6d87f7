"""`m3vit data check` on a folder with a data.yaml, and on the tasks that are used alone."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3vit.data.own.layout import Folder
from m3vit.data.tools.check import PROBLEMS, check, render
from m3vit.errors import InputError
from tests.command_line import kept_state
from tests.data.layouts import snapshot, write_nyud, write_pascal
from tests.data.own import BARE, DESCRIPTION, write_own

Cli = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    with kept_state():
        yield


def found(root: Path, **options: Any) -> list[tuple[str, str, str]]:
    problems = check(root, workers=1, **options).problems
    assert {problem.kind for problem in problems} <= set(PROBLEMS)
    return [(p.severity, p.kind, p.message) for p in problems]


def test_a_good_folder_is_ok_and_stays_as_it_was(tmp_path: Path) -> None:
    root = write_own(tmp_path / "own")
    before = snapshot(root)
    report = check(root, workers=1)
    assert snapshot(root) == before and report.ok and report.layout == "folder"
    assert [(p.kind, BARE in p.message) for p in report.problems] == [("no_label", True)]
    assert {split: counts["listed"] for split, counts in report.splits.items()} == {"train": 8, "val": 3}
    labelled = [report.splits[split]["labelled"] for split in ("train", "val")]
    assert sum(counts["semseg"] for counts in labelled) == 8 and sum(counts["depth"] for counts in labelled) == 7
    text = render(report)
    assert "with a label of semseg" in text and "3 of 3 classes seen" in text
    assert 0 < report.statistics["depth"]["reach_m"] < 20


def test_everything_wrong_is_told_at_once(tmp_path: Path, cli: Cli) -> None:
    root = write_own(tmp_path / "own", DESCRIPTION.replace("leave_out", "refuse"))
    (root / "photos" / "img_02.png").write_bytes((root / "photos" / "img_02.JPG").read_bytes())
    Image.fromarray(np.full((33, 46), 9, np.uint8)).save(root / "masks" / "img_01.png")
    Image.fromarray(np.full((9, 9), 1, np.uint8)).save(root / "masks" / "img_03.png")
    (root / "depth_mm" / "img_04.png").write_bytes(b"")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "masks" / "nobody.png")
    kinds = {kind: message for severity, kind, message in found(root) if severity == "error"}
    assert kinds.keys() == {"two_files", "no_label", "empty", "values", "size"}
    assert "its ids 9 are neither in classes" in kinds["values"] and BARE in kinds["no_label"]
    assert ("warning", "orphan", "1 labels of semseg without an image of their id: masks/nobody.png") in found(root)
    result = cli("data", "check", root, "--json", tmp_path / "report.json", "--workers", 1)
    assert result.returncode == 1 and "not ok: 5 errors" in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["counts"]["error"] == 5


def test_a_data_yaml_that_cannot_be_read_is_told(tmp_path: Path, cli: Cli) -> None:
    root = write_own(tmp_path / "own", DESCRIPTION.replace("files: masks", "file: masks").replace("[7]", "[0]"))
    result = cli("data", "check", root, "--quick")
    assert result.returncode == 1
    assert "line 6: tasks.semseg.file is no key here: did you mean files?" in result.stdout
    assert "line 8: tasks.semseg.ignore has 0, which is sky above" in result.stdout


def test_names_that_cannot_be_printed_are_quoted(tmp_path: Path, cli: Cli) -> None:
    root = write_own(tmp_path / "own")
    (root / "photos" / "a\nb.txt").write_text("")
    (root / "photos" / os.fsdecode(b"\xff.txt")).write_text("")
    result = cli("data", "check", root, "--quick")
    assert "2 files that no pattern takes: 'photos/a\\nb.txt', 'photos/\\udcff.txt'" in result.stdout


def test_a_split_without_a_label_is_not_mended_by_leaving_images_out(tmp_path: Path) -> None:
    root = write_own(tmp_path / "own", DESCRIPTION.replace("val: 0.3", "val: 0.99"))
    with pytest.raises(InputError, match="no image of train has a label of depth") as caught:
        Folder(root, "train")
    assert "leave_out" not in str(caught.value)


def test_only_the_tasks_that_are_used_are_looked_at(tmp_path: Path, cli: Cli) -> None:
    root = write_own(tmp_path / "own")
    for path in (root / "depth_mm").iterdir():
        path.write_bytes(b"no picture")
    assert any(kind == "unreadable" for _, kind, _ in found(root))
    assert not any(severity == "error" for severity, *_ in found(root, tasks=["semseg"]))
    result = cli("data", "check", root, "--tasks", "semseg", "--workers", 1)
    assert result.returncode == 0 and "depth" not in result.stdout
    assert cli("data", "check", root, "--tasks", "semseg,edge").returncode == 2
    with pytest.raises(InputError, match=r"--tasks names edge: those of .* are semseg, depth"):
        check(root, tasks=["edge"])


def test_of_a_published_data_set_too(tmp_path: Path) -> None:
    root = write_nyud(tmp_path / "nyud")
    (root / "depth" / "0001.npy").unlink()
    for path in (root / "edge").iterdir():
        path.unlink()
    (root / "edge").rmdir()
    kinds = {kind for severity, kind, _ in found(root) if severity == "error"}
    assert kinds == {"missing", "missing_folder"}
    assert not [one for one in found(root, tasks=["semseg", "normals"]) if one[0] == "error"]
    report = check(root, tasks=["semseg"], workers=1)
    assert "semseg" in report.statistics and "normals" not in report.statistics
    pascal = write_pascal(tmp_path / "pascal")
    assert {"normals", "edge"} <= check(pascal, tasks=["normals"], workers=1).statistics.keys()  # it needs their files
