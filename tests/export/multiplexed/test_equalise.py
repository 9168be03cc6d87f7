"""Models whose channels were given like reach: what they compute stays, what 8 bits lose of it does not."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.export.hls import leaf
from m3vit.export.hls.budgets import lowered_of
from m3vit.export.hls.equalise import equalise
from m3vit.export.hls.magnitudes import OCTAVES, Magnitudes, octave_sums
from m3vit.export.hls.magnitudes import largest as largest_of
from m3vit.export.hls.multiplexed import formats, schedule
from m3vit.export.hls.multiplexed.formats import narrow_frac, squared_error
from m3vit.hw.sim.csim import tokenise
from m3vit.models.budget import FULL, Budget
from m3vit.models.multitask import MultiTaskModel
from tests.export.models import TASKS, make_images, make_model
from tests.export.multiplexed.exporting import export

CONFIGS: list[dict[str, Any]] = [
    {"moe_blocks": "odd"},
    {"moe_blocks": [0, 1], "head": "conv", "head_stride": 4, "head_args": {"width": 6, "blocks": 2}},
    {"moe_blocks": "none", "trunk_args": {"class_token": True, "pre_norm": True}},
]
HIDDEN = Budget(width={0: 32})


def outlying(model: MultiTaskModel) -> MultiTaskModel:
    """Give some channels of LayerNorms, queries, keys and values a reach far beyond the others'."""
    with torch.no_grad():
        for block in model.backbone.trunk.blocks:
            block.norm1.weight[::7] *= 30  # type: ignore[union-attr, operator]
            block.norm2.weight[3::9] *= 20  # type: ignore[union-attr, operator]
            block.attn.qkv.weight[2::31] *= 3  # type: ignore[union-attr, operator]
            block.attn.qkv.bias[32:64] += 4  # type: ignore[union-attr, operator]
            block.attn.qkv.weight.view(3, 32, 32)[:, :, ::7] /= 30  # type: ignore[union-attr, operator]
    return model


def outputs(model: leaf.LoweredModel, images: np.ndarray) -> torch.Tensor:
    tokens = torch.from_numpy(tokenise(images, model.patch)).double()
    with torch.no_grad():
        ids = (torch.full((len(images), 1), float(task)) for task in range(len(TASKS)))
        return torch.stack([model.double()(tokens, task.double()) for task in ids])


@pytest.mark.parametrize("config", CONFIGS)
def test_the_model_computes_what_it_did(config: dict[str, Any]) -> None:
    model, images = outlying(make_model(**config)), make_images(3)
    before, changed = leaf.lower(model), leaf.lower(model)
    equalise([changed], images)
    for block, old in zip(changed.blocks, before.blocks, strict=True):
        assert not torch.allclose(block.qkv.weight, old.qkv.weight)
    other = make_images(2, seed=5)  # of which it saw nothing
    torch.testing.assert_close(outputs(changed, other), outputs(before, other), rtol=1e-4, atol=1e-4)


def test_parts_of_a_model_go_on_sharing_its_weights() -> None:
    model, images = outlying(make_model(moe_blocks="odd")), make_images(3)
    whole, part = lowered_of(model, [FULL, HIDDEN])
    expected = outputs(lowered_of(model, [FULL, HIDDEN])[1], images)
    equalise([whole, part], images)
    torch.testing.assert_close(part.blocks[0].fc1.weight, whole.blocks[0].fc1.weight[:32])
    torch.testing.assert_close(part.head.weight, whole.head.weight)
    torch.testing.assert_close(outputs(part, images), expected, rtol=1e-4, atol=1e-4)


def test_channels_reach_alike_and_keys_are_centred() -> None:
    model, images = outlying(make_model(moe_blocks="odd")), make_images(4)
    spread = {}
    for name in ("before", "after"):
        lowered = leaf.lower(model)
        if name == "after":
            equalise([lowered], images)
        seen: dict[str, torch.Tensor] = {}
        for layer in ("norm1", "norm2", "qkv"):

            def keep(_: Any, inputs: Any, value: torch.Tensor, layer: str = layer, seen: Any = seen) -> None:
                seen[layer] = value.flatten(0, -2)

            lowered.blocks[0].get_submodule(layer).register_forward_hook(keep)
        with torch.no_grad():
            lowered(torch.from_numpy(tokenise(images, lowered.patch)), torch.zeros(4, 1))
        reach = {layer: value.abs().amax(0) for layer, value in seen.items()}
        spread[name] = {layer: float(value.amax() / value.median()) for layer, value in reach.items()}
        keys = seen["qkv"][:, 32:64]
        middle = (keys.amax(0) + keys.amin(0)).abs().amax() / keys.abs().amax()
        assert middle < 1e-5 if name == "after" else middle > 0.5
    for layer in ("norm1", "norm2"):
        assert spread["after"][layer] < 0.5 * spread["before"][layer], layer


