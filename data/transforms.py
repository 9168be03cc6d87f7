"""From samples on disk to network inputs, and the training augmentations.

Every label kind is changed as its geometry asks: ids and masks by nearest neighbour, the x component of normals
negated by a mirror.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from m3vit.data.nyud import Sample
from m3vit.tasks import IMAGE_MEAN, IMAGE_STD


def normalise(image: Tensor) -> Tensor:
    """Turn RGB uint8 [..., 3, H, W] into normalised float32 (ImageNet mean and standard deviation)."""
    return tv.normalize(tv.to_dtype(image, torch.float32, scale=True), list(IMAGE_MEAN), list(IMAGE_STD))


def label_tensor(task: str, label: np.ndarray) -> Tensor:
    """Turn a label as loaded into what losses and meters take.

    semseg int64 [H, W], depth float32 [H, W], normals float32 [3, H, W], edge uint8 [H, W].
    """
    tensor = torch.from_numpy(np.ascontiguousarray(label))
    if task == "semseg":
        return tensor.long()
    return tensor.permute(2, 0, 1).contiguous() if task == "normals" else tensor


def image_tensor(image: np.ndarray) -> Tensor:
    """Turn RGB uint8 [H, W, 3] into a uint8 tensor [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def network_input(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resize (bilinear, antialiased) RGB uint8 [H, W, 3] to `size` and normalise: float32 [3, *size]."""
    return normalise(tv.resize(image_tensor(image), list(size)))


def training_pair(
    sample: Sample, size: tuple[int, int], rng: np.random.Generator, flip: bool, colour: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an augmented input [3, *size] and its labels at the same size. `rng` decides everything random."""
    image = tv.resize(image_tensor(sample.image), list(size))
    labels = {task: label_tensor(task, label) for task, label in sample.labels.items()}
    for task, label in labels.items():
        if label.shape[-2:] != tuple(size):
            planes = label if label.ndim == 3 else label[None]
            resized = tv.resize(planes, list(size), interpolation=tv.InterpolationMode.NEAREST_EXACT)
            labels[task] = resized if label.ndim == 3 else resized[0]
    if flip and rng.random() < 0.5:
        image, labels = mirror(image, labels)
    pixels = normalise(image)
    if colour > 0:
        gain = 1 + colour * rng.uniform(-1, 1, (3, 1, 1))
        offset = colour * rng.normal(0, 1, (3, 1, 1))
        pixels = pixels * torch.from_numpy(gain).float() + torch.from_numpy(offset).float()
    return pixels, labels


def mirror(image: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mirror an image and its labels left to right; normals point the other way in x."""
    labels = {task: label.flip(-1) for task, label in labels.items()}
    if "normals" in labels:
        labels["normals"] = labels["normals"] * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    return image.flip(-1), labels
