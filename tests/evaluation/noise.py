"""Splits for processes that score edges. No torch: they unpickle these, and would spend seconds importing it."""

import os
import signal

import numpy as np

from m3vit.data.sample import Sample
from m3vit.errors import InputError


class Noise:
    """Edges of random squares; picklable, for other processes."""

    label_set, release, split, tasks = "nyud", "noise", "val", ("edge",)

    def __init__(self, size: int, unreadable: tuple[int, ...] = ()) -> None:
        self.size, self.unreadable = size, unreadable
        self.ids = tuple(map(str, range(6)))

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> Sample:
        if index in self.unreadable:
            raise InputError(f"image {index} is damaged")
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Sample(str(index), image, {"edge": self.edge_truth(index).astype(np.uint8)})

    def edge_truth(self, index: int) -> np.ndarray:
        truth = np.zeros((self.size, self.size), bool)
        truth[5 + index : -5, 10] = True
        return truth


class Suicidal(Noise):
    """Kills the process that asks for its edges, as a system out of memory does."""

    def edge_truth(self, index: int) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError
