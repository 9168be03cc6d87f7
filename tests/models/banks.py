"""Banks of experts on routings where things go wrong first, for tests on the CPU and on GPUs."""

from collections.abc import Callable

import torch
from torch import Tensor

from m3vit.models.experts import ExpertBank
from m3vit.models.moe import first_units

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


def outputs_and_gradients(
    execute: Callable[..., Tensor],
    name: str,
    dtype: torch.dtype,
    width: int = D,
    hidden: int = H,
    device: str = "cpu",
) -> list[Tensor]:
    """Run a bank on a routing; return the output and the gradients of tokens, weights and parameters.

    All are drawn on the CPU: the same on every device.
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    bank = ExpertBank(E, width, hidden).to(device, dtype)
    ids = ROUTINGS[name](generator).to(device)
    drawn = [torch.randn(len(ids), width, generator=generator, dtype=torch.float64) for _ in range(2)]
    x, probe = (value.to(device, dtype) for value in drawn)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64).to(device, dtype)
    leaves = [x.requires_grad_(), weights.requires_grad_(), *bank.parameters()]
    y = execute(bank, x, weights, ids)
    return [y, *torch.autograd.grad((y * probe).sum(), leaves)]


def part_of(execute: Callable[..., Tensor], width: int) -> Callable[..., Tensor]:
    """Return the execution of a bank's first hidden units alone."""
    return lambda bank, *rest: execute(first_units(bank, width), *rest)


def assert_close(fast: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Assert that each tensor is within a tolerance of the float64 one, relative to its largest value."""
    for found, reference in zip(fast, expected, strict=True):
        assert found.isfinite().all()
        scale = float(reference.detach().abs().max()) if reference.numel() else 0.0
        torch.testing.assert_close(found.cpu().double(), reference, rtol=0, atol=tolerance * scale)
