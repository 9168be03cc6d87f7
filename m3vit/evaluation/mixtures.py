"""What the gates of a decoder with experts do on a split, and how its memories grow: sums over patches, image by image.

Shapes: L blocks that the decoder reads, R tasks, K parts of a mixture, the E experts and then the memory if it has one,
T patches of an image, C bins of a task's labels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3vit.data.sample import Sample
from m3vit.evaluation.evaluate import normalised
from m3vit.evaluation.protocols import network_image
from m3vit.evaluation.routing import PROTOCOL, patch_bins
from m3vit.kinds.pictures import rounded
from m3vit.label_sets import LABEL_SETS
from m3vit.models.multitask import MultiTaskModel
from m3vit.tasks import TASKS, kind_of

Floats = NDArray[np.float64]


@dataclass
class Mixtures:
    """Means over the patches of some images.

    weights_LRK: of a task's mixture after a block, of sum 1. norms_LR: the Euclidean norm of a task's memory after it,
    and start_R before the first. labels: for each task with bins of labels their names, the patches of each, and its
    own weights there [L, C, K], NaN where there are none.
    """

    tasks: tuple[str, ...]
    blocks: tuple[int, ...]
    parts: tuple[str, ...]
    patches: int
    weights_LRK: Floats
    norms_LR: Floats
    start_R: Floats
    labels: dict[str, tuple[tuple[str, ...], NDArray[np.int64], Floats]]

    def to_json(self) -> dict[str, Any]:
        """Return the means as JSON values, by task and block."""
        blocks = [str(block) for block in self.blocks]
        return {
            "parts": list(self.parts),
            "weights": {
                task: {block: _numbers(self.weights_LRK[layer, place]) for layer, block in enumerate(blocks)}
                for place, task in enumerate(self.tasks)
            },
            "memory_norm": {
                task: {"start": rounded(self.start_R[place])}
                | {block: rounded(self.norms_LR[layer, place]) for layer, block in enumerate(blocks)}
                for place, task in enumerate(self.tasks)
            },
            "labels": {
                task: {
                    "bins": list(names),
                    "patches": patches.tolist(),
                    "weights": {
                        block: [_numbers(row) if count else None for row, count in zip(rows, patches, strict=True)]
                        for block, rows in zip(blocks, weights_LCK, strict=True)
                    },
                }
                for task, (names, patches, weights_LCK) in self.labels.items()
            },
        }


def _numbers(values: Floats) -> list[float | None]:
    return [rounded(float(value)) for value in values]


def check_mixed(model: MultiTaskModel) -> bool:
    """Return whether a model's decoder has experts of which the states can be looked at."""
    return bool(model.heads.experts) and hasattr(model.heads, "states")


@torch.inference_mode()
def gather_mixtures(model: MultiTaskModel, samples: Iterable[Sample], label_set: str) -> Mixtures:
    """Return the means over samples of a label set, one at a time; images are resized as under protocol A."""
    model.eval()
    decoder: Any = model.heads
    tasks, blocks = tuple(model.config.tasks), tuple(decoder.experts)
    experts = max(decoder.experts.values())
    classes = LABEL_SETS[label_set].classes
    names = {task: kind_of(task).bins(TASKS[task], classes.get(task, ())) for task in tasks}
    names = {task: tuple(found) for task, found in names.items() if found}
    weights: Any = 0.0
    norms: Any = 0.0
    patches, counted = 0, {task: np.zeros(len(found), np.int64) for task, found in names.items()}
    by_label: dict[str, Any] = dict.fromkeys(names, 0.0)
    height, width = model.config.image_size
    for sample in samples:
        images = normalised([network_image(PROTOCOL, "", sample.image, (height, width))], model.normalisation)
        features, _ = model.backbone(images.to(next(model.parameters()).device), tuple(range(len(tasks))), blocks)
        states = decoder.states(features, tasks)
        weights_LRTK = _stacked(states, lambda state: state.weights[0])
        weights = weights + weights_LRTK.sum(axis=2)
        norms = norms + _stacked(states, lambda state: state.memory[0].norm(dim=-1)).sum(axis=2)
        patches += weights_LRTK.shape[2]
        for task, found in names.items():
            bins = patch_bins(kind_of(task), sample.labels[task], features.grid, len(found))
            one_CT = (bins == np.arange(len(found))[:, None]).astype(np.float64)
            counted[task] += one_CT.sum(axis=1).astype(np.int64)
            by_label[task] = by_label[task] + one_CT @ weights_LRTK[:, tasks.index(task)]
    parts = tuple(f"e{expert}" for expert in range(experts))
    parts += ("memory",) * (weights.shape[-1] - experts)
    start = np.array([float(decoder.own[task].start.norm()) for task in tasks])
    labels = {}
    for task, count in counted.items():
        means = by_label[task] / np.where(count, count, np.nan)[:, None]
        labels[task] = names[task], count, means
    return Mixtures(tasks, blocks, parts, patches, weights / patches, norms / patches, start, labels)


def _stacked(states: dict[str, Sequence[Any]], of: Any) -> Floats:
    """Return something of each state as one array [L, R, ...]."""
    by_task = [torch.stack([of(state) for state in found]) for found in states.values()]
    return torch.stack(by_task, dim=1).double().cpu().numpy()
