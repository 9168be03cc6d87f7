"""Routers: which experts a token goes to, and with which weights.

Shapes: R tasks, N tokens of one task, D embedding dimension, E experts, K top-k.

M3ViT (arXiv 2210.14793, section 3.2; its code: models/gate_funs/noisy_gate_vmoe.py): a bias-free linear map,
softmax over all E experts, then top-k; the K weights are used as they are, not renormalised.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING = 64  # width of the task embedding of `task_conditioned` (M3ViT, section 3.2)


class Routing(NamedTuple):
    """What a router decided for R tasks of N tokens each.

    The last four serve the losses of training: logits before and after the noise, the noise's standard deviation
    [R, N, 1 or E] (None without noise) and which experts each task may use (None: all).
    """

    scores_RNE: Tensor  # softmax over all experts
    weights_RNK: Tensor  # scores of the chosen experts, not renormalised
    expert_ids_RNK: Tensor  # int64, best first
    logits_RNE: Tensor | None = None
    noisy_RNE: Tensor | None = None
    noise_std: Tensor | None = None
    allowed_RE: Tensor | None = None  # bool

    def of_tasks(self, count: int) -> "Routing":
        """Return the routing of one task as that of `count` tasks, of which it is the same."""
        fields: list[Any] = [field if field is None else field.expand(count, *field.shape[1:]) for field in self]
        return Routing(*fields)


def route(logits_RNE: Tensor, top_k: int, kept_E: Tensor | None = None) -> Routing:
    """Turn router logits into scores, weights and expert ids. A pure function.

    The logits decide, not their scores: softmax rounds small differences away (of up-cycled gates, for example). With
    `kept` (bool) only those experts are chosen from; scores are over all of them all the same.
    """
    scores = logits_RNE.softmax(dim=-1)
    ranked = logits_RNE if kept_E is None else logits_RNE.masked_fill(~kept_E, -math.inf)
    expert_ids = ranked.topk(top_k, dim=-1).indices
    return Routing(scores, scores.gather(-1, expert_ids), expert_ids)


def autocasts(x: Tensor) -> bool:
    """Return whether autocast is on for the tensor's device; the meta device has none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


