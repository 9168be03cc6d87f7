"""m3vit.json, the manifest of an HLS project: read, checked, and never trusted to be whole. No torch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from m3vit.digests import read_sealed_json
from m3vit.errors import InputError
from m3vit.hw.output_memory import MANIFEST_KEY, OutputLayout
from m3vit.label_sets import LABEL_SETS, declare, resolve

MANIFEST = "m3vit.json"
FORMAT = 2  # of the manifest
SAMPLES = "tb_data/samples.npz"
WEIGHTS = "firmware/weights/weights.bin"  # of a multiplexed project
FRACTION_LIMIT = 64  # of an output's fractional bits

Rule = Callable[[dict[str, Any]], bool]


def read_manifest(project: Path) -> dict[str, Any]:
    """Return the project's m3vit.json without its digest.

    Raises InputError if `project` is not a project of ours, or the manifest was changed, or contradicts itself.
    """
    path = project / MANIFEST
    manifest = read_sealed_json(path, "give a folder written by `m3vit export hls`, or export the project again")
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not of this version of m3vit: export the project again")
    if "labels" in manifest:
        tasks = manifest.get("tasks")
        names = [str(task.get("name")) for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []
        name = declare(manifest["labels"], str(path), names)
        if manifest["labels"]["label_set"]["name"] != manifest.get("label_set"):
            raise InputError(f"{path} is damaged (label_set): export the project again")
        manifest["label_set"] = name
    try:
        wrong = next((name for name, holds in RULES.items() if not holds(manifest)), None)
        more = {} if wrong else NEEDS[_schedule(manifest)].rules
        wrong = next((name for name, holds in more.items() if not holds(manifest)), wrong)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        wrong = str(error.args[0]) if isinstance(error, KeyError) else "a value of the wrong kind"
    if wrong:
        raise InputError(f"{path} is damaged ({wrong}): export the project again")
    return manifest


def _schedule(manifest: dict[str, Any]) -> Any:
    return manifest.get("schedule", "spatial")  # the oldest do not name theirs


def _whole(value: Any, low: int = 0, high: int = 1 << 31) -> bool:
    return type(value) is int and low <= value <= high


def _sizes(manifest: dict[str, Any]) -> bool:
    (rows, columns), (height, width), patch = manifest["grid"], manifest["image_size"], manifest["patch_size"]
    return (
        all(_whole(value, 1, 1 << 16) for value in (rows, columns, height, width, patch))
        and (height, width) == (rows * patch, columns * patch)
        and manifest["tokens"] == rows * columns
        and manifest["token_width"] == 3 * patch**2
        and _whole(manifest["prefix_tokens"], 0, 1 << 16)
        and _whole(manifest["upscale"], 1, patch)
        and type(manifest.get("pixels_first", False)) is bool
    )


def _tasks(manifest: dict[str, Any]) -> bool:
    tasks, label_set = manifest["tasks"], manifest["label_set"]
    known = resolve([task["name"] for task in tasks], label_set)
    channels = [LABEL_SETS[label_set].channels(task.name) for task in known]
    return (
        [task["id"] for task in tasks] == list(range(len(tasks)))
        and [task["decode"] for task in tasks] == [task.kind for task in known]
        and [task["channels"] for task in tasks] == channels
        and [task["outputs"] for task in tasks] == [count * manifest["upscale"] ** 2 for count in channels]
        and manifest["outputs"] == max(task["outputs"] for task in tasks)
    )


def _layers(manifest: dict[str, Any]) -> bool:
    return all(
        _whole(layer["experts"], 1) and _whole(layer["top_k"], 1, layer["experts"]) for layer in manifest["moe_layers"]
    )


def _budgets(manifest: dict[str, Any]) -> bool:
    budgets, layers, tasks = manifest.get("budgets", []), manifest["moe_layers"], len(manifest["tasks"])
    names = [budget["name"] for budget in budgets]
    return (
        all(isinstance(name, str) and name for name in names)
        and len(set(names)) == len(names)
        and all(len(budget["top_k"]) == len(layers) for budget in budgets)
        and all(
            len(counts) == tasks and all(_whole(count, 1, layer["experts"]) for count in counts)
            for budget in budgets
            for layer, counts in zip(layers, budget["top_k"], strict=True)
        )
        and all(_whole(units) for budget in budgets for units in budget["width"])
    )


def budget_names(manifest: dict[str, Any]) -> list[str]:
    """Return the names of a project's budgets, in order; of a project that says none one name, which is empty."""
    return [budget["name"] for budget in manifest.get("budgets", [])] or [""]


