"""Independent parts of a frame in threads of their own: heads, experts."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")
GRAIN = 1 << 15  # values of an operation, below which threads cost more than they bring: torch's own limit


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of a process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, "m3vit-emulator")


def each(function: Callable[[int], Result], count: int, size: int) -> list[Result]:
    """Return function(0) to function(count - 1), by as many threads as torch has, with one of torch's each.

    The operations are short: split among torch's own threads, these would wait for one another longer than they work.
    `function` runs in inference mode; its operations are of some `size` values.
    """
    threads = torch.get_num_threads()
    function = torch.inference_mode()(function)  # the mode is a thread's too
    if min(count, threads) < 2:
        return [function(place) for place in range(count)]
    torch.set_num_threads(1)  # of the process; a thread takes it over at its first operation
    parts: list[Future[Result]] = []
    try:
        if size < GRAIN:
            return [function(place) for place in range(count)]
        for place in range(count):
            parts.append(_pool(threads, os.getpid()).submit(function, place))
        return [part.result() for part in parts]
    finally:  # before which none may begin
        for part in parts:
            part.cancel()
        wait(parts)
        torch.set_num_threads(threads)
