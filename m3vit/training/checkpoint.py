"""What a training run writes and reads back into its run folder (m3vit.run_folder): lock, resume state, log.

All of it carries a digest (m3vit/digests.py), which is checked when it is read.
"""

import fcntl
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from m3vit.digests import check_sealed, read_sealed_json, read_sealed_lines, seal, sealed_line
from m3vit.errors import InputError, first_line
from m3vit.files import atomic_path, require_empty
from m3vit.models.saved import INFO
from m3vit.training.config import Config, differences, read_run_config

GO_ON = "continue it with m3vit train --resume, or choose another folder"
# Keys that may change between a run and its continuation: they do not change what is computed.
FREE_TO_CHANGE = (
    "data.root",
    "data.workers",
    "data.cache",
    "data.on_error",
    "train.log_steps",
    "train.loggers",
    "train.checkpoint_activations",
    "train.checkpoint_steps",
    "train.strategy",
)


def prepare_folder(config: Config, out: Path, resume: bool, *, more_epochs: bool = False) -> None:
    """Make the run folder and its config.yaml, or raise InputError rather than touch another run.

    `more_epochs`: a run to resume may be one of fewer epochs.
    """
    config.check()
    if resume and (out / "config.yaml").exists():
        free = (*FREE_TO_CHANGE, "train.epochs") if more_epochs else FREE_TO_CHANGE
        changed = differences(read_run_config(out), config, free)
        if changed:
            raise InputError(
                f"{out} was started with other values of {', '.join(changed)}: resume with the same ones, or train "
                "into another folder"
            )
        return
    require_empty(out, advice="it is not a run folder" if resume else GO_ON)
    out.mkdir(parents=True, exist_ok=True)
    write_config(config, out)


def as_started(config: Config, out: Path) -> Config:
    """Return the configuration of a run to resume: for model.normalisation auto, the numbers that it started with."""
    path = out / "config.yaml"
    if config.model.normalisation != "auto" or not path.exists():
        return config
    return replace(config, model=replace(config.model, normalisation=read_run_config(out).model.normalisation))


def started_as(out: Path) -> dict[str, Any]:
    """Return what a run's weights began as by its model.json, for checkpoints that do not have it."""
    path = out / INFO
    found = read_sealed_json(path, "part of a run folder").get("initialised") if path.is_file() else None
    return found or {"from": {}, "left_out": {}}


def lock_folder(out: Path, wait_s: float = 15, name: str = "config.yaml") -> IO[str]:
    """Return a file, `name` in `out`, that keeps others from training into `out` while it is open, or raise InputError.

    Killing torchrun leaves its processes alive: resumed beside them, two runs would write one folder. Waits a while,
    since the loader processes of a run that was killed take some seconds to notice.
    """
    file, deadline = open(out / name), time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise InputError(f"{out}: another process is training into it; wait for it or end it first") from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return file
        else:
            return file


def write_config(config: Config, folder: Path) -> None:
    """Write config.yaml, fully resolved."""
    with atomic_path(folder / "config.yaml") as path:
        path.write_text(config.to_yaml())
        seal(path)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace last/state.pt atomically."""
    with atomic_path(folder / "last" / "state.pt") as path:
        torch.save(state, path)
        seal(path)


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the resume state, or None if the run stopped before the first one was written."""
    path = folder / "last" / "state.pt"
    if not path.exists():
        return None
    advice = "put it back from a copy, or train again into another folder"
    check_sealed(path, advice)
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises many kinds for damaged files
        raise InputError(f"{path} cannot be loaded ({first_line(error)}): {advice}") from None
    if not isinstance(state, dict) or not state:
        raise InputError(f"{path} holds no checkpoint, it was emptied or replaced: {advice}")
    return state


class MetricsLog:
    """metrics.jsonl: appended line by line, each with its digest.

    On resume, lines later than the checkpoint are dropped: their steps are done, and written, once more. No other line
    is, and damaged ones are refused. `lines`: how many there are; a checkpoint keeps it.
    """

    def __init__(self, folder: Path, step: int, lines: int = 0) -> None:
        """Open the log for a run that goes on after `step`, whose checkpoint counted so many lines."""
        self.path = folder / "metrics.jsonl"
        found = _read_log(folder)
        kept = [text for text, line in found if line["step"] <= step]
        if len(kept) < lines:
            lost = f"{self.path} has {len(kept)} of the {lines} lines that it had at the checkpoint"
            warnings.warn(f"{lost}: what they said is gone, best/ is chosen without them", stacklevel=2)
        self.lines = len(kept)
        with atomic_path(self.path) as path:
            path.write_bytes(b"".join(text + b"\n" for text in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and hand it to the system, so that a kill loses at most the line being written."""
        with open(self.path, "a") as file:
            file.write(sealed_line(line))
            file.flush()
            os.fsync(file.fileno())
        self.lines += 1


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, [] without one; a half-written last line is left out.

    Raises InputError naming a line that is damaged.
    """
    return [line for _, line in _read_log(folder)]


def _read_log(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return each line of metrics.jsonl as bytes, without its end, and as a value; see `read_metrics`."""
    path = folder / "metrics.jsonl"
    advice = "mend it from a copy of the file, or delete this one line to go on without what it says"
    found, before, done = read_sealed_lines(path, advice), 0, set[tuple[str, int]]()
    for number, (_, line) in enumerate(found, 1):
        numbers = {key: line.get(key) for key in line.keys() - {"kind", "message", "protocol"} | {"step", "epoch"}}
        wrong = [key for key, value in numbers.items() if type(value) not in (int, float)]
        if wrong or not isinstance(line.get("kind"), str):
            raise InputError(f"line {number} of {path} has no {', '.join(sorted(wrong)) or 'kind'}: {advice}")
        # Steps only go up; of each step there is at most one line of training and one of evaluation.
        if line["step"] < before or (line["kind"] in ("train", "val") and (line["kind"], line["step"]) in done):
            raise InputError(f"line {number} of {path} is of step {line['step']} once more: {advice}")
        before = line["step"]
        done.add((line["kind"], line["step"]))
    return found


def check_lost(folder: Path, steps_per_epoch: int) -> None:
    """Raise InputError if the log of a run without last/state.pt says that one was written: it is not to start over.

    Warns if the run starts over because it was stopped before its first checkpoint.
    """
    lines = read_metrics(folder)
    path = folder / "last" / "state.pt"
    if any(line["kind"] == "val" or line["step"] > steps_per_epoch for line in lines):
        raise InputError(
            f"{path} is missing, though training went on to step {max(line['step'] for line in lines)}: put it back "
            "from a copy, or train again into another folder"
        )
    if lines:
        warnings.warn(f"{folder} was stopped before its first checkpoint: training starts over", stacklevel=2)
