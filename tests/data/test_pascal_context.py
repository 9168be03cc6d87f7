"""PASCAL-Context against files in its exact format, whole and broken; opening either layout."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.ndimage
from numpy.typing import NDArray
from PIL import Image

from m3vit.data.opening import open_split, recognise
from m3vit.data.pascal_context import PARTS, PASCALContext, context_classes, normals_classes
from m3vit.data.thinning import segmentation_boundaries, thin
from m3vit.errors import InputError
from m3vit.label_sets import LABEL_SETS, PART_CLASSES
from m3vit.tasks import IGNORE
from tests.data.layouts import (
    SIZE,
    Person,
    coded,
    save_anno,
    save_label_map,
    save_palette_png,
    snapshot,
    unit_normals,
    write_nyud,
    write_pascal,
)

TASKS = LABEL_SETS["pascal"].tasks
FIRST = "2008_000003"
FILES = {
    "image": "JPEGImages/{}.jpg",
    "semseg": "semseg/VOC12/{}.png",
    "human_parts": "human_parts/{}.mat",
    "saliency": "sal_distill/{}.png",
    "normals": "normals_distill/{}.png",
    "edge": "pascal-context/trainval/{}.mat",
}


def file_of(root: Path, kind: str, name: str = FIRST) -> Path:
    return root / FILES[kind].format(name)


def test_a_sample(tmp_path: Path) -> None:
    split = PASCALContext(write_pascal(tmp_path), "train")
    assert (split.release, split.label_set, split.split, split.root) == ("PASCAL-Context", "pascal", "train", tmp_path)
    assert list(split.ids) == ["2008_000003", "2008_000001"] and len(split) == 2  # the order of the listing
    assert split.tasks == TASKS and split.kinds == ("image", *TASKS)
    sample = split.load(0)
    assert sample.id == FIRST and sample.image.dtype == np.uint8 and sample.image.shape == (*SIZE, 3)
    assert {task: (label.dtype, label.shape) for task, label in sample.labels.items()} == {
        "semseg": (np.uint8, SIZE),
        "human_parts": (np.uint8, SIZE),
        "saliency": (np.uint8, SIZE),
        "normals": (np.float32, (*SIZE, 3)),
        "edge": (np.uint8, SIZE),
    }
    assert all(label.flags.writeable for label in (sample.image, *sample.labels.values()))
    for kind in split.kinds:
        assert split.path(0, kind) == file_of(tmp_path, kind)
        np.testing.assert_array_equal(
            split.read(0, kind), sample.image if kind == "image" else sample.labels[kind], strict=True
        )


# ----------------------------------------------------------------------------------------------------- conventions


def test_semseg_is_the_palette_index(tmp_path: Path) -> None:
    root = write_pascal(tmp_path)
    ids = np.resize(np.array([*range(21), 255], np.uint8), SIZE)
    save_palette_png(file_of(root, "semseg"), ids)
    np.testing.assert_array_equal(PASCALContext(root, "train").read(0, "semseg"), ids)


def test_semseg_outside_voc12_is_in_the_other_folder(tmp_path: Path) -> None:
    root = write_pascal(tmp_path)
    split = PASCALContext(root, "val", ("semseg",))
    other = root / "semseg" / "pascal-context" / "2009_000002.png"
    assert split.path(0, "semseg") == other
    np.testing.assert_array_equal(split.load(0).labels["semseg"], np.asarray(Image.open(other)))
    ids = np.full(SIZE, 7, np.uint8)
    save_palette_png(file_of(root, "semseg", "2009_000002"), ids)  # VOC12 comes first
    np.testing.assert_array_equal(split.read(0, "semseg"), ids)
    shutil.rmtree(root / "semseg" / "VOC12")
    assert PASCALContext(root, "train", ("semseg",)).path(0, "semseg").parent.name == "pascal-context"


def test_every_part_has_its_class() -> None:
    by_class = {name: sorted(p for p, part in PARTS.items() if PART_CLASSES[part] == name) for name in PART_CLASSES}
    assert by_class == {
        "background": [],
        "head": ["hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"],
        "torso": ["neck", "torso"],
        "upper_arm": ["luarm", "ruarm"],
        "lower_arm": ["lhand", "llarm", "rhand", "rlarm"],
        "upper_leg": ["luleg", "ruleg"],
        "lower_leg": ["lfoot", "llleg", "rfoot", "rlleg"],
    }


def box(top: int, bottom: int) -> NDArray[np.bool_]:
    rows = np.arange(SIZE[0])[:, None].repeat(SIZE[1], 1)
    return (rows >= top) & (rows < bottom)


@pytest.mark.parametrize("compressed", [True, False])
def test_human_parts_by_hand(tmp_path: Path, compressed: bool) -> None:
    root = write_pascal(tmp_path)
    everything = box(0, 99)
    objects: list[Person] = [
        ("dog", 12, everything, [("head", box(0, 24))]),  # not a person: its head is background
        ("person", 15, everything, [("hair", box(0, 2)), ("torso", box(2, 6)), ("neck", box(5, 8))]),
        ("person", 15, everything, []),  # nobody drew the parts of this one
        ("person", 15, everything, [("rlarm", box(7, 9)), ("luleg", box(9, 10)), ("rfoot", box(10, 12))]),
        ("person", 15, everything, [("ruarm", box(12, 13))]),
    ]
    save_anno(file_of(root, "human_parts"), FIRST, objects, compressed)
    parts = PASCALContext(root, "train", ("human_parts",)).load(0).labels["human_parts"]
    # rows: hair 1, torso 2, neck 2, the second person's lower arm over row 7, upper leg 5, foot 6, upper arm 3, none 0
    rows = [1, 1, 2, 2, 2, 2, 2, 4, 4, 5, 6, 6, 3, *[0] * (SIZE[0] - 13)]
    np.testing.assert_array_equal(parts, np.array(rows, np.uint8)[:, None].repeat(SIZE[1], 1), strict=True)


@pytest.mark.parametrize("whom", ["nobody", "a dog", "a person without parts", "a person of empty parts"])
def test_images_without_annotated_persons_are_ignored(tmp_path: Path, whom: str) -> None:
    root = write_pascal(tmp_path)
    every: dict[str, list[Person]] = {
        "nobody": [],
        "a dog": [("dog", 12, box(0, 9), [("head", box(0, 9))])],
        "a person without parts": [("person", 15, box(0, 9), [])],
        "a person of empty parts": [("person", 15, box(0, 9), [("hair", box(0, 0))])],
    }
    save_anno(file_of(root, "human_parts"), FIRST, every[whom])
    split = PASCALContext(root, "train")
    for parts in (split.read(0, "human_parts"), split.load(0).labels["human_parts"]):
        np.testing.assert_array_equal(parts, np.full(SIZE, IGNORE, np.uint8), strict=True)


def test_saliency_is_above_half(tmp_path: Path) -> None:
    root = write_pascal(tmp_path)
    Image.fromarray(np.resize(np.array([0, 127, 128, 255], np.uint8), SIZE)).save(file_of(root, "saliency"))
    saliency = PASCALContext(root, "train").read(0, "saliency")
    assert saliency[0, :4].tolist() == [0, 0, 1, 1]  # 127 / 255 = 0.498, 128 / 255 = 0.502


def test_the_table_of_classes() -> None:
    names = context_classes()
    assert len(names) == len(set(names)) == 459
    # CONTEXT_CATEGORY_LABELS of the public loader: the ids of VOC's 20 classes among the 459
    ids = [2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416, 427]
    voc = LABEL_SETS["pascal"].classes["semseg"][1:]
    assert [names[index - 1] for index in ids] == [{"diningtable": "table"}.get(name, name) for name in voc]
    valid = normals_classes()
    assert valid.shape == (460,) and valid.sum() == 170 and not valid[0]
    kept = {name for name, keep in zip(names, valid[1:], strict=True) if keep}
    assert {"wall", "floor", "tvmonitor", "person", "cat"} <= kept  # tvmonitor by hand: NYU calls it television
    assert not kept & {"unknown", "sky", "grass", "tree", "road", "water"}


def test_normals_are_kept_where_the_class_has_them(tmp_path: Path) -> None:
    root = write_pascal(tmp_path)
    ids = np.zeros(SIZE, np.int64)
    for column, name in enumerate(("wall", "sky", "tvmonitor", "unknown", "floor")):
        ids[:, column] = context_classes().index(name) + 1
    save_label_map(file_of(root, "edge"), ids)
    stored = unit_normals(np.random.default_rng(1), SIZE)
    codes = coded(stored)
    codes[0, 0] = 128, 127, 128  # no vector
    Image.fromarray(codes).save(file_of(root, "normals"))
    normals = PASCALContext(root, "train", ("normals",)).load(0).labels["normals"]
    kept = (normals != 0).any(-1)
    assert kept[1:].any(0).tolist() == [True, False, True, False, True] + [False] * (SIZE[1] - 5)
    assert not kept[0, 0] and kept[1:, [0, 2, 4]].all()
    np.testing.assert_allclose(normals[1:, 0], stored[1:, 0] * (1, -1, 1), atol=2 / 255)  # y is down in the file
    np.testing.assert_allclose(np.linalg.norm(normals[kept], axis=-1), 1, atol=1e-6)


def test_edges_and_their_truth(tmp_path: Path) -> None:
    root = write_pascal(tmp_path)
    ids = np.full(SIZE, 284, np.int64)
    ids[:, 10:20] = 459
    ids[5:9, 3:7] = 1
    save_label_map(file_of(root, "edge"), ids)
    split = PASCALContext(root, "train", ("edge",))
    edge, truth = split.load(0).labels["edge"], split.edge_truth(0)
    laplacian = scipy.ndimage.convolve(ids, np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]]), mode="mirror")
    np.testing.assert_array_equal(edge, thin(laplacian != 0).astype(np.uint8), strict=True)
    np.testing.assert_array_equal(truth, segmentation_boundaries(ids), strict=True)
    assert np.flatnonzero(truth[12:].any(0)).tolist() == [9, 19]  # west of each border
    assert not (truth == edge.astype(np.bool_)).all()  # two definitions


def test_labels_of_another_size_are_resized(tmp_path: Path) -> None:
    root = write_pascal(tmp_path)
    half = (SIZE[0] // 2, SIZE[1] // 2)
    wall = context_classes().index("wall") + 1
    column = np.arange(half[1])[None].repeat(half[0], 0)
    save_palette_png(file_of(root, "semseg"), (column % 21).astype(np.uint8))
    Image.fromarray((column * 15).astype(np.uint8)).save(file_of(root, "saliency"))
    Image.fromarray(np.full((*half, 3), (128, 128, 255), np.uint8)).save(file_of(root, "normals"))
    save_label_map(file_of(root, "edge"), np.where(column < 8, wall, 459))
    left = column < 4
    save_anno(file_of(root, "human_parts"), FIRST, [("person", 15, left, [("hair", left)])])
    split = PASCALContext(root, "train")
    labels = split.load(0).labels
    wide = np.arange(SIZE[1])[None].repeat(SIZE[0], 0)
    np.testing.assert_array_equal(labels["semseg"], (wide // 2) % 21)
    np.testing.assert_array_equal(labels["saliency"], (wide // 2) * 15 > 127)
    np.testing.assert_array_equal(labels["human_parts"], wide < 8)
    np.testing.assert_array_equal(labels["normals"].any(-1), wide < 16)
    # One pixel wide, for the LabelMap is resized first, not its edges.
    assert labels["edge"].sum(1).max() == 1 and np.flatnonzero(split.edge_truth(0).any(0)).tolist() == [15]


def test_only_what_is_asked_for_is_opened(tmp_path: Path) -> None:
    root = write_pascal(tmp_path)
    for task in TASKS:
        other = root.parent / f"{root.name}-{task}"
        shutil.copytree(root, other)
        needed = {file_of(other, "image").parent, file_of(other, task).parent}
        if task == "normals":
            needed.add(file_of(other, "edge").parent)
        for kind in TASKS:
            if file_of(other, kind).parent not in needed:
                shutil.rmtree(file_of(other, kind).parent)
        if task != "semseg":
            shutil.rmtree(other / "semseg")
        assert list(open_split("pascal", other, "train", (task,)).load(0).labels) == [task]
        missing = next(kind for kind in TASKS if not file_of(other, kind).parent.is_dir())
        with pytest.raises(InputError, match=rf"not found, needed for {missing}: .* holds ImageSets/, JPEGImages/"):
            PASCALContext(other, "train", (missing,)) if missing != "semseg" else PASCALContext(other, "train")


# --------------------------------------------------------------------------------------------------- damaged files


def anno(path: Path, value: object) -> None:
    scipy.io.savemat(path, {"anno": value})


PERSON = ("person", 15, box(0, 9))
OTHER = SIZE[1], SIZE[0]
EVERY: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "junk": lambda path: path.write_bytes(b"not found\n" * 50),
}
PNG: dict[str, Callable[[Path], object]] = {
    "16 bit": lambda path: Image.fromarray(np.zeros(SIZE, np.uint16)).save(path),
    "other shape": lambda path: Image.fromarray(np.zeros(OTHER, np.uint8)).save(path),
    "colours": lambda path: Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(path),
}
DAMAGES: dict[str, dict[str, Callable[[Path], object]]] = {
    "image": {},
    "semseg": {**PNG, "id 21": lambda path: save_palette_png(path, np.full(SIZE, 21, np.uint8))},
    "saliency": PNG,
    "normals": {
        "grey": lambda path: Image.fromarray(np.zeros(SIZE, np.uint8)).save(path),
        "other shape": lambda path: Image.fromarray(np.zeros((*OTHER, 3), np.uint8)).save(path),
    },
    "human_parts": {
        "no anno": lambda path: save_label_map(path, np.ones(SIZE)),
        "a number": lambda path: anno(path, 1.0),
        "no objects": lambda path: anno(path, {"imname": "x"}),
        "objects of numbers": lambda path: anno(path, {"objects": np.ones(3)}),
        "no parts": lambda path: anno(path, {"objects": {"class_ind": 15.0}}),
        "parts without masks": lambda path: anno(
            path, {"objects": {"class_ind": 15.0, "parts": {"part_name": "hair"}}}
        ),
        "no class": lambda path: anno(path, {"objects": {"class_ind": np.zeros((0, 0)), "parts": np.zeros((0, 0))}}),
        "class in words": lambda path: anno(path, {"objects": {"class_ind": "person", "parts": np.zeros((0, 0))}}),
        "unknown part": lambda path: save_anno(path, FIRST, [(*PERSON, [("tail", box(0, 9))])]),
        "masks of two sizes": lambda path: save_anno(
            path, FIRST, [(*PERSON, [("hair", box(0, 9)), ("nose", box(0, 9)[1:])])]
        ),
        "mask of text": lambda path: save_anno(path, FIRST, [(*PERSON, [("hair", np.array("x"))])]),
        "other shape": lambda path: save_anno(path, FIRST, [(*PERSON, [("hair", np.ones(OTHER, np.bool_))])]),
    },
    "edge": {
        "id 460": lambda path: save_label_map(path, np.full(SIZE, 460)),
        "negative": lambda path: scipy.io.savemat(path, {"LabelMap": np.full(SIZE, -1.0)}),
        "nan": lambda path: scipy.io.savemat(path, {"LabelMap": np.full(SIZE, np.nan)}),
        "fractions": lambda path: scipy.io.savemat(path, {"LabelMap": np.full(SIZE, 1.5)}),
        "text": lambda path: scipy.io.savemat(path, {"LabelMap": "x"}),
        "three dimensions": lambda path: scipy.io.savemat(path, {"LabelMap": np.ones((*SIZE, 3))}),
        "other shape": lambda path: save_label_map(path, np.ones(OTHER)),
        "other name": lambda path: scipy.io.savemat(path, {"labelmap": np.ones(SIZE)}),
        "hdf5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600)),
    },
}


@pytest.mark.parametrize(
    ("kind", "damage"), [(kind, name) for kind, some in DAMAGES.items() for name in {**EVERY, **some}]
)
def test_a_damaged_file_is_named(tmp_path: Path, kind: str, damage: str) -> None:
    root = write_pascal(tmp_path)
    path = file_of(root, kind)
    {**EVERY, **DAMAGES[kind]}[damage](path)
    split = PASCALContext(root, "train")
    with pytest.raises(InputError) as caught:
        split.load(0)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=path.name):
        split.read(0, kind)
    split.load(1)  # the others are not touched
    if kind == "edge":
        for read in (lambda: split.edge_truth(0), lambda: split.read(0, "normals")):
            with pytest.raises(InputError, match=path.name):
                read()


@pytest.mark.parametrize("kind", FILES)
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    root = write_pascal(tmp_path)
    late, first = file_of(root, kind, "2008_000001"), file_of(root, kind)
    if kind == "semseg":
        for name in (late.name, first.name):
            (root / "semseg" / "pascal-context" / name).unlink()
    late.unlink()
    split = PASCALContext(root, "train")
    with pytest.raises(InputError, match=rf"{late.name} not found"):
        split.load(1)
    first.unlink()
    with pytest.raises(InputError, match=rf"{first.name} not found, though .*Context/train.txt lists 2 images"):
        PASCALContext(root, "train")


# --------------------------------------------------------------------------------------------------- roots, opening


def test_roots_and_listings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data root .*none not found: give the folder that holds ImageSets/Context"):
        PASCALContext(tmp_path / "none", "train")
    with pytest.raises(InputError, match=r"not in the layout PASCAL_MT or PASCALContext"):
        PASCALContext(tmp_path, "train")
    root = write_pascal(tmp_path / "d")
    with pytest.raises(InputError, match=r"test\.txt not found: .*Context has train, val"):
        PASCALContext(root, "test")
    with pytest.raises(InputError, match="pascal has no labels for depth"):
        PASCALContext(root, "train", ("depth",))
    for text, words in (
        (f"{FIRST}\n{FIRST}\n", "twice"),
        ("../x\n", "not an image's id"),
        ("a/b\n", "not an image's id"),
        ("", "lists no image"),
    ):
        (root / "ImageSets" / "Context" / "train.txt").write_text(text)
        with pytest.raises(InputError, match=words):
            PASCALContext(root, "train")


def test_nothing_is_written_and_the_cache_of_parts_is_ignored(tmp_path: Path) -> None:
    root = write_pascal(tmp_path)
    (root / "ImageSets" / "Parts").mkdir()
    (root / "ImageSets" / "Parts" / "train.txt").write_text("not even JSON")
    before = snapshot(root)
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        for name in ("train", "val"):
            split = PASCALContext(root, name)
            for index in range(len(split)):
                split.load(index)
                split.edge_truth(index)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert snapshot(root) == before


def test_opening_either_layout(tmp_path: Path) -> None:
    pascal, nyud = write_pascal(tmp_path / "PASCAL_MT"), write_nyud(tmp_path / "NYUDv2", "NYUDv2")
    assert recognise(pascal) == ("pascal", "PASCAL-Context") and recognise(nyud) == ("nyud", "NYUDv2")
    assert open_split("pascal", str(pascal), "val", ("saliency",)).tasks == ("saliency",)
    assert open_split("nyud", nyud, "val", ["depth"]).release == "NYUDv2"
    with pytest.raises(InputError, match=r"looks like PASCAL-Context: take a recipe"):
        open_split("nyud", pascal, "train", ("semseg",))
    with pytest.raises(InputError, match=r"looks like NYUD-v2: take a recipe"):
        open_split("pascal", nyud, "train", ("semseg",))
    with pytest.raises(InputError, match="layout 'coco' is unknown: choose from nyud, pascal"):
        open_split("coco", nyud, "train", ("semseg",))


def test_opening_what_is_no_data_set(tmp_path: Path) -> None:
    for layout in ("nyud", "pascal"):
        with pytest.raises(InputError, match=r"no data root: give --data\.root DIR \(m3vit data synth writes"):
            open_split(layout, "", "train", ("semseg",))
        with pytest.raises(InputError, match=r"data root .*none not found"):
            open_split(layout, tmp_path / "none", "train", ("semseg",))
        with pytest.raises(InputError, match=r"is no data set: it holds nothing, expected one of gt_sets/ \(nyud\)"):
            open_split(layout, tmp_path, "train", ("semseg",))
    for bad in ("", tmp_path / "none", tmp_path):
        with pytest.raises(InputError):
            recognise(bad)
    root = write_nyud(tmp_path / "data" / "NYUD_MT")
    with pytest.raises(InputError, match=r"data is no data set, but holds one: give .*data/NYUD_MT"):
        open_split("nyud", root.parent, "train", ("semseg",))
    write_pascal(root)
    with pytest.raises(InputError, match="holds the folders of nyud and of pascal"):
        recognise(root)


def test_loaders_need_neither_torch_nor_scipy() -> None:
    code = "import sys, m3vit.data.opening; print(*{'torch', 'scipy', 'm3vit.evaluation'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
