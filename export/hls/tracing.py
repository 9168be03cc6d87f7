"""`m3vit hw trace`: one image through torch, the emulator and the C++ of a project, layer by layer.

A layer has two errors against torch: of the whole path so far, and its own, of torch's layer given what the project's
layer was given. The second says which layer to look at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from m3vit.digests import UncheckedWarning, read_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation.protocols import network_image
from m3vit.export.hls import leaf
from m3vit.export.hls.budgets import budget_of
from m3vit.export.hls.calibration import traced
from m3vit.export.hls.contents import naming, open_project
from m3vit.export.hls.edits import said_changes
from m3vit.export.hls.equalise import apply, changes_unknown, read_changes
from m3vit.export.hls.schedules import Progress, schedule_of, silent
from m3vit.hw.manifest import SAMPLES, find_budget
from m3vit.hw.sim.csim import find_compiler, tokenise
from m3vit.images import read_image
from m3vit.models.saved import INFO
from m3vit.run_folder import Run, load_run

BOUND = 0.1  # of a layer's own error, over the standard deviation of torch's values
Place = str | tuple[str, str]  # a node of the lowered model, or (node, tensor inside)


class Layer(NamedTuple):
    """What one layer of a project gave: raw words or numbers [rows, columns], one array a simulator, the first the one
    that torch is compared with.

    place: of the same values in the lowered model, None for what it does not have. frac: fractional bits of raw words,
    a number or one for each column; None: they are numbers. saturated: values beyond their format. experts: chosen by
    each simulator, [N, K], in a router.
    """

    name: str
    op: str
    words: Mapping[str, np.ndarray]
    place: Place | None = None
    frac: int | np.ndarray | None = None
    saturated: int = 0
    experts: Mapping[str, np.ndarray] = {}


@dataclass
class Found:
    """What a schedule's trace returns: its layers in order, and facts for the report."""

    layers: list[Layer]
    facts: dict[str, Any]


class _Inner:
    """Collects what a leaf observes: whole tensors, not their magnitudes."""

    def __init__(self, name: str, values: dict[Place, Tensor]) -> None:
        self.name, self.values = name, values

    def __call__(self, name: str, value: Tensor, wide: bool = False) -> Tensor:
        self.values[self.name, name] = value
        return value


