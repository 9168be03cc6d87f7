"""Synthetic PASCAL scenes: files against the PASCAL_MT layout as public loaders read it, labels against each other."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("embreex")
pytest.importorskip("scipy")

from scipy.io import loadmat

from m3vit.data.synthetic.dataset import synthesize
from m3vit.data.synthetic.scenes.layouts import annotation, save_mat
from m3vit.data.synthetic.scenes.pascal import (
    CONTEXT_IDS,
    PascalScene,
    VisibleObject,
    render_pascal_scene,
    saliency,
    with_void_border,
)
from m3vit.data.synthetic.scenes.people import PART_NAMES
from m3vit.data.synthetic.scenes.rendering import focal_px
from m3vit.errors import InputError
from m3vit.label_sets import VOC_CLASSES

SIZE = (48, 64)
TRAIN, VAL = 7, 3
PERSON = VOC_CLASSES.index("person")
NAMES = [f"2026_{number:06d}" for number in range(1, TRAIN + VAL + 1)]
FOLDERS = {"JPEGImages": "jpg", "human_parts": "mat", "pascal-context/trainval": "mat", "normals_distill": "png",
           "sal_distill": "png"}  # fmt: skip


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pascal") / "set"
    synthesize(out, layout="pascal", train=TRAIN, val=VAL, size=SIZE, workers=1)
    return out


@pytest.fixture(scope="module")
def scenes() -> list[PascalScene]:
    return [render_pascal_scene(np.random.default_rng([5, 0, index]), SIZE) for index in range(48)]


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def towards_camera() -> np.ndarray:
    """Return vectors (H, W, 3) from each pixel's surface to the camera: x right, y up, z towards it."""
    height, width = SIZE
    y, x = np.mgrid[:height, :width] + 0.5
    focal = focal_px(width)
    return np.stack([(width / 2 - x) / focal, (y - height / 2) / focal, np.ones(SIZE)], axis=-1)


def read_semseg(root: Path, name: str) -> tuple[np.ndarray, bool]:
    """Return the class ids (H, W) and whether they are VOC's own, with void borders."""
    voc, context = (root / "semseg" / source / f"{name}.png" for source in ("VOC12", "pascal-context"))
    assert voc.is_file() != context.is_file()
    with Image.open(voc if voc.is_file() else context) as image:
        assert image.mode == "P"
        colours = np.array(image.getpalette()).reshape(-1, 3)
        assert colours[PERSON].tolist() == [192, 128, 128]  # as in VOC's files
        assert colours[255].tolist() == [224, 224, 192]
        return np.asarray(image), voc.is_file()


def read_objects(root: Path, name: str) -> list[dict[str, Any]]:
    """Read objects along the chain of indices of the public loaders."""
    objects = loadmat(root / "human_parts" / f"{name}.mat")["anno"][0][0][1][0]
    result = []
    for index in range(len(objects)):
        parts = objects[index][3]
        names = [str(parts[0][i][0][0]) for i in range(len(parts[0]))] if len(parts) else []
        masks = [parts[0][i][1] for i in range(len(names))]
        result.append({"class": str(objects[index][0][0]), "class_ind": objects[index][1][0][0],
                       "mask": objects[index][2], "parts": dict(zip(names, masks, strict=True))})  # fmt: skip
    return result


def test_layout(data_set: Path) -> None:
    lists = data_set / "ImageSets" / "Context"
    assert (lists / "train.txt").read_text().splitlines() == NAMES[:TRAIN]
    assert (lists / "val.txt").read_text().splitlines() == NAMES[TRAIN:]
    for folder, ending in FOLDERS.items():
        assert sorted(path.name for path in (data_set / folder).iterdir()) == [f"{name}.{ending}" for name in NAMES]
    expected = ["ImageSets", "JPEGImages", "human_parts", "normals_distill", "pascal-context", "sal_distill", "semseg",
                "synthetic.json"]  # fmt: skip
    assert sorted(path.name for path in data_set.iterdir()) == expected
    assert not (data_set / "ImageSets" / "Parts").exists()  # a cache of the public loaders
    # Alternating, and both in either split.
    assert [read_semseg(data_set, name)[1] for name in NAMES] == [True, False] * 3 + [True] + [False, True, False]


