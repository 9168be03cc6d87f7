"""NYUD-v2 as published for multi-task learning, in either release. No torch.

                    NYUD_MT                          NYUDv2
    gt_sets/        {train,val}.txt, an id a line    the same
    images/         jpg, 480 x 640                   png, 425 x 560 (NYUD_MT's, cropped)
    segmentation/   png; 0 unlabelled, 1..40         the same
    depth/          npy, metres, 0 invalid           the same
    normals/        npy [H, W, 3], 0 invalid         png, n = 2 v / 255 - 1
    edge/           npy 0/1                          png 0/255

Sources: data/nyud.py of SimonVandenhende/Multi-Task-Learning-PyTorch and of VITA-Group/M3ViT (NYUD_MT);
TaskPrompter/data/nyud.py of prismformore/Multi-Task-Transformer (NYUDv2, made by ATRC).
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from m3vit.data.reading import (
    Size,
    check_size,
    image_size,
    read_depth_array,
    read_edge_array,
    read_grey,
    read_ids,
    read_image,
    read_normals_array,
    read_normals_png,
)
from m3vit.data.sample import FileSplit, Ranges
from m3vit.data.thinning import segmentation_boundaries
from m3vit.label_sets import LABEL_SETS
from m3vit.tasks import IGNORE

FOLDERS = {"image": "images", "semseg": "segmentation", "depth": "depth", "normals": "normals", "edge": "edge"}
SAME = {"semseg": ".png", "depth": ".npy"}
RELEASES = {
    "NYUD_MT": {"image": ".jpg", "normals": ".npy", "edge": ".npy", **SAME},
    "NYUDv2": {"image": ".png", "normals": ".png", "edge": ".png", **SAME},
}
NUM_CLASSES = LABEL_SETS["nyud"].channels("semseg")


class NYUD(FileSplit):
    """One split of NYUD_MT (or of `m3vit data synth --layout nyud`, which writes the same files) or of NYUDv2.

    Labels are not resized: all files of a release have one size, and labels of NYUDv2 beside images of NYUD_MT would
    be of another crop. Normals keep the axes of their file: neither papers nor loaders say what they are. (M3ViT's
    rotation, ScaleNRotate in its data/custom_transforms.py, turns x and y as if y pointed down or x left.)
    """

    name = "nyud"
    title = "NYUD-v2"
    described = "NYUD_MT or NYUDv2 (images/, segmentation/, depth/, normals/, edge/, gt_sets/)"
    label_set = "nyud"
    listings = "gt_sets"
    folders: ClassVar = {kind: (folder,) for kind, folder in FOLDERS.items()}
    releases = RELEASES
    published: ClassVar = {"train": 795, "val": 654}
    m3vit_ranges = Ranges((1.0, 1.2, 1.5), 0.0)

    def read(self, index: int, kind: str, size: Size | None = None) -> NDArray:
        """Read an image or label as `load` returns it; `size` is the image's, read from its header if not given."""
        path = self.path(index, kind)
        if kind == "image":
            return read_image(path)
        label = _read_label(path, kind)
        check_size(path, label, size or image_size(self.path(index, "image")))
        return label

    def edge_truth(self, index: int) -> NDArray[np.bool_]:
        """Return the boundary pixels [H, W] that odsF is scored against; not the labels trained on.

        The published evaluation takes the edge png for a map of segments, whatever its values, so boundaries lie on
        both sides of a drawn line before thinning (seism/src/gt_wrappers/db_gt.m of
        prismformore/Boundary-Detection-Evaluation-Tools). It never read npy edges; here they count as 0/1.
        """
        path = self.path(index, "edge")
        stored = read_grey(path) if path.suffix == ".png" else read_edge_array(path)
        check_size(path, stored, image_size(self.path(index, "image")))
        return segmentation_boundaries(stored)


def _read_label(path: Path, task: str) -> NDArray:
    if task == "semseg":
        stored = read_ids(path, NUM_CLASSES)
        return np.where(stored == 0, IGNORE, stored - np.uint8(1)).astype(np.uint8)
    if task == "depth":
        return read_depth_array(path)
    if task == "normals":
        return read_normals_png(path) if path.suffix == ".png" else read_normals_array(path)
    # A pixel is an edge from half on, as in BalancedCrossEntropyLoss of SimonVandenhende/Multi-Task-Learning-PyTorch
    # (losses/loss_functions.py); the InvPT family trains on v / 255 as it is, the same for 0 and 255.
    return (read_grey(path) >= 128).astype(np.uint8) if path.suffix == ".png" else read_edge_array(path)
