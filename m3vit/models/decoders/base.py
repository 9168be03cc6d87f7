"""What a decoder is: from the tokens of tapped blocks to logits, and how it is exported.

Shapes: R tasks, B images, T = h * w patch tokens of an (h, w) grid, D embedding dimension, C channels of a task.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.errors import InputError, short
from m3vit.models.budget import ALL_CHANNELS, Kept
from m3vit.models.config import ModelConfig
from m3vit.models.decoders import builder
from m3vit.models.order import Move

Size = tuple[int, int] | None  # (height, width) that logits are resized to; None: the decoder's own resolution


class Features(NamedTuple):
    """What the backbone gives a decoder: the patch tokens after each tapped block, for the tasks asked for."""

    tokens: dict[int, Tensor]  # by block index, [R, B, T, D]; [1, B, T, D] where the tasks are still the same
    num_tasks: int  # R
    grid: tuple[int, int]
    patch_size: int

    def of(self, block: int) -> Tensor:
        """Return the tokens [R, B, T, D] after a tapped block."""
        tokens = self.tokens[block]
        return tokens if len(tokens) == self.num_tasks else tokens.expand(self.num_tasks, -1, -1, -1)

    @property
    def last(self) -> Tensor:
        """The tokens [R, B, T, D] of the last tapped block."""
        return self.of(max(self.tokens))

    def as_map(self) -> Tensor:
        """Return the tokens of one task as one map [B, L * D, h, w] of its L tapped blocks: between ONNX graphs."""
        return torch.cat([self.of(block)[0].mT.unflatten(2, self.grid) for block in sorted(self.tokens)], dim=1)


class Decoded(NamedTuple):
    """Logits {task: [B, C, H, W]}, and outputs that only train: {name: {task: logits}}.

    The loss of an auxiliary output is logged as `task/name`, and weighs what its task weighs.
    """

    logits: dict[str, Tensor]
    auxiliary: dict[str, dict[str, Tensor]]


class TokenHead(NamedTuple):
    """A head as the accelerator has it: LayerNorm -> Linear(D, C * upscale^2) for each token, then a pixel shuffle.

    With `conv`, the Linear gives upscale^2 pixels of M features, [upscale, upscale, M], and ReLU (but for the first
    `unrectified` features of each pixel) and a 3x3 convolution M -> C with zeros outside make the outputs.
    """

    norm: nn.LayerNorm
    linear: nn.Linear
    upscale: int
    conv: nn.Conv2d | None = None
    unrectified: int = 0


class Fusion(nn.Module):
    """Adds the tokens of earlier blocks to the last one's: x_last + sum of Linear_b(LayerNorm_b(x_b)), for all tasks.

    It costs T D^2 MACs a block and image (and task, from the first block with experts on). An accelerator has what it
    takes: each is one more LayerNorm and one more Linear that adds to the residual stream.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(count))
        self.linears = nn.ModuleList(nn.Linear(dim, dim) for _ in range(count))
        for linear in self.linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Fuse the tokens [.., B, T, D] of all tapped blocks, the last one's last."""
        *earlier, fused = tokens
        for norm, linear, one in zip(self.norms, self.linears, earlier, strict=True):
            fused = fused + linear(norm(one))
        return fused