@pytest.mark.parametrize("bits", [8, 10])
def test_squared_errors_are_those_of_rounding_and_clipping(bits: int) -> None:
    values = torch.from_numpy(np.random.default_rng(0).standard_t(3, 20_000)).float()
    # In two parts, as calibration sees them: what is large in one is not in the other.
    parts, largest = (values[:100], values[100:]), largest_of(values)
    octaves = sum(octave_sums(part, max(map(largest_of, parts[: place + 1]))) for place, part in enumerate(parts))
    holds = narrow_frac(largest, bits)
    errors = {}
    for frac in (holds, holds + 1):
        most = 2 ** (bits - 1) - 1
        raw = torch.floor(values.double() * 2.0**frac + 0.5).clamp(-most, most)
        errors[frac] = float(((raw * 2.0**-frac - values.double()) ** 2).sum())
        assert squared_error(octaves, frac, bits) == pytest.approx(errors[frac], rel=0.05)
    chosen = narrow_frac(largest, bits, octaves)
    assert chosen == min(errors, key=lambda frac: errors[frac])
    assert bits > 8 or chosen == holds + 1  # few values are that large
    uniform = torch.linspace(-largest, largest, 1000)
    assert narrow_frac(largest, bits, octave_sums(uniform, largest)) == holds


def test_octave_sums() -> None:
    sums = octave_sums(torch.tensor([[0.75, -0.5], [0.25, 0.0], [-1.0, 0.5]]), 1.0)
    half = OCTAVES // 2  # 2^-1 <= |v| < 1
    assert sums[:, 0].tolist() == [2, 0, 0]
    assert sums[:, half].tolist() == [3, 1.75, 1.0625] and sums[:, half + 1].tolist() == [1, 1, 1]
    assert sums[0].sum() == 6 and sums[1].sum() == 2.75
    for reached in (0.0, 3.0):  # of zeros; of values below half of what came before
        found = octave_sums(torch.full((5,), reached / 4), reached)
        assert found[0].tolist() == [5] + [0] * (OCTAVES - 1) and not found[1:].any()


def test_magnitudes_noted_apart_are_those_noted_together() -> None:
    parts = [torch.randn(50), 3 * torch.randn(70)]
    together, first, second = (Magnitudes(with_octaves=True) for _ in range(3))
    for one, part in zip((first, second), parts, strict=True):
        one.note("x", part)
        together.note("x", part)
    second.note("y", parts[0])
    first.take(second)
    assert first == {"x": together["x"], "y": largest_of(parts[0])} and first.keys() == first.octaves.keys()
    top = OCTAVES // 2 + math.frexp(first["x"])[1]  # what is clipped lies in the octave of the largest
    assert torch.equal(first.octaves["x"][:, top], together.octaves["x"][:, top])
    assert first.octaves["x"][0].sum() == together.octaves["x"][0].sum() == 120
    assert torch.equal(first.octaves["y"], octave_sums(parts[0], largest_of(parts[0])))


def test_eight_bits_lose_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = outlying(make_model(moe_blocks="odd")), make_images(3, seed=3)
    exact = outputs(leaf.lower(model), images).permute(1, 0, 2, 3).numpy()
    errors = {}
    for name in ("equalised", "as it is"):
        if name == "as it is":
            monkeypatch.setattr(schedule, "equalise", lambda *arguments: None)
        manifest = export(model, tmp_path / name, weight_bits=8, act_bits=8)
        found = schedule.runner(tmp_path / name, manifest).run(images)
        errors[name] = float(((found - exact) ** 2).mean())
    assert errors["equalised"] < 0.5 * errors["as it is"]


def test_only_few_bits_need_it() -> None:
    assert [bits for bits in formats.LIMITS["act_bits"] if formats.few(bits)] == [8, 10]
