"""The decoder `taskexpert`, TaskExpert-style: each task's features assembled from experts over several blocks.

After TaskExpert (Ye & Xu, ICCV 2023, arXiv 2307.15324), of which there is no code. What its abstract and the caption
of its figure 2 state, and what we chose where they are silent:

    the paper                                         here
    modules at several layers of the backbone         `blocks`: four, evenly spaced, the last one among them
    expert networks decompose the feature of a        LayerNorm, Linear(D, W), then `experts` 3x3 convolutions W -> W
      layer into task-generic features                  with GELU, without normalisation over batch or pixels; 5
    dynamic gates of each task assemble them          logits of each token (a Linear of it) + logits of the image (a
                                                        Linear of the mean token) + a bias, softmax over the experts;
                                                        they read the projected feature + the memory read
    the memory of a task is one more expert of        its LayerNorm, as it is, weighed by one more gate
      the mixture
    the assembled feature updates the memory of       memory + Linear(W, W) of the assembled feature; a learned vector
      the task at each layer                            of the task stands in it at first, at all tokens
    the last memory makes the prediction              LayerNorm, Linear to pixels, ReLU, 3x3 convolution (`ConvHead`)
    all tasks in one forward pass                     so; experts run once for all tasks
    (preliminary decoders, as its predecessors)       LayerNorm, Linear of the memory after each block but the last

On a trunk with experts the tokens of the tasks differ behind the first router. A task must not depend on which others
are asked for, so the tasks' tokens are not averaged: there, what is task-generic are the expert networks, not what
they see. They run once for all tasks on blocks where the tasks are still the same (all of a dense trunk's), and on each
task's tokens otherwise.

Shapes: as in layered.py; Q = 1 where the tasks' tokens are the same, R where they differ; E experts; K = E + 1 parts of
a mixture, the memory the last, or E without memory.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3vit.errors import InputError, short
from m3vit.models.budget import ALL_KEPT, Kept
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import Features, whole_number
from m3vit.models.decoders.layered import Layered, check_widths, tapped_blocks
from m3vit.values import not_among

GATES = ("both", "token", "sample", "static")
EXPERTS = (1, 256)  # fewest and most


class LowRank(nn.Module):
    """Experts of low rank: each a 3x3 convolution W -> r and a 1x1 one r -> W, which are one 3x3 convolution of rank r.

    After MLoRE (Yang et al., CVPR 2024), by its description; of its other parts (a convolution for all tasks beside the
    experts, the best 9 of 15 experts, gates with noise) there is none here.
    """

    def __init__(self, width: int, ranks: Sequence[int]) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.down = nn.Conv2d(width, sum(ranks), 3, padding=1, bias=False)
        self.up = nn.ModuleList(nn.Conv2d(rank, width, 1) for rank in ranks)

    def forward(self, maps: Tensor, kept: Sequence[int] | None = None) -> Tensor:
        """Return what the experts kept make of maps [N, W, h, w], one after the other: [N, E W, h, w]."""
        ids, weight = range(len(self.ranks)) if kept is None else kept, self.down.weight
        if kept is not None:
            weight = torch.cat([weight.split(self.ranks)[expert] for expert in ids])
        down = F.conv2d(maps, weight, padding=1).split([self.ranks[expert] for expert in ids], dim=1)
        return torch.cat([self.up[expert](one) for expert, one in zip(ids, down, strict=True)], dim=1)


class Experts(nn.Module):
    """Decompose: the expert networks of one block, shared by all tasks. ranks: of each expert; None: not low."""

    def __init__(self, dim: int, width: int, experts: int, ranks: Sequence[int] | None = None) -> None:
        super().__init__()
        self.experts = experts
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.project = nn.Linear(dim, width)
        # The experts' convolutions, one after the other.
        self.bank = LowRank(width, ranks) if ranks else nn.Conv2d(width, experts * width, 3, padding=1)

    def forward(
        self, tokens_QBTD: Tensor, grid: tuple[int, int], kept: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the projected feature [Q, B, T, W] and its decomposition [Q, B, T, E, W], by the experts kept."""
        projected = self.project(self.norm(tokens_QBTD))
        maps = projected.flatten(0, 1).mT.unflatten(2, grid)
        if kept is None:
            made = self.bank(maps)
        elif isinstance(self.bank, LowRank):
            made = self.bank(maps, kept)
        else:
            weight, bias = (one.unflatten(0, (self.experts, -1))[list(kept)] for one in self.bank.parameters())
            made = F.conv2d(maps, weight.flatten(0, 1), bias.flatten(), padding=1)
        count = self.experts if kept is None else len(kept)
        parts = F.gelu(made).flatten(2).mT.unflatten(2, (count, -1))
        return projected, parts.unflatten(0, (len(tokens_QBTD), -1))


