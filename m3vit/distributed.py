"""Several processes started by torchrun: who am I, and everybody's results in one place."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from m3vit.errors import InputError

Result = TypeVar("Result")


def world_size() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes, if there are any; gloo: what is exchanged here lies in the CPU's memory."""
    if world_size() == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave_group() -> None:
    """Leave the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """Return every process's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def total(tensor: Tensor, in_place: bool = False) -> Tensor:
    """Return the sum of a tensor over all processes, without gradient; on one process, the tensor."""
    if not dist.is_initialized():
        return tensor.detach()
    result = tensor.detach() if in_place else tensor.detach().clone()
    dist.all_reduce(result)
    return result


def agree(function: Callable[[], Result]) -> Result:
    """Return function(); an InputError of any process is raised in all, so that none waits for one that stopped."""
    result, message = None, None
    try:
        result = function()
    except InputError as error:
        if not dist.is_initialized():
            raise
        message = str(error)
    for found in gather(message):
        if found:
            raise InputError(found, everywhere=True)
    return result  # type: ignore[return-value]
