"""`m3vit hw csim`: C-simulate a project on its stored images, all tasks, as its schedule does, and compare with torch.

Needs the project folder only, not the run: torch's outputs were stored at export.
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3vit.digests import check_listed, file_digests, read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation.evaluate import Predictor
from m3vit.evaluation.meters import make_meter
from m3vit.evaluation.protocols import PROTOCOLS, NetworkImage, prediction
from m3vit.export.hls.contents import edited, naming, open_project
from m3vit.export.hls.edits import said_changes
from m3vit.export.hls.schedules import Progress, Simulated, schedule_of
from m3vit.files import atomic_path
from m3vit.hw.manifest import SAMPLES, budget_names, of_budget
from m3vit.hw.sim import csim
from m3vit.hw.sim.compiler import require_writable
from m3vit.models.decoders.base import resize
from m3vit.models.decoders.conv import assemble_pixels
from m3vit.models.decoders.linear import assemble_tokens
from m3vit.staging import sigterm_as_exit
from m3vit.tasks import IGNORE, TASKS

REPORT, OUTPUTS = "csim.json", "tb_data/csim_outputs.npz"
COMPILED = (".h", ".cpp", ".sh")
# What reading a damaged npz, or a report that lacks something, may raise.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
PROTOCOL = "A"  # how the stored images were made


def verify_project(project: Path, samples: int | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Simulate the first `samples` stored images (default: all) and return the report, also written to csim.json.

    Report: images, changed_files since the export and the changes in each, files {name: sha256} of csim_outputs.npz and
    of the changed files that were compiled, the facts of the schedule's `simulate`; and for each task: csim and torch
    {metric: value} on the same images, worst_error and mean_error of the token outputs (absolute; *_relative: over the
    standard deviation of torch's), flips of `decisions` (token, layer) pairs whose expert set is not torch's,
    flipped_tokens of `tokens`, worst_error_unflipped, and largest_flip_margin, the largest gap between torch's logits
    of rank K and K + 1 where a token's first flip happened. Of several budgets all this is of the first, `budget`;
    `budgets` has the facts and the tasks of the others.
    Raises InputError if `project` is not a project, a protected file was changed since the export, it has fewer
    samples, the compiler or what it built fails, or words differ that must not.
    """
    manifest, changed = open_project(project)
    csim.find_compiler()
    require_writable(project)
    with np.load(project / SAMPLES) as stored:
        arrays = dict(stored)
    schedule = schedule_of(manifest)
    available = len(arrays["images"])
    if samples is not None and not 1 <= samples <= available:
        raise InputError(f"samples {samples}: {project} holds {available} images")
    n, tasks = samples or available, [task["name"] for task in manifest["tasks"]]
    with sigterm_as_exit(), naming(changed):
        found = schedule.simulate(project, arrays["images"][:n], manifest, progress)
    outputs = _outputs_of(found, manifest)
    budgets = {
        name: {**one.facts, "tasks": _judged(one, of_budget(arrays, number), manifest)}
        for number, (name, one) in enumerate(found.others.items(), 1)
    }
    report = {
        "protocol": PROTOCOLS[PROTOCOL],
        "images": n,
        "changed_files": changed,
        "changes": said_changes(project, manifest, changed),
        **found.facts,
        "tasks": _judged(found, arrays, manifest),
        **({"budget": budget_names(manifest)[0], "budgets": budgets} if budgets else {}),
    }
    saved: dict[str, Any] = {f"output_{task}": values for task, values in outputs.items()}
    for layer, ids in enumerate(found.expert_ids):
        saved |= {f"experts_{task}_{layer}": ids[:, i].astype(np.int16) for i, task in enumerate(tasks)}
    with atomic_path(project / OUTPUTS) as path:
        np.savez_compressed(path, ids=arrays["ids"][:n], **saved)
    report["files"] = file_digests(project, [OUTPUTS, *simulated(changed)])
    write_sealed_json(project / REPORT, report)
    return report


