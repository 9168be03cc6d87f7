"""Charts of what the gates of a decoder with experts do, and of its memories (m3vit/evaluation/mixtures.py)."""

from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from m3vit.evaluation.mixtures import Mixtures
from m3vit.report.charts import plt
from m3vit.report.routing import FEWEST


def weights_chart(found: Mixtures) -> Figure:
    """Draw the mean weight (%) of each part of the mixtures: a panel for each block, a row for each task."""
    blocks, tasks, parts = found.blocks, found.tasks, found.parts
    size = ((0.36 * len(parts) + 0.3) * len(blocks) + 1, 0.28 * len(tasks) + 0.9)
    figure, axes = plt.subplots(1, len(blocks), figsize=size, squeeze=False, layout="constrained")
    for axis, block, weights_RK in zip(axes[0], blocks, found.weights_LRK, strict=True):
        axis.imshow(100 * weights_RK, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for (row, column), value in np.ndenumerate(100 * weights_RK):
            ink = "white" if value > 55 else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=6.5)
        axis.set_xticks(range(len(parts)), parts, rotation=60)
        axis.set_yticks(range(len(tasks)), tasks if axis is axes[0, 0] else [])
        axis.tick_params(length=0)
        axis.set_title(f"block {block}")
    return figure


def norms_chart(found: Mixtures) -> Figure:
    """Draw the mean norm of each task's memory, at first and after each block."""
    figure, axis = plt.subplots(figsize=(4.2, 2.3), layout="constrained")
    places = range(len(found.blocks) + 1)
    for column, task in enumerate(found.tasks):
        norms = [found.start_R[column], *found.norms_LR[:, column]]
        axis.plot(places, norms, "o-", color=plt.get_cmap("Dark2")(column), markersize=3, linewidth=1.2, label=task)
    axis.set_xticks(places, ["start", *(f"block {block}" for block in found.blocks)])
    axis.set_ylabel("norm of the memory")
    axis.set_ylim(bottom=0)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def labels_chart(found: Mixtures, task: str) -> Figure:
    """Draw a task's weights (%) by the labels of its patches: a panel for each block.

    Colours are percent points above or below the task's mean. Bins of fewer than 50 patches are left out, where there
    are any others.
    """
    names, patches, weights_LCK = found.labels[task]
    kept = np.flatnonzero(patches >= max(min(FEWEST, int(patches.max())), 1))
    off = 100 * (weights_LCK[:, kept] - found.weights_LRK[:, found.tasks.index(task), None])
    widest = max(float(np.abs(off).max()), 1.0)
    blocks, parts = found.blocks, found.parts
    size = ((0.36 * len(parts) + 0.3) * len(blocks) + 2, 0.17 * len(kept) + 1)
    figure, axes = plt.subplots(1, len(blocks), figsize=size, squeeze=False, layout="constrained")
    for layer, (axis, block) in enumerate(zip(axes[0], blocks, strict=True)):
        image = axis.imshow(off[layer], cmap="RdBu_r", vmin=-widest, vmax=widest, aspect="auto")
        for (row, column), value in np.ndenumerate(100 * weights_LCK[layer, kept]):
            ink = "white" if abs(off[layer, row, column]) > 0.7 * widest else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, fontsize=5)
        axis.set_xticks(range(len(parts)), parts, rotation=60)
        axis.set_yticks(range(len(kept)), [names[place] for place in kept] if layer == 0 else [], fontsize=6.5)
        axis.tick_params(length=0)
        axis.set_title(f"block {block}")
    bar = figure.colorbar(image, ax=axes[0], fraction=0.03, pad=0.01)
    bar.set_label("% points off the mean")
    return figure


def mixture_charts(found: Mixtures) -> Iterator[tuple[str, Figure]]:
    """Yield the charts of a report with their captions."""
    memory = ", and of its memory" if "memory" in found.parts else ""
    yield f"Mean weight (%) of each of the decoder's experts in a task's mixture{memory}.", weights_chart(found)
    yield "Mean norm of each task's memory, over the blocks that the decoder reads.", norms_chart(found)
    for task, (_, patches, _) in found.labels.items():
        if patches.any():
            yield (
                f"Weights of the mixture of {task} (%) by the label of the patch; colours: above or below the mean.",
                labels_chart(found, task),
            )
