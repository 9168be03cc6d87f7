"""Weights of a dense trunk: timm's own, or from a file in timm's layout, an author's that timm converts, or a run's.

Read and made to fit here; initialise.py loads all of a trunk, or nothing.

Shapes: T patch tokens of the file's position embedding, (h, w) the patch grid it was made for.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from m3vit.errors import InputError, one_line
from m3vit.models.config import ModelConfig
from m3vit.models.finite import not_finite
from m3vit.models.of_timm import eva, load_state_dict, resample_abs_pos_embed, timm, vision_transformer
from m3vit.models.saved import INFO, WEIGHTS, read_info
from m3vit.models.trunk import timm_arguments
from m3vit.normalisation import recorded
from m3vit.pointers import check_content

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
RUN_PREFIX = "backbone.trunk."  # of the trunk in a run folder's model.safetensors
UNUSED = ("head.", "head_dist.", "norm.", "fc_norm.", "attn_pool.")  # of timm's classifier, which trunks do not have
SHOWN = 4  # names of an error's list


class Weights(NamedTuple):
    """Weights of a trunk, by timm's names, and the "mean" and "std" that its images had (timm's pretrained_cfg)."""

    state: dict[str, Any]
    images: Mapping[str, Any]


def of_file(trunk: Any, dense: Mapping[str, Tensor], file: str) -> Weights:
    """Read weights from a file for a trunk, whose tensors without experts are `dense`; positions are resampled.

    Their images are those of the run they are of (None without its model.json), else timm's for this trunk. Raises
    InputError if the file cannot be read, or lacks weights of the trunk, or has others, or some that are not finite.
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
            weights = _of_run(trunk, state, info)
        else:
            family = eva if isinstance(trunk, eva.Eva) else vision_transformer
            # Where DeiT-III has LayerScale as gamma_1, timm's ViTs have it as ls1.gamma.
            options = {} if family is eva else {"adapt_layer_scale": True}
            weights = Weights(family.checkpoint_filter_fn(state, trunk, **options), trunk.pretrained_cfg)
    except (RuntimeError, KeyError, ValueError, AttributeError, AssertionError, TypeError) as error:
        words = one_line(error, 300)
        raise InputError(f"model.weights {file} does not fit the trunk {_name(trunk)}: {words}") from None
    if why := misfit(dense, weights.state):
        raise InputError(
            f"model.weights {file} does not fit the trunk {_name(trunk)}: {why}; give the weights of this very trunk, "
            "or the model.trunk and trunk_args they are of"
        )
    if broken := not_finite(weights.state):
        raise InputError(f"model.weights {file} holds {broken}: give weights of a training that did not diverge")
    return weights


def run_with_experts(file: str) -> Path | None:
    """Return the folder of the run that a weights file is of, if it has experts; None for any other file.

    Raises InputError for such a file without its model.json, which says whose the gates are.
    """
    path = Path(file).expanduser()
    check_content(path, "model.weights")
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as opened:
            names = list(opened.keys())
    except Exception:  # of a damaged file, of which `of_file` says more
        return None
    if not any(name.startswith(RUN_PREFIX) and ".mlp.experts." in name for name in names):
        return None
    if path.name != WEIGHTS or not path.with_name(INFO).is_file():
        raise InputError(
            f"model.weights {file} holds experts, and no {INFO} beside it says of which tasks: give the {WEIGHTS} in "
            "its run folder, or --model.init=run:RUN"
        )
    return path.parent


def of_timm(config: ModelConfig) -> Weights:
    """Return the weights that timm publishes for a trunk, or raise InputError if it has none, or none that fit.

    timm builds a model of its own for them, and resamples patches and positions. Draws no random number.
    """
    try:
        with _quiet_hub(), _whole_weights(config), torch.random.fork_rng(devices=[]):
            trunk: Any = timm.create_model(config.trunk, pretrained=True, **timm_arguments(config))
    except InputError:
        raise
    except Exception as error:  # a failed download raises as many kinds as there are clients
        reason = one_line(error).split(". ")[0]
        raise InputError(
            f"model.pretrained: the weights of {config.trunk} with {config.trunk_args} could not be fetched "
            f"({reason}): connect this machine to the Hugging Face hub, copy a filled cache to it (HF_HOME), give "
            "a file with --model.weights, or start from random weights with --model.pretrained=false"
        ) from None
    return Weights(trunk.state_dict(), trunk.pretrained_cfg)


@contextmanager
def _whole_weights(config: ModelConfig) -> Iterator[None]:
    """Within it timm raises InputError where it would load its weights into a trunk that they do not fit.

    timm leaves out the classifier, whose absence makes it load without strictness (and of SigLIP with any), and only
    logs which tensors of a deeper trunk stay random.
    """

    def check(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        if why := misfit(module.state_dict(), state):
            raise InputError(
                f"model.pretrained: the weights of {config.trunk} do not fit it with model.trunk_args "
                f"{config.trunk_args}: {why}; leave out what changes its blocks or tokens, or start from random "
                "weights with --model.pretrained=false"
            )

    def watch(module: nn.Module, name: str, part: nn.Module | None) -> None:
        if name == "patch_embed":  # of the trunk alone
            module.register_load_state_dict_pre_hook(check)

    handle = register_module_module_registration_hook(watch)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub's line for each retry (some 50 s of them without network): `of_timm` says what failed."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def misfit(trunk: Mapping[str, Tensor], state: Mapping[str, Any]) -> str:
    """Return, in words, which tensors of a trunk `state` lacks, has besides, or has of another shape; "" if none.

    Weights of timm's classifier do not count.
    """
    own = {name: tuple(value.shape) for name, value in trunk.items() if not name.startswith(UNUSED)}
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


def _of_run(trunk: Any, state: dict[str, Tensor], info: dict[str, Any]) -> Weights:
    """Return the trunk's part of a run folder's weights, positions resampled from the grid model.json tells of.

    `info`: model.json, {} if it is not there.
    """
    images: dict[str, Any] = {"mean": None, "std": None}
    if info:
        images = recorded(info.get("normalisation"), f"normalisation of its {INFO}").plain()
    state = {name[len(RUN_PREFIX) :]: value for name, value in state.items() if name.startswith(RUN_PREFIX)}
    position = state.get("pos_embed")
    if position is None or trunk.pos_embed is None:
        return Weights(state, images)
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
    return Weights(state, images)
