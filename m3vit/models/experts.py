"""Experts: one bank of small MLPs, and the ways to run each token through its own K of them.

Shapes: N tokens, D embedding dimension, H hidden, E experts, K experts per token, S = N * K dispatched rows.
No capacity, no dropped tokens (M3ViT's code: models/custom_moe_layer.py).

torch.compile: a model compiles and computes the same, forward and backward, but `sorted` and `grouped` are left out of
its graphs; `reference` compiles as one graph. Training has no switch for it: on the CPU it takes a minute to start and
gains nothing, the time going into the same matrix products; on GPUs it is not measured.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Bank(Protocol):
    """Parameters of E experts: `w1` [E, H, D], `b1` [E, H], `w2` [E, D, H], `b2` [E, D]."""

    @property
    def w1(self) -> Tensor: ...
    @property
    def b1(self) -> Tensor: ...
    @property
    def w2(self) -> Tensor: ...
    @property
    def b2(self) -> Tensor: ...


class ExpertBank(nn.Module):
    """A `Bank` of experts, each Linear(D, H) -> GELU -> Linear(H, D) with biases; initialised as torch.nn.Linear is."""

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
    expert_ids_NK: Tensor  # int64, what is grouped by

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert and its rows."""
        if hasattr(self.ends_E, "fake_mode"):  # without values, when memory is predicted: as many rows each
            count = len(self.ends_E)
            ends = [len(self.token_S) * (expert + 1) // count for expert in range(count)]
        else:
            ends = self.ends_E.tolist()
        return ((expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)))

    def gather(self, x_ND: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return the token of each row, of those rows."""
        return x_ND.index_select(0, self.token_S[rows])

    def sum(self, rows_SD: Tensor, weights_NK: Tensor | None = None) -> Tensor:
        """Return sum_k weights[n, k] rows[place[n, k]], [N, D]. As a bag of embeddings no [N, K, D] is written."""
        if rows_SD.device.type in ("cpu", "cuda"):  # MPS has bags from torch 2.10 on
            return F.embedding_bag(self.place_NK, rows_SD, per_sample_weights=weights_NK, mode="sum")
        taken_NKD = rows_SD.index_select(0, self.place_NK.flatten()).unflatten(0, self.place_NK.shape)
        return (taken_NKD if weights_NK is None else taken_NKD * weights_NK[..., None]).sum(dim=1)

    def combine(self, rows_SD: Tensor, weights_NK: Tensor, b2: Tensor) -> Tensor:
        """Return sum_k weights[n, k] (row + b2) over the rows of each token, [N, D]."""
        return self.sum(rows_SD, weights_NK).addmm_(self._shares(weights_NK, len(b2)), b2)

    def combine_backward(
        self, weights_NK: Tensor, b2: Tensor, grad_ND: Tensor, dots_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return its gradients of weights [N, K] and b2 [E, D]; `dots` are those of the gradient with the rows."""
        grad_weights_NK = dots_S[self.place_NK] + (grad_ND @ b2.T).gather(1, self.expert_ids_NK)
        return grad_weights_NK, self._shares(weights_NK, len(b2)).T @ grad_ND

    def _shares(self, weights_NK: Tensor, num_experts: int) -> Tensor:
        """Return the weight of each expert for each token, [N, E]: what the second bias enters with."""
        shares_NE = weights_NK.new_zeros(len(weights_NK), num_experts)
        return shares_NE.scatter_add_(1, self.expert_ids_NK, weights_NK)


def dispatch(expert_ids_NK: Tensor, num_experts: int, used_NK: Tensor | None = None) -> Dispatch:
    """Group (token, slot) pairs by expert; tokens keep their order within an expert. A pure function.

    Pairs that are not `used` (bool; None: all are) come after those of the last expert: they are of none.
    Nothing in it waits for a GPU (torch.bincount does).
    """
    ids_NK = expert_ids_NK if used_NK is None else expert_ids_NK.masked_fill(~used_NK, num_experts)
    ids_S, order_S = ids_NK.flatten().sort(stable=True)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(order_S.numel(), device=order_S.device))
    experts_E = torch.arange(num_experts, device=order_S.device)
    ends_E = torch.searchsorted(ids_S, experts_E, right=True, out_int32=True)
    token_S = order_S // expert_ids_NK.shape[1]
    return Dispatch(order_S, token_S, place_S.view_as(expert_ids_NK), ends_E, expert_ids_NK)


# How `sorted` and `grouped` compute: y = sum_k weight_k (w2 a_k + b2_k) for each token, with a = gelu(w1 x + b1).
# The gradients are written out instead of left to autograd, which would join the experts' results by copying them, sum
# the gradient of a token that was taken K times with atomics (slow, and in another order in every run), and keep four
# tensors of S rows until the backward pass. Here only w1 x + b1 is kept: tokens are gathered, and GELU is taken, again.
# The gradient of a weight, dy . (w2 a + b2), is taken as (dy w2) . a + dy . b2, so that w2 a need not be kept either.
#
# What the MLP is stands in `mlp_rows` and `mlp_rows_backward`; of which rows and by which products it is computed, in
# `OneExpert` and `AllExperts`.