def find_budget(manifest: dict[str, Any], name: str | None) -> int:
    """Return the number of the budget of a name; None: the first. Raises InputError for one that is not there."""
    names = budget_names(manifest)
    if name is None:
        return 0
    if name not in names or not name:
        have = f"choose from {', '.join(names)}" if names[0] else "it has one, without a name: leave --budget out"
        raise InputError(f"the project has no budget {name!r}: {have}")
    return names.index(name)


def top_ks(manifest: dict[str, Any], budget: int = 0) -> list[list[int]]:
    """Return the experts per token of each layer with experts, by task, under a budget by its number."""
    if "budgets" in manifest:
        return [list(counts) for counts in manifest["budgets"][budget]["top_k"]]
    return [[layer["top_k"]] * len(manifest["tasks"]) for layer in manifest["moe_layers"]]


def sample_name(name: str, budget: int) -> str:
    """Return what torch's results under a budget, by its number, are called in SAMPLES."""
    return f"budget{budget}_{name}" if budget else name


def of_budget(arrays: dict[str, Any], budget: int) -> dict[str, Any]:
    """Return the arrays of SAMPLES with torch's results under another budget than the first."""
    start = sample_name("", budget)
    return {**arrays, **{name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}}


def _fractions(manifest: dict[str, Any]) -> bool:
    fracs = manifest["output_fracs"]
    return len(fracs) == len(manifest["tasks"]) and all(
        _whole(value, -FRACTION_LIMIT, FRACTION_LIMIT) for value in fracs
    )


def _output_layout(manifest: dict[str, Any]) -> bool:
    if MANIFEST_KEY not in manifest:  # older ones: outputs lie side by side
        return True
    layout, tasks = OutputLayout.of(manifest), manifest["tasks"]
    return (
        _whole(layout.token_pitch, 1)
        and layout.pixels in (1, manifest["upscale"] ** 2)
        and len(layout.pixel_pitches) == len(layout.pixel_outputs) == len(tasks)
        and [layout.pixels * count for count in layout.pixel_outputs] == [task["outputs"] for task in tasks]
        and all(
            _whole(pitch, count, layout.token_pitch // layout.pixels)
            for count, pitch in zip(layout.pixel_outputs, layout.pixel_pitches, strict=True)
        )
    )


def _files(manifest: dict[str, Any]) -> bool:
    files, needed = manifest["files"], {SAMPLES, *NEEDS[_schedule(manifest)].files}
    inside = all(not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in files)
    digests = all(isinstance(digest, str) and len(digest) == 64 for digest in files.values())
    return inside and digests and needed <= set(files) and set(manifest.get("editable", ())) <= set(files)


RULES: dict[str, Rule] = {
    "schedule": lambda manifest: _schedule(manifest) in NEEDS,
    "hls4ml": lambda manifest: isinstance(manifest["hls4ml"], str),
    "label_set": lambda manifest: isinstance(manifest["label_set"], str),
    "run": lambda manifest: isinstance(manifest.get("run", {}), dict),
    "sizes": _sizes,
    "tasks": _tasks,
    "moe_layers": _layers,
    "budgets": _budgets,
    "files": _files,
}


class Needs(NamedTuple):
    """What a schedule's projects have beside what all have: rules of the manifest, and files."""

    rules: Mapping[str, Rule] = {}
    files: Sequence[str] = ()


NEEDS: dict[str, Needs] = {
    "spatial": Needs(),
    "multiplexed": Needs({"output_fracs": _fractions, MANIFEST_KEY: _output_layout}, (WEIGHTS,)),
}
