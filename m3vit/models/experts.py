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


class _AddBias(torch.autograd.Function):
    """rows[s] + bias[expert of row s], for rows sorted by expert. The bias's gradient is one matrix product.

    The default backward of indexing would be an atomic scatter-add of every row.
    """

    @staticmethod
    def forward(ctx: Any, rows_SH: Tensor, bias_EH: Tensor, expert_S: Tensor) -> Tensor:
        ctx.save_for_backward(expert_S)
        ctx.num_experts = bias_EH.shape[0]
        return rows_SH + bias_EH[expert_S]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (expert_S,) = ctx.saved_tensors
        (grad_SH,) = gradients
        chosen_SE = F.one_hot(expert_S, ctx.num_experts).to(grad_SH.dtype)
        return grad_SH, chosen_SE.T @ grad_SH, None


def run_grouped(bank: ExpertBank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """As `run_sorted`, with all experts' products in one grouped GEMM each: no loop, and no wait for the counts.

    What large GPUs need: 16 small products leave most of one idle, and `run_sorted` stops its queue for the counts.
    Under autocast it computes in autocast's type. Widths must be multiples of 16 bytes.
    """
    num_experts, top_k = bank.w1.shape[0], expert_ids_NK.shape[1]
    device = x_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
    groups = dispatch(expert_ids_NK, num_experts)
    offsets = groups.counts_E.cumsum(0).to(torch.int32)
    expert_S = expert_ids_NK.flatten().index_select(0, groups.order_S)
    w1, b1, w2, b2 = (parameter.to(dtype) for parameter in (bank.w1, bank.b1, bank.w2, bank.b2))
    rows_SD = _GatherRows.apply(x_ND.to(dtype), groups.order_S, groups.inverse_S, top_k)
    hidden_SH = F.gelu(_AddBias.apply(F.grouped_mm(rows_SD, w1.transpose(1, 2), offs=offsets), b1, expert_S))
    sorted_SD = _AddBias.apply(F.grouped_mm(hidden_SH, w2.transpose(1, 2), offs=offsets), b2, expert_S)
    out_SD = _GatherRows.apply(sorted_SD, groups.inverse_S, groups.order_S, 1)
    return torch.einsum("nk,nkd->nd", weights_NK.to(dtype), out_SD.view(-1, top_k, x_ND.shape[1]))


EXECUTIONS = {"sorted": run_sorted, "grouped": run_grouped, "reference": run_reference}


def choose_execution(name: str, bank: ExpertBank, x_ND: Tensor) -> str:
    """Return the execution to use: `auto` is grouped for 16-bit types on a CUDA GPU that has it, else sorted."""
    if name != "auto":
        return name
    if x_ND.device.type != "cuda" or not hasattr(F, "grouped_mm"):
        return "sorted"
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x_ND.dtype
    aligned = all(width * dtype.itemsize % 16 == 0 for width in bank.w1.shape[1:])
    capable = torch.cuda.get_device_capability(x_ND.device) >= (8, 0)
    return "grouped" if dtype == torch.bfloat16 and aligned and capable else "sorted"
