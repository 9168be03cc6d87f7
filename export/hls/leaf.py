"""The model as hls4ml sees it: leaf modules, one a hardware layer, and `lower`, which builds them from a model.

Shapes: B images, T patch tokens, P prefix tokens (class, register), N = P + T, D embedding dimension, H expert hidden
width, E experts, K experts per token, R tasks, C_r outputs per token of task r, C the most of them.

What lowering folds away, exactly: image normalisation into the patch embedding, LayerScale into the Linear before it,
log2(e) / sqrt(head width) into the queries and log2(e) into the routers (the kernels' exponentials are base 2), and the
scale and bias of each head's LayerNorm into its Linear.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from hls4ml.utils.torch import HLS4MLModule
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.export.hls.magnitudes import Magnitudes
from m3vit.hw.sim.csim import PIXEL_SCALE, tokenise
from m3vit.models.budget import FULL, Budget
from m3vit.models.decoders.base import TokenHead
from m3vit.models.decoders.conv import assemble_pixels, divide_pixels, rectify
from m3vit.models.experts import OneExpert, dispatch, mlp_rows
from m3vit.models.mlp import cut
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.of_timm import Attention, Block, LayerScale, Mlp
from m3vit.models.router import route
from m3vit.normalisation import Normalisation

LOG2_E = math.log2(math.e)
CHECKED_PATCHES = 16  # a side, of the image on which lowering is checked: the layers do not depend on the grid


class Leaf(HLS4MLModule):
    """A module that hls4ml does not look into; `observed`, when set, collects what inner tensors reach."""

    observed: Magnitudes | None = None

    def observe(self, name: str, value: Tensor, wide: bool = False) -> Tensor:
        """Return `value`, after noting its magnitudes if calibration is on; wide: as `Magnitudes.note` has it."""
        if self.observed is not None and value.numel():
            self.observed.note(name, value, wide)
        return value


class VitLinear(Leaf):
    """Linear on each token: weight [out, in], bias [out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(weight.new_zeros(weight.shape[0]) if bias is None else bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class VitLayerNorm(Leaf):
    """LayerNorm over the channels of each token."""

    def __init__(self, scale: Tensor, bias: Tensor, eps: float) -> None:
        super().__init__()
        self.scale, self.bias, self.eps = nn.Parameter(scale.clone()), nn.Parameter(bias.clone()), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.bias, self.eps)


class VitGelu(Leaf):
    """Exact (erf) GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class VitPosition(Leaf):
    """Put P constant tokens before the T patch tokens and add the position embedding: table [N, D], its first P rows
    the prefix tokens with their positions."""

    def __init__(self, table: Tensor, prefix: int) -> None:
        super().__init__()
        self.table, self.prefix = nn.Parameter(table.clone()), prefix

    def forward(self, x: Tensor) -> Tensor:
        constant = self.table[: self.prefix].expand(x.shape[0], -1, -1)
        return torch.cat([constant, x + self.table[self.prefix :]], dim=1)


class VitAttention(Leaf):
    """Self-attention on [q | k | v], with a base-2 softmax: q holds log2(e) / sqrt(head width) already."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, qkv: Tensor) -> Tensor:
        B, N, width = qkv.shape
        parts = qkv.view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = (self.observe(name, part) for name, part in zip(("query", "key", "value"), parts, strict=True))
        context = F.scaled_dot_product_attention(q, k, v, scale=math.log(2))
        return context.transpose(1, 2).reshape(B, N, width // 3)


class VitMoE(Leaf):
    """All experts of a layer and the routers of all tasks; `task` [B, 1] chooses the router of each image.

    top_ks: experts per token of each task.
    router_w [R, E, D] and router_b [R, E] give logits in base 2; w1 [E, H, D], b1 [E, H], w2 [E, D, H], b2 [E, D].
    """

    router_w: nn.Parameter
    router_b: nn.Parameter
    w1: nn.Parameter
    b1: nn.Parameter
    w2: nn.Parameter
    b2: nn.Parameter

    def __init__(self, layer: int, top_ks: Sequence[int], **weights: Tensor) -> None:
        super().__init__()
        self.layer, self.top_ks = layer, tuple(top_ks)
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    @property
    def top_k(self) -> int:
        """The most experts per token of any task."""
        return max(self.top_ks)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        logits = self.observe("logit", self._logits(x, task), wide=True)
        counts = {self.top_ks[row] for row in task[:, 0].long().tolist()} if len(set(self.top_ks)) > 1 else {self.top_k}
        (top_k,) = counts  # images that are run together have one
        routing = route(logits * math.log(2), top_k)
        x_ND, groups = x.flatten(0, 1), dispatch(routing.expert_ids_RNK.flatten(0, 1), len(self.w1))
        outputs = []
        for expert, rows in groups.slices():
            y, hidden = mlp_rows(OneExpert(groups, expert, rows), x_ND, self.w1, self.b1, self.w2)
            self.observe("active", F.gelu(self.observe("hidden", hidden)))
            self.observe("expert", y + self.b2[expert], wide=True)
            outputs.append(y)
        return groups.combine(torch.cat(outputs), routing.weights_RNK.flatten(0, 1), self.b2).view_as(x)

    def _logits(self, x: Tensor, task: Tensor) -> Tensor:
        rows = task[:, 0].long()
        return torch.einsum("bnd,bed->bne", x, self.router_w[rows]) + self.router_b[rows, None]


class VitTaskHead(Leaf):
    """LayerNorm with a scale alone, then the Linear of the task: weight [sum C_r, D], bias [sum C_r], task after task.

    Drops the prefix tokens; outputs [B, T, C], zero beyond the C_r of the image's task.
    """

    def __init__(self, weight: Tensor, bias: Tensor, widths: Sequence[int], prefix: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.scale = nn.Parameter(weight.new_ones(weight.shape[1]))  # 1 unless equalised
        self.widths, self.prefix, self.eps = tuple(widths), prefix, eps

    def normed(self, x: Tensor) -> Tensor:
        """Return what the Linears read: [B, T, D]."""
        return F.layer_norm(x[:, self.prefix :], x.shape[-1:], eps=self.eps) * self.scale

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        normed = self.observe("normed", self.normed(x))
        out = x.new_zeros(*normed.shape[:2], max(self.widths))
        for image, row in enumerate(task[:, 0].long().tolist()):
            first, width = sum(self.widths[:row]), self.widths[row]
            rows = slice(first, first + width)
            y = F.linear(normed[image], self.weight[rows], self.bias[rows])
            out[image, :, :width] = self.observe(f"output{row}", y)
        return out


class VitPixelHead(Leaf):
    """ReLU and the 3x3 convolution of the task on the pixels of all tokens: weight [sum C_r, 3, 3, M], bias [sum C_r].

    In and out, a token holds upscale^2 pixels, [upscale, upscale, M] and [upscale, upscale, C_r]; outputs are padded
    with zeros to those of the widest task. widths: C_r * upscale^2. unrectified: features that pass by the ReLU.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        channels: Sequence[int],
        grid: tuple[int, int],
        upscale: int,
        unrectified: int,
    ) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.channels, self.grid, self.upscale, self.unrectified = tuple(channels), grid, upscale, unrectified
        self.widths = tuple(count * upscale**2 for count in channels)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        pixels = rectify(assemble_pixels(x, self.grid, self.upscale), self.unrectified)
        out = x.new_zeros(*x.shape[:2], max(self.widths))
        for image, row in enumerate(task[:, 0].long().tolist()):
            rows = slice(sum(self.channels[:row]), sum(self.channels[: row + 1]))
            weight = self.weight[rows].permute(0, 3, 1, 2)
            y = F.conv2d(pixels[image : image + 1], weight, self.bias[rows], padding=1)
            out[image, :, : self.widths[row]] = self.observe(f"output{row}", divide_pixels(y, self.upscale)[0])
        return out


class LoweredBlock(nn.Module):
    """One transformer block, dense or with experts."""

    norm1: nn.Module
    qkv: nn.Module
    attn: nn.Module
    proj: nn.Module
    norm2: nn.Module
    moe: nn.Module
    fc1: nn.Module
    gelu: nn.Module
    fc2: nn.Module

    def __init__(self, is_moe: bool, **layers: nn.Module) -> None:
        super().__init__()
        self.is_moe = is_moe
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        x = x + self.proj(self.attn(self.qkv(self.norm1(x))))
        y = self.norm2(x)
        return x + (self.moe(y, task) if self.is_moe else self.fc2(self.gelu(self.fc1(y))))


class Blocks(nn.ModuleList):
    """Blocks under their numbers in the trunk, of which some may be left out: names stay the same."""

    def __init__(self, blocks: Mapping[int, LoweredBlock]) -> None:
        super().__init__()
        for index, block in blocks.items():
            self.add_module(str(index), block)


class LoweredModel(nn.Module):
    """The whole accelerator in float: tokens [B, T, 3 p^2] of pixel / 256 and task ids [B, 1] -> outputs [B, T, C]."""

    embed: VitLinear
    position: VitPosition
    norm_pre: VitLayerNorm  # only some trunks have it
    blocks: Blocks
    fusion_norms: nn.ModuleDict  # by the block they follow, as the Linears that add what they give to the last tokens
    fusion_linears: nn.ModuleDict
    head: VitTaskHead
    pixel_head: VitPixelHead  # where the heads have convolutions

    def __init__(self, tasks: Sequence[str], grid: tuple[int, int], patch: int, **layers: nn.Module) -> None:
        super().__init__()
        self.tasks, self.grid, self.patch = list(tasks), grid, patch
        for name, layer in layers.items():
            self.add_module(name, layer)

    def moe_layers(self) -> list[VitMoE]:
        """Return the layers with experts, in order."""
        return [module for module in self.blocks.modules() if isinstance(module, VitMoE)]

    def forward(self, tokens: Tensor, task: Tensor) -> Tensor:
        x = self.position(self.embed(tokens))
        if hasattr(self, "norm_pre"):
            x = self.norm_pre(x)
        normed = {}
        for index, block in self.blocks.named_children():
            x = block(x, task)
            if index in self.fusion_norms:
                normed[index] = self.fusion_norms[index](x)
        for name, linear in self.fusion_linears.items():
            x = x + linear(normed[name])
        y = self.head(x, task)
        return self.pixel_head(y, task) if hasattr(self, "pixel_head") else y

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs of a token, by task."""
        return self.pixel_head.widths if hasattr(self, "pixel_head") else self.head.widths


def _refuse(what: str) -> InputError:
    return InputError(f"cannot export to HLS: {what}; use a plain ViT block (LayerNorm, attention with bias, GELU MLP)")


def _norm(norm: nn.Module, where: str) -> VitLayerNorm:
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None:
        raise _refuse(f"{where} is a {type(norm).__name__}")
    bias = norm.bias if norm.bias is not None else torch.zeros_like(norm.weight)
    return VitLayerNorm(norm.weight, bias, norm.eps)


def _layer_scale(module: nn.Module, where: str) -> Tensor | float:
    if isinstance(module, nn.Identity):
        return 1.0
    if isinstance(module, LayerScale):
        return module.gamma
    raise _refuse(f"{where} is a {type(module).__name__}")


def _linear(linear: nn.Linear, scale: Tensor | float = 1.0) -> VitLinear:
    rows = scale[:, None] if isinstance(scale, Tensor) else scale
    return VitLinear(linear.weight * rows, None if linear.bias is None else linear.bias * scale)


def _embedding(projection: nn.Conv2d, normalisation: Normalisation) -> VitLinear:
    """Fold (x / 255 - mean) / std into the patch embedding, whose input becomes x / 256."""
    weight = projection.weight  # [D, 3, p, p]
    mean, std = (weight.new_tensor(values)[:, None, None] for values in normalisation)
    bias = weight.new_zeros(weight.shape[0]) if projection.bias is None else projection.bias
    return VitLinear((weight * (PIXEL_SCALE / 255) / std).flatten(1), bias - (weight * (mean / std)).sum(dim=(1, 2, 3)))


# timm sets its blocks' parts dynamically: Any.
def _attention(attention: Any, scale: Tensor | float, where: str) -> dict[str, nn.Module]:
    parts = ("q_norm", "k_norm", "norm")
    plain = type(attention) is Attention and all(
        isinstance(getattr(attention, part, nn.Identity()), nn.Identity) for part in parts
    )
    if not plain or getattr(attention, "gate", None) is not None:
        raise _refuse(f"{where} is not plain softmax attention without query or key norms")
    queries = attention.qkv.weight.new_ones(attention.qkv.out_features)
    queries[: queries.numel() // 3] = LOG2_E * attention.scale
    return {
        "qkv": _linear(attention.qkv, queries),
        "attn": VitAttention(attention.num_heads),
        "proj": _linear(attention.proj, scale),
    }


def _moe(moe: MoELayer, layer: int, top_ks: Sequence[int], scale: Tensor | float) -> VitMoE:
    gates = [moe.router.gate(task_id) for task_id in range(len(top_ks))]
    bank = moe.experts
    rows = scale[:, None] if isinstance(scale, Tensor) else scale
    return VitMoE(
        layer,
        top_ks,
        router_w=torch.stack([weight for weight, _ in gates]) * LOG2_E,
        router_b=torch.stack([bias for _, bias in gates]) * LOG2_E,
        w1=bank.w1,
        b1=bank.b1,
        w2=bank.w2 * rows,
        b2=bank.b2 * scale,
    )


def _block(block: Any, index: int, top_ks: Mapping[int, Sequence[int]]) -> LoweredBlock:
    if type(block) is not Block:
        raise _refuse(f"block {index} is a {type(block).__name__}")
    scale2 = _layer_scale(block.ls2, f"LayerScale of block {index}")
    layers: dict[str, nn.Module] = {
        "norm1": _norm(block.norm1, f"norm1 of block {index}"),
        **_attention(block.attn, _layer_scale(block.ls1, f"LayerScale of block {index}"), f"block {index}"),
        "norm2": _norm(block.norm2, f"norm2 of block {index}"),
    }
    mlp = block.mlp
    if isinstance(mlp, MoELayer):
        moe = _moe(mlp, list(top_ks).index(index), top_ks[index], scale2)
        return LoweredBlock(True, **layers, moe=moe)
    activation, norm = getattr(mlp, "act", None), getattr(mlp, "norm", nn.Identity())
    plain = isinstance(activation, nn.GELU) and activation.approximate == "none" and isinstance(norm, nn.Identity)
    if not plain or type(mlp) is not Mlp:
        raise _refuse(f"the MLP of block {index} is a {type(mlp).__name__} with {type(activation).__name__}")
    return LoweredBlock(False, **layers, fc1=_linear(mlp.fc1), gelu=VitGelu(), fc2=_linear(mlp.fc2, scale2))


def _position(model: MultiTaskModel, grid: tuple[int, int]) -> VitPosition:
    return VitPosition(model.backbone.constants(grid)[0], model.backbone.trunk.num_prefix_tokens)


def token_heads(model: MultiTaskModel) -> dict[str, TokenHead]:
    """Return the heads as the accelerator has them, by task, or raise InputError with the decoder's reason why not."""
    heads = model.heads.token_heads()
    if heads is None:
        raise InputError(
            f"cannot export to HLS: the model has {model.config.head} heads, and {model.heads.no_hls}: train with "
            "model.head linear or conv"
        )
    return heads


def _head(model: MultiTaskModel, prefix: int) -> VitTaskHead:
    heads = [token_heads(model)[task] for task in model.config.tasks]
    weights = [head.linear.weight * head.norm.weight for head in heads]
    biases = [head.linear.bias + head.linear.weight @ head.norm.bias for head in heads]
    widths = [head.linear.out_features for head in heads]
    return VitTaskHead(torch.cat(weights), torch.cat(biases), widths, prefix, heads[0].norm.eps)


def _pixel_head(model: MultiTaskModel, grid: tuple[int, int]) -> VitPixelHead | None:
    heads = [token_heads(model)[task] for task in model.config.tasks]
    convs = [head.conv for head in heads if head.conv is not None]
    if not convs:
        return None
    weights = torch.cat([conv.weight.permute(0, 2, 3, 1) for conv in convs])
    biases = torch.cat([conv.bias for conv in convs if conv.bias is not None])
    channels = [conv.out_channels for conv in convs]
    return VitPixelHead(weights, biases, channels, grid, heads[0].upscale, heads[0].unrectified)


def top_ks_of(model: MultiTaskModel, budget: Budget) -> dict[int, tuple[int, ...]]:
    """Return the experts per token of each block with experts, by task.

    Raises InputError for more than the engines can do.
    """
    tasks, blocks = model.config.tasks, model.backbone.moe_indices
    uses = model.uses(budget, tasks)
    for block, layer in zip(blocks, uses.layers if uses else [], strict=False):
        if any(len(use.kept) < model.config.num_experts for use in layer):
            raise InputError(
                f"cannot export to HLS: the budget leaves experts of block {block} out, and the engines rank all that "
                "their scores add up to 1 over: keep all, or export to ONNX"
            )
    every = [(model.config.top_k,) * len(tasks)] * len(blocks)
    counts = [tuple(use.top_k for use in layer) for layer in uses.layers] if uses else every
    return dict(zip(blocks, counts, strict=True))


def _build(model: MultiTaskModel, budget: Budget, size: tuple[int, int]) -> LoweredModel:
    """Return the leaf modules of a model for images of a size: of the hidden units that the budget uses alone."""
    model, budget, skip = cut(model, budget.width), replace(budget, width={}), budget.left_out
    if skip and model.heads.fusion:
        raise _refuse(f"the budget leaves blocks out, and {model.config.head} heads read those before the last")
    backbone, trunk = model.backbone, model.backbone.trunk
    token_heads(model)  # refuses decoders that work in another way
    top_ks = top_ks_of(model, budget)
    if backbone.rotary:
        raise _refuse(f"{model.config.trunk} has rotary positions")
    grid = (size[0] // backbone.patch_size, size[1] // backbone.patch_size)
    if not isinstance(trunk.patch_embed.norm, nn.Identity):
        raise _refuse(f"the patch embedding has a {type(trunk.patch_embed.norm).__name__}")
    position = _position(model, grid)
    layers: dict[str, nn.Module] = {
        "embed": _embedding(trunk.patch_embed.proj, model.normalisation),
        "position": position,
    }
    if not isinstance(trunk.norm_pre, nn.Identity):
        layers["norm_pre"] = _norm(trunk.norm_pre, "norm_pre")
    *earlier, last = model.heads.blocks or (len(trunk.blocks) - 1,)
    layers["blocks"] = Blocks(
        {
            index: _block(block, index, top_ks)
            for index, block in enumerate(trunk.blocks[: last + 1])
            if index not in skip
        }
    )
    norms, linears = (model.heads.fusion.norms, model.heads.fusion.linears) if model.heads.fusion else ((), ())
    named = [(str(block), norm, linear) for block, norm, linear in zip(earlier, norms, linears, strict=True)]
    layers["fusion_norms"] = nn.ModuleDict({name: _norm(norm, f"norm {name} of the heads") for name, norm, _ in named})
    layers["fusion_linears"] = nn.ModuleDict({name: _linear(cast(nn.Linear, linear)) for name, _, linear in named})
    layers["head"] = _head(model, position.prefix)
    if (conv := _pixel_head(model, grid)) is not None:
        layers["pixel_head"] = conv
    return LoweredModel(model.config.tasks, grid, backbone.patch_size, **layers)


@torch.no_grad()
def reference_outputs(
    model: MultiTaskModel, images: Tensor, task: str, budget: Budget = FULL
) -> tuple[Tensor, list[Any]]:
    """Return the per-token outputs [B, T, C_r] of a task for normalised images, and its routings, from the model."""
    features, routings = model.backbone(images, (model.task_id(task),), model.heads.blocks, model.uses(budget, [task]))
    head = token_heads(model)[task]
    outputs = head.linear(head.norm(model.heads.fused(features).last[0]))
    if head.conv is not None:
        pixels = rectify(assemble_pixels(outputs, features.grid, head.upscale), head.unrectified)
        outputs = divide_pixels(head.conv(pixels), head.upscale)
    return outputs, routings


def normalise(images: np.ndarray, normalisation: Normalisation, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return images uint8 [n, H, W, 3] as the model takes them: [n, 3, H, W], (x / 255 - mean) / std."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(dtype) / 255
    mean, std = (torch.tensor(values, dtype=dtype)[:, None, None] for values in normalisation)
    return (x - mean) / std


@torch.no_grad()
def lower(model: MultiTaskModel, budget: Budget = FULL) -> LoweredModel:
    """Return the accelerator's leaf modules with the model's weights, float32, checked to compute the same.

    `budget`: by block, hidden units; by block and task, top_k. Raises InputError for a trunk, heads or another
    budget, which cannot be exported.
    """
    model.uses(budget, model.config.tasks)
    # In float64, so that folding adds no rounding and the check below is about the structure alone.
    exact = copy.deepcopy(model).double().eval().cpu()
    height, width = size = model.config.image_size
    lowered = _build(exact, budget, (height, width)).eval()
    most = CHECKED_PATCHES * lowered.patch
    small = (min(height, most), min(width, most))
    checked = lowered if small == size else _build(exact, budget, small).eval()
    _check(exact, checked, budget, small)
    return lowered.float()


def _check(exact: MultiTaskModel, lowered: LoweredModel, budget: Budget, size: tuple[int, int]) -> None:
    """Compare a lowered model with the model on a random image of a size, for every task; both in float64."""
    height, width = size
    images = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    tokens = torch.from_numpy(tokenise(images, lowered.patch)).double()
    for task_id, task in enumerate(lowered.tasks):
        expected, _ = reference_outputs(exact, normalise(images, exact.normalisation, torch.float64), task, budget)
        outputs = lowered(tokens, torch.full((1, 1), float(task_id), dtype=torch.float64))
        error = float((outputs[..., : expected.shape[-1]] - expected).abs().max() / (expected.abs().max() + 1e-12))
        assert error < 1e-5, f"lowering changed the outputs of {task} by {error:.1e}"
