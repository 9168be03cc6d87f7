"""Experts: one bank of small MLPs, and the ways to run each token through its own K of them.

Shapes: N tokens, D embedding dimension, H hidden, E experts, K experts per token, S = N * K dispatched rows.
No capacity, no dropped tokens (M3ViT's code: models/custom_moe_layer.py).

torch.compile: a model compiles and computes the same, forward and backward, but `sorted` and `grouped` are left out of
its graphs; `reference` compiles as one graph. Training has no switch for it: on the CPU it takes a minute to start and
gains nothing, the time going into the same matrix products; on GPUs it is not measured.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
    token_S: Tensor  # int64, the token of each row
    place_NK: Tensor  # int64, the inverse of order_S: the row of each (token, slot)
    ends_E: Tensor  # int32, where the rows of each expert end


def dispatch(expert_ids_NK: Tensor, num_experts: int) -> Dispatch:
    """Group (token, slot) pairs by expert; tokens keep their order within an expert. A pure function.

    Nothing in it waits for a GPU (torch.bincount does).
    """
    ids_S, order_S = expert_ids_NK.flatten().sort(stable=True)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(order_S.numel(), device=order_S.device))
    experts_E = torch.arange(num_experts, device=order_S.device)
    ends_E = torch.searchsorted(ids_S, experts_E, right=True, out_int32=True)
    return Dispatch(order_S, order_S // expert_ids_NK.shape[1], place_S.view_as(expert_ids_NK), ends_E)


# How `sorted` and `grouped` compute: y = sum_k weight_k (w2 a_k + b2_k) for each token, with a = gelu(w1 x + b1).
# The gradients are written out instead of left to autograd, which would join the experts' results by copying them, sum
# the gradient of a token that was taken K times with atomics (slow, and in another order in every run), and keep four
# tensors of S rows until the backward pass. Here only w1 x + b1 is kept: tokens are gathered, and GELU is taken, again.
# The gradient of a weight, dy . (w2 a + b2), is taken as (dy w2) . a + dy . b2, so that w2 a need not be kept either.


def _gathered_sum(rows_SD: Tensor, place_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """Return sum_k weights[n, k] rows[place[n, k]], [N, D]. As a bag of embeddings no [N, K, D] is written."""
    if rows_SD.device.type in ("cpu", "cuda"):  # MPS has bags from torch 2.10 on
        return F.embedding_bag(place_NK, rows_SD, per_sample_weights=weights_NK, mode="sum")
    taken_NKD = rows_SD.index_select(0, place_NK.flatten()).unflatten(0, place_NK.shape)
    return (taken_NKD if weights_NK is None else taken_NKD * weights_NK[..., None]).sum(dim=1)


def _combine(expert_ids_NK: Tensor, weights_NK: Tensor, num_experts: int) -> Tensor:
    """Return the weight of each expert for each token, [N, E]: what the second bias enters with."""
    combine_NE = weights_NK.new_zeros(len(weights_NK), num_experts)
    return combine_NE.scatter_add_(1, expert_ids_NK, weights_NK)


def _weighted_sum(groups: Dispatch, expert_ids_NK: Tensor, rows_SD: Tensor, weights_NK: Tensor, b2: Tensor) -> Tensor:
    """Return sum_k weights[n, k] (row + b2) over the rows of each token, [N, D]."""
    y_ND = _gathered_sum(rows_SD, groups.place_NK, weights_NK)
    return y_ND.addmm_(_combine(expert_ids_NK, weights_NK, len(b2)), b2)


def _weighted_sum_gradients(
    groups: Dispatch, expert_ids_NK: Tensor, weights_NK: Tensor, b2: Tensor, grad_ND: Tensor, dots_S: Tensor
) -> tuple[Tensor, Tensor]:
    """Return its gradients of the weights [N, K] and of b2 [E, D]; `dots` are those of the gradient with the rows."""
    grad_weights_NK = dots_S[groups.place_NK] + (grad_ND @ b2.T).gather(1, expert_ids_NK)
    return grad_weights_NK, _combine(expert_ids_NK, weights_NK, len(b2)).T @ grad_ND


def _saved(ctx: Any) -> tuple[Dispatch, Tensor, tuple[Tensor, ...]]:
    """Return what a forward pass saved: the dispatch, the weight of each row [S, 1], and the rest in its order."""
    saved = ctx.saved_tensors  # once: activation checkpointing allows no more
    groups, (_, _, weights_NK, *_) = Dispatch(*saved[:4]), saved[4:]
    return groups, weights_NK.flatten()[groups.order_S, None], saved[4:]


class _Sorted(torch.autograd.Function):
    """Each expert in turn, on its own rows: a few MB at a time, which stay in the CPU's caches."""

    @staticmethod
    def forward(ctx: Any, groups: Dispatch, expert_ids_NK: Tensor, *operands: Tensor) -> Tensor:
        x_ND, weights_NK, w1, b1, w2, b2 = operands
        hidden, out_SD = [], x_ND.new_empty(len(groups.token_S), x_ND.shape[1])
        for expert, rows in _slices(groups):
            hidden.append(torch.addmm(b1[expert], x_ND.index_select(0, groups.token_S[rows]), w1[expert].T))
            torch.mm(F.gelu(hidden[-1]), w2[expert].T, out=out_SD[rows])
        ctx.save_for_backward(*groups, expert_ids_NK, x_ND, weights_NK, w1, w2, b2, *hidden)
        return _weighted_sum(groups, expert_ids_NK, out_SD, weights_NK, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,), (groups, weights_S1, saved) = gradients, _saved(ctx)
        expert_ids_NK, x_ND, weights_NK, w1, w2, b2, *hidden = saved
        token_S = groups.token_S
        grad_w1, grad_b1, grad_w2 = torch.empty_like(w1), w1.new_empty(w1.shape[:2]), torch.empty_like(w2)
        grad_SD, dots_S = x_ND.new_empty(len(token_S), x_ND.shape[1]), x_ND.new_empty(len(token_S))
        for expert, rows in _slices(groups):
            grad_rows, weights = grad_ND.index_select(0, token_S[rows]), weights_S1[rows]
            active, back = F.gelu(hidden[expert]), grad_rows @ w2[expert]
            torch.linalg.vecdot(back, active, out=dots_S[rows])
            torch.mm(grad_rows.mul_(weights).T, active, out=grad_w2[expert])
            back = torch.ops.aten.gelu_backward(back.mul_(weights), hidden[expert])
            torch.mm(back.T, x_ND.index_select(0, token_S[rows]), out=grad_w1[expert])
            torch.sum(back, dim=0, out=grad_b1[expert])
            torch.mm(back, w1[expert], out=grad_SD[rows])
        outer = _weighted_sum_gradients(groups, expert_ids_NK, weights_NK, b2, grad_ND, dots_S)
        return None, None, _gathered_sum(grad_SD, groups.place_NK), outer[0], grad_w1, grad_b1, grad_w2, outer[1]


