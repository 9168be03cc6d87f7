"""`m3vit export onnx`: from a run folder to a package, calibrated, checked and measured."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3vit.data.network_input import network_input
from m3vit.data.opening import open_split
from m3vit.data.sample import Split
from m3vit.digests import read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation.artefacts import onnx_predictor
from m3vit.evaluation.evaluate import Predictor, evaluate, torch_predictor
from m3vit.evaluation.routing import spread
from m3vit.evaluation.scoring import default_workers
from m3vit.export.finite import require_finite
from m3vit.export.onnx.graph import require_onnx
from m3vit.export.onnx.options import Content, Request
from m3vit.export.onnx.package import export_package
from m3vit.export.onnx.parity import ParityError, check_parity
from m3vit.export.onnx.parity_images import parity_images
from m3vit.export.onnx.pruning import check_rule, decoder_mass, gate_mass, pruned, pruned_decoder
from m3vit.export.onnx.quantize import FLOAT
from m3vit.export.runtime.manifest import MANIFEST
from m3vit.export.runtime.package import Package
from m3vit.models.budget import in_all_layers
from m3vit.run_folder import Run
from m3vit.tasks import TASKS
from m3vit.training.budgets import require_trained_run

PARITY_IMAGES = 8  # validation images that the quick check picks from, beside noise
MEASURED_IMAGES = 100  # validation images that a changed package is scored on, by default
CALIBRATION_BATCH = 4
PROTOCOL = "A"


def export_run(
    run: Run,
    out: Path,
    content: Content,
    request: Request,
    *,
    say: Callable[[str], None] = print,
    bar: Callable[[], AbstractContextManager[Callable[[int, int], None]]] | None = None,
) -> dict[str, Any]:
    """Write the package of a run to `out`, compare it with torch, score it, and say a line per finding.

    `bar` opens a progress bar for the comparison, a function of (batches done, batches in all). Returns the manifest.
    The package appears at `out` when the comparison has passed and the scores are in its manifest. Raises InputError
    for what cannot be done, before anything is computed, and for a package that does not compute what the model does.
    """
    require_onnx(run.model)
    require_finite(run.model)
    content = budgeted(run, content, request, say)
    content.check()
    used = [one.budget for one in content.by_budget.values()]
    changed = not all(budget.full for budget in used) or any(precision != FLOAT for precision in content.precisions)
    count = request.measure if request.measure is not None else MEASURED_IMAGES if changed else 0
    split = data_of(run, "val", request.data_root, "--measure 0") if count else None
    full = request.check_images is not None
    images = parity_images(run, request.data_root, request.check_images or PARITY_IMAGES, exactly=full)

    def check(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            say(f"{out / path.name}: {path.stat().st_size / 1e6:.2f} MB")
        sources = " and ".join(f"{number} {name}" for name, number in images.sources.items())
        say(f"comparing with torch on {sources} images" + (", each at every size" if full else ""))
        with bar() if bar else nullcontext() as progress:
            report = check_parity(run.model, folder, images, full=full, sources=images.sources, progress=progress)
        for task, result in report.items():
            say(f"{task}: {_summary(result)}")
        if split is not None:
            say(f"scoring {min(count, len(split))} validation images")
            for line in render(measure(run, folder, split, count)):
                say(line)

    try:
        return export_package(run.model, out, content, info=run.info, progress=say, check=check)
    except ParityError as error:
        raise InputError(
            f"nothing was written to {out}: the package does not compute what the model computes {error.findings}. If "
            "the run's weights are extreme, train again or export another run; else m3vit or onnxruntime has a defect"
        ) from error


def _summary(result: dict[str, Any]) -> str:
    """Return what the comparison of one task found, in words."""
    unseen, forced = (
        sum(len(experts) for experts in result[key].values()) for key in ("experts_not_hit", "experts_forced")
    )
    compared = (
        f"worst relative error {result['worst_relative_error']:.1e} ({result['worst_at']}) in "
        f"{result['comparisons']} comparisons"
    )
    return (
        (compared if result["comparisons"] else "nothing in floats to compare")
        + (f"; {unseen} experts got no token and were not compared" if unseen else "")
        + (f"; {forced} experts got tokens from a forced router only" if forced else "")
        + (f"; {result['near_tie_images']} images with near ties" if result["near_tie_images"] else "")
        + "".join(f"; {name} {error:.1e}" for name, error in result["integer_errors"].items())
    )


def budgeted(run: Run, content: Content, request: Request, say: Callable[[str], None]) -> Content:
    """Return the content with the budget asked for: experts per token, and those that calibration leaves out."""
    config, blocks = run.config.model, run.model.backbone.moe_indices
    prunes = request.coverage is not None or request.keep is not None
    own = run.model.heads.experts
    if not blocks and (request.keep is not None or request.top_k or (prunes and not own)):
        if own:
            raise InputError("only this model's decoder has experts, of which --prune is: leave out --keep and --top-k")
        raise InputError("this model has no experts: leave out --prune, --keep and --top-k")
    exported = content.tasks or config.tasks
    if beside := [task for task in request.top_k if task not in exported]:
        raise InputError(f"--top-k names {', '.join(beside)}, not among the tasks exported ({', '.join(exported)})")
    budget = in_all_layers(request.top_k, blocks)
    if not content.budget.full or content.budgets:
        if prunes or request.top_k:
            raise InputError("a budget says which experts are used: leave out --prune, --keep and --top-k, or --budget")
        for one in content.by_budget.values():
            require_trained_run(run, one.budget)
        sizes = run.model.hidden_widths(), run.model.heads.channels
        budgets = {name: one.shortened(*sizes) for name, one in content.budgets.items()}
        return replace(content, budget=content.budget.shortened(*sizes), budgets=budgets)
    if not prunes:
        return replace(content, budget=budget)
    check_rule(request.coverage, request.keep, config.num_experts)
    if request.keep is not None:
        for task in exported:
            if request.keep < (used := request.top_k.get(task, config.top_k)):
                raise InputError(
                    f"--keep is {request.keep}, but each token of {task} goes to {used} experts: keep as many, "
                    "or give a lower --top-k too"
                )
    split = data_of(run, "train", request.data_root, "no --prune or --keep")
    say(f"measuring gate mass on {min(request.calibration, len(split))} training images")
    coverage: dict[str, list[float]] = {}
    if blocks:
        mass = gate_mass(run.model, calibration_batches(run, split, request.calibration), budget)
        budget, coverage = pruned(run.model, mass, budget, coverage=request.coverage, keep=request.keep)
        for task in exported:
            counts = ", ".join(str(len(kept)) for kept in budget.kept[task].values())
            say(f"{task}: keeps {counts} of {config.num_experts} experts; least coverage {min(coverage[task]):.4f}")
    if not own or request.coverage is None:
        return replace(content, budget=budget, coverage=coverage)
    # As the trunk's pruned experts leave it: what the decoder reads is what its graph will read.
    mass = decoder_mass(run.model, calibration_batches(run, split, request.calibration), budget)
    budget, shares = pruned_decoder(run.model, mass, budget, request.coverage)
    for task in exported:
        kept = budget.decoder.get(task, {})
        counts = ", ".join(str(len(kept.get(block, range(count)))) for block, count in own.items())
        least = f"least coverage {min(shares[task]):.4f}"
        say(f"{task}: keeps {counts} of {max(own.values())} experts of the decoder; {least}")
    return replace(content, budget=budget, coverage=coverage, decoder_coverage=shares)


def data_of(run: Run, part: str, data_root: str | None, otherwise: str) -> Split:
    """Open the train or val split of a run's data, or raise InputError that says what to do."""
    root = data_root or run.config.data.root
    try:
        model = run.config.model
        return open_split(run.config.data.layout, root, part, model.tasks, label_set=model.label_set)
    except InputError as error:
        raise InputError(
            f"this needs the run's {part} images ({error}): give --data.root DIR, or {otherwise}"
        ) from None