def test_files(data_set: Path) -> None:
    for name in NAMES:
        with Image.open(data_set / "JPEGImages" / f"{name}.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", SIZE[::-1])
        with Image.open(data_set / "normals_distill" / f"{name}.png") as normals:
            assert (normals.mode, normals.size) == ("RGB", SIZE[::-1])
        with Image.open(data_set / "sal_distill" / f"{name}.png") as salient:
            assert (salient.mode, salient.size) == ("L", SIZE[::-1])
        labels = loadmat(data_set / "pascal-context" / "trainval" / f"{name}.mat")["LabelMap"]
        assert (labels.dtype, labels.shape) == (np.uint16, SIZE)
        assert set(np.unique(labels).tolist()) <= set(CONTEXT_IDS.values())
        semseg, from_voc = read_semseg(data_set, name)
        assert semseg.shape == SIZE
        assert (255 in semseg) == from_voc
        assert set(np.unique(semseg).tolist()) <= {*range(21), 255}


def test_parts_along_the_public_loaders_indices(data_set: Path) -> None:
    people = with_parts = 0
    for name in NAMES:
        semseg, _ = read_semseg(data_set, name)
        labels = loadmat(data_set / "pascal-context" / "trainval" / f"{name}.mat")["LabelMap"]
        objects = read_objects(data_set, name)
        assert objects
        anybody = np.zeros(SIZE, bool)
        for thing in objects:
            assert thing["class_ind"].dtype == np.float64
            assert VOC_CLASSES[int(thing["class_ind"])] == thing["class"]
            assert (thing["mask"].dtype, thing["mask"].shape) == (np.uint8, SIZE)
            assert 0 < thing["mask"].sum() and thing["mask"].max() == 1
            covered = np.sum(list(thing["parts"].values()), axis=0) if thing["parts"] else np.zeros(SIZE)
            assert covered.max() <= 1  # disjoint
            assert not covered[thing["mask"] == 0].any()
            if thing["class"] == "person":
                assert set(thing["parts"]) <= set(PART_NAMES)
                np.testing.assert_array_equal(covered, thing["mask"])
                anybody |= thing["mask"] == 1
                people += 1
            with_parts += bool(thing["parts"])
            inside = semseg[thing["mask"] == 1]
            assert set(np.unique(inside).tolist()) <= {int(thing["class_ind"]), 255}
        np.testing.assert_array_equal(anybody, labels == CONTEXT_IDS["person"])
        assert anybody[semseg == PERSON].all()
    assert people >= 4 and with_parts > people  # animals, bottles, cars have parts, too


def test_objects_without_parts(tmp_path: Path) -> None:
    """The public loaders ask `len(parts) != 0`: the empty array must be 0 x 0, and a picture of nothing must load."""
    chair = VisibleObject("chair", np.ones((2, 3), bool), {})
    save_mat(tmp_path / "a.mat", {"anno": annotation("a", [chair])})
    record = loadmat(tmp_path / "a.mat")["anno"][0][0]
    assert str(record[0][0]) == "a"
    assert record[1][0][0][3].shape == (0, 0)
    save_mat(tmp_path / "b.mat", {"anno": annotation("b", [])})
    assert len(loadmat(tmp_path / "b.mat")["anno"][0][0][1][0]) == 0


def test_normals_decode_to_unit_vectors_that_face_the_camera(data_set: Path) -> None:
    for name in NAMES:
        with Image.open(data_set / "normals_distill" / f"{name}.png") as image:
            stored = np.asarray(image)
        labels = loadmat(data_set / "pascal-context" / "trainval" / f"{name}.mat")["LabelMap"]
        sky = labels == CONTEXT_IDS["sky"]
        assert (stored[sky] == 128).all()
        normals = (2.0 * stored[~sky] / 255 - 1) * (1, -1, 1)  # stored y down
        # 8 bits: each component is off by at most 1/255, the length by at most sqrt(3)/255.
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=np.sqrt(3) / 255 + 1e-6)
        towards = towards_camera()[~sky]
        assert ((normals * towards).sum(axis=-1) > -np.linalg.norm(towards, axis=-1) * np.sqrt(3) / 255).all()
        floor = np.isin(labels[~sky], [CONTEXT_IDS[label] for label in ("floor", "road", "sidewalk", "ground")])
        assert (normals[floor, 1] < 0.4).sum() <= 0.02 * floor.sum()  # upwards, but for the sides of thin layers


def test_void_border_is_two_pixels_wide() -> None:
    """Outlines are void on either side; between two objects of one class, too."""
    instances = np.array([[-1, -1, -1, 0, 0, 0, 1, 1, 1]])
    voc = np.where(instances >= 0, 15, 0).astype(np.uint8)
    assert with_void_border(voc, instances).tolist() == [[0, 0, 255, 255, 15, 255, 255, 15, 15]]


