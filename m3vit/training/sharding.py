"""Fully sharded data parallelism (torch's FSDP2): each process keeps a share of every weight, gradient and moment.

A unit's weights are put together before it runs, in the forward and in the backward pass, and dropped after it; units
are the blocks of the trunk, of blocks with experts the attention and the experts, and all the rest as one. What leaves
the processes (checkpoints) is whole, so that a run may go on on any number of processes, sharded or not.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from m3vit.collectives import rank, total
from m3vit.models.moe import MoELayer
from m3vit.models.multitask import MultiTaskModel

BUCKET_BYTES = 2**26  # of sharded tensors that are put together at a time


def shard(model: MultiTaskModel, mesh: DeviceMesh) -> MultiTaskModel:
    """Replace the model's parameters by this process's shares of them; the processes hold the same weights."""
    data = mesh["data_parallel"]

    def dimension(parameter: nn.Parameter) -> Shard:
        # torch's choice is the first one: all positions [1, T, D] in one process, 16 experts in 16 of 64.
        even = [index for index, length in enumerate(parameter.shape) if length % data.size() == 0]
        return Shard(even[0] if even else 0)

    for block in model.backbone.trunk.blocks:
        # Of blocks with experts the backbone calls the parts, not the block, and a unit is what is called.
        parts = [block.attn, block.mlp] if isinstance(getattr(block, "mlp", None), MoELayer) else [block]
        for part in parts:
            fully_shard(part, mesh=data, shard_placement_fn=dimension)
    # Of units whose output is a view, which must not be changed in place: nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    fully_shard(model, mesh=data, shard_placement_fn=dimension)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` was applied to a model."""
    return isinstance(model, FSDPModule)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Keep a sharded model's weights together while in here, so that a process can run it without the others."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            # The outermost is what the backward pass starts with: dropped after the forward pass, it would be fetched
            # again at once.
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers (running statistics), as DistributedDataParallel does each step."""
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():  # counts and masks are the same
                dist.broadcast(buffer, 0)


@torch.no_grad()
def gathered(value: Any) -> Any:
    """Return a state (dicts, lists, tensors) with sharded tensors whole, in the first process's CPU memory.

    Every process must call this, on the same state; the others get None for each sharded tensor. BUCKET_BYTES of them,
    or one that is larger, are whole on the devices at a time.
    """
    whole: dict[int, Tensor | None] = {}
    for bucket in _buckets(list(_sharded_in(value))):
        whole |= zip(map(id, bucket), _put_together(bucket), strict=True)

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(replaced(item) for item in value)
        return whole[id(value)] if isinstance(value, DTensor) else value

    return replaced(value)


def _sharded_in(value: Any) -> Iterator[DTensor]:
    """Yield the sharded tensors of a state."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _sharded_in(item)
    elif isinstance(value, DTensor):
        yield value


def _buckets(tensors: Sequence[DTensor]) -> Iterator[list[DTensor]]:
    """Yield tensors of one type and mesh together, up to BUCKET_BYTES: a collective for each would be all wait."""
    alike: dict[Any, list[DTensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device_mesh), []).append(tensor)
    for group in alike.values():
        bucket, size = list[DTensor](), 0
        for tensor in group:
            if bucket and size + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def _put_together(bucket: Sequence[DTensor]) -> list[Tensor | None]:
    """Return tensors whole, in the first process; in one collective, to which each gives its share of all, one by one.

    A process's share of a dimension is as torch.chunk cuts it: the last ones may be smaller, or empty.
    """
    mesh = bucket[0].device_mesh
    shares = [tensor.to_local() for tensor in bucket]
    places = [placement.dim for tensor in bucket for placement in tensor.placements]  # type: ignore[attr-defined]
    lengths = [-(-tensor.shape[dim] // mesh.size()) for tensor, dim in zip(bucket, places, strict=True)]
    rows = [tensor.numel() // max(tensor.shape[dim], 1) for tensor, dim in zip(bucket, places, strict=True)]
    sizes = [length * row for length, row in zip(lengths, rows, strict=True)]
    own = shares[0].new_zeros(sum(sizes))
    for part, share in zip(own.split(sizes), shares, strict=True):
        part[: share.numel()] = share.reshape(-1)
    every = own.new_empty(mesh.size() * len(own))
    dist.all_gather_into_tensor(every, own, group=mesh.get_group())
    if rank():
        return [None] * len(bucket)
    found: list[Tensor | None] = []
    by_process = [part.split(sizes) for part in every.cpu().split(len(own))]
    for number, (tensor, dim, length, row) in enumerate(zip(bucket, places, lengths, rows, strict=True)):
        parts = []
        for place, process in enumerate(by_process):
            held = min(max(tensor.shape[dim] - place * length, 0), length)
            shape = (*tensor.shape[:dim], held, *tensor.shape[dim + 1 :])
            parts.append(process[number][: held * row].view(shape))
        found.append(torch.cat(parts, dim))
    return found


def shared_out(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's share of a whole tensor, sharded as `like` is; the tensor if that is not sharded."""
    if not isinstance(like, DTensor):
        return whole
    # src_data_rank: every process has read the whole tensor, nothing need be sent.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole weights into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({name: shared_out(value, own.get(name, value)) for name, value in state.items()})


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load the whole state of an optimiser, as `gathered` gives it, sharded or not; ValueError if it does not fit."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def share(value: Any, parameter: Tensor) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:  # torch does not look
            raise ValueError(f"the optimiser's {list(value.shape)} for weights {list(parameter.shape)}")
        # What has the parameter's shape belongs to its elements (moments); the rest is of all (the number of steps).
        return shared_out(value, parameter) if getattr(value, "shape", None) == parameter.shape else value

    moments = {
        index: {name: share(value, parameters[index]) for name, value in found.items()}
        for index, found in state["state"].items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


def largest_values(parameters: Sequence[Tensor]) -> Tensor:
    """Return something that is not finite for each parameter that is not: its largest absolute value if whole [P]."""
    parts = [(p.to_local() if isinstance(p, DTensor) else p).detach() for p in parameters]
    largest = torch.stack([part.abs().max() if part.numel() else part.new_zeros(()) for part in parts])
    # Not the maximum over processes, which may pass over NaN.
    return total(largest) if any(isinstance(p, DTensor) for p in parameters) else largest


def clip_gradients(parameters: list[Tensor], limit: float) -> Tensor:
    """Scale the gradients, some of them sharded, down to a total norm of at most `limit`; return the norm before."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    square = torch.stack([part.float().square().sum() for part in local]).sum()
    dist.all_reduce(square)
    for gradient in gradients:
        if not isinstance(gradient, DTensor):  # the same in every process
            local.append(gradient)
            square += gradient.float().square().sum()
    norm = square.sqrt()
    if norm > limit:
        for part in local:
            part.mul_(limit / (norm + 1e-6))
    return norm
