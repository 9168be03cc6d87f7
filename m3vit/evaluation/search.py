"""`m3vit search`: what to use of a model for a share of its compute, so that its tasks lose least.

Each task chooses how many experts its tokens go to in each block, and how many channels its head has if the run was
trained for that; where the run was trained for budgets, the hidden width of each block is chosen too, for all tasks. Of
other runs experts alone are left out: nothing was trained for fewer, so what a budget loses is measured and told.

A task's graph has its own routing, so tasks do not meddle with each other: one pass over the images measures one choice
of every task. First each block alone gets fewer experts, its smallest width, or is left out, which predicts, by adding
up, what any combination loses. Costs add up exactly, so the combinations that no other one beats (in cost and predicted
loss) are found block by block, all of them looked at: first of widths, of which a few are taken, from all to the
smallest and next to the compute asked for; then, for each of these, of each task's experts. Some of these, spread over
the range of costs, are measured. Blocks that lose little alone may lose much together: of the widths within the compute
asked for, what is predicted best is measured at once, which corrects what is predicted, and so on, among those on the
predicted front and those one or two blocks away from the best so far. Last, a point of each task is taken, of one
choice of widths, so that together they keep within the compute and lose least, each task weighed by its preference.

Losses are relative to the full model, in percent of the headline metric, negative where a smaller one is better.
L blocks with experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from m3vit.data.sample import Split
from m3vit.errors import InputError
from m3vit.evaluation.costs import Costs, macs_of
from m3vit.evaluation.evaluate import evaluate, torch_predictor
from m3vit.models.budget import Budget
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.space import Asked, Space, space_of
from m3vit.tasks import TASKS

PROTOCOL = "A"
POINTS = 6  # of a task's front that are measured, beside all experts
REFINED = 16  # choices of widths within what is asked that are measured at most, to correct what is predicted
PATIENCE = 8  # of these without one that loses less end it
LEVELS = 4  # of the widths' front that are measured, besides those next to what is asked, and of each task's at each

T = TypeVar("T")
# Experts per token of the L blocks, then the channels of the head if it has a choice; or hidden units of those blocks
# that have one.
Counts = tuple[int, ...]
Cost = Callable[[Counts], float]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Point:
    """A way of running a task: its experts per token and channels, its cost, relative loss in percent."""

    counts: Counts
    cost: float
    loss: float

    @property
    def worth(self) -> tuple[float, float]:
        """What points are compared by."""
        return self.cost, self.loss


class Together(NamedTuple):
    """A point of each task: the cost of all, the weighted loss, the points, hidden units of each block."""

    cost: float
    loss: float
    points: dict[str, Point]
    widths: dict[int, int]


@dataclass(frozen=True)
class Found:
    """What a search found, and the front that it is on, by ascending cost.

    share: of the cost of all tasks' graphs with everything.
    """

    chosen: Together
    share: float
    front: list[tuple[float, Together]]

    @property
    def points(self) -> dict[str, Point]:
        return self.chosen.points

    def budget(self, blocks: Sequence[int]) -> Budget:
        """Return it as a budget of the model's blocks with experts."""
        return budget_of({task: point.counts for task, point in self.points.items()}, blocks, self.chosen.widths)


def budget_of(choice: Mapping[str, Counts], blocks: Sequence[int], widths: Mapping[int, int] | None = None) -> Budget:
    """Return the budget of each task's experts per token in the blocks with experts, and channels of its head, if they
    come after these; and of hidden units by block."""
    counts = {task: dict(zip(blocks, counts, strict=False)) for task, counts in choice.items()}
    heads = {task: counts[-1] for task, counts in choice.items() if len(counts) > len(blocks)}
    return Budget(counts, width=widths or {}, heads=heads)


def searched(model: MultiTaskModel, train: Asked) -> Space:
    """Return what a search chooses from: what the run was trained for, else fewer experts alone."""
    if not train.budgets:
        return Space(tuple(model.config.tasks), tuple(model.backbone.moe_indices), 1, model.config.top_k, {})
    return space_of(model, train)


