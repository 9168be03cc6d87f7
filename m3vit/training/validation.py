"""The evaluations between epochs, and which of them is the best."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from m3vit.data.sample import Split
from m3vit.evaluation.evaluate import torch_predictor
from m3vit.evaluation.meters import check_meter
from m3vit.evaluation.scoring import share
from m3vit.models.multitask import MultiTaskModel
from m3vit.tasks import TASKS

PROTOCOL = "A"  # of the evaluations between epochs


def check_scored(tasks: Sequence[str], label_set: str) -> None:
    """Raise InputError if a task could not be scored, while training or after."""
    for task in tasks:
        for quick in (True, False):
            check_meter(task, label_set, PROTOCOL, quick)


def validate(
    split: Split, model: MultiTaskModel, on_error: str, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """Return the metrics under the protocol that takes any image size, with the quick edge metric instead of odsF.

    Each process scores its share of the images; the result is the same in all. A task that no image is labelled for has
    no metrics.
    """
    found = share(split, torch_predictor(model), PROTOCOL, 1, progress, quick=True, skip_unreadable=on_error == "skip")
    scores = {task: values for task, values in found.scores().items() if len(found.unlabelled[task]) < len(found.ids)}
    counts = {f"unlabelled/{task}": float(len(messages)) for task, messages in found.unlabelled.items() if messages}
    return flat(scores) | counts | ({"unreadable": float(len(found.errors))} if found.errors else {})


def flat(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Turn {task: {metric: value}} into {"task/metric": value}, without the IoU of each class."""
    return {
        f"{task}/{metric}": value
        for task, values in scores.items()
        for metric, value in values.items()
        if not metric.startswith("IoU_")
    }


def headline(task: str) -> str:
    """Return the name of a task's headline metric in `validate`'s result."""
    return f"{task}/{TASKS[task].headline(quick=True)}"


def figure(values: dict[str, Any], first: dict[str, Any], tasks: Sequence[str], best: str) -> float:
    """Return how good an evaluation is by `train.best`: larger is better, -inf if it is not a number.

    "mean" is the mean over tasks of (value - first) / max(|value|, |first|), negated where lower is better: a change as
    a share of the larger, since a task that starts near zero would outweigh the others as a share of the first.
    """

    def gain(task: str) -> float:
        value, start = values[headline(task)], first[headline(task)]
        larger = max(abs(value), abs(start))
        change = (value - start) / larger if larger else 0.0
        return change if TASKS[task].higher_is_better else -change

    if best != "mean":
        value = values.get(headline(best), math.nan)
        found = value if TASKS[best].higher_is_better else -value
    else:
        scored = [task for task in tasks if headline(task) in values and headline(task) in first]
        found = sum(gain(task) for task in scored) / max(1, len(scored))
    return found if math.isfinite(found) else -math.inf


def is_best(evaluations: Sequence[dict[str, Any]], tasks: Sequence[str], best: str) -> bool:
    """Return whether the last of these evaluations is better than all before it; the first is."""
    figures = [figure(values, evaluations[0], tasks, best) for values in evaluations]
    return all(figures[-1] > earlier for earlier in figures[:-1])
