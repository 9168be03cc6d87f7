"""Sorted execution against the obvious reference, forward and backward, on the routings that go wrong first."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from m3vit.models.experts import ExpertBank, dispatch, run_reference, run_sorted

N, D, H, E, K = 37, 6, 5, 4, 2


def random_ids(generator: torch.Generator) -> Tensor:
    return torch.rand(N, E, generator=generator).topk(K).indices


ROUTINGS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "random": random_ids,
    "all tokens on the same experts": lambda g: torch.tensor([2, 0]).expand(N, K),
    "an expert without tokens": lambda g: torch.rand(N, E - 1, generator=g).topk(K).indices,
    "one token": lambda g: random_ids(g)[:1],
    "every expert for every token": lambda g: torch.rand(N, E, generator=g).topk(E).indices,
    "one expert a token": lambda g: random_ids(g)[:, :1],
    "no token": lambda g: random_ids(g)[:0],
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_sorted_equals_reference_with_gradients(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    bank = ExpertBank(E, D, H).double()
    ids = ROUTINGS[name](generator)
    x = torch.randn(len(ids), D, generator=generator, dtype=torch.float64)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    probe = torch.randn(len(ids), D, generator=generator, dtype=torch.float64)
    results = []
    for execute in (run_reference, run_sorted):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_(), *bank.parameters()]
        y = execute(bank, leaves[0], leaves[1], ids)
        gradients = torch.autograd.grad((y * probe).sum(), leaves)
        results.append([y, *gradients])
    for reference, fast in zip(*results, strict=True):
        # float64: only the order of sums differs, so 1e-12 leaves three digits of room.
        torch.testing.assert_close(fast, reference, rtol=1e-12, atol=1e-12)


def test_ties_send_a_token_to_distinct_experts() -> None:
    from m3vit.models.router import route

    routing = route(torch.zeros(1, N, E), K)  # all experts equally good
    assert all(len(set(row.tolist())) == K for row in routing.expert_ids_RNK[0])
    torch.testing.assert_close(routing.weights_RNK, torch.full((1, N, K), 1 / E))
    bank = ExpertBank(E, D, H).double()
    x = torch.randn(N, D, dtype=torch.float64)
    arguments = (bank, x, routing.weights_RNK[0].double(), routing.expert_ids_RNK[0])
    torch.testing.assert_close(run_sorted(*arguments), run_reference(*arguments), rtol=1e-12, atol=1e-12)


def test_dispatch_groups_by_expert_in_token_order() -> None:
    # (token, slot) pairs in flat order: 0:e1 1:e0 | 2:e0 3:e2 | 4:e1 5:e0
    groups = dispatch(torch.tensor([[1, 0], [0, 2], [1, 0]]), num_experts=4)
    assert groups.counts_E.tolist() == [3, 2, 1, 0]
    assert groups.order_S.tolist() == [1, 2, 5, 0, 4, 3]
    assert groups.order_S[groups.inverse_S].tolist() == list(range(6))


def test_gradient_of_the_permutation_numerically() -> None:
    bank = ExpertBank(3, 2, 2).double()
    ids = torch.tensor([[0, 2], [2, 1], [1, 0]])
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: run_sorted(bank, x, w, ids), (x, weights))
