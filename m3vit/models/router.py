"""Routers: which experts a token goes to, and with which weights.

Shapes: R tasks, N tokens of one task, D embedding dimension, E experts, K top-k.

M3ViT (arXiv 2210.14793, section 3.2; its code: models/gate_funs/noisy_gate_vmoe.py): a bias-free linear map,
softmax over all E experts, then top-k; the K weights are used as they are, not renormalised.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.models.budget import Use

EMBEDDING = 64  # width of the task embedding of `task_conditioned` (M3ViT, section 3.2)


class Routing(NamedTuple):
    """What a router decided for R tasks of N tokens each.

    The next four serve the losses of training: logits before and after the noise, the noise's standard deviation
    [R, N, 1 or E] (None without noise) and which experts each task may use (None: all). `used`: where tasks differ in
    their top-k, the first so many of each task's K slots (None: all); weights of the others are 0.
    """

    scores_RNE: Tensor  # softmax over all experts
    weights_RNK: Tensor  # scores of the chosen experts, not renormalised
    expert_ids_RNK: Tensor  # int64, best first
    logits_RNE: Tensor | None = None
    noisy_RNE: Tensor | None = None
    noise_std: Tensor | None = None
    allowed_RE: Tensor | None = None  # bool
    used_RK: Tensor | None = None  # bool

    def of_tasks(self, count: int) -> "Routing":
        """Return the routing of one task as that of `count` tasks, of which it is the same."""
        fields: list[Any] = [field if field is None else field.expand(count, *field.shape[1:]) for field in self]
        return Routing(*fields)

    def of_task(self, place: int) -> "Routing":
        """Return the routing of one of the tasks, R = 1."""
        fields: list[Any] = [field if field is None else field[place : place + 1] for field in self]
        return Routing(*fields)


def route(logits_RNE: Tensor, top_k: int | Sequence[int], kept_RE: Tensor | None = None) -> Routing:
    """Turn router logits into scores, weights and expert ids. A pure function.

    The logits decide, not their scores: softmax rounds small differences away (of up-cycled gates, for example).
    `top_k`: of all tasks, or of each. With `kept` (bool) only those experts are chosen from; scores are over all of
    them all the same.
    """
    counts = {top_k} if isinstance(top_k, int) else set(top_k)
    scores = logits_RNE.softmax(dim=-1)
    ranked = logits_RNE if kept_RE is None else logits_RNE.masked_fill(~kept_RE[:, None], -math.inf)
    expert_ids = ranked.topk(max(counts), dim=-1).indices
    routing = Routing(scores, scores.gather(-1, expert_ids), expert_ids)
    if len(counts) == 1:
        return routing
    used_RK = torch.arange(max(counts), device=scores.device) < torch.tensor(top_k, device=scores.device)[:, None]
    return routing._replace(weights_RNK=routing.weights_RNK * used_RK[:, None], used_RK=used_RK)


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
        mask = None
        if any(experts is not None for experts in allowed):
            mask = torch.ones(num_tasks, num_experts, dtype=torch.bool)
            for task_id, experts in enumerate(allowed):
                if experts is not None:
                    mask[task_id] = False
                    mask[task_id, list(experts)] = True
        self.register_buffer("allowed_RE", mask, persistent=False)

    def gate(self, task_id: int) -> tuple[Tensor, Tensor]:
        """Return the affine map of a task: weight [E, D] and bias [E].

        The bias is zero but for the task embedding of task_conditioned and for experts the task may not use.
        """
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

    def picked_gate(self, task_1: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map of the task that a tensor (int64 [1]) names: of a graph of all tasks, when it runs."""
        weights, biases = zip(*(self.gate(task) for task in range(self.num_tasks)), strict=True)
        return torch.stack(weights).index_select(0, task_1)[0], torch.stack(biases).index_select(0, task_1)[0]

    def forward(self, x_RND: Tensor, task_ids: tuple[int, ...], uses: Sequence[Use] | None = None) -> Routing:
        """Route the tokens [R, N, D] of the tasks `task_ids` (R of them), in the parameters' type even under autocast.

        `uses`: what each task uses of the experts; None: as trained.

        bfloat16 would send some tokens to other experts, and up-cycled ones to parts of different copies of an MLP.
        (Switch, arXiv 2101.03961, section 2.4, keeps its router in float32 for stability.)
        """
        if autocasts(x_RND):
            with torch.autocast(x_RND.device.type, enabled=False):
                return self.forward(x_RND.to(self.gates[0].dtype), task_ids, uses)
        weights, biases = zip(*(self.gate(task_id) for task_id in task_ids), strict=True)
        logits = torch.baddbmm(torch.stack(biases)[:, None], x_RND, torch.stack(weights).transpose(1, 2))
        noisy, std = logits, None
        if self.training and self.noise > 0:
            std = self.noise_std(x_RND, task_ids)
            noisy = logits + torch.randn_like(logits) * std
        allowed = None if self.allowed_RE is None else self.allowed_RE[list(task_ids)]
        if uses is None:
            routing = route(noisy, self.top_k)
        else:
            routing = route(noisy, [use.top_k for use in uses], self._kept(uses))
        return routing._replace(logits_RNE=logits, noisy_RNE=noisy, noise_std=std, allowed_RE=allowed)

    def _kept(self, uses: Sequence[Use]) -> Tensor | None:
        """Return which experts each task chooses from, bool [R, E], or None if all do from all."""
        if all(len(use.kept) == self.num_experts for use in uses):
            return None
        mask = torch.zeros(len(uses), self.num_experts, dtype=torch.bool)
        for row, use in zip(mask, uses, strict=True):
            row[list(use.kept)] = True
        return mask.to(self.gates[0].device)

    def noise_std(self, x_RND: Tensor, task_ids: tuple[int, ...]) -> Tensor:
        """Return the standard deviation of the noise on the logits: [R, N, E] if learned, else [R, N, 1]."""
        if self.noise_gates is None:
            return x_RND.new_full((*x_RND.shape[:2], 1), self.noise / self.num_experts)
        gates = torch.stack([self.noise_gates[task if self.kind == "multi" else 0] for task in task_ids])
        return self.noise * (F.softplus(x_RND @ gates.transpose(1, 2)) + 1e-2)


def expert_load(expert_ids_RNK: Tensor, num_experts: int, used_RK: Tensor | None = None) -> Tensor:
    """Return how many tokens each expert got: int64 [R, E]. `used`: of a Routing."""
    ids = expert_ids_RNK.flatten(1)
    ones = torch.ones_like(ids) if used_RK is None else used_RK[:, None].expand_as(expert_ids_RNK).flatten(1).long()
    return ids.new_zeros(len(ids), num_experts).scatter_add(1, ids, ones)