class Gate(nn.Module):
    """Gate: the weights of one task's mixture after one block, [B, T, K], of sum 1. `kind` is one of GATES."""

    def __init__(self, width: int, parts: int, kind: str) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(parts))
        self.token = nn.Linear(width, parts, bias=False) if kind in ("both", "token") else None
        self.sample = nn.Linear(width, parts, bias=False) if kind in ("both", "sample") else None
        for layer in (self.token, self.sample):
            if layer is not None:
                nn.init.trunc_normal_(layer.weight, std=0.02)

    def forward(self, x_BTW: Tensor) -> Tensor:
        """Return the weights for what the gate reads."""
        logits = self.bias.expand(*x_BTW.shape[:2], -1)
        if self.token is not None:
            logits = logits + self.token(x_BTW)
        if self.sample is not None:
            logits = logits + self.sample(x_BTW.mean(1, keepdim=True))
        return logits.softmax(-1)


def assemble(weights_BTK: Tensor, parts_BTEW: Tensor, read_BTW: Tensor | None) -> Tensor:
    """Return the weighted sum [B, T, W] of the experts' features, and of what is read of the memory if there is one."""
    experts = parts_BTEW.shape[2]
    assembled = (weights_BTK[:, :, None, :experts] @ parts_BTEW).squeeze(2)
    return assembled if read_BTW is None else assembled + weights_BTK[:, :, experts:] * read_BTW


class Step(nn.Module):
    """What is one task's own after one block: how it reads its memory, its gate, and the update of the memory."""

    def __init__(self, width: int, experts: int, memory: bool, gates: str) -> None:
        super().__init__()
        self.read = nn.LayerNorm(width, eps=1e-6) if memory else None
        self.gate = Gate(width, experts + memory, gates)
        self.write = nn.Linear(width, width)

    def forward(
        self, memory_BTW: Tensor, projected_BTW: Tensor, parts_BTEW: Tensor, kept: Sequence[int] | None = None
    ) -> "State":
        """Return the memory after the block, and the weights; kept: the experts of the parts, None: all."""
        read = None if self.read is None else self.read(memory_BTW)
        weights = self.gate(projected_BTW if read is None else projected_BTW + read)
        used = weights
        if kept is not None:
            used = weights[:, :, [*kept, *([weights.shape[2] - 1] if read is not None else [])]]
        return State(self.update(memory_BTW, assemble(used, parts_BTEW, read)), weights)

    def update(self, memory_BTW: Tensor, assembled_BTW: Tensor) -> Tensor:
        """Return the memory with the assembled feature written to it."""
        return memory_BTW + self.write(assembled_BTW)


class State(NamedTuple):
    """What a task has after a block: its memory [B, T, W], and the weights [B, T, K] of the mixture written to it."""

    memory: Tensor
    weights: Tensor


class Memory(nn.Module):
    """One task's memory: what it holds at first [W], and its step after each block."""

    def __init__(self, width: int, experts: int, blocks: int, memory: bool, gates: str) -> None:
        super().__init__()
        self.start = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))
        self.steps = nn.ModuleList(Step(width, experts, memory, gates) for _ in range(blocks))


