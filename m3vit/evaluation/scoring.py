"""`m3vit eval`: score a run, an ONNX package or an HLS project, and write eval.json into its folder.

eval.json holds {"format": 3, "protocols": {name: result}}, one result for each protocol evaluated under; the
per-image statistics of a result are in eval-<protocol>.npz, for `m3vit eval --compare`. Both carry digests. Where the
errors are, such as which class is taken for which, is in breakdown-<protocol>.json, by task (`Meter.explained`).
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3vit.collectives import agree, gather, process_group, rank, world_size
from m3vit.data.opening import layout_for, open_split, origin
from m3vit.data.sample import Split
from m3vit.digests import changed, check_sealed, read_sealed_json, seal, write_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation.evaluate import (
    Evaluation,
    Keep,
    Predictor,
    Scores,
    TrivialPredictor,
    evaluate,
    read_untrained_classes,
)
from m3vit.evaluation.meters import TRAINED, over_trained, try_meter
from m3vit.evaluation.predictions import Store
from m3vit.evaluation.protocols import PROTOCOLS, check_protocol
from m3vit.files import atomic_path, sha256_file, write_json
from m3vit.label_sets import LABEL_SETS, declare, describe
from m3vit.launched import place
from m3vit.pool import usable_cores

FORMAT = 3  # 2 had other statistics of edges
MOST_NAMES = 4  # of classes, in a line of words
Progress = Callable[[int, int, str], None]


def default_workers() -> int:
    """Return how many processes may match edges beside this one, of those of its node."""
    return max(1, usable_cores() // (place().local_world or world_size()))


def score(
    predictor: Predictor,
    folder: Path,
    root: str,
    protocol: str = "A",
    *,
    trivial: bool = False,
    partial: bool = False,
    info: dict[str, Any] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    predictions: Path | None = None,
) -> dict[str, Any] | None:
    """Score a predictor on the val split of `root`, and add the result to the eval.json of `folder`.

    `trivial` scores the trivial predictor too, fitted on the train split; `partial`: on those of its labels that can be
    read, as the run was trained (`data.on_error` skip). `info` becomes part of the result. `predictions`: a folder for
    the files of m3vit/evaluation/predictions.py. Under
    torchrun each process scores its share of the images; the result, the same to the last bit, is written and returned
    by the first process, the others return None.

    "untrained" names, by task, the classes that no label of the train split has (None where there is no such split):
    the published mIoU counts them like any other, mIoU_trained leaves them out of the mean.
    """
    check_protocol(protocol)
    label_set, tasks = predictor.label_set, predictor.tasks
    layout = layout_for(label_set, root, tasks)
    split = open_split(layout, root, "val", tasks, label_set=label_set)
    with process_group():
        agree(lambda: None if rank() else stored(folder))  # damaged, it is refused now rather than after the evaluation
        store = Store(predictions) if predictions else None
        agree(lambda: None if rank() or store is None else store.prepare(protocol, tasks))
        keep = store.write if store else None
        evaluations = {
            predictor.name: share(split, predictor, protocol, workers, stage(progress, predictor.name), keep=keep)
        }
        constants = untrained = None
        if trivial:
            train = open_split(layout, root, "train", tasks, partial, label_set)
            fitted = TrivialPredictor.fit(train, stage(progress, "training labels"))
            if fitted.left_out and rank() == 0:
                words = f"the trivial predictor is fitted without {fitted.left_out} training labels"
                warnings.warn(f"{words} that cannot be read: m3vit data check {root} names them", stacklevel=2)
            constants = fitted.constants
            constant = fitted.predictor(predictor.size)
            evaluations["trivial"] = share(split, constant, protocol, workers, stage(progress, "trivial"))
            untrained = fitted.untrained
    if rank() != 0:
        return None
    if not trivial:
        untrained = untrained_in(layout, root, tasks, label_set, stage(progress, "training labels"))
    scores = {name: with_trained(evaluation.scores(), label_set, untrained) for name, evaluation in evaluations.items()}
    labelled = {
        task: len(split) - len(messages)
        for task, messages in evaluations[predictor.name].unlabelled.items()
        if messages
    }
    if bare := [task for task, count in labelled.items() if not count]:
        warnings.warn(f"no val image of {root} is labelled for {', '.join(bare)}: no figure of it", stacklevel=2)
        tasks = [task for task in tasks if task not in bare]
    result = {
        "protocol": PROTOCOLS[protocol],
        "split": "val",
        "images": len(split),
        **({"labelled": labelled} if labelled else {}),
        "data": str(Path(root).resolve()),
        "label_set": label_set,
        "labels": describe(label_set),
        "release": split.release,
        "origin": origin(root),
        "predictor": predictor.name,
        **(info or {}),
        "trivial": constants,
        "untrained": untrained,
        "tasks": {task: {name: scores[name][task] for name in scores} for task in tasks},
    }
    write(folder, protocol, result, evaluations[predictor.name])
    return result


def untrained_in(
    layout: str, root: str, tasks: Sequence[str], label_set: str, progress: Callable[[int, int], None] | None
) -> dict[str, list[str]] | None:
    """Return the classes, by task, that no training label of `root` has; None if it has no training images."""
    tasks = [task for task in tasks if task in LABEL_SETS[label_set].classes]
    if not tasks:
        return {}
    try:
        return read_untrained_classes(open_split(layout, root, "train", tasks, True, label_set), progress)
    except InputError:  # a folder of validation images alone can be evaluated on
        return None


def with_trained(scores: Scores, label_set: str, untrained: dict[str, list[str]] | None) -> Scores:
    """Return scores with those over the classes that training labels have, where it is known which these are."""
    classes, absent = LABEL_SETS[label_set].classes, untrained or {}
    return {
        task: over_trained(metrics, classes[task], absent[task]) if task in absent else metrics
        for task, metrics in scores.items()
    }


def without_untrained(untrained: dict[str, list[str]] | None) -> dict[str, str]:
    """Return, by task of which no training label has some class, what the figure without these is, in words."""
    words = {}
    for task, names in (untrained or {}).items():
        named = ", ".join(name.replace("_", " ") for name in names[:MOST_NAMES])
        if len(names) > MOST_NAMES:
            named += f" and {len(names) - MOST_NAMES} more"
        if names:
            words[task] = f"{TRAINED}: over the {task} classes that training labels have, without {named}"
    return words


def stage(progress: Progress | None, text: str) -> Callable[[int, int], None] | None:
    """Return a progress callback without text, for one of several stages."""
    return (lambda done, total: progress(done, total, text)) if progress else None


def share(
    split: Split,
    predictor: Predictor,
    protocol: str,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
    *,
    quick: bool = False,
    skip_unreadable: bool = False,
    keep: Keep | None = None,
) -> Evaluation:
    """Evaluate this process's images, and return the statistics of all, in the order of the split."""
    if world_size() > len(split):
        raise InputError(f"{world_size()} processes for {len(split)} images: start fewer")
    mine = range(rank(), len(split), world_size())
    options: dict[str, Any] = {"quick": quick, "skip_unreadable": skip_unreadable, "progress": progress, "keep": keep}
    workers = workers or default_workers()
    found = agree(lambda: evaluate(split, predictor, protocol, indices=mine, workers=workers, **options))
    prints_of = (found.fingerprints, found.label_prints)
    parts = gather((found.ids, found.statistics, found.errors, prints_of, found.unlabelled, found.breakdowns))
    ids = [name for names, *_ in parts for name in names]
    place = {name: index for index, name in enumerate(split.ids)}
    order = np.argsort([place[name] for name in ids], kind="stable")
    statistics = {
        task: np.concatenate([statistics[task] for _, statistics, *_ in parts])[order] for task in found.statistics
    }
    errors = [error for part in parts for error in part[2]]
    of_images, of_labels = ([value for part in parts for value in part[3][kind]] for kind in (0, 1))
    names, prints, labels = ([values[index] for index in order] for values in (ids, of_images, of_labels))
    unlabelled = {task: [text for part in parts for text in part[4][task]] for task in found.unlabelled}
    breakdowns = {task: sum(part[5][task] for part in parts if task in part[5]) for task in found.breakdowns}
    return Evaluation(
        protocol, split.label_set, names, statistics, quick, errors, prints, labels, unlabelled, breakdowns
    )


