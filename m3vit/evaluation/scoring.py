"""`m3vit eval`: score a run, an ONNX package or an HLS project, and write eval.json into its folder.

eval.json holds {"format": 2, "protocols": {name: result}}, one result for each protocol evaluated under; the
per-image statistics of a result are in eval-<protocol>.npz, for `m3vit eval --compare`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from m3vit.data.opening import open_split, origin
from m3vit.data.sample import Split
from m3vit.distributed import agree, gather, process_group, rank, world_size
from m3vit.errors import InputError
from m3vit.evaluation.evaluate import Evaluation, Predictor, TrivialPredictor, evaluate
from m3vit.evaluation.protocols import PROTOCOLS, check_protocol
from m3vit.files import atomic_path, read_json, write_json

FORMAT = 2
Progress = Callable[[int, int, str], None]


def default_workers() -> int:
    """Return how many processes may match edges beside this one."""
    return max(1, (os.cpu_count() or 1) // world_size())


def score(
    predictor: Predictor,
    folder: Path,
    root: str,
    protocol: str = "A",
    *,
    trivial: bool = False,
    info: dict[str, Any] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Score a predictor on the val split of `root`, and add the result to the eval.json of `folder`.

    `trivial` scores the trivial predictor too, fitted on the train split. `info` becomes part of the result. Under
    torchrun each process scores its share of the images; the result, the same to the last bit, is written and returned
    by the first process, the others return None.
    """
    check_protocol(protocol)
    layout, tasks = predictor.label_set, predictor.tasks
    split = open_split(layout, root, "val", tasks)
    with process_group():
        evaluations = {predictor.name: share(split, predictor, protocol, workers, stage(progress, predictor.name))}
        constants = None
        if trivial:
            fitted = TrivialPredictor.fit(open_split(layout, root, "train", tasks), stage(progress, "training labels"))
            constants = fitted.constants
            constant = fitted.predictor(predictor.size)
            evaluations["trivial"] = share(split, constant, protocol, workers, stage(progress, "trivial"))
    if rank() != 0:
        return None
    scores = {name: evaluation.scores() for name, evaluation in evaluations.items()}
    result = {
        "protocol": PROTOCOLS[protocol],
        "split": "val",
        "images": len(split),
        "data": str(Path(root).resolve()),
        "label_set": layout,
        "release": split.release,
        "origin": origin(root),
        "predictor": predictor.name,
        **(info or {}),
        "trivial": constants,
        "tasks": {task: {name: scores[name][task] for name in scores} for task in tasks},
    }
    write(folder, protocol, result, evaluations[predictor.name])
    return result


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
) -> Evaluation:
    """Evaluate this process's images, and return the statistics of all, in the order of the split."""
    if world_size() > len(split):
        raise InputError(f"{world_size()} processes for {len(split)} images: start fewer")
    mine = range(rank(), len(split), world_size())
    options: dict[str, Any] = {"quick": quick, "skip_unreadable": skip_unreadable, "progress": progress}
    workers = workers or default_workers()
    found = agree(lambda: evaluate(split, predictor, protocol, indices=mine, workers=workers, **options))
    parts = gather((found.ids, found.statistics, found.errors, found.fingerprints, found.unlabelled))
    ids = [name for names, *_ in parts for name in names]
    place = {name: index for index, name in enumerate(split.ids)}
    order = np.argsort([place[name] for name in ids], kind="stable")
    statistics = {
        task: np.concatenate([statistics[task] for _, statistics, *_ in parts])[order] for task in found.statistics
    }
    errors = [error for part in parts for error in part[2]]
    prints = [value for part in parts for value in part[3]]
    names, prints = ([values[index] for index in order] for values in (ids, prints))
    unlabelled = {task: [text for part in parts for text in part[4][task]] for task in found.unlabelled}
    return Evaluation(protocol, split.label_set, names, statistics, quick, errors, prints, unlabelled)


def write(folder: Path, protocol: str, result: dict[str, Any], evaluation: Evaluation) -> None:
    """Write statistics, then add their result to eval.json: it never names statistics that are not there."""
    with atomic_path(folder / f"eval-{protocol}.npz") as path, open(path, "wb") as file:
        known = {"ids": np.array(evaluation.ids), "fingerprints": np.array(evaluation.fingerprints, np.int64)}
        np.savez_compressed(file, **known, **evaluation.statistics)  # type: ignore[arg-type]
    results: dict[str, Any] = {}
    if (folder / "eval.json").exists():
        old = read_json(folder / "eval.json", "delete it and evaluate again")
        results = old["protocols"] if isinstance(old, dict) and old.get("format") == FORMAT else {}
    # The newest last: it is what `m3vit report` shows.
    results.pop(protocol, None)
    write_json(folder / "eval.json", {"format": FORMAT, "protocols": {**results, protocol: result}})


def protocols_of(folder: Path) -> tuple[str, ...]:
    """Return the protocols that a folder was evaluated under, the last one last, or raise InputError."""
    hint = f"evaluate it first: m3vit eval {folder}"
    content = read_json(folder / "eval.json", hint)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not content.get("protocols"):
        raise InputError(f"{folder / 'eval.json'} is not of this version: {hint}")
    return tuple(content["protocols"])


def read(folder: Path, protocol: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return a protocol (default: the last evaluated) and its result from a folder's eval.json, or raise InputError."""
    hint = f"evaluate it first: m3vit eval {folder}" + (f" --protocol {protocol}" if protocol else "")
    known = protocols_of(folder)
    name = protocol or known[-1]
    if name not in known:
        raise InputError(f"{folder} was evaluated under protocol {', '.join(known)}, not {name}: {hint}")
    return name, read_json(folder / "eval.json", hint)["protocols"][name]


def read_evaluation(folder: Path, protocol: str) -> Evaluation:
    """Return the per-image statistics of a folder's evaluation, or raise InputError."""
    _, result = read(folder, protocol)
    path = folder / f"eval-{protocol}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            ids = [str(name) for name in stored["ids"]]
            prints = stored["fingerprints"].tolist()
            statistics = {task: stored[task] for task in result["tasks"]}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({error}): evaluate again with m3vit eval {folder}") from None
    return Evaluation(protocol, result["label_set"], ids, statistics, fingerprints=prints)
