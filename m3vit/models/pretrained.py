"""Weights of a dense trunk from a file: timm's layout, an author's that timm converts, or a run folder's.

Shapes: T patch tokens of the file's position embedding, (h, w) the patch grid it was made for.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import eva, load_state_dict, vision_transformer
from torch import Tensor

from m3vit.errors import InputError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
RUN_PREFIX = "backbone.trunk."  # of the trunk in a run folder's model.safetensors
UNUSED = ("head.", "head_dist.", "norm.", "fc_norm.", "attn_pool.")  # of timm's classifier, which trunks do not have
SHOWN = 4  # names of an error's list


def load_weights(trunk: Any, file: str) -> None:
    """Load the trunk's weights from a file; the position embedding is resampled to the trunk's grid.

    Raises InputError if the file cannot be read, or lacks weights of the trunk, or has others.
    """
    path = Path(file).expanduser()
    if path.suffix not in SUFFIXES or not path.is_file():
        raise InputError(f"model.weights {file}: give an existing file {', '.join(SUFFIXES)}")
    try:
        state: dict[str, Any] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for damaged files
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"model.weights {file} cannot be read: {words}") from None
    try:
        if any(name.startswith(RUN_PREFIX) for name in state):
            state = _from_run(trunk, state, path)
        else:
            family = eva if isinstance(trunk, eva.Eva) else vision_transformer
            # Where DeiT-III has LayerScale as gamma_1, timm's ViTs have it as ls1.gamma.
            options = {} if family is eva else {"adapt_layer_scale": True}
            state = family.checkpoint_filter_fn(state, trunk, **options)
        state = {name: value for name, value in state.items() if not name.startswith(UNUSED)}
        missing, unexpected = trunk.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError, TypeError) as error:
        words = " ".join(str(error).split())[:300]
        raise InputError(f"model.weights {file} does not fit the trunk {_name(trunk)}: {words}") from None
    if missing or unexpected:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise InputError(
            f"model.weights {file} does not fit the trunk {_name(trunk)}: {' and '.join(parts)}; give the weights of "
            "this very trunk, or the model.trunk and trunk_args they are of"
        )


def _name(trunk: Any) -> str:
    return str(getattr(trunk, "pretrained_cfg", {}).get("architecture", type(trunk).__name__))


def _from_run(trunk: Any, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the trunk's part of a run folder's weights, positions resampled from the grid model.json tells of."""
    state = {name[len(RUN_PREFIX) :]: value for name, value in state.items() if name.startswith(RUN_PREFIX)}
    position = state.get("pos_embed")
    if position is None or trunk.pos_embed is None:
        return state
    prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    tokens = position.shape[1] - prefix
    info = path.with_name("model.json")
    patch = trunk.patch_embed.patch_size[0]
    if info.is_file():
        height, width = json.loads(info.read_text())["architecture"]["image_size"]
        grid = (height // patch, width // patch)
    else:
        grid = (math.isqrt(tokens), math.isqrt(tokens))
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"its {tokens} positions are no {grid[0]}x{grid[1]} grid; keep model.json beside the file")
    with torch.no_grad():
        state["pos_embed"] = resample_abs_pos_embed(position, trunk.patch_embed.grid_size, list(grid), prefix)
    return state
