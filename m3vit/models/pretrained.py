"""Weights of a dense trunk: timm's own, or from a file in timm's layout, an author's that timm converts, or a run's.

All of a trunk is loaded, or nothing.

Shapes: T patch tokens of the file's position embedding, (h, w) the patch grid it was made for.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import _builder, eva, load_state_dict, vision_transformer
from torch import Tensor

from m3vit.errors import InputError, one_line
from m3vit.models.finite import not_finite
from m3vit.models.saved import INFO, WEIGHTS, read_info
from m3vit.normalisation import recorded
from m3vit.pointers import check_content

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
RUN_PREFIX = "backbone.trunk."  # of the trunk in a run folder's model.safetensors
UNUSED = ("head.", "head_dist.", "norm.", "fc_norm.", "attn_pool.")  # of timm's classifier, which trunks do not have
SHOWN = 4  # names of an error's list


def load_weights(trunk: Any, file: str) -> None:
    """Load the trunk's weights from a file; the position embedding is resampled to the trunk's grid.

    trunk.pretrained_cfg then says of these weights what it says of timm's own: the mean and std of their images. For
    those of a run it is the run's (None without its model.json), for others timm's for this trunk.
    Raises InputError if the file cannot be read, or lacks weights of the trunk, or has others.
    """
    path = Path(file).expanduser()
    check_content(path, "model.weights")
    if path.suffix not in SUFFIXES or not path.is_file():
        raise InputError(f"model.weights {file}: give an existing file {', '.join(SUFFIXES)}")
    try:
        state: dict[str, Any] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for damaged files
        words = one_line(error, 300)
        raise InputError(f"model.weights {file} cannot be read: {words}") from None
    of_run = any(name.startswith(RUN_PREFIX) for name in state)
    # A run's weights may have been taken out of its folder.
    info = read_info(path) if of_run and path.name == WEIGHTS and path.with_name(INFO).is_file() else {}
    try:
        if of_run:
            state = _from_run(trunk, state, info)
        else:
            family = eva if isinstance(trunk, eva.Eva) else vision_transformer
            # Where DeiT-III has LayerScale as gamma_1, timm's ViTs have it as ls1.gamma.
            options = {} if family is eva else {"adapt_layer_scale": True}
            state = family.checkpoint_filter_fn(state, trunk, **options)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError, TypeError) as error:
        words = one_line(error, 300)
        raise InputError(f"model.weights {file} does not fit the trunk {_name(trunk)}: {words}") from None
    if why := misfit(trunk, state):
        raise InputError(
            f"model.weights {file} does not fit the trunk {_name(trunk)}: {why}; give the weights of this very trunk, "
            "or the model.trunk and trunk_args they are of"
        )
    if broken := not_finite(state):
        raise InputError(f"model.weights {file} holds {broken}: give weights of a training that did not diverge")
    trunk.load_state_dict({name: value for name, value in state.items() if not name.startswith(UNUSED)})


@contextmanager
def whole_weights(name: str, arguments: dict[str, Any]) -> Iterator[None]:
    """Within it timm raises InputError where it would load its weights into a trunk that they do not fit.

    timm resamples patches and positions to other sizes and leaves out the classifier. Since that is gone, it loads
    without strictness, and only logs which tensors of a deeper trunk stay random.
    """
    load = _builder.load_pretrained

    def load_checked(model: Any, *args: Any, **options: Any) -> None:
        def check(module: Any, state: dict[str, Any], *_: Any) -> None:
            if why := misfit(module, state):
                raise InputError(
                    f"model.pretrained: the weights of {name} do not fit it with model.trunk_args {arguments}: {why}; "
                    "leave out what changes its blocks or tokens, or start from random weights with "
                    "--model.pretrained=false"
                )

        handle = model.register_load_state_dict_pre_hook(check)
        try:
            load(model, *args, **options)
        finally:
            handle.remove()

    _builder.load_pretrained = load_checked
    try:
        yield
    finally:
        _builder.load_pretrained = load


def misfit(trunk: Any, state: dict[str, Any]) -> str:
    """Return, in words, which weights of a trunk `state` lacks, has besides, or has of another shape; "" if none.

    Weights of timm's classifier do not count.
    """
    own = {name: tuple(value.shape) for name, value in trunk.state_dict().items() if not name.startswith(UNUSED)}
    given = {name: tuple(getattr(value, "shape", ())) for name, value in state.items() if not name.startswith(UNUSED)}
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    reshaped = [name for name in own if name in given and own[name] != given[name]]
    parts = []
    if bare := _blocks(own) - _blocks(given):
        parts.append(f"no weights for {_numbered(bare)} of {len(_blocks(own))}")
    if surplus := _blocks(given) - _blocks(own):
        parts.append(f"weights of {_numbered(surplus)}, which the trunk does not have")
    for names, what in ((missing, f"of {len(own)} tensors missing"), (unexpected, "unexpected")):
        if names:
            shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            parts.append(f"{len(names)} {what} ({shown})")
    if reshaped:
        first = reshaped[0]
        parts.append(
            f"{len(reshaped)} of {len(own)} tensors of another shape ({first} is {given[first]}, expected {own[first]})"
        )
    return ", ".join(parts)


def _blocks(names: Iterable[str]) -> set[int]:
    """Return the numbers of the blocks that have a tensor among these."""
    parts = (name.split(".") for name in names)
    return {int(part[1]) for part in parts if part[0] == "blocks" and len(part) > 2 and part[1].isdecimal()}


def _numbered(blocks: set[int]) -> str:
    """Name blocks by their numbers, counted from 0."""
    if len(blocks) == 1:
        return f"block {min(blocks)}"
    if len(blocks) == max(blocks) - min(blocks) + 1:
        return f"blocks {min(blocks)} to {max(blocks)}"
    return f"blocks {', '.join(str(number) for number in sorted(blocks))}"


def _name(trunk: Any) -> str:
    return str(getattr(trunk, "pretrained_cfg", {}).get("architecture", type(trunk).__name__))


def _from_run(trunk: Any, state: dict[str, Tensor], info: dict[str, Any]) -> dict[str, Tensor]:
    """Return the trunk's part of a run folder's weights, positions resampled from the grid model.json tells of.

    `info`: model.json, {} if it is not there. Its normalisation goes into trunk.pretrained_cfg.
    """
    normal: dict[str, Any] = {"mean": None, "std": None}
    if info:
        normal = recorded(info.get("normalisation"), f"normalisation of its {INFO}").plain()
    trunk.pretrained_cfg = {**trunk.pretrained_cfg, **normal}
    state = {name[len(RUN_PREFIX) :]: value for name, value in state.items() if name.startswith(RUN_PREFIX)}
    position = state.get("pos_embed")
    if position is None or trunk.pos_embed is None:
        return state
    prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    tokens = position.shape[1] - prefix
    patch = trunk.patch_embed.patch_size[0]
    if info:
        height, width = info["architecture"]["image_size"]
        grid = (height // patch, width // patch)
    else:
        grid = (math.isqrt(tokens), math.isqrt(tokens))
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"its {tokens} positions are no {grid[0]}x{grid[1]} grid; keep model.json beside the file")
    with torch.no_grad():
        state["pos_embed"] = resample_abs_pos_embed(position, trunk.patch_embed.grid_size, list(grid), prefix)
    return state
