"""The ONNX package: small graphs per task and precision, one weights file for all of them, one manifest.

Every file is listed in the manifest with its sha256; `m3vit.export.runtime.package` reads and checks it, without torch.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

import m3vit
from m3vit import plugins
from m3vit.digests import read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation.protocols import EVALUATION_FILES
from m3vit.export.finite import require_finite
from m3vit.export.onnx.graph import of_task, require_onnx, trace_all_tasks, trace_backbone, trace_head, trace_tasks
from m3vit.export.onnx.lower import copied, lower_moe
from m3vit.export.onnx.options import Content
from m3vit.export.onnx.quantize import FLOAT, quantize
from m3vit.export.runtime.manifest import ALL, FORMAT, FORMAT_VERSION, MANIFEST, file_entries
from m3vit.files import atomic_folder, read_json, require_replaceable, sha256_file
from m3vit.label_sets import describe, resolve
from m3vit.models.budget import Budget
from m3vit.models.multitask import MultiTaskModel
from m3vit.profiling import graph_macs
from m3vit.tasks import Task, kind_of

WEIGHTS = "weights.bin"
MIN_EXTERNAL = 1024  # bytes; smaller tensors stay in the graph, where the tools that fold shapes expect them
PAGE = 4096  # bytes; onnxruntime maps the file, and a mapping starts at a page
PAGE_FROM = 4 * PAGE  # bytes; tensors below this share pages, aligned for vector loads: padding each would waste more
SMALL_ALIGN = 64


def export_package(
    model: MultiTaskModel,
    out: Path,
    content: Content | None = None,
    *,
    info: dict[str, Any],
    progress: Callable[[str], None] | None = None,
    check: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Export the model, or some of its tasks, into the folder `out`, and return the manifest.

    Writes `<task>.onnx` for each task and precision, `weights.bin` and `manifest.json`; `info` (JSON values:
    checkpoint, commit, ...) becomes the manifest's `run`; `progress` gets a line a step. Everything is written to a
    folder beside `out` first, so that a failure leaves `out` as it was. An earlier package at `out` is replaced.
    `check` gets that folder when the package in it is complete; what it raises is such a failure, and what it writes
    into the manifest stays there.

    Raises InputError for an `out` that holds anything but an earlier package, for weights that are not finite, and what
    `Content.check`, `trace_task`, `lower_moe` and `quantize` raise.
    """
    content = content or Content()
    content.check()
    require_replaceable(out, "package", MANIFEST, partial(_own_files, out))
    require_onnx(model)
    require_finite(model)
    say = progress or (lambda line: None)
    for name in content.tasks:
        model.task_id(name)
    names = [name for name in model.config.tasks if name in (content.tasks or model.config.tasks)]
    if content.all_tasks and len(names) < 2:
        raise InputError("a graph of all tasks at once is of two tasks or more: leave out --all-tasks")
    model.uses(content.budget, names)  # refuses what the model does not have before the long work
    with atomic_folder(out) as folder:
        tasks, parts = _write_graphs(model, names, folder, content, say)
        say("checking the graphs and hashing the files")
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "project_version": m3vit.__version__,
            "opset": content.opset,
            "form": content.form,
            "attention": content.attends,  # fused: the graphs need onnxruntime
            "precisions": list(content.precisions),
            "weights": {"file": WEIGHTS},
            # Input of the graphs: (image / 255 - mean) / std, RGB, float32 [B, 3, H, W].
            "image": {**model.normalisation.plain(), "train_size": list(model.config.image_size)},
            "label_set": model.config.label_set,
            "labels": describe(model.config.label_set),
            "plugins": [Path(given).name for given in plugins.loaded()],  # which a kind of a task may be of
            "tasks": tasks,
            **parts,
            "macs": max(entry["macs"] for entry in tasks.values()),  # of one image, of input_size or else train_size
            "run": info,
        }
        for entry in file_entries(manifest):
            path = folder / entry["file"]
            entry["sha256"] = sha256_file(path)
            entry.setdefault("bytes", path.stat().st_size)
            if path.suffix == ".onnx":
                onnx.checker.check_model(str(path), full_check=True)
        write_sealed_json(folder / MANIFEST, manifest)
        if check is not None:
            check(folder)
            manifest = read_sealed_json(folder / MANIFEST, "export the package again")
    return manifest