def most_and_least(found: Space) -> tuple[dict[str, Counts], dict[str, Counts]]:
    """Return what each task may choose for itself: the most of it, and the least."""
    heads, ends = found.narrow_heads, []
    for count, end in ((found.top_k, -1), (found.fewest, 0)):
        experts = (count,) * len(found.blocks)
        ends.append({task: (*experts, heads[task][end]) if task in heads else experts for task in found.tasks})
    return ends[0], ends[1]


def unbeaten(ways: Sequence[T], worth: Callable[[T], tuple[float, float]]) -> list[T]:
    """Return those that no other one beats in `worth` (cost, loss), by ascending cost, one of equals."""
    kept: list[T] = []
    for way in sorted(ways, key=worth):
        if not kept or worth(way)[1] < worth(kept[-1])[1]:
            kept.append(way)
    return kept


def predicted_front(alone: Sequence[Mapping[int, float]], cost: Cost, every: Counts) -> list[Point]:
    """Return the unbeaten points of a task, of all combinations of counts, if losses add up.

    `alone` [L]: {experts per token: loss} of a block that has them while the others have all, 0 for all of them.
    `every` [L]: all of them. Built block by block: a beaten beginning stays beaten, since costs and losses only add up.
    """
    beginnings = [Point((), cost(every), 0.0)]
    for place, losses in enumerate(alone):
        rest = every[place + 1 :]
        longer = [
            Point(counts := (*begun.counts, count), cost((*counts, *rest)), begun.loss + loss)
            for begun in beginnings
            for count, loss in losses.items()
        ]
        beginnings = unbeaten(longer, lambda point: point.worth)
    return beginnings


def sample_front(front: Sequence[Point], count: int) -> list[Point]:
    """Return up to `count` points of a front, both ends and the nearest to even steps of cost between them."""
    costs = np.array([point.cost for point in front], np.float64)
    steps = np.linspace(costs[0], costs[-1], count)
    return [front[place] for place in sorted({int(np.abs(costs - step).argmin()) for step in steps})]


def best_together(
    fronts: Mapping[str, Sequence[Point]], preferences: Mapping[str, float]
) -> list[tuple[float, float, dict[str, Point]]]:
    """Return (cost, weighted mean loss, {task: point}) of the unbeaten choices of a point of each task, ascending."""
    total = sum(preferences[task] for task in fronts)
    together: list[tuple[float, float, dict[str, Point]]] = [(0, 0.0, {})]
    for task, measured in fronts.items():
        points = unbeaten(measured, lambda point: point.worth)
        weight = preferences[task] / total
        longer = [
            (cost + point.cost, loss + weight * point.loss, {**chosen, task: point})
            for cost, loss, chosen in together
            for point in points
        ]
        together = unbeaten(longer, lambda one: one[:2])
    return together


def relative_loss(task: str, full: float, value: float) -> float:
    """Return what `value` of a task's headline metric loses on `full` (finite, not 0), in percent."""
    change = 100 * (full - value) / abs(full)
    return change if TASKS[task].higher_is_better else -change


def between(widths: Sequence[int], measured: Mapping[int, float]) -> dict[int, float]:
    """Return the loss of each width of a block.

    Measured were the smallest, and that of leaving the block out where it may be (0): the others' by the units missing.
    """
    least, most = next(width for width in widths if width), widths[-1]
    found = {width: measured.get(least, 0.0) * (most - width) / max(1, most - least) for width in widths if width}
    return found | {width: measured[width] for width in widths if not width}


def alone_in(widths: Sequence[int]) -> list[int]:
    """Return the widths of a block that are measured by themselves."""
    smallest = next(width for width in widths if width)
    return [width for width in widths[:-1] if width in (0, smallest)]


