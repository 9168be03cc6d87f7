"""Write a trained model as an hls4ml project that can be C-simulated and judged from its folder alone."""

import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3vit import __version__
from m3vit.digests import file_digests, write_sealed_json
from m3vit.errors import InputError
from m3vit.export.finite import require_finite
from m3vit.export.hls import convert, leaf, precision
from m3vit.export.hls.contents import EDITING, check_replaceable, editable_names
from m3vit.export.hls.multiplexed import convert as multiplexed
from m3vit.export.hls.multiplexed.readme import readme as multiplexed_readme
from m3vit.files import atomic_folder
from m3vit.hw.boards import check_tokens
from m3vit.hw.manifest import FORMAT, MANIFEST
from m3vit.hw.sim.csim import tokenise, write_input_lines
from m3vit.label_sets import describe
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.router import Routing
from m3vit.tasks import TASKS

log = logging.getLogger(__name__)
BATCH = 16
ACT_BITS = {"spatial": 20, "multiplexed": 16}  # by schedule: the width of feature maps unless told otherwise
SPATIAL_BITS = {"weight_bits": (6, 24), "act_bits": (8, 24)}  # least and most
BOARD = "zcu104"  # of the multiplexed schedule, unless told otherwise


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
    weight_bits: int = 16,
    act_bits: int | None = None,
    board: str | None = None,
) -> dict[str, Any]:
    """Write the project to `out` and return its manifest (m3vit.json).

    calibration: uint8 [m, H, W, 3], images that choose the fixed-point formats (not the samples, to be fair).
    `info` (JSON values: checkpoint, commit, ...) becomes the manifest's `run`. `schedule`: spatial (a kernel for each
    layer) or multiplexed (one engine of each kind, for a `board`: BOARD by default); act_bits: its ACT_BITS by default.
    An existing project of ours at `out` is replaced once the new one is complete. Raises InputError for models that
    cannot be exported, bad arguments and an `out` that holds anything else.
    """
    if schedule not in ACT_BITS:
        raise InputError(f"schedule is {schedule!r}: choose from {', '.join(ACT_BITS)}")
    act_bits = ACT_BITS[schedule] if act_bits is None else act_bits
    if schedule == "spatial":
        _check_spatial(weight_bits, act_bits, board)
    _check_images(model, calibration, samples)
    check_replaceable(out)
    require_finite(model)
    model = model.eval()
    write = _write_spatial if schedule == "spatial" else _write_multiplexed
    with atomic_folder(out) as folder:
        lowered, facts = write(folder, model, calibration, weight_bits, act_bits, board or BOARD)
        manifest = {**_manifest(model, lowered), "schedule": schedule, **facts, "run": info or {}}
        _write_samples(folder, model, lowered, samples, manifest)
        readme = _readme if schedule == "spatial" else multiplexed_readme
        (folder / "README.md").write_text(readme(manifest))
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        manifest["files"], manifest["editable"] = file_digests(folder, names), editable_names(names)
        write_sealed_json(folder / MANIFEST, manifest)
    log.info("HLS project written to %s", out)
    return manifest


def _write_spatial(
    folder: Path, model: MultiTaskModel, calibration: np.ndarray, weight_bits: int, act_bits: int, board: str
) -> tuple[leaf.LoweredModel, dict[str, Any]]:
    """Write the spatial schedule's files; return the lowered model and the manifest's precisions."""
    lowered = leaf.lower(model)
    seen = precision.calibrate(lowered, tokenise(calibration, lowered.patch))
    formats = precision.Chooser(seen, weight_bits, act_bits).choose()
    convert.write_project(lowered, formats, folder)
    texts = {
        name: {kind: value.text(exact=kind == "accum") for kind, value in types.items()}
        for name, types in formats.items()
    }
    inputs = {"tokens": {"result": precision.INPUT}, "task": {"result": precision.TASK}}
    return lowered, {"precision": {**inputs, **texts}}


