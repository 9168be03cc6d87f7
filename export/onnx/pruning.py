"""Which experts a task needs, the trunk's and a decoder's: measured on images, so that its graph can leave others out.

Shapes: L MoE layers, E experts, K experts per token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3vit.errors import InputError
from m3vit.models.budget import FULL, Budget
from m3vit.models.multitask import MultiTaskModel

Shares = dict[str, list[float]]  # of the mass that the experts kept hold, by task and layer
Mass = NDArray[np.float64]  # [L, E]: weights summed over the tokens that an expert was chosen for


def check_rule(coverage: float | None, keep: int | None, num_experts: int) -> None:
    """Raise InputError for a rule of pruning that cannot be followed: see `choose`, which takes the same."""
    if (coverage is None) == (keep is None):
        raise InputError("pruning goes by coverage or by a number of experts: give one of --prune and --keep")
    if coverage is not None and not 0 < coverage <= 1:
        raise InputError(f"coverage is {coverage:g}: give a share of the gate mass above 0, at most 1")
    if keep is not None and not 1 <= keep <= num_experts:
        raise InputError(f"--keep is {keep}: give 1 to the number of experts, {num_experts}")


@torch.inference_mode()
def gate_mass(model: MultiTaskModel, batches: Iterable[Tensor], budget: Budget = FULL) -> dict[str, Mass]:
    """Return the gate mass {task: float64 [L, E]} over batches of normalised images [B, 3, H, W].

    Gate mass: the weights with which a task's tokens use an expert, summed. `budget`: of each task's pass.
    """
    tasks = model.config.tasks
    found = {task: np.zeros((len(model.backbone.moe_indices), model.config.num_experts)) for task in tasks}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            for layer, routing in enumerate(model(batch.to(device), budget=budget).routings):
                mass = torch.zeros_like(routing.scores_RNE)
                mass.scatter_(-1, routing.expert_ids_RNK, routing.weights_RNK)
                for task, row in zip(tasks, mass.double().sum(dim=1).cpu().numpy(), strict=True):
                    found[task][layer] += row
    finally:
        model.train(was_training)
    return found


@torch.inference_mode()
def decoder_mass(model: MultiTaskModel, batches: Iterable[Tensor], budget: Budget = FULL) -> dict[str, Mass]:
    """Return {task: float64 [L, E]} of the decoder's L layers of experts: their weights in all mixtures, summed.

    {} of a decoder without experts. `budget`: of each task's pass. The memory's own weights are left out.
    """
    decoder: Any = model.heads
    if not decoder.experts:
        return {}
    tasks, experts = model.config.tasks, list(decoder.experts.values())
    found = {task: np.zeros((len(experts), max(experts))) for task in tasks}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            ids = tuple(range(len(tasks)))
            features, _ = model.backbone(batch.to(device), ids, decoder.blocks, model.uses(budget, tasks))
            for task, states in decoder.states(features, tasks, budget.decoder).items():
                for layer, state in enumerate(states):
                    weights = state.weights[..., : experts[layer]].double().sum(dim=(0, 1))
                    found[task][layer] += weights.cpu().numpy()
    finally:
        model.train(was_training)
    return found


def choose(
    mass_LE: Mass, top_k: Sequence[int], *, coverage: float | None = None, keep: int | None = None
) -> tuple[list[tuple[int, ...]], list[float]]:
    """Return the experts to keep of each layer, ascending, and the share of the gate mass that they hold.

    The fewest that hold `coverage` of a layer's gate mass, or the `keep` heaviest; never fewer than its experts per
    token, `top_k`. Of experts with the same mass the lower number is kept.
    """
    kept, shares = [], []
    for mass, least in zip(mass_LE, top_k, strict=True):
        order = np.argsort(-mass, kind="stable")
        running = np.cumsum(mass[order])
        if keep is not None:
            count = keep
        else:
            assert coverage is not None
            wanted = coverage * running[-1] * (1 - 1e-12)  # rounding of the sum must not ask for one more
            count = int(np.searchsorted(running, wanted)) + 1
        count = min(max(count, least), len(mass))
        kept.append(tuple(sorted(int(expert) for expert in order[:count])))
        shares.append(float(running[count - 1] / running[-1]) if running[-1] > 0 else 1.0)
    return kept, shares


def pruned(
    model: MultiTaskModel,
    mass: Mapping[str, Mass],
    budget: Budget,
    *,
    coverage: float | None = None,
    keep: int | None = None,
) -> tuple[Budget, Shares]:
    """Return the budget with the experts to keep, of the tasks in `mass`, and the share these hold, by task and layer.

    `coverage`, `keep`: as `choose` takes them.
    """
    blocks = model.backbone.moe_indices
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    shares: dict[str, list[float]] = {}
    for task, mass_LE in mass.items():
        top_k = [layer.top_k or model.config.top_k for layer in budget.layers(task, blocks)]
        experts, shares[task] = choose(mass_LE, top_k, coverage=coverage, keep=keep)
        kept[task] = dict(zip(blocks, experts, strict=True))
    return replace(budget, kept={**budget.kept, **kept}), shares


def pruned_decoder(
    model: MultiTaskModel, mass: Mapping[str, Mass], budget: Budget, coverage: float
) -> tuple[Budget, Shares]:
    """Return the budget with the decoder's experts to keep, of the tasks in `mass`, and the share these hold.

    What keeps all experts is not named: with such a budget the model does the very same.
    """
    decoder: dict[str, dict[int, tuple[int, ...]]] = {}
    shares: Shares = {}
    for task, mass_LE in mass.items():
        experts, shares[task] = choose(mass_LE, [1] * len(mass_LE), coverage=coverage)
        layers = zip(model.heads.experts.items(), experts, strict=True)
        decoder[task] = {block: kept for (block, count), kept in layers if len(kept) < count}
    return replace(budget, decoder={**budget.decoder, **decoder}), shares


def read_coverage(text: str | None) -> float | None:
    """Parse `coverage=0.999`, or raise InputError."""
    if text is None:
        return None
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if name.strip() != "coverage" or not 0 < value <= 1:
        raise InputError(f"--prune is {text!r}: give coverage=SHARE, above 0 and at most 1, such as coverage=0.999")
    return value
