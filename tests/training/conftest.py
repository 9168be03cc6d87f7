"""Data of several tests of training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def uneven_data(make_data: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of very different numbers of valid pixels: means of means would not be the mean."""
    root = make_data(tmp_path_factory.mktemp("uneven"), val=5)
    for index in range(10):
        depth = np.load(root / "depth" / f"{index:04d}.npy")
        depth[:, : 5 * index] = 0
        np.save(root / "depth" / f"{index:04d}.npy", depth)
        path = root / "segmentation" / f"{index:04d}.png"
        classes = np.array(Image.open(path))
        classes[: 3 * index] = 0  # unlabelled
        Image.fromarray(classes).save(path)
    return root
