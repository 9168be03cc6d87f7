"""`m3vit search`: how many experts per token each task needs in each block, for a share of the compute.

For runs as they are trained: nothing is trained for fewer experts here, so what a budget loses is measured and told.

A task's graph has its own routing, so tasks do not meddle with each other: one pass over the images measures one
choice of every task. First each block alone gets fewer experts, which predicts, by adding up, what any combination
loses. Costs add up exactly, so the combinations that no other one beats (in cost and predicted loss) are found block by
block, all of them looked at. Some of these, spread over the range of costs, are measured. Last, a point of each task is
taken, so that together they keep within the compute and lose least, each task weighed by its preference.

Losses are relative to the full model, in percent of the headline metric, negative where fewer experts are better.
L blocks with experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from m3vit.data.sample import Split
from m3vit.errors import InputError
from m3vit.evaluation.evaluate import evaluate, torch_predictor
from m3vit.models.budget import Budget
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.profiling import graph_macs
from m3vit.tasks import TASKS

PROTOCOL = "A"
POINTS = 6  # of a task's front that are measured, beside all experts

T = TypeVar("T")
Counts = tuple[int, ...]  # experts per token of the L blocks
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Point:
    """A way of running a task: experts per token of each block, MACs an image, relative loss in percent."""

    counts: Counts
    macs: int
    loss: float

    @property
    def worth(self) -> tuple[int, float]:
        """What points are compared by."""
        return self.macs, self.loss


@dataclass(frozen=True)
class Found:
    """What a search found: a point of each task, the weighted loss, and the front that it is on.

    share: of the MACs of all tasks' graphs with all experts. front: [(share, weighted loss, {task: point})], ascending.
    """

    points: dict[str, Point]
    share: float
    loss: float
    front: list[tuple[float, float, dict[str, Point]]]

    def budget(self, blocks: Sequence[int]) -> Budget:
        """Return it as a budget of the model's blocks with experts."""
        return budget_of({task: point.counts for task, point in self.points.items()}, blocks)


def budget_of(choice: Mapping[str, Counts], blocks: Sequence[int]) -> Budget:
    """Return the budget of each task's experts per token in the blocks with experts."""
    return Budget({task: dict(zip(blocks, counts, strict=True)) for task, counts in choice.items()})


