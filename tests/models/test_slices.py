"""The beginnings of parameters: their gradients, added where they are, are autograd's."""

import pytest
import torch
from torch import Tensor

from m3vit.models.slices import first, gradients_in_place


def gradients(in_place: bool, before: bool, dim: int, count: int) -> tuple[Tensor, Tensor]:
    """The gradient of a parameter, and of another that is used whole, after two passes."""
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(6, 8)), torch.nn.Parameter(torch.randn(1))
    if before:
        (weight.square().sum() * bias).backward()
    with gradients_in_place() if in_place else torch.enable_grad():
        (first(weight, dim, count).square().sum() * bias + first(weight, 1 - dim, 3).sum()).backward()
    assert weight.grad is not None and bias.grad is not None
    return weight.grad, bias.grad


@pytest.mark.parametrize(("dim", "count"), [(0, 2), (1, 5), (0, 6)])
@pytest.mark.parametrize("before", [False, True])
def test_gradients_are_those_of_plain_slices(dim: int, count: int, before: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(6, 8)), torch.nn.Parameter(torch.randn(1))
    if before:
        (weight.square().sum() * bias).backward()
    part = weight.narrow(dim, 0, count)
    (part.square().sum() * bias + weight.narrow(1 - dim, 0, 3).sum()).backward()
    for in_place in (False, True):
        found = gradients(in_place, before, dim, count)
        torch.testing.assert_close(found, (weight.grad, bias.grad))


def test_outside_gradients_are_returned_as_ever() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.zeros(4)
    (found,) = torch.autograd.grad((2 * first(weight, 0, 3)).sum(), weight)
    assert found.tolist() == [2, 2, 2, 0] and not weight.grad.any()
    assert first(weight, 0, 4) is weight
