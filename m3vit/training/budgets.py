"""One checkpoint for many budgets: which budgets a step runs, and what the smaller ones learn of the whole model.

After Efficient Controllable Multi-Task Architectures (arXiv 2308.11744): the largest, the smallest and random
configurations are trained together, and the smaller ones' encoders learn the representation of the largest, which
should not depend on the configuration. Here the encoder's share is the hidden width of its MLPs and experts, the same
for all tasks, and a task's own share is how many experts its tokens go to. The distances are ours.

Shapes: R tasks, B images, T tokens, D embedding dimension, E experts, H hidden units, C channels of h x w outputs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3vit.errors import InputError
from m3vit.models.budget import FULL, Budget
from m3vit.models.config import ModelConfig, init_sources
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel, Output
from m3vit.models.space import Asked, Space, space_of
from m3vit.tasks import kind_of
from m3vit.training.config import TrainConfig, read_run_config


def space(model: MultiTaskModel, asked: Asked) -> Space:
    """Return the budgets that a model is trained for, by `train`'s keys, or raise InputError if they are one."""
    config = model.config
    found = space_of(config.tasks, config.top_k, model.hidden_widths(), model.backbone.moe_indices, asked)
    if found.single:
        raise InputError(
            f"train.budgets is {asked.budgets}, but the smallest budget is the whole model: give a train.budget_width "
            "below 1, or a train.budget_top_k below model.top_k"
        )
    return found


def of_step(train: TrainConfig, found: Space | None, step: int) -> list[Budget]:
    """Return the budgets of a step's passes, the whole model first: the same in every process, and when resumed."""
    if found is None:
        return [FULL]
    rng = np.random.default_rng([5, train.seed, step])
    if train.budgets == 1:
        return [FULL, found.random(rng) if step % 2 else found.smallest]
    return [FULL, found.smallest, *(found.random(rng) for _ in range(train.budgets - 1))]


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


@torch.no_grad()
def order_units(model: MultiTaskModel) -> None:
    """Put the hidden units of each expert and each dense MLP in order, the most important first.

    The model computes what it did. A unit's importance is the length of what it reads by times that of what it adds,
    which needs no data.
    """
    for block in model.hidden_widths():
        mlp = model.backbone.trunk.blocks[block].mlp
        if isinstance(mlp, MoELayer):
            bank = mlp.experts
            order_EH = _order(bank.w1.norm(dim=2) * bank.w2.norm(dim=1))
            bank.w1.copy_(bank.w1.gather(1, order_EH[..., None].expand_as(bank.w1)))
            bank.b1.copy_(bank.b1.gather(1, order_EH))
            bank.w2.copy_(bank.w2.gather(2, order_EH[:, None].expand_as(bank.w2)))
        else:
            order = _order(mlp.fc1.weight.norm(dim=1) * mlp.fc2.weight.norm(dim=0))
            mlp.fc1.weight.copy_(mlp.fc1.weight[order])
            mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
            if mlp.fc1.bias is not None:
                mlp.fc1.bias.copy_(mlp.fc1.bias[order])


def _order(importance: Tensor) -> Tensor:
    return importance.argsort(dim=-1, descending=True, stable=True)


def is_ordered(config: ModelConfig) -> bool:
    """Return whether a model starts from a run that was trained for budgets, whose order of units is to stay."""
    kind, given = init_sources(config.init)
    return kind == "run" and bool(read_run_config(Path(given[0])).train.budgets)
