"""Where a model's errors are, for the report: classes taken for others, depth by range, best and worst images.

Breakdowns are those of m3vit/evaluation/meters.py, over all images that the report is of; images are ranked by their
own statistics.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from m3vit.evaluation.evaluate import Evaluation
from m3vit.evaluation.meters import make_meter
from m3vit.report.charts import PALE, WARNING, plt, svg
from m3vit.tasks import TASKS

ENDS = 3  # images shown of the worst, and of the best
MANY = 60  # classes, beyond which a matrix has no names


class Ranking(NamedTuple):
    """The images of a task that has labels of them, the worst first: places in the evaluation, and their figures."""

    metric: str
    unit: str
    order: list[int]
    values: dict[int, float]

    def ends(self) -> tuple[list[int], list[int]]:
        """Return the worst images, and the best, the best first; none in both."""
        count = min(ENDS, len(self.order) // 2)
        return self.order[:count], self.order[len(self.order) - count :][::-1]


def ranking(evaluation: Evaluation, task: str) -> Ranking:
    """Rank images by the task's headline metric of each alone, which for classes is over those that the image has."""
    rows = evaluation.statistics[task]
    metrics = make_meter(task, evaluation.label_set, evaluation.protocol).compute(rows)
    name = "mIoU_present" if "mIoU_present" in metrics else TASKS[task].metric
    values = {place: float(value) for place, value in enumerate(metrics[name]) if rows[place].any()}
    values = {place: value for place, value in values.items() if np.isfinite(value)}
    order = sorted(values, key=lambda place: values[place], reverse=not TASKS[task].higher_is_better)
    return Ranking(name, TASKS[task].unit, order, values)


def cards(
    evaluation: Evaluation, tasks: Sequence[str], draw: Callable[[int, str], dict[str, str]]
) -> list[dict[str, Any]]:
    """Return the worst and the best images of each task, with where each stands in the other tasks.

    draw(place, task): pictures, by name, of the image at a place in the evaluation. Ranks count from the best, 1.
    """
    found = {task: ranking(evaluation, task) for task in tasks}
    shown = {task: {place for end in one.ends() for place in end} for task, one in found.items()}
    result = []
    for task, one in found.items():
        worst, best = one.ends()
        groups = []
        for title, places in (("worst", worst), ("best", best)):
            images = []
            for place in places:
                elsewhere = [
                    {
                        "task": other,
                        "rank": f"{len(ranks.order) - ranks.order.index(place)} of {len(ranks.order)}",
                        "link": f"#{other}-{evaluation.ids[place]}" if place in shown[other] else "",
                    }
                    for other, ranks in found.items()
                    if other != task and place in ranks.values
                ]
                value = f"{one.values[place]:.3g} {one.unit}"
                about = {"id": evaluation.ids[place], "value": value, "elsewhere": elsewhere}
                images.append({**about, "pictures": draw(place, task)})
            groups.append({"title": title, "images": images})
        result.append({"task": task, "metric": one.metric, "groups": groups if worst else []})
    return result


def ranked(evaluation: Evaluation, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the ids of each task's worst and best images, with their figures, as JSON values."""
    result = {}
    for task in tasks:
        one = ranking(evaluation, task)
        named = [[{"id": evaluation.ids[at], "value": one.values[at]} for at in places] for places in one.ends()]
        result[task] = {"metric": one.metric, "worst": named[0], "best": named[1]}
    return result


def class_rows(breakdown: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row of the table of classes for each that is labelled somewhere, the most frequent first."""
    pixels, names = np.array(breakdown["pixels"], np.float64), breakdown["classes"]
    labelled, predicted, hits = pixels.sum(axis=1), pixels.sum(axis=0), pixels.diagonal()
    rows = []
    for index in np.argsort(-labelled, kind="stable"):
        if not labelled[index]:
            break
        others = np.where(np.arange(len(names)) == index, 0, pixels[index])
        other = int(others.argmax())
        taken = f"{names[other]} ({100 * others[other] / labelled[index]:.0f} %)" if others[other] else "-"
        rows.append(
            {
                "name": names[index].replace("_", " "),
                "share": f"{100 * labelled[index] / labelled.sum():.2f}",
                "iou": f"{100 * hits[index] / (labelled[index] + predicted[index] - hits[index]):.1f}",
                "recall": f"{100 * hits[index] / labelled[index]:.1f}",
                "precision": f"{100 * hits[index] / predicted[index]:.1f}" if predicted[index] else "-",
                "taken": taken.replace("_", " "),
            }
        )
    return rows


def confusion_chart(breakdown: dict[str, Any]) -> Figure:
    """Draw what the pixels of each labelled class are predicted as, in percent of them; of the classes that occur."""
    pixels, names = np.array(breakdown["pixels"], np.float64), breakdown["classes"]
    kept = np.flatnonzero(pixels.sum(axis=0) + pixels.sum(axis=1))
    labelled = pixels.sum(axis=1)[kept]
    share: NDArray[np.float64] = 100 * pixels[np.ix_(kept, kept)] / np.maximum(labelled, 1)[:, None]
    share[labelled == 0] = np.nan
    side = min(2.2 + 0.16 * len(kept), 9.0)
    figure, axis = plt.subplots(figsize=(side + 0.6, side))
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    if len(kept) <= MANY:
        labels = [names[index].replace("_", " ") for index in kept]
        size = 7 if len(kept) < 30 else 5.5
        axis.set_xticks(range(len(kept)), labels, rotation=90, fontsize=size)
        axis.set_yticks(range(len(kept)), labels, fontsize=size)
    axis.tick_params(length=0)
    axis.set_xlabel("predicted")
    axis.set_ylabel("labelled")
    figure.colorbar(image, ax=axis, shrink=0.6, label="% of the labelled pixels")
    return figure


def ranges_chart(breakdown: dict[str, Any]) -> Figure:
    """Draw bias and RMSE by range of the true depth, and the share of pixels."""
    rows = breakdown["ranges"]
    total = sum(row["pixels"] for row in rows)
    names = [f"{row['from']:.2g}-{row['to']:.2g}" if row["to"] else f"> {row['from']:.2g}" for row in rows]
    figure, axis = plt.subplots(figsize=(max(3.5, 0.62 * len(rows)), 2.4))
    places = np.arange(len(rows))
    axis.bar(places - 0.2, [row["rmse"] for row in rows], 0.4, color=PALE, label="RMSE")
    axis.bar(places + 0.2, [row["bias"] for row in rows], 0.4, color=WARNING, label="bias (predicted - true)")
    axis.axhline(0, color="black", linewidth=0.6)
    shares = [f"{name}\n{100 * row['pixels'] / total:.1f} %" for name, row in zip(names, rows, strict=True)]
    axis.set_xticks(places, shares)
    axis.set_xlabel("true depth (m), and its share of the pixels")
    axis.set_ylabel("m")
    axis.legend(frameon=False)
    return figure


def breakdown_parts(breakdown: dict[str, Any], task: str) -> dict[str, Any]:
    """Return what the page shows of a task's breakdown: a caption, a chart as SVG, and rows of classes, if any."""
    if breakdown["kind"] == "confusion":
        caption = f"{task}: what the pixels of each class are predicted as."
        return {"caption": caption, "chart": svg(confusion_chart(breakdown)), "classes": class_rows(breakdown)}
    caption = f"{task}: how far predictions are from the truth, by the truth."
    return {"caption": caption, "chart": svg(ranges_chart(breakdown)), "classes": []}
