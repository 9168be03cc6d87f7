"""`m3vit export hls`: from a run folder to an hls4ml project with validation samples inside."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as tv

from m3vit.data.loading import open_split
from m3vit.data.nyud import NYUD
from m3vit.data.transforms import image_tensor
from m3vit.errors import InputError
from m3vit.export.hls.project import Samples, export_project
from m3vit.training.checkpoint import Run

SAMPLES = 100  # validation images stored, unless told otherwise
CALIBRATION_IMAGES = 32  # of the training split; they choose the fixed-point types


def export_run(
    run: Run,
    out: Path,
    *,
    data_root: str | None = None,
    samples: int | None = None,
    weight_bits: int = 16,
    act_bits: int = 20,
) -> dict[str, Any]:
    """Write the project of a run to `out`; `samples` validation images go with it, for `m3vit hw csim`."""
    tasks, root = run.config.model.tasks, data_root or run.config.data.root
    train, val = (open_split(run.config.data.layout, root, split, tasks) for split in ("train", "val"))
    if samples is None:
        samples = min(SAMPLES, len(val))
    if samples > len(val):
        raise InputError(f"--samples {samples}: the val split of {root} has {len(val)} images")
    size = (run.config.model.image_size[0], run.config.model.image_size[1])
    calibration = np.stack([resized(train, index, size) for index in range(min(CALIBRATION_IMAGES, len(train)))])
    chosen = [val.load(index) for index in range(samples)]
    return export_project(
        run.model,
        out,
        calibration=calibration,
        samples=Samples(
            ids=[sample.id for sample in chosen],
            images=np.stack([resized(val, index, size) for index in range(samples)]),
            labels={task: np.stack([sample.labels[task] for sample in chosen]) for task in tasks},
        ),
        info=run.info,
        weight_bits=weight_bits,
        act_bits=act_bits,
    )


def resized(split: NYUD, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return one image of a split as the model sees it before normalisation: uint8 [*size, 3]."""
    image = tv.resize(image_tensor(split.load(index).image), list(size))
    return image.permute(1, 2, 0).contiguous().numpy()
