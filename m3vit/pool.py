"""The cores this process may use, and jobs in several processes. No torch."""

import math
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from m3vit.errors import InputError

if TYPE_CHECKING:  # the command line and the runtime ask for the cores alone, and multiprocessing doubles their start
    from concurrent.futures import ProcessPoolExecutor

Job = TypeVar("Job")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Return how many cores this process may use: those it may run on (affinity), or fewer if its cgroups' quotas of
    time are worth fewer (a container's `--cpus`); part of a core counts as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, cgroup_quota())))


def follow_quota() -> None:
    """Have torch and numpy start no more threads than the quota of time is worth; call it before they are imported.

    By themselves they follow the affinity alone, and threads beyond the quota stop each other. OMP_NUM_THREADS stays
    as it is if it is set.
    """
    cores = usable_cores()
    if cores >= cgroup_quota():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def cgroup_quota(memberships: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """Return how many cores' time this process's control groups allow, infinity without a limit.

    `memberships` is /proc/self/cgroup, a line "hierarchy:controllers:path" each; `mount` is where version 2 is
    mounted, or the folders of version 1's controllers. The limits of all groups above hold too. In a container the
    path may be the host's, which is not there: the mount is then the container's own group.
    """
    try:
        lines = memberships.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return math.inf
    quota = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        if not controllers:
            roots = [mount]
        else:
            roots = [mount / controllers, mount / "cpu"] if "cpu" in controllers.split(",") else []
        for root in roots:
            group = root / path.strip("/")
            for folder in (group, *group.parents):
                quota = min(quota, _quota_of(folder))
                if folder == root:
                    break
    return quota


def _quota_of(group: Path) -> float:
    """Return the cores' time that one group allows: `cpu.max` of version 2, `cpu.cfs_*_us` of version 1."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in files).split()
            if float(quota) > 0 and float(period) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError):  # not there; "max" and -1 are no limit
            continue
    return math.inf


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
    from concurrent.futures.process import BrokenProcessPool

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
) -> "ProcessPoolExecutor":
    """Return a pool of processes started afresh, or raise InputError where the system has no room for it."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from m3vit import label_sets, plugins

    known = (plugins.loaded(), label_sets.DECLARED)
    if any(known):
        initializer, initargs = _begin, (*known, initializer, initargs)
    try:
        return ProcessPoolExecutor(workers, get_context("spawn"), initializer=initializer, initargs=initargs)
    except OSError as error:
        raise InputError(
            f"{workers} processes cannot be started ({error.strerror or error}; their semaphores lie in /dev/shm): "
            "make room there, or run again with --workers 1"
        ) from None


def _begin(
    given: list[str], declared: list[dict[str, Any]], initializer: Callable[..., None] | None, initargs: tuple[Any, ...]
) -> None:
    """In a process of a pool: know what the process that started it has been told beyond the package's own tables."""
    from m3vit import label_sets, plugins

    for one in given:
        if one.startswith(plugins.THINGS):
            plugins.recall([one], "")
        else:
            plugins.load(one)
    for description in declared:
        label_sets.declare(description, "another process", ())
    if initializer:
        initializer(*initargs)
