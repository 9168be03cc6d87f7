"""One checkpoint for many budgets: which budgets a step runs, and what the smaller ones learn of the whole model.

After Efficient Controllable Multi-Task Architectures (arXiv 2308.11744): the largest, the smallest and random
configurations are trained together, and the smaller ones' encoders learn the representation of the largest, which
should not depend on the configuration. Here the encoder's share is the hidden width of its MLPs and experts, the same
for all tasks, and a task's own share is how many experts its tokens go to. The distances are ours.

Shapes: R tasks, B images, T tokens, D embedding dimension, E experts, H hidden units, C channels of h x w outputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.models.budget import FULL, Budget
from m3vit.models.multitask import MultiTaskModel, Output
from m3vit.models.space import Asked, Space, require_trained, space_of
from m3vit.profiling import count_macs, total_macs
from m3vit.tasks import kind_of
from m3vit.training.config import TrainConfig

if TYPE_CHECKING:
    from m3vit.run_folder import Run


def space(model: MultiTaskModel, asked: Asked) -> Space:
    """Return the budgets that a model is trained for, by `train`'s keys, or raise InputError if they are one."""
    found = space_of(model, asked)
    if found.single:
        raise InputError(
            f"train.budgets is {asked.budgets}, but the smallest budget is the whole model: give a train.budget_width "
            "below 1, a train.budget_top_k below model.top_k, a train.budget_skip, or with pup heads a "
            "train.budget_heads below 1"
        )
    return found


def first_step(train: TrainConfig, steps: int) -> int:
    """Return the first of `steps` that has passes of smaller budgets; those before train the whole model alone."""
    return int(train.budget_start * steps) if train.budgets else 0


def of_step(train: TrainConfig, found: Space | None, step: int, start: int = 0) -> list[Budget]:
    """Return the budgets of a step's passes, the whole model first: the same in every process, and when resumed.

    `start`: the first step that has smaller ones.
    """
    if found is None or step < start:
        return [FULL]
    rng = np.random.default_rng([6, train.seed, step])
    if train.budgets == 1:
        return [FULL, found.random(rng) if step % 2 else found.smallest]
    return [FULL, found.smallest, *(found.random(rng) for _ in range(train.budgets - 1))]


def pass_shares(train: TrainConfig, passes: int) -> list[float]:
    """Return what part of a step's loss each of its passes is, the whole model's first: they add up to 1.

    A smaller budget's pass weighs train.budget_weight where the whole model's weighs 1.
    """
    weights = [1.0] + [train.budget_weight] * (passes - 1)
    return [weight / sum(weights) for weight in weights]


def step_macs(model: MultiTaskModel, train: TrainConfig, steps: int = 8) -> float:
    """Return how many times the MACs of a plain step, what only trains included, a step with smaller budgets takes.

    model: of shapes (`meta_model`). The mean over the budgets of the first `steps`, of forward passes.
    """
    tasks, found = model.config.tasks, space(model, train)
    plain = sum(count_macs(model, tasks, training=True).values())
    smaller = [budget for step in range(steps) for budget in of_step(train, found, step)[1:]]
    return 1 + sum(total_macs(model, tasks, budget) for budget in smaller) / steps / plain


def training_macs(train: TrainConfig, of_a_step: float) -> float:
    """Return how many times the MACs of a plain training one for budgets takes, whose steps take `step_macs`."""
    return 1 + (1 - train.budget_start) * (of_a_step - 1)


def distances_count(train: TrainConfig, step: int, steps: int, start: int = 0) -> float:
    """Return how much of their weights the distances have at step number `step` of `steps`: it rises from 0 to 1.

    `start`: the first step that has distances, 0 of their weights.
    """
    rising = train.budget_warmup * (steps - start)
    return min(1.0, max(step - start, 0) / rising) if rising else 1.0


def require_begun(run: "Run") -> None:
    """Raise InputError for a run that was to be trained for budgets, and ended before it was (train.budget_start)."""
    if not run.info.get("budgets_begun", True):
        start = run.config.train.budget_start
        raise InputError(
            f"{run.folder} ended after {run.info['epochs_trained']} epochs, before it was trained for budgets "
            f"(train.budget_start {start:g}): go on with m3vit train --resume"
        )


def require_trained_run(run: "Run", budget: Budget) -> None:
    """Raise InputError for a budget that a run cannot keep to, or that is below the smallest it was trained for."""
    if not budget.full:
        require_begun(run)
    model, train = run.model, run.config.train
    model.uses(budget, model.config.tasks)
    found = space_of(model, train)
    require_trained(found, budget, bool(train.budgets))


class Whole(NamedTuple):
    """What the whole model makes of images, without gradient: tokens by block [R or 1, B, T, D], logits by task."""

    tokens: dict[int, Tensor]
    logits: dict[str, Tensor]

    @classmethod
    def of(cls, output: Output) -> "Whole":
        """Return it of an output with its tokens."""
        return cls(
            {block: tokens.detach() for block, tokens in output.tokens.items()},
            {task: logits.detach() for task, logits in output.logits.items()},
        )


def token_distance(output: Output, whole: Whole) -> Tensor:
    """Return how far the tokens are from the whole model's: [B], a mean over blocks, tasks, tokens and channels.

    The square of the difference, of tokens that are normalised as heads normalise what they read: their size says
    nothing to a head. 2 for tokens that have nothing to do with each other.
    """
    found = []
    for block, tokens in output.tokens.items():
        mine, other = (F.layer_norm(one.float(), one.shape[-1:]) for one in (tokens, whole.tokens[block]))
        found.append((mine - other).square().mean(dim=(0, 2, 3)))
    return torch.stack(found).mean(dim=0)


def output_distance(output: Output, whole: Whole, weights: Mapping[str, float]) -> Tensor:
    """Return how far the predictions are from the whole model's: [B], the tasks' means over pixels, weighed."""
    distances = [
        weights[task] * kind_of(task).distance(logits.float(), whole.logits[task].float()).mean(dim=(1, 2))
        for task, logits in output.logits.items()
    ]
    return torch.stack(distances).sum(dim=0)


@contextmanager
def as_used(decoder: nn.Module) -> Iterator[None]:
    """Have a decoder do in here what it does when it predicts, which is what smaller passes train it for.

    Its BatchNorms have one set of running statistics, for all budgets: the whole model's, which smaller passes neither
    change nor replace by their own. And outputs that only train are the whole model's affair.
    """
    was_training = decoder.training
    decoder.eval()
    try:
        yield
    finally:
        decoder.train(was_training)
