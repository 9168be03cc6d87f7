"""PASCAL-Context as published for multi-task learning: PASCAL_MT.tgz and PASCALContext.tar.gz, of one layout. No torch.

    ImageSets/Context/{train,val}.txt     an id a line
    JPEGImages/{id}.jpg                   RGB, sizes vary
    semseg/VOC12/{id}.png                 palette png, 0..20 and 255; if absent, semseg/pascal-context/{id}.png
    human_parts/{id}.mat                  anno.objects(n): class_ind, mask, parts(m): part_name, mask (PASCAL-Part)
    pascal-context/trainval/{id}.mat      LabelMap [H, W], 459 classes: edges are made from it
    normals_distill/{id}.png              n = 2 v / 255 - 1, y down, where the class in LabelMap has normals
    sal_distill/{id}.png                  salient above half

Sources: data/pascal_context.py of SimonVandenhende/Multi-Task-Learning-PyTorch and of
prismformore/Multi-Task-Transformer.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from m3vit.data.matlab import read_mat
from m3vit.data.reading import (
    Impossible,
    Size,
    fitted,
    image_size,
    naming,
    read_grey,
    read_ids,
    read_image,
    read_normals_png,
)
from m3vit.data.sample import FileSplit, Ranges
from m3vit.data.thinning import laplacian_boundaries, segmentation_boundaries
from m3vit.label_sets import LABEL_SETS
from m3vit.tasks import IGNORE

FOLDERS = {
    "image": ("JPEGImages",),
    "semseg": ("semseg/VOC12", "semseg/pascal-context"),
    "human_parts": ("human_parts",),
    "saliency": ("sal_distill",),
    "normals": ("normals_distill",),
    "edge": ("pascal-context/trainval",),
}
ENDINGS = {
    "image": ".jpg",
    "semseg": ".png",
    "human_parts": ".mat",
    "saliency": ".png",
    "normals": ".png",
    "edge": ".mat",  # the LabelMap it is made from
}
PERSON = 15  # class_ind of PASCAL VOC
Y_UP = np.array([1, -1, 1], np.float32)  # from the axes of normals_distill (LabelSet.normals_y_down) to m3vit.tasks'
NUM_CLASSES = LABEL_SETS["pascal"].channels("semseg")
# The 24 parts that PASCAL-Part names on a person, merged to the classes of m3vit.label_sets.PART_CLASSES.
PARTS = {
    name: part
    for part, names in (
        (1, "hair head lear lebrow leye mouth nose rear rebrow reye"),
        (2, "neck torso"),
        (3, "luarm ruarm"),
        (4, "lhand llarm rhand rlarm"),
        (5, "luleg ruleg"),
        (6, "lfoot llleg rfoot rlleg"),
    )
    for name in names.split()
}


@cache
def context_classes() -> tuple[str, ...]:
    """Return the names of PASCAL-Context's classes; the first has id 1."""
    return tuple(name for _, name in _table())


@cache
def normals_classes() -> NDArray[np.bool_]:
    """Return for each id of LabelMap (0..459) whether pixels of the class have normals."""
    return np.array([False] + [mark == "+" for mark, _ in _table()])


def _table() -> list[tuple[str, str]]:
    text = (files("m3vit.data") / "labels" / "pascal_context.txt").read_text(encoding="utf-8")
    return [(line[0], line[2:]) for line in text.splitlines() if not line.startswith("#")]


