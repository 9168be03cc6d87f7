"""Channels of like reach, for activations of few bits: the model computes what it did, and loses less when quantised.

All channels of a tensor have one fraction, so the one that reaches farthest decides for all. But what a LayerNorm or a
Linear gives may be divided by a factor of each channel where what reads it is multiplied by that factor (SmoothQuant,
Xiao et al., arXiv 2211.10438), and weights have a fraction for each output:

    LayerNorm -> qkv; MLP, or experts and the routers of all tasks; heads, and the Linears that add earlier blocks
    value -> projection
    query and key: one divided, the other multiplied, so that both reach as far

And what is added to all keys alike adds the same to all logits of a query, which softmax takes away: keys are centred.
The engines run the same instructions either way.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3vit.export.hls import leaf
from m3vit.export.hls.calibration import EachTask, traced
from m3vit.export.hls.multiplexed.formats import few
from m3vit.export.hls.schedules import Progress, silent
from m3vit.hw.sim.csim import tokenise

MIGRATION = 0.7  # of a channel's reach that goes to the weights; best of 0.5, 0.7 and 0.9 on a ViT-S/14
FACTORS = (2.0**-6, 2.0**6)  # least and most
SMALL = 1e-6
IMAGES = 16  # evenly among those given: what channels reach of thousands of tokens each

EQUALISED = "equalised.npz"  # of a project: what its model was changed by
BLOCKS, FUSION, HEAD = "blocks", "fusion", "head"  # keys: blocks.NUMBER.KIND, fusion.BLOCK, head

Range = tuple[Tensor, Tensor]  # least and largest value of each channel
Changes = dict[str, Tensor]  # float32 [channels] each: factors, or of keys their middle


@torch.no_grad()
def equalise(models: Sequence[leaf.LoweredModel], images: np.ndarray, progress: Progress = silent) -> Changes:
    """Change models in place by what the first of them reaches on some of the images uint8 [m, H, W, 3].

    The others are parts of the first, of some budgets: all are changed alike, as they share weights. Return by what;
    `apply` does the same to a further one.
    """
    first: Any = models[0]
    reached = _ranges(first, images, progress)
    changes: Changes = {}
    for name, block in first.blocks.named_children():
        found = _block_change(block, *(reached[f"blocks.{name}.{layer}"] for layer in ("norm1", "norm2", "qkv")))
        changes |= {f"{BLOCKS}.{name}.{kind}": values for kind, values in found.items()}
    for name, linear in first.fusion_linears.items():
        changes[f"{FUSION}.{name}"] = _factors(_magnitude(reached[f"fusion_norms.{name}"]), linear.weight)
    changes[HEAD] = _factors(_magnitude(reached["head"]), first.head.weight)
    for model in models:
        apply(model, changes)
    return changes


@torch.no_grad()
def apply(model: leaf.LoweredModel, changes: Changes) -> None:
    """Change a model in place by what `equalise` returned for it, or for the model that it is a part of."""
    lowered: Any = model
    for name, block in lowered.blocks.named_children():
        prefix = f"{BLOCKS}.{name}."
        of_block = {key.removeprefix(prefix): values for key, values in changes.items() if key.startswith(prefix)}
        _apply_block(block, of_block)
    for name, linear in lowered.fusion_linears.items():
        _divide(lowered.fusion_norms[name], changes[f"{FUSION}.{name}"])
        linear.weight.mul_(changes[f"{FUSION}.{name}"])
    lowered.head.scale.div_(changes[HEAD])
    lowered.head.weight.mul_(changes[HEAD])


def write_changes(project: Path, changes: Changes) -> None:
    """Write down in a project by what its model was changed."""
    arrays: dict[str, Any] = {name: values.numpy() for name, values in changes.items()}
    np.savez_compressed(project / EQUALISED, **arrays)


def read_changes(project: Path) -> Changes | None:
    """Return by what a project's model was changed, or None if it was not."""
    if not (project / EQUALISED).is_file():
        return None
    with np.load(project / EQUALISED) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def changes_unknown(project: Path, manifest: dict[str, Any]) -> bool:
    """Return whether a project's model may have been changed by what was not written down yet."""
    precision = manifest["precision"]
    return "wide_frac" in precision and few(int(precision["act_bits"])) and not (project / EQUALISED).is_file()