def _outputs_of(found: Simulated, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the token outputs [n, T, C_r] of each task."""
    tasks = manifest["tasks"]
    return {task["name"]: found.outputs[:, i, :, : task["outputs"]] for i, task in enumerate(tasks)}


def _judged(found: Simulated, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what the report says of each task."""
    n, prefix = len(found.outputs), manifest["prefix_tokens"]
    return {
        task: {
            "csim": _score(task, outputs, arrays, manifest),
            "torch": _score(task, arrays[f"output_{task}"][:n], arrays, manifest),
            **_compare(task, outputs, [ids[:, i] for ids in found.expert_ids], arrays, prefix),
        }
        for i, (task, outputs) in enumerate(_outputs_of(found, manifest).items())
    }


def simulated(names: list[str]) -> list[str]:
    """Return those of a project's files that a simulation compiles, or is built by."""
    return [name for name in names if name.endswith(COMPILED)]


def logits_of(outputs: np.ndarray, manifest: dict[str, Any]) -> Tensor:
    """Return logits [B, C, H, W] at the model's image size from token outputs [B, T, C_r]."""
    (rows, columns), (height, width) = manifest["grid"], manifest["image_size"]
    tokens, upscale = torch.from_numpy(outputs), manifest["upscale"]
    if manifest.get("pixels_first", False):
        return resize(assemble_pixels(tokens, (rows, columns), upscale), (height, width))
    return assemble_tokens(tokens, (rows, columns), upscale, (height, width))


def _score(task: str, outputs: np.ndarray, arrays: dict[str, np.ndarray], manifest: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of token outputs [n, T, C_r] against the stored labels."""
    meter = make_meter(task, manifest["label_set"], PROTOCOL)
    total = None
    for index, tokens in enumerate(outputs):
        label, pixels = arrays[f"label_{task}_{index}"], arrays["images"][index]
        if TASKS[task].matches_edges and (label == IGNORE).all():
            continue  # what edges are matched with has nothing ignored: this image has no label
        place = NetworkImage("", pixels, slice(0, pixels.shape[0]), slice(0, pixels.shape[1]))
        guess = prediction(PROTOCOL, task, logits_of(tokens[None], manifest)[0], place, label.shape[:2])
        row = meter.image(guess, label)
        total = row if total is None else total + row
    if total is None:
        raise InputError(f"no stored image has a label of {task}: export the project with more --samples")
    return {name: float(value) for name, value in meter.compute(total).items()}


def _compare(
    task: str, outputs: np.ndarray, experts: list[np.ndarray], arrays: dict[str, np.ndarray], prefix: int
) -> dict[str, Any]:
    """Return errors of outputs [n, T, C_r] and flips of expert ids [[n, N, K]] of one task against torch's."""
    n, tokens = outputs.shape[:2]
    reference = arrays[f"output_{task}"][:n]
    error, scale = np.abs(outputs - reference), float(reference.std()) or 1.0
    flipped, flips, margin, decisions = np.zeros((n, prefix + tokens), dtype=bool), 0, 0.0, 0
    for layer, ids in enumerate(experts):
        wanted = arrays[f"experts_{task}_{layer}"][:n]
        differs = (np.sort(ids[..., : wanted.shape[-1]], axis=-1) != np.sort(wanted, axis=-1)).any(axis=-1)
        flips, decisions = flips + int(differs.sum()), decisions + differs.size
        first = differs & ~flipped  # later ones may follow from it, at any margin
        if first.any():
            margin = max(margin, float(arrays[f"margin_{task}_{layer}"][:n][first].max()))
        flipped |= differs
    flipped = flipped[:, prefix:]
    return {
        "worst_error": float(error.max()),
        "worst_error_relative": float(error.max()) / scale,
        "worst_error_unflipped": float(error[~flipped].max()) if not flipped.all() else None,
        "mean_error": float(error.mean()),
        "mean_error_relative": float(error.mean()) / scale,
        "tokens": int(flipped.size),
        "flipped_tokens": int(flipped.sum()),
        "decisions": int(decisions),
        "flips": flips,
        "largest_flip_margin": margin,
    }


@dataclass
class SimulatedOutputs:
    """A project's simulated token outputs, {task: [n, T, C_r]}, of the images `ids`."""

    ids: list[str]
    outputs: dict[str, np.ndarray]
    manifest: dict[str, Any]
    report: dict[str, Any]

    @classmethod
    def load(cls, project: Path) -> "SimulatedOutputs":
        """Read what verify_project wrote, or raise InputError if it is damaged, or of other sources than there now."""
        manifest, changed = open_project(project)
        hint = f"simulate it: m3vit hw csim {project}"
        report = read_sealed_json(project / REPORT, hint)
        try:
            known = report.get("files", {})
            if other := [name for name in simulated(changed) if name not in known]:
                raise InputError(f"{project} was edited after it was simulated ({', '.join(other)}): {hint}")
            check_listed(project, known, hint)
            with np.load(project / OUTPUTS) as stored:
                outputs = {task["name"]: stored[f"output_{task['name']}"] for task in manifest["tasks"]}
                result = cls([str(name) for name in stored["ids"]], outputs, manifest, report)
            result.summary  # noqa: B018 (fails for a report that lacks something)
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{project / OUTPUTS} not found: {hint}") from None
        except READ_ERRORS as error:
            raise InputError(f"{project / OUTPUTS} or {REPORT} is damaged ({error}): {hint}") from None
        return result

    @property
    def predictor(self) -> Predictor:
        """The stored outputs as a predictor (protocol A), by the images' ids."""

        def run(images: list[NetworkImage]) -> dict[str, Tensor]:
            rows = [self.ids.index(image.id) for image in images]
            return {task: logits_of(values[rows], self.manifest) for task, values in self.outputs.items()}

        height, width = self.manifest["image_size"]
        return Predictor("csim", list(self.outputs), self.manifest["label_set"], (height, width), run)

    @property
    def summary(self) -> str:
        """One sentence about the simulation, for people."""
        tasks = self.report["tasks"].values()
        flips, decisions = (sum(task[key] for task in tasks) for key in ("flips", "decisions"))
        worst = max(task["worst_error_relative"] for task in tasks)
        agreement = schedule_of(self.manifest).agreement(self.report)
        changed = edited(self.report.get("changed_files", []))
        return (
            f"C-simulation (hls4ml {self.manifest['hls4ml']}, g++, not synthesised) of {self.report['images']} images: "
            f"{agreement}; against torch, {flips} of "
            f"{decisions} routing decisions differ and the worst output is off by {worst:.2g} standard deviations"
            f"{'; ' if changed else ''}{changed}."
        )
