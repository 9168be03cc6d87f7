"""The run folder: what training leaves behind and every later step reads (DESIGN.md, section 5).

config.yaml          the resolved configuration
model.safetensors    weights (their moving average, with train.ema); model.json: architecture, tasks, classes,
                     normalisation, git commit
best/                a run folder with the weights of the best evaluation (train.best)
last/state.pt        what resuming needs, replaced atomically
metrics.jsonl        one line per logged step or evaluation
tensorboard/         the same, as TensorBoard events
"""

import fcntl
import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3vit import __version__
from m3vit.errors import InputError
from m3vit.files import atomic_path, is_empty, read_json, sha256_file, write_json
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.normalisation import recorded
from m3vit.pointers import check_content
from m3vit.training.config import Config, differences, plain, read_config

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
    info: dict[str, Any]  # model.json, and the sha256 of the weights


def prepare_folder(config: Config, out: Path, resume: bool) -> None:
    """Make the run folder and its config.yaml, or raise InputError rather than touch another run."""
    config.check()
    if resume and (out / "config.yaml").exists():
        changed = differences(read_config(out / "config.yaml"), config, FREE_TO_CHANGE)
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
        hint = "it is not a run folder" if resume else "continue it with --resume, or choose another folder"
        raise InputError(f"{out} exists and is not empty: {hint}")
    out.mkdir(parents=True, exist_ok=True)
    write_config(config, out)


def as_started(config: Config, out: Path) -> Config:
    """Return the configuration of a run to resume: for model.normalisation auto, the numbers that it started with."""
    path = out / "config.yaml"
    if config.model.normalisation != "auto" or not path.exists():
        return config
    return replace(config, model=replace(config.model, normalisation=read_config(path).model.normalisation))


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
    with atomic_path(folder / "model.safetensors") as path:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
    # Copied into exported packages: the name of a weights file, not where it lies on this disk.
    architecture = plain(asdict(replace(model.config, weights=Path(model.config.weights).name)))
    write_json(
        folder / "model.json",
        {
            "architecture": {key: value for key, value in architecture.items() if key != "normalisation"},
            "tasks": model.config.tasks,
            "classes": {task: names for task, names in model.config.labels.classes.items() if task in model.heads},
            "normalisation": model.normalisation.plain(),
            "epochs_trained": epoch,
            "m3vit": __version__,
            "commit": git_commit(),
        },
    )


def load_run(folder: Path) -> Run:
    """Open a run folder, or raise InputError if it is not one, has no weights, or they do not fit."""
    config = read_config(folder / "config.yaml")
    weights = folder / "model.safetensors"
    check_content(weights, "the run's")
    if not weights.is_file():
        raise InputError(f"{folder} has no weights (model.safetensors): train it first, or resume it with --resume")
    info = read_json(folder / "model.json", "part of a run folder, beside model.safetensors")
    # The weights are here: what they were first made from need not be.
    fresh: dict[str, Any] = {"pretrained": False, "weights": "", "init": "random"}
    fresh |= {"normalisation": recorded(info.get("normalisation"), f"normalisation of {folder / 'model.json'}").plain()}
    config.model = replace(config.model, **fresh)
    try:
        state = load_file(weights)
        model = MultiTaskModel(ModelConfig(**info["architecture"] | fresh))
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, TypeError, KeyError) as error:
        raise InputError(f"{weights} cannot be loaded ({first_line(error)}): the run folder is damaged") from None
    return Run(folder, config, model.eval(), info | {"weights_sha256": sha256_file(weights)})


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Replace last/state.pt atomically."""
    with atomic_path(folder / "last" / "state.pt") as path:
        torch.save(state, path)


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the resume state, or None if the run stopped before the first one was written."""
    path = folder / "last" / "state.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises many kinds for damaged files
        raise InputError(f"{path} cannot be loaded ({first_line(error)}): delete it to start over") from None


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, or its name if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class MetricsLog:
    """metrics.jsonl: appended line by line; on resume, lines later than the checkpoint are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        with atomic_path(self.path) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and hand it to the system, so that a kill loses at most the line being written."""
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; a half-written last line is left out."""
    path = folder / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