def _slices(groups: Dispatch) -> Iterator[tuple[int, slice]]:
    """Yield each expert and its rows."""
    ends = groups.ends_E.tolist()
    return ((expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)))


class _Grouped(torch.autograd.Function):
    """All experts at once: their products are one grouped GEMM, and nothing waits for the counts.

    What large GPUs need: 16 small products leave most of one idle. The experts of each row are also a matrix of zeros
    and ones, so that adding the first bias is a product, and so is its gradient.
    """

    @staticmethod
    def forward(ctx: Any, groups: Dispatch, expert_ids_NK: Tensor, *operands: Tensor) -> Tensor:
        x_ND, weights_NK, w1, b1, w2, b2 = operands
        hidden_SH = F.grouped_mm(x_ND.index_select(0, groups.token_S), w1.transpose(1, 2), offs=groups.ends_E)
        hidden_SH.addmm_(_chosen(groups, expert_ids_NK, b1), b1)
        out_SD = F.grouped_mm(F.gelu(hidden_SH), w2.transpose(1, 2), offs=groups.ends_E)
        ctx.save_for_backward(*groups, expert_ids_NK, x_ND, weights_NK, w1, w2, b2, hidden_SH)
        return _weighted_sum(groups, expert_ids_NK, out_SD, weights_NK, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,), (groups, weights_S1, saved) = gradients, _saved(ctx)
        expert_ids_NK, x_ND, weights_NK, w1, w2, b2, hidden_SH = saved
        token_S = groups.token_S

        def gradient(grad_SO: Tensor, rows_SI: Tensor) -> Tensor:
            """Sum grad[s] rows[s]^T over each expert's rows. On some GPUs those without a row would get what was in
            memory before (pytorch issue 172439)."""
            product_EOI = F.grouped_mm(grad_SO.T, rows_SI, offs=groups.ends_E)
            empty_E = torch.diff(groups.ends_E, prepend=groups.ends_E.new_zeros(1)) == 0
            return product_EOI.masked_fill_(empty_E[:, None, None], 0)

        active_SH, grad_rows = F.gelu(hidden_SH), grad_ND.index_select(0, token_S)
        back_SH = F.grouped_mm(grad_rows, w2, offs=groups.ends_E)
        dots_S = torch.linalg.vecdot(back_SH, active_SH)
        grad_w2 = gradient(grad_rows.mul_(weights_S1), active_SH)
        back_SH = torch.ops.aten.gelu_backward(back_SH.mul_(weights_S1), hidden_SH)
        grad_w1 = gradient(back_SH, x_ND.index_select(0, token_S))
        grad_b1 = _chosen(groups, expert_ids_NK, b2).T @ back_SH
        grad_SD = F.grouped_mm(back_SH, w1, offs=groups.ends_E)
        outer = _weighted_sum_gradients(groups, expert_ids_NK, weights_NK, b2, grad_ND, dots_S)
        return None, None, _gathered_sum(grad_SD, groups.place_NK), outer[0], grad_w1, grad_b1, grad_w2, outer[1]