def write(folder: Path, protocol: str, result: dict[str, Any], evaluation: Evaluation) -> None:
    """Write statistics, then add their result to eval.json: it never names statistics that are others, or not there."""
    results = stored(folder)
    with atomic_path(folder / f"eval-{protocol}.npz") as path:
        with open(path, "wb") as file:
            known = {"ids": np.array(evaluation.ids), "fingerprints": np.array(evaluation.fingerprints, np.int64)}
            known["label_prints"] = np.array(evaluation.label_prints, np.int64)
            np.savez_compressed(file, **known, **evaluation.statistics)  # type: ignore[arg-type]
        seal(path)
        result = {**result, "statistics_sha256": sha256_file(path)}
        if results.pop(protocol, None):
            write_sealed_json(folder / "eval.json", {"format": FORMAT, "protocols": results})
    told = folder / f"breakdown-{protocol}.json"
    write_json(told, {"images": len(evaluation.ids), "tasks": evaluation.explained()})
    result["breakdown_sha256"] = sha256_file(told)
    # The newest last: it is what `m3vit report` shows.
    write_sealed_json(folder / "eval.json", {"format": FORMAT, "protocols": {**results, protocol: result}})


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {protocol: result} of a folder's eval.json, {} without one or of another version; InputError if damaged.

    A result has at least what this module and its callers read of it.
    """
    path, advice = folder / "eval.json", f"delete it and evaluate again with m3vit eval {folder}"
    if not path.exists():
        return {}
    content = read_sealed_json(path, advice)
    if content.get("format") != FORMAT:
        return {}
    results = content.get("protocols")
    needed = {"data", "label_set", "predictor", "protocol", "release", "tasks"}
    if not isinstance(results, dict) or not all(
        isinstance(result, dict) and needed <= result.keys() and isinstance(result["tasks"], dict)
        for result in results.values()
    ):
        raise InputError(f"{path} lacks what an evaluation has: {advice}")
    return results


def protocols_of(folder: Path) -> tuple[str, ...]:
    """Return the protocols that a folder was evaluated under, the last one last, or raise InputError."""
    return tuple(_results(folder))


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return {protocol: result} of a folder that was evaluated, or raise InputError."""
    hint = f"evaluate it first: m3vit eval {folder}"
    if not (folder / "eval.json").exists():
        raise InputError(f"{folder / 'eval.json'} not found: {hint}")
    results = stored(folder)
    if not results:
        raise InputError(f"{folder / 'eval.json'} has no evaluation of this version: {hint}")
    return results


