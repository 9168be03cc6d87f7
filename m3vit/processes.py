"""Jobs in several processes. No torch."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from m3vit.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    *,
    chunk: int = 1,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Generator[Result, None, None]:
    """Yield function(job) of each job, in order, from this process or from a pool; closing it drops what has not begun.

    `initializer` runs once in each process, here too. Processes are started afresh ("spawn": libraries with threads,
    such as Embree and torch, would break in a fork). Raises InputError if one of them is killed.
    """
    workers = min(workers, -(-len(jobs) // chunk))
    if workers <= 1:
        if initializer:
            initializer(*initargs)
        yield from map(function, jobs)
        return
    pool = start_pool(workers, initializer, initargs)
    try:
        yield from pool.map(function, jobs, chunksize=chunk)
    except BrokenProcessPool:
        raise InputError(
            f"one of {workers} processes was killed, maybe for want of memory: run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_pool(
    workers: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """Return a pool of processes started afresh, or raise InputError where the system has no room for it."""
    try:
        return ProcessPoolExecutor(workers, get_context("spawn"), initializer=initializer, initargs=initargs)
    except OSError as error:
        raise InputError(
            f"{workers} processes cannot be started ({error.strerror or error}; their semaphores lie in /dev/shm): "
            "make room there, or run again with --workers 1"
        ) from None
