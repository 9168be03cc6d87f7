"""A tiny model, its images and samples: what the tests of both HLS schedules export."""

from typing import Any

import numpy as np
import torch

from m3vit.export.hls.project import Samples
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel

SIZE = (24, 32)  # 3 x 4 patches of 8
TASKS = ["depth", "semseg", "edge"]  # not in the order of the task table
SAMPLES = 4
TRUNK: dict[str, Any] = {
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
    "class_token": False,
    "global_pool": "",
}


def make_model(trunk_args: dict[str, Any] | None = None, **config: Any) -> MultiTaskModel:
    """A tiny model with weights that make routing and every bias matter."""
    torch.manual_seed(0)
    settings = {"trunk": "vit_tiny_patch16_224", "image_size": SIZE, "num_experts": 4, "top_k": 2, "tasks": TASKS}
    model = MultiTaskModel(ModelConfig(trunk_args=TRUNK | (trunk_args or {}), **settings | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gates" in name or "heads" in name:
                parameter *= 4
            if name.endswith(("bias", "b1", "b2")) or "norm" in name or "token" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def make_images(count: int, seed: int = 0) -> np.ndarray:
    """Smooth blotches with noise: patches differ, within and between images."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 200, (count, 6, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return (coarse + rng.integers(0, 56, coarse.shape)).astype(np.uint8)


def make_samples() -> Samples:
    rng = np.random.default_rng(1)
    labels = []
    for index in range(SAMPLES):  # labels may be larger than the model's images, and each of another size
        size = 2 * SIZE[0] + index, 2 * SIZE[1]
        labels.append(
            {
                "depth": rng.uniform(1, 5, size).astype(np.float32),
                "semseg": rng.integers(0, 40, size).astype(np.uint8),
                "edge": rng.random(size) < 0.1,
            }
        )
    return Samples([f"image{i}" for i in range(SAMPLES)], make_images(SAMPLES), labels)