def _write_multiplexed(
    folder: Path, model: MultiTaskModel, calibration: np.ndarray, weight_bits: int, act_bits: int, board: str
) -> tuple[leaf.LoweredModel, dict[str, Any]]:
    """Write the multiplexed schedule's files; return the lowered model and more of the manifest."""
    options = multiplexed.Options(board, weight_bits, act_bits)
    options.check()
    rows, columns = (side // model.backbone.patch_size for side in model.config.image_size)
    check_tokens(rows * columns + model.backbone.trunk.num_prefix_tokens)
    lowered = leaf.lower(model, streams=False)
    multiplexed.needed_hardware(lowered, options)  # refuses what does not fit before the long work
    return lowered, multiplexed.write_project(lowered, calibration, options, folder)


def _check_spatial(weight_bits: int, act_bits: int, board: str | None) -> None:
    """Raise InputError for options that the spatial schedule does not have."""
    if board is not None:
        raise InputError(
            f"--board {board}: the spatial schedule is for no board (its part is in project.tcl): leave it out or give "
            "--schedule multiplexed"
        )
    for name, value in (("weight_bits", weight_bits), ("act_bits", act_bits)):
        low, high = SPATIAL_BITS[name]
        if not low <= value <= high:
            raise InputError(f"{name} is {value}: the spatial schedule has {low} to {high}")


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


def _manifest(model: MultiTaskModel, lowered: leaf.LoweredModel) -> dict[str, Any]:
    widths, config = lowered.head.widths, model.config
    rows, columns = lowered.grid
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
            {"block": block, "experts": config.num_experts, "top_k": config.top_k}
            for block in model.backbone.moe_indices
        ],
    }


@torch.no_grad()
def reference(model: MultiTaskModel, images: np.ndarray, task: str) -> tuple[Tensor, list[Routing]]:
    """Return torch's token outputs [n, T, C_r] float32 for images uint8 [n, H, W, 3], and each MoE layer's routing."""
    batches = [
        leaf.reference_outputs(model, leaf.normalise(images[start : start + BATCH], model.normalisation), task)
        for start in range(0, len(images), BATCH)
    ]
    routings = [
        Routing(*(torch.cat(tensors, dim=1) for tensors in zip(*(routing[:3] for routing in layer), strict=True)))
        for layer in zip(*(routing for _, routing in batches), strict=True)
    ]
    return torch.cat([outputs for outputs, _ in batches]), routings


def _write_samples(
    folder: Path, model: MultiTaskModel, lowered: leaf.LoweredModel, samples: Samples, manifest: dict[str, Any]
) -> None:
    """Write tb_data/: samples.npz for `m3vit hw csim`, and the test bench's own input of one run a task (as text for
    the spatial schedule, as bytes for the other).

    samples.npz: ids, images; for each task `output_<task>` [n, T, C_r] float32, and `label_<task>_<i>` of each image i,
    at its own size; for each MoE layer l `experts_<task>_<l>` [n, N, K] and `margin_<task>_<l>` [n, N] float32, the gap
    between logits of rank K and K + 1.
    """
    n, top_k = len(samples.images), model.config.top_k
    arrays: dict[str, Any] = {"ids": np.array(samples.ids), "images": samples.images}
    for task in lowered.tasks:
        outputs, routings = reference(model, samples.images, task)
        arrays[f"output_{task}"] = outputs.numpy()
        arrays |= {f"label_{task}_{i}": labels[task] for i, labels in enumerate(samples.labels)}
        for layer, routing in enumerate(routings):
            ranked = routing.scores_RNE[0].log().sort(dim=-1, descending=True).values  # logits, up to a constant
            gap = ranked[:, top_k - 1] - ranked[:, top_k] if top_k < ranked.shape[1] else ranked[:, 0] * 0 + np.inf
            arrays[f"experts_{task}_{layer}"] = routing.expert_ids_RNK[0].numpy().astype(np.int16).reshape(n, -1, top_k)
            arrays[f"margin_{task}_{layer}"] = gap.numpy().reshape(n, -1)
    data = folder / "tb_data"
    data.mkdir(exist_ok=True)
    np.savez_compressed(data / "samples.npz", **arrays)
    if manifest["schedule"] == "multiplexed":
        multiplexed.write_check(folder, samples.images, len(lowered.tasks))
        return
    tokens = tokenise(samples.images[:1], lowered.patch).repeat(len(lowered.tasks), axis=0)
    write_input_lines(data / "tb_input_features.dat", tokens, np.arange(len(lowered.tasks)))
    expected = np.zeros((len(lowered.tasks), manifest["tokens"], manifest["outputs"]), dtype=np.float32)
    for row, task in zip(expected, lowered.tasks, strict=True):
        first = arrays[f"output_{task}"][0]
        row[:, : first.shape[-1]] = first
    np.savetxt(data / "tb_output_predictions.dat", expected.reshape(len(expected), -1), fmt="%.7g")