def _block_change(block: Any, norm1: Range, norm2: Range, qkv: Range) -> Changes:
    """Return the factors of a block's LayerNorms, queries and values, and the middle of its keys."""
    low, high = (values.chunk(3) for values in qkv)
    query, value = (torch.maximum(-low[part], high[part]) for part in (0, 2))
    key, middle = (high[1] - low[1]) / 2, (high[1] + low[1]) / 2
    return {
        "norm1": _factors(_magnitude(norm1), block.qkv.weight),
        "norm2": _factors(_magnitude(norm2), *_readers(block)),
        "query": (query.clamp_min(SMALL) / key.clamp_min(SMALL)).sqrt().clamp(*FACTORS),
        "value": _factors(value, block.proj.weight),
        "key_middle": middle,
    }


def _apply_block(block: Any, change: Changes) -> None:
    _divide(block.norm1, change["norm1"])
    _divide(block.norm2, change["norm2"])
    block.qkv.weight.mul_(change["norm1"])
    for weight in _readers(block):
        weight.mul_(change["norm2"])
    (_, bias, _) = block.qkv.bias.chunk(3)
    bias.sub_(change["key_middle"])
    by = torch.cat([1 / change["query"], change["query"], 1 / change["value"]])
    block.qkv.weight.mul_(by[:, None])
    block.qkv.bias.mul_(by)
    block.proj.weight.mul_(change["value"])


def _readers(block: Any) -> list[Tensor]:
    """Return the weights [.., D] that read what a block's second LayerNorm gives."""
    return [block.moe.w1, block.moe.router_w] if block.is_moe else [block.fc1.weight]


def _divide(norm: leaf.VitLayerNorm, factors: Tensor) -> None:
    norm.scale.div_(factors)
    norm.bias.div_(factors)


def _magnitude(values: Range) -> Tensor:
    return torch.maximum(-values[0], values[1])


def _factors(reached: Tensor, *readers: Tensor) -> Tensor:
    """Return what to divide channels by that reach so far, and that weights [.., channels] read; their mean is 1."""
    weights = torch.stack([weight.abs().flatten(0, -2).amax(0) for weight in readers]).amax(0)
    raw = reached.clamp_min(SMALL).log() * MIGRATION - weights.clamp_min(SMALL).log() * (1 - MIGRATION)
    return (raw - raw.mean()).exp().clamp(*FACTORS)


def _ranges(model: leaf.LoweredModel, images: np.ndarray, progress: Progress) -> dict[str, Range]:
    """Return what the outputs of LayerNorms and of qkv reach, by the name of the module."""
    found: dict[str, Range] = {}

    def noted(name: str, value: Tensor) -> None:
        low, high = torch.aminmax(value.flatten(0, -2), dim=0)
        if name in found:
            low, high = torch.minimum(low, found[name][0]), torch.maximum(high, found[name][1])
        found[name] = low, high

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, leaf.VitLayerNorm) or name.endswith(".qkv"):
            hooks.append(module.register_forward_hook(lambda _, inputs, value, name=name: noted(name, value)))
        elif isinstance(module, leaf.VitTaskHead):
            hooks.append(module.register_forward_pre_hook(lambda head, inputs: noted("head", head.normed(inputs[0]))))
    try:
        some = images[:: -(-len(images) // IMAGES)]
        EachTask(traced(model)).run_images(len(model.tasks), tokenise(some, model.patch), progress)
    finally:
        for hook in hooks:
            hook.remove()
    return found
