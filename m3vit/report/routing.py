"""Which experts tasks use: the figures of a split in a run's folder (`m3vit routing`), and charts of them.

Figures are those of m3vit/evaluation/routing_figures.py. Shapes: R tasks, E experts, C bins of labels, (h, w) patches.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from m3vit.digests import read_sealed_json
from m3vit.kinds.pictures import grey_blend
from m3vit.report.charts import PALE, STRONG, WARNING, expert_colour, plt

FORMAT = 1
FILE = Path("routing", "routing.json")  # in a run's folder
LIFT = 2.0  # powers of two that colours of a lift span, to either side
FEWEST = 50  # patches of a bin, below which its row is left out of charts
VERDICTS = {
    "apart": "less alike than chance",
    "together": "more alike than chance",
    "as by chance": "no different from chance",
}


def read_routing(folder: Path, weights_sha256: str) -> tuple[dict[str, Any] | None, str]:
    """Return the figures in a run's folder, None if there are none of its weights, and a note why that is so.

    Raises InputError for a file that is not as it was written.
    """
    path, advice = folder / FILE, f"make it again with m3vit routing {folder}"
    if not path.exists():
        return None, f"Which experts the tasks use over the whole split was not measured: m3vit routing {folder}."
    found = read_sealed_json(path, advice)
    if found.get("format") != FORMAT:
        return None, f"{path} is of another version: {advice}."
    if not isinstance(found.get("run"), dict) or found["run"].get("weights_sha256") != weights_sha256:
        return None, f"{path} is of other weights than the run's: {advice}."
    return found, ""


def sentence(figures: dict[str, Any]) -> str:
    """Say in words how far the tasks' choices are apart, over all pairs of tasks and blocks."""
    if not figures["apart"]:
        return "The run has one task: there is nothing to compare."
    found, size = figures["apart"]["all"], figures["groups_of"]
    experts = f"groups of {size} experts" if size > 1 else "experts"
    shared, renamed, by_use = (_percent(found[key]) for key in ("shared", "shared_renamed", "shared_by_use"))
    return (
        f"For the same patch, two tasks have {shared} of their experts in common. With each task's {experts} named at "
        f"random it would be {renamed}: the tasks choose {VERDICTS[found['verdict']]}. Choice by each task's own use "
        f"of the experts, whatever the patch, would give {by_use}. Their use of the experts is "
        f"{_percent(found['similarity_of_use'])} alike, and an expert tells {_percent(found['information'])} of which "
        "task chose it."
    )


