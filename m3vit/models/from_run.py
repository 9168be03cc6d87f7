"""Start from a trained run: what of its weights fits a model of other tasks, classes, size, experts or router.

A tensor is taken where the model has one of the same name and shape. What is made to fit:

positions    resampled from the run's grid of patches to the model's, patches from its patch size
experts      of another number: more are copies of the run's, in order, with a little noise; fewer are those that the
             model's tasks chose most, by the figures of `m3vit routing RUN`
gates        of a task: that task's; of a task that the run has not: the mean of all its gates. A router that does not
             tell tasks apart starts with the mean of the model's tasks, and its gate starts each task's gate (as M3ViT
             loads single-gate weights into several gates). What a task-conditioned router adds for each task is no
             part of the other kinds.
MLPs         of a dense run are up-cycled to experts (upcycling.py)
classes      of a task whose classes are others: the head's outputs of the classes that have the same name

Shapes: D embedding dimension, E experts, E_s those of the run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3vit.digests import read_sealed_json
from m3vit.errors import InputError, first_line
from m3vit.label_sets import LABEL_SETS
from m3vit.models.config import ModelConfig
from m3vit.models.decoders.base import make_decoder
from m3vit.models.meta import without_values
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.of_timm import resample_abs_pos_embed, resample_patch_embed
from m3vit.models.router import Router
from m3vit.models.saved import INFO, WEIGHTS, read_saved
from m3vit.models.trunk import make_trunk
from m3vit.models.upcycling import upcycle
from m3vit.normalisation import recorded
from m3vit.pointers import check_content

TRUNK, HEADS = "backbone.trunk.", "heads."
NOISE = 0.02  # of copied experts and their gates, as a share of the tensor's standard deviation
BANK = ("w1", "b1", "w2", "b2")


@dataclass(frozen=True)
class Trained:
    """A run's model, read but not built. classes: of each task that has any; images: "mean" and "std" of its images."""

    name: str
    folder: Path
    state: dict[str, Tensor]
    config: ModelConfig
    classes: Mapping[str, tuple[str, ...]]
    images: dict[str, Any]
    digest: str  # of its weights


@dataclass
class Taken:
    """What goes into a model: {name of its tensor: value}; and of each of the run's tensors "", or why not."""

    values: dict[str, Tensor]
    fates: dict[str, str]


def read_trained(given: str, key: str = "model.init run:") -> Trained:
    """Read the model of a run folder, or raise InputError naming what is wrong with it; `key` says who asks."""
    folder = Path(given).expanduser()
    weights = folder / WEIGHTS
    check_content(weights, key)
    if not weights.is_file() or not (folder / INFO).is_file():
        missing = next((name for name in (INFO, WEIGHTS) if not (folder / name).is_file()), INFO)
        raise InputError(f"{key}{given} is no trained run (it has no {missing}): give a folder that m3vit train wrote")
    state, info = read_saved(weights)
    try:
        images = recorded(info.get("normalisation"), f"normalisation of {folder / INFO}").plain()
        config = ModelConfig(**info["architecture"] | {"normalisation": images})
        classes = {task: tuple(names) for task, names in info["classes"].items()}
        height, width = config.image_size
        return Trained(
            folder.resolve().name,
            folder,
            state,
            replace(config, image_size=(int(height), int(width))),
            classes,
            images,
            info["weights_sha256"],
        )
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(f"{folder / INFO} cannot be read ({first_line(error)}): the run folder is damaged") from None


@torch.no_grad()
def take(model: MultiTaskModel, run: Trained, *, heads: bool = True) -> Taken:
    """Copy into a model what fits of a run's, with its decoder or without; up-cycle MLPs where the model has experts.

    Raises InputError if nothing of the trunk fits, or what is asked for needs what is not there (figures of routing to
    leave out experts by, MLPs of sizes that can be up-cycled).
    """
    taken = Taken({}, dict.fromkeys(run.state, "not in this model"))
    check_attention(model, run)
    _take_trunk(model, run, taken)
    own = model.state_dict()
    for index in model.backbone.moe_indices:
        _take_experts(model, run, index, taken)
    if heads:
        take_heads(model, run, taken)
    if not any(fate == "" and name.startswith(TRUNK) for name, fate in taken.fates.items()):
        raise InputError(
            f"nothing of the trunk of {run.folder} fits model.trunk {model.config.trunk} with trunk_args "
            f"{model.config.trunk_args}: the run has {run.config.trunk} with {run.config.trunk_args}; give these"
        )
    for name, value in taken.values.items():
        own[name].copy_(value)
    _upcycle_dense(model, run, taken)
    return taken