def read(folder: Path, protocol: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return a protocol (default: the last evaluated) and its result from a folder's eval.json, or raise InputError."""
    hint = f"evaluate it first: m3vit eval {folder}" + (f" --protocol {protocol}" if protocol else "")
    known = _results(folder)
    name = protocol or list(known)[-1]
    if name not in known:
        raise InputError(f"{folder} was evaluated under protocol {', '.join(known)}, not {name}: {hint}")
    result = known[name]
    if "labels" in result:
        result = {**result, "label_set": declare(result["labels"], str(folder / "eval.json"), result["tasks"])}
    elif result["label_set"] not in LABEL_SETS:
        raise InputError(f"{folder} was evaluated on the label set {result['label_set']}, unknown here: {hint}")
    return name, result


def read_evaluation(folder: Path, protocol: str) -> Evaluation:
    """Return the per-image statistics of a folder's evaluation, or raise InputError."""
    _, result = read(folder, protocol)
    path, advice = folder / f"eval-{protocol}.npz", f"evaluate again with m3vit eval {folder} --protocol {protocol}"
    check_sealed(path, advice)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids = [str(name) for name in arrays["ids"]]
            prints = arrays["fingerprints"].tolist()
            labels = arrays["label_prints"].tolist() if "label_prints" in arrays else []
            statistics = {task: arrays[task] for task in result["tasks"]}
    except Exception as error:  # zip, zlib and numpy raise many kinds for damaged files
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())}): {advice}") from None
    if result.get("statistics_sha256") not in (None, sha256_file(path)):  # whole, but of another evaluation
        raise changed(path, advice)
    if any(len(values) != len(ids) for values in (prints, *statistics.values())):
        raise InputError(f"{path} has not one row for each of its {len(ids)} images: {advice}")
    for task, values in statistics.items():
        if values.shape[1:] != try_meter(task, result["label_set"], protocol)[1].shape:
            raise InputError(
                f"{path} has other statistics of {task} than its label set {result['label_set']}: {advice}"
            )
    return Evaluation(protocol, result["label_set"], ids, statistics, fingerprints=prints, label_prints=labels)
