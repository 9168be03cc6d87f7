"""Figures of a split's routing, as JSON values: docs/routing.md has each formula and where it is from.

Shapes: S resamples, N images, L blocks with experts, R tasks, P pairs of tasks, E experts, C bins of a task's labels.
"""

from math import comb, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.evaluation.compare import RESAMPLES, bootstrap_weights, interval
from m3vit.evaluation.routing import LabelSums, RoutingSums
from m3vit.kinds.pictures import rounded
from m3vit.tasks import kind_of

DEAD = 0.01  # of an even share of the choices: what a task chooses less often is dead for it
RULE = "patches less than half labelled are left out; the others are of the bin of most of their labelled pixels"
MARKED = "patches less than half labelled are left out; the others are of the last bin if any of their pixels is"
Floats = NDArray[np.float64]


def entropy(share: Floats) -> Floats:
    """Return the entropy of distributions [..., E], in nats."""
    return -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum(axis=-1)


def information(joint_CE: NDArray[Any]) -> tuple[float, float]:
    """Return the mutual information of rows and columns of a table of counts, in bits and as a share of the columns'.

    The share is I / H(column), the uncertainty coefficient (Theil 1970): how much of the column's entropy its row
    explains; 0 where there is one column, NaN for a table of nothing.
    """
    total = joint_CE.sum()
    if total == 0:
        return np.nan, np.nan
    joint = joint_CE / total
    columns = float(entropy(joint.sum(axis=0)))
    shared = max(float(entropy(joint.sum(axis=1))) + columns - float(entropy(joint.ravel())), 0.0)
    return shared / log(2), shared / columns if columns > 0 else 0.0


def even_jaccard(first: int, second: int, experts: int) -> float:
    """Return the expected Jaccard index of two sets of so many experts, each drawn evenly and without the other."""
    ways = comb(experts, second)
    shared = range(max(0, first + second - experts), min(first, second) + 1)
    return sum(
        comb(first, both) * comb(experts - first, second - both) / ways * both / (first + second - both)
        for both in shared
    )


def figures(sums: RoutingSums) -> dict[str, Any]:
    """Return all figures of a split's routing."""
    return {
        "images": len(sums.ids),
        "patches_per_image": sums.grid[0] * sums.grid[1],
        "experts": sums.num_experts,
        "top_k": {
            task: {str(block): int(sums.top_k_LR[layer, place]) for layer, block in enumerate(sums.blocks)}
            for place, task in enumerate(sums.tasks)
        },
        "intervals": f"95 %, bootstrap over images ({RESAMPLES} resamples)",
        "dead_below": DEAD,
        "groups_of": group_size(sums),
        "use": use(sums),
        "apart": apart(sums),
        "labels": {task: _labels(sums, task, found) for task, found in sums.labels.items()},
    }


def use(sums: RoutingSums) -> dict[str, Any]:
    """Return, for each block and task, how the experts are used."""
    patches = len(sums.ids) * sums.grid[0] * sums.grid[1]
    chosen_LRE, first_LRE = sums.chosen_NLRE.sum(axis=0), sums.first_NLRE.sum(axis=0)
    share_LRE = chosen_LRE / (patches * sums.top_k_LR[..., None])
    dead_LRE = share_LRE < DEAD / sums.num_experts
    widest = log(sums.num_experts) or 1.0
    found: dict[str, Any] = {}
    for layer, block in enumerate(sums.blocks):
        tasks = {}
        for place, task in enumerate(sums.tasks):
            at, counts = (layer, place), chosen_LRE[layer, place]
            tasks[task] = {
                "chosen": _numbers(counts / patches),
                "first": _numbers(first_LRE[at] / patches),
                "weight": [
                    rounded(weight / count) if count else None
                    for weight, count in zip(sums.weights_LRE[at], counts, strict=True)
                ],
                "in_groups": {str(size): rounded(counts[at] / patches) for size, counts in sums.whole_LR.items()},
                "weight_of_chosen": rounded(sums.weights_LRE[at].sum() / patches),
                "entropy": rounded(entropy(share_LRE[at]) / widest),
                "gate_entropy": rounded(sums.entropy_LR[at] / patches / widest),
                "dead": np.flatnonzero(dead_LRE[at]).tolist(),
            }
        found[str(block)] = {"tasks": tasks, "dead_for_all": np.flatnonzero(dead_LRE[layer].all(axis=0)).tolist()}
    return found


