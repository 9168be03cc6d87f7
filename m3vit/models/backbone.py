"""The backbone: a vision transformer of timm (trunk.py), some of whose MLPs are mixtures of experts.

timm embeds the image and runs the blocks without experts; this module composes the parts of the blocks with experts,
where it stacks the tasks.

Shapes: R tasks, B images, P prefix tokens, T patch tokens, D embedding dimension, (h, w) patch grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m3vit.errors import InputError
from m3vit.models.budget import Use, Uses
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import Features
from m3vit.models.experts import ExpertBank
from m3vit.models.mlp import first_units_of, mlp_width
from m3vit.models.moe import MoELayer, TaskIds
from m3vit.models.of_timm import Block, EvaBlock, EvaBlockPostNorm, ResPostBlock
from m3vit.models.router import Router, Routing
from m3vit.models.trunk import make_trunk

POST_NORM = (ResPostBlock, EvaBlockPostNorm)  # blocks that normalise what they add, not what they read


# Blocks are timm's; it sets their parts dynamically: Any.
def _layer_scale(block: Any, branch: int, y: Tensor) -> Tensor:
    """Return y times the block's LayerScale of branch 1 (attention) or 2 (MLP), if it has one."""
    if isinstance(block, Block):
        return getattr(block, f"ls{branch}")(y)
    gamma = getattr(block, f"gamma_{branch}")
    return y if gamma is None else gamma * y


def _attend(block: Any, x: Tensor, options: dict[str, Tensor]) -> Tensor:
    """Return x [N, P + T, D] after the attention half of a block; `options` may hold its rotary embedding."""
    if isinstance(block, POST_NORM):
        return x + block.drop_path1(block.norm1(block.attn(x, **options)))
    return x + block.drop_path1(_layer_scale(block, 1, block.attn(block.norm1(x), **options)))


def _mix(block: Any, x: Tensor, task_ids: TaskIds, uses: Sequence[Use] | None) -> tuple[Tensor, Routing | None]:
    """Return x [R or 1, B, P + T, D] after the half with experts of a block, [R, B, P + T, D], and its routing."""
    post_norm = isinstance(block, POST_NORM)
    y, routing = block.mlp(x if post_norm else block.norm2(x), task_ids, uses)
    y = block.norm2(y) if post_norm else _layer_scale(block, 2, y)
    return x + block.drop_path2(y.flatten(0, 1)).view_as(y), routing


def _experts(config: ModelConfig, dim: int) -> MoELayer:
    """Build the layer that takes the place of a block's MLP."""
    router = Router(
        dim,
        config.num_experts,
        config.top_k,
        len(config.tasks),
        config.router,
        config.router_noise,
        learned_noise=config.router_noise_kind == "learned",
        allowed=[config.experts_per_task.get(task) for task in config.tasks],
    )
    hidden = round(dim * config.expert_ratio)
    if hidden < 1:
        raise InputError(
            f"model.expert_ratio is {config.expert_ratio}: that makes experts of no hidden unit for the embedding "
            f"dimension {dim}; give at least {1 / dim:g}"
        )
    return MoELayer(router, ExpertBank(config.num_experts, dim, hidden), config.experts)


