"""Router semantics against hand-worked numbers."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from m3vit.models.router import Router, Routing, expert_load, route
from m3vit.training.routing_losses import (
    SUMS,
    RoutingSums,
    chosen_probability,
    entropy,
    importance_loss,
    load_loss,
    mutual_information,
    routing_sums,
    squared_cv,
    switch_loss,
    z_loss,
)

LOSSES = (importance_loss, load_loss, switch_loss, z_loss, mutual_information)


def summed(routing: Routing) -> RoutingSums:
    """Return all sums of a routing; without logits, all but theirs."""
    return routing_sums(routing, [field for field in SUMS if field != "squares_R" or routing.logits_RNE is not None])


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


@pytest.mark.parametrize("kind", ["multi", "task_conditioned"])
def test_autocast_does_not_reach_the_router(kind: str) -> None:
    torch.manual_seed(0)
    router = Router(dim=64, num_experts=16, top_k=4, num_tasks=2, kind=kind, noise=1.0, learned_noise=True).eval()
    with torch.no_grad():
        for gate in router.gates:  # four copies of an MLP in four parts, as up-cycling has them
            gate.copy_(gate[:4].repeat_interleave(4, dim=0) * 1e-6)
    x = torch.nn.functional.layer_norm(torch.randn(2, 2048, 64), (64,))
    expected = router(x, (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x, (0, 1))
        assert router.train()(x.bfloat16(), (0, 1)).noisy_RNE.dtype == torch.float32
    assert torch.equal(found.logits_RNE, expected.logits_RNE) and torch.equal(found.weights_RNK, expected.weights_RNK)
    # In bfloat16 some tokens would have two copies of equal logits, and get parts of both.
    assert torch.equal((found.expert_ids_RNK % 4).sort(dim=-1).values, torch.arange(4).expand(2, 2048, 4))


def test_squared_coefficient_of_variation() -> None:
    # mean 2/3; deviations (1/3, 1/3, -2/3); unbiased variance (1/9 + 1/9 + 4/9) / 2 = 1/3; CV^2 = (1/3) / (4/9) = 3/4
    assert squared_cv(torch.tensor([1.0, 1.0, 0.0])).item() == pytest.approx(0.75)
    assert squared_cv(torch.tensor([2.0, 2.0, 2.0])).item() == 0


def test_importance_and_load_losses() -> None:
    # Two tokens, three experts, top-1: token 0 -> expert 0 with 0.6, token 1 -> expert 1 with 0.6.
    scores = torch.tensor([[[0.6, 0.3, 0.1], [0.3, 0.6, 0.1]]])
    weights, ids = scores.max(dim=-1, keepdim=True)
    # Summed weights (0.6, 0.6, 0): CV^2 does not change with scale, so 3/4 as above. Load (1, 1, 0): 3/4 too.
    routing = Routing(scores, weights, ids)
    assert importance_loss(summed(routing)).item() == pytest.approx(0.75)
    assert load_loss(summed(routing)).item() == pytest.approx(0.75)
    two_tasks = Routing(*(torch.cat([tensor, tensor]) for tensor in routing[:3]))
    assert load_loss(summed(two_tasks)).item() == pytest.approx(1.5), "tasks are summed"


def test_switch_loss() -> None:
    # Two tokens, two experts, top-1, both to expert 0: f = (1, 0), P = ((0.9 + 0.7) / 2, ...) = (0.8, 0.2).
    scores = torch.tensor([[[0.9, 0.1], [0.7, 0.3]]])
    weights, ids = scores.max(dim=-1, keepdim=True)
    assert switch_loss(summed(Routing(scores, weights, ids))).item() == pytest.approx(2 * 0.8)
    even = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    spread = Routing(even, even[..., :1], torch.tensor([[[0], [1]]]))
    assert switch_loss(summed(spread)).item() == pytest.approx(1), "1 when balanced"


def test_z_loss() -> None:
    # logsumexp of (0, 0) is log 2; of (log 3, 0): log 4
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert z_loss(summed(route(logits, 1)._replace(logits_RNE=logits))).item() == pytest.approx(expected)


def test_mutual_information() -> None:
    def of(*scores: list[list[float]]) -> float:
        table = torch.tensor(scores)
        routing = Routing(table, table[..., :1], torch.zeros(len(scores), 1, 1).long())
        return mutual_information(summed(routing)).item()

    # Each task its own expert: I = log 2. The same for both: 0.
    assert of([[1.0, 0.0]], [[0.0, 1.0]]) == pytest.approx(math.log(2))
    assert of([[0.3, 0.7]], [[0.3, 0.7]]) == pytest.approx(0)
    # P(e | t) = (3/4, 1/4), (1/4, 3/4): H(E) = log 2, H(E | T) = -(3/4 log 3/4 + 1/4 log 1/4)
    given = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert of([[0.75, 0.25]], [[0.25, 0.75]]) == pytest.approx(math.log(2) - given)


@pytest.mark.parametrize("learned", [False, True])
def test_smooth_load_is_the_chance_of_being_chosen_again(learned: bool) -> None:
    """Against the frequency over fresh draws of one expert's noise, the others' kept (Shazeer et al., appendix A)."""
    torch.manual_seed(0)
    router = Router(3, num_experts=5, top_k=2, num_tasks=1, kind="multi", noise=2.0, learned_noise=learned).train()
    x = torch.randn(1, 1, 3)
    routing = router(x, (0,))
    logits, noisy, std = routing.logits_RNE, routing.noisy_RNE, routing.noise_std.expand(1, 1, 5)
    assert not torch.equal(logits, noisy)
    draws = 20000
    for expert in range(5):
        again = noisy.expand(draws, 1, 5).clone()
        again[..., expert] = logits[0, 0, expert] + torch.randn(draws, 1) * std[0, 0, expert]
        frequency = (again.topk(2, dim=-1).indices == expert).any(dim=-1).float().mean()
        # 4 standard errors of a share over 20,000 draws
        assert chosen_probability(routing)[0, 0, expert].item() == pytest.approx(frequency.item(), abs=0.015)
    loss = load_loss(summed(routing))
    loss.backward()
    assert router.gates[0].grad.abs().sum() > 0, "with noise the load has a gradient"
    if learned:
        assert router.noise_gates[0].grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["multi", "task_conditioned"])
def test_restricted_experts_are_never_chosen(kind: str) -> None:
    torch.manual_seed(0)
    router = Router(4, num_experts=6, top_k=2, num_tasks=2, kind=kind, noise=1.0, allowed=[[1, 3, 4], None]).train()
    routing = router(torch.randn(2, 500, 4), (0, 1))
    assert set(routing.expert_ids_RNK[0].flatten().tolist()) == {1, 3, 4}
    assert set(routing.expert_ids_RNK[1].flatten().tolist()) == set(range(6))
    assert (routing.scores_RNE[0, :, [0, 2, 5]] == 0).all()
    torch.testing.assert_close(routing.scores_RNE.sum(dim=-1), torch.ones(2, 500))
    # Balance is asked among the three: (a, b, c) evenly used costs nothing.
    even = torch.tensor([[[0, 1 / 3, 0, 1 / 3, 1 / 3, 0]]])
    perfect = Routing(even.expand(1, 3, 6), even[..., 1:2].expand(1, 3, 1), torch.tensor([[[1], [3], [4]]]))
    perfect = perfect._replace(allowed_RE=router.allowed_RE[:1])
    assert importance_loss(summed(perfect)).item() == pytest.approx(0, abs=1e-6)
    assert load_loss(summed(perfect)).item() == pytest.approx(0, abs=1e-6)
    assert switch_loss(summed(perfect)).item() == pytest.approx(1)


def token_by_token(routing: Routing) -> dict[Callable[[RoutingSums], Tensor], float]:
    """Compute every loss from its formula, in loops over tasks, tokens and choices, in float64."""
    R, N, E = routing.scores_RNE.shape
    K = routing.weights_RNK.shape[-1]
    scores, weights = routing.scores_RNE.double(), routing.weights_RNK.double()
    found = dict.fromkeys(LOSSES, 0.0)
    for task in range(R):
        importance, load, chosen = [0.0] * E, [0.0] * E, [0] * E
        for token in range(N):
            for slot in range(K):
                expert = int(routing.expert_ids_RNK[task, token, slot])
                importance[expert] += float(weights[task, token, slot])
                chosen[expert] += 1
            for expert in range(E if routing.noise_std is not None else 0):
                others = torch.cat(
                    [routing.noisy_RNE[task, token, :expert], routing.noisy_RNE[task, token, expert + 1 :]]
                )
                std = routing.noise_std.expand(R, N, E)[task, token, expert].double()
                above = routing.logits_RNE[task, token, expert].double() - others.double().sort().values[-K]
                load[expert] += 0.5 * (1 + math.erf(float(above / std) / math.sqrt(2)))
        if routing.noise_std is None:
            load = [float(count) for count in chosen]
        usable = [e for e in range(E) if routing.allowed_RE is None or routing.allowed_RE[task, e]]
        for loss, values in ((importance_loss, importance), (load_loss, load)):
            some = torch.tensor([values[expert] for expert in usable], dtype=torch.float64)
            found[loss] += float(some.var() / some.mean() ** 2)
        for expert in usable:
            share = chosen[expert] / sum(chosen)
            found[switch_loss] += len(usable) * share * float(scores[task, :, expert].mean())
        for token in range(N):
            found[z_loss] += math.log(float(routing.logits_RNE[task, token].double().exp().sum())) ** 2 / (R * N)
        for expert in usable:
            given, all_tasks = float(scores[task, :, expert].mean()), float(scores[:, :, expert].mean())
            found[mutual_information] += given * math.log(given / all_tasks) / R
    return found


@torch.no_grad()
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize(("noise", "learned"), [(0.0, False), (2.0, False), (2.0, True)])
def test_sums_of_parts_add_up_and_give_the_losses(noise: float, learned: bool, restricted: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    for seed in range(5):
        torch.manual_seed(seed)
        allowed = [[0, 2, 3, 5], None, [1, 2, 4]] if restricted else ()
        router = Router(4, 6, 2, 3, "multi", noise, learned_noise=learned, allowed=allowed).train()
        routing = router(torch.randn(3, 60, 4), (0, 1, 2))
        whole = summed(routing)
        cuts = [0, *torch.randint(0, 61, (3,), generator=generator).sort().values.tolist(), 60]  # parts may be empty
        parts = [
            summed(Routing(*(f[:, a:b] if f is not None and f.ndim == 3 else f for f in routing)))
            for a, b in pairwise(cuts)
        ]
        fields = ("tokens", *SUMS)
        added = whole._replace(**{name: sum(getattr(part, name) for part in parts) for name in fields})
        for name in fields:
            torch.testing.assert_close(getattr(added, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
        for loss, expected in token_by_token(routing).items():
            for sums in (whole, added):
                assert loss(sums).item() == pytest.approx(expected, rel=1e-4, abs=1e-6), loss.__name__


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [0, 20])
def test_losses_and_gradients_are_finite_whatever_is_empty(tokens: int, noise: float) -> None:
    """No tokens at all, or experts whose scores are all 0."""
    torch.manual_seed(0)
    router = Router(4, 6, 2, 2, "multi", noise, learned_noise=True, allowed=[[1, 3, 4], None]).train()
    sums = summed(router(torch.randn(2, tokens, 4), (0, 1)))
    losses = torch.stack([loss(sums) for loss in LOSSES])
    assert losses.isfinite().all() and (tokens > 0 or (losses == 0).all())
    losses.sum().backward()
    for gate in router.gates:
        assert gate.grad.isfinite().all() and (tokens == 0) == (gate.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_small_floats_are_taken_in_float32(dtype: torch.dtype) -> None:
    # bfloat16 has 8 bits, so that a running sum of such scores stops growing before 256; float16 ends at 65504.
    logits = torch.tensor([3.0, 2.0, 1.0], dtype=dtype).expand(1, 200_000, 3)
    routing = route(logits, 1)._replace(logits_RNE=logits, noisy_RNE=logits, noise_std=logits[..., :1] / 4)
    assert routing.scores_RNE.dtype == dtype
    sums = summed(routing)
    score = routing.scores_RNE[0, 0].double()
    torch.testing.assert_close(sums.scores_RE[0], (200_000 * score).float(), rtol=1e-6, atol=0)
    assert sums.weights_RE[0].tolist() == pytest.approx([200_000 * score[0].item(), 0, 0], rel=1e-6)
    assert sums.squares_R.item() == pytest.approx(200_000 * math.log(math.e + math.e**2 + math.e**3) ** 2, rel=1e-5)
    # The best is above the second by 1, the others below the best by 1 and 2; the deviation is 3/4.
    ndtr = [0.5 * (1 + math.erf(gap / 0.75 / math.sqrt(2))) for gap in (1, -1, -2)]
    assert sums.load_RE[0].tolist() == pytest.approx([200_000 * share for share in ndtr], rel=1e-5)


def test_only_the_sums_asked_for_are_taken() -> None:
    routing = route(torch.randn(2, 5, 4), 2)  # no logits: squares_R could not be computed
    sums = routing_sums(routing, ["scores_RE"])
    assert [name for name, value in sums._asdict().items() if value is not None] == ["tokens", "scores_RE"]
    assert sums.tokens.item() == 5


def test_entropy_by_hand_and_at_zero() -> None:
    p = torch.tensor([0.5, 0.25, 0.25, 0.0], requires_grad=True)
    assert entropy(p).item() == pytest.approx(1.5 * math.log(2))
    entropy(p).backward()
    torch.testing.assert_close(p.grad[:3], -p.detach()[:3].log() - 1)
    assert p.grad[3].isfinite() and p.grad[3] > 0


def test_expert_load_counts() -> None:
    ids = torch.tensor([[[0, 2], [2, 1]], [[3, 0], [0, 3]]])
    assert expert_load(ids, 4).tolist() == [[1, 1, 2, 0], [2, 0, 0, 2]]
    assert expert_load(ids[:, :0], 4).tolist() == [[0] * 4] * 2