def apart(sums: RoutingSums) -> dict[str, Any]:
    """Return how far the tasks' choices are apart: of each block and pair of tasks, and of all."""
    pairs, count = sums.pair_ids, len(sums.ids)
    if not pairs:
        return {}
    patches, experts = sums.grid[0] * sums.grid[1], sums.num_experts
    weights_SN = np.concatenate([np.ones((1, count)), bootstrap_weights(count)])  # the first is the split itself
    chosen_SLRE = np.tensordot(weights_SN, sums.chosen_NLRE, 1) / (count * patches)
    first_SLRE = np.tensordot(weights_SN, sums.first_NLRE, 1) / (count * patches)
    shared_SLP = np.tensordot(weights_SN, sums.pairs.shared, 1) / (count * patches)
    a, b = (list(places) for places in zip(*pairs, strict=True))
    top_a, top_b = sums.top_k_LR[:, a], sums.top_k_LR[:, b]
    own_use_SLP = (chosen_SLRE[:, :, a] * chosen_SLRE[:, :, b]).sum(axis=-1) / np.minimum(top_a, top_b)
    even_LP = np.maximum(top_a, top_b) / experts
    use_SLRE = chosen_SLRE / sums.top_k_LR[..., None]
    similar_SLP = np.minimum(use_SLRE[:, :, a], use_SLRE[:, :, b]).sum(axis=-1)
    cosine_LP = _cosine(use_SLRE[0][:, a], use_SLRE[0][:, b])
    # I(task; expert), each task as often as the others, as a share of the entropy of tasks.
    tasks_SL = (entropy(use_SLRE.mean(axis=2)) - entropy(use_SLRE).mean(axis=2)) / log(len(sums.tasks))
    even_jaccard_LP = np.vectorize(lambda one, other: even_jaccard(one, other, experts))(top_a, top_b)
    jaccard_LP, same_first_LP = (part.mean(axis=0) / patches for part in (sums.pairs.jaccard, sums.pairs.same_first))
    first_own_LP = (first_SLRE[0][:, a] * first_SLRE[0][:, b]).sum(axis=-1)
    elsewhere_LP, jaccard_elsewhere_LP = (
        part.mean(axis=0) / patches if len(part) else np.full(even_LP.shape, np.nan)
        for part in (sums.pairs.shared_elsewhere, sums.pairs.jaccard_elsewhere)
    )

    renamed_SLP = _renamed(sums) / (count * patches * np.minimum(top_a, top_b))

    def summary(
        shared_S: Floats, even: float, renamed_S: Floats, own_use_S: Floats, similar_S: Floats, tasks_S: Floats
    ) -> dict[str, Any]:
        low, high = interval(renamed_S)
        return {
            "shared": _with_interval(shared_S),
            "shared_evenly": rounded(even),
            "shared_renamed": {"value": rounded(renamed_S.mean()), "interval": [rounded(low), rounded(high)]},
            "shared_by_use": _with_interval(own_use_S),
            "beyond_use": _with_interval(shared_S - own_use_S),
            "similarity_of_use": _with_interval(similar_S),
            "information": _with_interval(tasks_S),
            "verdict": "apart" if shared_S[0] < low else "together" if shared_S[0] > high else "as by chance",
        }

    blocks = {}
    for layer, block in enumerate(sums.blocks):
        rows = []
        for pair, places in enumerate(pairs):
            at = (layer, pair)
            rows.append(
                {
                    "tasks": [sums.tasks[place] for place in places],
                    "shared": _with_interval(shared_SLP[:, layer, pair]),
                    "shared_evenly": rounded(even_LP[at]),
                    "shared_by_use": rounded(own_use_SLP[0, layer, pair]),
                    "shared_elsewhere": rounded(elsewhere_LP[at]),
                    "jaccard": rounded(jaccard_LP[at]),
                    "jaccard_evenly": rounded(even_jaccard_LP[at]),
                    "jaccard_elsewhere": rounded(jaccard_elsewhere_LP[at]),
                    "same_first": rounded(same_first_LP[at]),
                    "same_first_by_use": rounded(first_own_LP[at]),
                    "similarity_of_use": _with_interval(similar_SLP[:, layer, pair]),
                    "cosine_of_use": rounded(cosine_LP[at]),
                }
            )
        of_all = summary(
            shared_SLP[:, layer].mean(axis=-1),
            float(even_LP[layer].mean()),
            renamed_SLP[:, layer].mean(axis=-1),
            own_use_SLP[:, layer].mean(axis=-1),
            similar_SLP[:, layer].mean(axis=-1),
            tasks_SL[:, layer],
        )
        blocks[str(block)] = {"pairs": rows, "all": of_all}
    everything = summary(
        shared_SLP.mean(axis=(1, 2)),
        float(even_LP.mean()),
        renamed_SLP.mean(axis=(1, 2)),
        own_use_SLP.mean(axis=(1, 2)),
        similar_SLP.mean(axis=(1, 2)),
        tasks_SL.mean(axis=1),
    )
    return {"blocks": blocks, "all": everything}


