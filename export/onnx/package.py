"""The ONNX package: one small graph per task, one weights file for all of them, one manifest.

Every file is listed in the manifest with its sha256; `m3vit.export.runtime` reads and checks it, without torch.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from onnx import ModelProto, TensorProto, numpy_helper

import m3vit
from m3vit.errors import InputError
from m3vit.evaluation.protocols import EVALUATION_FILES
from m3vit.export.onnx.graph import export_task
from m3vit.export.runtime import FORMAT, FORMAT_VERSION, MANIFEST
from m3vit.files import atomic_folder, read_json, sha256_file, write_json
from m3vit.models.multitask import MultiTaskModel
from m3vit.tasks import IMAGE_MEAN, IMAGE_STD, Task, palette, resolve

WEIGHTS = "weights.bin"
MIN_EXTERNAL = 1024  # bytes; smaller tensors stay in the graph, where the tools that fold shapes expect them
PAGE = 4096  # bytes; onnxruntime maps the file, and a mapping starts at a page
PAGE_FROM = 4 * PAGE  # bytes; tensors below this share pages, aligned for vector loads: padding each would waste more
SMALL_ALIGN = 64

# The unit of a decoded prediction, by kind of decoding.
UNITS = {
    "argmax": "class id",
    "identity": "m",
    "unit_vector": "unit vector: x right, y up, z towards the camera",
    "sigmoid": "probability",
}


def export_package(
    model: MultiTaskModel,
    out: Path,
    *,
    info: dict[str, Any],
    opset: int = 20,
    size: tuple[int, int] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Export every task of the model into the folder `out`, and return the manifest.

    Writes `<task>.onnx` for each task, `weights.bin` and `manifest.json`; `info` (JSON values: checkpoint, commit,
    ...) becomes the manifest's `run`. `size` and `opset` are those of `export_task`; `progress` gets a line a step.
    Everything is written to a folder beside `out` first, so that a failure leaves `out` as it was. An earlier
    package at `out` is replaced.

    Raises InputError for an `out` that holds anything but an earlier package, and what `export_task` raises.
    """
    _check_replaceable(out)
    say = progress or (lambda line: None)
    with atomic_folder(out) as folder:
        tasks: dict[str, Any] = {}
        with open(folder / WEIGHTS, "wb") as file:
            weights = _WeightsFile(file)
            for number, task in enumerate(resolve(model.config.tasks, model.config.label_set), start=1):
                say(f"exporting {task.name} ({number} of {len(model.config.tasks)})")
                graph = export_task(model, task.name, opset=opset, size=size)
                weights.take(graph)
                with open(folder / f"{task.name}.onnx", "wb") as graph_file:
                    graph_file.write(graph.SerializeToString(deterministic=True))
                    _flush(graph_file)
                tasks[task.name] = _task_entry(model, task, size)
            _flush(file)
        say("checking the graphs and hashing the files")
        for name, entry in tasks.items():
            onnx.checker.check_model(str(folder / entry["file"]), full_check=True)
            tasks[name] = {"file": entry.pop("file"), "sha256": sha256_file(folder / f"{name}.onnx"), **entry}
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "project_version": m3vit.__version__,
            "opset": opset,
            "weights": {
                "file": WEIGHTS,
                "sha256": sha256_file(folder / WEIGHTS),
                "bytes": (folder / WEIGHTS).stat().st_size,
            },
            # Input of the graphs: (image / 255 - mean) / std, RGB, float32 [B, 3, H, W].
            "image": {"mean": list(IMAGE_MEAN), "std": list(IMAGE_STD), "train_size": list(model.config.image_size)},
            "label_set": model.config.label_set,
            "tasks": tasks,
            "run": info,
        }
        write_json(folder / MANIFEST, manifest)
    return manifest


def _task_entry(model: MultiTaskModel, task: Task, size: tuple[int, int] | None) -> dict[str, Any]:
    """Return what the manifest says about a task, without the hash."""
    config = model.config
    entry: dict[str, Any] = {
        "file": f"{task.name}.onnx",
        "channels": config.labels.channels(task.name),
        "decode": task.decode,
        "unit": UNITS[task.decode],
        "input_size": list(size) if size else None,
        "patch_multiple": model.backbone.patch_size,
        "experts": {
            "kept": "all",
            "per_layer": config.num_experts,
            "top_k": config.top_k,
            "layers": list(model.backbone.moe_indices),
        },
    }
    if task.decode == "argmax":
        entry["classes"] = list(config.labels.classes[task.name])
        entry["palette"] = [list(colour) for colour in palette(config.labels.classes[task.name])]
    return entry


class _WeightsFile:
    """Writes tensors to one file, each content once, whichever graph or name it comes under."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.places: dict[bytes, tuple[int, int]] = {}  # sha256 -> offset, length
        self.end = 0

    def take(self, graph: ModelProto) -> None:
        """Move the graph's tensors of 1 KiB and more to the file, leaving references to it."""
        for tensor in graph.graph.initializer:
            # raw_data is little-endian by definition; to_array().tobytes() covers the typed fields.
            data = tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()
            if len(data) < MIN_EXTERNAL:
                continue
            offset, length = self._place(data)
            kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            kept.data_location = TensorProto.EXTERNAL
            for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
                kept.external_data.add(key=key, value=value)
            tensor.CopyFrom(kept)

    def _place(self, data: bytes) -> tuple[int, int]:
        key = hashlib.sha256(data).digest()
        if key not in self.places:
            align = PAGE if len(data) >= PAGE_FROM else SMALL_ALIGN
            offset = -(-self.end // align) * align
            self.file.write(bytes(offset - self.end) + data)
            self.places[key] = (offset, len(data))
            self.end = offset + len(data)
        return self.places[key]


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _check_replaceable(out: Path) -> None:
    """Raise InputError if writing to `out` would destroy anything but an earlier package."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file: give a folder for the package")
    found = {path.name for path in out.iterdir()}
    if not found:
        return
    advice = "give a new or empty folder"
    if MANIFEST not in found:
        raise InputError(f"{out} is not empty and holds no package (no {MANIFEST}): {advice}")
    manifest = read_json(out / MANIFEST, f"no package to replace; {advice}")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{out / MANIFEST} is not an m3vit package's: {advice}")
    # A package is replaced by removing its folder: nothing of the user's may be in it.
    own = {MANIFEST, WEIGHTS, *EVALUATION_FILES, *(f"{task}.onnx" for task in manifest.get("tasks", {}))}
    if foreign := sorted(found - own):
        raise InputError(
            f"{out} holds files that are not the package's ({', '.join(foreign[:3])}): move them, or {advice}"
        )
