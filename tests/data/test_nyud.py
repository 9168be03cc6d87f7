"""NYUD-v2: both releases against files in their exact formats, whole, broken and mixed up."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3vit.data.nyud import FOLDERS, NYUD, RELEASES
from m3vit.data.opening import open_split, recognise
from m3vit.data.tools.check import check
from m3vit.errors import InputError
from m3vit.label_sets import LABEL_SETS
from m3vit.tasks import IGNORE
from tests.data.layouts import NYUD_RELEASES, SIZE, coded, snapshot, unit_normals, write_nyud

TASKS = LABEL_SETS["nyud"].tasks
Damages = dict[str, Callable[[Path], object]]
BOTH = pytest.mark.parametrize("release", NYUD_RELEASES)


def file_of(root: Path, release: str, kind: str, name: str = "0003") -> Path:
    return root / FOLDERS[kind] / f"{name}{RELEASES[release][kind]}"


@BOTH
def test_a_sample(tmp_path: Path, release: str) -> None:
    split = NYUD(write_nyud(tmp_path, release), "train")
    assert (split.release, split.label_set, split.split, split.root) == (release, "nyud", "train", tmp_path)
    assert list(split.ids) == ["0003", "0001"] and len(split) == 2  # the order of the listing
    assert split.tasks == TASKS and split.kinds == ("image", *TASKS)
    sample = split.load(1)
    assert sample.id == "0001" and sample.image.dtype == np.uint8 and sample.image.shape == (*SIZE, 3)
    assert {task: (label.dtype, label.shape) for task, label in sample.labels.items()} == {
        "semseg": (np.uint8, SIZE),
        "depth": (np.float32, SIZE),
        "normals": (np.float32, (*SIZE, 3)),
        "edge": (np.uint8, SIZE),
    }
    assert all(label.flags.writeable for label in (sample.image, *sample.labels.values()))
    for kind in split.kinds:
        assert split.path(1, kind) == file_of(tmp_path, release, kind, "0001")
        np.testing.assert_array_equal(
            split.read(1, kind), sample.image if kind == "image" else sample.labels[kind], strict=True
        )


@BOTH
def test_label_conventions(tmp_path: Path, release: str) -> None:
    root = write_nyud(tmp_path, release)
    segmentation = np.ones(SIZE, np.uint8)
    segmentation[0, :3] = 0, 1, 40
    Image.fromarray(segmentation).save(file_of(root, release, "semseg"))
    depth = np.ones(SIZE, np.float32)
    depth[0, :2] = 0, 9.5
    np.save(file_of(root, release, "depth"), depth)
    normals = unit_normals(np.random.default_rng(1), SIZE)
    normals[0, :4] = [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]
    edge = np.zeros(SIZE, np.uint8)
    edge[0, :3] = 127, 128, 255
    if release == "NYUD_MT":
        np.save(file_of(root, release, "normals"), normals)
        np.save(file_of(root, release, "edge"), edge / np.float32(255))
    else:
        Image.fromarray(coded(normals)).save(file_of(root, release, "normals"))
        Image.fromarray(edge).save(file_of(root, release, "edge"))
    labels = NYUD(root, "train").load(0).labels
    assert labels["semseg"][0, :4].tolist() == [IGNORE, 0, 39, 0]
    assert labels["depth"][0, :3].tolist() == [0, 9.5, 1]
    assert labels["edge"][0, :4].tolist() == [0, 1, 1, 0]  # from half on
    assert not labels["normals"][0, 0].any()
    exact = release == "NYUD_MT"  # a code of 8 bits is off by at most 1 / 255 in each component
    np.testing.assert_allclose(labels["normals"][0, 1:4], np.eye(3), atol=1e-6 if exact else 1.5 / 255)
    np.testing.assert_allclose(np.linalg.norm(labels["normals"], axis=-1)[1:], 1, atol=1e-6)


def test_edge_truth_of_nyudv2_is_that_of_a_map_of_segments(tmp_path: Path) -> None:
    root = write_nyud(tmp_path, "NYUDv2")
    stored = np.zeros(SIZE, np.uint8)
    stored[:, 9] = 255
    Image.fromarray(stored).save(file_of(root, "NYUDv2", "edge"))
    truth = NYUD(root, "train").edge_truth(0)
    assert truth.dtype == np.bool_ and truth.shape == SIZE
    # The drawn column 9 and column 8, west of it, differ from their east neighbours: two columns, thinned to one.
    assert set(np.flatnonzero(truth.any(0))) <= {8, 9}
    assert truth.sum() in range(SIZE[0] - 2, SIZE[0] + 2)


def test_both_releases_have_the_same_edge_truth(tmp_path: Path) -> None:
    truths = [
        NYUD(write_nyud(tmp_path / release, release), "val", ("edge",)).edge_truth(0) for release in NYUD_RELEASES
    ]
    np.testing.assert_array_equal(truths[0], truths[1])
    assert truths[0].any()


@BOTH
def test_only_what_is_asked_for_is_needed(tmp_path: Path, release: str) -> None:
    root = write_nyud(tmp_path, release)
    for task in ("depth", "edge", "normals"):
        for path in (root / FOLDERS[task]).iterdir():
            path.unlink()
        (root / FOLDERS[task]).rmdir()
    for path in (root / "segmentation").iterdir():
        if path.stem != "0003":
            path.write_bytes(b"broken")
    split = open_split("nyud", root, "train", ("semseg",))
    assert split.release == release and list(split.load(0).labels) == ["semseg"]
    assert recognise(root) == ("nyud", release)
    assert NYUD(root, "train", ()).load(1).labels == {}
    with pytest.raises(InputError, match=r"depth not found: .* holds gt_sets/, images/, segmentation/"):
        NYUD(root, "train", ("depth",))


# --------------------------------------------------------------------------------------------------- damaged files


def damages(release: str) -> dict[tuple[str, str], Callable[[Path], object]]:
    """Return (kind, damage) -> what does it to the file of that kind."""
    png: Damages = {
        "16 bit": lambda path: Image.fromarray(np.zeros(SIZE, np.uint16)).save(path),
        "other shape": lambda path: Image.fromarray(np.zeros((SIZE[1], SIZE[0]), np.uint8)).save(path),
        "one column less": lambda path: Image.fromarray(np.zeros((SIZE[0], SIZE[1] - 1), np.uint8)).save(path),
    }
    rgb: Damages = {
        "16 bit": png["16 bit"],
        "other shape": lambda path: Image.fromarray(np.full((9, 9, 3), 255, np.uint8)).save(path),
        "grey": lambda path: Image.fromarray(np.zeros(SIZE, np.uint8)).save(path),
    }
    npy: Damages = {
        "text": lambda path: np.save(path, np.full(SIZE, "far")),
        "object": lambda path: np.save(path, np.array([[{"a": 1}]], dtype=object), allow_pickle=True),
        "one column less": lambda path: np.save(path, np.zeros((SIZE[0], SIZE[1] - 1), np.float32)),
        "one dimension": lambda path: np.save(path, np.zeros(SIZE[0] * SIZE[1], np.float32)),
        "nan": lambda path: np.save(path, np.full(SIZE, np.nan, np.float32)),
        "inf": lambda path: np.save(path, np.full(SIZE, np.inf, np.float32)),
        "negative": lambda path: np.save(path, np.full(SIZE, -1, np.float32)),
    }
    vectors: Damages = {
        "text": npy["text"],
        "flat": lambda path: np.save(path, np.zeros(SIZE, np.float32)),
        "other shape": lambda path: np.save(path, np.zeros((*SIZE[::-1], 3), np.float32)),
        "four channels": lambda path: np.save(path, np.zeros((*SIZE, 4), np.float32)),
        "nan": lambda path: np.save(path, np.full((*SIZE, 3), np.nan, np.float32)),
        "integers": lambda path: np.save(path, np.zeros((*SIZE, 3), np.uint8)),
    }
    every: Damages = {
        "empty": lambda path: path.write_bytes(b""),
        "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
        "junk": lambda path: path.write_bytes(b"not found\n" * 50),
    }
    new = release == "NYUDv2"
    table: dict[str, Damages] = {
        "image": {"16 bit": png["16 bit"]} if new else {},
        "semseg": {**png, "id 41": lambda path: Image.fromarray(np.full(SIZE, 41, np.uint8)).save(path)},
        "depth": npy,
        "normals": rgb if new else vectors,
        "edge": png if new else npy,
    }
    return {(kind, name): damage for kind, some in table.items() for name, damage in {**every, **some}.items()}


@pytest.mark.parametrize(
    ("release", "kind", "damage"), [(release, *key) for release in NYUD_RELEASES for key in damages(release)]
)
def test_a_damaged_file_is_named(tmp_path: Path, release: str, kind: str, damage: str) -> None:
    root = write_nyud(tmp_path, release)
    path = file_of(root, release, kind)
    damages(release)[kind, damage](path)
    split = NYUD(root, "train")
    with pytest.raises(InputError) as caught:
        split.load(0)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=path.name):
        split.read(0, kind)
    split.load(1)  # the others are not touched
    if kind == "edge":
        with pytest.raises(InputError, match=path.name):
            split.edge_truth(0)


@BOTH
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_missing_file_is_named(tmp_path: Path, release: str, kind: str) -> None:
    root = write_nyud(tmp_path, release)
    late, first = file_of(root, release, kind, "0001"), file_of(root, release, kind)
    late.unlink()
    split = NYUD(root, "train")
    with pytest.raises(InputError, match=rf"{late.name} not found"):
        split.load(1)
    first.unlink()
    folder = first.parent.name
    with pytest.raises(InputError, match=rf"{first.name} not found, though .* lists 2 images: .*{folder} holds 0002"):
        NYUD(root, "train")


def test_an_image_of_another_size(tmp_path: Path) -> None:
    root = write_nyud(tmp_path)
    path = file_of(root, "NYUD_MT", "image")
    Image.new("RGB", (16, 12)).save(path)
    with pytest.raises(InputError, match=r"0003\.png has shape \(24, 32\), its image \(12, 16\)"):
        NYUD(root, "train").load(0)


# ------------------------------------------------------------------------------------------- mixed and partial trees


def test_a_tree_of_both_releases(tmp_path: Path) -> None:
    root = write_nyud(write_nyud(tmp_path, "NYUD_MT"), "NYUDv2")
    words = (
        r"neither release of NYUD-v2, it holds images/ 3 jpg, 3 png; normals/ 3 npy, 3 png; edge/ 3 npy, 3 png\. "
        r"NYUD_MT has images/\*\.jpg, .*normals/\*\.npy.* NYUDv2 has images/\*\.png, "
    )
    for open_it in (lambda: NYUD(root, "train", ("normals", "edge")), lambda: recognise(root)):
        with pytest.raises(InputError, match=words.replace("images/ 3 jpg, 3 png; ", r"images/ 3 jpg, 3 png; .*")):
            open_it()


@pytest.mark.parametrize("kind", ["image", "normals", "edge"])
@BOTH
def test_one_folder_of_the_other_release(tmp_path: Path, release: str, kind: str) -> None:
    other = next(name for name in NYUD_RELEASES if name != release)
    root, spare = write_nyud(tmp_path / "a", release), write_nyud(tmp_path / "b", other)
    folder = root / FOLDERS[kind]
    for path in folder.iterdir():
        path.unlink()
    for path in (spare / FOLDERS[kind]).iterdir():
        path.rename(folder / path.name)
    ending = RELEASES[other][kind][1:]
    with pytest.raises(InputError, match=rf"neither release .* {FOLDERS[kind]}/ 3 {ending}"):
        NYUD(root, "train")
    if kind != "image":
        assert NYUD(root, "train", ("semseg", "depth")).release == release


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    root = write_nyud(tmp_path)
    for name in ("images/Thumbs.db", "edge/.DS_Store", "normals/readme.txt", "images/._0003"):
        (root / name).write_bytes(b"x")
    assert NYUD(root, "train").release == "NYUD_MT"


def test_an_empty_folder(tmp_path: Path) -> None:
    root = write_nyud(tmp_path)
    for path in (root / "edge").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"it holds images/ 3 jpg; .*edge/ none"):
        NYUD(root, "train")


def listing_error(root: Path, text: str | bytes, words: str) -> None:
    (root / "gt_sets" / "train.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words) as caught:
        NYUD(root, "train")
    assert "train.txt" in str(caught.value)


def test_listings(tmp_path: Path) -> None:
    root = write_nyud(tmp_path)
    (root / "gt_sets" / "train.txt").write_bytes("\ufeff0003\r\n\r\n0001".encode())  # as Windows' editor leaves it
    assert list(NYUD(root, "train").ids) == ["0003", "0001"]
    listing_error(root, "", "lists no image")
    listing_error(root, "\n \n", "lists no image")
    listing_error(root, "0003\n0001\n0003\n", "lists 0003 twice")
    for name in ("../0003", "a/b", "a\\b", "..", "0003 0001", "00\x0003", "a..b", "9" * 300):
        listing_error(root, f"0001\n{name}\n", "which is not an image's id")
    listing_error(root, b"\xff\xfe0\x003", "cannot be read")
    with pytest.raises(InputError, match=r"gt_sets/test\.txt not found: .*gt_sets has train, val"):
        NYUD(root, "test")
    with pytest.raises(InputError, match=r"not found: .*gt_sets has train, val"):
        NYUD(root, "../gt_sets/train")


def test_a_bad_root_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data root .*none not found"):
        NYUD(tmp_path / "none", "train")
    with pytest.raises(InputError, match=r"gt_sets holds no lists .* NYUD_MT or NYUDv2 .* it holds nothing"):
        NYUD(tmp_path, "train")
    root = write_nyud(tmp_path / "d")
    with pytest.raises(InputError, match="nyud has no labels for saliency"):
        NYUD(root, "train", ("saliency",))
    with pytest.raises(InputError, match="unknown task colour"):
        NYUD(root, "train", ("colour",))
    (root / "gt_sets" / "val.txt").unlink()
    with pytest.raises(InputError, match=r"val\.txt not found: .*gt_sets has train"):
        NYUD(root, "val")
    for path in sorted((root / "images").iterdir()):
        path.unlink()
    (root / "images").rmdir()
    with pytest.raises(InputError, match=r"images not found: .* holds depth/, edge/, gt_sets/, normals/, segment"):
        NYUD(root, "train")


@BOTH
def test_nothing_is_written(tmp_path: Path, release: str) -> None:
    root = write_nyud(tmp_path, release)
    before = snapshot(root)
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        for name in ("train", "val"):
            split = NYUD(root, name)
            for index in range(len(split)):
                split.load(index)
                split.edge_truth(index)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert snapshot(root) == before


@pytest.mark.parametrize("spelt", [".JPG", ".jpeg", ".Jpg"])
def test_another_spelling_of_an_ending_is_named(tmp_path: Path, make_data: Callable[..., Path], spelt: str) -> None:
    root = make_data(tmp_path / "data", train=2, val=1)
    for path in (root / "images").iterdir():
        path.rename(path.with_suffix(spelt))
    with pytest.raises(InputError, match=rf"images/ 3 {spelt[1:]}; .*rename \*{spelt}, for endings"):
        NYUD(root, "train")
    for path in (root / "images").iterdir():
        path.rename(path.with_suffix(".jpg" if path.stem != "0001" else spelt))
    with pytest.raises(InputError, match=f"0001.jpg not found: .*; 0001{spelt} is there, rename it"):
        NYUD(root, "train").load(1)
    report = check(root, workers=1)
    (problem,) = [found for found in report.problems if found.severity == "error"]
    assert problem.kind == "missing" and problem.message == f"not found, but 0001{spelt} is there: rename it"


def test_links_of_git_annex_and_dvc(tmp_path: Path, make_data: Callable[..., Path]) -> None:
    """Files may be links into a store of names without ending; where one was not fetched, that is said."""
    root, store = make_data(tmp_path / "data", train=2, val=1), tmp_path / "store"
    store.mkdir()
    for index, path in enumerate(sorted(path for path in root.rglob("*.*") if path.is_file())):
        path.rename(store / f"{index:x}")
        path.symlink_to(store / f"{index:x}")
    assert (
        NYUD(root, "train").load(0).image.shape == (32, 48, 3)
        and check(root, workers=1).to_dict()["counts"]["error"] == 0
    )
    (root / "depth" / "0001.npy").resolve().unlink()
    with pytest.raises(InputError, match=r"0001.npy not found: it is a link to .*git annex get, dvc pull"):
        NYUD(root, "train").load(1)
    (problem,) = [found for found in check(root, workers=1).problems if found.severity == "error"]
    assert problem.kind == "missing" and "dvc pull" in problem.message
    (root / "gt_sets" / "train.txt").resolve().unlink()
    with pytest.raises(InputError, match=r"train.txt is not a regular file \(.*dvc pull"):
        NYUD(root, "train")


@pytest.mark.parametrize("file", ["images/0001.jpg", "segmentation/0001.png", "depth/0001.npy"])
def test_pointers_in_place_of_files(tmp_path: Path, make_data: Callable[..., Path], file: str) -> None:
    root = make_data(tmp_path / "data", train=2, val=1)
    (root / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match=rf"{file} cannot be read \(it is a pointer of Git LFS.*git lfs pull\)"):
        NYUD(root, "train").load(1)
    (root / file).write_text("/annex/objects/SHA256E-s9--4d7a\n")  # an unlocked file of git-annex
    with pytest.raises(InputError, match=rf"{file} cannot be read \(it is a pointer of git-annex.*git annex get\)"):
        NYUD(root, "train").load(1)


def test_lists_that_are_no_files(tmp_path: Path, make_data: Callable[..., Path]) -> None:
    root = make_data(tmp_path / "data", train=2, val=1)
    (root / "gt_sets" / "train.txt").unlink()
    os.mkfifo(root / "gt_sets" / "train.txt")
    with pytest.raises(InputError, match=r"train.txt is not a regular file \(it is a pipe\)"):
        NYUD(root, "train")
    report = check(root, quick=True)
    assert "it is a pipe" in next(found.message for found in report.problems if found.kind == "missing_list")
    (root / "gt_sets" / "train.txt").unlink()
    (root / "gt_sets" / "train.txt").symlink_to("/dev/zero")
    assert "it is a device" in next(found.message for found in check(root, quick=True).problems)
