"""The manifest of an ONNX package: read, and checked for all that the runtime reads in it. No torch, no onnxruntime."""

import math
from pathlib import Path
from typing import Any, Final

from m3vit import plugins
from m3vit.digests import read_sealed_json
from m3vit.errors import InputError
from m3vit.kinds import KINDS

FORMAT, FORMAT_VERSION, MANIFEST = "m3vit-onnx", 2, "manifest.json"
ALL: Final = "all"  # all tasks at once, where a task is named
FLOAT = "fp32"
HALF = "fp16"  # of weights as they are stored; what is computed is float32
PRECISIONS = (FLOAT, HALF, "int8", "int8-mixed", "int8-experts", "int4-experts")  # that a package may hold

_NO_PACKAGE = "give the folder that `m3vit export onnx` wrote, or export it again"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a package's manifest, without its digest.

    Raises InputError if it is missing, not as it was written, or lacks anything that the runtime reads.
    """
    path = folder / MANIFEST
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: {_NO_PACKAGE}")
    manifest = read_sealed_json(path, _NO_PACKAGE)
    _check_manifest(path, manifest)
    return manifest


def check_passed(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise InputError for a package that was compared with its model and found to compute something else.

    `m3vit export onnx` compares every package. One that a program made with `export_package` alone has no such record;
    whether to compare it (`check_parity`) is its maker's decision.
    """
    parity = manifest.get("parity")
    if parity is not None and not (isinstance(parity, dict) and parity.get("passed") is True):
        raise InputError(
            f"{folder} did not pass the comparison with the model it was exported from, what it predicts is wrong: "
            "export it again"
        )


def file_entries(manifest: Any) -> list[dict[str, Any]]:
    """Return the entries of a manifest that name a file, wherever they are in it."""
    if not isinstance(manifest, dict):
        return []
    found = [manifest] if isinstance(manifest.get("file"), str) else []
    return found + [entry for value in manifest.values() for entry in file_entries(value)]


def package_digests(manifest: dict[str, Any]) -> dict[str, str]:
    """Return {name: sha256} of the files of a package."""
    return {entry["file"]: entry["sha256"] for entry in file_entries({**manifest, "run": None})}


def budgets_of(manifest: dict[str, Any]) -> list[str]:
    """Return the names of a package's budgets, the default first; none where it has one without a name."""
    return [manifest["budget"], *manifest["budgets"]] if manifest.get("budgets") else []


def with_budget(manifest: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Return a manifest as if a budget of the package were its only one; raise InputError if it has none such."""
    known = budgets_of(manifest)
    if not known:
        raise InputError(f"{folder} has no budgets to choose from: leave the budget out, or export it with several")
    if name not in known:
        raise InputError(f"{folder} has no budget {name!r}: choose from {', '.join(known)}")
    if name == manifest["budget"]:
        return manifest
    own = manifest["budgets"][name]
    tasks = {task: {**entry, **own["tasks"][task]} for task, entry in manifest["tasks"].items()}
    macs = max(entry["macs"] for entry in tasks.values())
    return {**manifest, "budget": name, "tasks": tasks, "all_tasks": own["all_tasks"], "macs": macs}


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raise InputError if a manifest lacks anything that the runtime reads."""
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not an m3vit package's: {_NO_PACKAGE}")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{path} has format version {version}, this m3vit reads {FORMAT_VERSION}: export it again")
    _check_kinds(path, manifest)
    try:
        image, tasks, precisions = manifest["image"], manifest["tasks"], manifest["precisions"]
        digests: dict[str, str] = {}
        complete = _numbers(image["mean"], 3) and _numbers(image["std"], 3) and min(image["std"]) > 0
        complete &= _size(image["train_size"]) and bool(tasks)
        complete &= bool(precisions) and isinstance(manifest["weights"]["file"], str) and manifest["macs"] >= 0
        for entry in file_entries({**manifest, "run": None}):
            # A plain name: a manifest from a stranger must not make us read files elsewhere.
            complete &= Path(entry["file"]).name == entry["file"] and isinstance(entry["sha256"], str)
            complete &= digests.setdefault(entry["file"], entry["sha256"]) == entry["sha256"]
        backbone, together = manifest["backbone"], manifest.get("all_tasks")  # which older packages do not have
        if together is not None:
            complete &= together["tasks"] == list(tasks)
            complete &= all(isinstance(together["graphs"][precision]["file"], str) for precision in precisions)
        named = manifest.get("budgets", {})
        complete &= not named or (isinstance(manifest["budget"], str) and manifest["budget"] not in named)
        for own in named.values():
            complete &= list(own["tasks"]) == list(tasks) and (own["all_tasks"] is None) == (together is None)
            for part in (*own["tasks"].values(), *([own["all_tasks"]] if together is not None else ())):
                complete &= part["macs"] >= 0
                complete &= all(isinstance(part["graphs"][precision]["file"], str) for precision in precisions)
        for entry in tasks.values():
            kind = KINDS.get(entry["decode"])
            complete &= kind is not None and isinstance(entry["channels"], int) and kind.entry_fits(entry)
            complete &= _size([entry["patch_multiple"]] * 2)
            complete &= entry["input_size"] is None or _size(entry["input_size"])
            complete &= entry["batch"] in (None, 1)
            for graphs in [entry["graphs"]] + ([entry["heads"], backbone["graphs"]] if backbone else []):
                complete &= not backbone or isinstance(entry["number"], int)
                complete &= all(isinstance(graphs[precision]["file"], str) for precision in precisions)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
        complete = False
    if not complete:
        unknown = _unknown_kinds(manifest)
        advice = f", or give the plug-in that has the kind {', '.join(unknown)} (--plugin)" if unknown else ""
        raise InputError(
            f"{path} is damaged, entries are missing or of the wrong kind: export the package again{advice}"
        )


def _unknown_kinds(manifest: dict[str, Any]) -> list[str]:
    """Return the kinds of tasks that a manifest names and that are not known here."""
    tasks = manifest["tasks"].values() if isinstance(manifest.get("tasks"), dict) else ()
    kinds = [task.get("decode") for task in tasks if isinstance(task, dict)]
    return sorted({kind for kind in kinds if isinstance(kind, str) and kind not in KINDS})


def _check_kinds(path: Path, manifest: dict[str, Any]) -> None:
    """Raise InputError for tasks of a kind of the plug-ins that a manifest names, unless these can be imported."""
    named = manifest.get("plugins")
    if not named or not isinstance(named, list) or not _unknown_kinds(manifest):
        return
    plugins.recall([str(one) for one in named], "")
    if unknown := _unknown_kinds(manifest):
        raise InputError(
            f"{path} has tasks of the kind {', '.join(unknown)}, which is a plug-in's ({', '.join(map(str, named))}): "
            "give it with --plugin, or m3vit.plugins.load in a program"
        )


def _numbers(values: Any, count: int) -> bool:
    """Return whether `values` are so many finite numbers."""
    return len(values) == count and all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def _size(values: Any) -> bool:
    """Return whether `values` are two positive whole numbers."""
    return len(values) == 2 and all(isinstance(value, int) and value > 0 for value in values)
