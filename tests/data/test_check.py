"""The doctor: one defect at a time in tiny trees of each release, each found, named and nothing else; the command."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from m3vit.data.tools import check as check_module
from m3vit.data.tools.check import PROBLEMS, check, describe, render
from m3vit.errors import InputError
from tests.data.layouts import save_anno, save_label_map, snapshot, write_nyud, write_pascal

Cli = Callable[..., subprocess.CompletedProcess]
RELEASES = ("NYUD_MT", "NYUDv2", "PASCAL-Context")


def write(root: Path, release: str) -> Path:
    return write_pascal(root) if release == "PASCAL-Context" else write_nyud(root, release)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One clean tree of each release; read only."""
    return {release: write(tmp_path_factory.mktemp("clean") / release, release) for release in RELEASES}


@pytest.fixture
def copy(trees: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda release: Path(shutil.copytree(trees[release], tmp_path / release))


def found(root: Path, **options: Any) -> list[tuple[str, str, str, str]]:
    """Return what is wrong, but for the numbers of images, which are never those of a release here."""
    problems = check(root, workers=1, **options).problems
    return [(p.severity, p.kind, p.split, p.file) for p in problems if p.kind != "counts"]


@pytest.mark.parametrize("release", RELEASES)
def test_a_clean_tree_is_ok_and_stays_as_it_was(trees: dict[str, Path], release: str) -> None:
    before = snapshot(trees[release])
    calls: list[tuple[int, int]] = []
    report = check(trees[release], workers=1, progress=lambda done, total: calls.append((done, total)))
    assert snapshot(trees[release]) == before
    assert report.ok and found(trees[release]) == [] and calls[-1] == (3, 3)
    layout = "pascal" if release == "PASCAL-Context" else "nyud"
    assert (report.layout, report.release, report.origin) == (layout, release, None)
    published = {"pascal": (4998, 5105), "nyud": (795, 654)}[layout]
    assert report.splits == {
        "train": {"listed": 2, "whole": 2, "published": published[0]},
        "val": {"listed": 1, "whole": 1, "published": published[1]},
    }
    assert report.statistics["sizes"] == {"24x32": 3}
    text = render(report)
    assert text.splitlines()[0] == f"{release} (layout {layout}): {trees[release]}" and text.endswith("\nok")
    assert f"train 2 images, 2 whole (published: {published[0]})" in " ".join(text.split())


def test_workers_find_the_same(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = copy("NYUD_MT")
    (root / "depth" / "0001.npy").write_bytes(b"")
    (root / "edge" / "0002.npy").write_bytes(b"broken")
    monkeypatch.setattr(check_module, "SAMPLES_PER_JOB", 1)
    assert check(root, workers=2).to_dict() == check(root, workers=1).to_dict()


# --- files ----------------------------------------------------------------------------------------------------------

FILES = {
    "NYUD_MT": ("images/0001.jpg", "segmentation/0001.png", "depth/0001.npy", "normals/0001.npy", "edge/0001.npy"),
    "NYUDv2": ("images/0001.png", "segmentation/0001.png", "depth/0001.npy", "normals/0001.png", "edge/0001.png"),
    "PASCAL-Context": (
        "JPEGImages/2008_000001.jpg",
        "semseg/VOC12/2008_000001.png",
        "human_parts/2008_000001.mat",
        "sal_distill/2008_000001.png",
        "normals_distill/2008_000001.png",
        "pascal-context/trainval/2008_000001.mat",
    ),
}
ALL_FILES = [(release, file) for release, files in FILES.items() for file in files]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def overwrite(path: Path) -> None:
    path.write_bytes(b"<html>Quota exceeded</html>")


@pytest.mark.parametrize(("release", "file"), ALL_FILES)
@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (Path.unlink, "missing"),
        (lambda path: path.write_bytes(b""), "empty"),
        (cut, "unreadable"),
        (overwrite, "unreadable"),
    ],
    ids=["missing", "empty", "cut", "page"],
)
def test_each_file_missing_empty_or_damaged(
    copy: Callable[[str], Path], release: str, file: str, damage: Callable[[Path], None], kind: str
) -> None:
    root = copy(release)
    if file.startswith("semseg/"):  # else the other folder's file would do
        (root / file.replace("VOC12", "pascal-context")).unlink()
    damage(root / file)
    report = check(root, workers=1)
    assert found(root) == [("error", kind, "train", file)]
    assert not report.ok and report.splits["train"]["whole"] == 1 and report.splits["val"]["whole"] == 1
    quick = [("error", kind, "train", file)] if kind == "missing" else []
    assert found(root, quick=True) == quick
    assert f"train {file}: " in render(report) and f"error: {PROBLEMS[kind]}: 1" in render(report)


