"""Routers: which experts a token goes to, and with which weights.

Shapes: R tasks, N tokens of one task, D embedding dimension, E experts, K top-k.

M3ViT (arXiv 2210.14793, section 3.2; its code: models/gate_funs/noisy_gate_vmoe.py): a bias-free linear map,
softmax over all E experts, then top-k; the K weights are used as they are, not renormalised.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING = 64  # width of the task embedding of `task_conditioned` (M3ViT, section 3.2)


class Routing(NamedTuple):
    """What a router decided for R tasks of N tokens each."""

    scores_RNE: Tensor  # softmax over all experts
    weights_RNK: Tensor  # scores of the chosen experts, not renormalised
    expert_ids_RNK: Tensor  # int64, best first


def route(logits_RNE: Tensor, top_k: int) -> Routing:
    """Turn router logits into scores, weights and expert ids. A pure function.

    The logits decide, not their scores: softmax rounds small differences away (of up-cycled gates, for example).
    """
    scores = logits_RNE.softmax(dim=-1)
    expert_ids = logits_RNE.topk(top_k, dim=-1).indices
    return Routing(scores, scores.gather(-1, expert_ids), expert_ids)


class Router(nn.Module):
    """The gates of one MoE layer, for all tasks.

    Every kind comes down to one affine map D -> E a task, see `gate`: that is what export and hardware use.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, num_tasks: int, kind: str, noise: float = 0.0) -> None:
        super().__init__()
        self.dim, self.num_experts, self.top_k, self.kind, self.noise = dim, num_experts, top_k, kind, noise
        # A list of parameters, not one stacked tensor: a per-task graph then holds the gate of its task alone.
        width = dim + EMBEDDING if kind == "task_conditioned" else dim
        self.gates = nn.ParameterList(
            nn.Parameter(torch.empty(num_experts, width)) for _ in range(num_tasks if kind == "multi" else 1)
        )
        for gate in self.gates:
            nn.init.kaiming_uniform_(gate, a=math.sqrt(5))
        if kind == "task_conditioned":
            self.task_embedding = nn.Sequential(
                nn.Linear(num_tasks, EMBEDDING), nn.ReLU(), nn.Linear(EMBEDDING, EMBEDDING)
            )
        self.num_tasks = num_tasks

    def gate(self, task_id: int) -> tuple[Tensor, Tensor]:
        """Return the affine map of a task: weight [E, D] and bias [E] (zero unless task_conditioned)."""
        if self.kind == "multi":
            weight = self.gates[task_id]
        else:
            weight = self.gates[0]
        if self.kind != "task_conditioned":
            return weight, weight.new_zeros(self.num_experts)
        # The embedding is the same for every token of a task, so its part of the gate is a bias.
        one_hot = F.one_hot(torch.tensor(task_id, device=weight.device), self.num_tasks).to(weight.dtype)
        return weight[:, : self.dim], weight[:, self.dim :] @ self.task_embedding(one_hot)

    def forward(self, x_RND: Tensor, task_ids: tuple[int, ...]) -> Routing:
        """Route the tokens [R, N, D] of the tasks `task_ids` (R of them)."""
        weights, biases = zip(*(self.gate(task_id) for task_id in task_ids), strict=True)
        logits = torch.baddbmm(torch.stack(biases)[:, None], x_RND, torch.stack(weights).transpose(1, 2))
        if self.training and self.noise > 0:
            logits = logits + torch.randn_like(logits) * (self.noise / self.num_experts)
        return route(logits, self.top_k)


def squared_cv(x: Tensor) -> Tensor:
    """Return the squared coefficient of variation over the last axis, variance as M3ViT's code (unbiased)."""
    if x.shape[-1] < 2:
        return x.new_zeros(x.shape[:-1])
    return x.var(dim=-1) / (x.mean(dim=-1) ** 2 + 1e-10)


def importance_loss(scores_RNE: Tensor, weights_RNK: Tensor, expert_ids_RNK: Tensor) -> Tensor:
    """Return CV^2 of each expert's summed weights, summed over tasks (V-MoE appendix A; M3ViT trains with it)."""
    combine_RNE = torch.zeros_like(scores_RNE).scatter(-1, expert_ids_RNK, weights_RNK)
    return squared_cv(combine_RNE.sum(dim=1)).sum()


def load_loss(expert_ids_RNK: Tensor, num_experts: int) -> Tensor:
    """Return CV^2 of the number of tokens of each expert, summed over tasks. Counts carry no gradient.

    With noise, M3ViT's code smooths the counts, which gives a gradient; its released runs have none.
    """
    return squared_cv(expert_load(expert_ids_RNK, num_experts).float()).sum()


def expert_load(expert_ids_RNK: Tensor, num_experts: int) -> Tensor:
    """Return how many tokens each expert got: int64 [R, E]."""
    return F.one_hot(expert_ids_RNK.flatten(1), num_experts).sum(dim=1)
