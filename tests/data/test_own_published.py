"""Cityscapes, COCO and Taskonomy, in tiny files of their published formats, are described by `m3vit data init`."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3vit.data.own.description import open_description
from m3vit.data.own.layout import Folder
from m3vit.data.own.published import CITYSCAPES
from m3vit.data.tools.begin import begin
from m3vit.data.tools.check import check
from m3vit.errors import InputError
from m3vit.tasks import IGNORE
from tests.command_line import kept_state
from tests.data.layouts import coded, unit_normals

RNG = np.random.default_rng(0)
SIZE = (12, 16)


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    with kept_state():
        yield


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def photograph(path: Path) -> None:
    save(path, RNG.integers(0, 256, (*SIZE, 3), np.uint8))


def errors(root: Path) -> list[str]:
    return [problem.message for problem in check(root, workers=1).problems if problem.severity == "error"]


def test_cityscapes(tmp_path: Path) -> None:
    ids = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 34
    ids[0, 0] = IGNORE
    for split, city, count in (("train", "aachen", 3), ("val", "ulm", 2), ("test", "bonn", 1)):
        for frame in range(count):
            stem = f"{split}/{city}/{city}_000000_{frame:06d}"
            photograph(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png")
            save(tmp_path / "gtFine" / f"{stem}_gtFine_labelIds.png", ids.astype(np.uint8))
            save(tmp_path / "gtFine" / f"{stem}_gtFine_color.png", RNG.integers(0, 256, (*SIZE, 4), np.uint8))
            save(tmp_path / "gtFine" / f"{stem}_gtFine_instanceIds.png", (ids * 1000).astype(np.uint16))
    _, lines = begin(tmp_path)
    assert lines[0] == "Cityscapes" and not errors(tmp_path)
    train, val = Folder(tmp_path, "train"), Folder(tmp_path, "val")
    assert len(train) == 3 and val.ids[0] == "val/ulm/ulm_000000_000000"
    label = val.load(0).labels["semseg"]
    for place, stored in enumerate(CITYSCAPES):
        assert (label[ids == stored] == place).all()
    assert (label[~np.isin(ids, list(CITYSCAPES))] == IGNORE).all()
    assert train.description.tasks["semseg"].classes[:3] == ("road", "sidewalk", "building")


def write_coco(root: Path, form: str) -> dict[str, np.ndarray]:
    """Write two splits; segments of panoptic pngs are numbers, the categories of which the JSON files have."""
    categories = [{"id": 1, "name": "person"}, {"id": 92, "name": "banner"}, {"id": 200, "name": "rug-merged"}]
    truth = {}
    for split, count in (("train2017", 3), ("val2017", 2)):
        annotations = []
        for index in range(count):
            name = f"{index:012d}"
            photograph(root / split / f"{name}.jpg")
            kinds = RNG.integers(0, 4, SIZE)
            truth[f"{split}/{name}"] = kinds
            if form == "panoptic":
                numbers = np.array([0, 17, 70000, 256])[kinds]  # 70000 = 112 + 256 * 17 + 65536
                png = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=-1)
                save(root / "annotations" / f"panoptic_{split}" / f"{name}.png", png.astype(np.uint8))
                segments = [{"id": 17, "category_id": 1}, {"id": 70000, "category_id": 92}]
                segments.append({"id": 256, "category_id": 200})
                annotations.append({"file_name": f"{name}.png", "image_id": index, "segments_info": segments})
            else:
                values = np.array([0, 1, 92, 200])[kinds]
                save(root / "annotations" / f"stuff_{split}_pixelmaps" / f"{name}.png", values.astype(np.uint8))
        (root / "annotations").mkdir(exist_ok=True)
        text = json.dumps({"images": [], "annotations": annotations, "categories": categories})
        (root / "annotations" / f"{form}_{split}.json").write_text(text)
    return truth


@pytest.mark.parametrize("form", ["panoptic", "stuff"])
def test_coco(form: str, tmp_path: Path) -> None:
    truth = write_coco(tmp_path, form)
    _, lines = begin(tmp_path)
    assert lines[0] == f"COCO {form}" and not errors(tmp_path)
    train, val = Folder(tmp_path, "train"), Folder(tmp_path, "val")
    assert (len(train), len(val)) == (3, 2) and val.ids[0] == "val2017/000000000000"
    assert train.description.tasks["semseg"].classes == ("person", "banner", "rug-merged")
    for split in (train, val):
        for index, name in enumerate(split.ids):
            expected = np.array([IGNORE, 0, 1, 2])[truth[name]]
            np.testing.assert_array_equal(split.load(index).labels["semseg"], expected)


def test_coco_that_is_damaged_or_in_part(tmp_path: Path) -> None:
    write_coco(tmp_path, "panoptic")
    begin(tmp_path)
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"].pop()
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    found = errors(tmp_path)
    assert len(found) == 2 and "names no segment 256 of it" in found[0] and "has no annotation" in found[1]
    for folder in (tmp_path / "annotations").glob("panoptic_*2017"):
        folder.rename(tmp_path / "annotations" / f"gone_{folder.name}")
    with pytest.raises(InputError, match=r"looks like COCO panoptic, but .* lies without its png files"):
        begin(tmp_path, overwrite=True)


@pytest.mark.parametrize("nested", [False, True])
def test_taskonomy(nested: bool, tmp_path: Path) -> None:
    depth = RNG.integers(500, 5000, SIZE).astype(np.uint16)
    depth[0, 0] = 65535
    for building in ("ada", "bea", "cyd"):
        for point in range(2):

            def path(domain: str, place: str = f"point_{point}_view_0", building: str = building) -> Path:
                folders = (building, domain) if nested else (domain, building)
                return tmp_path.joinpath(*folders) / f"{place}_domain_{domain}.png"

            photograph(path("rgb"))
            save(path("depth_zbuffer"), depth)
            save(path("normal"), coded(unit_normals(RNG, SIZE)))
            save(path("segment_semantic"), RNG.integers(0, 3, SIZE).astype(np.uint8))
            save(path("principal_curvature"), RNG.integers(0, 256, (*SIZE, 3), np.uint8))
    _, lines = begin(tmp_path)
    assert lines[0] == "Taskonomy" and not errors(tmp_path)
    splits = [Folder(tmp_path, split) for split in ("train", "val")]
    assert [len(split) for split in splits] == [4, 2]  # whole buildings
    assert len({name.split("/")[0] for name in splits[1].ids}) == 1
    assert open_description(tmp_path).tasks.keys() == {"depth", "normals", "semseg"}
    found = splits[0].load(0).labels["depth"]
    np.testing.assert_allclose(found, np.where(depth == 65535, 0, depth / 512), rtol=1e-6)