class _Interpreter(fx.Interpreter):
    """Runs the lowered model; `given` takes the place of what a node gives, for the nodes after it."""

    def __init__(self, module: fx.GraphModule, given: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.given = given
        self.values: dict[Place, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.values[n.name] = value
        return self.given.get(n.name, value)


class Reference:
    """The model of a run as the project has it, in float: the values of every layer."""

    def __init__(self, run: Run, project: Path, manifest: dict[str, Any], budget: int = 0) -> None:
        self.model = leaf.lower(run.model, budget_of(run.model, manifest, budget))
        if changes := read_changes(project):
            apply(self.model, changes)
        self.graph = traced(self.model)

    def after(self, name: str) -> str:
        """Return the node that takes what a node gives."""
        node = next(node for node in self.graph.graph.nodes if node.name == name)
        return next(iter(node.users)).name

    @torch.no_grad()
    def values(self, pixels: np.ndarray, task: int, given: Mapping[str, np.ndarray] = {}) -> dict[Place, np.ndarray]:
        """Return what each node gives for an image uint8 [H, W, 3], [rows, columns]; `given`: what it is taken for."""
        tokens = torch.from_numpy(tokenise(pixels[None], self.model.patch))
        taken = {name: torch.from_numpy(value.astype(np.float32))[None] for name, value in given.items()}
        interpreter = _Interpreter(self.graph, taken)
        calls = [node for node in self.graph.graph.nodes if node.op == "call_module"]
        leaves: dict[str, Any] = {node.name: self.graph.get_submodule(str(node.target)) for node in calls}
        try:
            for name, module in leaves.items():
                module.observe = _Inner(name, interpreter.values)
            interpreter.run(tokens, torch.full((1, 1), float(task)))
        finally:
            for module in leaves.values():
                del module.observe
        return {name: value[0].numpy() for name, value in interpreter.values.items() if value.dim() == 3}


def find_run(project: Path, manifest: dict[str, Any], named: Path | None) -> tuple[Run | None, str]:
    """Return the run that a project came from, and what to say of it: the one `named`, or one that lies beside it.

    Raises InputError for a named one that it did not come from.
    """
    wanted = manifest.get("run", {}).get("weights_sha256")
    if named is not None:
        run = load_run(named)
        if wanted is not None and run.info["weights_sha256"] != wanted:
            raise InputError(f"--run {named} has other weights than the run that {project} came from: give that one")
        return run, f"torch: {named}"
    beside = sorted(path.parent for path in project.resolve().parent.glob(f"*/{INFO}"))
    for folder in beside if wanted is not None else []:
        try:
            info = read_sealed_json(folder / INFO, "a run")
        except (InputError, UncheckedWarning):
            continue
        if info.get("weights_sha256") == wanted:
            return load_run(folder), f"torch: {folder}"
    return None, "torch: the run that the project came from is not beside it: give --run for errors against torch"


def pixels_of(project: Path, manifest: dict[str, Any], image: Path | None) -> np.ndarray:
    """Return an image as the accelerator gets it, uint8 [H, W, 3]; None: the first that the project has stored."""
    if image is None:
        with np.load(project / SAMPLES) as stored:
            return np.array(stored["images"][0])
    height, width = manifest["image_size"]
    return network_image("A", image.name, read_image(image), (height, width)).pixels


def trace(
    project: Path,
    image: Path | None = None,
    task: str | None = None,
    run: Path | None = None,
    bound: float = BOUND,
    budget: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Return what `m3vit hw trace` prints, as JSON values.

    layers: name, op, columns and rows, saturated; different: words in which the simulators differ (of a schedule with
    two); worst, error, own: the largest difference from torch, its root mean square, and that of the layer alone, the
    last two over the standard deviation of torch's values; flips, own_flips of `decisions`: tokens whose experts are
    not torch's. first: the first layer that is different, and the first whose own error is above `bound`.
    Raises InputError for a project, image, task, budget or run that cannot be used, and a simulation that fails.
    """
    manifest, changed = open_project(project)
    schedule, names = schedule_of(manifest), [entry["name"] for entry in manifest["tasks"]]
    if task is not None and task not in names:
        raise InputError(f"--task {task}: this project has {', '.join(names)}")
    if not hasattr(schedule, "trace"):
        raise InputError(f"{project} cannot be traced: the schedule {manifest.get('schedule')} has no trace")
    find_compiler()
    place = names.index(task) if task else 0
    source, said = find_run(project, manifest, run)
    number = find_budget(manifest, budget)
    if source and changes_unknown(project, manifest):
        source = None
        said = (
            "torch: this project does not say by what its model was changed: export it again for errors against torch"
        )
    reference = Reference(source, project, manifest, number) if source else None
    used = {"budget": number} if number else {}
    pixels = pixels_of(project, manifest, image)
    with naming(changed):
        found: Found = schedule.trace(project, manifest, pixels, place, reference, progress, **used)
    report = {
        "schedule": manifest.get("schedule", "spatial"),
        "image": str(image) if image else "the first stored one",
        "task": names[place],
        **({"budget": budget} if budget else {}),
        "torch": said,
        "bound": bound,
        "changed_files": changed,
        "changes": said_changes(project, manifest, changed),
        **found.facts,
    }
    layers = compare(found.layers, reference, pixels, place)
    return {**report, "layers": layers, "first": first_of(layers, bound)}


def compare(layers: list[Layer], reference: Reference | None, pixels: np.ndarray, task: int) -> list[dict[str, Any]]:
    """Return each layer of a trace, its simulators compared with each other and with torch."""
    torchs: dict[Place, np.ndarray] = {}
    owns: dict[Place, np.ndarray] = {}
    numbers: dict[str, np.ndarray] = {}
    if reference:
        torchs = reference.values(pixels, task)
        for layer in layers:
            if isinstance(layer.place, str) and layer.words:
                numbers[layer.place] = _numbers(layer, torchs[layer.place].shape[1])
        owns = reference.values(pixels, task, numbers)
    entries = []
    for layer in layers:
        entry: dict[str, Any] = {"name": layer.name, "op": layer.op, "saturated": layer.saturated}
        first, *others = layer.words.values() if layer.words else layer.experts.values()
        entry["rows"], entry["columns"] = first.shape
        if others:
            entry["different"] = int(sum((first != other).sum() for other in others))
        if reference and layer.place is not None:
            if layer.words:
                values = _numbers(layer, torchs[layer.place].shape[1])
                entry |= _errors(values, torchs[layer.place], owns[layer.place])
            if layer.experts:
                chosen = next(iter(layer.experts.values()))
                entry["decisions"] = len(chosen)
                entry |= {
                    name: _flips(chosen, logits[layer.place])
                    for name, logits in (("flips", torchs), ("own_flips", owns))
                }
        entries.append(entry)
    return entries


def _numbers(layer: Layer, columns: int) -> np.ndarray:
    """Return the values of a layer's first simulator as torch has them, [rows, columns]."""
    raw = next(iter(layer.words.values())).astype(np.float64)
    values = raw if layer.frac is None else np.ldexp(raw, -np.asarray(layer.frac))
    return values[:, :columns]


def _errors(values: np.ndarray, wanted: np.ndarray, own: np.ndarray) -> dict[str, float]:
    wanted = wanted[:, : values.shape[1]]
    scale = float(wanted.std()) or 1.0

    def rms(reference: np.ndarray) -> float:
        return float(np.sqrt(np.square(values - reference[:, : values.shape[1]]).mean())) / scale

    return {"worst": float(np.abs(values - wanted).max()), "error": rms(wanted), "own": rms(own)}


def _flips(chosen: np.ndarray, logits: np.ndarray) -> int:
    """Return how many tokens have other experts than torch's logits [N, E] give; ties go to the lowest id."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, : chosen.shape[1]]
    return int((np.sort(order, axis=1) != np.sort(chosen, axis=1)).any(axis=1).sum())


def first_of(layers: list[dict[str, Any]], bound: float) -> dict[str, str | None]:
    """Return the first layer in which simulators differ, and the first whose own error is above the bound."""

    def name(found: list[dict[str, Any]]) -> str | None:
        return found[0]["name"] if found else None

    return {
        "different": name([layer for layer in layers if layer.get("different")]),
        "out_of_bounds": name([layer for layer in layers if not layer.get("own", 0.0) <= bound]),
    }