class Router(nn.Module):
    """The gates of one MoE layer, for all tasks.

    Every kind comes down to one affine map D -> E a task, see `gate`: that is what export and hardware use. `allowed`:
    for each task the experts it may use, or None for all; the others get a logit no token can choose.
    """

    FORBIDDEN = -1e3  # added to a logit: its exponential is 0 in float32; small enough for fixed-point biases

    allowed_RE: Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        num_tasks: int,
        kind: str,
        noise: float = 0.0,
        *,
        learned_noise: bool = False,
        allowed: Sequence[Sequence[int] | None] = (),
    ) -> None:
        super().__init__()
        self.dim, self.num_experts, self.top_k, self.kind, self.noise = dim, num_experts, top_k, kind, noise
        # A list of parameters, not one stacked tensor: a per-task graph then holds the gate of its task alone.
        width = dim + EMBEDDING if kind == "task_conditioned" else dim
        gates = num_tasks if kind == "multi" else 1
        self.gates = nn.ParameterList(nn.Parameter(torch.empty(num_experts, width)) for _ in range(gates))
        for gate in self.gates:
            nn.init.kaiming_uniform_(gate, a=math.sqrt(5))
        # Zero: noise of standard deviation softplus(0) = 0.69 to begin with (Shazeer et al., appendix A).
        self.noise_gates = (
            nn.ParameterList(nn.Parameter(torch.zeros(num_experts, dim)) for _ in range(gates))
            if learned_noise
            else None
        )
        if kind == "task_conditioned":
            self.task_embedding = nn.Sequential(
                nn.Linear(num_tasks, EMBEDDING), nn.ReLU(), nn.Linear(EMBEDDING, EMBEDDING)
            )
        self.num_tasks = num_tasks
        # What an export changes, set while it is checked against the model: experts per token, the experts kept (bool
        # [E]) or None for all.
        self.choice: tuple[int, Tensor | None] = (top_k, None)
        mask = None
        if any(experts is not None for experts in allowed):
            mask = torch.ones(num_tasks, num_experts, dtype=torch.bool)
            for task_id, experts in enumerate(allowed):
                if experts is not None:
                    mask[task_id] = False
                    mask[task_id, list(experts)] = True
        self.register_buffer("allowed_RE", mask, persistent=False)

    def gate(self, task_id: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return the affine map of a task: weight [E, D] and bias [E].

        The bias is zero but for the task embedding of task_conditioned and for experts the task may not use. A tensor
        (int64 [1]) picks the task where the map is used: of an exported graph of all tasks, when it runs.
        """
        if isinstance(task_id, Tensor):
            weights, biases = zip(*(self.gate(task) for task in range(self.num_tasks)), strict=True)
            return torch.stack(weights).index_select(0, task_id)[0], torch.stack(biases).index_select(0, task_id)[0]
        weight = self.gates[task_id if self.kind == "multi" else 0]
        if self.kind == "task_conditioned":
            # The embedding is the same for every token of a task, so its part of the gate is a bias.
            one_hot = F.one_hot(torch.tensor(task_id, device=weight.device), self.num_tasks).to(weight.dtype)
            weight, bias = weight[:, : self.dim], weight[:, self.dim :] @ self.task_embedding(one_hot)
        else:
            bias = weight.new_zeros(self.num_experts)
        if self.allowed_RE is not None:
            bias = bias + self.FORBIDDEN * ~self.allowed_RE[task_id]
        return weight, bias

    def forward(self, x_RND: Tensor, task_ids: tuple[int, ...]) -> Routing:
        """Route the tokens [R, N, D] of the tasks `task_ids` (R of them), in the parameters' type even under autocast.

        bfloat16 would send some tokens to other experts, and up-cycled ones to parts of different copies of an MLP.
        (Switch, arXiv 2101.03961, section 2.4, keeps its router in float32 for stability.)
        """
        if autocasts(x_RND):
            with torch.autocast(x_RND.device.type, enabled=False):
                return self.forward(x_RND.to(self.gates[0].dtype), task_ids)
        weights, biases = zip(*(self.gate(task_id) for task_id in task_ids), strict=True)
        logits = torch.baddbmm(torch.stack(biases)[:, None], x_RND, torch.stack(weights).transpose(1, 2))
        noisy, std = logits, None
        if self.training and self.noise > 0:
            std = self.noise_std(x_RND, task_ids)
            noisy = logits + torch.randn_like(logits) * std
        allowed = None if self.allowed_RE is None else self.allowed_RE[list(task_ids)]
        return route(noisy, *self.choice)._replace(
            logits_RNE=logits, noisy_RNE=noisy, noise_std=std, allowed_RE=allowed
        )

    def noise_std(self, x_RND: Tensor, task_ids: tuple[int, ...]) -> Tensor:
        """Return the standard deviation of the noise on the logits: [R, N, E] if learned, else [R, N, 1]."""
        if self.noise_gates is None:
            return x_RND.new_full((*x_RND.shape[:2], 1), self.noise / self.num_experts)
        gates = torch.stack([self.noise_gates[task if self.kind == "multi" else 0] for task in task_ids])
        return self.noise * (F.softplus(x_RND @ gates.transpose(1, 2)) + 1e-2)


# --- sums over the tokens, all that the routing losses need -----------------------------------------------------------


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
        return expert_load(routing.expert_ids_RNK, routing.scores_RNE.shape[-1]).float()
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


def expert_load(expert_ids_RNK: Tensor, num_experts: int) -> Tensor:
    """Return how many tokens each expert got: int64 [R, E]."""
    ids = expert_ids_RNK.flatten(1)
    return ids.new_zeros(len(ids), num_experts).scatter_add(1, ids, torch.ones_like(ids))


SUMS: dict[str, Callable[[Routing], Tensor]] = {
    "weights_RE": summed_weights,
    "load_RE": summed_load,
    "chosen_RE": lambda routing: expert_load(routing.expert_ids_RNK, routing.scores_RNE.shape[-1]),
    "scores_RE": lambda routing: routing.scores_RNE.sum(dim=1, dtype=torch.float32),
    "squares_R": summed_squares,
}


# --- losses of the routing, each a pure function of the sums; 0 without tokens ----------------------------------------


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