def _percent(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{100 * entry['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f}"


def use_chart(figures: dict[str, Any]) -> Figure:
    """Draw the share of patches that chose each expert, and of those that chose it first: blocks down, tasks across."""
    blocks, tasks = list(figures["use"]), figures["tasks"]
    shape = (len(blocks), len(tasks))
    width = max(1.9, 0.16 * figures["experts"])
    size = (width * shape[1], 1.1 * shape[0] + 0.5)
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, sharex=True, sharey=True)
    for row, block in enumerate(blocks):
        for column, task in enumerate(tasks):
            axis, use = axes[row, column], figures["use"][block]["tasks"][task]
            experts = np.arange(figures["experts"])
            axis.bar(experts, 100 * np.array(use["chosen"]), 0.8, color=PALE)
            axis.bar(experts, 100 * np.array(use["first"]), 0.8, color=STRONG)
            even = 100 * figures["top_k"][task][block] / len(experts)
            axis.axhline(even, color=WARNING, linewidth=0.8, linestyle="--")
            if use["dead"]:  # matplotlib has no place for an empty line that is not clipped
                axis.plot(use["dead"], np.zeros(len(use["dead"])), "x", color=WARNING, markersize=4, clip_on=False)
            axis.set_xticks(experts[:: max(1, len(experts) // 8)])
            axis.tick_params(length=2)
            if row == 0:
                axis.set_title(task)
        axes[row, 0].set_ylabel(f"block {block}\n% of patches")
    handles = [
        Patch(color=PALE, label="chosen"),
        Patch(color=STRONG, label="chosen first"),
        Line2D([], [], color=WARNING, linewidth=0.8, linestyle="--", label="even use"),
        Line2D([], [], color=WARNING, marker="x", markersize=4, linestyle="", label="dead for the task"),
    ]
    for axis in axes[-1]:
        axis.set_xlabel("expert")
    figure.tight_layout()
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return figure


def shared_chart(figures: dict[str, Any]) -> Figure:
    """Draw how many experts two tasks have in common for a patch: a matrix of tasks for each block."""
    blocks, tasks = figures["apart"]["blocks"], figures["tasks"]
    columns = min(len(blocks), 6)
    rows = -(-len(blocks) // columns)
    side = 0.42 * len(tasks) + 0.9
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns + 0.4, (side + 0.25) * rows), squeeze=False)
    for axis in axes.flat[len(blocks) :]:
        axis.axis("off")
    for axis, (block, found) in zip(axes.flat, blocks.items(), strict=False):
        share = np.eye(len(tasks)) * 100
        for pair in found["pairs"]:
            a, b = (tasks.index(task) for task in pair["tasks"])
            share[a, b] = share[b, a] = 100 * pair["shared"]["value"]
        axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(share):
            ink = "white" if value > 55 else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
        axis.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(tasks)), tasks if axis in axes[:, 0] else [])
        axis.tick_params(length=0)
        low, high = found["all"]["shared_renamed"]["interval"]
        axis.set_title(
            f"block {block}: mean {100 * found['all']['shared']['value']:.0f}\nby chance {_range(low, high)}"
        )
    figure.tight_layout()
    return figure


def best_block(figures: dict[str, Any], labelled: str) -> str:
    """Return the block where the labels of a task tell most about the experts that the task itself chooses."""
    blocks = figures["labels"][labelled]["blocks"]
    return max(blocks, key=lambda block: blocks[block][labelled]["information"] or 0)


def labels_chart(figures: dict[str, Any], labelled: str, block: str) -> Figure:
    """Draw which experts the patches of each bin of a task's labels chose in a block: a panel for each task.

    Colours are the lift over the expert's use, numbers the share of the bin's choices (%) where the lift is above 1.5.
    Classes stand in the order of the expert that the labelled task favours for them; bins of fewer than 50 patches are
    left out (where there are any others), and experts that are dead for a task.
    """
    table, tasks = figures["labels"][labelled], figures["tasks"]
    fewest = min(FEWEST, max(table["patches"]))
    kept = [place for place, patches in enumerate(table["patches"]) if patches >= max(fewest, 1)]
    lifts = {task: _array(table["blocks"][block][task]["lift"]) for task in tasks}
    for task, lift in lifts.items():
        lift[:, figures["use"][block]["tasks"][task]["dead"]] = np.nan
    own = np.nan_to_num(lifts[labelled])
    if len(table["bins"]) > 10:  # classes have no order of their own
        kept.sort(key=lambda place: (int(own[place].argmax()), -float(own[place].max())))
    experts = figures["experts"]
    size = (max(1.6, 0.19 * experts) * len(tasks) + 1.3, max(0.155 * len(kept), 0.8) + 0.9)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, squeeze=False, sharey=True, layout="constrained")
    norm, colour_map = TwoSlopeNorm(0, -LIFT, LIFT), plt.get_cmap("RdBu_r").with_extremes(bad="#c9cfd5")
    for axis, task in zip(axes[0], tasks, strict=True):
        lift, share = lifts[task][kept], _array(table["blocks"][block][task]["share"])[kept]
        colours = np.log2(np.maximum(lift, 2**-LIFT))
        image = axis.imshow(colours, cmap=colour_map, norm=norm, aspect="auto", interpolation="nearest")
        for (row, column), value in np.ndenumerate(share):
            if lift[row, column] > 1.5:
                ink = "white" if lift[row, column] > 2.8 else "black"
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=5, color=ink)
        explained = table["blocks"][block][task]["information"]
        axis.set_title(f"{task}\n{100 * (explained or 0):.1f} % explained")
        axis.set_xticks(range(0, experts, max(1, experts // 8)))
        axis.tick_params(length=0)
        axis.set_xlabel("expert")
    axes[0, 0].set_yticks(range(len(kept)), [table["bins"][place] for place in kept], fontsize=6.5)
    bar = figure.colorbar(image, ax=axes[0], fraction=0.03, pad=0.01, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.set_label("lift")
    return figure


def information_chart(figures: dict[str, Any]) -> Figure:
    """Draw how much of the choice of experts each task's labels explain: a panel for each labelled task."""
    labels, tasks, blocks = figures["labels"], figures["tasks"], list(figures["use"])
    figure, axes = plt.subplots(
        1, len(labels), figsize=(2 * len(labels) + 1.9, 2.1), squeeze=False, sharey=True, layout="constrained"
    )
    colours = plt.get_cmap("Dark2")
    for axis, (labelled, table) in zip(axes[0], labels.items(), strict=True):
        for place, task in enumerate(tasks):
            for key, style in (("information", "o-"), ("information_elsewhere", ":")):
                values = [100 * (table["blocks"][block][task][key] or 0) for block in blocks]
                label = task if key == "information" else None
                axis.plot(blocks, values, style, color=colours(place), markersize=3, linewidth=1.2, label=label)
        axis.set_title(f"labels of {labelled}")
        axis.set_xlabel("block")
    axes[0, 0].set_ylabel("% explained")
    axes[0, 0].set_ylim(bottom=0)
    handles = axes[0, 0].get_legend_handles_labels()[0]
    handles += [Line2D([], [], color="grey", linestyle=":", label="by labels of another image")]
    figure.legend(handles=handles, title="choices of", loc="outside right center", frameon=False)
    return figure


def map_chart(
    firsts_LRhw: NDArray[np.int64],
    blocks: Sequence[int],
    tasks: Sequence[str],
    experts: int,
    image: NDArray[np.uint8] | None = None,
) -> Figure:
    """Draw the first expert of each patch of a photograph: blocks down, tasks across.

    By itself, or laid over the photograph `image` uint8 [H, W, 3] in shades of grey.
    """
    height, width = image.shape[:2] if image is not None else firsts_LRhw.shape[2:]
    size = (2.1 * len(tasks) + 0.4, 2.1 * len(blocks) * height / width + 0.3 + 0.18 * -(-experts // 8))
    figure, axes = plt.subplots(len(blocks), len(tasks), figsize=size, squeeze=False, layout="constrained")
    for row, block in enumerate(blocks):
        for column, task in enumerate(tasks):
            axis, picture = axes[row, column], coloured(firsts_LRhw[row, column])
            axis.imshow(picture if image is None else laid_over(image, picture), interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(task)
        axes[row, 0].set_ylabel(f"block {block}")
    colours = ("#{:02x}{:02x}{:02x}".format(*expert_colour(expert)) for expert in range(experts))
    handles = [Patch(color=colour, label=str(expert)) for expert, colour in enumerate(colours)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(experts, 16), frameon=False, title="first expert",
        handlelength=1, columnspacing=1,
    )  # fmt: skip
    return figure


def coloured(experts_hw: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the colours [h, w, 3] of experts."""
    palette = np.array([expert_colour(expert) for expert in range(int(experts_hw.max()) + 1)], np.uint8)
    return palette[experts_hw]


def laid_over(image: NDArray[np.uint8], patches: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture of patches [h, w, 3] laid over its photograph uint8 [H, W, 3]."""
    (height, width), (rows, columns) = image.shape[:2], patches.shape[:2]
    down, across = np.arange(height) * rows // height, np.arange(width) * columns // width
    return grey_blend(image, patches[down][:, across])


def labelled_tasks(figures: dict[str, Any]) -> list[str]:
    """Return the tasks with labelled patches."""
    return [task for task, table in figures["labels"].items() if any(table["patches"])]


def charts(figures: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Yield all charts of a split's figures with the names of their files; of labels, each block's."""
    yield "use", use_chart(figures)
    if figures["apart"]:
        yield "shared", shared_chart(figures)
    labels = labelled_tasks(figures)
    if labels:
        yield "information", information_chart(figures)
    for labelled in labels:
        for block in figures["use"]:
            yield f"{labelled}-block{block}", labels_chart(figures, labelled, block)


def page_charts(figures: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Yield the charts of a report with their captions; of labels, the block where they tell most."""
    yield "Patches that each task sends to each expert, in its top-k and first.", use_chart(figures)
    if figures["apart"]:
        yield (
            "Experts that two tasks have in common for the same patch (%), a block each: their mean, and what it "
            "would be (95 %) with each task's experts named at random.",
            shared_chart(figures),
        )
    labels = labelled_tasks(figures)
    if labels:
        yield (
            "How much of the choice of experts the labels explain (mutual information, as a share of the choice's "
            "entropy); dotted: the labels of another image in the same places, which is what position alone explains.",
            information_chart(figures),
        )
    for labelled in labels:
        block = best_block(figures, labelled)
        meaning = (
            ": how many times as often as of all patches an expert is chosen for those of a label (colour), and the "
            "share of the label's choices (%, where above 1.5 times). Grey: dead for the task"
        )
        yield (
            f"Labels of {labelled} and experts of block {block}{meaning if labelled == labels[0] else ''}.",
            labels_chart(figures, labelled, block),
        )


def _array(rows: list[list[float | None] | None]) -> NDArray[np.float64]:
    """Return a table with NaN where nothing is known."""
    width = next((len(row) for row in rows if row), 1)
    return np.array([row or [np.nan] * width for row in rows], np.float64)
