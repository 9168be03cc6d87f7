"""Delta_m: the mean relative gain over single-task baselines, always with the name of the baselines.

Delta_m = 100 / T * sum over tasks of (M - B) / B, negated where lower is better (Vandenhende et al., "Multi-Task
Learning for Dense Prediction Tasks: A Survey", 2021). It is comparable only between rows of the same baselines,
protocol and tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from m3vit.errors import InputError
from m3vit.tasks import TASKS


@dataclass(frozen=True)
class Baseline:
    """Single-task figures: {task: (metric, value)}, in this package's units."""

    name: str
    label_set: str
    protocol: str
    source: str
    figures: Mapping[str, tuple[str, float]]


def published_metric(task: str, protocol: str) -> str:
    """Return the metric of a task that published delta_m under a protocol are over."""
    return TASKS[task].published_metrics.get(protocol, TASKS[task].metric)


# Which reader of the stored edge maps is behind a figure, and how saliency was scored: docs/datasets.md.
BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline(
            "m3vit-r18",
            "pascal",
            "A",
            "M3ViT (arXiv 2210.14793), table 1: STL-B, ResNet-18",
            {
                "semseg": ("mIoU", 66.2),
                "human_parts": ("mIoU", 59.9),
                "saliency": ("mIoU", 66.3),
                "normals": ("mErr", 13.9),
                "edge": ("odsF", 68.8),
            },
        ),
        Baseline(
            "m3vit-r50",
            "nyud",
            "A",
            "M3ViT (arXiv 2210.14793), table 1 and evaluation/evaluate_utils.py: STL-B, ResNet-50",
            {"semseg": ("mIoU", 43.9), "depth": ("rmse", 0.585), "normals": ("mErr", 19.763)},
        ),
        Baseline(
            "sak-vitb-pascal",
            "pascal",
            "B",
            "SAK and PRISM: single-task ViT-B",
            {
                "semseg": ("mIoU", 80.25),
                "human_parts": ("mIoU", 70.54),
                "saliency": ("maxF", 84.54),  # evaluation/eval_sal.py:18 of innovator-zero/SAK: no second sigmoid
                "normals": ("mErr", 13.57),
                "edge": ("odsF_sak", 74.22),
            },
        ),
        Baseline(
            "sak-vitb-nyud",
            "nyud",
            "B",
            "SAK and PRISM: single-task ViT-B",
            {
                "semseg": ("mIoU", 51.15),
                "depth": ("rmse", 0.5792),
                "normals": ("mErr", 19.77),
                "edge": ("odsF_sak", 77.35),
            },
        ),
    )
}


def delta_m(scores: Mapping[str, Mapping[str, float]], baseline: Baseline) -> float:
    """Return Delta_m in percent of {task: {metric: value}} over the baseline.

    Raises InputError for a task that the baseline has no figure of, or the reverse: leaving it out would change what
    the number means.
    """
    if set(scores) != set(baseline.figures):
        raise InputError(
            f"delta_m over {baseline.name} is of {', '.join(baseline.figures)}, but this evaluation is of "
            f"{', '.join(scores)}: choose baselines of the same tasks"
        )
    gains = []
    for task, (metric, value) in baseline.figures.items():
        gain = (scores[task][metric] - value) / value
        gains.append(gain if TASKS[task].higher_is_better else -gain)
    return 100 * sum(gains) / len(gains)
