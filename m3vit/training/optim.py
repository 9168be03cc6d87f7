"""Optimiser, learning rate, and the moving average of the weights."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from m3vit.models.multitask import MultiTaskModel
from m3vit.training.config import TrainConfig
from m3vit.training.parts import lr_factors


def learning_rate(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of optimiser step number `step` (0, 1, ...)."""
    total, warmup = train.epochs * steps_per_epoch, train.warmup_epochs * steps_per_epoch
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total - warmup, 1)
    if train.schedule == "poly":
        return train.lr * (1 - done) ** 0.9
    return train.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(
    train: TrainConfig, model: MultiTaskModel, others: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Return the optimiser. AdamW decays weights, of gates too; not biases, norms, positions and prefix tokens.

    A group whose learning rate is another than `learning_rate` has its factor as `lr_scale`. Frozen parameters are in
    groups too: without a gradient they are neither moved nor decayed. `others` are learned with the model, never
    decayed.
    """

    # An expert's bias is a row of a matrix [E, H]: decided by name, not by the number of dimensions.
    def decayed(name: str, parameter: Tensor) -> bool:
        return parameter.ndim > 1 and not name.endswith(
            (".b1", ".b2", "pos_embed", "cls_token", "dist_token", "reg_token", "rope.freqs")
        )

    factors = lr_factors(train, model)
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = train.optimizer == "sgd" or decayed(name, parameter)
        found.setdefault((decays, factors[name]), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (decays, factor), parameters in sorted(found.items(), key=lambda item: not item[0][0]):  # stable
        own = {"lr_scale": factor} if factor != 1 else {}
        groups.append({"params": parameters, "weight_decay": train.weight_decay if decays else 0.0, **own})
    if others:
        groups.append({"params": list(others), "weight_decay": 0.0})
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    return torch.optim.AdamW(groups, lr=train.lr)


def make_average(train: TrainConfig, model: MultiTaskModel, sharded: bool = False) -> AveragedModel | None:
    """Return the moving average of the model's weights and normalisation statistics, or None if it is off.

    It begins as a copy of the weights after the first step. If it will be `sharded`, tensors are averaged one by one:
    sharded ones (weights) and whole ones (statistics) do not go into one call.
    """
    if not train.ema:
        return None
    if sharded:
        return AveragedModel(model, avg_fn=get_ema_avg_fn(train.ema), use_buffers=True)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(train.ema), use_buffers=True)