def _write_graphs(
    model: MultiTaskModel, names: Sequence[str], folder: Path, content: Content, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the graphs and their weights; return the manifest's entries of the tasks, and of what serves all of them:
    `backbone`, a graph of it, and `all_tasks`, one of all tasks at once; None where there is none."""
    with open(folder / WEIGHTS, "wb") as file:
        writer = _Writer(folder, _WeightsFile(file), content)
        traced = trace_tasks(model, names, opset=content.opset, size=content.size, batch=content.batch)
        tasks: dict[str, Any] = {}
        for number, task in enumerate(resolve(names, model.config.label_set), start=1):
            say(f"exporting {task.name} ({number} of {len(names)})")
            graphs = writer.task(model, of_task(traced, model, task.name), task.name)
            tasks[task.name] = {"graphs": graphs, **_task_entry(model, task, content)}
            tasks[task.name]["macs"] = _macs(model, [task.name], content)
        parts: dict[str, Any] = {"backbone": None, "all_tasks": None}
        if content.one_backbone:
            say("exporting the backbone of all tasks, and the heads")
            parts["backbone"] = writer.parts(model, tasks)
        if content.all_tasks:
            say("exporting all tasks at once")
            macs = _macs(model, names, content)
            parts["all_tasks"] = {"tasks": names, "graphs": writer.all_tasks(model, names), "macs": macs}
        _flush(file)
    return tasks, parts


class _Writer:
    """Lowers graphs and writes them, in all precisions, around one file of weights."""

    def __init__(self, folder: Path, weights: "_WeightsFile", content: Content) -> None:
        self.folder, self.weights, self.content = folder, weights, content

    def task(self, model: MultiTaskModel, graph: ModelProto, task: str) -> dict[str, Any]:
        """Write the graphs of one task, given as traced, and return their entries of the manifest, by precision."""
        budgets = self.content.budget.layers(task, model.backbone.moe_indices)
        lower_moe(graph, budgets, self.content.form, self.content.attends)
        return self.variants(graph, task)

    def parts(self, model: MultiTaskModel, tasks: dict[str, Any]) -> dict[str, Any]:
        """Write the backbone of all tasks and the heads; add the heads' entries to `tasks`, return the backbone's."""
        options: dict[str, Any] = {"opset": self.content.opset, "size": self.content.size}
        for task, entry in tasks.items():
            head = lower_moe(trace_head(model, task, **options))
            entry["heads"] = self.variants(head, f"{task}.head", required=False)
        graph = lower_moe(trace_backbone(model, **options), attention=self.content.attends)
        return {"graphs": self.variants(graph, "backbone")}

    def all_tasks(self, model: MultiTaskModel, tasks: Sequence[str]) -> dict[str, Any]:
        """Write the graphs of all tasks at once, and return their entries of the manifest, by precision."""
        content = self.content
        graph = trace_all_tasks(model, tasks, opset=content.opset, size=content.size, batch=content.batch)
        by_task = [content.budget.layers(task, model.backbone.moe_indices) for task in tasks]
        lower_moe(graph, list(zip(*by_task, strict=True)), content.form, content.attends)
        return self.variants(graph, ALL)

    def variants(self, graph: onnx.ModelProto, name: str, *, required: bool = True) -> dict[str, Any]:
        """Write a lowered graph in every precision; with `required`, each must have something to quantise."""
        entries: dict[str, Any] = {}
        for precision in self.content.precisions:
            last = precision == self.content.precisions[-1]  # it may have the graph itself
            copy = quantize(graph if last else copied(graph), precision, required=required)
            file = f"{name}.onnx" if precision == FLOAT else f"{name}.{precision}.onnx"
            _require_finite_tensors(copy, file)
            weights = self.weights.take(copy)
            data = copy.SerializeToString(deterministic=True)
            with open(self.folder / file, "wb") as graph_file:
                graph_file.write(data)
                _flush(graph_file)
            # What this graph needs of the package: itself and its tensors in weights.bin.
            entries[precision] = {"file": file, "bytes": len(data), "weight_bytes": weights}
        return entries


def _require_finite_tensors(graph: ModelProto, name: str) -> None:
    """Raise InputError if folding or quantising finite weights made a tensor that is not."""
    for tensor in graph.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise InputError(
                f"{name} would hold weights that are not finite (NaN or infinity in {tensor.name}), though the model's "
                "are finite: they are extreme, such as a variance below 0; train again or export another run"
            )


def _task_entry(model: MultiTaskModel, task: Task, content: Content) -> dict[str, Any]:
    """Return what the manifest says about a task, without its files."""
    config = model.config
    kind = kind_of(task.name)
    blocks, shares = model.backbone.moe_indices, content.coverage.get(task.name)
    entry: dict[str, Any] = {
        "number": model.task_id(task.name),  # which a backbone of all tasks takes
        "channels": config.labels.channels(task.name),
        "decode": task.kind,
        "unit": kind.described_as or task.value_unit,
        "input_size": list(content.size) if content.size else None,
        "batch": content.batch,
        "patch_multiple": model.backbone.patch_size,
        "experts": {
            "per_layer": config.num_experts,
            "trained_top_k": config.top_k,
            "layers": list(blocks),
            **described(content.budget, task.name, blocks, config.top_k),
            # By block: the share of the gate mass of calibration that the experts in this graph hold.
            "coverage": {str(block): share for block, share in zip(blocks, shares, strict=True)} if shares else None,
        },
    }
    return entry | kind.entry(config.labels.classes.get(task.name, ()))


def described(budget: Budget, task: str, blocks: Sequence[int], top_k: int) -> dict[str, Any]:
    """Return what a manifest says of a task's budget; `top_k`: as trained. `budget_of` reads it.

    top_k: experts per token, one number, or by block where they differ. kept: the experts in the graph by block, of
    those that leave some out, or "all".
    """
    counts = {str(block): budget.layer(task, block).top_k or top_k for block in blocks}
    one = set(counts.values()) or {top_k}
    return {"top_k": counts if len(one) > 1 else one.pop(), "kept": budget.to_json()["kept"].get(task, "all")}


def budget_of(manifest: Mapping[str, Any]) -> Budget:
    """Return the budget of a package's graphs, by its manifest; raise InputError if that does not say."""
    top_k, kept = {}, {}
    try:
        for task, entry in manifest["tasks"].items():
            experts, count = entry["experts"], entry["experts"]["top_k"]
            top_k[task] = count if isinstance(count, dict) else {str(block): count for block in experts["layers"]}
            kept[task] = {} if experts["kept"] == "all" else experts["kept"]
    except (KeyError, TypeError, AttributeError):
        raise InputError("the manifest does not say which experts the graphs use: export the package again") from None
    return Budget.from_json({"top_k": top_k, "kept": kept})


def _macs(model: MultiTaskModel, tasks: Sequence[str], content: Content) -> int:
    """Return the multiply-accumulates of one image in the graph of these tasks: with the experts it uses, at its size.

    Of a graph of any size: at the size trained at.
    """
    height, width = content.size or model.config.image_size
    return graph_macs(model.config, tasks, (height, width), content.budget, every_expert=content.static)


class _WeightsFile:
    """Writes tensors to one file, each content once, whichever graph or name it comes under."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.places: dict[bytes, tuple[int, int]] = {}  # sha256 -> offset, length
        self.end = 0

    def take(self, graph: ModelProto) -> int:
        """Move the graph's tensors of 1 KiB and more to the file, leaving references to it; return their bytes."""
        taken: dict[int, int] = {}
        for tensor in graph.graph.initializer:
            # raw_data is little-endian by definition; to_array().tobytes() covers the typed fields.
            data = tensor.raw_data if tensor.HasField("raw_data") else numpy_helper.to_array(tensor).tobytes()
            if len(data) < MIN_EXTERNAL:
                continue
            offset, length = self._place(data)
            taken[offset] = length
            kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            kept.data_location = TensorProto.EXTERNAL
            for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(length))):
                kept.external_data.add(key=key, value=value)
            tensor.CopyFrom(kept)
        return sum(taken.values())

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


def _own_files(out: Path, found: set[str], advice: str) -> set[str]:
    """Return which files of a package may be replaced, or raise InputError if it is none."""
    manifest = read_json(out / MANIFEST, f"no package to replace; {advice}")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{out / MANIFEST} is not an m3vit package's: {advice}")
    return {MANIFEST, WEIGHTS, *EVALUATION_FILES, *(entry["file"] for entry in file_entries(manifest))}
