"""The trunk: a vision transformer of timm, without its classifier, or what is wrong with the one asked for.

A trunk is what timm builds from its classes VisionTransformer (AugReg, DeiT, DINOv2, CLIP, ...) or Eva (EVA-02,
DINOv3, RoPE-ViT, ...), with any patch size, prefix tokens and positions.
"""

import difflib
from typing import Any

from torch import nn

from m3vit.errors import InputError, one_line
from m3vit.models.config import ModelConfig
from m3vit.models.of_timm import Eva, PatchEmbed, VisionTransformer, timm

FAMILIES = ("vision_transformer", "deit", "eva")  # the modules of timm that build such trunks
EXAMPLES = "vit_small_patch16_224, deit3_small_patch16_224, vit_small_patch14_reg4_dinov2 or vit_small_patch16_dinov3"


def make_trunk(config: ModelConfig) -> VisionTransformer | Eva:
    """Build the timm model, without classifier and final norm, or raise InputError if it is not a ViT we can use."""
    if not timm.is_model(config.trunk):
        names = [name for family in FAMILIES for name in timm.list_models(module=family)]
        near = ", ".join(difflib.get_close_matches(config.trunk, names)) or EXAMPLES
        raise InputError(f"model.trunk is {config.trunk!r}, not a timm model: give one such as {near}")
    try:
        trunk = timm.create_model(config.trunk, **timm_arguments(config))
    except Exception as error:  # bad arguments raise many kinds
        family = timm.models.model_entrypoint(config.trunk).__module__.rpartition(".")[2]
        if family not in FAMILIES:
            raise _refuse(config, f"of timm's family {family}") from error
        words = one_line(error)
        raise InputError(f"timm cannot build {config.trunk} as a ViT with {config.trunk_args}: {words}") from error
    _check(config, trunk)
    # M3ViT has no final norm: each head starts with its own (its code: models/vit_up_head.py). The rest is of
    # timm's classifier: parameters without gradients, which training on several processes would wait for.
    trunk.norm = trunk.fc_norm = nn.Identity()
    trunk.attn_pool = None
    return trunk


def timm_arguments(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of timm's create_model for a trunk."""
    return {
        "img_size": tuple(config.image_size),
        **config.trunk_args,
        "num_classes": 0,
        "dynamic_img_size": True,  # positions are resampled, or computed, for each image's grid
    }


def _check(config: ModelConfig, trunk: Any) -> None:
    """Raise InputError for a model of timm that is no trunk of ours."""
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


def _refuse(config: ModelConfig, what: str) -> InputError:
    return InputError(
        f"model.trunk {config.trunk} with {config.trunk_args} is {what}, not a plain vision transformer: give one of "
        f"timm's VisionTransformer or Eva models, such as {EXAMPLES}"
    )