def _readme(manifest: dict[str, Any]) -> str:
    tasks = "\n".join(f"| {t['id']} | {t['name']} | {t['channels']} | {t['outputs']} |" for t in manifest["tasks"])
    rows, columns = manifest["grid"]
    height, width = manifest["image_size"]
    patch = manifest["patch_size"]
    return f"""# m3vit: an hls4ml project

Written by m3vit {manifest["m3vit"]} with hls4ml {manifest["hls4ml"]} (backend Vitis, io_stream). One accelerator for
{len(manifest["tasks"])} tasks: the task is an input, chosen for each image.

**It was never synthesised.** It is C-simulated with g++; no figure about an FPGA follows from that.

## C-simulate

```
g++ -O3 -std=c++17 -w -Ifirmware/ap_types -DWEIGHTS_DIR='"firmware/weights"' \\
    firmware/m3vit.cpp m3vit_test.cpp -o csim.exe
./csim.exe > /dev/null      # tb_data/tb_input_features.dat -> tb_data/csim_results.log, one line a run
m3vit hw csim .             # all stored images, all tasks, against torch -> csim.json
```

`tb_data/tb_input_features.dat` holds the first stored image once for each task; torch's outputs for it are in
`tb_data/tb_output_predictions.dat`. With `M3VIT_ROUTING_LOG=file` in the environment, each MoE layer appends which
experts its tokens went to. `-DM3VIT_HLS4ML_DENSE` simulates hls4ml's own Linear kernel instead of its bit-identical
stand-in on machine integers (see `firmware/nnet_utils/m3vit_dense.h`), about five times slower.

In Python, from this folder: `hls4ml.converters.link_existing_project('.')`, then `compile()` and
`predict([tokens, task])`.

## Inputs and outputs

- `tokens` [{manifest["tokens"]}, {manifest["token_width"]}], `{manifest["precision"]["tokens"]["result"]}`: the RGB
  image of {height} x {width} pixels cut into {rows} x {columns} patches of {patch} x {patch}, row by row; a token
  is one patch in the order colour, y, x; a value is pixel / 256. Normalisation is folded into the weights.
- `task` [1], `{manifest["precision"]["task"]["result"]}`: the task id (an unknown one counts as 0).
- output [{manifest["tokens"]}, {manifest["outputs"]}], `{manifest["precision"]["head"]["result"]}`: for each
  token the outputs of the task, zeros beyond its own. A pixel shuffle by {manifest["upscale"]} makes them
  the logits.

| task id | task | channels | outputs per token |
|---|---|---|---|
{tasks}

## What is where

hls4ml's layout; ours are `firmware/nnet_utils/m3vit_*.h` (layer norm, attention, mixture of experts, ...), `m3vit.json`
(sizes, precisions, sha256 of every file) and `tb_data/samples.npz` (images, labels, torch's outputs and routing).

{EDITING.format(formats="defines.h")}"""