def test_saliency_by_hand() -> None:
    """A person in the middle beats a chair of the same size, and a person of the same size in the corner.

    scores: 0.2 of the image, attention 1, d = 0 -> 0.447; the chair in the middle third of it below: 0.35 as much;
    the corner (d > 0.7) exp(-(0.7/0.6)^2) = 0.26 as much. Both are under half.
    """
    size = (30, 30)
    middle, below, corner = (np.zeros(size, bool) for _ in range(3))
    middle[8:22, 8:22], below[22:29, 1:29], corner[:8, :8] = True, True, True
    things = [VisibleObject("person", middle, {}), VisibleObject("chair", below, {}),
              VisibleObject("person", corner, {})]  # fmt: skip
    result = saliency(things, size)
    assert (result[middle] == 1).all()
    assert (result[below] < 0.5).all() and (result[below] > 0).all()
    assert (result[corner] < 0.5).all()
    assert result[29, 29] == 0
    assert (saliency(things[2:], size)[corner] == 1).all()  # alone it is what the picture is about
    assert not saliency([], size).any()


@pytest.mark.slow
def test_saliency_share(scenes: list[PascalScene]) -> None:
    shares = np.array([(scene.saliency > 0.5).mean() for scene in scenes])
    assert shares.min() > 0 and shares.max() < 0.8
    assert 0.08 < shares.mean() < 0.3
    for scene in scenes:
        assert not scene.saliency[scene.voc == 0].any()


@pytest.mark.slow
def test_people_and_classes(scenes: list[PascalScene]) -> None:
    names = [{thing.name for thing in scene.objects} for scene in scenes]
    assert 0.4 < np.mean(["person" in of_scene for of_scene in names]) < 0.8  # 0.6 of 48: +- 2.8 sigma
    assert len(set.union(*names)) >= 11
    heights = []
    for scene in scenes:
        rows = [np.nonzero(thing.mask)[0] for thing in scene.objects if thing.name == "person"]
        if rows:
            heights.append(max((np.ptp(row) + 1) / SIZE[0] for row in rows))
    assert np.mean(np.array(heights) > 1 / 3) > 0.5
    seen = set().union(*(thing.parts for scene in scenes for thing in scene.objects if thing.name == "person"))
    assert len(seen & {"head", "hair", "torso", "luarm", "rlarm", "luleg", "rlleg", "lhand", "rfoot"}) == 9


@pytest.mark.slow
def test_views_are_not_dull(scenes: list[PascalScene]) -> None:
    for scene in scenes:
        assert scene.image.std() > 12
        assert 20 < scene.image.mean() < 240
        assert len(np.unique(scene.context)) >= 3


@pytest.mark.process
def test_same_arguments_same_bytes_whatever_the_workers(data_set: Path, tmp_path: Path) -> None:
    """No file holds a time stamp."""
    synthesize(tmp_path / "again", layout="pascal", train=TRAIN, val=VAL, size=SIZE, workers=2)
    assert digests(tmp_path / "again") == digests(data_set)


def test_images_depend_on_seed_and_split_but_not_on_counts(data_set: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()  # an empty folder is filled
    synthesize(tmp_path / "few", layout="pascal", train=1, val=1, size=SIZE, workers=1)
    original, few = digests(data_set), digests(tmp_path / "few")
    assert few["JPEGImages/2026_000001.jpg"] == original["JPEGImages/2026_000001.jpg"]  # train 0
    val_0 = f"2026_{TRAIN + 1:06d}"
    assert few["JPEGImages/2026_000002.jpg"] == original[f"JPEGImages/{val_0}.jpg"]
    assert few["semseg/pascal-context/2026_000002.png"] == original[f"semseg/pascal-context/{val_0}.png"]
    synthesize(tmp_path / "few", layout="pascal", train=1, val=1, size=SIZE, workers=1)  # found to be whole
    (tmp_path / "few" / "pascal-context" / "trainval" / "2026_000002.mat").unlink()
    with pytest.raises(InputError, match=r"2026_000002\.mat is missing"):
        synthesize(tmp_path / "few", layout="pascal", train=1, val=1, size=SIZE)


def test_layouts_do_not_mix(data_set: Path) -> None:
    with pytest.raises(InputError, match=r"holds a synthetic data set of .*pascal.* not of .*nyud"):
        synthesize(data_set, layout="nyud", train=TRAIN, val=VAL, size=SIZE)


def test_missing_scipy_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match=r"scipy is not installed.*pip install -e '.*\[train\]'"):
        synthesize(tmp_path / "set", layout="pascal")
