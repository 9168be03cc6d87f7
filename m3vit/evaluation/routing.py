"""Which experts the tasks of a run use on a split: sums over patches, image by image; no token is kept.

m3vit/evaluation/routing_figures.py makes figures of them, and docs/routing.md says what these mean.

Shapes: N images, L blocks with experts, R tasks, P pairs of tasks, T patches of an image, K experts per
token, E experts, C bins of a task's labels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from m3vit.data.sample import Split
from m3vit.errors import InputError
from m3vit.evaluation.evaluate import normalised
from m3vit.evaluation.protocols import network_image
from m3vit.heap import trim
from m3vit.kinds.kind import IGNORE, Kind
from m3vit.label_sets import LABEL_SETS
from m3vit.models.budget import FULL, Budget
from m3vit.models.multitask import MultiTaskModel
from m3vit.tasks import TASKS, kind_of

TRIM_EVERY = 16  # batches: labels of megabytes come and go between sums that stay
PROTOCOL = "A"  # how images enter the network: resized, so that every patch shows a part of the image
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Choices(NamedTuple):
    """What the routers chose for the patches of one image; prefix tokens are left out."""

    chosen_LRTE: NDArray[np.bool_]
    first_LRT: Ints  # the expert of the largest weight
    weights_LRTE: NDArray[np.float32]  # of the chosen experts, 0 of others
    entropy_LRT: NDArray[np.float32]  # of the scores over all experts, nats


@dataclass
class LabelSums:
    """Of one task's labels: the patches of each bin, and how often they chose each expert.

    `elsewhere`: the same choices, under the bins that another image has in the same places.
    """

    names: tuple[str, ...]
    patches_C: Ints
    chosen_LRCE: Ints
    first_LRCE: Ints
    elsewhere_LRCE: Ints


@dataclass
class PairSums:
    """Of two tasks, for each image, sums over its patches [N, L, P].

    shared: experts that both chose, as a share of those of the task that chooses fewer. jaccard: as a share of those
    that either chose. same_first: patches with the same first expert. elsewhere: `shared` and `jaccard` of the first
    task's choices with those of the second in the same place of another image; one image fewer.
    """

    shared: Floats
    jaccard: Floats
    same_first: Floats
    shared_elsewhere: Floats
    jaccard_elsewhere: Floats
    both_LPEE: Ints  # patches of all images that chose one expert for the first task and another for the second


@dataclass
class RoutingSums:
    """What is kept of the routing of a split."""

    tasks: tuple[str, ...]
    blocks: tuple[int, ...]
    num_experts: int
    top_k_LR: Ints
    grid: tuple[int, int]
    ids: list[str]
    chosen_NLRE: Ints  # patches of each image that chose an expert
    first_NLRE: Ints
    weights_LRE: Floats  # summed over the patches that chose it
    entropy_LR: Floats  # summed over patches, nats
    pairs: PairSums
    whole_LR: dict[int, Ints]  # by size: patches whose experts are whole groups of so many neighbours
    labels: dict[str, LabelSums] = field(default_factory=dict)

    @property
    def pair_ids(self) -> list[tuple[int, int]]:
        """The pairs of tasks, by their places."""
        return list(combinations(range(len(self.tasks)), 2))


def spread(indices: list[int], number: int) -> list[int]:
    """Return up to `number` of the indices, evenly spread."""
    return [indices[i] for i in np.linspace(0, len(indices) - 1, min(number, len(indices))).round().astype(int)]


def check_routed(model: MultiTaskModel, folder: object) -> None:
    """Raise InputError for a model without experts."""
    if not model.backbone.moe_indices:
        raise InputError(f"{folder} has no blocks with experts (model.moe_blocks): there is no routing to look at")


@torch.inference_mode()
def choices(model: MultiTaskModel, images: Sequence[NDArray[np.uint8]], budget: Budget = FULL) -> list[Choices]:
    """Return what the routers choose for RGB images uint8 [h, w, 3], for all tasks of the model; no head is run.

    Images are resized as under protocol A. `budget`: as the forward pass takes it.
    """
    model.eval()
    height, width = model.config.image_size
    placed = [network_image(PROTOCOL, "", image, (height, width)) for image in images]
    batch = normalised(placed, model.normalisation).to(next(model.parameters()).device)
    tasks, (rows, columns) = model.config.tasks, model.backbone.grid(batch)
    _, routings = model.backbone(batch, tuple(range(len(tasks))), (), model.uses(budget, tasks))
    parts = []
    for routing in routings:
        ids, scores = routing.expert_ids_RNK, routing.scores_RNE
        used = torch.ones_like(ids, dtype=torch.bool)
        if routing.used_RK is not None:
            used &= routing.used_RK[:, None]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids, used)
        entropy = torch.special.entr(scores).sum(dim=-1)
        whole = (chosen, ids[..., 0], scores * chosen, entropy)
        parts.append(
            [part.unflatten(1, (len(images), -1))[:, :, -rows * columns :].cpu().numpy() for part in whole]
        )  # without prefix tokens
    layers = [np.stack(layer) for layer in zip(*parts, strict=True)]  # [L, R, B, T, ...] of each
    return [Choices(*(layer[:, :, place] for layer in layers)) for place in range(len(images))]


def patch_bins(kind: Kind, label: NDArray, grid: tuple[int, int], count: int) -> NDArray[np.uint8]:
    """Return the bin [T] of each patch of a label [h, w, ...] with `count` bins, IGNORE of patches that have none.

    A pixel belongs to the patch that its centre falls into. A patch has the bin of most of its labelled pixels, of
    equally many the first one, or the last bin where the kind says that one pixel marks it; less than half labelled, it
    has none.
    """
    (height, width), (rows, columns) = label.shape[:2], grid
    down = (2 * np.arange(height) + 1) * rows // (2 * height)
    across = (2 * np.arange(width) + 1) * columns // (2 * width)
    places = down[:, None] * columns + across
    ids = kind.binned(label).astype(np.int64)
    pixels = np.bincount((256 * places + ids).ravel(), minlength=256 * rows * columns).reshape(-1, 256)
    labelled = pixels[:, :count]
    found = labelled.argmax(axis=1)
    if kind.last_bin_marks:
        found[labelled[:, -1] > 0] = count - 1
    found[2 * labelled.sum(axis=1) < np.maximum(pixels.sum(axis=1), 1)] = IGNORE
    return found.astype(np.uint8)


def gather(
    model: MultiTaskModel,
    split: Split,
    indices: Sequence[int],
    *,
    budget: Budget = FULL,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> RoutingSums:
    """Return the sums over the images `indices` of a split, with the labels of the split's tasks.

    Images come in a random order (of a fixed seed): what is compared with another image is compared with the one
    before, and neighbours in a split are often of one room.
    """
    order = np.random.default_rng(0).permutation(np.asarray(indices))
    tasks, blocks, experts = tuple(model.config.tasks), model.backbone.moe_indices, model.config.num_experts
    names = {task: kind_of(task).bins(TASKS[task], LABEL_SETS[split.label_set].classes.get(task, ())) for task in tasks}
    names = {task: found for task, found in names.items() if found}
    layers = [model.backbone.trunk.blocks[block].mlp for block in blocks]
    top_k = np.array(
        [
            [layer.use(budget.layer(task, block)).top_k for task in tasks]
            for block, layer in zip(blocks, layers, strict=True)
        ]
    )
    grid = model.backbone.grid(torch.empty(1, 3, *model.config.image_size))
    shape = (len(blocks), len(tasks))
    labels = {
        task: LabelSums(
            found,
            np.zeros(len(found), np.int64),
            *(np.zeros((*shape, len(found), experts), np.int64) for _ in range(3)),
        )
        for task, found in names.items()
    }
    ids: list[str] = []
    chosen, first, pairs = [], [], []
    weights, entropy = np.zeros((*shape, experts)), np.zeros(shape)
    divisor = math.gcd(experts, *top_k.flat)
    whole = {size: np.zeros(shape, np.int64) for size in range(2, divisor + 1) if divisor % size == 0}
    both = np.zeros((len(blocks), len(tasks) * (len(tasks) - 1) // 2, experts, experts), np.int64)
    before: tuple[Choices, dict[str, NDArray[np.uint8]]] | None = None
    for start in range(0, len(order), batch):
        samples = [split.load(int(index)) for index in order[start : start + batch]]
        for sample, one in zip(samples, choices(model, [sample.image for sample in samples], budget), strict=True):
            bins = {task: patch_bins(kind_of(task), sample.labels[task], grid, len(names[task])) for task in names}
            ids.append(sample.id)
            chosen.append(one.chosen_LRTE.sum(axis=2))
            first.append(_one_hot(one.first_LRT, experts).sum(axis=2, dtype=np.int64))
            weights += one.weights_LRTE.sum(axis=2, dtype=np.float64)
            entropy += one.entropy_LRT.sum(axis=2, dtype=np.float64)
            for size, counts in whole.items():
                grouped = one.chosen_LRTE.reshape(*one.first_LRT.shape, experts // size, size)
                counts += (grouped.all(axis=-1) == grouped.any(axis=-1)).all(axis=-1).sum(axis=-1)
            pairs.append(_compare(one, before and before[0], top_k))
            for pair, (a, b) in enumerate(combinations(range(len(tasks)), 2)):
                first_LTE, second_LTE = (one.chosen_LRTE[:, task].astype(np.float32) for task in (a, b))
                both[:, pair] += (first_LTE.swapaxes(1, 2) @ second_LTE).astype(np.int64)
            for task, sums in labels.items():
                _add_labels(sums, one, bins[task], before and before[1][task])
            before = one, bins
        if start // batch % TRIM_EVERY == 0:
            trim()
        if progress:
            progress(len(ids), len(order))
    shared, jaccard, same_first = (np.stack([pair[place] for pair in pairs]) for place in range(3))
    shared_elsewhere, jaccard_elsewhere = (
        np.array([pair[place] for pair in pairs[1:]]).reshape(len(pairs) - 1, *shared.shape[1:]) for place in (3, 4)
    )
    compared = PairSums(shared, jaccard, same_first, shared_elsewhere, jaccard_elsewhere, both)
    return RoutingSums(
        tasks, tuple(blocks), experts, top_k, grid, ids, np.stack(chosen), np.stack(first), weights, entropy,
        compared, whole, labels,
    )  # fmt: skip


def _one_hot(ids: NDArray[Any], count: int) -> NDArray[np.bool_]:
    return ids[..., None] == np.arange(count)


def _compare(one: Choices, other: Choices | None, top_k_LR: Ints) -> tuple[Floats, ...]:
    """Return what `PairSums` has of an image [L, P] each, `elsewhere` with the `other` image, if there is one."""
    found: list[list[Floats]] = [[], [], [], [], []]
    for a, b in combinations(range(top_k_LR.shape[1]), 2):
        fewer, all_of_both = np.minimum(top_k_LR[:, a], top_k_LR[:, b]), top_k_LR[:, a] + top_k_LR[:, b]
        for place, second in ((0, one), (3, other)):
            if second is not None:
                both_LT = (one.chosen_LRTE[:, a] & second.chosen_LRTE[:, b]).sum(axis=-1)
                found[place].append(both_LT.sum(axis=-1) / fewer)
                found[place + 1].append((both_LT / (all_of_both[:, None] - both_LT)).sum(axis=-1))
        found[2].append((one.first_LRT[:, a] == one.first_LRT[:, b]).sum(axis=-1).astype(np.float64))
    return tuple(np.stack(part, axis=-1) if part else np.zeros((len(top_k_LR), 0)) for part in found)


def _add_labels(sums: LabelSums, one: Choices, bins_T: NDArray[np.uint8], other_T: NDArray[np.uint8] | None) -> None:
    """Add an image's choices under its own bins, and under those of another image."""
    count = len(sums.names)
    chosen = one.chosen_LRTE.astype(np.float32)  # sums of fewer than 2^24 ones are exact
    first = _one_hot(one.first_LRT, chosen.shape[-1]).astype(np.float32)
    bins_CT = _one_hot(bins_T, count).T.astype(np.float32)
    sums.patches_C += bins_CT.sum(axis=1).astype(np.int64)
    sums.chosen_LRCE += (bins_CT @ chosen).astype(np.int64)
    sums.first_LRCE += (bins_CT @ first).astype(np.int64)
    if other_T is not None:
        sums.elsewhere_LRCE += (_one_hot(other_T, count).T.astype(np.float32) @ chosen).astype(np.int64)
