"""The decoder `conv`: a Linear for each task, on each token, then a 3x3 convolution over the pixels of all tokens.

It reads the last block's tokens, to which those of earlier blocks can be added (`Fusion`).

Shapes: as in base.py; s outputs a token and side, M features of a pixel.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.label_sets import resolve
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import (
    Decoded,
    Decoder,
    Features,
    Fusion,
    PerTask,
    Size,
    TokenHead,
    resize,
    tapped_blocks,
    whole_number,
)

WIDTHS = (1, 1024)  # fewest and most features


class ConvHead(nn.Module):
    """LayerNorm -> Linear(D, s^2 * M) for each token -> pixels [B, M, h * s, w * s] -> ReLU -> 3x3 convolution to C.

    Then a bilinear resize to the image. What the convolution adds to the head `linear` is that a pixel sees those of
    the patches beside its own, so that their borders do not show. It costs T (D M s^2 + 9 M C s^2) MACs an image, and
    D M s^2 + 9 M C parameters without biases; `linear` costs T D C s^2 and D C s^2. Outside the image there are zeros.

    The outputs of the Linear are ordered [s, s, M]: a pixel's features lie side by side, on an accelerator's memory as
    in torch's, whose convolution then reads them in the layout "channels last" without a copy.

    unrectified: how many features, the first ones, pass by the ReLU (`rectify`): what a class is seen by in the tokens
    reaches it undiminished from the first step on. Weights of such a head begin at 1/sqrt(D), so that features are of
    about the tokens' size; of others at the trunk's 0.02.
    """

    def __init__(
        self, dim: int, channels: int, patch_size: int, stride: int, width: int, bias: float, unrectified: int = 0
    ) -> None:
        super().__init__()
        if patch_size % stride:
            raise InputError(f"model.head_stride is {stride}: give a divisor of the trunk's patch size {patch_size}")
        self.upscale, self.unrectified = patch_size // stride, unrectified
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, self.upscale**2 * width)
        self.output = nn.Conv2d(width, channels, 3, padding=1)
        for layer in (self.linear, self.output):
            nn.init.trunc_normal_(layer.weight, std=dim**-0.5 if unrectified else 0.02)
            nn.init.constant_(layer.bias, bias if layer is self.output else 0.0)  # type: ignore[arg-type]

    def forward(self, tokens_BTD: Tensor, grid: tuple[int, int], size: Size) -> Tensor:
        """Return logits [B, C, *size], or at the head's own resolution [B, C, h * s, w * s] if `size` is None."""
        features = assemble_pixels(self.linear(self.norm(tokens_BTD)), grid, self.upscale)
        return resize(self.output(rectify(features, self.unrectified)), size)


def conv(
    config: ModelConfig, backbone: Any, *, width: int = 32, unrectified: int = 0, blocks: int | list[int] = 1
) -> Decoder:
    """Build the decoder.

    width: features of a pixel (M), out of which the convolution makes the channels of a task. unrectified: how many of
    these no ReLU cuts off. blocks: whose tokens are read, as of `tapped_blocks`; with more than one, those before the
    last are added to the last one's by a `Fusion`.
    """
    whole_number("width", width, WIDTHS)
    whole_number("unrectified", unrectified, (0, width))
    heads = {
        task.name: ConvHead(
            backbone.dim,
            config.labels.channels(task.name),
            backbone.patch_size,
            config.head_stride,
            width,
            task.output_bias,
            unrectified,
        )
        for task in resolve(config.tasks, config.label_set)
    }
    tapped = tapped_blocks(blocks, len(backbone.trunk.blocks))
    return Conv(heads, tapped, Fusion(backbone.dim, len(tapped) - 1) if len(tapped) > 1 else None)


class Conv(PerTask):
    """A ConvHead for each task, on the tokens of one block or on several fused."""

    def __init__(self, heads: Mapping[str, nn.Module], blocks: tuple[int, ...], fusion: Fusion | None) -> None:
        if fusion is not None and "fusion" in heads:
            raise InputError("a task is called fusion, as a part of the conv head that reads several blocks is: rename")
        super().__init__(heads)
        self.blocks, self.fusion = blocks, fusion

    def forward(self, features: Features, sizes: Mapping[str, Size]) -> Decoded:
        """Return each task's logits, of its own head."""
        return super().forward(self.fused(features), sizes)

    def token_heads(self) -> dict[str, TokenHead]:
        """Return the norm, the Linear and the convolution of each task."""
        heads = {task: self[task] for task in self.tasks}
        return {
            task: TokenHead(head.norm, head.linear, head.upscale, head.output, head.unrectified)
            for task, head in heads.items()
        }

    def used_by(self, task: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of the task's head and of the fusion."""
        yield from super().used_by(task)
        if self.fusion is not None:
            yield from self.fusion.parameters()


def assemble_pixels(outputs_BTC: Tensor, grid: tuple[int, int], upscale: int) -> Tensor:
    """Lay per-token outputs [B, T, s^2 * M], s = `upscale`, out as pixels [B, M, h * s, w * s], channels last."""
    features = outputs_BTC.shape[-1] // upscale**2
    pixels = outputs_BTC.unflatten(2, (upscale, upscale, features)).unflatten(1, grid)  # [B, h, w, s, s, M]
    return pixels.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def rectify(pixels_BMHW: Tensor, unrectified: int) -> Tensor:
    """Return max(0, x) of pixels [B, M, H, W], but for the first `unrectified` features, which stay what they are."""
    if not unrectified:
        return pixels_BMHW.relu()
    if unrectified == pixels_BMHW.shape[1]:
        return pixels_BMHW
    return torch.cat([pixels_BMHW[:, :unrectified], pixels_BMHW[:, unrectified:].relu()], dim=1)


def divide_pixels(pixels_BMHW: Tensor, upscale: int) -> Tensor:
    """Return the pixels [B, M, h * s, w * s] of each token, [B, T, s^2 * M]: the inverse of `assemble_pixels`."""
    blocks = pixels_BMHW.unflatten(3, (-1, upscale)).unflatten(2, (-1, upscale))  # [B, M, h, s, w, s]
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
