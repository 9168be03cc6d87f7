"""The decoder `pup`: progressive upsampling for each task, and distillation between tasks in training.

Shapes: as in base.py; S stages of a head.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.errors import InputError
from m3vit.label_sets import resolve
from m3vit.models.budget import ALL_CHANNELS
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import Decoded, Decoder, Features, PerTask, Size, resize
from m3vit.models.order import Move
from m3vit.models.slices import first

WIDTH = 256  # channels of a head and of distillation, whatever the trunk's width


class PupHead(nn.Module):
    """Progressive upsampling: SETR-PUP (arXiv 2012.15840) as M3ViT has it (its code: models/vit_up_head.py).

    LayerNorm -> S stages of 3x3 convolution to 256 channels, BatchNorm, ReLU, with a bilinear x2 between stages -> 1x1
    convolution to C -> bilinear resize to the image. S = ceil(log2 p) for patch size p, so that the convolutions run at
    strides p, p/2, ... and the resize at the end has a factor of 2: S = 4 and strides 16, 8, 4, 2 for patch 16, as
    published. A patch size that is no power of two ends in a smaller factor (14: strides 14, 7, 3.5, 1.75).

    The published heads have SyncBatchNorm; training on several processes has to convert to it.

    Of the 256 channels the first so many can be used alone, in all stages: 3x3 convolutions then cost the square of
    that share. BatchNorm then has its running statistics, in training too, and leaves them as they are.
    """

    def __init__(self, dim: int, channels: int, patch_size: int, bias: float) -> None:
        super().__init__()
        count = stage_count(patch_size)
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        # As torch initialises convolutions, and with biases that BatchNorm makes redundant: both as published.
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))
            for width in [dim] + [WIDTH] * (count - 1)
        )
        self.output = nn.Conv2d(WIDTH, channels, 1)
        nn.init.constant_(self.output.bias, bias)  # type: ignore[arg-type]

    def features(self, tokens_BTD: Tensor, grid: tuple[int, int], channels: int = WIDTH) -> list[Tensor]:
        """Return what each stage gives: [B, `channels`, h * 2^i, w * 2^i] for i = 0 ... S - 1."""
        x = self.norm(tokens_BTD).transpose(1, 2).unflatten(2, grid)
        found: list[Tensor] = []
        for stage in self.stages:
            if found:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = stage(x) if channels == WIDTH else _first_channels(stage, x, channels)
            found.append(x)
        return found

    def predict(self, feature: Tensor, size: Size) -> Tensor:
        """Return logits [B, C, *size] from the last stage's feature, or at its own resolution if `size` is None."""
        if size is None:
            check_native(self.patch_size)
        channels = feature.shape[1]
        if channels == WIDTH:
            return resize(self.output(feature), size)
        return resize(F.conv2d(feature, first(self.output.weight, 1, channels), self.output.bias), size)

    def forward(self, tokens_BTD: Tensor, grid: tuple[int, int], size: Size, channels: int = WIDTH) -> Tensor:
        """Return logits [B, C, *size], or before the last resize (at stride 2 for powers of two) if `size` is None."""
        return self.predict(self.features(tokens_BTD, grid, channels)[-1], size)

    @torch.no_grad()
    def channel_moves(self, beside: Collection[int] = ()) -> list[Move]:
        """Return what puts the channels of each stage, but for those `beside`, in order of what they add to the next.

        It is taken for BatchNorm's scale, which they have, times the length of the next convolution's weights for them.
        """
        found = list[Move]()
        stages: list[Any] = list(self.stages)
        for place, (stage, following) in enumerate(zip(stages, [*stages[1:], [self.output]], strict=True)):
            if place in beside:
                continue
            (conv, norm, _), next_conv = stage, following[0]
            lengths = next_conv.weight.transpose(0, 1).flatten(1).norm(dim=1)
            order = (norm.weight.abs() * lengths).argsort(descending=True, stable=True)
            found += [Move(conv, name, 0, order) for name in ("weight", "bias")]
            found += [Move(norm, name, 0, order) for name in ("weight", "bias", "running_mean", "running_var")]
            found.append(Move(next_conv, "weight", 1, order))
        return found


