"""Merge dense runs of one architecture, each of tasks of its own, into one model (model.init merge:[A, B, ...]).

After Branch-Train-MiX (arXiv 2403.07816): each run's MLPs become experts, everything else of the trunk is the mean of
the runs', heads stay those of their task. There the router starts at random; here each task first uses the experts of
its own run.

Given the weights B that all runs r began from, and coefficients c_r (model.merge_coefficients), the rest of the trunk
is B + sum_r c_r (r - B) instead (task arithmetic, arXiv 2212.04089); c_r = 1 / N is the mean again, whatever B.
entropy.py finds such coefficients, for each layer by itself.

A gate has no bias, but what it reads has passed a LayerNorm, x = w * z + b with sum_d z_d = 0: for u = 1 / w the sum
u . x = sum_d b_d / w_d = c is the same for every token. A gate row LEAD * u / c hence adds LEAD to the logit of its
expert, whatever the token. b is first shifted along w until |c| is 2 sqrt(D), which makes such rows of the size of
random ones; the experts' first biases take the shift back, so that it changes nothing that they compute.

With N runs, each with E / N experts, C copies of the G shards of its MLP, a token of the run's task runs through
m = K / G of these copies, each of the same score s = e^L / (C G (e^L + N - 1)), L = LEAD, but for small random gates
that send tokens to different copies (upcycling.py). Output weights are divided by m s: at the start each task's layer
computes what its run's MLP does. N, G and C must make up model.num_experts, and m must not exceed C.

Shapes: D embedding dimension, E experts, H hidden width of an expert.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.models.backbone import POST_NORM
from m3vit.models.from_run import TRUNK, Taken, Trained, check_attention, dense_tensors, fit, take_heads
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.pretrained import misfit, of_file, of_timm, run_with_experts
from m3vit.models.upcycling import count_shards, plain_mlp, put_copies

LEAD = 1.0  # of the logits of a task's own experts
SMALL = 1e-2  # random gates, relative to the usual size: above what rounding makes of LEAD, so that copies stay whole


@torch.no_grad()
def merge(
    model: MultiTaskModel,
    runs: Sequence[Trained],
    base: Mapping[str, Tensor] | None = None,
    layers: Mapping[str, Sequence[float]] | None = None,
) -> tuple[dict[str, Tensor], list[Taken]]:
    """Fill a model from dense runs; return the names and values it got, and the fates of each run's tensors.

    base: what the runs began from, by timm's names, for coefficients; None for the mean. layers: a coefficient of each
    run for each layer (`layer_of`); None: those of the configuration for all.

    Raises InputError if the runs cannot be merged into this model; nothing of it is left out but what is no task of it.
    """
    owners = check(model, runs)
    own, prefixes = model.state_dict(), tuple(f"{TRUNK}blocks.{index}.mlp." for index in model.backbone.moe_indices)
    taken = [Taken({}, dict.fromkeys(run.state, "not in this model")) for run in runs]
    for name in own:
        if name.startswith(TRUNK) and not name.startswith(prefixes):
            for run, one in zip(runs, taken, strict=True):
                one.values[name], one.fates[name] = fit(model, run, name.removeprefix(TRUNK)), ""
    for run, one in zip(runs, taken, strict=True):
        take_heads(model, run, one)
    found: dict[str, Tensor] = {}
    for name in own:
        if values := [one.values[name] for one in taken if name in one.values]:
            if base is not None and name.startswith(TRUNK):
                within = name.removeprefix(TRUNK)
                numbers = model.config.merge_coefficients if layers is None else layers[layer_of(within)]
                assert not isinstance(numbers, str)  # a word is for what finds numbers
                found[name] = combined(values, base[within], numbers)
            else:
                found[name] = combined(values, None, ())
            own[name].copy_(found[name])
    for index in model.backbone.moe_indices:
        _mix(model, runs, owners, index)
        names = [name for name in own if name.startswith(f"{TRUNK}blocks.{index}.mlp.")]
        found |= {name: own[name] for name in [*names, f"{TRUNK}blocks.{index}.norm2.bias"]}
        for one in taken:
            one.fates |= {name: "" for name in one.fates if name.startswith(f"{TRUNK}blocks.{index}.mlp.")}
    return found, taken


def layer_of(name: str) -> str:
    """Return the layer of a tensor of a trunk, by timm's name: its block, or embed, which stands before the blocks."""
    part, *rest = name.split(".")
    return f"blocks.{rest[0]}" if part == "blocks" else "embed"


def began_from(model: MultiTaskModel) -> Mapping[str, Tensor] | None:
    """Return the weights that runs to be merged with coefficients began from, by timm's names; None without these."""
    config = model.config
    if not config.merge_coefficients:
        return None
    if config.pretrained:
        return of_timm(config).state
    if run_with_experts(config.weights):
        raise InputError(
            f"model.weights {config.weights} has experts, and dense runs cannot have begun from it: give the weights "
            "that they were all trained from, or leave out model.merge_coefficients"
        )
    return of_file(model.backbone.trunk, dense_tensors(model), config.weights).state


