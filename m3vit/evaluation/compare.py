"""`m3vit eval --compare`: evaluations side by side, with bootstrap confidence intervals over the images.

Images are drawn with replacement, the same ones for every evaluation, so that the interval of a difference is that of
paired differences. 95 % intervals by percentiles. They say how much a figure depends on which images were in the
split, not how much on the training seed.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.errors import InputError
from m3vit.evaluation.evaluate import Evaluation
from m3vit.evaluation.gain import BASELINES, Baseline, delta_m
from m3vit.evaluation.meters import make_meter
from m3vit.evaluation.scoring import read, read_evaluation
from m3vit.tasks import TASKS

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles


def bootstrap_weights(images: int, seed: int = 0) -> NDArray[np.float64]:
    """Return how often each image is drawn in each resample: [1000, images]."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), RESAMPLES).astype(np.float64)


def resampled(evaluation: Evaluation, task: str, weights: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """Return a metric of each resample: [1000]."""
    meter = make_meter(task, evaluation.label_set, evaluation.protocol)
    return meter.compute(weights @ evaluation.statistics[task])[metric]


def interval(values: NDArray[np.float64]) -> list[float]:
    """Return the 95 % interval of resampled values; resamples without a valid pixel are left out."""
    return [float(value) for value in np.nanpercentile(values, INTERVAL)]


def find_baseline(name: str, protocol: str, label_set: str) -> Baseline:
    """Return named baselines, or an evaluated folder's figures as baselines; raise InputError if they do not fit."""
    baseline = BASELINES.get(name)
    if baseline is None:
        folder = Path(name)
        if not folder.is_dir():
            raise InputError(f"baseline {name!r}: give an evaluated folder, or one of {', '.join(BASELINES)}")
        _, result = read(folder, protocol)
        column = result["predictor"]
        figures = {
            task: (TASKS[task].metric, scores[column][TASKS[task].metric]) for task, scores in result["tasks"].items()
        }
        baseline = Baseline(name, result["label_set"], protocol, f"m3vit eval {name}", figures)
    if (baseline.protocol, baseline.label_set) != (protocol, label_set):
        raise InputError(
            f"the baselines {baseline.name} are of {baseline.label_set}, protocol {baseline.protocol}, the evaluations "
            f"of {label_set}, protocol {protocol}: figures of different protocols are not comparable"
        )
    return baseline


def compare(folders: list[Path], protocol: str | None = None, baseline: str | None = None) -> dict[str, Any]:
    """Compare evaluated folders under one protocol (default: the only one that all were evaluated under).

    Returns {"protocol", "images", "baseline", "rows"}; a row has the folder's name, delta_m (None without baselines)
    and for each task and metric {"value", "interval", and but for the first row "difference", "difference_interval"}
    to the first row. Raises InputError for different protocols, data or tasks.
    """
    if len(folders) < 2:
        raise InputError("--compare needs at least two evaluated folders")
    protocol = protocol or common_protocol(folders)
    results = [read(folder, protocol)[1] for folder in folders]
    evaluations = [read_evaluation(folder, protocol) for folder in folders]
    first = evaluations[0]
    for folder, result, evaluation in zip(folders, results, evaluations, strict=True):
        if evaluation.ids != first.ids or evaluation.label_set != first.label_set:
            raise InputError(
                f"{folders[0]} and {folder} were evaluated on different images "
                f"({results[0]['data']}, {len(first.ids)} images, and {result['data']}, {len(evaluation.ids)} images): "
                "evaluate both on the same data"
            )
    tasks = [task for task in first.statistics if all(task in other.statistics for other in evaluations)]
    if not tasks:
        raise InputError("these evaluations have no task in common")
    reference = find_baseline(baseline, protocol, first.label_set) if baseline else None
    weights = bootstrap_weights(len(first.ids))
    rows: list[dict[str, Any]] = []
    samples: dict[str, NDArray[np.float64]] = {}
    for folder, evaluation in zip(folders, evaluations, strict=True):
        scores = evaluation.scores()
        row: dict[str, Any] = {"name": str(folder), "tasks": {}, "delta_m": None}
        if reference:
            row["delta_m"] = delta_m(scores, reference)
        for task in tasks:
            metric = TASKS[task].metric
            drawn, value = resampled(evaluation, task, weights, metric), scores[task][metric]
            cell: dict[str, Any] = {"metric": metric, "value": value, "interval": interval(drawn)}
            if rows:
                cell["difference"] = value - rows[0]["tasks"][task]["value"]
                cell["difference_interval"] = interval(drawn - samples[task])
            else:
                samples[task] = drawn
            row["tasks"][task] = cell
        rows.append(row)
    return {
        "protocol": results[0]["protocol"],
        "images": len(first.ids),
        "resamples": RESAMPLES,
        "baseline": reference and {"name": reference.name, "source": reference.source},
        "rows": rows,
    }


def common_protocol(folders: list[Path]) -> str:
    """Return the protocol that the folders were last evaluated under, or raise InputError if they differ."""
    found = {str(folder): read(folder)[0] for folder in folders}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{folder}: {name}" for folder, name in found.items())
        raise InputError(
            f"the folders were evaluated under different protocols ({listed}), which cannot share a table: evaluate "
            "them under one (m3vit eval --protocol A), or name one that all have with --protocol"
        )
    return next(iter(found.values()))
