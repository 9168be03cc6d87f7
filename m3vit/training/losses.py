"""Losses, one per task (M3ViT's code: losses/loss_functions.py). Ignored pixels carry no weight and no gradient.

Shapes: B images, C channels; labels as m3vit.data.augment.to_labels gives them, batched.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3vit.collectives import total
from m3vit.models.router import Routing
from m3vit.tasks import IGNORE, TASKS
from m3vit.training.routing_losses import (
    RoutingSums,
    importance_loss,
    load_loss,
    mutual_information,
    routing_sums,
    switch_loss,
    z_loss,
)


def subsample(label: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Take the label [B, (3,) H, W] at the centres of a coarser grid `size`, once or twice.

    A whole odd factor has a pixel at each centre. An even one has its centre between pixels: the two on the diagonal
    around it are taken, so that training on both is not half a pixel off.
    """
    height, width = label.shape[-2:]
    if (height, width) == tuple(size):
        return [label]
    if height % size[0] or width % size[1]:
        raise ValueError(f"a label of {height}x{width} cannot be subsampled to {size}: not a whole factor")
    down, across = height // size[0], width // size[1]
    first = label[..., (down - 1) // 2 :: down, (across - 1) // 2 :: across]
    if down % 2 and across % 2:
        return [first]
    return [first, label[..., down // 2 :: down, across // 2 :: across]]


def valid_pixels(loss: str, label: Tensor) -> Tensor:
    """Return which pixels [B, H, W] of a label a loss looks at."""
    if loss == "l1":
        return label > 0
    return label.abs().sum(dim=1) > 0 if loss == "l1_unit" else label != IGNORE


def pixel_counts(loss: str, label: Tensor) -> Tensor:
    """Return how many pixels of a label are valid, and how many of these positive, int64 [2]: what losses divide by."""
    valid = valid_pixels(loss, label)
    positive = valid & (label > 0) if loss == "balanced_bce" else torch.zeros_like(valid)
    return torch.stack([valid.sum(), positive.sum()])


class BatchCounts:
    """Pixel counts of a whole batch: over the parts it is worked through in, and over all processes.

    A loss is a mean over the valid pixels of the whole batch. Each part of the batch contributes its own sum divided by
    the count of the whole, so that the parts' losses and gradients add up to those of the whole.
    """

    def __init__(self, labels: dict[str, Tensor]) -> None:
        self.labels = labels  # this process's
        self.found: dict[tuple[str, tuple[int, int]], list[Tensor]] = {}

    def of(self, task: str, size: tuple[int, int]) -> list[Tensor]:
        """Return the counts of a task's label, one for each label that `subsample` makes of it at this size."""
        if (task, size) not in self.found:
            parts = subsample(self.labels[task], size)
            counts = torch.stack([pixel_counts(TASKS[task].loss, part) for part in parts])
            self.found[task, size] = list(total(counts))
        return self.found[task, size]

    def labelled(self) -> set[str]:
        """Return the tasks that at least one pixel of the batch is labelled for."""
        counts = torch.stack([valid_pixels(TASKS[task].loss, label).sum() for task, label in self.labels.items()])
        return {task for task, count in zip(self.labels, total(counts).tolist(), strict=True) if count}


def cross_entropy(logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean over labelled pixels of the cross-entropy of [B, C, H, W] with ids [B, H, W]."""
    counts = pixel_counts("cross_entropy", label) if counts is None else counts
    return F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum") / counts[0].clamp(min=1)


def l1(logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean absolute error over the valid pixels (label > 0) of depth [B, 1, H, W] with [B, H, W]."""
    counts = pixel_counts("l1", label) if counts is None else counts
    return ((logits[:, 0] - label).abs() * valid_pixels("l1", label)).sum() / counts[0].clamp(min=1)


def l1_unit(logits: Tensor, label: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean absolute error of the normalised prediction [B, 3, H, W], over valid pixels and components."""
    counts = pixel_counts("l1_unit", label) if counts is None else counts
    error = (F.normalize(logits, dim=1) - label).abs() * valid_pixels("l1_unit", label)[:, None]
    return error.sum() / (3 * counts[0]).clamp(min=1)


def balanced_bce(
    logits: Tensor, label: Tensor, positive_weight: float | Tensor | None, counts: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy with weights: `positive_weight` for positives, 1 - positive_weight for the rest.

    None balances as HED does: the share of negatives among the batch's valid pixels (saliency).
    """
    counts = pixel_counts("balanced_bce", label) if counts is None else counts
    valid, truth = label != IGNORE, (label > 0).to(logits.dtype)
    if positive_weight is None:
        positive_weight = 1 - counts[1] / counts[0].clamp(min=1)
    weight = valid * (positive_weight * truth + (1 - positive_weight) * (1 - truth))
    loss = F.binary_cross_entropy_with_logits(logits[:, 0], truth, weight=weight, reduction="sum")
    return loss / counts[0].clamp(min=1)


def task_loss(
    task: str, logits: Tensor, label: Tensor, edge_positive_weight: float, counts: BatchCounts | None = None
) -> Tensor:
    """Return the unweighted loss of a task; labels are subsampled if the logits are coarser.

    With `counts`, the contribution of these images to the loss of the batch counted there.
    """
    positive_weight = edge_positive_weight if task == "edge" else None
    loss = {"cross_entropy": cross_entropy, "l1": l1, "l1_unit": l1_unit}.get(TASKS[task].loss)
    size = (logits.shape[-2], logits.shape[-1])
    parts = subsample(label, size)
    losses = [
        loss(logits, part, count) if loss else balanced_bce(logits, part, positive_weight, count)
        for part, count in zip(parts, counts.of(task, size) if counts else [None] * len(parts), strict=True)
    ]
    return torch.stack(losses).mean()


class RoutingLoss(NamedTuple):
    """A loss of one MoE layer's routing, and the fields of RoutingSums it is computed from."""

    of: Callable[[RoutingSums], Tensor]
    fields: tuple[str, ...]
    mean: bool = False  # over tasks; the others are sums over tasks


# By the names of `TrainConfig.routing_weights`. balance is summed over tasks (M3ViT weighs it 0.01).
ROUTING_LOSSES = {
    "balance": RoutingLoss(lambda sums: importance_loss(sums) + load_loss(sums), ("weights_RE", "load_RE")),
    "switch": RoutingLoss(switch_loss, ("chosen_RE", "scores_RE")),
    "z": RoutingLoss(z_loss, ("squares_R",), mean=True),
    "specialise": RoutingLoss(lambda sums: -mutual_information(sums), ("scores_RE",), mean=True),
}


def sums_for(routings: Iterable[Routing], losses: Iterable[str]) -> list[RoutingSums]:
    """Return what the routing losses of these names need of each layer's routing, and no more."""
    fields = {field for name in losses for field in ROUTING_LOSSES[name].fields}
    return [routing_sums(routing, sorted(fields)) for routing in routings]


def routing_losses(layers: Sequence[RoutingSums], losses: Iterable[str], share: float = 1.0) -> dict[str, Tensor]:
    """Return the unweighted routing losses of these names, each summed over the MoE layers (one or more).

    `share`: of the model's tasks that these layers ran, for losses that are means over tasks. What several passes
    return, for different tasks, then adds up to the loss of all tasks.
    """
    found = {name: torch.stack([ROUTING_LOSSES[name].of(sums) for sums in layers]).sum() for name in losses}
    return {name: loss * share if ROUTING_LOSSES[name].mean else loss for name, loss in found.items()}