def cost_of(config: ModelConfig, blocks: Sequence[int]) -> Callable[[str, Counts], int]:
    """Return the function (task, counts) -> MACs of the task's graph at the size trained at, as profile counts them."""
    size = (config.image_size[0], config.image_size[1])
    whole = {task: graph_macs(config, task, size) for task in config.tasks}
    first = config.tasks[0]
    saved = [whole[first] - graph_macs(config, first, size, Budget({first: {block: 1}})) for block in blocks]
    fewer = config.top_k - 1

    def macs(task: str, counts: Counts) -> int:
        left = sum(each * (config.top_k - count) for each, count in zip(saved, counts, strict=True))
        return whole[task] - (left // fewer if fewer else 0)

    return macs


def unbeaten(ways: Sequence[T], worth: Callable[[T], tuple[int, float]]) -> list[T]:
    """Return those that no other one beats in `worth` (MACs, loss), by ascending MACs, one of equals."""
    kept: list[T] = []
    for way in sorted(ways, key=worth):
        if not kept or worth(way)[1] < worth(kept[-1])[1]:
            kept.append(way)
    return kept


def predicted_front(alone: Sequence[Mapping[int, float]], macs: Callable[[Counts], int], top_k: int) -> list[Point]:
    """Return the unbeaten points of a task, of all combinations of counts, if losses add up.

    `alone` [L]: {experts per token: loss} of a block that has them while the others have all, 0 for all of them. Built
    block by block: a beaten beginning stays beaten, since costs and losses only add up.
    """
    beginnings = [Point((), 0, 0.0)]
    for place, losses in enumerate(alone):
        rest = (top_k,) * (len(alone) - place - 1)
        longer = [
            Point(counts := (*begun.counts, count), macs((*counts, *rest)), begun.loss + loss)
            for begun in beginnings
            for count, loss in losses.items()
        ]
        beginnings = unbeaten(longer, lambda point: point.worth)
    return beginnings


def sample_front(front: Sequence[Point], count: int) -> list[Point]:
    """Return up to `count` points of a front, both ends and the nearest to even steps of MACs between them."""
    macs = np.array([point.macs for point in front], np.float64)
    steps = np.linspace(macs[0], macs[-1], count)
    return [front[place] for place in sorted({int(np.abs(macs - step).argmin()) for step in steps})]


def best_together(
    fronts: Mapping[str, Sequence[Point]], preferences: Mapping[str, float]
) -> list[tuple[int, float, dict[str, Point]]]:
    """Return (MACs, weighted mean loss, {task: point}) of the unbeaten choices of a point of each task, ascending."""
    total = sum(preferences[task] for task in fronts)
    together: list[tuple[int, float, dict[str, Point]]] = [(0, 0.0, {})]
    for task, measured in fronts.items():
        points = unbeaten(measured, lambda point: point.worth)
        weight = preferences[task] / total
        longer = [
            (macs + point.macs, loss + weight * point.loss, {**chosen, task: point})
            for macs, loss, chosen in together
            for point in points
        ]
        together = unbeaten(longer, lambda one: one[:2])
    return together


def relative_loss(task: str, full: float, value: float) -> float:
    """Return what `value` of a task's headline metric loses on `full` (finite, not 0), in percent."""
    change = 100 * (full - value) / abs(full)
    return change if TASKS[task].higher_is_better else -change


def search(
    model: MultiTaskModel,
    split: Split,
    share: float,
    preferences: Mapping[str, float],
    indices: Sequence[int],
    progress: Progress | None = None,
) -> Found:
    """Return the experts per token that lose least within `share` (0..1) of the MACs, on the images `indices`.

    `preferences` weigh the tasks' losses; edges are scored by the quick metric. Raises InputError for a model without
    a choice, and for a share that fewer experts do not reach.
    """
    config, blocks = model.config, model.backbone.moe_indices
    if not blocks or config.top_k == 1:
        what = "has no experts" if not blocks else "has one expert per token"
        raise InputError(f"this model {what}: there is nothing to choose, m3vit search needs top_k 2 or more")
    macs = cost_of(config, blocks)
    every, least = (config.top_k,) * len(blocks), (1,) * len(blocks)
    whole = sum(macs(task, every) for task in config.tasks)
    lowest = sum(macs(task, least) for task in config.tasks) / whole
    if share < lowest:
        raise InputError(
            f"--budget is {share:g}: with one expert per token in every block this model still takes {lowest:.3f} of "
            f"its MACs, and it was not trained for less: give {math.ceil(1000 * lowest) / 1000:g} to 1"
        )
    alone_of = [(place, count) for place in range(len(blocks)) for count in range(1, config.top_k)]
    total, done = 1 + len(alone_of) + POINTS, 0

    def measured(choice: Mapping[str, Counts], words: str) -> dict[str, float]:
        nonlocal done
        predictor = torch_predictor(model, 1, budget_of(choice, blocks))
        scores = evaluate(split, predictor, PROTOCOL, indices=indices, quick=True).scores()
        done += 1
        if progress:
            progress(done, total, words)
        return {task: scores[task][TASKS[task].headline(quick=True)] for task in config.tasks}

    full = measured(dict.fromkeys(config.tasks, every), "all experts")
    if bare := [task for task, value in full.items() if not math.isfinite(value) or value == 0]:
        raise InputError(
            f"on {len(indices)} val images {', '.join(bare)} has no figure, or one of 0, to lose from: give more "
            "--images, or train longer"
        )
    alone: dict[str, list[dict[int, float]]] = {task: [{config.top_k: 0.0} for _ in blocks] for task in config.tasks}
    for place, count in alone_of:
        counts = (*every[:place], count, *every[place + 1 :])
        values = measured(dict.fromkeys(config.tasks, counts), "each block alone")
        for task in config.tasks:
            alone[task][place][count] = relative_loss(task, full[task], values[task])
    to_measure = {
        task: sample_front(predicted_front(alone[task], partial(macs, task), config.top_k), POINTS)
        for task in config.tasks
    }
    rounds = max(map(len, to_measure.values()))
    total -= POINTS - rounds  # fronts of few points
    fronts = {task: [Point(every, macs(task, every), 0.0)] for task in config.tasks}
    for place in range(rounds):
        choice = {task: points[min(place, len(points) - 1)].counts for task, points in to_measure.items()}
        values = measured(choice, "combinations")
        for task, counts in choice.items():
            loss = relative_loss(task, full[task], values[task])
            fronts[task].append(Point(counts, macs(task, counts), loss))
    # One expert per token everywhere is always among them, so that every share promised can be kept to.
    front = best_together(fronts, preferences)
    within = [one for one in front if one[0] <= share * whole]
    chosen = within[-1]  # the front falls: the last is the best
    return Found(chosen[2], chosen[0] / whole, chosen[1], [(one[0] / whole, one[1], one[2]) for one in front])


def read_preferences(text: str | None, tasks: Sequence[str]) -> dict[str, float]:
    """Parse `depth=2,semseg=1` into a weight of each task, 1 where nothing is said, or raise InputError."""
    weights = dict.fromkeys(tasks, 1.0)
    named: set[str] = set()
    for part in text.split(",") if text else ():
        task, equals, number = (word.strip() for word in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if task not in tasks or not equals or not 0 <= weight < math.inf:
            raise InputError(
                f"--prefer is {text!r}: give task=weight,... of the tasks {', '.join(tasks)}, weights of 0 or more"
            )
        if task in named:
            raise InputError(f"--prefer is {text!r}, which weighs {task} twice: give one weight")
        named.add(task)
        weights[task] = weight
    if not any(weights.values()):
        raise InputError(f"--prefer is {text!r}, which leaves no task any weight: give one of them more than 0")
    return weights


def said(found: Found, share: float, blocks: Sequence[int]) -> dict[str, Any]:
    """Return what a budget file says of the search, as JSON values."""
    return {
        "asked": share,
        "share_of_macs": found.share,
        "weighted_loss_percent": found.loss,
        "blocks": list(blocks),
        "tasks": {
            task: {"top_k": list(point.counts), "macs": point.macs, "loss_percent": point.loss}
            for task, point in found.points.items()
        },
        "front": [{"share_of_macs": macs, "weighted_loss_percent": loss} for macs, loss, _ in found.front],
    }