def group_size(sums: RoutingSums) -> int:
    """Return how many neighbouring experts most patches choose all together or not at all; 1: they choose singly.

    Up-cycled experts begin so, as the parts of one MLP (m3vit/models/upcycling.py).
    """
    patches = len(sums.ids) * sums.grid[0] * sums.grid[1]
    return max((size for size, counts in sums.whole_LR.items() if counts.mean() > patches / 2), default=1)


def _renamed(sums: RoutingSums) -> Floats:
    """Return the experts that pairs of tasks would share [S, L, P], in all, had each task's experts other names.

    A permutation for each task and block: what one task does stays as it is, and which expert of another stands beside
    it is chance. Gates that never saw one another differ so.
    """
    experts = sums.num_experts
    names = np.tile(np.arange(experts), (RESAMPLES, len(sums.blocks), len(sums.tasks), 1))
    names_SLRE = np.random.default_rng(0).permuted(names, axis=-1)
    found = np.zeros((RESAMPLES, len(sums.blocks), len(sums.pair_ids)))
    for layer in range(len(sums.blocks)):
        for pair, (a, b) in enumerate(sums.pair_ids):
            both_EE = sums.pairs.both_LPEE[layer, pair]
            found[:, layer, pair] = both_EE[names_SLRE[:, layer, a], names_SLRE[:, layer, b]].sum(axis=-1)
    return found


def _labels(sums: RoutingSums, labelled: str, found: LabelSums) -> dict[str, Any]:
    """Return which experts the patches of each bin of the labels of a task chose, of each block and task."""
    rule = MARKED if kind_of(labelled).last_bin_marks else RULE
    blocks: dict[str, Any] = {}
    for layer, block in enumerate(sums.blocks):
        tasks = {}
        for place, task in enumerate(sums.tasks):
            counts_CE = found.chosen_LRCE[layer, place].astype(np.float64)
            share_CE = counts_CE / np.maximum(counts_CE.sum(axis=1, keepdims=True), 1)
            marginal_E = counts_CE.sum(axis=0) / max(counts_CE.sum(), 1)
            lift_CE = share_CE / np.where(marginal_E > 0, marginal_E, np.nan)
            bits, part = information(counts_CE)
            tasks[task] = {
                "information_bits": rounded(bits),
                "information": rounded(part),
                "information_of_first": rounded(information(found.first_LRCE[layer, place])[1]),
                "information_elsewhere": rounded(information(found.elsewhere_LRCE[layer, place])[1]),
                "share": [
                    _numbers(row) if total else None for row, total in zip(share_CE, found.patches_C, strict=True)
                ],
                "lift": [_numbers(row) if total else None for row, total in zip(lift_CE, found.patches_C, strict=True)],
            }
        blocks[str(block)] = tasks
    return {"bins": list(found.names), "patches": found.patches_C.tolist(), "rule": rule, "blocks": blocks}


def _cosine(first: Floats, second: Floats) -> Floats:
    return (first * second).sum(axis=-1) / (np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1))


def _numbers(values: NDArray[Any]) -> list[float | None]:
    return [rounded(value) for value in values]


def _with_interval(values_S: Floats) -> dict[str, Any]:
    """Return the first value, and the interval of the others."""
    return {"value": rounded(values_S[0]), "interval": [rounded(value) for value in interval(values_S[1:])]}
