"""The report's charts, as SVG text made by matplotlib. Nothing is fetched when the page is opened."""

import io
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from m3vit.tasks import TASKS

plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "m3vit"})
PALE, STRONG, WARNING = "#9bb8d3", "#1f5a8a", "#b5532a"
_COLOURS = plt.get_cmap("tab20")  # ten hues, then their lighter shades; repeats beyond


def svg(figure: Figure) -> str:
    """Return a figure as an <svg> element and close it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss_curves(metrics: list[dict[str, Any]], tasks: list[str]) -> str:
    """Draw training losses (top) and validation metrics (bottom) over epochs, a column for each task."""
    figure, axes = plt.subplots(2, len(tasks) + 1, figsize=(2.3 * (len(tasks) + 1), 3.6), squeeze=False)
    train = [line for line in metrics if line["kind"] == "train"]
    val = [line for line in metrics if line["kind"] == "val"]
    for column, name in enumerate(["loss", *tasks]):
        top, bottom = axes[:, column]
        values = [(line["epoch"], line[name]) for line in train if name in line]
        if values:
            epochs, losses = np.array(values).T
            top.plot(epochs, losses, color=PALE, linewidth=0.8)
            width = max(1, len(losses) // 20)
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            top.plot(epochs[width - 1 :], smooth, color=STRONG, linewidth=1.4)
        top.set_title("weighted sum of losses" if name == "loss" else f"{name}: training loss")
        if name == "loss":
            bottom.axis("off")
            continue
        metric = TASKS[name].headline(quick=True)
        points = [(line["epoch"], line[f"{name}/{metric}"]) for line in val if f"{name}/{metric}" in line]
        if points:
            bottom.plot(*np.array(points).T, "o-", color=WARNING, markersize=3, linewidth=1.2)
        arrow = "higher" if TASKS[name].higher_is_better else "lower"
        bottom.set_title(f"val {metric} ({TASKS[name].unit}), {arrow} is better")
        bottom.set_xlabel("epoch")
    figure.tight_layout()
    return svg(figure)


def expert_usage(load_LRE: NDArray[np.float64], layers: list[int], tasks: list[str]) -> str:
    """Draw the share of routing decisions each expert got: a panel for each MoE layer, a row for each task."""
    num_experts = load_LRE.shape[-1]
    figure, axes = plt.subplots(
        1, len(layers), figsize=(max(3.2, 0.42 * num_experts) * len(layers), 0.5 * len(tasks) + 1), squeeze=False
    )
    for axis, block, load_RE in zip(axes[0], layers, load_LRE, strict=True):
        share = 100 * load_RE / load_RE.sum(axis=1, keepdims=True)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=max(50.0, float(share.max())), aspect="auto")
        axis.set_title(f"block {block}: % of each task's routing decisions")
        axis.set_xticks(range(num_experts), [f"e{expert}" for expert in range(num_experts)])
        axis.set_yticks(range(len(tasks)), tasks)
        axis.tick_params(length=0)
        for (row, column), value in np.ndenumerate(share):
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 35 else "black")
    figure.tight_layout()
    return svg(figure)


def expert_colour(expert: int) -> tuple[int, int, int]:
    """Return the colour an expert has in maps and legend."""
    shade, hue = divmod(expert % 20, 10)
    red, green, blue, _ = _COLOURS(2 * hue + shade)
    return round(255 * red), round(255 * green), round(255 * blue)
