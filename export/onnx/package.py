"""The ONNX package: small graphs per task and precision, one weights file for all of them, one manifest.

Every file is listed in the manifest with its sha256; `m3vit.export.runtime.package` reads and checks it, without torch.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from m3vit.evaluation.protocols import of_evaluation
from m3vit.export.finite import require_finite
from m3vit.export.onnx.graph import of_task, require_onnx, trace_backbone, trace_head, tracer
from m3vit.export.onnx.lower import copied, lower_moe
from m3vit.export.onnx.options import Content
from m3vit.export.onnx.quantize import FLOAT, quantize
from m3vit.export.onnx.widths import narrow_mlps
from m3vit.export.runtime.manifest import ALL, FORMAT, FORMAT_VERSION, MANIFEST, budgets_of, file_entries
from m3vit.files import atomic_folder, read_json, require_replaceable, sha256_file
from m3vit.label_sets import describe, resolve
from m3vit.models.budget import Budget
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.trial import meta_model
from m3vit.profiling import total_macs
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
    for one in content.by_budget.values():
        model.uses(one.budget, names)  # refuses what the model does not have before the long work
    with atomic_folder(out) as folder:
        tasks, parts, budgets = _write_graphs(model, names, folder, content, say)
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
            **budgets,
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
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Write the graphs and their weights; return the manifest's entries of the tasks, and of what serves all of them:
    `backbone`, a graph of it, and `all_tasks`, one of all tasks at once; None where there is none. The last are the
    name of the default budget, and what differs of others; none of one without a name."""
    with open(folder / WEIGHTS, "w+b") as file:
        weights = _WeightsFile(file)
        traced = tracer(model, names, opset=content.opset, size=content.size, batch=content.batch)
        # MACs of a graph of any size are those at the size trained at.
        shapes = meta_model(replace(model.config, image_size=content.size or model.config.image_size))
        if content.nested:  # the widest first, which the others are beginnings of
            whole = replace(content, budget=_widest(model, names, content))
            widest = _Writer(folder, weights, whole, "", True)
            for name in names:
                graph = of_task(traced(whole.budget), model, name)
                widest.store(widest.lowered(model, graph, name))
        found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for budget, one in content.by_budget.items():
            writer = _Writer(folder, weights, one, f".{budget}" if found else "", content.nested)
            of = f", budget {budget}" if budget else ""
            tasks: dict[str, Any] = {}
            for number, task in enumerate(resolve(names, model.config.label_set), start=1):
                say(f"exporting {task.name}{of} ({number} of {len(names)})")
                graphs = writer.task(model, of_task(traced(one.budget), model, task.name), task.name)
                tasks[task.name] = {"graphs": graphs, **_task_entry(model, task, one)}
                tasks[task.name]["macs"] = total_macs(shapes, [task.name], one.budget, every_expert=one.static)
            parts: dict[str, Any] = {"backbone": None, "all_tasks": None}
            if content.one_backbone:
                say("exporting the backbone of all tasks, and the heads")
                parts["backbone"] = writer.parts(model, tasks)
            if content.all_tasks:
                say(f"exporting all tasks at once{of}")
                graphs = writer.all_tasks(model, copied(traced(one.budget, at_once=True)), names)
                macs = total_macs(shapes, names, one.budget, every_expert=one.static)
                parts["all_tasks"] = {"tasks": names, "graphs": graphs, "macs": macs}
            found[budget] = tasks, parts
        _flush(file)
    first, *others = found
    budgets = {name: {"tasks": _differing(found[name][0]), "all_tasks": found[name][1]["all_tasks"]} for name in others}
    return *found[first], {"budget": first, "budgets": budgets} if first else {}


