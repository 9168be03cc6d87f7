"""The order of hidden units and of heads' channels that budgets need: the first ones are of most use.

Shapes: R tasks, B images, T tokens, N = B * T, D embedding dimension, E experts, H hidden units.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from m3vit.collectives import agree, gather, rank
from m3vit.data.loading import unlabelled
from m3vit.data.sample import Split
from m3vit.digests import read_sealed_json
from m3vit.models.config import ModelConfig, init_sources
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.order import Move
from m3vit.models.saved import INFO
from m3vit.training.config import Config, TrainConfig, read_run_config
from m3vit.training.sharding import shared_out

ORDER_IMAGES = 8  # training images that hidden units are put in order by


def ordering(config: Config, model: MultiTaskModel, split: Split) -> list[Move]:
    """Return what puts a model's hidden units in order, for train.budgets, by what they do on training images.

    In all processes; the first one looks at the images, so that the order is the same. Channels of heads are ordered by
    the weights alone. The order of a run trained for budgets, which the model started from, stays.
    """
    if not config.train.budgets:
        return []
    before, moves = trained_before(config.model), list[Move]()
    if config.train.budget_heads < 1 and not (before and before.budget_heads < 1):
        moves = model.heads.channel_moves()
    if before:
        return moves
    size = (config.model.image_size[0], config.model.image_size[1])
    skip = config.data.on_error == "skip"

    def look() -> dict[int, torch.Tensor] | None:
        if rank():
            return None
        images = next(unlabelled(split, size, model.normalisation, ORDER_IMAGES, config.train.seed, skip))
        return importance(model, images.to(next(model.parameters()).device))

    return moves + unit_moves(model, gather(agree(look))[0])


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
        # LayerScale, as timm's Block and EvaBlock have it.
        scale = getattr(getattr(blocks[block], "ls2", None), "gamma", getattr(blocks[block], "gamma_2", None))
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


def unit_moves(model: MultiTaskModel, found: Mapping[int, Tensor]) -> list[Move]:
    """Return what puts the hidden units of each expert and each dense MLP in order of their `importance`, most first.

    With it the model computes what it did.
    """
    moves = list[Move]()
    for block, values in found.items():
        mlp = model.backbone.trunk.blocks[block].mlp
        order = values.argsort(dim=-1, descending=True, stable=True)
        if isinstance(mlp, MoELayer):
            moves += [Move(mlp.experts, name, dim, order) for name, dim in (("w1", 1), ("b1", 1), ("w2", 2))]
        else:
            names = ["weight"] if mlp.fc1.bias is None else ["weight", "bias"]
            moves += [*(Move(mlp.fc1, name, 0, order) for name in names), Move(mlp.fc2, "weight", 1, order)]
    return moves


def trained_before(config: ModelConfig) -> TrainConfig | None:
    """Return how the run was trained that a model starts from, if it was for budgets: its order of units is to stay."""
    kind, given = init_sources(config.init)
    if kind != "run":
        return None
    run = Path(given[0])
    train, info = read_run_config(run).train, read_sealed_json(run / INFO, "part of the run that model.init names")
    return train if train.budgets and info.get("budgets_begun", True) else None


@torch.no_grad()
def put_in_order(moves: Sequence[Move], model: MultiTaskModel, average: nn.Module | None, optimizer: Any) -> None:
    """Carry out moves of a model that is being trained, sharded or not: on its moving average and its moments too.

    All processes call this. What has no moments (`optimizer` has seen no gradient of it) has none to move.
    """
    names = {module: name for name, module in model.named_modules()}
    for move in moves:
        tensor = getattr(move.module, move.name)
        found = [value for value in optimizer.state.get(tensor, {}).values() if getattr(value, "ndim", 0)]
        if average is not None:
            found.append(getattr(average.get_submodule(names[move.module]), move.name))
        for one in (tensor, *found):
            whole = one.full_tensor() if isinstance(one, DTensor) else one
            one.copy_(shared_out(move.of(whole), one))
