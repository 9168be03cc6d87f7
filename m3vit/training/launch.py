"""Devices and processes of a training run, by Lightning Fabric."""

import logging

import torch
from torch import nn

from m3vit.collectives import unreachable
from m3vit.errors import InputError
from m3vit.hidden import hidden
from m3vit.launched import join
from m3vit.training.config import TrainConfig
from m3vit.training.sharding import shard

try:
    with hidden("torchmetrics"):  # there with loggers: importing it takes a quarter of the time of all that trains
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
        from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
except ModuleNotFoundError:  # the whole of Lightning has it too, and needs torchmetrics
    from lightning.fabric import Fabric  # type: ignore
    from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment  # type: ignore
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy  # type: ignore


def launch(train: TrainConfig) -> Fabric:
    """Return Fabric on one device, or on one for each process of a torchrun or srun, which it joins into a group."""
    found = join()
    world, local = found.world, found.local_world
    # Nine lines about the process group.
    logging.getLogger(Fabric.__module__.rpartition(".")[0]).setLevel(logging.WARNING)
    try:
        if train.precision == "16-mixed" and not has_gpu(train.accelerator):
            raise InputError("train.precision 16-mixed needs a GPU: give bf16-mixed or 32-true on the CPU", True)
        if world == 1:
            # One device: left to itself, Fabric starts a process for every GPU it sees.
            # Nor shall it look for Slurm's variables: those of an allocation say nothing about this process.
            return Fabric(
                accelerator=train.accelerator,
                devices=1,
                precision=train.precision,  # type: ignore[arg-type]
                plugins=[LightningEnvironment()],
            )
        cuda = torch.cuda.is_available() and train.accelerator in ("auto", "cuda")
        # What lies in the CPU's memory (flags, statistics, random states) is exchanged there.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        strategy: DDPStrategy | ModelParallelStrategy
        if train.strategy == "fsdp":
            strategy = ModelParallelStrategy(
                shard, data_parallel_size=world, tensor_parallel_size=1, process_group_backend=backend
            )
        else:
            # Heads and gates of tasks that are not drawn (train.tasks_per_step) have no gradient. And with this, DDP
            # keeps its buckets as they are; it would rebuild them after the first step, and the order of sums over
            # three or more processes, so the last bits of a resumed run, would change with them.
            strategy = DDPStrategy(find_unused_parameters=True, process_group_backend=backend)
        fabric = Fabric(
            accelerator=train.accelerator,
            devices=local,
            num_nodes=world // local,
            strategy=strategy,
            precision=train.precision,  # type: ignore[arg-type]
            plugins=[TorchElasticEnvironment()],  # reads what torchrun set, or `join` in its stead
        )
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        raise InputError(f"train.accelerator {train.accelerator} cannot be used here: {error}") from None
    try:
        fabric.launch()
    except (ValueError, RuntimeError) as error:
        raise unreachable(error) from None
    return fabric


def has_gpu(accelerator: str) -> bool:
    """Return whether training will not be on the CPU, where Fabric would take bfloat16 for 16-mixed."""
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator in ("cuda", "mps") or (accelerator == "auto" and found)


def synchronise(model: nn.Module, fabric: Fabric) -> None:
    """Make batch normalisation that of all processes, on CUDA.

    gloo has none: on the CPU each process normalises over its own share, and the running statistics are the first's.
    """
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
