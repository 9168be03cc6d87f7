"""Scenes with the labels of NYUD: rooms, their segmentation, depth, normals and edges."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m3vit.data.synthetic.scenes.materials import FloatArray
from m3vit.data.synthetic.scenes.rendering import Camera, Geometry, Hits, cast, find_view, render_image
from m3vit.data.synthetic.scenes.room import Room
from m3vit.label_sets import NYUD_CLASSES

CLASS_IDS = {name: index + 1 for index, name in enumerate(NYUD_CLASSES)}  # as written on disk; 0 = unlabelled

# Second difference of inverse depth over inverse depth: zero on planes, above this at jumps within an object.
BEND_THRESHOLD = 0.12

STRUCTURE = ("wall", "floor", "ceiling", "door", "window")


@dataclass(frozen=True)
class Labels:
    """What a camera sees at its pixels' centres (H, W).

    Depth is z in metres (0 where nothing is hit), normals are x right, y up, z towards the camera, segmentation is
    NYUD ids (0 where nothing is hit), edge is 0 or 1.
    """

    depth: NDArray[np.float32]
    normals: NDArray[np.float32]
    segmentation: NDArray[np.uint8]
    edge: NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """An RGB image (H, W, 3) uint8 with its labels and the camera that took it."""

    image: NDArray[np.uint8]
    labels: Labels
    camera: Camera


def render_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Build random rooms until one has a good view, take the best of its cameras, and render it."""
    room, geometry, camera = find_view(lambda: Room(rng), _view_score, rng, size)
    labels = labels_of(geometry, cast(geometry, camera, size))
    return Scene(render_image(geometry, room, camera, size, rng), labels, camera)


def _segmentation(geometry: Geometry, hits: Hits) -> NDArray[np.uint8]:
    class_ids = np.array([CLASS_IDS[part.label] for part in geometry.parts], np.uint8)
    return np.where(hits.parts >= 0, class_ids[hits.parts], np.uint8(0))


def labels_of(geometry: Geometry, hits: Hits) -> Labels:
    """Return the exact labels of what a camera's rays hit."""
    hit = hits.parts >= 0
    return Labels(
        depth=np.where(hit, hits.depth, 0.0).astype(np.float32),
        normals=hits.normals.astype(np.float32),
        segmentation=_segmentation(geometry, hits),
        edge=_edges(np.where(hit, geometry.instances[hits.parts], -1), hits.depth).astype(np.float32),
    )


def _edges(instances: NDArray[np.int64], depth: FloatArray) -> NDArray[np.bool_]:
    """Return borders between instances, and depth jumps within one that no plane explains."""
    edge = np.zeros(instances.shape, bool)
    edge[:, :-1] |= instances[:, 1:] != instances[:, :-1]
    edge[:-1] |= instances[1:] != instances[:-1]
    inverse = 1.0 / depth  # linear over the image of a plane; 0 where nothing is hit
    padded = np.pad(inverse, 1, mode="reflect", reflect_type="odd")  # continues planes beyond the border
    middle = padded[1:-1, 1:-1]
    bend = np.maximum(
        np.abs(padded[1:-1, 2:] - 2 * middle + padded[1:-1, :-2]),
        np.abs(padded[2:, 1:-1] - 2 * middle + padded[:-2, 1:-1]),
    )
    return edge | (bend > BEND_THRESHOLD * np.maximum(inverse, 1e-9))


def _view_score(geometry: Geometry, hits: Hits) -> float:
    """Return how much there is to learn from a preview: entropy of the classes (bits), below 0 if it is rejected."""
    if (hits.parts < 0).any():
        return -np.inf
    segmentation, depth = _segmentation(geometry, hits), hits.depth.astype(np.float32)
    share = np.bincount(segmentation.ravel(), minlength=len(NYUD_CLASSES) + 1) / segmentation.size
    present = share[share > 0]
    entropy = float(-(present * np.log2(present)).sum())
    structure = sum(share[CLASS_IDS[name]] for name in STRUCTURE)
    good = (
        depth.min() > 0.5
        and np.median(depth) > 1.5
        and share.max() < 0.55
        and structure < 0.85
        and (share > 0.01).sum() >= 5
    )
    return entropy if good else entropy - 10.0
