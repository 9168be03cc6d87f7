"""`m3vit report RUN RUN ...`: one page about several evaluated runs, and its figures as JSON beside it.

The table is that of `m3vit eval --compare`: the same images, intervals over them, paired differences to the first run.
Below it the classes' IoU, the evaluations while training, and predictions of all runs on the same images.
"""

import platform
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import torch
from matplotlib.figure import Figure

from m3vit import __version__
from m3vit.data.opening import open_split
from m3vit.errors import InputError
from m3vit.evaluation import scoring
from m3vit.evaluation.compare import common_protocol, compare
from m3vit.evaluation.evaluate import torch_predictor
from m3vit.evaluation.routing import spread
from m3vit.files import atomic_path, require_ending, write_json
from m3vit.label_sets import LABEL_SETS
from m3vit.report.charts import plt, svg
from m3vit.report.page import example
from m3vit.run_folder import load_run
from m3vit.tasks import TASKS
from m3vit.training.checkpoint import read_metrics

COLOURS = plt.get_cmap("tab10")


def write_comparison(
    folders: Sequence[Path],
    out: Path,
    num_images: int,
    data_root: str | None = None,
    protocol: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write the page `out` and `out` with suffix .json; return the latter's content, that of `compare.compare`."""
    require_ending(out, "page", ".html")
    runs = [load_run(folder) for folder in folders]
    protocol = protocol or common_protocol(list(folders))
    found = compare(list(folders), protocol)
    results = [scoring.read(folder, protocol)[1] for folder in folders]
    tasks = list(found["rows"][0]["tasks"])
    names = short_names(folders)
    label_set, first = runs[0].config.model.label_set, runs[0].config
    split = open_split(first.data.layout, data_root or results[0]["data"], "val", tasks, label_set=label_set)
    predictors = {name: torch_predictor(run.model) for name, run in zip(names, runs, strict=True)}
    columns, classes = ["ground truth", *names], LABEL_SETS[label_set].classes
    shown = spread(list(range(len(split))), num_images)
    examples = []
    for place, index in enumerate(shown):
        if progress:
            progress(place, len(shown), "drawing")
        examples.append(example(split.load(index), predictors, columns, protocol, label_set, {}))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("m3vit.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("several.html.j2").render(
        version=__version__,
        date=date.today().isoformat(),
        machine=f"{platform.system()} {platform.machine()}, torch {torch.__version__}",
        names=list(zip(names, map(str, folders), strict=True)),
        comparison=found,
        rows=[table_row(found, task) for task in tasks],
        classes=[class_table(results, task, classes[task]) for task in tasks if task in classes],
        curves=svg(curves(dict(zip(names, map(read_metrics, folders), strict=True)), tasks)),
        columns=columns,
        tasks=tasks,
        examples=examples,
    )
    with atomic_path(out) as path:
        path.write_text(page, encoding="utf-8")
    write_json(out.with_suffix(".json"), found)
    return found


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' own names, or as many folders above them as tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{folders[0]} is given twice: give different runs")


def table_row(comparison: dict[str, Any], task: str) -> dict[str, Any]:
    """Return a task's line of the table: figures with intervals, and differences to the first run, the best marked."""
    cells = [row["tasks"][task] for row in comparison["rows"]]
    values = [round(cell["value"], 3) for cell in cells]
    best = max(values) if TASKS[task].higher_is_better else min(values)
    shown = []
    for cell, value in zip(cells, values, strict=True):
        low, high = cell["interval"]
        text = {
            "value": f"{value:.3f}",
            "interval": f"[{low:.3f}, {high:.3f}]",
            "best": value == best,
            "difference": "",
        }
        if "difference" in cell:
            low, high = cell["difference_interval"]
            text["difference"] = f"{cell['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        shown.append(text)
    arrow = "↑" if TASKS[task].higher_is_better else "↓"
    return {"task": task, "metric": f"{cells[0]['metric']} ({TASKS[task].unit}) {arrow}", "cells": shown}


def class_table(results: Sequence[dict[str, Any]], task: str, classes: Sequence[str]) -> dict[str, Any]:
    """Return the IoU of each class in each run, the class with the largest spread first."""
    figures = [result["tasks"][task][result["predictor"]] for result in results]
    rows = []
    for name in classes:
        values = [one[f"IoU_{name}"] for one in figures]
        if any(values):
            cells = [{"text": f"{value:.1f}", "best": value == max(values)} for value in values]
            rows.append({"name": name.replace("_", " "), "cells": cells, "spread": max(values) - min(values)})
    rows.sort(key=lambda row: -row["spread"])
    return {"task": task, "rows": rows}


def curves(metrics: dict[str, list[dict[str, Any]]], tasks: Sequence[str]) -> Figure:
    """Draw the evaluations while training of all runs over epochs, a panel for each task; and their training losses."""
    figure, axes = plt.subplots(2, len(tasks), figsize=(2.7 * len(tasks), 4.2), squeeze=False)
    for column, task in enumerate(tasks):
        metric, (top, bottom) = TASKS[task].headline(quick=True), axes[:, column]
        for place, (name, lines) in enumerate(metrics.items()):
            losses = [(one["epoch"], one[task]) for one in lines if one["kind"] == "train" and task in one]
            points = [(one["epoch"], one[f"{task}/{metric}"]) for one in lines if f"{task}/{metric}" in one]
            for axis, values, marks in ((top, losses, ""), (bottom, points, "o")):
                if values:
                    axis.plot(
                        *zip(*values, strict=True),
                        f"-{marks}",
                        color=COLOURS(place),
                        markersize=3,
                        linewidth=1,
                        label=name,
                    )
        arrow = "higher" if TASKS[task].higher_is_better else "lower"
        top.set_title(f"{task}: training loss")
        bottom.set_title(f"val {metric} ({TASKS[task].unit}), {arrow} is better")
        bottom.set_xlabel("epoch")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="lower center", ncols=min(4, len(labels)), frameon=False, bbox_to_anchor=(0.5, -0.08)
        )
    figure.tight_layout()
    return figure
