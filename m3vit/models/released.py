"""Read a checkpoint in the layout of M3ViT's released code (github.com/VITA-Group/M3ViT), under our names.

Its `train_fastmoe.py` saves {"state_dict": ..., ...} with torch: one file, or a folder of one file a process, 0.pth the
whole model and each of the others its own share of the experts. Names and shapes, by its files in models/:

    theirs                                           ours
    backbone.blocks.B.mlp.experts.htoh4  [E, H, D]   w1, b1 of the bank (fastmoe's FMoELinear keeps [out, in])
    backbone.blocks.B.mlp.experts.h4toh  [E, D, H]   w2, b2
    ... .mlp.gate.R.w_gate               [D, E]      gates.R of a multi router, transposed; R counts the tasks in the
                                                     order of its configuration (ORDER), not of the model here
    ... .mlp.gate.w_gate                 [D, E]      the gate of a single router
    ... .mlp.gate.w_gate                 [D + F, E]  of a task-conditioned one: the last F rows read what the MLP
        backbone.gate_task_represent                 (Linear, GELU, Linear, LayerNorm) makes of the task's one-hot code.
                                                     The same for every token, that is a bias for each expert and
                                                     task: our embedding is the one-hot code, our gate has the biases
    backbone.*, other                                the trunk, by timm's names
    decoders.TASK.*                                  a pup head, if the model has those

Not said by a file, and to be given as the run had it: model.trunk_args.num_heads (12 in its ViT-small), model.top_k,
and model.image_size, which positions are laid out by.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3vit.errors import InputError, one_line
from m3vit.models.config import ModelConfig
from m3vit.models.finite import not_finite
from m3vit.models.from_run import Trained
from m3vit.models.router import EMBEDDING
from m3vit.normalisation import recorded
from m3vit.pointers import check_content

ORDER = ("semseg", "human_parts", "sal", "normals", "edge", "depth")  # of tasks (its code: utils/config.py)
OURS = {"sal": "saliency"}
GRIDS = ((30, 40), (32, 32), (8, 16), (14, 14), (24, 24))  # of NYUD, PASCAL and Cityscapes, and of its pretrained ViTs
KEY = "model.init m3vit:"
BANK = {"htoh4.weight": "w1", "htoh4.bias": "b1", "h4toh.weight": "w2", "h4toh.bias": "b2"}


def read_released(given: str, model: ModelConfig) -> tuple[Trained, list[str]]:
    """Read a checkpoint, and return it as a run whose tensors have our names, and the names of those it has besides.

    `model`: of the model to be filled, for what a checkpoint does not say. Raises InputError if it cannot be read, or
    is of another layout.
    """
    path = Path(given).expanduser()
    theirs = _gathered(path)
    blocks = sorted(
        {int(found[1]) for name in theirs if (found := re.match(r"backbone\.blocks\.(\d+)\.mlp\.gate\.", name))}
    )
    if not blocks or "backbone.patch_embed.proj.weight" not in theirs:
        raise InputError(
            f"{KEY}{given} is not in the layout of M3ViT's code (it lacks backbone.patch_embed.proj.weight, or gates "
            "such as backbone.blocks.1.mlp.gate.0.w_gate): weights of a dense ViT are for model.weights, runs of this "
            "project for run:"
        )
    tasks = [OURS.get(task, task) for task in ORDER if any(name.startswith(f"decoders.{task}.") for name in theirs)]
    multi = f"backbone.blocks.{blocks[0]}.mlp.gate.0.w_gate" in theirs
    dim = theirs["backbone.patch_embed.proj.weight"].shape[0]
    # Of a backbone alone, the gates are taken to be in the order of the model's tasks.
    tasks = tasks or list(model.tasks)
    conditioned = not multi and len(theirs[f"backbone.blocks.{blocks[0]}.mlp.gate.w_gate"]) > dim
    state: dict[str, Tensor] = {}
    besides: list[str] = []
    biases = _represented(theirs) if conditioned else None
    for name, value in theirs.items():
        if re.match(r"backbone\.gate_task_represent\.", name) and biases is not None:
            continue
        if (ours := _our_name(name)) is None:
            besides.append(name)
        elif ".router.gates." in ours:
            _put_gate(state, ours, value, dim, biases)
        else:
            state[ours] = value
    _check_experts(given, state, blocks)
    if multi and (count := _count(theirs, blocks[0])) != len(tasks):
        raise InputError(
            f"{KEY}{given} has gates of {count} tasks, and the tasks are {', '.join(tasks)}: give --model.tasks of the "
            f"{count} that it was trained on, in their order"
        )
    config = replace(
        model,
        tasks=tasks,
        router="multi" if multi else "task_conditioned" if conditioned else "single",
        head="pup" if any(name.startswith("decoders.") for name in theirs) else model.head,
        image_size=_image_size(given, state, model),
    )
    return Trained(path.name, path, state, config, {}, recorded(None, KEY).plain(), ""), besides


def _gathered(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's file, or of all files of its folder, without the prefix of processes."""
    files = sorted(path.glob("*.pth"), key=lambda file: (len(file.stem), file.stem)) if path.is_dir() else [path]
    if not files:
        raise InputError(
            f"{KEY}{path} holds no .pth file: give a checkpoint's file, or the folder of its 0.pth, 1.pth, ..."
        )
    states = [_read(file) for file in files]
    found = states[0]
    for state in states[1:]:
        for name, value in state.items():
            if ".mlp.experts." in name and name in found:
                found[name] = torch.cat([found[name], value])
    return found


