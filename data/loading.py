"""Batches for training, in an order that depends on the seed alone: not on workers, not on where a run resumed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from m3vit.data.nyud import NYUD, Sample
from m3vit.data.transforms import training_pair
from m3vit.errors import InputError


def open_split(layout: str, root: str, split: str, tasks: list[str]) -> NYUD:
    """Open one split of a data set, or raise InputError."""
    if not root:
        raise InputError("no data root: give --data.root DIR (m3vit data synth writes a small data set)")
    return {"nyud": NYUD}[layout](Path(root), split, tasks)


class TrainingSet(Dataset):
    """Augmented samples, addressed by (epoch, index): the pair seeds the augmentation."""

    def __init__(
        self, split: NYUD, size: tuple[int, int], seed: int, flip: bool = True, colour: float = 0.0, cache: bool = False
    ) -> None:
        self.split, self.size, self.seed, self.flip, self.colour = split, size, seed, flip, colour
        self.cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        epoch, index = key
        if self.cache is None:
            sample = self.split.load(index)
        else:
            if index not in self.cache:
                self.cache[index] = self.split.load(index)
            sample = self.cache[index]
        rng = np.random.default_rng([1, self.seed, epoch, index])
        return training_pair(sample, self.size, rng, self.flip, self.colour)


class EpochBatches(Sampler):
    """Batches of (epoch, index), shuffled by (seed, epoch); the last short batch is dropped.

    `start` skips batches already trained on.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = self.start = 0
        if not len(self):
            raise InputError(f"train.batch_size {batch_size} is more than the {length} training images")

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([2, self.seed, self.epoch]).permutation(self.length)
        for first in range(self.start * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield [(self.epoch, int(index)) for index in order[first : first + self.batch_size]]


def make_loader(dataset: TrainingSet, batches: EpochBatches, workers: int, pin_memory: bool = False) -> DataLoader:
    """Return the loader over `batches`; set batches.epoch and batches.start before iterating it."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        # An own generator: the loader's base seed must not be drawn from, and so move, the run's random state.
        generator=torch.Generator().manual_seed(0),
    )
