"""Runs, ONNX packages and HLS projects as predictors: scored by the same meters (`m3vit eval`, `m3vit report`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3vit.collectives import world_size
from m3vit.errors import InputError, short
from m3vit.evaluation.evaluate import Predictor, normalised, torch_predictor
from m3vit.evaluation.protocols import NetworkImage
from m3vit.export.runtime.package import MANIFEST as PACKAGE_MANIFEST
from m3vit.export.runtime.package import NotFinite, Package
from m3vit.hw.manifest import budget_names, find_budget
from m3vit.hw.sim import csim
from m3vit.label_sets import LABEL_SETS, declare, resolve
from m3vit.launched import place
from m3vit.models.budget import FULL, Budget
from m3vit.normalisation import Normalisation, recorded
from m3vit.training.budgets import require_trained_run


def onnx_predictor(package: Package) -> Predictor:
    """Return an ONNX package as a predictor, fed as torch is: the same pixels, at the size trained at."""
    manifest = package.manifest
    height, width = manifest["tasks"][package.tasks[0]]["input_size"] or manifest["image"]["train_size"]
    image = {name: manifest["image"][name] for name in ("mean", "std")}
    normalisation = recorded(image, f"image of {package.folder / PACKAGE_MANIFEST}")

    def run(images: list[NetworkImage]) -> dict[str, Tensor]:
        batch = normalised(images, normalisation).numpy()
        try:
            return {task: torch.from_numpy(package.logits(batch, task)) for task in package.tasks}
        except NotFinite as error:
            named = ", ".join(images[place].id for place in error.images)
            raise InputError(f"image {named}: {error}") from error

    labels = label_set(manifest, package.folder, package.tasks)
    for task in resolve(package.tasks, labels):
        entry, expected = manifest["tasks"][task.name], (task.kind, LABEL_SETS[labels].channels(task.name))
        if (entry["decode"], entry["channels"]) != expected:
            raise InputError(
                f"{package.folder} contradicts itself: {task.name} is {entry['decode']} with {entry['channels']} "
                f"channels, and {expected[0]} with {expected[1]} in the label set {labels}: export it again"
            )
    return Predictor("onnx", package.tasks, labels, (height, width), run)


def hls_predictor(project: Path, manifest: dict[str, Any], budget: int = 0) -> Predictor:
    """Return an HLS project (`open_project`) as a predictor: made ready as its schedule does, and run image by image.

    budget: by its number.

    The accelerator's input is pixels, so padding (protocol B) is the mean colour, 0.01 at most from the zero that torch
    gets after normalisation.
    """
    from m3vit.export.hls.schedules import schedule_of
    from m3vit.export.hls.verify import logits_of

    runner = schedule_of(manifest).runner(project, manifest, **({"budget": budget} if budget else {}))
    widths = {task["name"]: task["outputs"] for task in manifest["tasks"]}
    padding = project_normalisation(project, manifest).pixel

    def run(images: list[NetworkImage]) -> dict[str, Tensor]:
        outputs = runner.run(np.stack([image.padded(padding) for image in images]))
        return {
            task: logits_of(np.ascontiguousarray(outputs[:, place, :, :width]), manifest)
            for place, (task, width) in enumerate(widths.items())
        }

    height, width = manifest["image_size"]
    return Predictor(
        runner.name, list(widths), label_set(manifest, project, list(widths)), (height, width), run, runner.batch
    )


def project_normalisation(project: Path, manifest: dict[str, Any]) -> Normalisation:
    """Return the normalisation that is folded into an HLS project's weights."""
    return recorded(manifest.get("normalisation"), f"normalisation of {project / csim.MANIFEST}")


def label_set(manifest: dict[str, Any], folder: Path, tasks: Sequence[str]) -> str:
    """Return the label set that an export was trained on."""
    if "label_set" not in manifest:
        raise InputError(f"{folder} was exported by an earlier version, without its label set: export it again")
    if "labels" in manifest:
        return declare(manifest["labels"], f"the manifest of {folder}", tasks)
    name = str(manifest["label_set"])
    if name not in LABEL_SETS:
        raise InputError(f"{folder} is of the label set {short(name)}, unknown here: export it again")
    return name


def choose_device(name: str) -> str:
    """Return a torch device's name: "auto" is this process's GPU if there is one. Raises InputError for a bad one."""
    if name == "auto":
        return f"cuda:{place().local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise InputError(f"--device {name} cannot be used here ({reason}): give auto, cpu or cuda") from None
    return name


def is_export(folder: Path) -> bool:
    """Return whether a folder is an ONNX package or an HLS project."""
    return any((folder / name).is_file() for name in (PACKAGE_MANIFEST, csim.MANIFEST))


def own_budget(export: Path) -> str:
    """Return the name of the budget that an export runs unless told otherwise; empty for one without a name."""
    if (export / PACKAGE_MANIFEST).is_file():
        from m3vit.export.runtime.manifest import budgets_of, read_manifest

        return next(iter(budgets_of(read_manifest(export))), "")
    return budget_names(csim.read_manifest(export))[0]


def open_predictor(
    folder: Path, device: str, batch: int, precision: str | None = None, budget: Budget | str | None = None
) -> tuple[Predictor, dict[str, Any], str]:
    """Open a run, an ONNX package or an HLS project; return it, what eval.json says of it, and a run's data root.

    `device` (a torch device) and `batch` are those of a run; packages and projects run on the CPU. `precision`: of a
    package that holds several. `budget`: of a run; of a package or a project the name of one that it holds.
    """
    assert budget is None or isinstance(budget, str) == is_export(folder)
    name = budget if isinstance(budget, str) else None
    if (folder / PACKAGE_MANIFEST).is_file():
        package = Package.load(folder, precision=precision, budget=name)
        info = {
            **({"budget": name} if name else {}),
            "weights_sha256": package.manifest["weights"]["sha256"],
            "precision": package.precision,
        }
        return onnx_predictor(package), info, ""
    if precision is not None:
        raise InputError(f"--precision is of an ONNX package, and {folder} is none: leave it out")
    if (folder / csim.MANIFEST).is_file():
        if world_size() > 1:
            raise InputError("an HLS project is simulated by one process: start m3vit eval without torchrun")
        from m3vit.export.hls.contents import naming, open_project
        from m3vit.export.hls.edits import said_changes

        manifest, changed = open_project(folder)
        number = find_budget(manifest, name)
        weights = manifest.get("run", {}).get("weights_sha256")
        info = {"hls4ml": manifest["hls4ml"], "weights_sha256": weights, "changed_files": changed}
        info |= {"changes": said_changes(folder, manifest, changed)} if changed else {}
        with naming(changed):
            return hls_predictor(folder, manifest, number), info | ({"budget": name} if name else {}), ""
    if not (folder / "config.yaml").is_file():
        raise InputError(
            f"{folder} is not a run folder, an ONNX package or an HLS project (no config.yaml, {PACKAGE_MANIFEST} or "
            f"{csim.MANIFEST} in it): make one with m3vit train, m3vit init, m3vit export onnx or m3vit export hls"
        )
    from m3vit.run_folder import load_run

    run = load_run(folder)
    info = {"weights_sha256": run.info["weights_sha256"], "epochs_trained": run.info["epochs_trained"]}
    used = budget if isinstance(budget, Budget) else FULL
    if not used.full:
        require_trained_run(run, used)
        info["budget"] = used.to_json()
    return torch_predictor(run.model.to(device), batch, used), info, run.config.data.root