def corrected(
    widths: Sequence[Sequence[int]], alone: Sequence[Mapping[int, float]], tried: Mapping[Counts, float]
) -> list[dict[int, float]]:
    """Return the loss of each width of each block, by which what was `tried` adds up to what it was measured to lose.

    `alone`: as measured block by block. Of all such losses those nearest to them.
    """
    keys = [(place, width) for place, measured in enumerate(alone) for width in measured]
    losses = np.array([alone[place][width] for place, width in keys])
    # How much of a loss a width has: all of it the smallest one, of those between by the units missing.
    shares = [between(some, dict.fromkeys(measured, 1.0)) for some, measured in zip(widths, alone, strict=True)]

    def share(counts: Counts, place: int, width: int) -> float:
        left_out = counts[place] == 0
        return shares[place][counts[place]] if left_out == (width == 0) else 0.0

    if tried:
        system = np.array([[share(counts, *key) for key in keys] for counts in tried])
        losses = losses + np.linalg.pinv(system) @ (np.array(list(tried.values())) - system @ losses)
    found = dict(zip(keys, losses.tolist(), strict=True))
    return [
        between(some, {width: found[place, width] for width in measured})
        for place, (some, measured) in enumerate(zip(widths, alone, strict=True))
    ]


def neighbours(counts: Counts, widths: Sequence[Sequence[int]]) -> list[Counts]:
    """Return what differs from a choice of widths in one block or in two."""
    found = {counts}
    for _ in range(2):
        found |= {
            (*one[:place], width, *one[place + 1 :])
            for one in found
            for place in range(len(one))
            for width in widths[place]
        }
    return sorted(found - {counts})


def check_share(share: float, lowest: float, name: str, found: Space, trained: bool) -> None:
    """Raise InputError for a share of the cost that no budget of the space has."""
    if share >= lowest:
        return
    if lowest > 1:
        raise InputError(
            f"--budget is {share:g}: as measured just now the smallest budget takes {lowest:.3f} of the whole model's "
            f"{name}, so other programs are in the way: search again when they are done, or by --cost macs"
        )
    advice = f"give {math.ceil(1000 * lowest) / 1000:g} to 1"
    if trained:
        keys = "train.budget_top_k, budget_width, budget_skip" + (", budget_heads" if found.heads else "")
        raise InputError(
            f"--budget is {share:g}: the smallest budget that this model was trained for takes {lowest:.3f} of its "
            f"{name} ({keys}): {advice}"
        )
    raise InputError(
        f"--budget is {share:g}: with one expert per token in every block this model still takes {lowest:.3f} of its "
        f"{name}, and it was not trained for less (train.budgets): {advice}"
    )


class _Measuring:
    """Scores the tasks under budgets, and counts how many there are to come."""

    def __init__(self, model: MultiTaskModel, split: Split, indices: Sequence[int], progress: Progress | None) -> None:
        self.model, self.split, self.indices, self.progress = model, split, indices, progress
        self.done, self.total, self.full = 0, 1, dict[str, float]()

    def values(self, budget: Budget, words: str) -> dict[str, float]:
        """Return each task's headline metric."""
        predictor = torch_predictor(self.model, 1, budget)
        scores = evaluate(self.split, predictor, PROTOCOL, indices=self.indices, quick=True).scores()
        self.done += 1
        if self.progress:
            self.progress(self.done, self.total, words)
        return {task: scores[task][TASKS[task].headline(quick=True)] for task in self.model.config.tasks}

    def losses(self, budget: Budget, words: str) -> dict[str, float]:
        """Return each task's relative loss."""
        return {task: relative_loss(task, self.full[task], value) for task, value in self.values(budget, words).items()}


