"""Losses, one per task (M3ViT's code: losses/loss_functions.py). Ignored pixels carry no weight and no gradient.

Shapes: B images, C channels; labels as m3vit.data.transforms.to_labels gives them, batched.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from m3vit.models.router import Routing, importance_loss, load_loss, mutual_information, switch_loss, z_loss
from m3vit.tasks import IGNORE, TASKS


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


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean over labelled pixels of the cross-entropy of [B, C, H, W] with ids [B, H, W]."""
    total = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    return total / (label != IGNORE).sum().clamp(min=1)


def l1(logits: Tensor, label: Tensor) -> Tensor:
    """Mean absolute error over the valid pixels (label > 0) of depth [B, 1, H, W] with [B, H, W]."""
    valid = label > 0
    return ((logits[:, 0] - label).abs() * valid).sum() / valid.sum().clamp(min=1)


def l1_unit(logits: Tensor, label: Tensor) -> Tensor:
    """Mean absolute error of the normalised prediction [B, 3, H, W], over valid pixels and components."""
    valid = (label.abs().sum(dim=1, keepdim=True) > 0).to(logits.dtype)
    error = (F.normalize(logits, dim=1) - label).abs() * valid
    return error.sum() / (3 * valid.sum()).clamp(min=1)


def balanced_bce(logits: Tensor, label: Tensor, positive_weight: float | Tensor | None) -> Tensor:
    """Binary cross-entropy with weights: `positive_weight` for positives, 1 - positive_weight for the rest.

    None balances as HED does: the share of negatives among the batch's valid pixels (saliency).
    """
    valid = label != IGNORE
    truth = (label > 0).to(logits.dtype)
    if positive_weight is None:
        positive_weight = 1 - (truth * valid).sum() / valid.sum().clamp(min=1)
    weight = valid * (positive_weight * truth + (1 - positive_weight) * (1 - truth))
    total = F.binary_cross_entropy_with_logits(logits[:, 0], truth, weight=weight, reduction="sum")
    return total / valid.sum().clamp(min=1)


def task_loss(task: str, logits: Tensor, label: Tensor, edge_positive_weight: float) -> Tensor:
    """Return the unweighted loss of a task; labels are subsampled if the logits are coarser."""
    positive_weight = edge_positive_weight if task == "edge" else None
    loss = {"cross_entropy": cross_entropy, "l1": l1, "l1_unit": l1_unit}.get(TASKS[task].loss)
    losses = [
        loss(logits, part) if loss else balanced_bce(logits, part, positive_weight)
        for part in subsample(label, (logits.shape[-2], logits.shape[-1]))
    ]
    return torch.stack(losses).mean()


def routing_losses(routings: list[Routing], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the unweighted routing losses that have a weight, each summed over the MoE layers.

    balance: importance + load, summed over tasks too (M3ViT weighs it 0.01); switch; z; specialise: minus the mutual
    information of tasks and experts.
    """
    kinds: dict[str, Callable[[Routing], Tensor]] = {
        "balance": lambda routing: importance_loss(routing) + load_loss(routing),
        "switch": switch_loss,
        "z": z_loss,
        "specialise": lambda routing: -mutual_information(routing),
    }
    return {
        name: torch.stack([kinds[name](routing) for routing in routings]).sum()
        for name, weight in weights.items()
        if weight and routings
    }