def combined(values: Sequence[Tensor], began: Tensor | None, coefficients: Sequence[float]) -> Tensor:
    """Return the mean of several runs' values of one tensor; with what they began as, began + sum c (value - began)."""
    if not values[0].is_floating_point():
        return values[0]
    if began is None:
        return torch.stack(list(values)).mean(dim=0)
    start = began.to(values[0])
    vectors = torch.stack([value - start for value in values])
    return start + torch.tensordot(torch.tensor(coefficients, dtype=start.dtype, device=start.device), vectors, dims=1)


def check(model: MultiTaskModel, runs: Sequence[Trained]) -> dict[str, int]:
    """Return which run each task is of, or raise InputError if the runs are not of one architecture, or of no use."""
    first, config = runs[0], model.config
    for run in runs:
        if any(".mlp.experts." in name for name in run.state):
            raise InputError(
                f"model.init merge: {run.folder} has experts already: merge dense runs (model.moe_blocks none), or "
                "start from this one with run:"
            )
        if why := misfit(_trunk(first), _trunk(run)):
            raise InputError(
                f"model.init merge: {run.folder} is of another architecture than {first.folder}: {why}; give runs of "
                "one trunk"
            )
        if run.images != first.images:
            raise InputError(
                f"model.init merge: {run.folder} and {first.folder} were trained on images normalised differently: "
                "train them with one model.normalisation"
            )
        check_attention(model, run)
        if why := misfit(dense_tensors(model), {name: fit(model, run, name) for name in _trunk(run, positions=True)}):
            raise InputError(
                f"model.init merge: {run.folder} does not fit model.trunk {config.trunk} with {config.trunk_args}: "
                f"{why}; give {run.config.trunk} with {run.config.trunk_args}"
            )
    owners = {}
    for task in config.tasks:
        having = [place for place, run in enumerate(runs) if task in run.config.tasks]
        if len(having) != 1:
            which = " and ".join(str(runs[place].folder) for place in having) or "none"
            raise InputError(
                f"model.init merge: {task} is a task of {which}: each of model.tasks must be that of exactly one run"
            )
        owners[task] = having[0]
    if config.moe_indices(len(model.backbone.trunk.blocks)) and config.router != "multi":
        raise InputError(
            f"model.router is {config.router}: with model.init merge each task starts with the experts of its own run, "
            "which needs a gate for each: give multi"
        )
    return owners


def _trunk(run: Trained, *, positions: bool = False) -> dict[str, Tensor]:
    """Return a run's trunk by timm's names, with its positions, which are resampled, or without."""
    found = {name.removeprefix(TRUNK): value for name, value in run.state.items() if name.startswith(TRUNK)}
    return {name: value for name, value in found.items() if positions or name != "pos_embed"}


def _mix(model: MultiTaskModel, runs: Sequence[Trained], owners: dict[str, int], index: int) -> None:
    """Fill the experts and gates of one block, whose norm has the runs' mean by now, and shift that norm's bias."""
    block, mlp = model.backbone.trunk.blocks[index], model.backbone.replaced[index]
    layer, where = block.mlp, f"block {index} of {model.config.trunk}"
    if isinstance(block, POST_NORM) or not isinstance(block.norm2, nn.LayerNorm) or block.norm2.bias is None:
        raise InputError(
            f"model.init merge: {where} has no LayerNorm before its MLP, which the gates of a task's own experts start "
            "from: give another trunk"
        )
    dense = plain_mlp(mlp, where)
    shards = count_shards(layer, dense, where, len(runs))
    (num_experts, top_k), each = (len(layer.experts.w1), layer.router.top_k), len(layer.experts.w1) // len(runs)
    if top_k > each:
        raise InputError(
            f"model.top_k is {top_k}, and model.num_experts {num_experts} are {each} for each of the {len(runs)} runs "
            f"of {model.config.init}: give at most {each}, or more experts"
        )
    share = math.exp(LEAD) / (each * (math.exp(LEAD) + len(runs) - 1))
    prefix = f"{TRUNK}blocks.{index}.mlp."
    for place, run in enumerate(runs):
        dense.load_state_dict(
            {name.removeprefix(prefix): v for name, v in run.state.items() if name.startswith(prefix)}
        )
        put_copies(layer, slice(place * each, (place + 1) * each), dense, shards, shards / (top_k * share))
    direction = shift_norm(block.norm2, layer.experts)
    copies = num_experts // shards
    for task, gate in zip(model.config.tasks, layer.router.gates, strict=True):
        gate.copy_(gate[:copies].repeat_interleave(shards, dim=0) * SMALL)
        gate[owners[task] * each : (owners[task] + 1) * each] += LEAD * direction


@torch.no_grad()
def shift_norm(norm: nn.LayerNorm, bank: Any) -> Tensor:
    """Return a direction [D] whose product with every token that the norm gives is 1.

    The norm's bias is shifted for it, and the experts' first biases against it.
    """
    weight, bias, dim = norm.weight.double(), norm.bias.double(), len(norm.weight)
    if not weight.abs().min() > 0:
        raise InputError("model.init merge: a LayerNorm of the runs has a weight of 0: train them without it")
    constant = float((bias / weight).sum())
    wanted = math.copysign(max(abs(constant), 2 * math.sqrt(dim)), constant)
    shift = (wanted - constant) / dim * weight
    bank.b1.sub_((bank.w1.double() @ shift).to(bank.b1.dtype))
    norm.bias.add_(shift.to(norm.bias.dtype))
    return (1 / weight / wanted).to(norm.bias.dtype)