# -------------------------------------------------------------------------------------------------------------- trunk


def dense_tensors(model: MultiTaskModel) -> dict[str, Tensor]:
    """Return the tensors of the trunk by timm's names, where there are experts those of the MLP they replaced."""
    replaced = {f"blocks.{index}.mlp.": mlp for index, mlp in model.backbone.replaced.items()}
    own = model.backbone.trunk.state_dict()
    tensors = {name: value for name, value in own.items() if not name.startswith(tuple(replaced))}
    return tensors | {f"{prefix}{name}": v for prefix, mlp in replaced.items() for name, v in mlp.state_dict().items()}


def _take_trunk(model: MultiTaskModel, run: Trained, taken: Taken) -> None:
    """Take the trunk's tensors but for experts and routers; MLPs in the place of experts are left to `_upcycle`."""
    prefixes = tuple(f"{TRUNK}blocks.{index}.mlp." for index in model.backbone.moe_indices)
    for name, value in model.state_dict().items():
        if name.startswith(TRUNK) and name in run.state and not name.startswith(prefixes):
            fitted = fit(model, run, name.removeprefix(TRUNK))
            _offer(taken, name, fitted, value)


def fit(model: MultiTaskModel, run: Trained, name: str) -> Tensor:
    """Return a tensor of the run's trunk, by timm's name, resampled to the model's patches and grid of them."""
    value, trunk = run.state[f"{TRUNK}{name}"], model.backbone.trunk
    if name == "patch_embed.proj.weight":
        size = list(trunk.patch_embed.proj.weight.shape[-2:])
        return value if list(value.shape[-2:]) == size else resample_patch_embed(value, size)
    if name != "pos_embed" or trunk.pos_embed is None:
        return value
    patch = run.state[f"{TRUNK}patch_embed.proj.weight"].shape[-1]
    grid = [side // patch for side in run.config.image_size]
    prefix = value.shape[1] - grid[0] * grid[1]
    if prefix != trunk.pos_embed.shape[1] - trunk.patch_embed.num_patches:
        return value  # other prefix tokens: of another shape, or refused as such
    return resample_abs_pos_embed(value, trunk.patch_embed.grid_size, grid, prefix)


def check_attention(model: MultiTaskModel, run: Trained) -> None:
    """Raise InputError if the run's attention has another number of heads: its tensors fit, and mean other things."""
    with without_values():
        theirs: Any = make_trunk(run.config)
    heads, own = theirs.blocks[0].attn.num_heads, model.backbone.trunk.blocks[0].attn.num_heads
    if theirs.embed_dim == model.backbone.dim and heads != own:
        raise InputError(
            f"{run.folder} was trained with {heads} attention heads, and model.trunk {model.config.trunk} has {own}: "
            f"give --model.trunk_args.num_heads={heads}"
        )


def _offer(taken: Taken, name: str, value: Tensor, own: Tensor) -> None:
    """Take a tensor of the run under its own name, if it has the shape of the model's."""
    if value.shape == own.shape:
        taken.values[name], taken.fates[name] = value, ""
    else:
        taken.fates[name] = f"{_shape(value)}, here {_shape(own)}"


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a number"


def _upcycle_dense(model: MultiTaskModel, run: Trained, taken: Taken) -> None:
    """Make experts of the run's MLPs, in blocks where the model has experts and the run has none."""
    for index, mlp in model.backbone.replaced.items():
        prefix = f"{TRUNK}blocks.{index}.mlp."
        found = {name: value for name, value in run.state.items() if name.startswith(prefix)}
        if not found or f"{prefix}experts.w1" in found:
            continue
        own = mlp.state_dict()
        given = {name.removeprefix(prefix): value for name, value in found.items()}
        if {name: value.shape for name, value in given.items()} != {name: value.shape for name, value in own.items()}:
            reason = "MLPs of another shape than model.trunk_args has"
            taken.fates |= dict.fromkeys(found, reason)
            continue
        if model.config.experts_per_task:
            raise InputError(
                f"model.init run:{run.folder} up-cycles the MLPs of a dense run, whose copies every task must be able "
                "to reach: leave out model.experts_per_task"
            )
        mlp.load_state_dict(given)
        layer = model.backbone.trunk.blocks[index].mlp
        upcycle(layer, mlp, model.config.upcycle_gates, f"block {index} of {run.name}")
        taken.fates |= dict.fromkeys(found, "")
        made = layer.state_dict()
        taken.values |= {
            f"{prefix}{name}": value for name, value in made.items() if name.startswith(("experts.", "router.gates."))
        }


# -------------------------------------------------------------------------------------------------- experts and gates


def _take_experts(model: MultiTaskModel, run: Trained, index: int, taken: Taken) -> None:
    """Take the experts and gates of one block, where both have them."""
    prefix = f"{TRUNK}blocks.{index}.mlp."
    layer: MoELayer = model.backbone.trunk.blocks[index].mlp
    if f"{prefix}experts.w1" not in run.state:
        return
    bank = {part: run.state[f"{prefix}experts.{part}"] for part in BANK}
    if bank["w1"].shape[1:] != layer.experts.w1.shape[1:]:
        hidden, dim = bank["w1"].shape[1:]
        ours = layer.experts.w1.shape[1:]
        reason = f"experts of {hidden} hidden units and dimension {dim}, here {ours[0]} and {ours[1]}"
        taken.fates |= {name: reason for name in run.state if name.startswith(prefix)}
        return
    chosen = _which(run, index, len(bank["w1"]), layer.router.num_experts, model.config.tasks)
    fresh = len(set(chosen))  # the ones after it are copies
    for part, value in bank.items():
        taken.values[f"{prefix}experts.{part}"] = _noisy(value[chosen], fresh)
        taken.fates[f"{prefix}experts.{part}"] = ""
    _take_gates(model, run, f"{prefix}router.", layer.router, chosen, taken)


def _which(run: Trained, block: int, there: int, wanted: int, tasks: list[str]) -> list[int]:
    """Return which of the run's experts become those of the model, in order."""
    if wanted >= there:
        return [expert % there for expert in range(wanted)]
    if not run.folder.is_dir() or not run.digest:
        raise InputError(f"{run.folder} has {there} experts a block, and model.num_experts is {wanted}: give {there}")
    path = run.folder / "routing" / "routing.json"
    how = f"m3vit routing {run.folder} writes it; or keep model.num_experts {there}"
    if not path.is_file():
        raise InputError(
            f"model.num_experts {wanted} leaves out {there - wanted} of the {there} experts of {run.folder}, those "
            f"least used by {path}, which is not there: {how}"
        )
    found = read_sealed_json(path, how)
    if found.get("run", {}).get("weights_sha256") != run.digest:
        raise InputError(f"{path} is of other weights than the run has now: {how}")
    try:
        rows = found["use"][str(block)]["tasks"]
        counted = [rows[task]["chosen"] for task in tasks if task in rows] or [row["chosen"] for row in rows.values()]
        use = torch.tensor(counted, dtype=torch.float64).mean(dim=0)
        assert len(use) == there
    except (KeyError, TypeError, ValueError, AssertionError):
        raise InputError(f"{path} does not tell how block {block} uses {there} experts: {how}") from None
    return sorted(use.argsort(descending=True, stable=True)[:wanted].tolist())


def _noisy(values: Tensor, fresh: int) -> Tensor:
    """Return a tensor whose rows from `fresh` on, copies, have noise: without it they would be trained alike."""
    if fresh < len(values):
        values = values.clone()
        values[fresh:] += NOISE * values[:fresh].std() * torch.randn_like(values[fresh:])
    return values


def _take_gates(
    model: MultiTaskModel, run: Trained, prefix: str, router: Router, chosen: list[int], taken: Taken
) -> None:
    """Take the gates of the chosen experts, from the run's kind of router to the model's."""
    tasks, fresh = model.config.tasks, len(set(chosen))
    own = dict(router.named_parameters())
    for kind in ("gates", "noise_gates"):
        found = sorted(name for name in run.state if name.startswith(f"{prefix}{kind}."))
        if not found or f"{kind}.0" not in own:
            continue
        rows = {task: _noisy(_gate(run, prefix, kind, task, router.dim)[chosen], fresh) for task in tasks}
        for number in range(len(router.gates)):
            # One gate for all tasks: that of a router which tells them apart otherwise, or not at all.
            row = rows[tasks[number]] if router.kind == "multi" else torch.stack(list(rows.values())).mean(dim=0)
            gate = own[f"{kind}.{number}"].detach().clone()
            gate[:, : router.dim] = row
            taken.values[f"{prefix}{kind}.{number}"] = gate
        used = {run.config.tasks.index(task) for task in tasks if task in run.config.tasks}
        if run.config.router != "multi" or len(used) < len(tasks):
            used = set(range(len(found)))
        for place, name in enumerate(found):
            taken.fates[name] = "" if place in used else "not a task of this model"
    embedding = [name for name in run.state if name.startswith(f"{prefix}task_embedding.")]
    if embedding and router.kind == "task_conditioned":
        shared = {name.removeprefix(prefix): run.state[name] for name in embedding}
        columns = shared["task_embedding.0.weight"]
        mean = columns.mean(dim=1)
        picked = [columns[:, run.config.tasks.index(task)] if task in run.config.tasks else mean for task in tasks]
        shared["task_embedding.0.weight"] = torch.stack(picked, dim=1)
        taken.values |= {f"{prefix}{name}": value for name, value in shared.items()}
        gate = taken.values[f"{prefix}gates.0"]
        gate[:, router.dim :] = run.state[f"{prefix}gates.0"][chosen, router.dim :]
        taken.fates |= dict.fromkeys(embedding, "")
    elif embedding:
        taken.fates |= dict.fromkeys(embedding, f"of the router task_conditioned, here {router.kind}")


def _gate(run: Trained, prefix: str, kind: str, task: str, dim: int) -> Tensor:
    """Return the linear map [E_s, D] that a task starts with."""
    if run.config.router != "multi":
        return run.state[f"{prefix}{kind}.0"][:, :dim]
    gates = [run.state[f"{prefix}{kind}.{number}"] for number in range(len(run.config.tasks))]
    if task in run.config.tasks:
        return gates[run.config.tasks.index(task)]
    return torch.stack(gates).mean(dim=0)


# ------------------------------------------------------------------------------------------------------------ decoder


def take_heads(model: MultiTaskModel, run: Trained, taken: Taken) -> None:
    """Take what fits of the decoder, if it is of the same kind; outputs of classes by the names of these."""
    given = {name: value for name, value in run.state.items() if name.startswith(HEADS)}
    if run.config.head != model.config.head:
        taken.fates |= dict.fromkeys(given, f"{run.config.head} heads, here {model.config.head}")
        return
    own = {f"{HEADS}{name}": value for name, value in model.heads.state_dict().items()}
    labels = model.config.labels.classes
    others = {
        task: labels[task]
        for task in model.config.tasks
        if task in labels and run.classes.get(task, labels[task]) != labels[task]
    }
    by_class = {f"{HEADS}{name}": task for task in others for name in class_tensors(model, task)}
    same_tasks = run.config.tasks == model.config.tasks
    for name, value in given.items():
        if name not in own:
            gone = [task for task in run.config.tasks if task in name.split(".") and task not in model.config.tasks]
            taken.fates[name] = "not a task of this model" if gone else taken.fates[name]
        elif name.startswith(f"{HEADS}training_only.") and not same_tasks:  # it mixes the tasks, in their order
            taken.fates[name] = f"of the tasks {', '.join(run.config.tasks)}"
        elif name in by_class:
            _take_classes(taken, name, value, own[name], run.classes[by_class[name]], others[by_class[name]])
        else:
            _offer(taken, name, value, own[name])


def class_tensors(model: MultiTaskModel, task: str) -> list[str]:
    """Return the names of the decoder's tensors that have so many rows for each class of a task.

    Found by building the decoder without memory for one class more: that holds for decoders from outside too.
    """
    with _one_class_more(model.config, task) as config, without_values():
        larger = make_decoder(config, model.backbone).state_dict()
    return [name for name, value in model.heads.state_dict().items() if larger[name].shape != value.shape]


@contextmanager
def _one_class_more(config: ModelConfig, task: str) -> Iterator[ModelConfig]:
    """Yield a configuration whose label set, known within this alone, has another class of a task."""
    labels, name = config.labels, f"{config.label_set} and one class"
    classes = {**labels.classes, task: (*labels.classes[task], "one more")}
    LABEL_SETS[name] = replace(labels, name=name, classes=classes)
    try:
        yield replace(config, label_set=name)
    finally:
        del LABEL_SETS[name]


def _take_classes(
    taken: Taken, name: str, value: Tensor, own: Tensor, theirs: tuple[str, ...], ours: tuple[str, ...]
) -> None:
    """Take the rows of the classes that both have, by name; the others stay as they are."""
    share = len(own) // len(ours)
    both = [one for one in ours if one in theirs]
    if value.shape[1:] != own.shape[1:] or len(value) != share * len(theirs) or len(own) != share * len(ours):
        taken.fates[name] = f"{_shape(value)}, here {_shape(own)}"
        return
    if not both:
        taken.fates[name] = "of other classes, none of the same name"
        return
    rows, given = own.clone().unflatten(0, (len(ours), share)), value.unflatten(0, (len(theirs), share))
    rows[[ours.index(one) for one in both]] = given[[theirs.index(one) for one in both]]
    taken.values[name] = rows.flatten(0, 1)
    left = len(theirs) - len(both)
    taken.fates[name] = f"{left} of {len(theirs)} classes, of names that this model has not" if left else ""
