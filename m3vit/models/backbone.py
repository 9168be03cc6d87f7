"""The backbone: a vision transformer of timm, some of whose MLPs are mixtures of experts.

A trunk is what timm builds from its classes VisionTransformer (AugReg, DeiT, DINOv2, CLIP, ...) or Eva (EVA-02,
DINOv3, RoPE-ViT, ...), with any patch size, prefix tokens and positions. timm embeds the image and runs the blocks
without experts; this module composes the parts of the blocks with experts, where it stacks the tasks.

Shapes: R tasks, B images, P prefix tokens, T patch tokens, D embedding dimension, (h, w) patch grid.
"""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m3vit.errors import InputError, one_line
from m3vit.models.budget import Use
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import Features
from m3vit.models.experts import ExpertBank
from m3vit.models.moe import MoELayer, TaskIds
from m3vit.models.pretrained import load_weights, whole_weights
from m3vit.models.router import Router, Routing
from m3vit.models.upcycling import upcycle

FAMILIES = ("vision_transformer", "deit", "eva")  # the modules of timm that build such trunks
EXAMPLES = "vit_small_patch16_224, deit3_small_patch16_224, vit_small_patch14_reg4_dinov2 or vit_small_patch16_dinov3"
POST_NORM = (ResPostBlock, EvaBlockPostNorm)  # blocks that normalise what they add, not what they read