class PASCALContext(FileSplit):
    """One split of PASCAL-Context.

    - human_parts of an image without an annotated part is 255 everywhere (no person, or none with parts). The public
      loaders feed zeros and turn a map of nothing but zeros to 255 before the loss; in evaluation they skip the image.
    - The axes of the normals' files are documented nowhere. They are taken to be x right, y down, because that is how
      the published rotation turns them (ScaleNRotate in Vandenhende's and M3ViT's data/custom_transforms.py), and y is
      negated on reading. Were that wrong, pictures would show them upside down; the angular error, mirroring and
      rotation stay as published in any case.
    - Labels of another size than the image are resized to it, nearest pixel; a LabelMap before edges are taken from it.
    - ImageSets/Parts, where the public loaders cache which images show persons, is neither needed nor written.
    """

    name = "pascal"
    title = "PASCAL-Context"
    described = "PASCAL_MT or PASCALContext (JPEGImages/, ImageSets/Context/, semseg/, human_parts/, ...)"
    label_set = "pascal"
    listings = "ImageSets/Context"
    folders = FOLDERS
    releases: ClassVar = {"PASCAL-Context": ENDINGS}
    needs: ClassVar = {"normals": ("edge",)}  # masked by the label maps that edges are made from
    published: ClassVar = {"train": 4998, "val": 5105}
    m3vit_ranges = Ranges((0.75, 1.25), 20.0)

    def read(self, index: int, kind: str, size: Size | None = None) -> NDArray:
        """Read an image or label as `load` returns it; `size` is the image's, read from its header if not given."""
        path = self.path(index, kind)
        if kind == "image":
            return read_image(path)
        size = size or image_size(self.path(index, "image"))
        if kind == "semseg":
            return fitted(path, read_ids(path, NUM_CLASSES - 1, ignored=True), size)
        if kind == "human_parts":
            parts = read_human_parts(path)
            return np.full(size, IGNORE, np.uint8) if parts is None else fitted(path, parts, size)
        if kind == "saliency":
            return (fitted(path, read_grey(path), size) > 127).astype(np.uint8)  # v / 255 > 0.5
        if kind == "normals":
            normals = fitted(path, read_normals_png(path), size)
            has_normals = normals_classes()[self._label_map(index, size)]
            return np.where(has_normals[..., None], normals * Y_UP, np.float32(0))
        return laplacian_boundaries(self._label_map(index, size)).astype(np.uint8)

    def edge_truth(self, index: int) -> NDArray[np.bool_]:
        """Return the boundary pixels [H, W] that odsF is scored against; not the labels trained on."""
        return segmentation_boundaries(self._label_map(index, image_size(self.path(index, "image"))))

    def _label_map(self, index: int, size: Size) -> NDArray[np.int16]:
        path = self.path(index, "edge")
        return fitted(path, read_label_map(path), size)


def read_label_map(path: Path) -> NDArray[np.int16]:
    """Return the class ids [H, W] of a LabelMap: 1..459, 0 where there is none."""
    with naming(path):
        stored = read_mat(path, "LabelMap", as_stored=True)
        if not isinstance(stored, np.ndarray) or stored.ndim != 2 or stored.size == 0:
            raise Impossible("expected LabelMap to be a matrix of class ids")
        highest = len(context_classes())
        least, most = stored.min(), stored.max()  # NaN if there is one, which no comparison holds for
        if not (least >= 0 and most <= highest) or (stored.dtype.kind == "f" and (stored != np.trunc(stored)).any()):
            raise Impossible(f"expected class ids 0..{highest}, found {least}..{most}")
        return stored.astype(np.int16)


def read_human_parts(path: Path) -> NDArray[np.uint8] | None:
    """Return the parts 0..6 [h, w] of all persons of an image, or None if no part of one is annotated."""
    with naming(path):
        parts: NDArray[np.uint8] | None = None
        for thing in _structs(read_mat(path, "anno", as_stored=True), "anno", "objects"):
            for person in _structs(thing["objects"], "anno.objects", "class_ind", "parts"):
                if _number(person["class_ind"]) != PERSON:
                    continue
                for part in _structs(person["parts"], "anno.objects.parts", "part_name", "mask"):
                    name, mask = part["part_name"], part["mask"]
                    if name not in PARTS:
                        raise ValueError(f"unknown part {name!r} of a person, expected {' '.join(sorted(PARTS))}")
                    if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.size == 0:
                        raise ValueError(f"the mask of {name} is not a matrix")
                    if parts is None:
                        parts = np.zeros(mask.shape, np.uint8)
                    if mask.shape != parts.shape:
                        raise ValueError(f"the mask of {name} has shape {mask.shape}, another one {parts.shape}")
                    parts[mask != 0] = PARTS[name]  # the later part lies on top, as in the public loaders
        return parts if parts is not None and parts.any() else None


def _structs(value: Any, name: str, *fields: str) -> list[dict[str, Any]]:
    """Return a struct array, MATLAB's [] being an empty one, or raise Impossible if a field is missing."""
    if isinstance(value, np.ndarray) and value.size == 0:
        return []
    if not isinstance(value, list) or not all(field in one for one in value for field in fields):
        raise Impossible(f"expected {name} to be a structure with the fields {', '.join(fields)}")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, np.ndarray) or value.size != 1:
        raise Impossible("expected class_ind to be one number")
    return float(value.item())
