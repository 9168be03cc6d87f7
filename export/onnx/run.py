"""`m3vit export onnx`: from a run folder to a checked package."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from m3vit.data.opening import open_split
from m3vit.data.transforms import network_input
from m3vit.errors import InputError
from m3vit.export.onnx.package import Content, export_package
from m3vit.export.onnx.parity import check_parity
from m3vit.training.checkpoint import Run

PARITY_IMAGES = 8  # validation images the package is compared with torch on, beside noise


def export_run(
    run: Run,
    out: Path,
    *,
    opset: int = 20,
    size: tuple[int, int] | None = None,
    data_root: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write the package of a run to `out`, compare it with torch, and say a line per file and per task."""
    images = parity_images(run, data_root)
    export_package(run.model, out, Content(opset=opset, size=size), info=run.info, progress=say)
    for path in sorted(out.iterdir()):
        say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    say("comparing with torch")
    for task, result in check_parity(run.model, out, images).items():
        unseen = sum(len(experts) for experts in result["experts_not_hit"].values())
        say(
            f"{task}: worst relative error {result['worst_relative_error']:.1e} ({result['worst_at']}) in "
            f"{result['comparisons']} comparisons"
            + (f"; {unseen} experts got no token and were not compared" if unseen else "")
            + (f"; {result['near_tie_images']} images with near ties" if result["near_tie_images"] else "")
        )


def parity_images(run: Run, data_root: str | None) -> np.ndarray:
    """Return normalised images [n, 3, H, W]: the run's own validation images if they are there, else noise."""
    size = (run.config.model.image_size[0], run.config.model.image_size[1])
    try:
        split = open_split(run.config.data.layout, data_root or run.config.data.root, "val", [])
    except InputError:
        if data_root:  # asked for: a mistake, not a reason to do without
            raise
        return np.random.default_rng(0).normal(size=(PARITY_IMAGES, 3, *size)).astype(np.float32)
    count = min(PARITY_IMAGES, len(split))
    return np.stack([network_input(split.load(index).image, size).numpy() for index in range(count)])
