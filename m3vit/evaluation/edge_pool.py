"""Scores edge maps in processes of their own. No torch: each process would spend seconds importing it."""

from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.data.sample import Split
from m3vit.errors import InputError
from m3vit.evaluation.meters import Statistics, make_meter
from m3vit.pool import start_pool

KILLED = "a process that matches edges was killed, maybe for want of memory: run again with fewer --workers"
POOL_FROM_PIXELS = 2_000_000  # of all images together: below that, starting processes costs more than it saves


class EdgeScorer:
    """Scores edge maps against a split's `edge_truth`, in processes of its own if that pays; results keep the order."""

    PENDING = 8  # maps waiting for each process, at most: they take memory

    def __init__(self, split: Split, task: str, protocol: str, workers: int) -> None:
        self.split, self.task, self.protocol, self.workers = split, task, protocol, workers
        self.pool: ProcessPoolExecutor | None = None
        self.rows: list[Statistics | Future[Statistics]] = []

    def __enter__(self) -> "EdgeScorer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def submit(self, index: int, guess: NDArray[Any]) -> None:
        """Score the map [h, w] of image `index`."""
        if self.pool is None and self.workers > 1 and len(self.split) * guess.size > POOL_FROM_PIXELS:
            arguments = (self.split, self.task, self.protocol)
            # spawn: a fork of a process with torch's threads may hang.
            self.pool = start_pool(self.workers, _set_job, arguments)
        if self.pool is None:
            self.rows.append(edge_statistics(self.split, self.task, self.protocol, index, guess))
            return
        if len(self.rows) >= self.PENDING * self.workers:
            place = len(self.rows) - self.PENDING * self.workers
            self.rows[place] = self._finished(self.rows[place])
        try:
            self.rows.append(self.pool.submit(_score_job, index, guess))
        except BrokenProcessPool:
            raise InputError(KILLED) from None

    def leave_out(self) -> None:
        """Take the place of an image without a truth to score against: its statistics are zero."""
        self.rows.append(np.zeros(0))

    def results(self) -> list[Statistics]:
        """Return the statistics of all maps, in the order of submission."""
        rows = [self._finished(row) for row in self.rows]
        length = max((len(row) for row in rows), default=0)
        if rows and not length:
            raise InputError(f"no image has a label of {self.task}: leave out the task, or give data that have it")
        return [row if len(row) else np.zeros(length) for row in rows]

    def _finished(self, row: Statistics | Future[Statistics]) -> Statistics:
        try:
            return row.result() if isinstance(row, Future) else row
        except BrokenProcessPool:
            raise InputError(KILLED) from None


def edge_statistics(split: Split, task: str, protocol: str, index: int, guess: NDArray[Any]) -> Statistics:
    """Score the edge map [h, w] of one image."""
    return make_meter(task, split.label_set, protocol).image(guess, split.edge_truth(index))


_job: tuple[Split, str, str] | None = None  # what a scoring process works on: sent once, not with each map


def _set_job(split: Split, task: str, protocol: str) -> None:
    global _job
    _job = split, task, protocol


def _score_job(index: int, guess: NDArray[Any]) -> Statistics:
    assert _job is not None
    return edge_statistics(*_job, index, guess)
