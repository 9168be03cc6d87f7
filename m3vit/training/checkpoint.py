"""The run folder: what training leaves behind and every later step reads (DESIGN.md, section 5).

config.yaml          the resolved configuration
model.safetensors    weights (their moving average, with train.ema); model.json, written after it: architecture, tasks,
                     classes, normalisation, git commit, digest of the weights
best/                a run folder with the weights of the best evaluation (train.best)
last/state.pt        what resuming needs, replaced atomically
metrics.jsonl        one line per logged step or evaluation
tensorboard/         the same, as TensorBoard events; nothing reads it back

All that is read back carries a digest (m3vit/digests.py), which is checked when it is read.
"""

import fcntl
import os
import subprocess
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from m3vit import __version__
from m3vit.digests import check_sealed, read_sealed_lines, seal, sealed_line, write_sealed_json
from m3vit.errors import InputError, first_line
from m3vit.files import atomic_path, is_empty, sha256_file
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.saved import INFO, WEIGHTS, read_saved
from m3vit.normalisation import recorded
from m3vit.pointers import check_content
from m3vit.training.config import Config, differences, plain, read_run_config

# Keys that may change between a run and its continuation: they do not change what is computed.
FREE_TO_CHANGE = (
    "data.root",
    "data.workers",
    "data.cache",
    "data.on_error",
    "train.log_steps",
    "train.checkpoint_activations",
    "train.checkpoint_steps",
    "train.strategy",
)


@dataclass
class Run:
    """A run folder, opened: its configuration and its model in evaluation mode on the CPU."""

    folder: Path
    config: Config
    model: MultiTaskModel
    info: dict[str, Any]  # model.json


def prepare_folder(config: Config, out: Path, resume: bool) -> None:
    """Make the run folder and its config.yaml, or raise InputError rather than touch another run."""
    config.check()
    if resume and (out / "config.yaml").exists():
        changed = differences(read_run_config(out), config, FREE_TO_CHANGE)
        if changed:
            # The schedule too depends on the number of epochs: more of them would have been other ones from the start.
            raise InputError(
                f"{out} was started with other values of {', '.join(changed)}: resume with the same ones, or train "
                "into another folder"
            )
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder")
    if not is_empty(out):
        hint = "it is not a run folder" if resume else "continue it with m3vit train --resume, or choose another folder"
        raise InputError(f"{out} exists and is not empty: {hint}")
    out.mkdir(parents=True, exist_ok=True)
    write_config(config, out)


def as_started(config: Config, out: Path) -> Config:
    """Return the configuration of a run to resume: for model.normalisation auto, the numbers that it started with."""
    path = out / "config.yaml"
    if config.model.normalisation != "auto" or not path.exists():
        return config
    return replace(config, model=replace(config.model, normalisation=read_run_config(out).model.normalisation))


def lock_folder(out: Path, wait_s: float = 15) -> IO[str]:
    """Return a file that keeps others from training into `out` while it is open, or raise InputError.

    Killing torchrun leaves its processes alive: resumed beside them, two runs would write one folder. Waits a while,
    since the loader processes of a run that was killed take some seconds to notice.
    """
    file, deadline = open(out / "config.yaml"), time.monotonic() + wait_s
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


def git_commit() -> str | None:
    """Return the commit of the checkout this code runs from, "-dirty" if changed, or None outside a checkout of it."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # Installed into an environment inside somebody's own repository, this file is not tracked there.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40")


def save_model(folder: Path, model: MultiTaskModel, epoch: int, weights: dict[str, Tensor] | None = None) -> None:
    """Write model.safetensors and model.json, each atomically; `weights` are those of a sharded model, put together."""
    state = model.state_dict() if weights is None else weights
    with atomic_path(folder / WEIGHTS) as path:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
        digest = sha256_file(path)
    # Copied into exported packages: the name of a weights file, not where it lies on this disk.
    architecture = plain(asdict(replace(model.config, weights=Path(model.config.weights).name)))
    # Last, with the digest of the weights: a kill in between leaves what `load_run` refuses, not a mixture.
    write_sealed_json(
        folder / INFO,
        {
            "architecture": {key: value for key, value in architecture.items() if key != "normalisation"},
            "tasks": model.config.tasks,
            "classes": {task: names for task, names in model.config.labels.classes.items() if task in model.heads},
            "normalisation": model.normalisation.plain(),
            "epochs_trained": epoch,
            "m3vit": __version__,
            "commit": git_commit(),
            "weights_sha256": digest,
        },
    )


def load_run(folder: Path) -> Run:
    """Open a run folder, or raise InputError if it is not one, or has no weights, damaged, diverged or other ones."""
    config = read_run_config(folder)
    weights = folder / WEIGHTS
    check_content(weights, "the run's")
    if not weights.is_file():
        raise InputError(f"{folder} has no weights (model.safetensors): train it first, or resume it with --resume")
    # The weights are here: what they were first made from need not be.
    fresh: dict[str, Any] = {"pretrained": False, "weights": "", "init": "random"}
    state, info = read_saved(weights)
    fresh |= {"normalisation": recorded(info.get("normalisation"), f"normalisation of {folder / INFO}").plain()}
    config.model = replace(config.model, **fresh)
    try:
        architecture = ModelConfig(**info["architecture"] | fresh)
        check_same(folder, config.model, architecture)
        model = MultiTaskModel(architecture)
        model.load_state_dict(state)
    except (RuntimeError, TypeError, KeyError) as error:
        raise InputError(f"{weights} cannot be loaded ({first_line(error)}): the run folder is damaged") from None
    return Run(folder, config, model.eval(), info)


def check_same(folder: Path, configured: ModelConfig, saved: ModelConfig) -> None:
    """Raise InputError if config.yaml and model.json are of different models; what is "auto" may have been chosen."""
    found, expected = plain(asdict(saved)), plain(asdict(configured))
    different = [key for key, value in expected.items() if value not in ("auto", found[key])]
    if different:
        raise InputError(
            f"{folder}: config.yaml and {INFO} differ in model.{', model.'.join(different)}: put back the files of "
            "one run, or train it again"
        )


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
