"""The run folder: what training leaves behind and every later step reads.

config.yaml          the resolved configuration
model.safetensors    weights (their moving average, with train.ema); model.json, written after it: architecture, tasks,
                     classes, label set, normalisation, what the weights began as, git commit, digest of the weights
best/                a run folder with the weights of the best evaluation (train.best)
last/state.pt        what resuming needs, replaced atomically (m3vit.training.checkpoint)
metrics.jsonl        one line per logged step or evaluation (m3vit.training.checkpoint)
tensorboard/         the same, as TensorBoard events; nothing reads it back

All that is read back carries a digest (m3vit/digests.py), which is checked when it is read.
"""

import subprocess
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from m3vit import __version__, plugins
from m3vit.digests import write_sealed_json
from m3vit.errors import InputError, first_line
from m3vit.files import atomic_path, sha256_file
from m3vit.label_sets import declare, describe
from m3vit.models.config import ModelConfig
from m3vit.models.initialise import initialise, of_run
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.saved import INFO, WEIGHTS, read_saved
from m3vit.normalisation import recorded
from m3vit.pointers import check_content
from m3vit.training.config import Config, plain, read_run_config


@dataclass
class Run:
    """A run folder, opened: its configuration and its model in evaluation mode on the CPU."""

    folder: Path
    config: Config
    model: MultiTaskModel
    info: dict[str, Any]  # model.json


# What safetensors (0.8) writes before it renames it: a process that was killed meanwhile leaves it behind.
SAFETENSORS_OWN = ".tmp" + 6 * "[0-9A-Za-z]"


def git_commit() -> str | None:
    """Return the commit of the checkout this code runs from, "-dirty" if changed, or None outside a checkout of it."""
    try:
        return _commit()
    except (OSError, subprocess.TimeoutExpired):
        return None


@cache  # of the code that this process runs, whatever is changed meanwhile
def _commit() -> str | None:
    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    # Installed into an environment inside somebody's own repository, this file is not tracked there.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40")


def save_model(
    folder: Path,
    model: MultiTaskModel,
    epoch: int,
    weights: dict[str, Tensor] | None = None,
    budgets_begun: bool = True,
) -> None:
    """Write model.safetensors and model.json, each atomically; `weights` are those of a sharded model, put together.

    `budgets_begun`: False of a training for budgets that has had no step for smaller ones yet.
    """
    state, tasks = model.state_dict() if weights is None else weights, model.config.tasks
    for leftover in folder.glob(SAFETENSORS_OWN):
        leftover.unlink(missing_ok=True)
    with atomic_path(folder / WEIGHTS) as path:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path)
        digest = sha256_file(path)
    # Copied into exported packages: the names of weights, not where they lie on this disk.
    architecture = plain(asdict(model.config.portable()))
    # Last, with the digest of the weights: a kill in between leaves what `load_run` refuses, not a mixture.
    write_sealed_json(
        folder / INFO,
        {
            "architecture": {key: value for key, value in architecture.items() if key != "normalisation"},
            "tasks": tasks,
            "classes": {task: names for task, names in model.config.labels.classes.items() if task in tasks},
            "labels": describe(model.config.label_set),
            "normalisation": model.normalisation.plain(),
            "initialised": model.origins,
            "epochs_trained": epoch,
            **({} if budgets_begun else {"budgets_begun": False}),
            "m3vit": __version__,
            "commit": git_commit(),
            "weights_sha256": digest,
        },
    )


def load_run(folder: Path) -> Run:
    """Open a run folder, or raise InputError if it is not one, or has no weights, damaged, diverged or other ones."""
    config = read_run_config(folder)
    plugins.recall(config.plugins, str(folder))
    weights = folder / WEIGHTS
    check_content(weights, "the run's")
    if not weights.is_file():
        raise InputError(f"{folder} has no weights (model.safetensors): train it first, or resume it with --resume")
    state, info = read_saved(weights)
    fresh: dict[str, Any] = {
        "normalisation": recorded(info.get("normalisation"), f"normalisation of {folder / INFO}").plain()
    }
    if "labels" in info:  # not of runs from before they described themselves: they have the names of a table's
        fresh["label_set"] = declare(info["labels"], str(folder / INFO), config.model.tasks)
    config.model = replace(config.model, **fresh).portable()
    try:
        architecture = ModelConfig(**info["architecture"] | fresh)
        check_same(folder, config.model, architecture)
        model = MultiTaskModel(architecture)
        initialise(model, [of_run(str(folder), state)])
        if missing := {"epochs_trained", "commit"} - info.keys():  # evaluations and reports name them
            raise KeyError(f"{INFO} lacks {' and '.join(sorted(missing))}")
    except (RuntimeError, TypeError, KeyError) as error:
        raise InputError(f"{weights} cannot be loaded ({first_line(error)}): the run folder is damaged") from None
    model.origins = info.get("initialised", {})
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
