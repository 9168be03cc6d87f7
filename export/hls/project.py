"""Write a trained model as an hls4ml project that can be C-simulated and judged from its folder alone."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3vit import __version__
from m3vit.digests import file_digests, write_sealed_json
from m3vit.errors import InputError
from m3vit.export.finite import require_finite
from m3vit.export.hls import leaf
from m3vit.export.hls.budgets import described
from m3vit.export.hls.contents import check_replaceable, editable_names
from m3vit.export.hls.schedules import Options, Progress, choose_options, find_schedule, silent
from m3vit.files import atomic_folder
from m3vit.hw.manifest import FORMAT, MANIFEST, SAMPLES, sample_name
from m3vit.label_sets import describe
from m3vit.models.budget import FULL, Budget
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.router import Routing
from m3vit.tasks import TASKS

log = logging.getLogger(__name__)
BATCH_TOKENS = 4096  # of torch's reference, run at once


@dataclass
class Samples:
    """Images to judge a project on: ids, images uint8 [n, H, W, 3] at the model's size, each image's labels as loaded.

    The label of edge is what odsF is scored against (`Split.edge_truth`).
    """

    ids: list[str]
    images: np.ndarray
    labels: list[dict[str, np.ndarray]]


def export_project(
    model: MultiTaskModel,
    out: Path,
    *,
    calibration: np.ndarray,
    samples: Samples,
    info: dict[str, Any] | None = None,
    schedule: str = "spatial",
    weight_bits: int | None = None,
    act_bits: int | None = None,
    board: str | None = None,
    part: str | None = None,
    clock: int | None = None,
    array: int | None = None,
    port_bits: int | None = None,
    ports: int | None = None,
    residual_bits: int | None = None,
    layer_bits: str | None = None,
    config: Path | None = None,
    budget: Budget = FULL,
    budgets: Mapping[str, Budget] = MappingProxyType({}),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the project to `out` and return its manifest (m3vit.json).

    calibration: uint8 [m, H, W, 3], images that choose the fixed-point formats (not the samples, to be fair).
    `info` (JSON values: checkpoint, commit, ...) becomes the manifest's `run`. `schedule`: of SCHEDULES,
    which has defaults and limits for the other options. `budget`: what is used of the model; or `budgets`: several, by
    name, the first the project's own. `progress`: told of the long work.
    An existing project of ours at `out` is replaced once the new one is complete. Raises InputError for models that
    cannot be exported, bad arguments and an `out` that holds anything else.
    """
    chosen = find_schedule(schedule)
    fixed: dict[str, Any] = {
        "part": part,
        "clock": clock,
        "array": array,
        "port_bits": port_bits,
        "ports": ports,
        "config": config,
    }
    fixed |= {"residual_bits": residual_bits, "layer_bits": layer_bits}
    options = choose_options(schedule, weight_bits, act_bits, board, fixed)
    options = replace(options, budgets=dict(budgets) or {"": budget}, progress=progress)
    if len(options.budgets) > 1 and not getattr(chosen, "SEVERAL_BUDGETS", False):
        raise InputError(
            f"--budget names {len(options.budgets)} budgets, and a project of the {schedule} schedule has one: give "
            "one, or --schedule multiplexed"
        )
    _check_images(model, calibration, samples)
    check_replaceable(out)
    require_finite(model)
    model = model.eval()
    progress(0, 1, "lowering the model")
    with atomic_folder(out) as folder:
        lowered, facts = chosen.write(folder, model, calibration, options)
        manifest = {**_manifest(model, lowered, options.budgets), "schedule": schedule, **facts, "run": info or {}}
        outputs = _write_samples(folder / SAMPLES, model, samples, options)
        progress(0, 1, "the test bench's frames")
        chosen.write_bench(folder, samples.images, outputs, manifest)
        (folder / "README.md").write_text(chosen.readme(manifest))
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        manifest["files"], manifest["editable"] = file_digests(folder, names), editable_names(names)
        write_sealed_json(folder / MANIFEST, manifest)
    log.info("HLS project written to %s", out)
    return manifest


def _check_images(model: MultiTaskModel, calibration: np.ndarray, samples: Samples) -> None:
    expected = (*model.config.image_size, 3)
    for name, images in (("calibration", calibration), ("sample", samples.images)):
        if images.dtype != np.uint8 or images.shape[1:] != expected or not len(images):
            raise InputError(
                f"{name} images are {images.dtype} {images.shape}: give at least one, uint8 [n, {expected[0]}, "
                f"{expected[1]}, 3]"
            )
    for task in model.config.tasks:
        if len(samples.labels) != len(samples.images) or any(task not in labels for labels in samples.labels):
            raise InputError(f"samples have no {task} label for each image")


