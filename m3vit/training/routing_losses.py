"""Losses of the routing, from sums over the tokens that add up over parts of a batch.

Shapes: R tasks, N tokens of one task, E experts, K top-k.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m3vit.models.router import Routing, expert_load


class RoutingSums(NamedTuple):
    """Sums of a routing over the N tokens of each of R tasks.

    The sums of parts of the tokens add up to those of the whole, so that processes need not see each other's tokens.
    float32 whatever the routing's dtype, but for the counts. None: nobody asked for it.
    """

    tokens: Tensor  # int64 [], N
    allowed_RE: Tensor | None = None  # bool, as in Routing: the same for all parts
    weights_RE: Tensor | None = None  # the weights that tokens give an expert
    load_RE: Tensor | None = None  # how many tokens an expert gets, expected over its noise: see `summed_load`
    chosen_RE: Tensor | None = None  # int64, how many tokens it got
    scores_RE: Tensor | None = None
    squares_R: Tensor | None = None  # squared log-sum-exp of a token's logits


def routing_sums(routing: Routing, fields: Iterable[str]) -> RoutingSums:
    """Sum a routing over its tokens: `fields` are the names of the sums wanted, keys of SUMS."""
    tokens = routing.expert_ids_RNK.new_full((), routing.expert_ids_RNK.shape[1])
    return RoutingSums(tokens, routing.allowed_RE, **{field: SUMS[field](routing) for field in fields})


def summed_weights(routing: Routing) -> Tensor:
    """Return the sum of the weights that the tokens give each expert [R, E]."""
    combine_RNE = torch.zeros_like(routing.scores_RNE).scatter(-1, routing.expert_ids_RNK, routing.weights_RNK)
    return combine_RNE.sum(dim=1, dtype=torch.float32)


def summed_load(routing: Routing) -> Tensor:
    """Return the number of tokens of each expert [R, E].

    With noise, expected over a new draw of each expert's noise (Shazeer et al., appendix A), which gives it a gradient.
    Without, it is a count, and has none, as in M3ViT's released runs. (Its code compares logits with thresholds taken
    from scores; here both are logits.)
    """
    if routing.noise_std is None:
        return expert_load(routing.expert_ids_RNK, routing.scores_RNE.shape[-1], routing.used_RK).float()
    return chosen_probability(routing).sum(dim=1)


def chosen_probability(routing: Routing) -> Tensor:
    """Return the probability [R, N, E] that each expert stays or gets among the top k if its noise is drawn again."""
    logits, noisy, std = routing.logits_RNE, routing.noisy_RNE, routing.noise_std
    assert logits is not None and noisy is not None and std is not None, "the router had noise"
    logits, noisy, std = logits.float(), noisy.float(), std.float()
    top_k, num_experts = routing.weights_RNK.shape[-1], noisy.shape[-1]
    if top_k == num_experts:
        return torch.ones_like(noisy)
    ranked = noisy.topk(top_k + 1, dim=-1).values
    inside, outside = ranked[..., top_k - 1 : top_k], ranked[..., top_k : top_k + 1]
    # To be among the top k an expert has to beat the k-th best of the others.
    threshold = torch.where(noisy >= inside, outside, inside)
    return torch.special.ndtr((logits - threshold) / std)


def summed_squares(routing: Routing) -> Tensor:
    """Return the sum over tokens of the squared log-sum-exp of the logits [R]."""
    assert routing.logits_RNE is not None
    return routing.logits_RNE.float().logsumexp(dim=-1).square().sum(dim=1)


SUMS: dict[str, Callable[[Routing], Tensor]] = {
    "weights_RE": summed_weights,
    "load_RE": summed_load,
    "chosen_RE": lambda routing: expert_load(routing.expert_ids_RNK, routing.scores_RNE.shape[-1], routing.used_RK),
    "scores_RE": lambda routing: routing.scores_RNE.sum(dim=1, dtype=torch.float32),
    "squares_R": summed_squares,
}


def squared_cv(x: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return the squared coefficient of variation over the last axis, variance as M3ViT's code (unbiased).

    With `allowed` (bool, shape of x) over those entries only.
    """
    if allowed is None:
        allowed = torch.ones_like(x, dtype=torch.bool)
    count = allowed.sum(dim=-1)
    x = x * allowed
    mean = x.sum(dim=-1) / count
    variance = (((x - mean[..., None]) ** 2) * allowed).sum(dim=-1) / (count - 1).clamp(min=1)
    return variance / (mean**2 + 1e-10)


def importance_loss(sums: RoutingSums) -> Tensor:
    """Return CV^2 of each expert's summed weights, summed over tasks (V-MoE appendix A; M3ViT trains with it)."""
    assert sums.weights_RE is not None
    return squared_cv(sums.weights_RE, sums.allowed_RE).sum()


def load_loss(sums: RoutingSums) -> Tensor:
    """Return CV^2 of the number of tokens of each expert, summed over tasks; see `summed_load`."""
    assert sums.load_RE is not None
    return squared_cv(sums.load_RE, sums.allowed_RE).sum()


def switch_loss(sums: RoutingSums) -> Tensor:
    """Return E * sum_e f_e P_e, summed over tasks: 1 for each when balanced (Switch, arXiv 2101.03961, equation 4).

    f_e is the share of routing decisions, without gradient, P_e the mean score. With k > 1 as in GShard: all k choices
    count.
    """
    assert sums.chosen_RE is not None
    share = sums.chosen_RE / sums.chosen_RE.sum(dim=-1, keepdim=True).clamp(min=1)
    experts = share.shape[-1] if sums.allowed_RE is None else sums.allowed_RE.sum(dim=-1)
    return (experts * (share * mean_scores(sums)).sum(dim=-1)).sum()


def z_loss(sums: RoutingSums) -> Tensor:
    """Return the mean squared log-sum-exp of the logits, over tokens and tasks (ST-MoE, arXiv 2202.08906, eq. 5)."""
    assert sums.squares_R is not None
    return sums.squares_R.mean() / sums.tokens.clamp(min=1)


def mutual_information(sums: RoutingSums) -> Tensor:
    """Return I(task; expert) in nats, of tasks taken as equally likely: at most log of the number of tasks.

    Mod-Squad (arXiv 2212.08066, section 3.3) maximises it: experts are all used, each by few tasks, so that those a
    task does not use can be left out of its graph. P(expert | task) is the mean score over the tokens.
    """
    conditional_RE = mean_scores(sums)
    return entropy(conditional_RE.mean(dim=0)) - entropy(conditional_RE).mean()


def mean_scores(sums: RoutingSums) -> Tensor:
    """Return the mean over tokens of each expert's score [R, E]."""
    assert sums.scores_RE is not None
    return sums.scores_RE / sums.tokens.clamp(min=1)


def entropy(p: Tensor) -> Tensor:
    """Return the entropy in nats over the last axis.

    The gradient is finite at p = 0 too (torch.special.entr's is not): the score of an expert that a task may not use.
    """
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(dim=-1)


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