def _first_channels(stage: Any, x: Tensor, channels: int) -> Tensor:
    """Return the first output channels of a stage of a PupHead, of as many input channels as x has."""
    conv, norm, _ = stage
    weight = first(first(conv.weight, 0, channels), 1, x.shape[1])
    x = F.conv2d(x, weight, first(conv.bias, 0, channels), padding=conv.padding)
    mean, var = norm.running_mean[:channels], norm.running_var[:channels]
    return F.batch_norm(
        x, mean, var, first(norm.weight, 0, channels), first(norm.bias, 0, channels), eps=norm.eps
    ).relu_()


class Distillation(nn.Module):
    """Training-only outputs that see the features of all tasks: M3ViT's "TAM" (its code: models/models.py, TamModule).

    The task-attentional module of Joint Task-Recursive Learning (Zhang et al., ECCV 2018) for any number R of tasks;
    like PAD-Net's multi-modal distillation, it predicts each task from the features of all of them. F_r is the feature
    [B, 256, h, w] of task r at one stage of its PUP head:

    - balance b = sigmoid(conv(conv(F_1 ... F_R)));
    - mix of b / n * F_r for the first n = R // 2 tasks and (1 - b) / (R - n) * F_r for the others, in the order of the
      model's tasks (the published code writes this out for 2, 3, 4 and 5 tasks, and gives no reason for the halves);
    - attention m = sigmoid of mix -> conv -> two convolutions of stride 2 -> two transposed ones;
    - logits of task r = 1x1 conv(conv_r((1 + m) * F_1 ... (1 + m) * F_R)).

    Every convolution but the last is 3x3 with BatchNorm, and ReLU where no sigmoid follows. Difference: sizes that 4
    does not divide work; the published code fails on them.
    """

    def __init__(self, channels: Sequence[int], biases: Sequence[float]) -> None:
        super().__init__()
        width, every = WIDTH, WIDTH * len(channels)
        self.balance = nn.Sequential(*_conv(every, width), nn.ReLU(inplace=True), *_conv(width, width))
        self.mix = nn.Sequential(*_conv(every, width), nn.ReLU(inplace=True))
        self.down = nn.ModuleList(nn.Sequential(*_conv(width, width, stride=2), nn.ReLU(inplace=True)) for _ in (0, 1))
        self.up = nn.ModuleList(nn.ConvTranspose2d(width, width, 3, stride=2, padding=1) for _ in (0, 1))
        self.up_norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in (0, 1))
        self.outputs = nn.ModuleList(
            nn.Sequential(*_conv(every, width), nn.ReLU(inplace=True), nn.Conv2d(width, count, 1)) for count in channels
        )
        for output, bias in zip(self.outputs, biases, strict=True):
            nn.init.constant_(output[-1].bias, bias)  # type: ignore[index, union-attr, arg-type]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return logits [B, C_r, h, w] of each task from the features [B, 256, h, w] of all, in the tasks' order."""
        first = len(features) // 2
        balance = self.balance(torch.cat(list(features), dim=1)).sigmoid()
        shares = [balance / first] * first + [(1 - balance) / (len(features) - first)] * (len(features) - first)
        x = self.mix(torch.cat([feature * share for feature, share in zip(features, shares, strict=True)], dim=1))
        half = self.down[0](x)
        # output_size: without it, odd sizes would come back one larger.
        up = self.up[0](self.down[1](half), output_size=half.shape[-2:])
        up = self.up[1](self.up_norms[0](up).relu(), output_size=x.shape[-2:])
        attention = self.up_norms[1](up).sigmoid()
        attended = torch.cat([feature * (1 + attention) for feature in features], dim=1)
        return [output(attended) for output in self.outputs]


