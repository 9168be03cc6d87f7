"""Task heads. Shapes: B images, T = h * w tokens, D embedding dimension, C channels, s outputs per token and side."""

import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.errors import InputError


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

    def forward(self, tokens_BTD: Tensor, grid: tuple[int, int], size: tuple[int, int] | None) -> Tensor:
        """Return logits [B, C, *size], or at the head's own resolution if `size` is None."""
        return self.assemble(self.linear(self.norm(tokens_BTD)), grid, size)

    def assemble(self, outputs_BTC: Tensor, grid: tuple[int, int], size: tuple[int, int] | None) -> Tensor:
        """Lay the per-token outputs [B, T, C * s^2] out as an image, and resize it to `size` unless None."""
        return assemble_tokens(outputs_BTC, grid, self.upscale, size)


def assemble_tokens(outputs_BTC: Tensor, grid: tuple[int, int], upscale: int, size: tuple[int, int] | None) -> Tensor:
    """Lay per-token outputs [B, T, C * s^2], s = `upscale`, out as an image [B, C, *size] (unresized if None)."""
    image = F.pixel_shuffle(outputs_BTC.transpose(1, 2).unflatten(2, grid), upscale)
    return image if size is None else F.interpolate(image, size=size, mode="bilinear", align_corners=False)