def _manifest(model: MultiTaskModel, lowered: leaf.LoweredModel, budgets: Mapping[str, Budget]) -> dict[str, Any]:
    widths, config = lowered.widths, model.config
    rows, columns = lowered.grid
    said = described(model, budgets)
    # What moe_layers cannot say.
    uneven = any(len(set(counts)) > 1 for counts in said[0]["top_k"]) or next(iter(budgets.values())).width
    return {
        "format": FORMAT,
        "m3vit": __version__,
        "hls4ml": version("hls4ml"),
        "torch": version("torch"),
        "label_set": config.label_set,
        "labels": describe(config.label_set),
        "image_size": list(config.image_size),
        "normalisation": model.normalisation.plain(),  # folded into the weights
        "patch_size": lowered.patch,
        "grid": [rows, columns],
        "tokens": rows * columns,
        "prefix_tokens": lowered.head.prefix,
        "token_width": 3 * lowered.patch**2,
        "outputs": max(widths),
        "upscale": leaf.token_heads(model)[config.tasks[0]].upscale,
        "pixels_first": hasattr(
            lowered, "pixel_head"
        ),  # a token's outputs are [upscale, upscale, C], else channels first
        "tasks": [
            {
                "name": task,
                "id": index,
                "outputs": widths[index],
                "channels": config.labels.channels(task),
                "decode": TASKS[task].kind,
            }
            for index, task in enumerate(config.tasks)
        ],
        "moe_layers": [
            {"block": block, "experts": len(layer.w1), "top_k": max(counts)}
            for block, layer, counts in zip(
                model.backbone.moe_indices, lowered.moe_layers(), said[0]["top_k"], strict=True
            )
        ],
        **({"budgets": said} if len(said) > 1 or uneven else {}),
    }


@torch.no_grad()
def reference(
    model: MultiTaskModel, images: np.ndarray, task: str, budget: Budget = FULL
) -> tuple[Tensor, list[Routing]]:
    """Return torch's token outputs [n, T, C_r] float32 for images uint8 [n, H, W, 3], and each MoE layer's routing."""
    step = max(1, BATCH_TOKENS * model.backbone.patch_size**2 // (images.shape[1] * images.shape[2]))
    batches = [
        leaf.reference_outputs(model, leaf.normalise(images[start : start + step], model.normalisation), task, budget)
        for start in range(0, len(images), step)
    ]
    routings = [
        Routing(*(torch.cat(tensors, dim=1) for tensors in zip(*(routing[:3] for routing in layer), strict=True)))
        for layer in zip(*(routing for _, routing in batches), strict=True)
    ]
    return torch.cat([outputs for outputs, _ in batches]), routings


def _write_samples(path: Path, model: MultiTaskModel, samples: Samples, options: Options) -> dict[str, np.ndarray]:
    """Write samples.npz for `m3vit hw csim`; return torch's outputs [n, T, C_r] by task, under the project's budget.

    It holds ids, images; for each task `output_<task>` [n, T, C_r] float32, and `label_<task>_<i>` of each image i,
    at its own size; for each MoE layer l `experts_<task>_<l>` [n, N, K] and `margin_<task>_<l>` [n, N] float32, the gap
    between logits of rank K and K + 1. Results under further budgets are called as `sample_name` says.
    """
    n, tasks = len(samples.images), model.config.tasks
    arrays: dict[str, Any] = {"ids": np.array(samples.ids), "images": samples.images}
    arrays |= {f"label_{task}_{i}": labels[task] for task in tasks for i, labels in enumerate(samples.labels)}
    work = [(number, budget, task) for number, budget in enumerate(options.budgets.values()) for task in tasks]
    for place, (number, budget, task) in enumerate(work):
        options.progress(place, len(work), f"torch's outputs of {n} samples, {task}")
        outputs, routings = reference(model, samples.images, task, budget)
        arrays[sample_name(f"output_{task}", number)] = outputs.numpy()
        for layer, routing in enumerate(routings):
            top_k = routing.expert_ids_RNK.shape[-1]
            ranked = routing.scores_RNE[0].log().sort(dim=-1, descending=True).values  # logits, up to a constant
            gap = ranked[:, top_k - 1] - ranked[:, top_k] if top_k < ranked.shape[1] else ranked[:, 0] * 0 + np.inf
            ids = routing.expert_ids_RNK[0].numpy().astype(np.int16).reshape(n, -1, top_k)
            arrays[sample_name(f"experts_{task}_{layer}", number)] = ids
            arrays[sample_name(f"margin_{task}_{layer}", number)] = gap.numpy().reshape(n, -1)
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **arrays)
    return {task: arrays[f"output_{task}"] for task in tasks}
