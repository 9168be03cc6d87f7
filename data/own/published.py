"""Data sets that are recognised by their published folders and names: Cityscapes, COCO, Taskonomy. No torch.

Sources: cityscapesScripts (helpers/labels.py, README: folder structure); cocodataset.org/#format-data (4. Panoptic
Segmentation) and nightrome/cocostuff (stuff pixel maps); StanfordVL/taskonomy, data/README.md (names, 1/512 m).
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from m3vit.data.own.guess import Guess, Series, look_for_ids
from m3vit.data.own.patterns import files_in
from m3vit.errors import InputError
from m3vit.files import open_regular
from m3vit.tasks import IGNORE

# Ids of Cityscapes' labelIds.png that are evaluated; train ids number them in this order.
CITYSCAPES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
CITYSCAPES_IDS = 34  # 0..33, and 255: the licence plate's -1
DOMAINS = {  # of Taskonomy -> task
    "depth_zbuffer": "depth",
    "depth_euclidean": "depth",
    "normal": "normals",
    "segment_semantic": "semseg",
}
STEPS_PER_METRE = 512


def published(root: Path) -> Guess | None:
    """Return what to write for a folder of a known form; None for any other."""
    return _cityscapes(root) or _coco(root) or _taskonomy(root)


# --- Cityscapes -----------------------------------------------------------------------------------------------------


def _cityscapes(root: Path) -> Guess | None:
    """leftImg8bit/{split}/{city}/..._leftImg8bit.png, and gtFine or gtCoarse/.../..._labelIds.png."""
    fine = next((name for name in ("gtFine", "gtCoarse") if (root / name).is_dir()), "")
    if not fine or not (root / "leftImg8bit").is_dir():
        return None
    names = files_in(root, [fine])
    train_ids = any(name.endswith("_labelTrainIds.png") for name in names)
    if not train_ids and not any(name.endswith("_labelIds.png") for name in names):
        return None
    semseg: dict[str, Any] = {"files": f"{fine}/{{id}}_{fine}_{'labelTrainIds' if train_ids else 'labelIds'}.png"}
    if train_ids:
        semseg |= {"classes": list(CITYSCAPES.values()), "ignore": [IGNORE]}
    else:
        others = [one for one in range(CITYSCAPES_IDS) if one not in CITYSCAPES]
        semseg |= {"classes": dict(CITYSCAPES), "ignore": [*others, IGNORE]}
    values = {
        "images": "leftImg8bit/{id}_leftImg8bit.png",
        "tasks": {"semseg": semseg},
        "splits": {"train": "train/**", "val": "val/**"},
    }
    train = "train_extra" if (root / "leftImg8bit" / "train_extra").is_dir() and fine == "gtCoarse" else "train"
    values["splits"]["train"] = f"{train}/**"  # type: ignore[index]
    comments = defaultdict(list, {"splits": ["the published ones; labels of test are not public"]})
    comments["tasks.semseg.classes"].append("the 19 classes that are evaluated, as everywhere published")
    notes = []
    if (root / "disparity").is_dir():
        notes.append("disparity/ is not depth: metres are baseline * focal length / disparity, which differ by camera")
    return Guess(values, comments, "Cityscapes", notes)


# --- COCO -----------------------------------------------------------------------------------------------------------


def _coco(root: Path) -> Guess | None:
    """{split}2017/{id}.jpg, annotations/panoptic_{split}2017.json (or stuff_), and a folder of pngs of that name."""
    for form in ("panoptic", "stuff"):
        found: dict[str, str] = {}  # name of a split's folder of images -> JSON file
        for place in ("annotations", "."):
            for path in sorted((root / place).glob(f"{form}_*.json")):
                found.setdefault(path.stem.removeprefix(f"{form}_"), path.relative_to(root).as_posix())
        guess = _of_coco(root, form, found) if found else None
        if guess:
            return guess
    return None


def _of_coco(root: Path, form: str, found: dict[str, str]) -> Guess | None:
    above = next((name for name in ("", "images/") if all((root / name / split).is_dir() for split in found)), None)
    suffix = "" if form == "panoptic" else "_pixelmaps"
    places = {file.rpartition("/")[0] for file in found.values()}
    inside = f"{places.pop()}/".lstrip("/") if len(places) == 1 else None
    if above is None or inside is None:
        return None
    first = next(iter(found))
    maps = next(
        (name for name in (inside, "") if (root / f"{name}{form}_{first}{suffix}").is_dir()),
        None,
    )
    if maps is None:
        words = f"{found[first]} lies without its png files ({form}_{first}{suffix}/): unpack them beside it"
        raise InputError(f"{root} looks like COCO {form}, but {words}")
    categories = _categories(root / found[first])
    ignore = [one for one in (0, IGNORE) if one not in categories]
    semseg: dict[str, Any] = {"files": f"{maps}{form}_{{folder}}{suffix}/{{id}}.png", "classes": categories}
    semseg["ignore"] = ignore if form == "stuff" else [0]
    if form == "panoptic":
        semseg["segments"] = list(found.values())
    train = next((split for split in found if split.startswith("train")), "")
    val = next((split for split in found if split.startswith("val")), "")
    splits = {"train": f"{train}/*", "val": f"{val}/*"} if train and val else {"val": 0.1, "seed": 0}
    values = {
        "images": f"{above}{{folder}}/{{id}}.jpg",
        "tasks": {"semseg": semseg},
        "splits": splits,
        "unlabelled": "leave_out",
    }
    comments = defaultdict(list)
    comments["tasks.semseg.classes"].append(f"categories of {found[first]}")
    if form == "stuff":
        comments["tasks.semseg.ignore"].append("of stuff alone, things are one category (other); 0 is unlabelled")
    return Guess(values, comments, f"COCO {form}")


def _categories(path: Path) -> dict[int, str]:
    """Return the categories of a COCO JSON file by id, or raise InputError."""
    try:
        with open_regular(path) as file:
            content = json.load(file)
        return {int(one["id"]): str(one["name"]) for one in content["categories"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no COCO JSON with categories ({type(error).__name__}): replace it") from None


# --- Taskonomy ------------------------------------------------------------------------------------------------------


def _taskonomy(root: Path) -> Guess | None:
    """{domain}/[{building}/]point_{p}_view_{v}_domain_{domain}.png, 16-bit depth in 1/512 m, 127-centred normals."""
    found: dict[str, list[str]] = defaultdict(list)
    depths = set()  # of the folders of domains: 0 of rgb/{building}/..., 1 of {building}/rgb/...
    for name in files_in(root, [""]):
        folders = name.split("/")[:-1]
        matched = re.search(r"_domain_(\w+)\.png$", name)
        if matched and matched[1] in ("rgb", *DOMAINS) and matched[1] in folders[:2]:
            found[matched[1]].append(name)
            depths.add(folders.index(matched[1]))
    if "rgb" not in found or len(found) < 2 or len(depths) > 1:
        return None
    before = "{folder}/" if depths == {1} else ""

    def pattern(domain: str) -> str:
        return f"{before}{domain}/{{id}}_domain_{domain}.png"

    values: dict[str, Any] = {"images": pattern("rgb"), "tasks": {}, "splits": {"val": 0.2, "seed": 0}}
    comments: dict[str, list[str]] = defaultdict(list)
    for domain, task in DOMAINS.items():
        if domain not in found or task in values["tasks"]:
            continue
        entry: dict[str, Any] = {"files": pattern(domain)}
        if task == "depth":
            entry |= {"unit": 1 / STEPS_PER_METRE, "invalid": [65535]}
            comments["tasks.depth.unit"].append(f"steps of 1/{STEPS_PER_METRE} m; 65535 is no surface")
        elif task == "normals":
            entry |= {"axes": ["right", "up", "towards"]}
            comments["tasks.normals.axes"].append(
                "not documented: check with m3vit data show that a floor is drawn as up and a right wall as left"
            )
        else:
            classes, questions = look_for_ids(root, Series("", found[domain]))
            entry |= classes
            comments["tasks.semseg.classes"] += questions.values()
        values["tasks"][task] = entry
    nested = before or any(name.count("/") > 1 for name in found["rgb"])
    values["splits"]["groups"] = "{group}/*" if nested else "{group}_view_*"
    comments["splits.groups"].append(
        "views of one building stay together" if nested else "views of one point stay together"
    )
    return Guess(values, comments, "Taskonomy")