def _differing(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tasks' entries have of their own under another budget."""
    keys = ("graphs", "experts", "decoder_experts", "head_channels", "macs")
    return {task: {key: entry[key] for key in keys if key in entry} for task, entry in tasks.items()}


def _widest(model: MultiTaskModel, names: Sequence[str], content: Content) -> Budget:
    """Return a budget whose graphs hold all tensors of which those of the content's budgets are a beginning."""
    budgets, hidden = list(content.budgets.values()), model.hidden_widths()
    width = {block: max(budget.width.get(block, units) for budget in budgets) for block, units in hidden.items()}
    blocks, every = model.backbone.moe_indices, tuple(range(model.config.num_experts))
    kept = {
        task: {
            block: tuple(sorted({expert for budget in budgets for expert in budget.layer(task, block).kept or every}))
            for block in blocks
        }
        for task in names
    }
    whole = model.heads.channels
    heads = {task: max(budget.heads.get(task, whole[task]) for budget in budgets) for task in names if task in whole}
    return Budget({task: dict.fromkeys(blocks, 1) for task in names}, kept, width, heads=heads)


class _Writer:
    """Lowers graphs and writes them, in all precisions, around one file of weights."""

    def __init__(
        self, folder: Path, weights: "_WeightsFile", content: Content, ending: str = "", nested: bool = False
    ) -> None:
        """`ending`: of the names of files, before their precision. `nested`: as `lower_moe` takes it."""
        self.folder, self.weights, self.content, self.ending, self.nested = folder, weights, content, ending, nested

    def task(self, model: MultiTaskModel, graph: ModelProto, task: str) -> dict[str, Any]:
        """Write the graphs of one task, given as traced, and return their entries of the manifest, by precision."""
        return self.variants(self.lowered(model, graph, task), task)

    def lowered(self, model: MultiTaskModel, graph: ModelProto, *tasks: str) -> ModelProto:
        """Return the graph of a task, or of several at once, lowered as the content says; in place."""
        content, blocks = self.content, model.backbone.moe_indices
        budgets: Sequence[Any] = content.budget.layers(tasks[0], blocks)
        if len(tasks) > 1:
            budgets = list(zip(*(content.budget.layers(task, blocks) for task in tasks), strict=True))
        narrow_mlps(graph, model, content.budget.width, self.nested)
        return lower_moe(graph, budgets, content.form, content.attends, self.nested)

    def store(self, graph: ModelProto) -> None:
        """Write a lowered graph's tensors alone, in every precision."""
        for precision in self.content.precisions:
            self.weights.take(quantize(copied(graph), precision))

    def parts(self, model: MultiTaskModel, tasks: dict[str, Any]) -> dict[str, Any]:
        """Write the backbone of all tasks and the heads; add the heads' entries to `tasks`, return the backbone's."""
        options: dict[str, Any] = {"opset": self.content.opset, "size": self.content.size}
        for task, entry in tasks.items():
            head = lower_moe(trace_head(model, task, **options))
            entry["heads"] = self.variants(head, f"{task}.head", required=False)
        graph = lower_moe(trace_backbone(model, **options), attention=self.content.attends)
        return {"graphs": self.variants(graph, "backbone")}

    def all_tasks(self, model: MultiTaskModel, graph: ModelProto, tasks: Sequence[str]) -> dict[str, Any]:
        """Write the graphs of all tasks at once, given as traced, and return their entries, by precision."""
        return self.variants(self.lowered(model, graph, *tasks), ALL)

    def variants(self, graph: onnx.ModelProto, name: str, *, required: bool = True) -> dict[str, Any]:
        """Write a lowered graph in every precision; with `required`, each must have something to quantise."""
        entries: dict[str, Any] = {}
        for precision in self.content.precisions:
            last = precision == self.content.precisions[-1]  # it may have the graph itself
            copy = quantize(graph if last else copied(graph), precision, required=required)
            file = f"{name}{self.ending}.onnx" if precision == FLOAT else f"{name}{self.ending}.{precision}.onnx"
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
    if (whole := model.heads.channels.get(task.name)) is not None:
        entry["head_channels"] = content.budget.heads.get(task.name, whole)
    if own := model.heads.experts:
        held = content.decoder_coverage.get(task.name)
        entry["decoder_experts"] = {
            "per_layer": max(own.values()),
            "layers": list(own),
            "kept": content.budget.to_json().get("decoder", {}).get(task.name, "all"),
            "coverage": {str(block): share for block, share in zip(own, held, strict=True)} if held else None,
        }
    return entry | kind.entry(config.labels.classes.get(task.name, ()))


def described(budget: Budget, task: str, blocks: Sequence[int], top_k: int) -> dict[str, Any]:
    """Return what a manifest says of a task's budget; `top_k`: as trained. `budget_of` reads it.

    top_k: experts per token, one number, or by block where they differ. kept: the experts in the graph by block, of
    those that leave some out, or "all". width, where the budget has one: hidden units by block.
    """
    counts = {str(block): budget.layer(task, block).top_k or top_k for block in blocks}
    one = set(counts.values()) or {top_k}
    plain = budget.to_json()
    found = {"top_k": counts if len(one) > 1 else one.pop(), "kept": plain["kept"].get(task, "all")}
    return found | ({"width": plain["width"]} if plain["width"] else {})


def budget_of(manifest: Mapping[str, Any]) -> Budget:
    """Return the budget of a package's graphs, by its manifest; raise InputError if that does not say."""
    top_k, kept, width = {}, {}, {}
    decoder: dict[str, Any] = {}
    heads: dict[str, Any] = {}
    try:
        for task, entry in manifest["tasks"].items():
            experts, count = entry["experts"], entry["experts"]["top_k"]
            top_k[task] = count if isinstance(count, dict) else {str(block): count for block in experts["layers"]}
            kept[task] = {} if experts["kept"] == "all" else experts["kept"]
            width = experts.get("width", {})  # of all tasks
            own = entry.get("decoder_experts", {}).get("kept", "all")
            decoder |= {} if own == "all" else {task: own}
            heads |= {task: entry["head_channels"]} if "head_channels" in entry else {}
    except (KeyError, TypeError, AttributeError):
        raise InputError("the manifest does not say which experts the graphs use: export the package again") from None
    return Budget.from_json({"top_k": top_k, "kept": kept, "width": width, "decoder": decoder, "heads": heads})


class _WeightsFile:
    """Writes tensors to one file, each content once, whichever graph or name it comes under.

    A tensor with which one in the file begins is a view of that one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file  # open for reading too
        self.places: dict[bytes, tuple[int, int]] = {}  # sha256 -> offset, length
        self.beginnings: dict[bytes, list[tuple[int, int]]] = {}  # sha256 of the first MIN_EXTERNAL bytes -> the same
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
            begins = self.beginnings.setdefault(hashlib.sha256(data[:MIN_EXTERNAL]).digest(), [])
            longer = (offset for offset, length in begins if length > len(data) and self._reads(offset, data))
            offset = next(longer, -1)
            if offset < 0:
                align = PAGE if len(data) >= PAGE_FROM else SMALL_ALIGN
                offset = -(-self.end // align) * align
                self.file.write(bytes(offset - self.end) + data)
                self.end = offset + len(data)
                begins.append((offset, len(data)))
            self.places[key] = (offset, len(data))
        return self.places[key]

    def _reads(self, offset: int, data: bytes) -> bool:
        """Return whether these bytes are in the file at an offset."""
        self.file.seek(offset)
        found = self.file.read(len(data))
        self.file.seek(self.end)
        return found == data


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _own_files(out: Path, found: set[str], advice: str) -> set[str]:
    """Return which files of a package may be replaced, or raise InputError if it is none."""
    manifest = read_json(out / MANIFEST, f"no package to replace; {advice}")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{out / MANIFEST} is not an m3vit package's: {advice}")
    evaluated = {name for name in found if of_evaluation(name, budgets_of(manifest))}
    return {MANIFEST, WEIGHTS, *evaluated, *(entry["file"] for entry in file_entries(manifest))}