def calibration_batches(run: Run, split: Split, count: int) -> Iterator[Tensor]:
    """Yield `count` images, spread evenly over a split, as normalised batches of the trained size."""
    size = (run.config.model.image_size[0], run.config.model.image_size[1])
    indices = spread(list(range(len(split))), count)
    for start in range(0, len(indices), CALIBRATION_BATCH):
        some = indices[start : start + CALIBRATION_BATCH]
        images = [split.load(index).image for index in some]
        yield torch.stack([network_input(image, size, run.model.normalisation) for image in images])


def score(split: Split, predictor: Predictor, count: int) -> dict[str, float]:
    """Return the headline metric of each task over the first `count` images, protocol A."""
    indices = range(min(count, len(split)))
    scores = evaluate(split, predictor, PROTOCOL, indices=indices, workers=default_workers()).scores()
    return {task: values[TASKS[task].metric] for task, values in scores.items()}


def measure(run: Run, package_dir: Path, split: Split, count: int) -> dict[str, Any]:
    """Score the model and each precision of its package on validation images; write it into the manifest, return it.

    Of a package of several budgets each is scored, those beside the default as "PRECISION, budget NAME".
    """
    columns = {"torch": score(split, torch_predictor(run.model), count)}
    manifest = read_sealed_json(package_dir / MANIFEST, "export it again")
    for precision in manifest["precisions"]:
        package = Package.load(package_dir, precision=precision, verify=False)
        for place, budget in enumerate(package.budgets or [None]):
            name = f"{precision}, budget {budget}" if place else precision
            columns[name] = score(split, onnx_predictor(package.of(budget)), count)
    measured: dict[str, Any] = {
        "protocol": PROTOCOL,
        "split": "val",
        "images": min(count, len(split)),
        "tasks": {
            task: {
                "metric": TASKS[task].metric,
                **{name: scores[task] for name, scores in columns.items()},
                # In percent of the model's; above 0 is worse, whichever way the metric goes.
                "loss_percent": {
                    name: loss_percent(task, scores[task], columns["torch"][task])
                    for name, scores in columns.items()
                    if name != "torch"
                },
            }
            for task in package.tasks
        },
    }
    write_sealed_json(package_dir / MANIFEST, {**manifest, "measured": measured})
    return measured


def loss_percent(task: str, value: float, reference: float) -> float:
    """Return how much worse a task's metric is than its reference, in percent of that; negative is better."""
    change = (reference - value) if TASKS[task].higher_is_better else (value - reference)
    return 100 * change / abs(reference) if reference else 0.0 if value == reference else float("nan")


def render(measured: dict[str, Any]) -> Iterator[str]:
    """Yield a line a task of what `measure` returned."""
    for task, row in measured["tasks"].items():
        changes = [f"{name} {row[name]:.4g} ({loss:+.2f} % loss)" for name, loss in row["loss_percent"].items()]
        yield f"{task}: {row['metric']} ({TASKS[task].unit}) torch {row['torch']:.4g}, {', '.join(changes)}"
