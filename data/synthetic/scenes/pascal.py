"""Scenes with the labels of PASCAL-Context: who and what is in them, VOC and context classes, body parts, saliency."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3vit.data.synthetic.scenes.lived_room import LivedRoom
from m3vit.data.synthetic.scenes.outdoors import Outdoors
from m3vit.data.synthetic.scenes.place import Place
from m3vit.data.synthetic.scenes.rendering import Geometry, Hits, cast, find_view, render_image
from m3vit.label_sets import VOC_CLASSES
from m3vit.tasks import IGNORE

# What a part's label is called in PASCAL-Context, where that is another word.
CONTEXT_NAMES = {"television": "tvmonitor", "books": "book", "lamp": "light", "bookshelf": "shelves"}
# Those of the 459 ids of PASCAL-Context that occur, from data/db_info/context_classes.json of
# github.com/SimonVandenhende/Multi-Task-Learning-PyTorch. 0 is unlabelled.
CONTEXT_IDS = {
    "bed": 18, "book": 33, "bottle": 34, "building": 44, "bus": 45, "cabinet": 46, "car": 59, "cat": 65,
    "ceiling": 68, "chair": 72, "cow": 98, "dog": 113, "door": 115, "fence": 144, "floor": 158, "grass": 187,
    "ground": 189, "horse": 207, "light": 232, "person": 284, "picture": 287, "pottedplant": 308, "road": 324,
    "sheep": 347, "shelves": 349, "sidewalk": 354, "sky": 360, "sofa": 368, "table": 397, "tree": 420,
    "tvmonitor": 427, "wall": 440, "window": 454,
}  # fmt: skip
# What a part's label is called in VOC, where that is another word. Labels in neither are background.
VOC_NAMES = {"television": "tvmonitor", "table": "diningtable"}

PEOPLE_SHARE = 0.6  # of the scenes
INDOOR_SHARE = 0.5
# How much a class draws the eye, for saliency: living things most, furniture least.
ATTENTION = {
    "person": 1.0, "cat": 1.0, "dog": 1.0, "horse": 1.0, "cow": 1.0, "sheep": 1.0, "car": 0.8, "bus": 0.8,
    "bottle": 0.9, "pottedplant": 0.6, "tvmonitor": 0.5, "sofa": 0.35, "chair": 0.35, "diningtable": 0.3,
}  # fmt: skip
SALIENT = 0.5  # of the most salient object's score


@dataclass(frozen=True)
class VisibleObject:
    """One instance of a VOC class: its visible mask (H, W) and those of its named parts, which do not overlap."""

    name: str
    mask: NDArray[np.bool_]
    parts: dict[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class PascalScene:
    """An RGB image (H, W, 3) uint8 and what its pixels' centres show.

    `voc` (H, W) are VOC ids (0: background), `context` (H, W) ids of the 459 classes of PASCAL-Context, `normals`
    (H, W, 3) unit vectors x right, y up, z towards the camera (zero vector: sky), `saliency` (H, W) is 0..1.
    """

    image: NDArray[np.uint8]
    voc: NDArray[np.uint8]
    instances: NDArray[np.int64]  # -1: background
    context: NDArray[np.uint16]
    normals: NDArray[np.float32]
    saliency: NDArray[np.float64]
    objects: list[VisibleObject]


def voc_id(label: str) -> int:
    """Return the VOC id of a part's label, 0 if it is background."""
    name = VOC_NAMES.get(label, label)
    return VOC_CLASSES.index(name) if name in VOC_CLASSES else 0


def context_id(label: str) -> int:
    """Return the PASCAL-Context id of a part's label."""
    return CONTEXT_IDS[CONTEXT_NAMES.get(label, label)]


def render_pascal_scene(rng: np.random.Generator, size: tuple[int, int]) -> PascalScene:
    """Decide on the setting and the number of people, build places until one has a good view, and render it."""
    indoors = bool(rng.random() < INDOOR_SHARE)
    people = int(rng.choice([1, 2, 3], p=[0.5, 0.32, 0.18])) if rng.random() < PEOPLE_SHARE else 0

    def build() -> Place:
        return LivedRoom(rng, people) if indoors else Outdoors(rng, people)

    def score(geometry: Geometry, hits: Hits) -> float:
        return _view_score(geometry, hits, people > 0)

    place, geometry, camera = find_view(build, score, rng, size)
    hits = cast(geometry, camera, size)
    voc, context = _class_maps(geometry, hits)
    objects = _visible_objects(geometry, hits)
    return PascalScene(
        image=render_image(geometry, place, camera, size, rng),
        voc=voc,
        instances=np.where(voc > 0, geometry.instances[hits.parts], -1),
        context=context,
        normals=hits.normals.astype(np.float32),
        saliency=saliency(objects, size),
        objects=objects,
    )


