"""The mixture-of-experts layer: a router, then experts.

Shapes: R tasks, B images, T tokens per image, N = B * T tokens of one task, D embedding dimension, E experts, K top-k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.models.budget import LayerBudget, Use
from m3vit.models.experts import EXECUTIONS, Bank, ExpertBank, choose_execution, run_reference
from m3vit.models.router import Router, Routing, route
from m3vit.models.slices import first

TaskIds = tuple[int, ...] | Tensor  # a tensor, int64 [1], picks the one task when an exported graph runs


class MoELayer(nn.Module):
    """Replaces the MLP of a ViT block. All tasks share the experts; `router` tells them apart."""

    def __init__(self, router: Router, experts: ExpertBank, execution: str = "auto") -> None:
        super().__init__()
        self.router, self.experts, self.execution = router, experts, execution

    def forward(
        self, x_RBTD: Tensor, task_ids: TaskIds, uses: Sequence[Use] | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Return the layer's output [R, B, T, D] and its routing (R tasks of N = B * T tokens), None while exporting.

        `x` may have R = 1 for several tasks, when it is still the same for all of them. `uses`: what each task
        uses of the experts, None: as trained.
        """
        R, (_, B, T, D) = len(task_ids), x_RBTD.shape
        if torch.compiler.is_exporting():
            assert uses is None, "a graph is traced as trained; lower_moe takes the budget"
            # Nothing is expanded for one task: in a graph that would be a copy.
            stacked = x_RBTD if R == 1 or len(x_RBTD) == R else x_RBTD.expand(R, -1, -1, -1)
            return self._exported(stacked.reshape(-1, D), task_ids).view(R, B, T, D), None
        x_RND = x_RBTD.reshape(-1, B * T, D).expand(R, -1, -1)
        assert not isinstance(task_ids, Tensor), "a task that is picked at run time is for exported graphs"
        routing = self.router(x_RND, task_ids, uses)
        # One dispatch serves all tasks: tokens of every task that chose an expert run through it together.
        weights_NK, ids_NK = routing.weights_RNK.flatten(0, 1), routing.expert_ids_RNK.flatten(0, 1)
        x_ND = x_RND.reshape(-1, D)
        bank = self.experts if uses is None else first_units(self.experts, uses[0].width)
        execution = choose_execution(self.execution, bank, x_ND)
        # Where tasks differ in their top-k, all have as many slots as the most: the sorted execution leaves out those
        # that are not used. A grouped GEMM computes all rows that it is given.
        used: dict[str, Tensor] = {}
        if routing.used_RK is not None and execution == "sorted":
            used["used_NK"] = routing.used_RK[:, None].expand_as(routing.expert_ids_RNK).flatten(0, 1)
        y = EXECUTIONS[execution](bank, x_ND, weights_NK, ids_NK, **used)
        return y.view(R, B, T, D), routing

    def use(self, budget: LayerBudget) -> Use:
        """Return what a budget uses of this layer, or raise InputError if it has not as much."""
        experts, hidden, _ = self.experts.w1.shape
        return budget.resolve(experts, self.router.top_k, hidden)

    def _exported(self, x_ND: Tensor, task_ids: TaskIds) -> Tensor:
        """One node in the exported graph; m3vit.export.onnx expands it to standard operators."""
        bank = self.experts
        if isinstance(task_ids, Tensor):
            weight, bias = self.router.picked_gate(task_ids)
        elif len(task_ids) == 1:
            weight, bias = self.router.gate(task_ids[0])
        else:
            gates = zip(*(self.router.gate(task) for task in task_ids), strict=True)
            weight, bias = (torch.stack(one) for one in gates)
        return moe_op(x_ND, weight, bias, bank.w1, bank.b1, bank.w2, bank.b2, self.router.top_k)


class _Weights(NamedTuple):
    """A bank whose parameters an operator was given, or of parts of another's."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def first_units(bank: Bank, width: int) -> Bank:
    """Return a bank of the first hidden units of each expert: views of its parameters, to which gradients go."""
    if width == bank.w1.shape[1]:
        return bank
    return _Weights(first(bank.w1, 1, width), first(bank.b1, 1, width), first(bank.w2, 2, width), bank.b2)


@torch.library.custom_op("m3vit::moe", mutates_args=())
def moe_op(
    x_ND: Tensor, gate_ED: Tensor, gate_bias_E: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, top_k: int
) -> Tensor:
    """A whole MoE layer as one operator: opaque to torch.export, whose tracer cannot follow routing.

    Of R tasks: the tokens of one after those of the other, and their gates [R, E, D] and biases [R, E].
    """
    if gate_ED.ndim == 2:
        logits = F.linear(x_ND, gate_ED, gate_bias_E)[None]
    else:
        x_RND = x_ND.view(len(gate_ED), -1, x_ND.shape[-1])
        logits = torch.baddbmm(gate_bias_E[:, None], x_RND, gate_ED.transpose(1, 2))
    routing = route(logits, top_k)
    weights_NK, ids_NK = routing.weights_RNK.flatten(0, 1), routing.expert_ids_RNK.flatten(0, 1)
    return run_reference(_Weights(w1, b1, w2, b2), x_ND, weights_NK, ids_NK)


@moe_op.register_fake
def _(
    x_ND: Tensor, gate_ED: Tensor, gate_bias_E: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, top_k: int
) -> Tensor:
    return torch.empty_like(x_ND)
