"""One checkpoint for many budgets: which budgets a step runs, and what the smaller ones learn of the whole model.

After Efficient Controllable Multi-Task Architectures (arXiv 2308.11744): the largest, the smallest and random
configurations are trained together, and the smaller ones' encoders learn the representation of the largest, which
should not depend on the configuration. Here the encoder's share is the hidden width of its MLPs and experts, the same
for all tasks, and a task's own share is how many experts its tokens go to. The distances are ours.

Shapes: R tasks, B images, T tokens, D embedding dimension, E experts, H hidden units, C channels of h x w outputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.models.budget import FULL, Budget
from m3vit.models.config import ModelConfig, init_sources
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel, Output
from m3vit.models.space import Asked, Space, require_trained, space_of
from m3vit.profiling import count_macs, total_macs
from m3vit.tasks import kind_of
from m3vit.training.config import TrainConfig, read_run_config

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


def of_step(train: TrainConfig, found: Space | None, step: int) -> list[Budget]:
    """Return the budgets of a step's passes, the whole model first: the same in every process, and when resumed."""
    if found is None:
        return [FULL]
    rng = np.random.default_rng([6, train.seed, step])
    if train.budgets == 1:
        return [FULL, found.random(rng) if step % 2 else found.smallest]
    return [FULL, found.smallest, *(found.random(rng) for _ in range(train.budgets - 1))]


def step_macs(model: MultiTaskModel, train: TrainConfig, steps: int = 8) -> float:
    """Return how many times the MACs of a plain step, what only trains included, a step for budgets takes.

    model: of shapes (`meta_model`). The mean over the budgets of the first `steps`, of forward passes.
    """
    tasks, found = model.config.tasks, space(model, train)
    plain = sum(count_macs(model, tasks, training=True).values())
    smaller = [budget for step in range(steps) for budget in of_step(train, found, step)[1:]]
    return 1 + sum(total_macs(model, tasks, budget) for budget in smaller) / steps / plain


def distances_count(train: TrainConfig, step: int, steps: int) -> float:
    """Return how much of their weights the distances have at step number `step` of `steps`: it rises from 0 to 1."""
    rising = train.budget_warmup * steps
    return min(1.0, step / rising) if rising else 1.0


def require_trained_run(run: "Run", budget: Budget) -> None:
    """Raise InputError for a budget that a run cannot keep to, or that is below the smallest it was trained for."""
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


@torch.no_grad()
def importance(model: MultiTaskModel, images: Tensor) -> dict[int, Tensor]:
    """Return how much each hidden unit adds on normalised images [B, 3, H, W], by block: [H], or [E, H] of experts.

    The root of its mean square after the activation, over the tokens of all tasks, times the length of what it adds by;
    of experts weighed as they are for a token. Tokens that go elsewhere count as 0.
    """
    was_training, blocks = model.training, model.backbone.trunk.blocks
    squares: dict[int, Tensor] = {}
    handles = []
    for block in model.hidden_widths():
        mlp = blocks[block].mlp
        if isinstance(mlp, MoELayer):
            handles.append(mlp.register_forward_hook(partial(_of_experts, squares, block)))
        else:
            handles.append(mlp.fc2.register_forward_pre_hook(partial(_of_mlp, squares, block)))
    try:
        for image in images.split(1):
            model.eval()(image)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    found = {}
    for block, sums in squares.items():
        mlp = blocks[block].mlp
        second = mlp.experts.w2 if isinstance(mlp, MoELayer) else mlp.fc2.weight
        scale = getattr(getattr(blocks[block], "ls2", None), "gamma", None)  # LayerScale
        lengths = (second if scale is None else second * scale[:, None]).norm(dim=-2)
        found[block] = (sums.sqrt() * lengths).cpu()
    return found


def _of_mlp(squares: dict[int, Tensor], block: int, module: Any, inputs: tuple[Tensor, ...]) -> None:
    squares[block] = squares.get(block, 0) + inputs[0].square().flatten(0, -2).mean(dim=0)


def _of_experts(squares: dict[int, Tensor], block: int, layer: MoELayer, inputs: Any, outputs: Any) -> None:
    x_RBTD, routing, bank = inputs[0], outputs[1], layer.experts
    tokens, experts = routing.expert_ids_RNK.shape[1], len(bank.w1)
    x_RND = x_RBTD.reshape(-1, tokens, x_RBTD.shape[-1]).expand(len(routing.expert_ids_RNK), -1, -1)
    shares_RNE = torch.zeros_like(routing.scores_RNE).scatter_add_(-1, routing.expert_ids_RNK, routing.weights_RNK)
    found = []
    for expert in range(experts):
        chosen = shares_RNE[..., expert] > 0
        active = F.gelu(F.linear(x_RND[chosen], bank.w1[expert], bank.b1[expert]))
        found.append(
            (active * shares_RNE[..., expert][chosen][:, None]).square().sum(dim=0) / shares_RNE[..., 0].numel()
        )
    squares[block] = squares.get(block, 0) + torch.stack(found)


@torch.no_grad()
def order_units(model: MultiTaskModel, found: Mapping[int, Tensor]) -> None:
    """Put the hidden units of each expert and each dense MLP in order of their `importance`, the most important first.

    The model computes what it did.
    """
    for block, values in found.items():
        mlp = model.backbone.trunk.blocks[block].mlp
        order = values.argsort(dim=-1, descending=True, stable=True)
        if isinstance(mlp, MoELayer):
            bank, order_EH = mlp.experts, order.to(mlp.experts.w1.device)
            bank.w1.copy_(bank.w1.gather(1, order_EH[..., None].expand_as(bank.w1)))
            bank.b1.copy_(bank.b1.gather(1, order_EH))
            bank.w2.copy_(bank.w2.gather(2, order_EH[:, None].expand_as(bank.w2)))
        else:
            order = order.to(mlp.fc1.weight.device)
            mlp.fc1.weight.copy_(mlp.fc1.weight[order])
            mlp.fc2.weight.copy_(mlp.fc2.weight[:, order])
            if mlp.fc1.bias is not None:
                mlp.fc1.bias.copy_(mlp.fc1.bias[order])


def trained_before(config: ModelConfig) -> TrainConfig | None:
    """Return how the run was trained that a model starts from, if it was for budgets: its order of units is to stay."""
    kind, given = init_sources(config.init)
    train = read_run_config(Path(given[0])).train if kind == "run" else None
    return train if train and train.budgets else None
