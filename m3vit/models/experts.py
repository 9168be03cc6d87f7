"""Experts: one bank of small MLPs, and the ways to run each token through its own K of them.

Shapes: N tokens, D embedding dimension, H hidden, E experts, K experts per token, S = N * K dispatched rows.
No capacity, no dropped tokens (M3ViT's code: models/custom_moe_layer.py).

torch.compile: a model compiles and computes the same, forward and backward, but `sorted` is left out of its graphs,
since its sizes depend on the routing; `reference` compiles as one graph. Training has no switch for it: on the CPU it
takes a minute to start and gains nothing, the time going into the same matrix products; on GPUs it is not measured.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertBank(nn.Module):
    """Parameters of E experts, each Linear(D, H) -> GELU -> Linear(H, D) with biases.

    `w1` [E, H, D], `b1` [E, H], `w2` [E, D, H], `b2` [E, D]; initialised as torch.nn.Linear is.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b2 = nn.Parameter(torch.empty(num_experts, dim))
        for parameter, fan_in in ((self.w1, dim), (self.b1, dim), (self.w2, hidden), (self.b2, hidden)):
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


class Dispatch(NamedTuple):
    """Tokens grouped by expert. Row r of the grouped order is (token, slot) number order_S[r] of the flat [N, K]."""

    order_S: Tensor  # int64, a permutation
    inverse_S: Tensor  # int64, its inverse
    counts_E: Tensor  # int64, rows of each expert


def dispatch(expert_ids_NK: Tensor, num_experts: int) -> Dispatch:
    """Group (token, slot) pairs by expert; tokens keep their order within an expert. A pure function."""
    flat = expert_ids_NK.flatten()
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return Dispatch(order, inverse, torch.bincount(flat, minlength=num_experts))


class _GatherRows(torch.autograd.Function):
    """Forward: row r is x[order[r] // copies]. Backward: a gather too, since each x row is taken `copies` times.

    The default backward of indexing is an atomic scatter-add: slower, and on several CPU threads its sum order,
    and so the last bits of a run, would change from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_S: Tensor, inverse_S: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse_S)
        ctx.copies = copies
        return x_ND.index_select(0, order_S // copies if copies > 1 else order_S)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_S,) = ctx.saved_tensors
        grad_SD = gradients[0].index_select(0, inverse_S)
        return grad_SD.view(-1, ctx.copies, grad_SD.shape[-1]).sum(dim=1), None, None, None


@torch.compiler.disable
def run_sorted(bank: ExpertBank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """Return sum_k weights[n, k] * expert(ids[n, k])(x[n]), shape [N, D]: each expert runs once, on its own tokens."""
    top_k = expert_ids_NK.shape[1]
    groups = dispatch(expert_ids_NK, bank.w1.shape[0])
    rows_SD = _GatherRows.apply(x_ND, groups.order_S, groups.inverse_S, top_k)
    # unbind: the gradient of bank.w1[e] would be a whole bank of zeros for each expert.
    parameters = zip(bank.w1.unbind(), bank.b1.unbind(), bank.w2.unbind(), bank.b2.unbind(), strict=True)
    outputs = [
        F.linear(F.gelu(F.linear(rows, w1, b1)), w2, b2)
        for rows, (w1, b1, w2, b2) in zip(rows_SD.split(groups.counts_E.tolist()), parameters, strict=True)
    ]
    out_SD = _GatherRows.apply(torch.cat(outputs), groups.inverse_S, groups.order_S, 1)
    return torch.einsum("nk,nkd->nd", weights_NK, out_SD.view(-1, top_k, x_ND.shape[1]))


def run_reference(bank: ExpertBank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """The obvious way, for tests: every expert on every token, then pick. Costs E / K times as much."""
    hidden = F.gelu(torch.einsum("nd,ehd->neh", x_ND, bank.w1) + bank.b1)
    out_NED = torch.einsum("neh,edh->ned", hidden, bank.w2) + bank.b2
    combine_NE = torch.zeros_like(out_NED[..., 0]).scatter_add(1, expert_ids_NK, weights_NK.to(out_NED.dtype))
    return torch.einsum("ne,ned->nd", combine_NE, out_NED)


EXECUTIONS = {"sorted": run_sorted, "reference": run_reference}