def _class_maps(geometry: Geometry, hits: Hits) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    voc_of_part = np.array([voc_id(part.label) for part in geometry.parts], np.uint8)
    context_of_part = np.array([context_id(part.label) for part in geometry.parts], np.uint16)
    hit = hits.parts >= 0
    voc = np.where(hit, voc_of_part[hits.parts], np.uint8(0))
    return voc, np.where(hit, context_of_part[hits.parts], np.uint16(CONTEXT_IDS["sky"]))


def _visible_objects(geometry: Geometry, hits: Hits) -> list[VisibleObject]:
    """Return what is visible of each VOC object, in the order in which the objects were placed."""
    hit = hits.parts >= 0
    instances = np.where(hit, geometry.instances[hits.parts], -1)
    objects = []
    for instance in np.unique(instances[hit]):
        mask = instances == instance
        seen = np.unique(hits.parts[mask])
        label = geometry.parts[seen[0]].label
        if not voc_id(label):
            continue
        parts: dict[str, NDArray[np.bool_]] = {}
        for index in seen:
            if name := geometry.parts[index].name:
                parts[name] = parts.get(name, False) | (hits.parts == index)
        objects.append(VisibleObject(VOC_CLASSES[voc_id(label)], mask, dict(sorted(parts.items()))))
    return objects


def saliency(objects: list[VisibleObject], size: tuple[int, int]) -> NDArray[np.float64]:
    """Return which objects stand out, 0..1 (H, W).

    An object's score is the square root of its share of the image, times its class's `ATTENTION`, times
    exp(-(d / 0.6)^2) with d the distance of its centroid from the image's centre in half diagonals.  Objects that
    score at least `SALIENT` times as much as the best are salient (1.0); others get less than half, by their score.
    """
    height, width = size
    scores = []
    for thing in objects:
        y, x = (index.mean() for index in np.nonzero(thing.mask))
        distance = np.hypot(x + 0.5 - width / 2, y + 0.5 - height / 2) / np.hypot(width / 2, height / 2)
        scores.append(np.sqrt(thing.mask.mean()) * ATTENTION[thing.name] * np.exp(-((distance / 0.6) ** 2)))
    result = np.zeros(size)
    for thing, score in zip(objects, scores, strict=True):
        relative = score / max(scores)
        result[thing.mask] = 1.0 if relative >= SALIENT else 0.6 * relative
    return result


def with_void_border(voc: NDArray[np.uint8], instances: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the VOC map with the pixels on both sides of every object's outline void, as in VOC's own files."""
    void = np.zeros(voc.shape, bool)
    across, down = instances[:, 1:] != instances[:, :-1], instances[1:] != instances[:-1]
    void[:, 1:] |= across
    void[:, :-1] |= across
    void[1:] |= down
    void[:-1] |= down
    return np.where(void, np.uint8(IGNORE), voc)


def _view_score(geometry: Geometry, hits: Hits, with_people: bool) -> float:
    """Return how much there is to learn from a preview, below 0 if it is rejected.

    Entropy of the context classes (bits), plus points for a large person whose head is seen and for VOC classes.
    """
    voc, context = _class_maps(geometry, hits)
    share = np.bincount(context.ravel()) / context.size
    present = share[share > 0]
    entropy = float(-(present * np.log2(present)).sum())
    voc_share = np.bincount(voc.ravel(), minlength=len(VOC_CLASSES)) / voc.size
    things = 1 - voc_share[0]
    people_share = voc_share[VOC_CLASSES.index("person")]
    names = {geometry.parts[index].name for index in np.unique(hits.parts) if index >= 0
             and geometry.parts[index].label == "person"}  # fmt: skip
    good = (
        hits.depth.min() > 0.7
        and 0.08 < things < 0.65
        and share.max() < 0.65
        and (share > 0.01).sum() >= 3
        and (people_share > 0.035 if with_people else 0.04 < voc_share[1:].max() < 0.5)
        and (not with_people or bool(names & {"head", "hair"}))
    )
    worth = entropy + 0.5 * (voc_share[1:] > 0.01).sum() + 6 * min(people_share, 0.25)
    return worth if good else worth - 20.0
