"""How a rendered scene is stored: the files of the public releases, and how their arrays are encoded.

A writer serves `m3vit.data.synthetic.dataset`, which makes the folders and lists. Only its `write` needs the renderer
(and scipy for MATLAB files), so that a data set can be checked without.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from m3vit.label_sets import VOC_CLASSES
from m3vit.tasks import palette

if TYPE_CHECKING:
    from m3vit.data.synthetic.scenes.pascal import VisibleObject

JPEG_QUALITY = 95
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Writer:
    """The files of a data set, by relative paths with "/".

    `lists` is the folder of train.txt and val.txt.  `image_id` names the image of a number (1, 2, ... through both
    splits), `files` returns the paths of one image from its id, split (0: train, 1: val) and index there, `write`
    renders one image and writes these files below a root.  `packages` are those that `write` needs.
    """

    lists: str
    packages: tuple[str, ...]
    image_id: Callable[[int], str]
    files: Callable[[str, int, int], dict[str, str]]
    write: Callable[[np.random.Generator, Size, dict[str, Path]], None]


def _save_jpeg(path: Path, image: np.ndarray) -> None:
    # Full-resolution chroma: at these sizes the usual 4:2:0 would blur colour edges over two pixels.
    Image.fromarray(image).save(path, quality=JPEG_QUALITY, subsampling=0)


# --- NYUD_MT --------------------------------------------------------------------------------------------------------


def _nyud_id(number: int) -> str:
    return f"{number:04d}"


def _nyud_files(name: str, split: int, index: int) -> dict[str, str]:
    endings = {"images": "jpg", "segmentation": "png", "edge": "npy", "normals": "npy", "depth": "npy"}
    return {folder: f"{folder}/{name}.{ending}" for folder, ending in endings.items()}


def _write_nyud(rng: np.random.Generator, size: Size, paths: dict[str, Path]) -> None:
    from m3vit.data.synthetic.scenes.nyud import render_scene

    scene = render_scene(rng, size)
    _save_jpeg(paths["images"], scene.image)
    Image.fromarray(scene.labels.segmentation).save(paths["segmentation"])
    np.save(paths["edge"], scene.labels.edge)
    np.save(paths["normals"], scene.labels.normals)
    np.save(paths["depth"], scene.labels.depth)


# --- PASCAL_MT ------------------------------------------------------------------------------------------------------


def _pascal_id(number: int) -> str:
    return f"2026_{number:06d}"


def _pascal_files(name: str, split: int, index: int) -> dict[str, str]:
    """Return an image's paths; every other one has its classes from VOC's own annotation, which has void borders."""
    source = "VOC12" if (split + index) % 2 == 0 else "pascal-context"
    return {
        "image": f"JPEGImages/{name}.jpg",
        "semseg": f"semseg/{source}/{name}.png",
        "parts": f"human_parts/{name}.mat",
        "context": f"pascal-context/trainval/{name}.mat",
        "normals": f"normals_distill/{name}.png",
        "saliency": f"sal_distill/{name}.png",
    }


def _write_pascal(rng: np.random.Generator, size: Size, paths: dict[str, Path]) -> None:
    from m3vit.data.synthetic.scenes.pascal import render_pascal_scene, with_void_border

    scene = render_pascal_scene(rng, size)
    _save_jpeg(paths["image"], scene.image)
    from_voc = paths["semseg"].parent.name == "VOC12"
    semseg = Image.fromarray(with_void_border(scene.voc, scene.instances) if from_voc else scene.voc)
    semseg.putpalette(np.array(palette(("background", *map(str, range(1, 256)))), np.uint8).tobytes())
    semseg.save(paths["semseg"])
    save_mat(paths["parts"], {"anno": annotation(paths["image"].stem, scene.objects)})
    save_mat(paths["context"], {"LabelMap": scene.context})
    y_down = scene.normals.astype(np.float64) * (1, -1, 1)  # the axes that m3vit.data.pascal_context takes the files in
    normals = np.round((y_down + 1) / 2 * 255)  # the sky's zero vectors become 128
    Image.fromarray(normals.astype(np.uint8)).save(paths["normals"])
    Image.fromarray(np.round(255 * scene.saliency).astype(np.uint8)).save(paths["saliency"])


def annotation(name: str, objects: "list[VisibleObject]") -> np.ndarray:
    """Return the struct `anno` of PASCAL-Part: imname, and objects with class, class_ind, mask and parts."""
    rows = np.empty((1, len(objects)), [(field, object) for field in ("class", "class_ind", "mask", "parts")])
    for column, thing in enumerate(objects):
        parts = np.empty((1, len(thing.parts)), [("part_name", object), ("mask", object)])
        for number, (part, mask) in enumerate(thing.parts.items()):
            parts[0, number] = (part, mask.astype(np.uint8))
        class_ind = float(VOC_CLASSES.index(thing.name))
        # Objects without parts have an empty double array there, not an empty struct.
        shown = parts if thing.parts else np.zeros((0, 0))
        rows[0, column] = (thing.name, class_ind, thing.mask.astype(np.uint8), shown)
    anno = np.empty((1, 1), [("imname", object), ("objects", object)])
    anno[0, 0] = (name, rows)
    return anno


def save_mat(path: Path, variables: dict[str, Any]) -> None:
    """Write a compressed MATLAB 5 file whose bytes depend on the variables alone."""
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=True)
    content = bytearray(buffer.getvalue())
    content[:116] = b"MATLAB 5.0 MAT-file, written by m3vit.data.synthetic".ljust(116)  # scipy puts the date there
    path.write_bytes(content)


WRITERS = {
    "nyud": Writer("gt_sets", ("trimesh", "embreex"), _nyud_id, _nyud_files, _write_nyud),
    "pascal": Writer("ImageSets/Context", ("trimesh", "embreex", "scipy"), _pascal_id, _pascal_files, _write_pascal),
}
