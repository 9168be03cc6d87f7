"""Decoders that read several of the trunk's blocks and make a feature of each task after each: what they share.

Shapes: as in base.py; L tapped blocks, W channels of a task's feature.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from m3vit.errors import InputError, short
from m3vit.label_sets import resolve
from m3vit.models.budget import ALL_KEPT, Kept
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import Decoded, Decoder, Features, Size, resize, tapped_blocks, whole_number
from m3vit.models.decoders.conv import ConvHead

WIDTHS = (1, 4096)  # fewest and most channels of a task's feature


class Preliminary(nn.Module):
    """LayerNorm -> Linear(W, C) of each token: a decoder of a task's feature before the last one."""

    def __init__(self, width: int, channels: int, bias: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, channels)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, feature_BTW: Tensor, grid: tuple[int, int], size: Size) -> Tensor:
        """Return logits [B, C, *size], or [B, C, h, w] if `size` is None."""
        return resize(self.linear(self.norm(feature_BTW)).mT.unflatten(2, grid), size)


class Layered(Decoder):
    """A feature [B, T, W] of each task after each tapped block; the last one's makes the logits (`ConvHead`).

    With `preliminary`, those before the last make `preliminary{block}` of their own decoders, in training only.
    Modules: `shared`, what all tasks run through; `own`, what is a task's own, by its name; `outputs`, its head.
    """

    no_hls = "the FPGA flow has heads that read the last block alone"

    def __init__(
        self,
        config: ModelConfig,
        backbone: Any,
        blocks: int | list[int],
        width: int,
        head_width: int,
        preliminary: bool,
        own: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.blocks = tapped_blocks(blocks, len(backbone.trunk.blocks))
        tasks = resolve(config.tasks, config.label_set)
        channels = {task.name: config.labels.channels(task.name) for task in tasks}
        stride, patch = config.head_stride, backbone.patch_size
        self.tasks = tuple(channels)
        self.own = nn.ModuleDict(own)
        self.outputs = nn.ModuleDict(
            {
                task.name: ConvHead(width, channels[task.name], patch, stride, head_width, task.output_bias)
                for task in tasks
            }
        )
        if type(preliminary) is not bool:
            raise InputError(f"model.head_args.preliminary is {short(preliminary)}: give true or false")
        if preliminary and len(self.blocks) > 1:
            self.training_only = nn.ModuleDict(
                {
                    task.name: nn.ModuleList(
                        Preliminary(width, channels[task.name], task.output_bias) for _ in self.blocks[1:]
                    )
                    for task in tasks
                }
            )

    def features(self, features: Features, tasks: Sequence[str], kept: Kept = ALL_KEPT) -> dict[str, list[Tensor]]:
        """Return the feature [B, T, W] of each task after each tapped block; `kept` of experts, if there are any."""
        raise NotImplementedError

    def forward(self, features: Features, sizes: Mapping[str, Size], kept: Kept = ALL_KEPT) -> Decoded:
        """Return the logits, and in training the preliminary ones after each block but the last."""
        found, grid = self.features(features, list(sizes), kept), features.grid
        logits = {task: self.outputs[task](found[task][-1], grid, size) for task, size in sizes.items()}
        auxiliary: dict[str, dict[str, Tensor]] = {}
        if self.training and "training_only" in self._modules:
            decoders: Any = self.training_only
            for place, block in enumerate(self.blocks[:-1]):
                auxiliary[f"preliminary{block}"] = {
                    task: decoders[task][place](found[task][place], grid, size) for task, size in sizes.items()
                }
        return Decoded(logits, auxiliary)

    def part_of(self, name: str) -> str:
        """Return which part a module belongs to."""
        return "outputs" if name.startswith("outputs") else "features"

    def used_by(self, task: str) -> Any:
        """Yield the parameters that all tasks share, and the task's own."""
        for name, parameter in self.named_parameters():
            part, owner = name.split(".")[:2]
            if part == "shared" or (part in ("own", "outputs") and owner == task):
                yield parameter


def check_widths(width: int, head_width: int) -> None:
    """Raise InputError for numbers of channels that no decoder can have."""
    whole_number("width", width, WIDTHS)
    whole_number("head_width", head_width, WIDTHS)