def make_trunk(config: ModelConfig) -> VisionTransformer | Eva:
    """Build the timm model, without classifier and final norm, or raise InputError if it is not a ViT we can use."""
    if not timm.is_model(config.trunk):
        names = [name for family in FAMILIES for name in timm.list_models(module=family)]
        near = ", ".join(difflib.get_close_matches(config.trunk, names)) or EXAMPLES
        raise InputError(f"model.trunk is {config.trunk!r}, not a timm model: give one such as {near}")
    arguments: dict[str, Any] = {
        "img_size": tuple(config.image_size),
        **config.trunk_args,
        "num_classes": 0,
        "dynamic_img_size": True,  # positions are resampled, or computed, for each image's grid
    }
    try:
        with _quiet_hub(), whole_weights(config.trunk, config.trunk_args):
            trunk = timm.create_model(config.trunk, pretrained=config.pretrained, **arguments)
    except InputError:
        raise
    except Exception as error:  # bad arguments raise many kinds; a failed download as many as there are clients
        family = timm.models.model_entrypoint(config.trunk).__module__.rpartition(".")[2]
        if family not in FAMILIES:
            raise _refuse(config, f"of timm's family {family}") from error
        words = one_line(error)
        if config.pretrained and isinstance(error, OSError | RuntimeError):
            reason = words.split(". ")[0]
            raise InputError(
                f"model.pretrained: the weights of {config.trunk} with {config.trunk_args} could not be fetched "
                f"({reason}): connect this machine to the Hugging Face hub, copy a filled cache to it (HF_HOME), give "
                "a file with --model.weights, or start from random weights with --model.pretrained=false"
            ) from None
        raise InputError(f"timm cannot build {config.trunk} as a ViT with {config.trunk_args}: {words}") from error
    # Subclasses may compute their positions in their own way (as DeiT's does), but not the features.
    base = Eva if isinstance(trunk, Eva) else VisionTransformer
    if not isinstance(trunk, base) or type(trunk).forward_features is not base.forward_features:
        raise _refuse(config, f"a {type(trunk).__name__}")
    if type(trunk.patch_embed) is not PatchEmbed:
        raise _refuse(config, f"a ViT with a {type(trunk.patch_embed).__name__}")
    if not isinstance(trunk.patch_drop, nn.Identity | None):
        raise InputError(f"model.trunk_args {config.trunk_args}: no patch may be dropped, every pixel has a label")
    height, width = config.image_size
    patch = trunk.patch_embed.patch_size
    if patch[0] != patch[1] or trunk.patch_embed.proj.in_channels != 3:
        raise InputError(f"model.trunk_args {config.trunk_args}: give a square patch and 3 input channels (RGB)")
    if height % patch[0] or width % patch[1]:
        raise InputError(f"model.image_size {height}x{width} is not a multiple of the patch size {patch}")
    # M3ViT has no final norm: each head starts with its own (its code: models/vit_up_head.py). The rest is of
    # timm's classifier: parameters without gradients, which training on several processes would wait for.
    trunk.norm = trunk.fc_norm = nn.Identity()
    trunk.attn_pool = None
    if config.weights:
        load_weights(trunk, config.weights)
    return trunk


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub's line for each retry (some 50 s of them without network): `make_trunk` says what failed."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _refuse(config: ModelConfig, what: str) -> InputError:
    return InputError(
        f"model.trunk {config.trunk} with {config.trunk_args} is {what}, not a plain vision transformer: give one of "
        f"timm's VisionTransformer or Eva models, such as {EXAMPLES}"
    )


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
        for index in self.moe_indices:
            block = self.trunk.blocks[index]
            if not isinstance(block, (Block, EvaBlock, *POST_NORM)):
                raise InputError(
                    f"model.moe_blocks names block {index} of {config.trunk}, a {type(block).__name__}, whose MLP is "
                    "no part of its own: leave it out, or give a trunk with sequential blocks"
                )
            router = Router(
                self.dim,
                config.num_experts,
                config.top_k,
                len(config.tasks),
                config.router,
                config.router_noise,
                learned_noise=config.router_noise_kind == "learned",
                allowed=[config.experts_per_task.get(task) for task in config.tasks],
            )
            hidden = round(self.dim * config.expert_ratio)
            if hidden < 1:
                raise InputError(
                    f"model.expert_ratio is {config.expert_ratio}: that makes experts of no hidden unit for the "
                    f"embedding dimension {self.dim}; give at least {1 / self.dim:g}"
                )
            bank = ExpertBank(config.num_experts, self.dim, hidden)
            layer = MoELayer(router, bank, config.experts)
            if config.init == "upcycle":
                upcycle(layer, block.mlp, config.upcycle_gates, f"block {index} of {config.trunk}")
            block.mlp = layer

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

    def run_block(
        self,
        block: Any,
        x: Tensor,
        task_ids: TaskIds,
        options: dict[str, Tensor],
        uses: Sequence[Use] | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Run one block of the trunk on [R, B, P + T, D]; return also its routing, if it has experts."""
        if isinstance(getattr(block, "mlp", None), MoELayer):
            return _mix(block, _attend(block, x.flatten(0, 1), options).view_as(x), task_ids, uses)
        return block(x.flatten(0, 1), **options).view_as(x), None

    def forward(
        self,
        images: Tensor,
        task_ids: TaskIds,
        blocks: tuple[int, ...] = (),
        uses: Sequence[Sequence[Use]] | None = None,
    ) -> tuple[Features, list[Routing]]:
        """Return the patch tokens (without prefix tokens) after `blocks`, and, unless exporting, each MoE layer's routing.

        blocks: indices of the trunk's; (): the last. uses: of each block with experts, what each task uses of them;
        None: as trained. Up to the first router the tasks are the same, so that prefix runs
        once (R = 1); from there on the tasks are stacked, unless all share one router: then everything runs once.
        M3ViT's code re-runs the whole backbone for each task.
        """
        alike = uses is None or all(use == layer[0] for layer in uses for use in layer)
        routed = task_ids[:1] if self.one_for_all and alike else task_ids
        given = {} if uses is None else dict(zip(self.moe_indices, uses, strict=True))
        grid = self.grid(images)  # refuses sizes that the patches do not divide
        tokens, rope = self.place(self.trunk.patch_embed(images))
        x = self.trunk.norm_pre(tokens)[None]  # R = 1
        mixed = getattr(self.trunk, "rope_mixed", False)  # a rotary embedding for each block
        tapped = blocks or (len(self.trunk.blocks) - 1,)
        kept, routings = {}, []
        for index, block in enumerate(self.trunk.blocks):
            options = {} if rope is None else {"rope": rope[index] if mixed else rope}
            arguments = (block, x, routed, options, given[index][: len(routed)] if index in given else None)
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
