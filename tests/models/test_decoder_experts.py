"""Experts of the decoder `taskexpert` that are left out or of low rank, against the slow way."""

from typing import Any

import pytest
import torch
from torch import Tensor

from m3vit.errors import InputError
from m3vit.models.budget import Budget
from m3vit.models.decoders.taskexpert import Experts, assemble
from m3vit.models.multitask import MultiTaskModel
from tests.models.test_layered import GRID, HEADS, TASKEXPERT, drawn, make


@torch.no_grad()
@pytest.mark.parametrize("kept", [None, (2,), (0, 2)])
def test_experts_of_low_rank_are_convolutions_of_that_rank(kept: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    low, full = drawn(Experts(7, 4, 3, [1, 2, 3])), Experts(7, 4, 3)
    full.norm, full.project = low.norm, low.project
    kernels = []
    for down, up, rank in zip(low.bank.down.weight.split([1, 2, 3]), low.bank.up, (1, 2, 3), strict=True):
        kernels.append(torch.einsum("or,rihw->oihw", up.weight[:, :, 0, 0], down))
        assert torch.linalg.matrix_rank(kernels[-1].flatten(1)) == rank
    full.bank.weight.copy_(torch.cat(kernels))
    full.bank.bias.copy_(torch.cat([up.bias for up in low.bank.up]))
    tokens = torch.randn(2, 2, 6, 7)
    for one, other in zip(low(tokens, GRID, kept), full(tokens, GRID, kept), strict=True):
        torch.testing.assert_close(one, other)


def cut(model: MultiTaskModel, task: str, kept: dict[int, tuple[int, ...]]) -> dict[str, Tensor]:
    """What a task has where the weights of the experts that it does not keep are 0: the slow way, none left out."""
    images = torch.ones(1, 3, 24, 40)
    features, _ = model.backbone(images, tuple(range(3)), model.heads.blocks)
    decoder, position = model.heads, model.config.tasks.index(task)
    memory = decoder.own[task].start.expand(1, 15, -1)
    for place, block in enumerate(decoder.blocks):
        projected, parts = decoder.shared[place](features.of(block)[position][None], features.grid)
        step = decoder.own[task].steps[place]
        read = None if step.read is None else step.read(memory)
        weights = step.gate(projected[0] if read is None else projected[0] + read)
        for expert in set(range(3)) - set(kept.get(block, range(3))):
            weights = weights.index_fill(2, torch.tensor([expert]), 0.0)
        memory = step.update(memory, assemble(weights, parts[0], read))
    return {task: decoder.outputs[task](memory, features.grid, (24, 40))}


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"memory": False}, {"rank": [1, 2, 3]}], ids=str)
@pytest.mark.parametrize("moe_blocks", ["odd", "none"])
def test_experts_left_out_are_experts_of_weight_0(moe_blocks: str, changes: dict[str, Any]) -> None:
    model = make(moe_blocks=moe_blocks, head_args=TASKEXPERT | changes).eval()
    kept = {"depth": {0: (1,), 3: (0, 2)}, "edge": {0: (1, 2), 3: (2,)}}
    found = model(torch.ones(1, 3, 24, 40), budget=Budget(decoder=kept)).logits
    whole = model(torch.ones(1, 3, 24, 40)).logits
    for task in model.config.tasks:
        expected = cut(model, task, kept.get(task, {}))[task]
        torch.testing.assert_close(found[task], expected, rtol=1e-4, atol=1e-5)
        alone = model(torch.ones(1, 3, 24, 40), [task], budget=Budget(decoder=kept)).logits[task]
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(found[task], whole[task], atol=1e-6) == (task == "semseg")


@pytest.mark.parametrize(
    ("head", "kept", "message"),
    [
        (HEADS[0], {"depth": {0: (3,)}}, r"decoder, depth, block 0: kept are \[3\], but its experts are 0 to 2"),
        (HEADS[0], {"depth": {7: (0,)}}, r"block 7: kept are \[0\], but it has no experts there"),
        (HEADS[1], {"depth": {0: (0,)}}, "but it has no experts there"),
        (HEADS[0], {"flow": {0: (0,)}}, "budget names task flow"),
        (HEADS[0], {"depth": {0: (1, 0)}}, "name one or more experts, ascending"),
    ],
)
def test_experts_that_the_decoder_does_not_have_are_refused(head: Any, kept: Any, message: str) -> None:
    model = make(head=head[0], head_args=head[1])
    with pytest.raises(InputError, match=message):
        model(torch.ones(1, 3, 24, 40), budget=Budget(decoder=kept))
