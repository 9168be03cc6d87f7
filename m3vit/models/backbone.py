"""The backbone: any timm VisionTransformer, some of whose MLPs are mixtures of experts.

Shapes: R tasks, B images, T tokens, D embedding dimension, (h, w) patch grid.
"""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m3vit.errors import InputError
from m3vit.models.config import ModelConfig
from m3vit.models.experts import ExpertBank
from m3vit.models.moe import MoELayer
from m3vit.models.router import Router, Routing


def make_trunk(config: ModelConfig) -> VisionTransformer:
    """Build the timm model, without classifier and final norm, or raise InputError if it is not a ViT we can use."""
    if not timm.is_model(config.trunk):
        near = ", ".join(timm.list_models(f"*{config.trunk[:6]}*")[:3]) or "vit_small_patch16_224"
        raise InputError(f"model.trunk is {config.trunk!r}, not a timm model: give one such as {near}")
    arguments: dict[str, Any] = {"img_size": tuple(config.image_size), "num_classes": 0, **config.trunk_args}
    try:
        trunk = timm.create_model(config.trunk, pretrained=config.pretrained, **arguments)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise InputError(f"timm cannot build {config.trunk} as a ViT with {config.trunk_args}: {error}") from error
    # Exact types: `Backbone.forward` does what timm's forward does for these, and subclasses do more.
    plain = (
        type(trunk) in (VisionTransformer, VisionTransformerDistilled)
        and isinstance(trunk.pos_embed, Tensor)
        and type(trunk.patch_embed) is PatchEmbed
        and isinstance(trunk.patch_drop, nn.Identity)
        and all(type(block) is Block for block in trunk.blocks)
    )
    if not plain:
        raise InputError(
            f"model.trunk {config.trunk} with {config.trunk_args} is a {type(trunk).__name__} with parts this model "
            "does not have: give a plain VisionTransformer with a learned position embedding, such as "
            "vit_small_patch16_224"
        )
    height, width = config.image_size
    patch = trunk.patch_embed.patch_size
    if patch[0] != patch[1] or trunk.patch_embed.proj.in_channels != 3:
        raise InputError(f"model.trunk_args {config.trunk_args}: give a square patch and 3 input channels (RGB)")
    if height % trunk.patch_embed.patch_size[0] or width % trunk.patch_embed.patch_size[1]:
        raise InputError(
            f"model.image_size {height}x{width} is not a multiple of the patch size {trunk.patch_embed.patch_size}"
        )
    # M3ViT has no final norm: each head starts with its own (its code: models/vit_up_head.py).
    trunk.norm = nn.Identity()
    return trunk


class Backbone(nn.Module):
    """Turns images into tokens, one set of tokens per task."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.trunk: Any = make_trunk(config)  # Any: timm's attributes are not annotated
        self.dim = int(self.trunk.embed_dim)
        self.patch_size = int(self.trunk.patch_embed.patch_size[0])
        self.checkpoint_activations = False  # in training, keep only each block's input and compute the rest again
        self.moe_indices = config.moe_indices(len(self.trunk.blocks))
        for index in self.moe_indices:
            router = Router(
                self.dim, config.num_experts, config.top_k, len(config.tasks), config.router, config.router_noise
            )
            bank = ExpertBank(config.num_experts, self.dim, round(self.dim * config.expert_ratio))
            self.trunk.blocks[index].mlp = MoELayer(router, bank, config.experts)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return how many patches (rows, columns) the images hold, or raise InputError if they do not divide."""
        height, width = images.shape[-2:]
        if not torch.compiler.is_exporting() and (height % self.patch_size or width % self.patch_size):
            raise InputError(f"image size {height}x{width}: give multiples of the patch size {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """Return the position embedding [1, T, D] of a grid of patches."""
        trunk = self.trunk
        position = trunk.pos_embed if trunk.no_embed_class else trunk.pos_embed[:, trunk.num_prefix_tokens :]
        made_for = trunk.patch_embed.grid_size
        # Exported graphs always interpolate (the identity at the size trained for), else the exporter would bake
        # in whichever branch its example image takes.
        if torch.compiler.is_exporting() or grid != tuple(made_for):
            square = position.unflatten(1, made_for).permute(0, 3, 1, 2)
            position = F.interpolate(square, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        return position

    def embed(self, images: Tensor) -> Tensor:
        """Return the embedded tokens [B, P + T, D], P prefix tokens first."""
        trunk = self.trunk
        x = trunk.patch_embed.norm(trunk.patch_embed.proj(images).flatten(2).transpose(1, 2))
        x = x + self.position_embedding(self.grid(images))
        prefix = self.prefix()
        if prefix is not None:
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        return trunk.norm_pre(trunk.pos_drop(x))

    def prefix(self) -> Tensor | None:
        """Return the class, distillation and register tokens with their positions, [1, P, D], or None."""
        trunk = self.trunk
        candidates = (trunk.cls_token, getattr(trunk, "dist_token", None), trunk.reg_token)
        tokens = [token for token in candidates if token is not None]
        if not tokens:
            return None
        joined = torch.cat(tokens, dim=1)
        return joined if trunk.no_embed_class else joined + trunk.pos_embed[:, : trunk.num_prefix_tokens]

    def run_block(self, block: Any, x: Tensor, task_ids: tuple[int, ...]) -> tuple[Tensor, Routing | None]:
        """Run one block of the trunk on [R, B, T, D]; its routing, if it has experts."""
        attended = block.attn(block.norm1(x.flatten(0, 1)))
        x = x + block.drop_path1(block.ls1(attended)).view_as(x)
        normed = block.norm2(x)
        routing = None
        if isinstance(block.mlp, MoELayer):
            y, routing = block.mlp(normed, task_ids)
        else:
            y = block.mlp(normed)
        return x + block.drop_path2(block.ls2(y).flatten(0, 1)).view_as(y), routing

    def forward(self, images: Tensor, task_ids: tuple[int, ...]) -> tuple[Tensor, list[Routing]]:
        """Return patch tokens [R, B, T, D] (without prefix tokens) and the routing of each MoE layer.

        Up to the first router the tasks are the same, so that prefix runs once (R = 1); from there on the tasks are
        stacked. M3ViT's code re-runs the whole backbone for each task.
        """
        x = self.embed(images)[None]  # R = 1
        routings = []
        for block in self.trunk.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                # The random state is kept too: the second time, router noise and dropped paths are the same.
                x, routing = checkpoint(self.run_block, block, x, task_ids, use_reentrant=False)
            else:
                x, routing = self.run_block(block, x, task_ids)
            if routing is not None:
                routings.append(routing)
        if x.shape[0] != len(task_ids):  # no MoE layer at all
            x = x.expand(len(task_ids), -1, -1, -1)
        return x[:, :, self.trunk.num_prefix_tokens :], routings
