"""Batches for training, in an order that depends on the seed alone: not on workers, processes or resuming."""

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing  # registers how tensors are pickled: by their place in shared memory
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from m3vit.data.augment import Pair, training_pair
from m3vit.data.network_input import network_input
from m3vit.data.sample import Sample, Split
from m3vit.errors import InputError
from m3vit.normalisation import Normalisation

CACHE_SHARE = 0.4  # of the machine's memory: the model, other processes and the system need the rest


class Batch(NamedTuple):
    """Augmented images [B, 3, H, W] and labels by task, or None if no sample could be read; and the errors.

    Errors are carried as text, one a sample that is left out: raised in a loader process they would arrive as a stack
    trace. `unlabelled` has (task, text) of each label that cannot be read (partial splits). `failure` says why there
    is no batch, nor one after it: a loader process failed or was killed.
    """

    images: Tensor | None
    labels: dict[str, Tensor]
    errors: list[str]
    unlabelled: Sequence[tuple[str, str]] = ()
    failure: str = ""

    def pin_memory(self) -> "Batch":
        """Return the batch in memory that a GPU can copy from while it computes."""
        images = None if self.images is None else self.images.pin_memory()
        return self._replace(images=images, labels={task: label.pin_memory() for task, label in self.labels.items()})


class Parcel:
    """A batch on its way out of a loader process, pickled: tensors are names of shared memory by then.

    What a queue pickles, it pickles in a thread, whose failure (a full /dev/shm, an exception that cannot be pickled)
    reaches nobody: the training process would wait for ever.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data

    def open(self) -> Batch:
        """Return the batch, once."""
        found: Batch = pickle.loads(self.data)
        return found

    def pin_memory(self) -> "Batch | Parcel":
        """Return the batch, pinned; DataLoader calls this, in a thread of its own."""
        try:
            return self.open().pin_memory()
        except Exception as error:  # a defect would be lost in that thread as well
            return Batch(None, {}, [], failure=describe(error))


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
        self.options: dict[str, Any] = {"ranges": split.m3vit_ranges, "flip": flip, "colour": colour}
        self.cache: dict[int, Sample] | None = {} if cache else None
        self.room = CACHE_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # for the cache, bytes

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> Pair | str:
        return self.example(key)[0]

    def example(self, key: tuple[int, int]) -> tuple[Pair | str, dict[str, str]]:
        """Return the augmented sample, and why it lacks labels, by task."""
        epoch, index = key
        try:
            sample = self._sample(index)
        except InputError as error:
            return str(error), {}
        rng = np.random.default_rng([1, self.seed, epoch, index])
        pair = training_pair(self.pipeline, sample, self.size, rng, self.normalisation, **self.options)
        return pair, sample.unlabelled

    def _sample(self, index: int) -> Sample:
        if self.cache is None:
            return self.split.load(index)
        if index in self.cache:
            return self.cache[index]
        sample = self.split.load(index)
        size = sample.image.nbytes + sum(label.nbytes for label in sample.labels.values())
        if size <= self.room:
            self.cache[index] = sample
            self.room -= size
        elif self.room:  # the first
            self.room = 0
            warnings.warn(
                f"data.cache keeps {len(self.cache)} of {len(self)} training images, which take {CACHE_SHARE:.0%} of "
                f"this machine's memory; the others are read in each epoch (of {size / 2**20:.1f} MiB each): resize "
                "them, or give --data.cache false and --data.workers",
                stacklevel=2,
            )
        return sample


def collate(examples: list[tuple[Pair | str, dict[str, str]]]) -> Batch:
    """Put samples into a batch, without those that could not be read."""
    errors = [sample for sample, _ in examples if isinstance(sample, str)]
    pairs = [sample for sample, _ in examples if not isinstance(sample, str)]
    if not pairs:
        return Batch(None, {}, errors)
    images, labels = default_collate(pairs)
    missing = [pair for _, unlabelled in examples for pair in unlabelled.items() if pair[1]]
    return Batch(images, labels, errors, missing)


class EpochBatches(Sampler):
    """Batches of (epoch, index), shuffled by (seed, epoch); the last short batch is dropped.

    `start` skips batches already trained on. Process `rank` of `processes` gets its share of every batch: together they
    see the batches that one process would.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch = self.start = 0
        if not len(self):
            raise InputError(
                f"train.batch_size {batch_size} is more than the {length} training images: give at most {length}"
            )
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


class BatchSet(Dataset):
    """Batches of samples, addressed by the keys of these; in a loader process as parcels, whatever happens."""

    def __init__(self, samples: TrainingSet) -> None:
        self.samples = samples

    def __getitem__(self, keys: list[tuple[int, int]]) -> Batch | Parcel:
        if torch.utils.data.get_worker_info() is None:
            return collate([self.samples.example(key) for key in keys])
        try:
            return Parcel(bytes(ForkingPickler.dumps(collate([self.samples.example(key) for key in keys]))))
        except Exception as error:  # of any kind: raised, it would come as a stack trace or not at all
            return Parcel(pickle.dumps(Batch(None, {}, [], failure=describe(error))))


