"""Models of shapes alone: every function's shape and type as torch finds them, and what does not fit refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from m3vit.models.config import ModelConfig
from m3vit.models.meta import _FILLING, _SHAPES, KnownShapes
from m3vit.models.multitask import MultiTaskModel

HEADS: list[dict[str, Any]] = [
    {"head": "linear"},
    {"head": "conv"},
    {"head": "pup", "distillation": [0]},
    {"head": "multiscale", "head_args": {"blocks": [0, 1]}},
    {"head": "taskexpert", "head_args": {"blocks": [0, 1]}},
]


class Noted(TorchFunctionMode):
    """Notes the shape and type of what the functions of `_SHAPES` return within it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function in _SHAPES:
            self.found.append((function.__name__, tuple(output.shape), output.dtype))
        return output


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=lambda head: str(head["head"]))
def test_shapes_are_those_that_torch_finds(head: dict[str, Any], training: bool) -> None:
    trunk = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = ModelConfig(
        trunk="vit_tiny_patch16_224",
        trunk_args=trunk,
        image_size=(32, 48),
        tasks=["semseg", "depth"],
        moe_blocks=[1],
        num_experts=4,
        top_k=2,
        experts="reference",
        **head,
    )
    with torch.device("meta"):
        model = MultiTaskModel(config).train(training)
    images = torch.empty(2, 3, 32, 48, device="meta")
    with torch.no_grad(), Noted() as expected:
        model(images)
    with torch.no_grad(), KnownShapes(), Noted() as found:
        model(images)
    assert found.found == expected.found
    assert {"linear", "layer_norm", "interpolate"} <= {name for name, *_ in found.found}


def test_models_are_the_same() -> None:
    """Shapes, types, names and what is trained; nothing is drawn from torch's random numbers."""
    config, state = ModelConfig(moe_blocks=[1]), torch.get_rng_state()
    with torch.device("meta"):
        expected = MultiTaskModel(config)
    with KnownShapes(), torch.device("meta"):
        model = MultiTaskModel(config)

    def described(model: nn.Module) -> dict[str, tuple[Any, ...]]:
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return {name: (t.shape, t.dtype, t.device.type, t.requires_grad) for name, t in tensors.items()}

    assert described(model) == described(expected)
    assert torch.equal(torch.get_rng_state(), state)


X = torch.empty(2, 3, 4, 6, device="meta")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: F.linear(X, torch.empty(5, 7, device="meta")),
        lambda: F.linear(X, torch.empty(5, 6, device="meta"), torch.empty(4, device="meta")),
        lambda: F.scaled_dot_product_attention(X, torch.empty(2, 3, 4, 5, device="meta"), X),
        lambda: F.interpolate(X, size=(2, 3, 4)),
        lambda: F.interpolate(X, size=(4, 6), scale_factor=2),
        lambda: F.interpolate(X, scale_factor=2, mode="bilinaer"),
        lambda: F.interpolate(X, scale_factor=2, align_corners=True),
        lambda: F.interpolate(X[0], scale_factor=2, mode="bilinear"),
        lambda: F.interpolate(X, size=(0, 6)),
        lambda: F.interpolate(X, scale_factor=2, antialias=True),
        lambda: F.layer_norm(X, (5,)),
        lambda: F.layer_norm(X, (6,), torch.empty(3, device="meta")),
        lambda: F.layer_norm(X, (6,), None, torch.empty(3, device="meta")),
        lambda: F.gelu(X, approximate="erf"),
        lambda: F.scaled_dot_product_attention(X, X[:, :2], X[:, :2]),
        lambda: F.scaled_dot_product_attention(X, X, X).transpose(1, 2).view(2, 4, 18),
        lambda: X.clone().mul_(X[..., :3]),
        lambda: X.clone().add_(X[..., :5]),
        lambda: X.clone().copy_(X[..., :5]),
    ],
)
def test_what_does_not_fit_is_refused_by_torch(wrong: Callable[[], Tensor]) -> None:
    with KnownShapes(), pytest.raises((RuntimeError, ValueError)):
        wrong()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.interpolate(x, size=(7, 9), mode="bilinear", align_corners=False),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, scale_factor=1.5),
        lambda x: F.interpolate(x, size=5),
        lambda x: F.scaled_dot_product_attention(x, x, x, torch.empty(4, 4, device=x.device)),
        lambda x: F.scaled_dot_product_attention(x, x[..., :2, :], x[..., :2, :]),
        lambda x: F.scaled_dot_product_attention(x[:1], x, x),
        lambda x: F.scaled_dot_product_attention(x[0], x, x),
        lambda x: F.scaled_dot_product_attention(*x.unflatten(3, (3, 2)).unbind(3)).view(2, 3, 8),
        lambda x: F.layer_norm(x.transpose(1, 2), (6,)).view(2, 4, 18),
        lambda x: F.gelu(x, approximate="tanh"),
    ],
)
def test_ways_to_call(function: Callable[[Tensor], Tensor]) -> None:
    with KnownShapes():
        found = function(X)
    assert found.shape == function(X).shape == function(torch.rand(X.shape)).shape
    assert found.stride() == function(X).stride()


def test_tensors_with_values_are_left_alone() -> None:
    x = torch.rand(2, 3, 4, 6)
    with KnownShapes():
        changed = x.clone().mul_(2).fill_(3)
        found = F.interpolate(x, scale_factor=2)
    assert (changed == 3).all() and torch.equal(found, F.interpolate(x, scale_factor=2))
    assert all(function.__name__.endswith("_") for function in _FILLING)
