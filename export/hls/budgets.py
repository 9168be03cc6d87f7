"""Several budgets of one model in one project: what they have in common, and what each one's program has.

All programs read the same weights, so a number format is one for all: that of the largest values under any budget.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3vit.export.hls import leaf
from m3vit.export.hls.calibration import Calibration, calibrate
from m3vit.export.hls.schedules import Progress, silent
from m3vit.hw.manifest import top_ks
from m3vit.hw.sim.csim import tokenise
from m3vit.models.budget import FULL, Budget
from m3vit.models.multitask import MultiTaskModel


def widths_of(model: MultiTaskModel, budget: Budget) -> dict[int, int]:
    """Return the hidden units of each block under a budget; 0: it is left out."""
    return {block: budget.width.get(block, units) for block, units in model.hidden_widths().items()}


def union_of(model: MultiTaskModel, budgets: Sequence[Budget]) -> Budget:
    """Return the budget of what at least one of some budgets uses. Raises InputError for what engines cannot keep to.

    Its experts per token are the most of any, which is of no use: each program has its own.
    """
    widths = [widths_of(model, budget) for budget in budgets]
    counts = [leaf.top_ks_of(model, budget) for budget in budgets]
    whole = model.hidden_widths()
    most = {block: max(of[block] for of in widths) for block in whole}
    return Budget(
        {
            task: {block: max(of[block][place] for of in counts) for block in counts[0]}
            for place, task in enumerate(model.config.tasks)
        },
        width={block: units for block, units in most.items() if units < whole[block]},
    )


def programs_of(model: MultiTaskModel, budgets: Sequence[Budget]) -> list[dict[str, dict[int, Any]]]:
    """Return what each program has: `top_k` {block: [of each task]}, `width` {block: hidden units, 0 if left out}."""
    return [
        {
            "top_k": {block: list(of) for block, of in leaf.top_ks_of(model, budget).items()},
            "width": widths_of(model, budget),
        }
        for budget in budgets
    ]


def lowered_of(model: MultiTaskModel, budgets: Sequence[Budget]) -> list[leaf.LoweredModel]:
    """Return the model of what the budgets use together, and after it those that differ from it, of each budget."""
    common = union_of(model, budgets) if len(budgets) > 1 else budgets[0]
    found = [leaf.lower(model, common)]
    alike = programs_of(model, [common])
    return found + [leaf.lower(model, one) for one in budgets if programs_of(model, [one]) != alike]


def calibrate_all(
    models: Sequence[leaf.LoweredModel], images: np.ndarray, progress: Progress = silent, octaves: bool = False
) -> Calibration:
    """Calibrate the first model on images uint8 [m, H, W, 3], with the values of it and of the others."""
    first, *others = (calibrate(model, tokenise(images, model.patch), progress, octaves) for model in models)
    for other in others:
        first.outputs.take(other.outputs)
        for name, of in other.inner.items():
            first.inner[name].take(of)
    return first


def budget_of(model: MultiTaskModel, manifest: Mapping[str, Any], number: int) -> Budget:
    """Return a budget of a project, which is of this model, by its number."""
    blocks, whole = model.backbone.moe_indices, model.hidden_widths()
    counts = top_ks(dict(manifest), number)
    widths = manifest["budgets"][number]["width"] if "budgets" in manifest else whole
    return Budget(
        {
            task: {block: of[place] for block, of in zip(blocks, counts, strict=True)}
            for place, task in enumerate(model.config.tasks)
        },
        width={block: widths[block] for block, units in whole.items() if widths[block] < units},
    )


def described(model: MultiTaskModel, budgets: Mapping[str, Budget]) -> list[dict[str, Any]]:
    """Return what a manifest says of budgets, the first the project's own."""
    programs = programs_of(model, list(budgets.values()))
    return [
        {
            "name": name or ("full" if budgets[name] == FULL else "budget"),
            "top_k": list(program["top_k"].values()),
            "width": [program["width"].get(block, 0) for block in range(len(model.backbone.trunk.blocks))],
        }
        for name, program in zip(budgets, programs, strict=True)
    ]