def png(array: np.ndarray, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(array).save(path, **options)


def npy(array: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.save(path, array)


def nan(shape: tuple[int, ...]) -> np.ndarray:
    array = np.ones(shape, np.float32)
    array[3, 4] = np.nan
    return array


ones = np.ones((24, 32), np.float32)
unit = np.dstack([0 * ones, 0 * ones, ones])
mask = np.ones((24, 32), bool)
WRONG: list[tuple[str, str, Callable[[Path], None], str, str]] = [
    # release, file, what is written there, kind of problem, words of the message
    (
        "NYUD_MT",
        "segmentation/0001.png",
        png(np.full((24, 32), 41, np.uint8)),
        "values",
        "expected ids 0..40, found 41",
    ),
    ("NYUD_MT", "segmentation/0001.png", png(np.full((24, 32), 7, np.uint16)), "values", "found 16 bits"),
    ("NYUD_MT", "segmentation/0001.png", png(np.zeros((24, 32, 3), np.uint8)), "values", "in one channel"),
    (
        "NYUD_MT",
        "segmentation/0001.png",
        png(np.zeros((24, 31), np.uint8)),
        "size",
        "has shape (24, 31), its image (24",
    ),
    ("NYUD_MT", "depth/0001.npy", npy(nan((24, 32))), "values", "not finite"),
    ("NYUD_MT", "depth/0001.npy", npy(-ones), "values", "expected depths of 0..100 m, found -1"),
    ("NYUD_MT", "depth/0001.npy", npy(ones * 5000), "values", "found 5000..5000"),
    ("NYUD_MT", "depth/0001.npy", npy(ones.astype(np.int64)), "values", "found int64"),
    ("NYUD_MT", "depth/0001.npy", npy(np.full((24, 32), "far")), "values", "found <U3"),
    ("NYUD_MT", "depth/0001.npy", npy(ones[:12]), "size", "has shape (12, 32)"),
    ("NYUD_MT", "depth/0001.npy", npy(unit), "values", "expected 2 dimensions"),
    ("NYUD_MT", "normals/0001.npy", npy(nan((24, 32, 3))), "values", "not finite"),
    ("NYUD_MT", "normals/0001.npy", npy(unit * 255), "values", "expected [H, W, 3] of unit vectors"),
    ("NYUD_MT", "normals/0001.npy", npy(unit.transpose(2, 0, 1)), "values", "expected [H, W, 3]"),
    ("NYUD_MT", "normals/0001.npy", npy(unit[:, :31]), "size", "has shape (24, 31, 3)"),
    ("NYUD_MT", "edge/0001.npy", npy(-ones), "values", "expected edges of 0..1"),
    ("NYUD_MT", "edge/0001.npy", npy(ones.T), "size", "has shape (32, 24)"),
    ("NYUDv2", "images/0001.png", png(np.zeros((24, 32), np.uint16)), "values", "expected 8 bits"),
    ("NYUDv2", "normals/0001.png", png(np.zeros((24, 32), np.uint8)), "values", "expected RGB"),
    ("NYUDv2", "edge/0001.png", png(np.zeros((24, 32, 3), np.uint8)), "values", "expected one channel"),
    ("NYUDv2", "edge/0001.png", png(np.zeros((48, 64), np.uint8)), "size", "has shape (48, 64)"),
    ("PASCAL-Context", "semseg/VOC12/2008_000001.png", png(np.full((24, 32), 21, np.uint8)), "values", "0..20 or 255"),
    ("PASCAL-Context", "semseg/VOC12/2008_000001.png", png(np.zeros((32, 24), np.uint8)), "size", "another picture"),
    ("PASCAL-Context", "normals_distill/2008_000001.png", png(np.zeros((24, 32), np.uint8)), "values", "expected RGB"),
    ("PASCAL-Context", "sal_distill/2008_000001.png", png(np.zeros((24, 32, 3), np.uint8)), "values", "one channel"),
    (
        "PASCAL-Context",
        "pascal-context/trainval/2008_000001.mat",
        lambda path: save_label_map(path, np.full((24, 32), 460)),
        "values",
        "expected class ids 0..459",
    ),
    (
        "PASCAL-Context",
        "pascal-context/trainval/2008_000001.mat",
        lambda path: scipy.io.savemat(path, {"labels": ones}),
        "unreadable",
        "it holds no LabelMap",
    ),
    (
        "PASCAL-Context",
        "human_parts/2008_000001.mat",
        lambda path: save_anno(path, "x", [("person", 15, mask, [("wing", mask)])]),
        "unreadable",
        "unknown part 'wing'",
    ),
    (
        "PASCAL-Context",
        "human_parts/2008_000001.mat",
        lambda path: save_anno(path, "x", [("person", 15, mask.T, [("hair", mask.T)])]),
        "size",
        "another picture",
    ),
]


@pytest.mark.parametrize(("release", "file", "damage", "kind", "words"), WRONG)
def test_wrong_types_values_and_sizes(
    copy: Callable[[str], Path], release: str, file: str, damage: Callable[[Path], None], kind: str, words: str
) -> None:
    root = copy(release)
    damage(root / file)
    assert found(root) == [("error", kind, "train", file)]
    (problem,) = [problem for problem in check(root, workers=1).problems if problem.severity == "error"]
    assert words in problem.message and str(root) not in problem.message and problem.id == Path(file).stem


def test_a_broken_image_does_not_hide_its_broken_labels(copy: Callable[[str], Path]) -> None:
    for release, image, label in (
        ("NYUD_MT", "images/0001.jpg", "depth/0001.npy"),
        ("PASCAL-Context", "JPEGImages/2008_000001.jpg", "sal_distill/2008_000001.png"),
    ):
        root = copy(release)
        cut(root / image)
        cut(root / label)
        assert found(root) == [("error", "unreadable", "train", image), ("error", "unreadable", "train", label)]


# --- lists and folders ----------------------------------------------------------------------------------------------


def lists(root: Path, split: str) -> Path:
    return root / ("ImageSets/Context" if "PASCAL" in root.name else "gt_sets") / f"{split}.txt"


@pytest.mark.parametrize("release", RELEASES)
def test_lists(copy: Callable[[str], Path], release: str) -> None:
    root = copy(release)
    train, val = lists(root, "train"), lists(root, "val")
    file = train.relative_to(root).as_posix()
    first, second = train.read_text().split()
    train.write_text(f"{first}\n{second}\n{first}\n")
    assert found(root) == [("error", "duplicate_id", "train", file)]
    train.write_text(f"{first}\n{second}\n../../{first}\n")
    assert found(root) == [("error", "bad_id", "train", file)]
    train.write_text(f"{first}\n{second}\nnobody\n")
    assert {problem[:3] for problem in found(root)} == {("error", "missing", "train")}
    assert len(found(root)) == len(FILES[release])
    train.write_text(f"{first}\n{second}\n")
    content = val.read_text()
    val.write_text(content + f"{second}\n")
    assert found(root) == [("error", "shared_id", "train", "")]
    val.write_text("\n")
    assert ("error", "missing_list", "val", val.relative_to(root).as_posix()) in found(root)
    val.write_bytes(b"\xff\xfe\x00")
    assert ("error", "missing_list", "val", val.relative_to(root).as_posix()) in found(root)
    val.unlink()
    assert ("error", "missing_list", "val", val.relative_to(root).as_posix()) in found(root)
    assert not check(root, workers=1).ok


@pytest.mark.parametrize("release", RELEASES)
def test_files_that_no_list_names_are_a_note(copy: Callable[[str], Path], release: str) -> None:
    root = copy(release)
    for file in FILES[release][:2]:
        shutil.copy(root / file, root / file.replace("0001.", "9999."))
    report = check(root, workers=1)
    folders = [Path(file).parent.as_posix() for file in FILES[release][:2]]
    assert sorted(found(root)) == sorted(("note", "orphan", "", f"{folder}/") for folder in folders)
    assert report.ok and "1 files that no list names, such as" in render(report)


def test_a_class_that_val_has_and_train_lacks_is_a_note(copy: Callable[[str], Path]) -> None:
    root = copy("NYUD_MT")
    for split, class_id in (("train", 0), ("val", 40)):
        for name in (root / "gt_sets" / f"{split}.txt").read_text().split():
            label = root / "segmentation" / f"{name}.png"
            stored = np.asarray(Image.open(label)).copy()
            stored[:2] = 40
            Image.fromarray(np.where(stored == 40, class_id, stored).astype(np.uint8)).save(label)
    (note,) = [problem for problem in check(root, workers=1).problems if problem.kind == "untrained"]
    assert (note.severity, note.file) == ("note", "segmentation/")
    assert "other_prop (" in note.message and "mIoU_trained" in note.message


@pytest.mark.parametrize("release", RELEASES)
def test_a_folder_that_is_missing_costs_its_task(copy: Callable[[str], Path], release: str) -> None:
    root = copy(release)
    folder = Path(FILES[release][-1]).parent.as_posix()
    shutil.rmtree(root / folder)
    assert found(root) == [("error", "missing_folder", "", f"{folder}/")]
    report = check(root, workers=1)
    lost = "edge and normals" if release == "PASCAL-Context" else "edge"
    assert f"{folder}/: not found: {lost} cannot be used" in render(report)
    assert "semseg" in report.statistics and "edge" not in report.statistics
    images = Path(FILES[release][0]).parent.as_posix()
    shutil.rmtree(root / images)
    report = check(root, workers=1)
    assert [problem.file for problem in report.problems if problem.severity == "error"] == [f"{images}/", f"{folder}/"]
    assert report.splits["train"]["whole"] == 0


def test_mixed_releases(copy: Callable[[str], Path]) -> None:
    root, other = copy("NYUD_MT"), copy("NYUDv2")
    shutil.copy(other / "edge" / "0001.png", root / "edge" / "0001.png")  # beside its .npy
    assert found(root) == [("error", "mixed_release", "", "edge/")]
    (root / "edge" / "0001.npy").unlink()
    shutil.copy(other / "normals" / "0002.png", root / "normals" / "0002.png")
    assert found(root) == [
        ("error", "mixed_release", "", "normals/"),
        ("error", "mixed_release", "", "edge/"),
        ("error", "missing", "train", "edge/0001.npy"),
    ]
    (problem, *_) = [p for p in check(root, workers=1).problems if p.kind == "mixed_release"]
    assert problem.message == "1 files that are not .npy, such as 0002.png"


def test_identical_images(copy: Callable[[str], Path]) -> None:
    root = copy("NYUD_MT")
    shutil.copy(root / "images" / "0001.jpg", root / "images" / "0003.jpg")  # both in train, 0003 before 0001
    assert found(root) == [("warning", "same_image", "train", "images/0001.jpg")]
    shutil.copy(root / "images" / "0001.jpg", root / "images" / "0002.jpg")
    report = check(root, workers=1)
    assert [(p.kind, p.id, p.message) for p in report.problems if p.severity == "warning"] == [
        ("same_image", "0001", "the same file as train 0003"),
        ("image_leak", "0002", "the same file as train 0003"),
    ]
    assert not report.ok and "not ok: 0 errors, 2 warnings" in render(report)


# --- statistics -----------------------------------------------------------------------------------------------------


def test_statistics(copy: Callable[[str], Path]) -> None:
    root = copy("NYUD_MT")
    for name in ("0001", "0002", "0003"):
        png(np.where(np.arange(32) < 8, 0, 5).astype(np.uint8)[None].repeat(24, 0))(root / f"segmentation/{name}.png")
        npy(np.where(np.arange(32) < 16, 0, 2.5).astype(np.float32)[None].repeat(24, 0))(root / f"depth/{name}.npy")
        npy(unit * (np.arange(24) < 6)[:, None, None])(root / f"normals/{name}.npy")
        npy((np.arange(24) == 0)[:, None].repeat(32, 1))(root / f"edge/{name}.npy")
    (root / "synthetic.json").write_text("{}")
    report = check(root, workers=1)
    figures = report.statistics
    assert figures["semseg"]["ids_present"] == [4] and figures["semseg"]["ignored_share"] == 0.25
    assert figures["semseg"]["pixel_shares"]["chair"] == 0.75
    same = {"images": 3, "blank_images": 0, "constant_images": 3}
    assert figures["depth"] == {**same, "invalid_share": 0.5, "max_m": 2.5, "reach_m": 2.5}
    assert figures["normals"] == {**same, "invalid_share": 0.75}
    assert figures["edge"] == {**same, "constant_images": 0, "positive_share": pytest.approx(1 / 24)}
    text = render(report)
    assert (
        "depth: 50.0 % invalid, up to 2.50 m, 95 % of an image's within 2.50 m (median)" in text
        and "semseg: 25.0 % ignored, 1 of 40 classes seen" in text
    )
    assert "rendered by m3vit data synth" in text, "never taken for the real one"


def test_images_without_a_person_are_counted(trees: dict[str, Path]) -> None:
    report = check(trees["PASCAL-Context"], workers=1)
    assert report.statistics["human_parts"]["images_without_person"] == 1  # the first of each split shows one
    assert report.statistics["human_parts"]["ids_present"] == [1, 6]
    assert "1 images without a person, ignored" in render(report)


# --- the command ----------------------------------------------------------------------------------------------------


def test_command(cli: Cli, copy: Callable[[str], Path], tmp_path: Path) -> None:
    root, file = copy("NYUD_MT"), tmp_path / "report.json"
    result = cli("data", "check", root, "--json", file, "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"NYUD_MT (layout nyud): {root}") and result.stdout.endswith("\nok\n")
    report = json.loads(file.read_text())
    assert list(report) == [
        "format",
        "version",
        "root",
        "layout",
        "release",
        "origin",
        "quick",
        "splits",
        "problems",
        "statistics",
        "counts",
        "ok",
    ]
    assert (report["format"], report["version"], report["ok"]) == ("m3vit-data-check", 1, True)
    assert report["counts"] == {"error": 0, "warning": 0, "note": 2}

    for name in ("0001", "0002", "0003"):
        (root / "depth" / f"{name}.npy").write_bytes(b"")
    (root / "images" / "0002.jpg").unlink()
    result = cli("data", "check", root, "--json", file)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    report = json.loads(file.read_text())
    assert report["problems"][0] == {
        "severity": "error",
        "kind": "missing",
        "split": "val",
        "id": "0002",
        "file": "images/0002.jpg",
        "message": "not found",
    }
    assert report["counts"]["error"] == 4 and report["ok"] is False and report["splits"]["train"]["whole"] == 0
    result = cli("data", "check", root, "--quick")
    assert result.returncode == 1 and "files that are not there: 1" in result.stdout


def test_command_on_what_is_no_data_set(cli: Cli, trees: dict[str, Path], tmp_path: Path) -> None:
    for words, message in (
        ([tmp_path / "none"], "not found"),
        ([tmp_path], "is no data set: it holds nothing"),
        ([trees["NYUDv2"].parent], "is no data set, but holds one: give "),
        ([trees["NYUDv2"], "--workers", "0"], "give a positive whole number"),
        ([], "the following arguments are required: ROOT"),
    ):
        result = cli("data", "check", *words)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_extract_says_what_came_out(cli: Cli, trees: dict[str, Path], tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "NYUDv2"), "gztar", trees["NYUDv2"].parent, "NYUDv2")
    result = cli("data", "extract", archive, "--out", tmp_path / "data")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"NYUDv2 with 2 train and 1 val images: {tmp_path / 'data' / 'NYUDv2'}"
    assert snapshot(tmp_path / "data" / "NYUDv2").keys() == snapshot(trees["NYUDv2"]).keys()
    result = cli("data", "extract", archive, "--out", tmp_path / "data")
    assert result.returncode == 2 and "is not empty" in result.stderr


def test_describe(copy: Callable[[str], Path], tmp_path: Path) -> None:
    root = copy("PASCAL-Context")
    assert describe(root) == "PASCAL-Context with 2 train and 1 val images"
    (root / "JPEGImages" / "2008_000001.jpg").unlink()
    assert describe(root).endswith("images, 1 problems (m3vit data check tells which)")
    assert describe(tmp_path / "none").startswith("not a data set (")
    with pytest.raises(InputError, match="holds the folders of nyud and of pascal"):
        (root / "gt_sets").mkdir()
        check(root)
