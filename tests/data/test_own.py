"""The layout `folder`: which files a data.yaml means, what is read of them, how they are divided, what is refused."""

import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3vit.data.opening import check_masks, layout_for, open_split
from m3vit.data.own.description import FILE, read_description
from m3vit.data.own.files import find
from m3vit.data.own.labels import read_label
from m3vit.data.own.layout import Folder
from m3vit.data.own.patterns import IMAGE_ENDINGS, as_regex
from m3vit.errors import InputError
from m3vit.label_sets import LABEL_SETS
from m3vit.tasks import IGNORE, TASKS
from tests.command_line import kept_state
from tests.data.own import BARE, CLASSES, DESCRIPTION, IDS, TURNED, VOID, write_own


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Forget the label sets and tasks that a data.yaml made known."""
    with kept_state():
        yield


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_own(tmp_path_factory.mktemp("own"))


def described(root: Path, text: str) -> Path:
    (root / "data.yaml").write_text(text)
    return root


def test_everything_is_found_and_divided_once(own: Path) -> None:
    train, val = (Folder(own, split) for split in ("train", "val"))
    assert train.tasks == ("semseg", "depth") and train.release == "street"
    assert len(val) == 3 and not {*train.ids} & {*val.ids}  # 0.3 of the 11 with any label
    assert sorted((*train.ids, *val.ids)) == sorted({*IDS} - {BARE})
    assert LABEL_SETS[train.label_set].classes == {"semseg": CLASSES} and train.label_set.startswith("street-")
    masks = len(list((own / "masks").iterdir()))
    assert sum(split.counts["semseg"] for split in (train, val)) == masks == 8
    # The division is of the data, not of the tasks: a split for fewer tasks is a part of it.
    alone = Folder(own, "train", ["depth"])
    assert set(alone.ids) < set(train.ids) and alone.counts["depth"] == len(alone) == train.counts["depth"]
    assert set(Folder(own, "train", []).ids) == set(train.ids)
    assert pickle.loads(pickle.dumps(val)).ids == val.ids


def test_an_image_without_a_label_is_not_labelled_for_that_task(own: Path) -> None:
    split = Folder(own, "train")
    for index, name in enumerate(split.ids):
        sample = split.load(index)
        mask, depth = own / "masks" / f"{name}.png", own / "depth_mm" / f"{name}.png"
        lacking = {task: "" for task, path in (("semseg", mask), ("depth", depth)) if not path.exists()}
        assert sample.unlabelled == lacking and len(lacking) < 2
        size = sample.image.shape[:2]
        assert sample.labels["semseg"].shape == sample.labels["depth"].shape == size
        if mask.exists():
            stored = np.array(Image.open(mask))
            np.testing.assert_array_equal(sample.labels["semseg"], np.where(stored == VOID, IGNORE, stored))
        else:
            assert (sample.labels["semseg"] == IGNORE).all()
        if depth.exists():
            np.testing.assert_allclose(sample.labels["depth"], np.array(Image.open(depth)) / 1000, rtol=1e-6)
        else:
            assert not sample.labels["depth"].any()


def test_a_photograph_on_its_side_fits_its_upright_label(own: Path) -> None:
    split = next(one for one in (Folder(own, "train"), Folder(own, "val")) if TURNED in one.ids)
    sample = split.load(split.ids.index(TURNED))
    width, height = Image.open(own / "photos" / f"{TURNED}.jpg").size
    assert sample.image.shape[:2] == (width, height)
    assert sample.image[1, 20, 2] > 200 and abs(int(sample.image[-2, 20, 2]) - 90) < 40  # sky above, road below


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
def test_labels_drawn_on_the_photograph_as_stored_are_turned_with_it(turn: int, tmp_path: Path) -> None:
    """A photograph whose pixels are its mask's: they stay together, whichever way the camera was held."""
    ids = np.random.default_rng(turn).integers(0, 2, (20, 30)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    for name in "ab":
        Image.fromarray(np.repeat(ids[..., None] * np.uint8(255), 3, axis=-1)).save(tmp_path / f"{name}.png", exif=exif)
        np.save(tmp_path / f"{name}.npy", ids)
    described(
        tmp_path, "images: '{id}.png'\nsplits: {val: 0.5}\ntasks: {semseg: {files: '{id}.npy', classes: [x, y]}}\n"
    )
    sample = Folder(tmp_path, "train").load(0)
    assert sample.image.shape[:2] == (30, 20)
    np.testing.assert_array_equal(sample.labels["semseg"], sample.image[..., 0] // 255)


def test_damaged_labels_are_errors_unless_they_are_skipped(tmp_path: Path) -> None:
    root = write_own(tmp_path)
    name = Folder(root, "train", ["semseg"]).ids[0]
    (root / "masks" / f"{name}.png").write_bytes(b"no picture")
    split = Folder(root, "train")
    with pytest.raises(InputError, match=r"masks/.*not a PNG"):
        split.load(split.ids.index(name))
    skipping = Folder(root, "train", partial=True)
    assert "not a PNG" in skipping.load(split.ids.index(name)).unlabelled["semseg"]
    with pytest.raises(InputError, match=r"on_error skip"):
        check_masks([split], 1)


def test_masks_with_other_ids_are_refused_in_one_list(tmp_path: Path) -> None:
    root = write_own(tmp_path)
    check_masks([Folder(root, "train"), Folder(root, "val")], 1)
    names = sorted(path.stem for path in (root / "masks").iterdir())[:2]
    for name in names:
        ids = np.array(Image.open(root / "masks" / f"{name}.png"))
        ids[3, 3], ids[3, 4] = 9, 200
        Image.fromarray(ids).save(root / "masks" / f"{name}.png")
    with pytest.raises(InputError) as caught:
        check_masks([Folder(root, "train"), Folder(root, "val")], 1)
    text = str(caught.value)
    assert "2 problems" in text and all(name in text for name in names) and "ids 9, 200 are neither" in text


# --- what is stored -------------------------------------------------------------------------------------------------


def task_of(text: str, name: str, root: Path = Path("anywhere")) -> Any:
    """Return a task of a data.yaml with this one alone."""
    root.mkdir(exist_ok=True)
    splits = "images: '{id}.*'\nsplits: {val: 0.5}\n"
    described(root, f"{splits}tasks:\n  {name}: {{files: 'labels/{{id}}.png', {text}}}\n")
    description, problems = read_description(root)
    assert description is not None, problems
    return description.tasks[name]


def test_ids_are_remapped_and_merged(tmp_path: Path) -> None:
    classes = "classes: {7: road, 8: pavement, 9: road, 30000: car}, ignore: [0], remap: {5: road}"
    task = task_of(classes, "semseg", tmp_path)
    assert task.classes == ("road", "pavement", "car")
    ids = np.array([[7, 8, 9], [30000, 0, 5]], np.uint16)
    Image.fromarray(ids).save(tmp_path / "mask.png")  # 16 bits
    expected = np.array([[0, 1, 0], [2, IGNORE, 0]])
    np.testing.assert_array_equal(read_label(tmp_path / "mask.png", task, (2, 3)), expected)
    np.save(tmp_path / "mask.npy", ids.astype(np.float64))
    np.testing.assert_array_equal(read_label(tmp_path / "mask.npy", task, (2, 3)), expected)
    # Twice as large an image: the nearest pixel.
    assert read_label(tmp_path / "mask.npy", task, (4, 6)).tolist() == expected.repeat(2, 0).repeat(2, 1).tolist()


def two_bits(ids: list[int]) -> bytes:
    """Return a png of one row of four pixels of two bits each, which Pillow stretches to 0, 85, 170, 255."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = sum(one << shift for one, shift in zip(ids, (6, 4, 2, 0), strict=True))
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0),
        b"IDAT": zlib.compress(bytes([0, row])),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts.items())


@pytest.mark.parametrize("mode", ["1", "L2", "RGB", "P", "LA"])
def test_masks_of_every_mode(mode: str, tmp_path: Path) -> None:
    task = task_of("classes: {0: a, 1: b}", "semseg", tmp_path)
    ids = np.array([[0, 1, 1, 0]], np.uint8)
    path = tmp_path / "mask.png"
    if mode == "1":
        Image.fromarray(ids.astype(bool)).save(path)
    elif mode == "L2":
        path.write_bytes(two_bits([0, 1, 1, 0]))
    elif mode == "P":
        picture = Image.fromarray(ids).convert("P")
        picture.putpalette([5, 5, 5, 250, 0, 0])
        picture.putdata(ids.reshape(-1).tolist())
        picture.save(path)
    else:
        bands = {"RGB": [ids] * 3, "LA": [ids, np.full_like(ids, 255)]}[mode]
        Image.merge(mode, [Image.fromarray(band) for band in bands]).save(path)
    assert read_label(path, task, (1, 4)).tolist() == ids.tolist()


def test_depth_of_any_unit(tmp_path: Path) -> None:
    stored = np.array([[0, 1500, 65535, 42000]], np.uint16)
    Image.fromarray(stored).save(tmp_path / "d.png")
    near = task_of("unit: mm, invalid: [0, 65535]", "depth", tmp_path)
    np.testing.assert_allclose(read_label(tmp_path / "d.png", near, (1, 4)), [[0, 1.5, 0, 42]])
    kitti = task_of("unit: 0.00390625, farthest: 80", "depth", tmp_path)  # 1 / 256 m
    np.testing.assert_allclose(read_label(tmp_path / "d.png", kitti, (1, 4)), [[0, 1500 / 256, 0, 0]])
    with pytest.raises(InputError, match=r"found 0 to 65535: mend unit"):
        read_label(tmp_path / "d.png", task_of("unit: m", "depth", tmp_path), (1, 4))
    np.save(tmp_path / "d.npy", np.array([[np.nan, np.inf, 2.5, -1]], np.float32))
    lidar = task_of("unit: m, invalid: -1", "depth", tmp_path)
    np.testing.assert_allclose(read_label(tmp_path / "d.npy", lidar, (1, 4)), [[0, 0, 2.5, 0]])
    Image.fromarray(np.array([[1.25, 0.5]], np.float32)).save(tmp_path / "d.tif")
    np.testing.assert_allclose(read_label(tmp_path / "d.tif", lidar, (1, 2)), [[1.25, 0.5]])


def test_normals_of_any_axes(tmp_path: Path) -> None:
    """Stored (down, towards, left) of a floor seen from above: up, which is (0, 1, 0) here."""
    task = task_of("axes: [down, towards, left]", "normals", tmp_path)
    np.save(tmp_path / "n.npy", np.array([[[-1, 0, 0], [0, 0.6, 0.8], [0, 0, 0]]], np.float32))
    np.testing.assert_allclose(
        read_label(tmp_path / "n.npy", task, (1, 3)), [[[0, 1, 0], [-0.8, 0, 0.6], [0, 0, 0]]], atol=1e-6
    )
    Image.fromarray(np.array([[[0, 127, 128], [128, 128, 128]]], np.uint8)).save(tmp_path / "n.png")
    found = read_label(tmp_path / "n.png", task, (1, 2))
    np.testing.assert_allclose(found, [[[0, 1, 0], [0, 0, 0]]], atol=0.01)  # mid grey is none


def test_probabilities_of_either_range(tmp_path: Path) -> None:
    task = task_of("ignore: [100]", "saliency", tmp_path)
    for stored, expected in (([[0, 255, 127, 100]], [[0, 1, 0, IGNORE]]), ([[0, 1, 1, 0]], [[0, 1, 1, 0]])):
        Image.fromarray(np.array(stored, np.uint8)).save(tmp_path / "s.png")
        assert read_label(tmp_path / "s.png", task, (1, 4)).tolist() == expected


# --- names ----------------------------------------------------------------------------------------------------------


def test_patterns() -> None:
    def first(pattern: str, name: str) -> str | None:
        found = as_regex(pattern, IMAGE_ENDINGS).fullmatch(name)
        return found["id"] if found else None

    assert first("photos/{id}.*", "photos/IMG 1.JPG") == "IMG 1"
    assert first("photos/{id}.*", "photos/a/b.c.png") == "a/b.c"
    assert first("photos/{id}.*", "photos/notes.txt") is None
    assert first("{id}_rgb.png", "a_rgb.PNG") == "a"
    assert first("*/x/{id}.jpg", "a/x/1.jpg") == "1" and first("*/x/{id}.jpg", "a/b/x/1.jpg") is None


def test_an_umlaut_may_be_written_in_two_ways(tmp_path: Path) -> None:
    """macOS stores names with the mark behind its letter, and archives keep that."""
    root = write_own(tmp_path)
    (root / "photos" / "img_03.jpg").rename(root / "photos" / "stra\u00dfe f\u00fcr.jpg")
    (root / "masks" / "img_03.png").rename(root / "masks" / "stra\u00dfe fu\u0308r.png")
    (root / "val.txt").write_text("stra\u00dfe fu\u0308r\n")
    description = DESCRIPTION.replace("  val: 0.3\n  seed: 0\n", "  train: rest\n  val: val.txt\n")
    split = Folder(described(root, description), "val", ["semseg"])
    assert split.ids == ("stra\u00dfe f\u00fcr",) and split.load(0).labels["semseg"].any()
    (root / "photos" / "stra\u00dfe fu\u0308r.png").write_bytes(b"")
    with pytest.raises(InputError, match="are both the image of"):
        Folder(root, "val", ["semseg"])


def test_labels_beside_their_images(tmp_path: Path) -> None:
    for name in ("a.png", "a_mask.png", "b.png", "b_mask.png", "c.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    described(
        tmp_path,
        "images: '{id}.png'\nsplits: {val: 0.5}\nunlabelled: leave_out\n"
        "tasks: {semseg: {files: '{id}_mask.png', classes: [x, y]}}\n",
    )
    split = Folder(tmp_path, "train", [])
    assert {*split.ids, *Folder(tmp_path, "val", []).ids} == {"a", "b"}


def test_division_by_lists_patterns_and_groups(tmp_path: Path) -> None:
    root = write_own(tmp_path)
    shares = "splits:\n  val: 0.3\n  seed: 0\n"

    def divided(splits: str) -> tuple[list[str], list[str]]:
        described(root, DESCRIPTION.replace(shares, splits))
        train, val = (list(Folder(root, part).ids) for part in ("train", "val"))
        return train, val

    (root / "val.txt").write_text("IMG 00\nphotos/img_02.JPG\nimg_03.jpg\n# a comment\n")
    train, val = divided("splits: {train: rest, val: val.txt}\n")
    assert val == ["IMG 00", "img_02", "img_03"] and len(train) == 8
    train, val = divided("splits: {train: 'img_0*', val: 'IMG*'}\n")
    assert all(name.startswith("IMG") for name in val) and set(train) == {n for n in IDS if n.startswith("img_0")}
    train, val = divided("splits: {val: 0.3, groups: '{group}?'}\n".replace("?", "*"))
    assert train and val
    one, other = divided("splits: {val: 0.3, seed: 1}\n"), divided("splits: {val: 0.3, seed: 2}\n")
    assert one != other and len(one[1]) == len(other[1]) == 3


def test_groups_are_not_torn_apart(tmp_path: Path) -> None:
    for scene in range(6):
        for frame in range(4):
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / f"scene{scene}_{frame}.png")
            np.save(tmp_path / f"scene{scene}_{frame}.npy", np.zeros((4, 4), np.float32))
    described(
        tmp_path,
        "images: '{id}.png'\nsplits: {val: 0.25, test: 0.2, groups: '{group}_*'}\n"
        "tasks: {depth: {files: '{id}.npy', unit: m}}\n",
    )
    found = find(read_description(tmp_path)[0])
    scenes = {split: {name.split("_")[0] for name in names} for split, names in found.splits.items()}
    assert not found.faults and {split: len(names) for split, names in found.splits.items()} == {
        "train": 16,
        "val": 4,
        "test": 4,
    }
    assert sum(map(len, scenes.values())) == 6


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("    classes:", "    clases:", 7, "tasks.semseg.clases is no key here: did you mean classes?"),
        ("unit: mm", "unit: inches", 12, "tasks.depth.unit is 'inches': give m, cm, mm"),
        ("    unit: mm\n", "", 9, "tasks.depth lacks unit"),
        ("kind: depth", "kind: dept", 10, "tasks.depth.kind is 'dept': did you mean depth?"),
        ("kind: depth", "kind: normals", 10, "is normals, and a task called depth is of depth"),
        ("ignore: [7]", "ignore: [1]", 8, "has 1, which is road above"),
        ("ignore: [7]", "remap: {1: car}", 8, "tasks.semseg.remap.1 is an id of classes too (road)"),
        ("ignore: [7]", "remap: {9: cat}", 8, "is 'cat', which is no class: did you mean car?"),
        ("photos/{id}.*", "photos/*.jpg", 2, "give a pattern with {id} once"),
        ("val: 0.3", "val: 1.3", 15, "splits.val is 1.3: give a share below 1"),
        ("  val: 0.3", "  valid: 0.3", 14, "splits has no val, which figures are of: call valid so"),
        ("leave_out", "leave", 17, "unlabelled is 'leave': choose from refuse, leave_out"),
        ("unlabelled:", "unlabeled:", 17, "unlabeled is no key here: did you mean unlabelled?"),
        ("[sky, road, car]", "[sky, road, no]", 7, "is False: give a name, in quotes"),
        ("  depth:\n", "  depth: &d\n", 9, ""),
        ("unlabelled: leave_out", "mean: [0.5, 0.5, 0.5]", 1, "std is missing beside the other"),
        ("name: street", "name: [", 2, "is not YAML"),
        ("  depth:\n", "  semseg:\n", 4, "tasks.semseg is given twice (line 9 too)"),
        ("  depth:\n", "  snow:\n", 9, ""),
        ("photos/{id}.*", "", 2, "images says nothing: fill it in"),
        ("splits:\n  val: 0.3\n  seed: 0\n", "splits: {}\n", 14, "splits says nothing: fill it in"),
    ],
)
def test_what_is_wrong_in_data_yaml_is_named_with_its_line(
    old: str, new: str, line: int, words: str, tmp_path: Path
) -> None:
    assert old in DESCRIPTION
    root = described(tmp_path, DESCRIPTION.replace(old, new, 1))
    description, problems = read_description(root)
    if not words:
        assert description is not None
        return
    assert any(one.line == line and words in one.words for one in problems), problems
    with pytest.raises(InputError, match=rf"line {line}: "):
        Folder(root, "train")


def test_a_description_without_tasks_or_of_another_encoding_is_told(tmp_path: Path) -> None:
    root = described(tmp_path, "images: photos/{id}.*\ntasks: {}\nsplits: {val: 0.2}\n")
    assert read_description(root)[1] == [(2, "tasks says nothing: fill it in")]
    (root / FILE).write_bytes(DESCRIPTION.encode("utf-16"))
    with pytest.raises(InputError, match=r"is not readable as text .* writes one, in UTF-8"):
        read_description(root)


def test_all_that_is_wrong_is_one_list(tmp_path: Path) -> None:
    root = described(tmp_path, DESCRIPTION.replace("unit: mm", "unt: mm").replace("0.3", "3").replace("[7]", "[2]"))
    with pytest.raises(InputError, match=r"has 4 problems: line 8: .*; line 9: .*; line 12: .*unt.*; line 15: "):
        open_split("folder", root, "train", ["semseg"])


def test_what_is_wrong_with_the_files_is_one_list(tmp_path: Path) -> None:
    root = write_own(tmp_path)
    (root / "photos" / "img_02.png").write_bytes((root / "photos" / "img_02.JPG").read_bytes())
    (root / "train.txt").write_text("IMG 00\nimg_01\nimg_03\nimg_77\nimg_04\nimg_04\n")
    (root / "val.txt").write_text("img_03\nimg_04\nimg_11\n")
    lists = "splits: {train: train.txt, val: val.txt}\n"
    described(root, DESCRIPTION.replace("splits:\n  val: 0.3\n  seed: 0\n", lists).replace("leave_out", "refuse"))
    with pytest.raises(InputError) as caught:
        Folder(root, "train")
    text = str(caught.value)
    for words in (
        "6 problems",
        "photos/img_02.JPG and photos/img_02.png are both the image of img_02",
        "train.txt, line 4: no image has the id 'img_77'",
        "train.txt, line 6: img_04 is listed twice",
        "photos/img_11.JPG has no label of any task",
        "img_03 is in train and in val",
        "img_04 is in train and in val",
        "unlabelled: leave_out",
    ):
        assert words in text, text


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    root = write_own(tmp_path)
    described(root, DESCRIPTION.replace("  semseg:", "  surface:").replace("  depth:\n", "  height_own:\n"))
    split = Folder(root, "train")
    assert split.tasks == ("surface", "height_own")
    assert TASKS["surface"].metric == "mIoU" and TASKS["height_own"].kind == "identity"
    assert LABEL_SETS[split.label_set].channels("surface") == 3
    fog = DESCRIPTION.replace("  depth:\n    kind: depth", "  fog:\n    kind: probability")
    with pytest.raises(InputError, match="is of probability, which is scored by what it is of"):
        Folder(described(root, fog), "train")


def test_a_model_fits_the_classes_it_was_trained_on_alone(tmp_path: Path) -> None:
    root = write_own(tmp_path)
    label_set = Folder(root, "train").label_set
    assert layout_for(label_set, str(root), ["semseg"]) == "folder"
    described(root, DESCRIPTION.replace("[sky, road, car]", "[sky, car, road]"))
    with pytest.raises(InputError, match=r"class 1 of semseg is road, but car in data\.yaml"):
        open_split("folder", root, "val", ["semseg"], label_set=label_set)
    described(root, DESCRIPTION.replace("farthest", "").replace("unit: mm", "unit: mm\n    farthest: 90"))
    assert open_split("folder", root, "val", ["semseg"], label_set=label_set).label_set == label_set


def test_the_example_in_the_documentation_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text()
    example = text.partition("```yaml\n")[2].partition("```")[0]
    description, problems = read_description(described(tmp_path, example))
    assert description is not None, problems
    assert list(description.tasks) == ["semseg", "depth", "normals", "edge"]
    assert description.tasks["semseg"].ids == {0: 0, 1: 1, 2: 2, 12: 1, 255: IGNORE}
    assert description.normalisation is not None and description.splits.groups == "{group}_*"