def _chosen(groups: Dispatch, expert_ids_NK: Tensor, bias: Tensor) -> Tensor:
    """Return which expert's each row is, as zeros and ones [S, E] of the bias's type."""
    expert_S1 = expert_ids_NK.flatten()[groups.order_S, None]
    return (expert_S1 == torch.arange(len(bias), device=bias.device)).to(bias.dtype)


def _operands(bank: ExpertBank, x_ND: Tensor, weights_NK: Tensor) -> list[Tensor]:
    """Return x, weights and parameters in the type to compute in: autocast's where it is on, else that of x."""
    device = x_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
    return [tensor.to(dtype) for tensor in (x_ND, weights_NK, bank.w1, bank.b1, bank.w2, bank.b2)]


@torch.compiler.disable
def run_sorted(bank: ExpertBank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """Return sum_k weights[n, k] * expert(ids[n, k])(x[n]), shape [N, D]: each expert runs once, on its own tokens."""
    groups = dispatch(expert_ids_NK, len(bank.w1))
    return _Sorted.apply(groups, expert_ids_NK, *_operands(bank, x_ND, weights_NK))


@torch.compiler.disable
def run_grouped(bank: ExpertBank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """As `run_sorted`, by grouped GEMMs. D and H must be multiples of 16 bytes."""
    if not len(x_ND):  # which they refuse
        return run_sorted(bank, x_ND, weights_NK, expert_ids_NK)
    groups = dispatch(expert_ids_NK, len(bank.w1))
    return _Grouped.apply(groups, expert_ids_NK, *_operands(bank, x_ND, weights_NK))


def run_reference(bank: ExpertBank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """The obvious way, for tests: every expert on every token, then pick. Costs E / K times as much."""
    hidden = F.gelu(torch.einsum("nd,ehd->neh", x_ND, bank.w1) + bank.b1)
    out_NED = torch.einsum("neh,edh->ned", hidden, bank.w2) + bank.b2
    combine_NE = torch.zeros_like(out_NED[..., 0]).scatter_add(1, expert_ids_NK, weights_NK.to(out_NED.dtype))
    return torch.einsum("ne,ned->nd", combine_NE, out_NED)


EXECUTIONS = {"sorted": run_sorted, "grouped": run_grouped, "reference": run_reference}


def choose_execution(name: str, bank: ExpertBank, x_ND: Tensor) -> str:
    """Return the execution to use: `auto` is grouped for bfloat16 on a CUDA GPU that has it, else sorted.

    torch has F.grouped_mm from 2.10 on, and a kernel for Hopper and Blackwell (compute capability 9 and 10); on
    others it waits for the counts and loops, as `sorted` does.
    """
    if name != "auto":
        return name
    if x_ND.device.type != "cuda" or not hasattr(F, "grouped_mm"):
        return "sorted"
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x_ND.dtype
    aligned = all(width * dtype.itemsize % 16 == 0 for width in bank.w1.shape[1:])
    capable = torch.cuda.get_device_capability(x_ND.device)[0] in (9, 10)
    return "grouped" if dtype == torch.bfloat16 and aligned and capable else "sorted"