class Decoder(nn.Module):
    """Base of all decoders.

    blocks: indices of the trunk's blocks whose tokens it reads; (): the last one's. What only training needs are the
    submodules of `training_only`. `no_onnx` and `no_hls` say why it cannot be exported; a decoder has either
    `token_heads`, from which the accelerator is made, or `no_hls`. experts: how many experts of its own it has after
    each block, none if it has none; its `forward` then takes `kept` too, those that a task uses (`Budget.decoder`).
    channels: how many the head of each task has, if it can do with the first of them; its `forward` then takes
    `channels` too, where they are not all (`Budget.heads`).
    """

    blocks: tuple[int, ...] = ()
    experts: Mapping[int, int] = {}
    channels: Mapping[str, int] = ALL_CHANNELS
    training_only: nn.ModuleDict
    no_onnx = ""
    no_hls = ""

    def __init__(self) -> None:
        super().__init__()
        self.fusion: Fusion | None = None  # what makes one set of tokens of several blocks', before all else

    def fused(self, features: Features) -> Features:
        """Return the features with the tokens of one block alone: the last one's, or the fused ones."""
        if self.fusion is None:
            return features
        blocks = sorted(features.tokens)
        return features._replace(tokens={blocks[-1]: self.fusion([features.tokens[block] for block in blocks])})

    def forward(self, features: Features, sizes: Mapping[str, Size]) -> Decoded:
        """Return the logits of the tasks that `sizes` names: any of the model's, in the order of the features' R.

        What is made of a task's tokens must not depend on which others are asked for, auxiliary outputs apart.
        """
        raise NotImplementedError

    def check_kept(self, kept: Kept) -> None:
        """Raise InputError for experts that the decoder does not have."""
        for task, of in kept.items():
            for block, ids in of.items():
                if (count := self.experts.get(block, 0)) <= ids[-1]:
                    has = f"its experts are 0 to {count - 1}" if count else "it has no experts there"
                    raise InputError(f"budget of the decoder, {task}, block {block}: kept are {list(ids)}, but {has}")

    def check_channels(self, wanted: Mapping[str, int]) -> None:
        """Raise InputError for channels that the heads do not have."""
        for task, count in wanted.items():
            if (whole := self.channels.get(task)) is None:
                raise InputError(f"budget of the head of {task}: its channels cannot be left out, as those of pup can")
            if count > whole:
                raise InputError(f"budget of the head of {task}: channels are {count}, of {whole}: give 1 to that")

    def channel_moves(self) -> list[Move]:
        """Return what puts channels of the heads in an order in which the first are of most use (`carry_out`).

        With it the decoder computes what it did.
        """
        return []

    def part_of(self, name: str) -> str:
        """Return which part of the decoder a module of it belongs to, by its dotted name: what `m3vit profile` says."""
        return "heads"

    def token_heads(self) -> dict[str, TokenHead] | None:
        """Return each task's head in the form that the accelerator has, or None if it has another."""
        return None

    def used_by(self, task: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that a prediction of this task needs."""
        for name, parameter in self.named_parameters():
            if not name.startswith("training_only."):
                yield parameter

    def used_count(self, task: str, channels: int | None = None) -> int:
        """Return how many parameters a prediction of this task needs, with so many `channels` of its head."""
        return sum(parameter.numel() for parameter in self.used_by(task))


class PerTask(Decoder):
    """A head for each task, as a submodule of its name: head(tokens [B, T, D], grid, size) -> logits [B, C, *size]."""

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = tuple(heads)
        for task, head in heads.items():
            self.add_module(task, head)

    def __getitem__(self, task: str) -> Any:
        return self.get_submodule(task)

    def forward(self, features: Features, sizes: Mapping[str, Size]) -> Decoded:
        """Return each task's logits, of its own head."""
        tokens = zip(sizes.items(), features.last.unbind(), strict=True)
        return Decoded({task: self[task](own, features.grid, size) for (task, size), own in tokens}, {})

    def used_by(self, task: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of the task's head."""
        yield from self[task].parameters()


def tapped_blocks(blocks: int | list[int], depth: int) -> tuple[int, ...]:
    """Return the indices of the blocks that a decoder reads, or raise InputError.

    blocks: how many, evenly spaced, the last one among them (4 of 12: 2, 5, 8, 11), or their indices, rising.
    """
    if type(blocks) is int and 1 <= blocks <= depth:
        return tuple((place + 1) * depth // blocks - 1 for place in range(blocks))
    if isinstance(blocks, list) and blocks and all(type(one) is int and 0 <= one < depth for one in blocks):
        if sorted(set(blocks)) == blocks:
            return tuple(blocks)
    raise InputError(
        f"model.head_args.blocks is {short(blocks)}: give how many of the trunk's {depth} blocks the head reads, "
        f"1 to {depth}, or a rising list of their indices, 0 to {depth - 1}"
    )


def make_decoder(config: ModelConfig, backbone: Any) -> Decoder:
    """Build the decoder of a model, or raise InputError if what was built is none, or lacks a part."""
    decoder = builder(config.head)(config, backbone, **config.head_args)
    depth = len(backbone.trunk.blocks)
    if not isinstance(decoder, Decoder) or type(decoder).forward is Decoder.forward:
        why = f"its builder returns a {type(decoder).__name__}, no Decoder with a forward"
    elif decoder.token_heads() is None and not decoder.no_hls:
        why = "it has neither token_heads, from which the accelerator is made, nor no_hls, which says why not"
    elif any(type(block) is not int or not 0 <= block < depth for block in decoder.blocks):
        why = f"it reads the blocks {', '.join(map(str, decoder.blocks))}, and the trunk has blocks 0 to {depth - 1}"
    else:
        return decoder
    raise InputError(f"model.head {config.head} is no decoder: {why}")


def resize(logits: Tensor, size: Size) -> Tensor:
    """Return logits [B, C, h, w] bilinearly resized to [B, C, *size], or as they are if `size` is None."""
    return logits if size is None else F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def whole_number(name: str, value: object, limits: tuple[int, int]) -> None:
    """Raise InputError unless an argument of a decoder is a whole number within limits, which count as within."""
    if type(value) is not int or not limits[0] <= value <= limits[1]:
        raise InputError(f"model.head_args.{name} is {short(value)}: give a whole number of {limits[0]} to {limits[1]}")
