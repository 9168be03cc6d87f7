"""`m3vit export hls`: from a run folder to an hls4ml project with validation samples inside."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.data.opening import open_split
from m3vit.data.sample import Sample
from m3vit.errors import InputError
from m3vit.evaluation.protocols import network_image
from m3vit.export.hls.options import Request
from m3vit.export.hls.project import Samples, export_project
from m3vit.export.hls.schedules import Progress, silent
from m3vit.models.budget import FULL, Budget
from m3vit.models.multitask import MultiTaskModel
from m3vit.run_folder import Run
from m3vit.tasks import TASKS
from m3vit.training.budgets import require_trained_run

SAMPLES = 100  # validation images stored, unless told otherwise
SAMPLES_MIN = 4  # of them, however large the model is
SAMPLES_WORK = 10**12  # tokens x weights x tasks of all of them: about a minute of torch, and below 100 MB
CALIBRATION_IMAGES = 32  # of the training split; they choose the fixed-point types
CALIBRATION_TOKENS = 8192  # of all of them together, beyond CALIBRATION_MIN images: a large image says more
CALIBRATION_MIN = 4


def default_images(model: MultiTaskModel) -> tuple[int, int]:
    """Return how many training images calibrate a model of its size, and how many validation images are stored."""
    height, width = model.config.image_size
    tokens = height * width // model.backbone.patch_size**2
    work = tokens * len(model.config.tasks) * sum(weight.numel() for weight in model.backbone.parameters())
    calibration = min(CALIBRATION_IMAGES, max(CALIBRATION_MIN, CALIBRATION_TOKENS // tokens))
    return calibration, max(SAMPLES_MIN, min(SAMPLES, SAMPLES_WORK // work))


def export_run(
    run: Run,
    out: Path,
    request: Request = Request(),
    *,
    budget: Budget = FULL,
    budgets: Mapping[str, Budget] = MappingProxyType({}),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the project of a run to `out`, with validation images for `m3vit hw csim`.

    `budget`: what is used of the model; or `budgets`: several, by name, the first the project's own (multiplexed
    schedule). InputError for one that is another model's, or more than the engines can keep to.
    """
    for one in budgets.values() or [budget]:
        require_trained_run(run, one)
    tasks, labels = run.config.model.tasks, run.config.model.label_set
    root = request.data_root or run.config.data.root
    train, val = (
        open_split(run.config.data.layout, root, split, tasks, label_set=labels) for split in ("train", "val")
    )
    size = (run.config.model.image_size[0], run.config.model.image_size[1])
    images, few = default_images(run.model)
    samples = min(few, len(val)) if request.samples is None else request.samples
    if samples > len(val):
        raise InputError(f"--samples {samples}: the val split of {root} has {len(val)} images")
    calibration = np.stack([pixels(train.load(index), size) for index in range(min(images, len(train)))])
    # First those with all labels, where some images lack one.
    order = sorted(range(len(val)), key=lambda index: sum(not val.has(index, task) for task in tasks))[:samples]
    chosen = [val.load(index) for index in order]
    for index, sample in zip(order, chosen, strict=True):
        for task in tasks:
            if TASKS[task].matches_edges and task not in sample.unlabelled:
                sample.labels[task] = val.edge_truth(index)
    return export_project(
        run.model,
        out,
        calibration=calibration,
        samples=Samples(
            ids=[sample.id for sample in chosen],
            images=np.stack([pixels(sample, size) for sample in chosen]),
            labels=[sample.labels for sample in chosen],
        ),
        info=run.info,
        schedule=request.schedule,
        weight_bits=request.weight_bits,
        act_bits=request.act_bits,
        board=request.board,
        **request.engines,
        budget=budget,
        budgets=budgets,
        progress=progress,
    )


def pixels(sample: Sample, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return an image as the model sees it before normalisation (protocol A): uint8 [*size, 3]."""
    return network_image("A", sample.id, sample.image, size).pixels
