"""The report's part about budgets: figures, the front, and pictures of the same photographs under each, by a slider."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from m3vit.data.sample import Split
from m3vit.evaluation import scoring
from m3vit.evaluation.evaluate import Predictor, evaluate, torch_predictor
from m3vit.evaluation.search import relative_loss
from m3vit.models.budget import Budget
from m3vit.models.budget_file import WHOLE, read_budgets, read_searches
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.trial import meta_model
from m3vit.profiling import total_macs
from m3vit.report import charts
from m3vit.run_folder import Run
from m3vit.tasks import TASKS
from m3vit.training.budgets import require_trained_run


@dataclass(frozen=True)
class Budgets:
    """Budgets of a run, by descending MACs, the whole model among them, and what searches said of them by file."""

    budgets: dict[str, Budget]
    shares: dict[str, float]
    searches: dict[str, dict[str, Any]]

    def predictors(self, run: Run) -> dict[str, Predictor]:
        """Return the model under each of them."""
        return {name: torch_predictor(run.model, 1, budget) for name, budget in self.budgets.items()}


def open_budgets(run: Run, given: Sequence[str]) -> Budgets:
    """Read the budgets of a report, before its work. Raises InputError for what is none, or is another model's."""
    found = read_budgets([WHOLE, *(one for one in given if one != WHOLE)])
    config = run.config.model
    for budget in found.values():
        require_trained_run(run, budget)
    shapes = meta_model(config)
    macs = {name: sum(total_macs(shapes, [task], budget) for task in config.tasks) for name, budget in found.items()}
    names = sorted(found, key=lambda name: -macs[name])
    shares = {name: macs[name] / macs[WHOLE] for name in names}
    searches = read_searches([Path(one) for one in given if one != WHOLE])
    return Budgets({name: found[name] for name in names}, shares, searches)


def figures(
    run: Run,
    split: Split,
    found: Budgets,
    protocol: str,
    indices: Sequence[int],
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, Any]:
    """Return, as JSON values, what each budget scores on the images: by name its share of the MACs, its tasks.

    budget: what it uses, as in its file. loss_percent: the mean over the tasks of what the headline metric loses on
    the whole model's.
    """
    result: dict[str, Any] = {}
    for name, predictor in found.predictors(run).items():
        step = (lambda done, of, name=name: progress(done, of, f"scoring budget {name}")) if progress else None
        scored = evaluate(split, predictor, protocol, indices=indices, workers=scoring.default_workers(), progress=step)
        values = {task: scores[TASKS[task].metric] for task, scores in scored.scores().items()}
        result[name] = {
            "share_of_macs": found.shares[name],
            "tasks": values,
            "budget": found.budgets[name].to_json(),
        }
    whole = result[WHOLE]["tasks"]
    compared = [task for task, value in whole.items() if math.isfinite(value) and value]  # the others have no label
    for entry in result.values():
        losses = [relative_loss(task, whole[task], entry["tasks"][task]) for task in compared]
        entry["loss_percent"] = sum(losses) / len(losses) if losses else 0.0
    return result


def front_chart(found: Budgets, measured: dict[str, Any]) -> str:
    """Draw what is lost against the share of the MACs: the budgets, and the fronts of the searches that found them."""
    figure, axis = plt.subplots(figsize=(5.2, 2.8))
    for name, told in found.searches.items():
        points = [(point["share_of_macs"], point["weighted_loss_percent"]) for point in told.get("front", [])]
        if points:
            label = f"search of {name}, {told.get('images', '?')} images"
            axis.plot(*zip(*points, strict=True), ".-", color=charts.PALE, linewidth=0.9, label=label)
    shares = [entry["share_of_macs"] for entry in measured.values()]
    losses = [entry["loss_percent"] for entry in measured.values()]
    axis.plot(shares, losses, "o", color=charts.STRONG, markersize=5, label="on these images")
    for place, (name, share, loss) in enumerate(zip(measured, shares, losses, strict=True)):
        above = 4 if place % 2 else -10  # names of neighbours apart
        axis.annotate(name, (share, loss), textcoords="offset points", xytext=(4, above), fontsize=8)
    axis.set_xlabel("share of the MACs of all tasks' graphs")
    axis.set_ylabel("loss on the whole model, %")
    axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return charts.svg(figure)


def what_is_used(model: MultiTaskModel, budgets: Mapping[str, Budget]) -> dict[str, Any]:
    """Return the table of what each budget uses: its heads, and rows of cells.

    Hidden units by block, experts per token by block with experts, of as many kept where some are not, experts of the
    decoder where some are left out, and channels of heads that have a choice.
    """
    config, hidden = model.config, model.hidden_widths()
    routed, channels = model.backbone.moe_indices, model.heads.channels
    layers: dict[int, Any] = {block: model.backbone.trunk.blocks[block].mlp for block in routed}
    rows = []
    for name, budget in budgets.items():
        cells = ["·".join(str(budget.width.get(block, units) or "none") for block, units in hidden.items())]
        for task in config.tasks:
            uses = [layer.use(budget.layer(task, block)) for block, layer in layers.items()]
            some = any(len(use.kept) < config.num_experts for use in uses)
            said = "·".join(f"{use.top_k} of {len(use.kept)}" if some else str(use.top_k) for use in uses)
            own = [f"{budget.heads.get(task, channels[task])} channels"] if task in channels else []
            if kept := budget.decoder.get(task, {}):
                counts = (f"{len(kept.get(block, range(n)))} of {n}" for block, n in model.heads.experts.items())
                own.append(f"decoder {'·'.join(counts)}")
            cells.append("; ".join([said] * bool(said) + own) or "all")
        rows.append({"name": name, "cells": cells})
    blocks = "·".join(map(str, hidden))
    return {"heads": [f"hidden units of blocks {blocks}", *config.tasks], "routed": list(routed), "rows": rows}


def table_of_budgets(measured: dict[str, Any], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Return the table of the page: a row for each budget, with a cell for each task."""
    return [
        {
            "name": name,
            "share": f"{entry['share_of_macs']:.3f}",
            "loss": f"{entry['loss_percent']:+.2f}",
            "cells": [f"{value:.3f}" for value in (entry["tasks"][task] for task in tasks)],
        }
        for name, entry in measured.items()
    ]