class Backbone(nn.Module):
    """Turns images into tokens, one set of tokens per task."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.trunk: Any = make_trunk(config)  # Any: timm's attributes are not annotated
        self.dim = int(self.trunk.embed_dim)
        self.patch_size = int(self.trunk.patch_embed.patch_size[0])
        self.one_for_all = config.router == "single"  # the tasks are the same up to the heads
        self.checkpoint_activations = False  # in training, keep only each block's input and compute the rest again
        self.moe_indices = config.moe_indices(len(self.trunk.blocks))
        # The MLPs whose place the experts take, no part of the model: weights of a dense trunk and up-cycling need them
        # (initialise.py), which then drops them.
        self.replaced: dict[int, nn.Module] = {}
        for index in self.moe_indices:
            block = self.trunk.blocks[index]
            if not isinstance(block, (Block, EvaBlock, *POST_NORM)):
                raise InputError(
                    f"model.moe_blocks names block {index} of {config.trunk}, a {type(block).__name__}, whose MLP is "
                    "no part of its own: leave it out, or give a trunk with sequential blocks"
                )
            self.replaced[index], block.mlp = block.mlp, _experts(config, self.dim)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return how many patches (rows, columns) the images hold, or raise InputError if they do not divide."""
        height, width = images.shape[-2:]
        if not torch.compiler.is_exporting() and (height % self.patch_size or width % self.patch_size):
            raise InputError(f"image size {height}x{width}: give multiples of the patch size {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    @property
    def rotary(self) -> bool:
        """Whether positions enter in the attention of every block."""
        return getattr(self.trunk, "rope", None) is not None

    def place(self, patches_BhwD: Tensor) -> tuple[Tensor, Any]:
        """Return tokens [B, P + T, D] with prefix tokens and positions added, and the rotary embedding or None.

        timm resamples learned positions to the grid (bicubic, antialiased: the identity at the size they are made
        for) and computes rotary ones for it. While exporting it always resamples: the exporter would bake in
        whichever branch its example image takes.
        """
        placed = self.trunk._pos_embed(patches_BhwD)
        return placed if isinstance(placed, tuple) else (placed, None)

    def constants(self, grid: tuple[int, int]) -> Tensor:
        """Return what `place` adds to the patches of a grid: [1, P + T, D], the prefix tokens first."""
        parameter = self.trunk.patch_embed.proj.weight
        training = self.trunk.pos_drop.training
        self.trunk.pos_drop.eval()
        table, _ = self.place(parameter.new_zeros(1, *grid, self.dim))
        self.trunk.pos_drop.train(training)
        return table

    def mlp_widths(self) -> dict[int, int]:
        """Return the hidden units of the dense MLPs of which a part can be used, by block."""
        found = {index: mlp_width(block) for index, block in enumerate(self.trunk.blocks)}
        return {index: width for index, width in found.items() if width is not None}

    def run_block(
        self,
        block: Any,
        x: Tensor,
        task_ids: TaskIds,
        options: dict[str, Tensor],
        uses: Sequence[Use] | None = None,
        width: int | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Run one block of the trunk on [R, B, P + T, D]; return also its routing, if it has experts.

        uses: what each task uses of its experts. width: hidden units that are used of its dense MLP. None: all.
        """
        if isinstance(getattr(block, "mlp", None), MoELayer):
            return _mix(block, _attend(block, x.flatten(0, 1), options).view_as(x), task_ids, uses)
        with first_units_of(block, width):
            return block(x.flatten(0, 1), **options).view_as(x), None

    def forward(
        self,
        images: Tensor,
        task_ids: TaskIds,
        blocks: tuple[int, ...] = (),
        uses: Uses | None = None,
    ) -> tuple[Features, list[Routing]]:
        """Return patch tokens (without prefix tokens) after `blocks`, and each MoE layer's routing (none exporting).

        blocks: indices of the trunk's; (): the last. uses: what is used of experts and MLPs; None: all, as trained.

        Up to the first router the tasks are the same, so that prefix runs once (R = 1); from there on the tasks are
        stacked, unless all share one router: then everything runs once. M3ViT's code re-runs the whole backbone for
        each task.
        """
        layers, widths, *_ = uses or Uses([], {})
        alike = all(use == layer[0] for layer in layers for use in layer)
        routed = task_ids[:1] if self.one_for_all and alike else task_ids
        given = dict(zip(self.moe_indices, layers, strict=True)) if layers else {}
        grid = self.grid(images)  # refuses sizes that the patches do not divide
        tokens, rope = self.place(self.trunk.patch_embed(images))
        x = self.trunk.norm_pre(tokens)[None]  # R = 1
        mixed = getattr(self.trunk, "rope_mixed", False)  # a rotary embedding for each block
        tapped = blocks or (len(self.trunk.blocks) - 1,)
        kept, routings = {}, []
        for index, block in enumerate(self.trunk.blocks):
            if widths.get(index) == 0:
                if index in tapped:
                    kept[index] = x[:, :, self.trunk.num_prefix_tokens :]
                continue
            options = {} if rope is None else {"rope": rope[index] if mixed else rope}
            used = given[index][: len(routed)] if index in given else None
            arguments = (block, x, routed, options, used, widths.get(index))
            if self.checkpoint_activations and torch.is_grad_enabled():
                # The random state is kept too: the second time, router noise and dropped paths are the same.
                x, routing = checkpoint(self.run_block, *arguments, use_reentrant=False)
            else:
                x, routing = self.run_block(*arguments)
            if routing is not None:
                routings.append(routing.of_tasks(len(task_ids)) if len(routed) < len(task_ids) else routing)
            if index in tapped:
                kept[index] = x[:, :, self.trunk.num_prefix_tokens :]
        return Features(kept, len(task_ids), grid, self.patch_size), routings