class OneExpert:
    """The rows of one expert: a few MB at a time, which stay in the CPU's caches. Products are written into `out`."""

    def __init__(self, groups: Dispatch, expert: int, rows: slice) -> None:
        self.groups, self.expert, self.rows = groups, expert, rows

    def gather(self, x_ND: Tensor) -> Tensor:
        return self.groups.gather(x_ND, self.rows)

    def linear(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(b[self.expert], x, w[self.expert].T)

    def through(self, x: Tensor, w: Tensor, out: Tensor | None) -> Tensor:
        return torch.mm(x, w[self.expert].T, out=out)

    def back(self, grad: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(grad, w[self.expert], out=out)

    def outer(self, grad: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
        return torch.mm(grad.T, x, out=out)

    def total(self, grad: Tensor, out: Tensor | None) -> Tensor:
        return torch.sum(grad, dim=0, out=out)


class AllExperts:
    """All rows at once: the products of the experts are one grouped GEMM, and nothing waits for the counts.

    What large GPUs need: 16 small products leave most of one idle. The experts of each row are also a matrix of zeros
    and ones, so that adding the first bias is a product, and so is its gradient. `out` is None: the results are new.
    """

    def __init__(self, groups: Dispatch) -> None:
        self.groups, self.gather = groups, groups.gather

    def linear(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return self.through(x, w).addmm_(self._chosen(b.dtype), b)

    def through(self, x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        return F.grouped_mm(x, w.transpose(1, 2), offs=self.groups.ends_E)

    def back(self, grad: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        return F.grouped_mm(grad, w, offs=self.groups.ends_E)

    def outer(self, grad: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
        """On some GPUs the experts without a row would get what was in memory before (pytorch issue 172439)."""
        ends_E = self.groups.ends_E
        product_EOI = F.grouped_mm(grad.T, x, offs=ends_E)
        empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
        return product_EOI.masked_fill_(empty_E[:, None, None], 0)

    def total(self, grad: Tensor, out: Tensor | None) -> Tensor:
        return self._chosen(grad.dtype).T @ grad

    def _chosen(self, dtype: torch.dtype) -> Tensor:
        """Return which expert's each row is, as zeros and ones [S, E]."""
        expert_S1 = self.groups.expert_ids_NK.flatten()[self.groups.order_S, None]
        return (expert_S1 == torch.arange(len(self.groups.ends_E), device=expert_S1.device)).to(dtype)


_Rows = OneExpert | AllExperts


def mlp_rows(
    on: _Rows, x_ND: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return w2 gelu(w1 x + b1) of the rows, and w1 x + b1, which the backward pass needs."""
    hidden = on.linear(on.gather(x_ND), w1, b1)
    return on.through(F.gelu(hidden), w2, out), hidden


def mlp_rows_backward(
    on: _Rows,
    grad_ND: Tensor,
    weights_S1: Tensor,
    x_ND: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    out: Sequence[Tensor | None] = (None,) * 5,
) -> tuple[Tensor, ...]:
    """Return the gradients of the rows' x, their dots (of the gradient with w2 a, without the row's weight), and the
    gradients of w1, b1 and w2; `out` says where they go, in this order."""
    out_x, out_dots, out_w1, out_b1, out_w2 = out
    active, grad_rows = F.gelu(hidden), on.gather(grad_ND)
    back = on.back(grad_rows, w2)
    dots = torch.linalg.vecdot(back, active, out=out_dots)
    grad_w2 = on.outer(grad_rows.mul_(weights_S1), active, out_w2)
    back = torch.ops.aten.gelu_backward(back.mul_(weights_S1), hidden)
    grad_w1 = on.outer(back, on.gather(x_ND), out_w1)
    grad_b1 = on.total(back, out_b1)
    return on.back(back, w1, out_x), dots, grad_w1, grad_b1, grad_w2


class _Sorted:
    """Each expert in turn."""

    @staticmethod
    def forward(groups: Dispatch, x_ND: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden, out_SD, rows = [], x_ND.new_empty(len(groups.token_S), x_ND.shape[1]), slice(0, 0)
        for expert, rows in groups.slices():
            hidden.append(mlp_rows(OneExpert(groups, expert, rows), x_ND, w1, b1, w2, out_SD[rows])[1])
        out_SD[rows.stop :] = 0  # of no expert
        return out_SD, hidden

    @staticmethod
    def backward(
        groups: Dispatch, grad_ND: Tensor, weights_S1: Tensor, x_ND: Tensor, w1: Tensor, w2: Tensor, *hidden: Tensor
    ) -> tuple[Tensor, ...]:
        rowwise = x_ND.new_empty(len(groups.token_S), x_ND.shape[1]), x_ND.new_empty(len(groups.token_S))
        parameters = torch.empty_like(w1), w1.new_empty(w1.shape[:2]), torch.empty_like(w2)
        rows = slice(0, 0)
        for expert, rows in groups.slices():
            on, out = OneExpert(groups, expert, rows), [*(g[rows] for g in rowwise), *(g[expert] for g in parameters)]
            mlp_rows_backward(on, grad_ND, weights_S1[rows], x_ND, w1, w2, hidden[expert], out)
        for gradient in rowwise:
            gradient[rows.stop :] = 0
        return *rowwise, *parameters


class _Grouped:
    """All experts at once."""

    @staticmethod
    def forward(groups: Dispatch, x_ND: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, list[Tensor]]:
        out_SD, hidden = mlp_rows(AllExperts(groups), x_ND, w1, b1, w2)
        return out_SD, [hidden]

    @staticmethod
    def backward(
        groups: Dispatch, grad_ND: Tensor, weights_S1: Tensor, x_ND: Tensor, w1: Tensor, w2: Tensor, *hidden: Tensor
    ) -> tuple[Tensor, ...]:
        return mlp_rows_backward(AllExperts(groups), grad_ND, weights_S1, x_ND, w1, w2, hidden[0])


class _Experts(torch.autograd.Function):
    """Dispatch, MLPs and combine, in one of the ways above."""

    @staticmethod
    def forward(ctx: Any, way: type[_Sorted | _Grouped], groups: Dispatch, *operands: Tensor) -> Tensor:
        x_ND, weights_NK, w1, b1, w2, b2 = operands
        out_SD, hidden = way.forward(groups, x_ND, w1, b1, w2)
        ctx.way = way
        ctx.save_for_backward(*groups, x_ND, weights_NK, w1, w2, b2, *hidden)
        return groups.combine(out_SD, weights_NK, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,), saved = gradients, ctx.saved_tensors  # read once: activation checkpointing allows no more
        groups, (x_ND, weights_NK, w1, w2, b2, *hidden) = Dispatch(*saved[:5]), saved[5:]
        weights_S1 = weights_NK.flatten()[groups.order_S, None]
        grad_SD, dots_S, *parameters = ctx.way.backward(groups, grad_ND, weights_S1, x_ND, w1, w2, *hidden)
        grad_weights, grad_b2 = groups.combine_backward(weights_NK, b2, grad_ND, dots_S)
        return None, None, groups.sum(grad_SD), grad_weights, *parameters, grad_b2


def _operands(bank: Bank, x_ND: Tensor, weights_NK: Tensor) -> list[Tensor]:
    """Return x, weights and parameters in the type to compute in: autocast's where it is on, else that of x."""
    device = x_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
    return [tensor.to(dtype) for tensor in (x_ND, weights_NK, bank.w1, bank.b1, bank.w2, bank.b2)]


@torch.compiler.disable
def run_sorted(
    bank: Bank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor, used_NK: Tensor | None = None
) -> Tensor:
    """Return sum_k weights[n, k] * expert(ids[n, k])(x[n]), shape [N, D]: each expert runs once, on its own tokens.

    used: bool, False where a weight is 0 and nothing need be computed; None: everywhere True.
    """
    groups = dispatch(expert_ids_NK, len(bank.w1), used_NK)
    return _Experts.apply(_Sorted, groups, *_operands(bank, x_ND, weights_NK))


@torch.compiler.disable
def run_grouped(bank: Bank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """As `run_sorted`, by grouped GEMMs. D and H must be multiples of 16 bytes."""
    if not len(x_ND):  # which they refuse
        return run_sorted(bank, x_ND, weights_NK, expert_ids_NK)
    # Parts of a bank (moe.first_units) are views with gaps, which not every kernel takes.
    operands = [operand.contiguous() for operand in _operands(bank, x_ND, weights_NK)]
    return _Experts.apply(_Grouped, dispatch(expert_ids_NK, len(bank.w1)), *operands)


def run_reference(bank: Bank, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
    """The obvious way: every expert on every token, then pick. Costs E / K times as much."""
    hidden = F.gelu(torch.einsum("nd,ehd->neh", x_ND, bank.w1) + bank.b1)
    out_NED = torch.einsum("neh,edh->ned", hidden, bank.w2) + bank.b2
    combine_NE = torch.zeros_like(out_NED[..., 0]).scatter_add(1, expert_ids_NK, weights_NK.to(out_NED.dtype))
    return torch.einsum("ne,ned->nd", combine_NE, out_NED)


EXECUTIONS = {"sorted": run_sorted, "grouped": run_grouped, "reference": run_reference}


def choose_execution(name: str, bank: Bank, x_ND: Tensor) -> str:
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
