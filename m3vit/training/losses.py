"""Losses of tasks: those of their kinds (m3vit.kinds; M3ViT's code: losses/loss_functions.py).

Pixels that are not labelled carry no weight and no gradient. Labels are those of m3vit.data.augment.to_labels, batched.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from m3vit.collectives import total
from m3vit.errors import InputError
from m3vit.losses import loss_named
from m3vit.tasks import TASKS, kind_of
from m3vit.training.config import TrainConfig


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
            counts = torch.stack([kind_of(task).counts(part) for part in parts])
            self.found[task, size] = list(total(counts))
        return self.found[task, size]

    def labelled(self) -> set[str]:
        """Return the tasks that at least one pixel of the batch is labelled for."""
        counts = torch.stack([kind_of(task).valid(label).sum() for task, label in self.labels.items()])
        return {task for task, count in zip(self.labels, total(counts).tolist(), strict=True) if count}


def task_loss(
    task: str,
    logits: Tensor,
    label: Tensor,
    options: Mapping[str, float],
    counts: BatchCounts | None = None,
    named: str = "",
) -> Tensor:
    """Return the unweighted loss of a task; labels are subsampled if the logits are coarser.

    `options`: of its kind's loss (`loss_options`). With `counts`, the contribution of these images to the loss of the
    batch counted there. `named`: a loss of m3vit.losses that takes the place of the kind's.
    """
    kind, size = kind_of(task), (logits.shape[-2], logits.shape[-1])
    parts = subsample(label, size)
    of_batch = counts.of(task, size) if counts else [kind.counts(part) for part in parts]
    if named:
        loss, pairs = loss_named(named), zip(parts, of_batch, strict=True)
        return torch.stack([loss(logits, one, kind.valid(one), n[0].clamp(min=1)) for one, n in pairs]).mean()
    losses = [kind.loss(logits, part, count, **options) for part, count in zip(parts, of_batch, strict=True)]
    return torch.stack(losses).mean()


def loss_options(task: str, train: TrainConfig) -> dict[str, float]:
    """Return the options of a task's loss, as the task table and the settings have them."""
    given = TASKS[task].loss_options
    for name, value in given.items():
        if isinstance(value, str) and not hasattr(train, value):
            raise InputError(
                f"task {task}: its loss option {name} is to be train.{value}, and there is no such setting"
            )
    return {name: getattr(train, value) if isinstance(value, str) else value for name, value in given.items()}
