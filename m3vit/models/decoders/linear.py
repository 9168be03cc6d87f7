"""The decoder `linear`: a Linear for each task, on each token. Shapes: as in base.py; s outputs a token and side."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.label_sets import resolve
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import Decoder, PerTask, Size, TokenHead, resize


class LinearHead(nn.Module):
    """LayerNorm -> Linear(D, C * s^2) for each token -> pixel shuffle -> bilinear resize to the image.

    The part up to the Linear runs token by token; it is what also goes on the FPGA (`m3vit.export.hls`).
    """

    def __init__(self, dim: int, channels: int, patch_size: int, stride: int, bias: float) -> None:
        super().__init__()
        if patch_size % stride:
            raise InputError(f"model.head_stride is {stride}: give a divisor of the trunk's patch size {patch_size}")
        self.upscale = patch_size // stride
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, channels * self.upscale**2)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, tokens_BTD: Tensor, grid: tuple[int, int], size: Size) -> Tensor:
        """Return logits [B, C, *size], or at the head's own resolution if `size` is None."""
        return assemble_tokens(self.linear(self.norm(tokens_BTD)), grid, self.upscale, size)


class Linear(PerTask):
    """A LinearHead for each task."""

    def token_heads(self) -> dict[str, TokenHead]:
        """Return the norm and the Linear of each task."""
        heads = {task: self[task] for task in self.tasks}
        return {task: TokenHead(head.norm, head.linear, head.upscale) for task, head in heads.items()}


def linear(config: ModelConfig, backbone: Any) -> Decoder:
    """Build the decoder."""
    sizes = (backbone.patch_size, config.head_stride)
    return Linear(
        {
            task.name: LinearHead(backbone.dim, config.labels.channels(task.name), *sizes, task.output_bias)
            for task in resolve(config.tasks, config.label_set)
        }
    )


def assemble_tokens(outputs_BTC: Tensor, grid: tuple[int, int], upscale: int, size: Size) -> Tensor:
    """Lay per-token outputs [B, T, C * s^2], s = `upscale`, out as an image [B, C, *size] (unresized if None)."""
    return resize(F.pixel_shuffle(outputs_BTC.transpose(1, 2).unflatten(2, grid), upscale), size)