def begin_worker(_: int) -> None:
    """In a loader process: leave signals that reach a whole job to the training process, which then ends this one."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # torch would print lines of its own beside ours
    sys.excepthook = lambda *_: None  # of the thread that hands out shared memory: the other end tells of it
    if (training := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(training,), daemon=True).start()


def _end_with(training: Any) -> None:
    """End this process when the training process has.

    torch looks at the parent now and then, but not while a batch waits to be handed over, and it may be a fork server.
    """
    wait([training.sentinel])
    os._exit(1)


def describe(error: BaseException) -> str:
    """Return what an exception says, on one line, with its name."""
    words = " ".join((getattr(error, "strerror", None) or str(error)).split())[:300]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def end_of(workers: list[BaseProcess]) -> str:
    """Return how the first of these processes that died did so, or an empty text."""
    dying = wait([worker.sentinel for worker in workers], timeout=0.5)  # a lost connection is noticed before its end
    for worker in workers:
        if worker.sentinel in dying:
            worker.join(1)
    hints = {signal.SIGKILL: ", maybe for want of memory", signal.SIGBUS: ", as when /dev/shm is full"}
    for worker in workers:
        code = worker.exitcode
        if code and code < 0:
            return f"it was killed by {signal.Signals(-code).name}{hints.get(signal.Signals(-code), '')}"
        if code:
            return f"it ended with exit code {code}"
    return ""


_FAILED: list[Any] = []


class Loader:
    """The `Batch`es of an epoch; set batches.epoch and batches.start before iterating it.

    With `workers` they are made in processes. A failure of one of these is the last batch.
    """

    def __init__(self, dataset: TrainingSet, batches: EpochBatches, workers: int, pin_memory: bool = False) -> None:
        self.workers = workers
        self.loader = DataLoader(
            BatchSet(dataset),
            sampler=batches,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=begin_worker,
            pin_memory=pin_memory,
            # An own generator: the loader's base seed must not be drawn from, and so move, the run's random state.
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            yield from self.loader
            return
        iterator: Any = None
        before = set(multiprocessing.active_children())
        while True:
            try:
                if iterator is None:
                    handler = signal.getsignal(signal.SIGCHLD)
                    iterator = iter(self.loader)
                    # torch has its death notices of workers raised by a signal handler: anywhere within a step, where
                    # the other processes of a torchrun would wait. Without it, `next` finds them within 5 seconds.
                    if threading.current_thread() is threading.main_thread():
                        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
                batch = next(iterator)
                batch = batch.open() if isinstance(batch, Parcel) else batch
            except StopIteration:
                return
            except Exception as error:
                batch = Batch(None, {}, [], failure=end_of(getattr(iterator, "_workers", [])) or describe(error))
            if batch.failure:
                for worker in set(multiprocessing.active_children()) - before:
                    worker.kill()
                _FAILED.append(iterator)  # its destructor would wait for a lock that a killed process may hold
                yield batch._replace(failure=self.advice(batch.failure))
                return
            yield batch

    def advice(self, cause: str) -> str:
        """Return a failure with what to do about it."""
        shared = ""
        try:
            usage = shutil.disk_usage("/dev/shm")
            shared = f" ({usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB are free; docker run --shm-size=2g)"
        except OSError:
            pass
        return (
            f"a process that loads data failed: {cause}. Give fewer --data.workers than {self.workers}, or 0 (the "
            f"training process loads), or more memory, larger limits (ulimit) or more /dev/shm{shared}"
        )


def _as_it_is(batch: Any) -> Any:
    return batch


def make_loader(dataset: TrainingSet, batches: EpochBatches, workers: int, pin_memory: bool = False) -> Loader:
    """Return the loader of `Batch`es over `batches`; set batches.epoch and batches.start before iterating it."""
    return Loader(dataset, batches, workers, pin_memory)


def unlabelled(
    split: Split, size: tuple[int, int], normalisation: Normalisation, count: int, seed: int, skip: bool = False
) -> Iterator[Tensor]:
    """Yield batches of `count` images alone [count, 3, *size], resized and normalised, without end, by the seed alone.

    Each image once, in a random order, then each once more. skip: those that cannot be read are passed over, unless
    none can; else InputError.
    """
    rng, batch, failure = np.random.default_rng([5, seed]), [], None
    while True:
        read = 0
        for index in rng.permutation(len(split)):
            try:
                image = split.read(int(index), "image")
            except InputError as error:
                if not skip:
                    raise
                failure = error
                continue
            read += 1
            batch.append(network_input(image, size, normalisation))
            if len(batch) == count:
                yield torch.stack(batch)
                batch = []
        if not read:
            raise failure or InputError("a split without an image has none to give")