class TaskExpert(Layered):
    """`Experts` of each block for all tasks, a `Memory` of each task, and a head on its last state.

    A block costs T (D W + 9 E W^2) MACs an image once (for each task where the tokens differ), with experts of rank r
    T (D W + 10 E r W), and each task T (W^2 + E W), and T K W for gates of tokens; beside the heads.
    """

    def __init__(self, shared: Sequence[Experts], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.shared = nn.ModuleList(shared)
        self.experts = {block: one.experts for block, one in zip(self.blocks, shared, strict=True)}

    def features(self, features: Features, tasks: Sequence[str], kept: Kept = ALL_KEPT) -> dict[str, list[Tensor]]:
        """Return the memory [B, T, W] of each task after each tapped block."""
        return {task: [state.memory for state in states] for task, states in self.states(features, tasks, kept).items()}

    def states(self, features: Features, tasks: Sequence[str], kept: Kept = ALL_KEPT) -> dict[str, list[State]]:
        """Return the state of each task after each tapped block; kept: the experts that tasks use, others use all."""
        found: dict[str, list[State]] = {task: [] for task in tasks}
        for place, block in enumerate(self.blocks):
            ids = [kept.get(task, {}).get(block) for task in tasks]
            made = self.decomposed(place, features, ids)
            for task, own_ids, (projected, parts) in zip(tasks, ids, made, strict=True):
                own: Any = self.own[task]
                memory = found[task][-1].memory if place else torch.zeros_like(projected) + own.start
                found[task].append(own.steps[place](memory, projected, parts, own_ids))
        return found

    def part_of(self, name: str) -> str:
        """Return which part a module belongs to."""
        words = name.split(".")
        if words[0] != "own":
            return "decompose" if words[0] == "shared" else "outputs"
        return "gate" if "gate" in words else "update" if "write" in words else "assemble"

    def decomposed(
        self, place: int, features: Features, ids: Sequence[tuple[int, ...] | None]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return what `Experts` makes for each task after one block, by the experts that each keeps.

        Experts run once for all tasks on tokens that these have in common, and where all keep the same.
        """
        experts, tokens = self.shared[place], features.tokens[self.blocks[place]]
        if len(tokens) > 1 and len(set(ids)) > 1:
            apart = (experts(one[None], features.grid, own) for one, own in zip(tokens, ids, strict=True))
            return [(projected[0], parts[0]) for projected, parts in apart]
        every = tuple(range(self.experts[self.blocks[place]]))
        union = None if None in ids else tuple(sorted({expert for own in ids if own for expert in own}))
        projected, parts = experts(tokens, features.grid, union)
        found = []
        for position, own in enumerate(ids):
            mine = position if len(tokens) > 1 else 0
            picked = parts[mine]
            if own != union:
                picked = picked[:, :, [(union or every).index(expert) for expert in own or every]]
            found.append((projected[mine], picked))
        return found


def taskexpert(
    config: ModelConfig,
    backbone: Any,
    *,
    blocks: int | list[int] = 4,
    experts: int = 5,
    width: int = 64,
    memory: bool = True,
    gates: str = "both",
    head_width: int = 32,
    preliminary: bool = True,
    rank: int | list[int] | None = None,
) -> TaskExpert:
    """Build the decoder.

    blocks: as of `tapped_blocks`. experts: E, of each block. width: W. memory: whether mixtures and gates read it;
    without, what is left of it is the sum of what was written. gates: token (weights differ between tokens), sample
    (between images), both (their logits are added) or static (neither). head_width: features of a pixel in the heads,
    as `conv`'s width. preliminary: whether the memories before the last are supervised too. rank: of all experts, or of
    each; None: 3x3 convolutions as they are.
    """
    check_widths(width, head_width)
    whole_number("experts", experts, EXPERTS)
    ranks = None if rank is None else rank if isinstance(rank, list) else [rank] * experts
    if ranks is not None and (
        len(ranks) != experts or any(type(one) is not int or not 1 <= one <= width for one in ranks)
    ):
        raise InputError(
            f"model.head_args.rank is {short(rank)}: give a whole number of 1 to {width}, the width, or a list of "
            f"{experts}, one an expert"
        )
    if gates not in GATES:
        raise InputError(not_among("model.head_args.gates", gates, GATES))
    if type(memory) is not bool:
        raise InputError(f"model.head_args.memory is {memory!r}: give true or false")
    count = len(tapped_blocks(blocks, len(backbone.trunk.blocks)))
    shared = [Experts(backbone.dim, width, experts, ranks) for _ in range(count)]
    own = {task: Memory(width, experts, count, memory, gates) for task in config.tasks}
    return TaskExpert(shared, config, backbone, blocks, width, head_width, preliminary, own)
