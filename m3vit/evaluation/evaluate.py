"""Score anything that turns images into logits, on one split, beside a trivial predictor."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3vit.data.nyud import NYUD, Sample
from m3vit.data.transforms import label_tensor, network_input
from m3vit.evaluation.meters import make_meter
from m3vit.models.multitask import MultiTaskModel
from m3vit.tasks import TASKS

Predictor = Callable[[Sample], dict[str, Tensor]]  # a sample's logits {task: [1, C, h, w]}, at any resolution
Scores = dict[str, dict[str, float]]  # {task: {metric: value}}


def torch_predictor(model: MultiTaskModel) -> Predictor:
    """Return the model as a predictor: resized to the model's size, all tasks in one pass."""
    height, width = model.config.image_size
    model.eval()

    @torch.inference_mode()
    def predict(sample: Sample) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        logits = model(network_input(sample.image, (height, width))[None].to(device)).logits
        return {task: value.float().cpu() for task, value in logits.items()}

    return predict


def evaluate(
    split: NYUD,
    predict: Predictor,
    tasks: Sequence[str],
    indices: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Return the metrics of each task over the images `indices` (default: all) of a split."""
    meters = {task: make_meter(task) for task in tasks}
    chosen = range(len(split)) if indices is None else indices
    for done, index in enumerate(chosen, start=1):
        sample = split.load(index)
        logits = predict(sample)
        for task, meter in meters.items():
            size = sample.labels[task].shape[:2]
            value = logits[task]
            if value.shape[-2:] != size:
                value = F.interpolate(value, size=size, mode="bilinear", align_corners=False)
            meter.update(value, label_tensor(task, sample.labels[task])[None])
        if progress:
            progress(done, len(chosen))
    return {task: meter.compute() for task, meter in meters.items()}


class TrivialPredictor:
    """Predicts the same for every pixel of every image: what a network that looks at nothing could do.

    Fitted on the training labels: the most frequent class, the mean depth, the mean normal, the share of edges.
    """

    def __init__(self, constants: dict[str, Any]) -> None:
        self.constants = constants

    @classmethod
    def fit(cls, split: NYUD, progress: Callable[[int, int], None] | None = None) -> "TrivialPredictor":
        """Read every label of a split once."""
        classes = np.zeros(256, np.int64)
        depth, normals, edge = np.zeros(2), np.zeros(3), np.zeros(2)
        for index in range(len(split)):
            labels = split.load(index).labels
            if "semseg" in labels:
                classes += np.bincount(labels["semseg"].ravel(), minlength=256)
            if "depth" in labels:
                valid = labels["depth"][labels["depth"] > 0].astype(np.float64)
                depth += valid.sum(), valid.size
            if "normals" in labels:
                normals += labels["normals"].sum(axis=(0, 1), dtype=np.float64)
            if "edge" in labels:
                edge += (labels["edge"] == 1).sum(), (labels["edge"] <= 1).sum()
            if progress:
                progress(index + 1, len(split))
        constants = {
            "semseg": int(classes[:255].argmax()),
            "depth": float(depth[0] / max(depth[1], 1)),
            "normals": [float(value) for value in normals / max(float(np.linalg.norm(normals)), 1e-12)],
            "edge": float(edge[0] / max(edge[1], 1)),
        }
        return cls({task: constants[task] for task in split.tasks})

    def __call__(self, sample: Sample) -> dict[str, Tensor]:
        """Return constant logits at the image's size."""
        size = sample.image.shape[:2]
        vectors = {}
        for task, constant in self.constants.items():
            if task == "semseg":
                vectors[task] = F.one_hot(torch.tensor(constant), TASKS[task].channels).float()
            elif task == "edge":
                # Never below the lowest threshold: the best a constant can do is to call every pixel an edge.
                vectors[task] = torch.logit(torch.tensor([min(max(constant, 0.02), 0.99)]))
            else:
                vectors[task] = torch.tensor(constant).float().reshape(-1)
        return {task: vector.view(1, -1, 1, 1).expand(1, -1, *size) for task, vector in vectors.items()}
