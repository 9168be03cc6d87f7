"""Starts the command line in one process or in several, as torchrun does, without waiting for torch to be imported."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

# A server that has imported everything forks the processes. It runs nothing itself: OpenMP's threads do not survive.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.preloaded", "m3vit.training.loop"])


def command(words: list[str], output: Path, variables: dict[str, str]) -> None:
    """Be one process."""
    from m3vit.cli import main

    os.environ.update(variables)
    # As in a process that a user starts: else each of its processes that load data would wait for a server of its own.
    multiprocessing.set_start_method(None, force=True)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(words))


def environments(processes: int) -> list[dict[str, str]]:
    """Return the environment variables that torchrun gives each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(processes):
        variables: dict[str, object] = {"OMP_NUM_THREADS": 1}
        if processes > 1:
            variables |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            variables |= {
                "GROUP_RANK": 0,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_RUN_ID": "test",
            }
        found.append({name: str(value) for name, value in variables.items()})
    return found


def run_each(function: Callable[..., None], *arguments: Sequence[object], timeout_s: float = 60) -> None:
    """Run a function in a process for each of the arguments' entries, at once, and see each to its good end."""
    processes = [CONTEXT.Process(target=function, args=one) for one in zip(*arguments, strict=True)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)


class Run:
    """Processes under way; `text` is what they printed."""

    def __init__(self, words: list[object], folder: Path, processes: int = 1) -> None:
        self.outputs = [folder / f"output-{time.monotonic_ns()}-{rank}.txt" for rank in range(processes)]
        self.processes: list[BaseProcess] = []
        for output, variables in zip(self.outputs, environments(processes), strict=True):
            self.processes.append(CONTEXT.Process(target=command, args=([str(w) for w in words], output, variables)))
            self.processes[-1].start()

    @property
    def text(self) -> str:
        return "".join(path.read_text() for path in self.outputs if path.exists())

    def wait(self, timeout_s: float = 120) -> list[int | None]:
        """Return the exit codes; processes that take longer are killed."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process.pid for process in self.processes if process.exitcode is None]
        self.kill()
        assert not late, f"processes {late} did not end: {self.text}"
        return [process.exitcode for process in self.processes]

    def wait_for_lines(self, metrics: Path, lines: int, timeout_s: float = 120) -> None:
        """Return when metrics.jsonl has so many lines, or the processes have ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and any(process.is_alive() for process in self.processes):
            if metrics.exists() and len(metrics.read_text().splitlines()) >= lines:
                return
            time.sleep(0.005)

    def signal(self, kind: signal.Signals) -> None:
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, kind)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()


def run(words: list[object], folder: Path, processes: int = 1) -> str:
    """Run the command line to its successful end and return what it printed."""
    started = Run(words, folder, processes)
    codes = started.wait()
    assert codes == [0] * processes, started.text
    return started.text
