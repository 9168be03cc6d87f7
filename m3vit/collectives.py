"""Several processes started by torchrun or srun: who am I, and everybody's results in one place."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from m3vit.errors import InputError, one_line
from m3vit.launched import join, place

Result = TypeVar("Result")


def world_size() -> int:
    """Return how many processes torchrun or srun started; 1 without them."""
    return place().world


def rank() -> int:
    """Return this process's number, from 0."""
    return place().rank


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes, if there are any; gloo: what is exchanged here lies in the CPU's memory."""
    if join().world == 1:
        yield
        return
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise unreachable(error) from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def unreachable(error: Exception) -> InputError:
    """Return the error of a process that the others cannot be reached from."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return InputError(
        f"the {world_size()} processes cannot meet at {where} ({one_line(error, 200)}): start all of "
        "them, and set MASTER_ADDR and MASTER_PORT to a free port of the first node"
    )


def leave_group() -> None:
    """Leave the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost(error: RuntimeError) -> bool:
    """Return whether an exchange failed because another process is gone (gloo and NCCL raise RuntimeErrors of text)."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "TCPStore")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


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
    """Return function(); what any process raises ends all, so that none waits for one that stopped.

    An InputError is raised in all. Another exception is a defect of ours: it goes on where it arose, and the other
    processes raise an InputError about it.
    """
    if not dist.is_initialized():
        return function()
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    told = failure if failure is None or isinstance(failure, InputError) else type(failure).__name__
    found = gather(told)
    if failure and not isinstance(failure, InputError):
        raise failure
    for process, what in enumerate(found):
        if isinstance(what, InputError):
            what.everywhere = True
            raise what
        if what:
            raise InputError(f"process {process} failed with {what}, see there", everywhere=True)
    return result  # type: ignore[return-value]
