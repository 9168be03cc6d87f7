"""The decoder `multiscale`: features of several blocks for each task, without experts; the yardstick of `taskexpert`.

Shapes: as in layered.py.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.models.budget import ALL_KEPT, Kept
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import Features
from m3vit.models.decoders.layered import Layered, check_widths, tapped_blocks


class Scale(nn.Module):
    """LayerNorm -> Linear(D, W) of each token -> 3x3 convolution W -> W over the grid -> GELU."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.project = nn.Linear(dim, width)
        self.mix = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, tokens_BTD: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the feature [B, T, W] of one block."""
        projected = self.project(self.norm(tokens_BTD)).mT.unflatten(2, grid)
        return F.gelu(self.mix(projected)).flatten(2).mT


class MultiScale(Layered):
    """For each task a `Scale` of each block; a task's feature after a block is the sum of its blocks' so far.

    It costs T L (D W + 9 W^2) MACs a task and image, beside the head: `width` sets what it costs.
    """

    def features(self, features: Features, tasks: Sequence[str], kept: Kept = ALL_KEPT) -> dict[str, list[Tensor]]:
        """Return the feature [B, T, W] of each task after each tapped block."""
        found: dict[str, list[Tensor]] = {task: [] for task in tasks}
        for place, block in enumerate(self.blocks):
            for task, tokens in zip(tasks, features.of(block).unbind(), strict=True):
                scales: Any = self.own[task]
                feature = scales[place](tokens, features.grid)
                found[task].append(found[task][-1] + feature if place else feature)
        return found


def multiscale(
    config: ModelConfig,
    backbone: Any,
    *,
    blocks: int | list[int] = 4,
    width: int = 64,
    head_width: int = 32,
    preliminary: bool = True,
) -> MultiScale:
    """Build the decoder.

    blocks: as of `tapped_blocks`. width: W. head_width: features of a pixel in the heads, as `conv`'s width.
    preliminary: whether the features before the last are supervised too.
    """
    check_widths(width, head_width)
    count = len(tapped_blocks(blocks, len(backbone.trunk.blocks)))
    own = {task: nn.ModuleList(Scale(backbone.dim, width) for _ in range(count)) for task in config.tasks}
    return MultiScale(config, backbone, blocks, width, head_width, preliminary, own)