def search(
    model: MultiTaskModel,
    split: Split,
    share: float,
    preferences: Mapping[str, float],
    indices: Sequence[int],
    progress: Progress | None = None,
    *,
    train: Asked,
    costs: Costs | None = None,
) -> Found:
    """Return what loses least within `share` (0..1) of the cost, on the images `indices`.

    `preferences` weigh the tasks' losses; edges are scored by the quick metric. `train`: what the run was trained for.
    `costs`: MACs, if nothing else is given. Raises InputError for a model without a choice, and for a share that it
    does not reach.
    """
    config, blocks, found = model.config, model.backbone.moe_indices, searched(model, train)
    if found.single:
        what = "has no experts" if not blocks else "has one expert per token"
        raise InputError(
            f"this model {what}: there is nothing to choose, m3vit search needs top_k 2 or more, or a run trained for "
            "budgets (train.budgets)"
        )
    costs = costs or macs_of(config, found, model.hidden_widths())
    tasks, heads = config.tasks, found.narrow_heads
    every, least = most_and_least(found)
    whole = sum(costs.whole[task] for task in tasks)
    smallest = {block: widths[0] for block, widths in found.widths.items()}
    lowest = sum(_cost(costs, task, blocks, smallest, least[task]) for task in tasks) / whole
    check_share(share, lowest, costs.unit, found, bool(train.budgets))

    alone_of = [(place, count) for place in range(len(blocks)) for count in range(found.fewest, found.top_k)]
    alone_of += [(len(blocks), 0)] if heads else []  # the smallest heads
    narrow = [block for block, widths in found.widths.items() if len(widths) > 1]
    levels, points = (LEVELS + 2 + bool(heads), LEVELS) if narrow else (1, POINTS)
    measuring = _Measuring(model, split, indices, progress)
    widths_alone = sum(len(alone_in(found.widths[block])) for block in narrow)
    measuring.total = 1 + len(alone_of) + widths_alone + REFINED * bool(narrow) + levels * points
    measuring.full = measuring.values(budget_of(every, blocks), "all of it")
    if bare := [task for task, value in measuring.full.items() if not math.isfinite(value) or value == 0]:
        raise InputError(
            f"on {len(indices)} val images {', '.join(bare)} has no figure, or one of 0, to lose from: give more "
            "--images, or train longer"
        )
    alone: dict[str, list[dict[int, float]]] = {task: [{count: 0.0} for count in every[task]] for task in tasks}
    for place, count in alone_of:
        fewer = {
            task: (*counts[:place], count or least[task][place], *counts[place + 1 :])
            for task, counts in every.items()
            if place < len(counts)
        }
        lost = measuring.losses(budget_of({**every, **fewer}, blocks), "each block alone" if count else "heads alone")
        for task, counts in fewer.items():
            measured = {counts[place]: lost[task]}
            alone[task][place] |= measured if count else between(heads[task], measured)
    widths = _levels(found, narrow, costs, preferences, measuring, share * whole) if narrow else [{}]
    measuring.total -= (levels - len(widths)) * points

    ways: list[Together] = []
    for level in widths:
        cost = {task: partial(_cost, costs, task, blocks, level) for task in tasks}
        to_measure = {
            task: sample_front(predicted_front(alone[task], cost[task], every[task]), points) for task in tasks
        }
        rounds = max(map(len, to_measure.values()))
        measuring.total -= points - rounds  # fronts of few points
        fronts = {task: [] if level else [Point(every[task], cost[task](every[task]), 0.0)] for task in tasks}
        for place in range(rounds):
            choice = {task: some[min(place, len(some) - 1)].counts for task, some in to_measure.items()}
            lost = measuring.losses(budget_of(choice, blocks, level), "combinations")
            for task, counts in choice.items():
                fronts[task].append(Point(counts, cost[task](counts), lost[task]))
        ways += [Together(*one, level) for one in best_together(fronts, preferences)]
    # The least of everything is always among them, so that every share promised can be kept to.
    front = unbeaten(ways, lambda one: one[:2])
    chosen = [one for one in front if one.cost <= share * whole * (1 + 1e-9)][-1]  # the front falls: the last is best
    return Found(chosen, chosen.cost / whole, [(one.cost / whole, one) for one in front])


def _cost(costs: Costs, task: str, blocks: Sequence[int], widths: Mapping[int, int], counts: Counts) -> float:
    channels = counts[-1] if len(counts) > len(blocks) else None
    return costs.of(task, dict(zip(blocks, counts, strict=False)), widths, channels)


