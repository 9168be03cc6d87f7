"""Router semantics against hand-worked numbers."""

import math

import pytest
import torch

from m3vit.models.router import Router, importance_loss, load_loss, route, squared_cv


def test_softmax_over_all_experts_then_top_k_without_renormalisation() -> None:
    # softmax(log 1, log 2, log 4, log 1) = 1/8, 2/8, 4/8, 1/8; the two best are experts 2 and 1, with 4/8 and 2/8:
    # they sum to 3/4, not 1 (M3ViT's code keeps them so).
    logits = torch.tensor([[[0.0, math.log(2), math.log(4), 0.0]]])
    routing = route(logits, top_k=2)
    assert routing.expert_ids_RNK.tolist() == [[[2, 1]]]
    torch.testing.assert_close(routing.weights_RNK, torch.tensor([[[0.5, 0.25]]]))
    torch.testing.assert_close(routing.scores_RNE, torch.tensor([[[0.125, 0.25, 0.5, 0.125]]]))


def test_logits_decide_where_softmax_rounds_their_differences_away() -> None:
    routing = route(torch.tensor([[[1e-9, 3e-9, -1e-9, 2e-9]]]), top_k=3)
    assert routing.scores_RNE.unique().tolist() == [0.25]
    assert routing.expert_ids_RNK.tolist() == [[[1, 3, 0]]]


def test_each_task_has_its_own_gate() -> None:
    router = Router(dim=2, num_experts=2, top_k=1, num_tasks=2, kind="multi")
    with torch.no_grad():
        router.gates[0].copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        router.gates[1].copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    x = torch.tensor([[3.0, 1.0]])  # task 0: logits (3, 1); task 1: logits (1, 3)
    routing = router(x.expand(2, 1, 2), (0, 1))
    assert routing.expert_ids_RNK[:, 0, 0].tolist() == [0, 1]
    best = 1 / (1 + math.exp(-2))  # softmax of a gap of 2
    torch.testing.assert_close(routing.weights_RNK[:, 0, 0], torch.tensor([best, best]))
    swapped = router(x.expand(1, 1, 2), (1,))
    assert swapped.expert_ids_RNK.item() == 1, "a task is found by its id, not by its place in the call"


def test_task_conditioned_gate_equals_the_gate_on_token_and_embedding() -> None:
    torch.manual_seed(0)
    router = Router(dim=3, num_experts=4, top_k=4, num_tasks=3, kind="task_conditioned")
    x = torch.randn(5, 3)
    for task_id in range(3):
        embedding = router.task_embedding(torch.eye(3)[task_id])
        expected = torch.cat([x, embedding.expand(5, -1)], dim=1) @ router.gates[0].T
        weight, bias = router.gate(task_id)
        torch.testing.assert_close(x @ weight.T + bias, expected)


def test_single_router_ignores_the_task() -> None:
    router = Router(dim=3, num_experts=4, top_k=2, num_tasks=3, kind="single")
    x = torch.randn(1, 5, 3).expand(3, -1, -1)
    ids = router(x, (0, 1, 2)).expert_ids_RNK
    assert (ids == ids[:1]).all()
    assert len(router.gates) == 1


def test_noise_is_for_training_only() -> None:
    router = Router(dim=3, num_experts=4, top_k=2, num_tasks=1, kind="multi", noise=5.0)
    x = torch.randn(1, 64, 3)
    quiet = router.eval()(x, (0,)).scores_RNE
    torch.testing.assert_close(router(x, (0,)).scores_RNE, quiet, rtol=0, atol=0)
    assert not torch.allclose(router.train()(x, (0,)).scores_RNE, quiet)


def test_squared_coefficient_of_variation() -> None:
    # mean 2/3; deviations (1/3, 1/3, -2/3); unbiased variance (1/9 + 1/9 + 4/9) / 2 = 1/3; CV^2 = (1/3) / (4/9) = 3/4
    assert squared_cv(torch.tensor([1.0, 1.0, 0.0])).item() == pytest.approx(0.75)
    assert squared_cv(torch.tensor([2.0, 2.0, 2.0])).item() == 0


def test_importance_and_load_losses() -> None:
    # Two tokens, three experts, top-1: token 0 -> expert 0 with 0.6, token 1 -> expert 1 with 0.6.
    scores = torch.tensor([[[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]]])
    weights, ids = scores.max(dim=-1, keepdim=True)
    # Summed weights (0.6, 0.6, 0): CV^2 does not change with scale, so 3/4 as above. Load (1, 1, 0): 3/4 too.
    assert importance_loss(scores, weights, ids).item() == pytest.approx(0.75)
    assert load_loss(ids, 3).item() == pytest.approx(0.75)
    two_tasks = torch.cat([ids, ids])
    assert load_loss(two_tasks, 3).item() == pytest.approx(1.5), "tasks are summed"