def _read(path: Path) -> dict[str, Tensor]:
    check_content(path, KEY)
    if not path.is_file():
        raise InputError(
            f"{KEY}{path} does not exist: give a checkpoint's file, or the folder of its 0.pth, 1.pth, ..."
        )
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises many kinds for damaged files, and for what is no plain tensor
        raise InputError(
            f"{KEY}{path} cannot be read as tensors alone ({one_line(error, 200)}): load it where you trust it, and "
            "save its 'state_dict' alone"
        ) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{KEY}{path} holds no state_dict of tensors: give a checkpoint as M3ViT's code saves it")
    if broken := not_finite(state):
        raise InputError(f"{KEY}{path} holds {broken}: give weights of a training that did not diverge")
    return {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }


def _our_name(name: str) -> str | None:
    """Return the name here of a tensor there, None of what has none."""
    if found := re.fullmatch(r"backbone\.(blocks\.\d+\.mlp)\.experts\.(\w+\.\w+)", name):
        return f"backbone.trunk.{found[1]}.experts.{BANK[found[2]]}" if found[2] in BANK else None
    if found := re.fullmatch(r"backbone\.(blocks\.\d+\.mlp)\.gate\.(?:(\d+)\.)?w_gate", name):
        return f"backbone.trunk.{found[1]}.router.gates.{found[2] or 0}"
    if ".mlp.gate." in name or name.startswith(("backbone.gate_task_represent.", "backbone.dist_token")):
        return None  # learned noise, auxiliary gates; a second token that it keeps and does not use
    if name.startswith("backbone."):
        return f"backbone.trunk.{name.removeprefix('backbone.')}"
    if found := re.fullmatch(r"decoders\.(\w+)\.(norm|conv_\d|syncbn_fc_\d)\.(\w+)", name):
        task, part, last = OURS.get(found[1], found[1]), found[2], found[3]
        if part == "conv_4":
            part = "output"
        elif part != "norm":
            part = f"stages.{part[-1]}.{0 if part.startswith('conv') else 1}"
        return f"heads.{task}.{part}.{last}"
    return None


def _put_gate(state: dict[str, Tensor], name: str, gate: Tensor, dim: int, codes: Tensor | None) -> None:
    """Put a gate [D, E] or [D + F, E]; `codes` [R, F] are what the last F of its rows read for each task."""
    if codes is None:
        state[name] = gate.T
        return
    tasks = len(codes)
    biases = torch.zeros(gate.shape[1], EMBEDDING)
    biases[:, :tasks] = (codes @ gate[dim:]).T
    state[name] = torch.cat([gate[:dim].T, biases], dim=1)
    prefix = f"{name.removesuffix('gates.0')}task_embedding."
    first = torch.zeros(EMBEDDING, tasks)
    first[:tasks] = torch.eye(tasks)
    state[f"{prefix}0.weight"], state[f"{prefix}0.bias"] = first, torch.zeros(EMBEDDING)
    state[f"{prefix}2.weight"], state[f"{prefix}2.bias"] = torch.eye(EMBEDDING), torch.zeros(EMBEDDING)


def _represented(theirs: dict[str, Tensor]) -> Tensor:
    """Return what its gate_task_represent makes of each task, [R, F] (its code: new_Mlp)."""
    part = {name: theirs.get(f"backbone.gate_task_represent.{name}") for name in _NEW_MLP}
    if missing := [name for name, value in part.items() if value is None]:
        raise InputError(f"{KEY} its gates read a code of the task, and gate_task_represent lacks {', '.join(missing)}")
    given: dict[str, Any] = part
    hidden = F.gelu(torch.eye(given["fc1.weight"].shape[1]) @ given["fc1.weight"].T + given["fc1.bias"])
    codes = hidden @ given["fc2.weight"].T + given["fc2.bias"]
    return F.layer_norm(codes, codes.shape[1:], given["norm.weight"], given["norm.bias"], 1e-6)


_NEW_MLP = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "norm.weight", "norm.bias")


def _count(theirs: dict[str, Tensor], block: int) -> int:
    return len([name for name in theirs if re.fullmatch(rf"backbone\.blocks\.{block}\.mlp\.gate\.\d+\.w_gate", name)])


def _check_experts(given: str, state: dict[str, Tensor], blocks: list[int]) -> None:
    """Raise InputError unless each block has all experts that its gates choose from."""
    for block in blocks:
        prefix = f"backbone.trunk.blocks.{block}.mlp."
        lacking = [part for part in BANK.values() if f"{prefix}experts.{part}" not in state]
        if lacking:
            raise InputError(
                f"{KEY}{given} lacks {', '.join(lacking)} of the experts of block {block}: it is not whole"
            )
        there, wanted = len(state[f"{prefix}experts.w1"]), len(state[f"{prefix}router.gates.0"])
        if there != wanted:
            raise InputError(
                f"{KEY}{given} has {there} of the {wanted} experts that the gates of block {block} choose from: each "
                "process saved its own; give the folder with the files of all of them"
            )


def _image_size(given: str, state: dict[str, Tensor], model: ModelConfig) -> tuple[int, int]:
    """Return the size of the images that the positions are of: the model's, or a published one of as many patches."""
    patch = state["backbone.trunk.patch_embed.proj.weight"].shape[-1]
    position = state.get("backbone.trunk.pos_embed")
    height, width = model.image_size
    if position is None:
        return height, width
    patches = position.shape[1] - 1
    for rows, columns in ((height // patch, width // patch), *GRIDS):
        if rows * columns == patches:
            return rows * patch, columns * patch
    raise InputError(
        f"{KEY}{given} has {patches} positions, which are no grid of patches of {patch} in model.image_size "
        f"{height}x{width} nor in a published one: give the image_size it was trained with"
    )
