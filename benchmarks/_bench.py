"""What the benchmarks share: arguments, what figures depend on, ways that take turns, processes of their own, JSON.

Other processes make any one run slower; ways that are compared therefore take turns, in another order each round, and
what is reported is the median over the rounds, of seconds or of ratios within a round.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from m3vit.pool import usable_cores

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as m3vit does; torch, imported late here, reads it

BUSY = 0.03  # cores that other processes may use on average during a round that counts
Figures = dict[str, Any]
Round = TypeVar("Round")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with a script's docstring as its help, and --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures here")
    return parser


def save(path: Path | None, figures: Any) -> None:
    """Write the figures as JSON, if --json was given."""
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def machine(device: str = "cpu") -> Figures:
    """Return what figures depend on, and print it on a line."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip(),
    }
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    return found


def child(words: Iterable[object], launcher: Sequence[str] = ()) -> Any:
    """Run this script once more, with other arguments, and return the JSON that it prints on its last line."""
    command = [sys.executable, *launcher, sys.argv[0], *map(str, words)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


# --- ways that take turns --------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """Return the seconds of a call."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def one_of_each(ways: dict[str, Callable[[], Round]], shuffle: random.Random) -> dict[str, Round]:
    """Return what each way returns, called in random order."""
    found = {name: ways[name]() for name in shuffle.sample(list(ways), len(ways))}
    return {name: found[name] for name in ways}


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each way."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def ratios(rounds: list[dict[str, float]], reference: str) -> dict[str, Figures]:
    """Return for each way the median of the rounds' ratios to the reference, their quartiles, and median ms."""
    result: dict[str, Figures] = {}
    for name, median in medians(rounds).items():
        each = [times[name] / times[reference] for times in rounds]
        low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        result[name] = {"ratio": statistics.median(each), "quartiles": [low, high], "ms": 1000 * median}
    return result


class Watch:
    """Measures how many cores other processes used on average while it was on (Linux)."""

    def __enter__(self) -> "Watch":
        self.start = time.perf_counter(), time.process_time(), _busy_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        wall, own, busy = self.start
        self.seconds = time.perf_counter() - wall
        self.others = max(0.0, (_busy_seconds() - busy) - (time.process_time() - own)) / self.seconds


def _busy_seconds() -> float:
    """Return the CPU seconds that all processes have used since boot."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def undisturbed(measure: Callable[[], Round], rounds: int, patience: int) -> tuple[list[Round], float]:
    """Return `rounds` results of `measure`, and the most cores that others used during one of them.

    Disturbed rounds are repeated, up to `patience` times as many in all; then the least disturbed ones are returned.
    """
    found: list[tuple[float, Round]] = []
    for _ in range(rounds * patience):
        with Watch() as watch:
            result = measure()
        found.append((watch.others, result))
        if sum(others <= BUSY for others, _ in found) == rounds:
            break
    chosen = sorted(found, key=lambda pair: pair[0])[:rounds]
    return [result for _, result in chosen], chosen[-1][0]
