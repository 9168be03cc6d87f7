"""NYUD-v2 in the layout of the NYUD_MT release (Vandenhende's, used by M3ViT). No torch.

On disk (reference: the loaders of the M3ViT and Multi-Task-Learning-PyTorch repositories):
    gt_sets/{train,val}.txt   one id per line
    images/{id}.jpg           RGB
    segmentation/{id}.png     uint8; 0 unlabelled, 1..40 classes
    depth/{id}.npy            metres, 0 invalid
    normals/{id}.npy          [H, W, 3], zero vectors invalid
    edge/{id}.npy             0 or 1
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3vit.errors import InputError
from m3vit.tasks import IGNORE, TASKS


@dataclass
class Sample:
    """One image [H, W, 3] uint8 and its labels, in the conventions of m3vit.tasks.

    semseg [H, W] uint8, depth [H, W] float32, normals [H, W, 3] float32, edge [H, W] uint8.
    """

    id: str
    image: NDArray[np.uint8]
    labels: dict[str, NDArray]


class NYUD:
    """One split of NYUD_MT (or of `m3vit data synth --layout nyud`, which writes the same files)."""

    FOLDERS: ClassVar[dict[str, str]] = {
        "semseg": "segmentation",
        "depth": "depth",
        "normals": "normals",
        "edge": "edge",
    }

    def __init__(self, root: Path, split: str, tasks: Sequence[str] = tuple(FOLDERS)) -> None:
        self.root, self.split, self.tasks = root, split, tuple(tasks)
        missing = [task for task in self.tasks if task not in self.FOLDERS]
        if missing:
            raise InputError(f"NYUD has no labels for {', '.join(missing)}: its tasks are {', '.join(self.FOLDERS)}")
        if not root.is_dir():
            raise InputError(f"data root {root} not found: give the folder that holds gt_sets/ with --data.root")
        listing = root / "gt_sets" / f"{split}.txt"
        if not listing.is_file():
            raise InputError(
                f"{listing} not found: {root} is not in the NYUD_MT layout (images/, depth/, gt_sets/, ...)"
            )
        try:
            self.ids = listing.read_text().split()
        except UnicodeDecodeError:
            raise InputError(f"{listing} is not text: it holds one image id a line") from None
        if not self.ids:
            raise InputError(f"{listing} lists no image")
        first = root / "images" / self.ids[0]
        if not first.with_suffix(".jpg").exists() and first.with_suffix(".png").exists():
            raise InputError(
                f"{root} is the NYUDv2 release of ATRC/InvPT (png images); this version reads NYUD_MT (jpg images)"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int, kind: str) -> Path:
        """Return the file of a sample's "image" or of one of its labels."""
        if kind == "image":
            return self.root / "images" / f"{self.ids[index]}.jpg"
        return self.root / self.FOLDERS[kind] / f"{self.ids[index]}{'.png' if kind == 'semseg' else '.npy'}"

    def load(self, index: int) -> Sample:
        """Read one sample, or raise InputError naming the file that is missing, damaged or of the wrong size."""
        image = _read(self.path(index, "image"), lambda path: np.asarray(Image.open(path).convert("RGB")))
        labels = {}
        for task in self.tasks:
            path = self.path(index, task)
            label = _read(path, READERS[task])
            expected = (*image.shape[:2], 3) if task == "normals" else image.shape[:2]
            if label.shape != expected:
                raise InputError(f"{path} has shape {label.shape}, its image {image.shape[:2]}: expected {expected}")
            labels[task] = label
        return Sample(self.ids[index], image, labels)


def _read(path: Path, reader: Callable[[Path], NDArray]) -> NDArray:
    try:
        return reader(path)
    except FileNotFoundError:
        raise InputError(f"{path} not found, though gt_sets lists it: the data set is incomplete") from None
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, AttributeError, MemoryError) as error:
        raise InputError(f"{path} cannot be read ({error}): replace the file") from None


def _read_array(path: Path) -> NDArray[np.float32]:
    array = np.load(path, allow_pickle=False)
    if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
        raise ValueError("holds values that are not finite numbers")
    return array.astype(np.float32, copy=False)


def _read_semseg(path: Path) -> NDArray[np.uint8]:
    stored = np.asarray(Image.open(path))
    if stored.dtype != np.uint8 or stored.max(initial=0) > TASKS["semseg"].channels:
        raise ValueError(f"expected uint8 ids 0..{TASKS['semseg'].channels}, found {stored.dtype} up to {stored.max()}")
    return np.where(stored == 0, IGNORE, stored - np.uint8(1)).astype(np.uint8)


def _read_depth(path: Path) -> NDArray[np.float32]:
    depth = _read_array(path)
    if depth.min(initial=0) < 0:
        raise ValueError("holds negative depths")
    return depth


def _read_edge(path: Path) -> NDArray[np.uint8]:
    return (_read_array(path) > 0).astype(np.uint8)


READERS: dict[str, Callable[[Path], NDArray]] = {
    "semseg": _read_semseg,
    "depth": _read_depth,
    "normals": _read_array,
    "edge": _read_edge,
}
