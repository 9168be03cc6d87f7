"""Batches for training, in an order that depends on the seed alone: not on workers, processes or resuming."""

import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from m3vit.data.sample import Sample, Split
from m3vit.data.transforms import Pair, training_pair
from m3vit.errors import InputError
from m3vit.normalisation import Normalisation


class Batch(NamedTuple):
    """Augmented images [B, 3, H, W] and labels by task, or None if no sample could be read; and the errors.

    Errors are carried as text, one a sample that is left out: raised in a loader process they would arrive as a stack
    trace.
    """

    images: Tensor | None
    labels: dict[str, Tensor]
    errors: list[str]


class TrainingSet(Dataset):
    """Augmented samples, addressed by (epoch, index): the pair seeds the augmentation. Unreadable ones are text."""

    def __init__(
        self,
        split: Split,
        size: tuple[int, int],
        seed: int,
        normalisation: Normalisation,
        pipeline: str = "simple",
        flip: bool = True,
        colour: float = 0.0,
        cache: bool = False,
    ) -> None:
        self.split, self.size, self.seed, self.pipeline = split, size, seed, pipeline
        self.normalisation = normalisation
        self.options: dict[str, Any] = {"label_set": split.label_set, "flip": flip, "colour": colour}
        self.cache: dict[int, Sample] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> Pair | str:
        epoch, index = key
        try:
            sample = self._sample(index)
        except InputError as error:
            return str(error)
        rng = np.random.default_rng([1, self.seed, epoch, index])
        return training_pair(self.pipeline, sample, self.size, rng, self.normalisation, **self.options)

    def _sample(self, index: int) -> Sample:
        if self.cache is None:
            return self.split.load(index)
        if index not in self.cache:
            self.cache[index] = self.split.load(index)
        return self.cache[index]


def collate(samples: list[Pair | str]) -> Batch:
    """Put samples into a batch, without those that could not be read."""
    errors = [sample for sample in samples if isinstance(sample, str)]
    pairs = [sample for sample in samples if not isinstance(sample, str)]
    if not pairs:
        return Batch(None, {}, errors)
    images, labels = default_collate(pairs)
    return Batch(images, labels, errors)


class EpochBatches(Sampler):
    """Batches of (epoch, index), shuffled by (seed, epoch); the last short batch is dropped.

    `start` skips batches already trained on. Process `rank` of `processes` gets its share of every batch: together they
    see the batches that one process would.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = self.start = 0
        if not len(self):
            raise InputError(f"train.batch_size {batch_size} is more than the {length} training images")
        if batch_size % processes:
            raise InputError(
                f"train.batch_size {batch_size} is of all processes together: give a multiple of their number, "
                f"{processes}, or start another number"
            )
        share = batch_size // processes
        self.mine = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([2, self.seed, self.epoch]).permutation(self.length)
        for first in range(self.start * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield [(self.epoch, int(index)) for index in order[first : first + self.batch_size][self.mine]]


def ignore_signals(_: int) -> None:
    """In a loader process: leave signals that reach a whole job to the training process, which then ends this one."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)


def make_loader(dataset: TrainingSet, batches: EpochBatches, workers: int, pin_memory: bool = False) -> DataLoader:
    """Return the loader of `Batch`es over `batches`; set batches.epoch and batches.start before iterating it."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=ignore_signals,
        pin_memory=pin_memory,
        # An own generator: the loader's base seed must not be drawn from, and so move, the run's random state.
        generator=torch.Generator().manual_seed(0),
    )
