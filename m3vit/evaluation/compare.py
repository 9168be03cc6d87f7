"""`m3vit eval --compare`: evaluations side by side, with bootstrap confidence intervals over the images.

Images are drawn with replacement, the same ones for every evaluation, so that the interval of a difference is that of
paired differences. 95 % intervals by percentiles. They say how much a figure depends on which images were in the
split, not how much on the training seed.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.data.opening import LAYOUTS
from m3vit.digests import read_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation.evaluate import Evaluation
from m3vit.evaluation.gain import BASELINES, Baseline, delta_m, published_metric
from m3vit.evaluation.meters import make_meter
from m3vit.evaluation.scoring import protocols_of, read, read_evaluation
from m3vit.files import sha256_file
from m3vit.models.budget_file import BUDGETS
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


def read_current(folder: Path, protocol: str) -> tuple[dict[str, Any], Evaluation]:
    """Return a folder's result and statistics, or raise InputError if its weights are others by now."""
    _, result = read(folder, protocol)
    run = run_of(folder)
    if result.get("weights_sha256") != weights_sha256(run):
        raise InputError(
            f"{folder} was evaluated with other weights than {'it' if run is folder else run} holds now: evaluate it "
            f"again with m3vit eval {run} --protocol {protocol}{'' if run is folder else ' --budget FILE'}"
        )
    return result, read_evaluation(folder, protocol)


def run_of(folder: Path) -> Path:
    """Return the run whose weights an evaluation in `folder` is of: that of RUN/budgets/NAME, else the folder."""
    return folder.parent.parent if folder.parent.name == BUDGETS else folder


def weights_sha256(folder: Path) -> str | None:
    """Return the hash of a run's, package's or project's weights, as open_predictor (artefacts.py) notes it."""
    if (folder / "model.safetensors").is_file():
        return sha256_file(folder / "model.safetensors")
    for name, section, key in (("manifest.json", "weights", "sha256"), ("m3vit.json", "run", "weights_sha256")):
        if (folder / name).is_file():
            return read_sealed_json(folder / name, "export it again").get(section, {}).get(key)
    return None


def check_same_images(
    first: tuple[Path, dict[str, Any], Evaluation], other: tuple[Path, dict[str, Any], Evaluation]
) -> None:
    """Raise InputError unless two evaluations are of the same images."""
    (folder, result, evaluation), (other_folder, other_result, other_evaluation) = first, other
    same = evaluation.ids == other_evaluation.ids and evaluation.fingerprints == other_evaluation.fingerprints
    if not same or result["label_set"] != other_result["label_set"]:
        raise InputError(
            f"{folder} and {other_folder} were evaluated on different images "
            f"({result['data']}, {len(evaluation.ids)} images of {result['release']}, and {other_result['data']}, "
            f"{len(other_evaluation.ids)} of {other_result['release']}): evaluate both on the same data"
        )


def find_baseline(name: str, protocol: str, label_set: str, first: tuple[Path, dict[str, Any], Evaluation]) -> Baseline:
    """Return named baselines, or an evaluated folder's figures as baselines; raise InputError if they do not fit."""
    baseline = BASELINES.get(name)
    if baseline is None:
        folder = Path(name)
        if not folder.is_dir():
            raise InputError(f"baseline {name!r}: give an evaluated folder, or one of {', '.join(BASELINES)}")
        result, evaluation = read_current(folder, protocol)
        check_same_images(first, (folder, result, evaluation))
        column = result["predictor"]
        metrics = {task: published_metric(task, protocol) for task in result["tasks"]}
        figures = {task: (metric, result["tasks"][task][column][metric]) for task, metric in metrics.items()}
        baseline = Baseline(name, result["label_set"], protocol, f"m3vit eval {name}", figures)
    if (baseline.protocol, baseline.label_set) != (protocol, label_set):
        raise InputError(
            f"the baselines {baseline.name} are of {baseline.label_set}, protocol {baseline.protocol}, the evaluations "
            f"of {label_set}, protocol {protocol}: figures of other data sets or protocols are not comparable"
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
    results, evaluations = zip(*(read_current(folder, protocol) for folder in folders), strict=True)
    first = evaluations[0]
    for folder, result, evaluation in zip(folders, results, evaluations, strict=True):
        check_same_images((folders[0], results[0], first), (folder, result, evaluation))
    tasks = [task for task in first.statistics if all(task in other.statistics for other in evaluations)]
    if not tasks:
        raise InputError("these evaluations have no task in common")
    reference = None
    notes = []
    if baseline:
        reference = find_baseline(baseline, protocol, first.label_set, (folders[0], results[0], first))
        layouts = [layout for layout in LAYOUTS.values() if layout.label_set == first.label_set]
        published = next((layout.published["val"] for layout in layouts if "val" in layout.published), None)
        if reference.name in BASELINES and (results[0].get("origin") or len(first.ids) != published):
            where = results[0].get("origin") or f"{len(first.ids)} images"
            notes.append(
                f"{reference.name} is of the {published} published images, this is not ({where}): no comparison"
            )
    weights = bootstrap_weights(len(first.ids))
    rows: list[dict[str, Any]] = []
    samples: dict[str, NDArray[np.float64]] = {}
    for folder, result, evaluation in zip(folders, results, evaluations, strict=True):
        scores = evaluation.scores()
        precision = result.get("precision")  # of an ONNX package, which may hold several
        name = f"{folder} ({precision})" if precision else str(folder)
        row: dict[str, Any] = {"name": name, "tasks": {}, "delta_m": None}
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
        "origin": results[0].get("origin"),
        "notes": notes,
        "baseline": reference
        and {
            "name": reference.name,
            "source": reference.source,
            "metrics": {task: metric for task, (metric, _) in reference.figures.items()},
        },
        "rows": rows,
    }


def common_protocol(folders: list[Path]) -> str:
    """Return the protocol that the folders were last evaluated under, else the only one all were evaluated under.

    Raises InputError if there is none, or several.
    """
    known = {str(folder): protocols_of(folder) for folder in folders}
    last = {protocols[-1] for protocols in known.values()}
    common = last if len(last) == 1 else set.intersection(*(set(protocols) for protocols in known.values()))
    if len(common) != 1:
        listed = ", ".join(f"{folder}: {' and '.join(protocols)}" for folder, protocols in known.items())
        raise InputError(
            f"the folders were evaluated under different protocols ({listed}), which cannot share a table: evaluate "
            "them under one (m3vit eval --protocol A), or name one that all have with --protocol"
        )
    return next(iter(common))