def _levels(
    found: Space,
    narrow: Sequence[int],
    costs: Costs,
    preferences: Mapping[str, float],
    measuring: _Measuring,
    limit: float,
) -> list[dict[int, int]]:
    """Return a few choices of the width of every block, {} (all units) first, the smallest last, by falling cost.

    The best that was measured within `limit` with all experts and channels, up to `REFINED` of them; and of those
    that are unbeaten in the cost of all tasks and in the loss that is predicted, weighed by the preferences: some
    spread over the range, and the next one above, if it may with fewer; where heads have a choice of channels, also
    the largest that may at all.
    """
    tasks, total = found.tasks, sum(preferences[task] for task in found.tasks)

    def measure(widths: Mapping[int, int], words: str) -> float:
        lost = measuring.losses(Budget(width=widths), words)
        return sum(preferences[task] * lost[task] for task in tasks) / total

    alone = [
        {width: measure({block: width}, "each block's width alone") for width in alone_in(found.widths[block])}
        for block in narrow
    ]

    def cost(widths: Counts) -> float:
        given = dict(zip(narrow, widths, strict=True))
        return sum(costs.of(task, {}, given) for task in tasks)

    def least_cost(widths: Counts) -> float:
        given, (_, fewest) = dict(zip(narrow, widths, strict=True)), most_and_least(found)
        return sum(_cost(costs, task, found.blocks, given, fewest[task]) for task in tasks)

    every = tuple(found.widths[block][-1] for block in narrow)
    least = tuple(found.widths[block][0] for block in narrow)
    choices = [found.widths[block] for block in narrow]
    tried: dict[Counts, float] = {}
    while len(tried) < REFINED and (not tried or min(list(tried.values())[-PATIENCE:]) == min(tried.values())):
        losses = corrected(choices, alone, tried)
        near = [point.counts for point in predicted_front(losses, cost, every)]
        near += neighbours(min(tried, key=lambda one: tried[one]), choices) if tried else []
        lost = {counts: sum(map(dict.__getitem__, losses, counts)) for counts in near if counts not in (every, *tried)}
        best = next((one for one in sorted(lost, key=lambda one: lost[one]) if cost(one) <= limit * (1 + 1e-9)), None)
        if best is None:
            break
        tried[best] = measure(dict(zip(narrow, best, strict=True)), "widths")
    measuring.total -= REFINED - len(tried)
    front = predicted_front(corrected(choices, alone, tried), cost, every)  # by ascending cost
    within = sum(point.cost <= limit * (1 + 1e-9) for point in front)
    may = [point for point in front if least_cost(point.counts) <= limit * (1 + 1e-9)]
    next_to_it = [Point(best, cost(best), lost) for best, lost in tried.items() if lost == min(tried.values())][:1]
    next_to_it += [point for point in front[within : within + 1] if point in may]
    next_to_it += may[-1:] if found.narrow_heads else []
    # All units are among those returned, on the front or not.
    spread = sample_front(front, LEVELS if front[-1].counts == every else LEVELS - 1)
    taken = {point.counts for point in (*spread, *next_to_it)}
    between_them = sorted(taken - {every, least}, key=cost, reverse=True)
    return [{}, *(dict(zip(narrow, counts, strict=True)) for counts in (*between_them, least))]


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


def said(found: Found, share: float, blocks: Sequence[int], costs: Costs, macs: Costs) -> dict[str, Any]:
    """Return what a budget file says of the search, as JSON values."""

    def share_of_macs(one: Together) -> float:
        used = sum(_cost(macs, task, blocks, one.widths, point.counts) for task, point in one.points.items())
        return used / sum(macs.whole[task] for task in one.points)

    chosen = found.chosen
    told: dict[str, Any] = {
        "asked": share,
        "share_of_macs": share_of_macs(chosen),
        "weighted_loss_percent": chosen.loss,
        "blocks": list(blocks),
        "width": {str(block): width for block, width in chosen.widths.items()},
        "tasks": {
            task: {
                "top_k": list(point.counts[: len(blocks)]),
                **({"channels": point.counts[-1]} if len(point.counts) > len(blocks) else {}),
                "macs": _cost(macs, task, blocks, chosen.widths, point.counts),
                "loss_percent": point.loss,
            }
            for task, point in found.points.items()
        },
        "front": [
            {"share_of_macs": share_of_macs(one), "weighted_loss_percent": one.loss, "share": part}
            for part, one in found.front
        ],
    }
    if costs.name != macs.name:
        told["cost"] = {"by": costs.name, "unit": costs.unit, "share": found.share, "total": chosen.cost}
        if (again := costs.share(found.budget(blocks))) is not None:
            told["cost"]["share_measured"] = again
    return told