class Pup(PerTask):
    """A PupHead for each task."""

    no_hls = "the FPGA flow has linear and conv ones"

    def __init__(self, heads: Mapping[str, PupHead]) -> None:
        super().__init__(heads)
        self.channels = dict.fromkeys(heads, WIDTH)

    def forward(
        self, features: Features, sizes: Mapping[str, Size], channels: Mapping[str, int] = ALL_CHANNELS
    ) -> Decoded:
        """Return each task's logits, of the first `channels` of its own head."""
        tokens = zip(sizes.items(), features.last.unbind(), strict=True)
        return Decoded(
            {task: self[task](own, features.grid, size, channels.get(task, WIDTH)) for (task, size), own in tokens}, {}
        )

    def used_count(self, task: str, channels: int | None = None) -> int:
        """Return how many parameters the task's head has in its first channels."""
        head, count = self[task], channels or WIDTH
        convolutions = [stage[0] for stage in head.stages]
        inputs = [convolutions[0].in_channels, *[count] * (len(convolutions) - 1)]
        stages = sum(count * (9 * given + 3) for given in inputs)  # weights; biases, and BatchNorm's two
        norm = sum(parameter.numel() for parameter in head.norm.parameters())
        return norm + stages + (count + 1) * int(head.output.out_channels)

    def channel_moves(self) -> list[Move]:
        """Return those of each head."""
        return [move for task in self.tasks for move in self[task].channel_moves()]


class Distilled(Pup):
    """The same, and in training the distilled outputs of each level of `model.distillation`, by `distilled{level}`.

    Distillation needs every task's features: a training step on some of the tasks goes without.
    """

    def __init__(self, heads: Mapping[str, PupHead], levels: Mapping[int, Distillation]) -> None:
        super().__init__(heads)
        self.training_only = nn.ModuleDict({str(level): module for level, module in levels.items()})

    def forward(
        self, features: Features, sizes: Mapping[str, Size], channels: Mapping[str, int] = ALL_CHANNELS
    ) -> Decoded:
        """Return the logits of the heads, and with all channels the distilled ones of each level."""
        if not self.training or set(sizes) != set(self.tasks) or channels:
            return super().forward(features, sizes, channels)
        tokens = dict(zip(sizes, features.last.unbind(), strict=True))
        stages = {task: self[task].features(tokens[task], features.grid) for task in self.tasks}
        logits = {task: self[task].predict(stages[task][-1], size) for task, size in sizes.items()}
        auxiliary: dict[str, dict[str, Tensor]] = {}
        for level, module in self.training_only.items():
            outputs = zip(self.tasks, module([found[int(level) + 1] for found in stages.values()]), strict=True)
            auxiliary[f"distilled{level}"] = {task: resize(output, sizes[task]) for task, output in outputs}
        return Decoded(logits, auxiliary)

    def channel_moves(self) -> list[Move]:
        """Return them but for stages that are distilled: what is made of these has one order for all tasks."""
        distilled = [int(level) + 1 for level in self.training_only]
        return [move for task in self.tasks for move in self[task].channel_moves(distilled)]


def pup(config: ModelConfig, backbone: Any) -> Decoder:
    """Build the decoder, with the levels of distillation asked for."""
    patch_size = backbone.patch_size
    levels, asked = stage_count(patch_size) - 1, config.distillation
    if len(set(asked)) != len(asked) or any(not 0 <= level < levels for level in asked):
        raise InputError(
            f"model.distillation is {asked}: give each level once, out of those that pup heads of patch size "
            f"{patch_size} have: {', '.join(map(str, range(levels))) or 'none'}"
        )
    tasks = resolve(config.tasks, config.label_set)
    channels, biases = [config.labels.channels(task.name) for task in tasks], [task.output_bias for task in tasks]
    heads = {
        task.name: PupHead(backbone.dim, count, patch_size, task.output_bias)
        for task, count in zip(tasks, channels, strict=True)
    }
    return Distilled(heads, {level: Distillation(channels, biases) for level in asked}) if asked else Pup(heads)


def _conv(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.BatchNorm2d(outputs)


def stage_count(patch_size: int) -> int:
    """Return how many 3x3 convolutions a PUP head has for a patch size."""
    return max(1, math.ceil(math.log2(patch_size)))


def check_native(patch_size: int) -> None:
    """Raise InputError if losses cannot be taken at a PUP head's own resolution: labels need a whole factor."""
    if patch_size & (patch_size - 1):
        raise InputError(
            f"train.native_losses: the pup heads of patch size {patch_size} have no resolution that divides the "
            "image's; give []"
        )
