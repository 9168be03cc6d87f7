"""Sorted and grouped execution against the obvious reference, forward and backward, where routing goes wrong first."""

import pytest
import torch

from m3vit.models.experts import ExpertBank, choose_execution, dispatch, run_grouped, run_reference, run_sorted
from tests.models.banks import ROUTINGS, D, E, H, K, N, assert_close, outputs_and_gradients, part_of, random_ids


@pytest.mark.parametrize("name", ROUTINGS)
def test_sorted_equals_reference_with_gradients(name: str) -> None:
    expected = outputs_and_gradients(run_reference, name, torch.float64)
    for reference, fast in zip(expected, outputs_and_gradients(run_sorted, name, torch.float64), strict=True):
        # float64: only the order of sums differs, so 1e-12 leaves three digits of room.
        torch.testing.assert_close(fast, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_equals_reference_with_gradients(name: str, dtype: torch.dtype) -> None:
    expected = outputs_and_gradients(run_reference, name, torch.float64, 16, 24)
    # float32: 24 sums of eps 1e-7; bfloat16: eps 0.8 %, over two products and a sum of K.
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    found = outputs_and_gradients(run_grouped, name, dtype, 16, 24)
    assert all(value.dtype == dtype for value in found)
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("way", ["sorted", "grouped"])
def test_a_part_of_a_bank_equals_the_reference_of_it(name: str, way: str) -> None:
    if way == "grouped" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    fast = {"sorted": run_sorted, "grouped": run_grouped}[way]
    expected = outputs_and_gradients(part_of(run_reference, 8), name, torch.float64, 16, 24)
    assert_close(outputs_and_gradients(part_of(fast, 8), name, torch.float32, 16, 24), expected, 1e-5)


def test_execution_is_chosen_by_device_and_type() -> None:
    bank = ExpertBank(E, 16, 24)
    assert choose_execution("auto", bank, torch.zeros(2, 16)) == "sorted"
    assert choose_execution("reference", bank, torch.zeros(2, 16)) == "reference"


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
    assert groups.ends_E.tolist() == [3, 5, 6, 6]  # 3, 2, 1 and 0 rows
    assert groups.order_S.tolist() == [1, 2, 5, 0, 4, 3]
    assert groups.order_S[groups.place_NK.flatten()].tolist() == list(range(6))


def test_gradient_of_the_permutation_numerically() -> None:
    bank = ExpertBank(3, 2, 2).double()
    ids = torch.tensor([[0, 2], [2, 1], [1, 0]])
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: run_sorted(bank, x, w, ids), (x, weights))


@pytest.mark.parametrize("name", ROUTINGS)
def test_sorted_in_bfloat16_and_its_repetition(name: str) -> None:
    expected = outputs_and_gradients(run_reference, name, torch.float64, 16, 24)
    once, again = (outputs_and_gradients(run_sorted, name, torch.bfloat16, 16, 24) for _ in range(2))
    assert_close(once, expected, 0.03)  # as above
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_what_is_kept_for_the_gradient() -> None:
    # Of S rows only w1 x + b1: neither gathered tokens, nor activations, nor the experts' outputs.
    bank, x, ids = ExpertBank(E, 16, 24), torch.randn(N, 16, requires_grad=True), random_ids(torch.Generator())
    weights = torch.rand(N, K, requires_grad=True)
    kept: list[torch.Tensor] = []
    for execute in (run_sorted, run_grouped) if hasattr(torch.nn.functional, "grouped_mm") else (run_sorted,):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
            execute(bank, x, weights, ids)
        outside = [value for value in kept if value.is_floating_point() and value.shape[:1] != (E,)]
        assert sum(value.numel() for value in outside) == N * K * 24 + x.numel() + weights.numel()


@pytest.mark.parametrize("name", ROUTINGS)
def test_slots_that_are_not_used_are_not_computed(name: str) -> None:
    """Their weights are 0: results and gradients are those of computing them, but for the gradient of their weights."""
    generator = torch.Generator().manual_seed(3)
    ids = ROUTINGS[name](generator)
    used = torch.rand(ids.shape, generator=generator) < 0.6
    bank, found = ExpertBank(E, D, H), []
    for execute, more in ((run_reference, {}), (run_sorted, {"used_NK": used})):
        x, weights = (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
                      for seed, shape in enumerate([(len(ids), D), ids.shape]))  # fmt: skip
        bank.zero_grad()
        y = execute(bank, x, weights * used, ids, **more)
        (y * torch.linspace(-1, 1, D)).sum().backward()
        found.append([y, x.grad, weights.grad, *(parameter.grad for parameter in bank.parameters())])
    for wanted, one in zip(*found, strict=True):
        torch.testing.assert_close(one, wanted)
    groups = dispatch(ids, E, used)
    assert int(groups.ends_E[-1]) == int(used.sum())
