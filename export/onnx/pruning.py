"""Which experts a task needs: measured on images, so that its graph can leave the others out.

Shapes: L MoE layers, E experts, K experts per token.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3vit.errors import InputError
from m3vit.export.onnx.lower import Choice
from m3vit.models.multitask import MultiTaskModel

Mass = NDArray[np.float64]  # [L, E]: weights summed over the tokens that an expert was chosen for


@dataclass(frozen=True)
class Prune:
    """How experts are left out: the fewest that hold `coverage` of a layer's gate mass, or the `keep` heaviest.

    Gate mass: the weights with which a task's tokens use an expert, summed over calibration images. Never fewer than
    the experts per token.
    """

    coverage: float | None = None
    keep: int | None = None

    def check(self, num_experts: int) -> None:
        """Raise InputError for a rule that cannot be followed."""
        if (self.coverage is None) == (self.keep is None):
            raise InputError("pruning goes by coverage or by a number of experts: give one of --prune and --keep")
        if self.coverage is not None and not 0 < self.coverage <= 1:
            raise InputError(f"coverage is {self.coverage:g}: give a share of the gate mass above 0, at most 1")
        if self.keep is not None and not 1 <= self.keep <= num_experts:
            raise InputError(f"--keep is {self.keep}: give 1 to the number of experts, {num_experts}")


def expert_layers(model: MultiTaskModel) -> list[Any]:
    """Return the MoE layers of a model, in order."""
    return [model.backbone.trunk.blocks[index].mlp for index in model.backbone.moe_indices]


@torch.inference_mode()
def gate_mass(model: MultiTaskModel, batches: Iterable[Tensor], top_k: Mapping[str, int]) -> dict[str, Mass]:
    """Return the gate mass {task: float64 [L, E]} over batches of normalised images [B, 3, H, W].

    `top_k`: experts per token of each task (of those not named: as trained).
    """
    tasks = model.config.tasks
    layers, trained = len(model.backbone.moe_indices), model.config.top_k
    found = {task: np.zeros((layers, model.config.num_experts)) for task in tasks}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        # Tasks that take as many experts run together; how many decides what the next layer gets to see.
        groups: dict[int, list[str]] = {}
        for task in tasks:
            groups.setdefault(top_k.get(task, trained), []).append(task)
        for batch in batches:
            for count, names in groups.items():
                with chosen(model, Choice(count)):
                    routings = model(batch.to(device), names).routings
                for layer, routing in enumerate(routings):
                    mass = torch.zeros_like(routing.scores_RNE)
                    mass.scatter_(-1, routing.expert_ids_RNK, routing.weights_RNK)
                    for task, row in zip(names, mass.double().sum(dim=1).cpu().numpy(), strict=True):
                        found[task][layer] += row
    finally:
        model.train(was_training)
    return found


def choose(mass_LE: Mass, prune: Prune, top_k: int) -> tuple[dict[int, tuple[int, ...]], list[float]]:
    """Return the experts to keep of each layer, ascending, and the share of the gate mass that they hold.

    Of experts with the same mass the lower number is kept.
    """
    kept: dict[int, tuple[int, ...]] = {}
    shares = []
    for layer, mass in enumerate(mass_LE):
        order = np.argsort(-mass, kind="stable")
        running = np.cumsum(mass[order])
        if prune.keep is not None:
            count = prune.keep
        else:
            assert prune.coverage is not None
            wanted = prune.coverage * running[-1] * (1 - 1e-12)  # rounding of the sum must not ask for one more
            count = int(np.searchsorted(running, wanted)) + 1
        count = min(max(count, top_k), len(mass))
        kept[layer] = tuple(sorted(int(expert) for expert in order[:count]))
        shares.append(float(running[count - 1] / running[-1]) if running[-1] > 0 else 1.0)
    return kept, shares


@contextmanager
def chosen(model: MultiTaskModel, choice: Choice) -> Iterator[None]:
    """Have torch route as an exported graph with this choice does."""
    layers = expert_layers(model)
    try:
        for number, layer in enumerate(layers):
            router = layer.router
            mask = None
            if number in choice.kept:
                mask = torch.zeros(router.num_experts, dtype=torch.bool, device=router.gates[0].device)
                mask[list(choice.kept[number])] = True
            router.choice = (router.top_k if choice.top_k is None else choice.top_k, mask)
        yield
    finally:
        for layer in layers:
            layer.router.choice = (layer.router.top_k, None)


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


def read_top_k(text: str, tasks: Sequence[str], num_experts: int) -> dict[str, int]:
    """Parse `2` or `depth=1,semseg=2` into experts per token by task, or raise InputError."""
    advice = f"give a number, 1 to {num_experts}, or task=number,... of the tasks {', '.join(tasks)}"
    result: dict[str, int] = {}
    for part in text.split(","):
        task, _, number = part.rpartition("=")
        if not number.strip().isdigit() or not 1 <= int(number) <= num_experts or (task and task.strip() not in tasks):
            raise InputError(f"--top-k is {text!r}: {advice}")
        if task.strip() in result or (not task and result):
            raise InputError(
                f"--top-k is {text!r}, which says twice how many {task.strip() or 'a task'} gets: {advice}"
            )
        result |= {task.strip(): int(number)} if task else dict.fromkeys(tasks, int(number))
    return result
