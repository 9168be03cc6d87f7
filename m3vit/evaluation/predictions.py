"""`m3vit eval --predictions DIR`: the files that the published code stores before it scores them (protocol A).

DIR/semseg/ID.png, DIR/depth/ID.mat (variable `depth`), DIR/normals/ID.png, DIR/edge/ID.png, DIR/sal/ID.png,
DIR/human_parts/ID.png, in the label's size: what `save_model_predictions` of Vandenhende's and M3ViT's code writes
(evaluation/evaluate_utils.py:187 of Multi-Task-Learning-PyTorch, commit 53bcb32), and its `eval_all_results`, seism and
the benchmarks' own scripts read. An image without any label of a task is left out, as there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from m3vit.errors import InputError
from m3vit.files import atomic_path, require_empty
from m3vit.tasks import TASKS, kind_of

PUBLISHED = {"saliency": "sal"}  # where the published name of a task is another


class Store:
    """A folder of predictions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, protocol: str, tasks: Sequence[str]) -> None:
        """Make the folders, or raise InputError for a folder in use, or a protocol without such files."""
        if protocol != "A":
            raise InputError(
                f"--predictions are files that protocol A scores, and {protocol} stores edges alone: give --protocol A"
            )
        require_empty(self.folder, advice="give a new or empty folder for --predictions")
        for task in tasks:
            (self.folder / PUBLISHED.get(task, task)).mkdir(parents=True, exist_ok=True)

    def write(self, name: str, task: str, stored: Tensor, label: NDArray[Any]) -> None:
        """Write what the published code stores of an image: [D or 1, h, w] of `protocols.as_stored`."""
        kind = kind_of(task)
        if not TASKS[task].on_edge_truth(False) and np.array_equal(label, kind.no_label(label.shape[:2])):
            return
        values = stored.permute(1, 2, 0).numpy()
        values = values[..., 0] if values.shape[-1] == 1 else values
        path = self.folder / PUBLISHED.get(task, task) / f"{name}{kind.stored_file}"
        path.parent.mkdir(parents=True, exist_ok=True)  # of ids with folders
        with atomic_path(path) as temporary:
            if kind.stored_file == ".mat":
                with open(temporary, "wb") as file:
                    savemat(file, {task: values})
            else:  # .astype(np.uint8) there: truncated
                Image.fromarray(values.astype(np.uint8)).save(temporary, "PNG")
