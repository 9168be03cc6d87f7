"""Which of several processes this one is, from the environment that torchrun or Slurm's srun gives it. No torch.

torchrun sets RANK, WORLD_SIZE and more. srun sets variables of the job step (SLURM_PROCID, SLURM_STEP_NUM_TASKS, ...),
from which torchrun's follow. An sbatch script or an salloc shell has the allocation's variables alone (SLURM_NTASKS):
what runs there without srun is one process, however many tasks were asked for.
"""

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from m3vit.errors import InputError

_NO_STEP = 0xFFFFFFF0  # Slurm's numbers of steps from here on are batch scripts, shells and the like


class Place(NamedTuple):
    """This process among all (rank of world), and among those of its node (local_rank of local_world; 0: not known)."""

    rank: int
    world: int
    local_rank: int
    local_world: int


ALONE = Place(0, 1, 0, 1)


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Return this process's place, or raise InputError naming the variable that makes no sense."""
    if "WORLD_SIZE" in environment or "RANK" in environment:
        return _of_torchrun(environment)
    return _of_srun(environment)


def speaks() -> bool:
    """Return whether this process is the one that prints what all would print."""
    try:
        return place().rank == 0
    except InputError:
        return True


def join(environment: dict[str, str] | os._Environ[str] = os.environ) -> Place:
    """Return this process's place; where srun started several, set torchrun's variables, which torch reads."""
    found = place(environment)
    if found.world > 1 and "WORLD_SIZE" not in environment:
        job, step = _number(environment, "SLURM_JOB_ID", 0, 0), _number(environment, "SLURM_STEP_ID", 0, 0)
        here = found.local_world == found.world
        values = {
            "RANK": found.rank,
            "WORLD_SIZE": found.world,
            "LOCAL_RANK": found.local_rank,
            "LOCAL_WORLD_SIZE": found.local_world,
            "GROUP_RANK": found.rank // found.local_world,
            "MASTER_ADDR": environment.get("MASTER_ADDR") or ("127.0.0.1" if here else _first_node(environment)),
            "MASTER_PORT": environment.get("MASTER_PORT") or 15000 + (31 * job + step) % 15000,
        }
        environment.update({name: str(value) for name, value in values.items()})
    if found.world > 1:
        if not found.local_world or found.world % found.local_world:
            raise InputError(
                f"WORLD_SIZE is {found.world} and LOCAL_WORLD_SIZE {found.local_world or 'not set'}, not as "
                "torchrun sets them, with the same number of processes on each node: start several with torchrun or "
                "srun, or unset WORLD_SIZE and RANK for one"
            )
        if found.local_rank >= found.local_world:
            raise InputError(
                f"LOCAL_RANK is {found.local_rank} and LOCAL_WORLD_SIZE {found.local_world}: ranks are 0 to that - 1"
            )
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise InputError(
                    f"WORLD_SIZE is {found.world}, but {name} is not set, as torchrun does: start several processes "
                    "with torchrun or srun, or unset WORLD_SIZE and RANK for one"
                )
        if _number(environment, "MASTER_PORT", 0, 1) > 65535:
            raise InputError(f"MASTER_PORT is {environment['MASTER_PORT']}: give a port from 1 to 65535")
    return found


def _of_torchrun(environment: Mapping[str, str]) -> Place:
    world, rank = _number(environment, "WORLD_SIZE", 1, 1), _number(environment, "RANK", 0, 0)
    if rank >= world:
        raise InputError(
            f"RANK is {rank} and WORLD_SIZE {environment.get('WORLD_SIZE', 'not set')}: ranks are 0 to WORLD_SIZE - 1. "
            "torchrun sets both; unset both for one process"
        )
    if world == 1:
        return ALONE
    return Place(rank, world, _number(environment, "LOCAL_RANK", 0, 0), _number(environment, "LOCAL_WORLD_SIZE", 0, 1))


def _of_srun(environment: Mapping[str, str]) -> Place:
    in_step = any(name in environment for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS"))
    name = "SLURM_STEP_ID" if "SLURM_STEP_ID" in environment else "SLURM_STEPID"
    if not in_step or (environment.get(name, "").isdigit() and int(environment[name]) >= _NO_STEP):
        if environment.get("SLURM_PROCID", "0") != "0":
            raise InputError(
                f"SLURM_PROCID is {environment['SLURM_PROCID']}, but the other variables of an srun step are not set "
                "(SLURM_STEP_ID, SLURM_STEP_NUM_TASKS): start several processes with srun or torchrun, or unset it for "
                "one"
            )
        return ALONE
    world_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    world, rank = _number(environment, world_name, 1, 1), _number(environment, "SLURM_PROCID", 0, 0)
    if rank >= world:
        raise InputError(f"SLURM_PROCID is {rank} and {world_name} {world}: tasks are 0 to that - 1")
    if world == 1:
        return ALONE
    nodes_name = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in environment else "SLURM_NNODES"
    nodes = _number(environment, nodes_name, 1, 1)
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    if world % nodes or "," in per_node:
        raise InputError(
            f"srun started {world} tasks on {nodes} nodes ({per_node or 'unevenly'}): start as many on each node, with "
            "--ntasks-per-node"
        )
    local_world, local_rank = world // nodes, _number(environment, "SLURM_LOCALID", rank % (world // nodes), 0)
    if local_rank >= local_world or rank != rank // local_world * local_world + local_rank:
        raise InputError(
            f"srun spread {world} tasks over {nodes} nodes so that task {rank} is number {local_rank} of its node: "
            "give --distribution=block and --ntasks-per-node"
        )
    return Place(rank, world, local_rank, local_world)


def _first_node(environment: Mapping[str, str]) -> str:
    """Return the first name of a list such as node[01-04,7],other."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    found = re.match(r"([^,\[\]]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if not found:
        raise InputError(f"SLURM_STEP_NODELIST is {nodes!r}: set MASTER_ADDR to the first node's address")
    return "".join(part or "" for part in found.groups())


def _number(environment: Mapping[str, str], name: str, absent: int, smallest: int) -> int:
    text = environment.get(name)
    if text is None:
        return absent
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= smallest):
        raise InputError(
            f"{name} is {text[:40]!r}: a whole number from {smallest} on is expected, as torchrun and srun set it; "
            "unset it for one process"
        )
    return int(text)
