"""Where the values of metrics.jsonl go as well: TensorBoard, Weights & Biases, MLflow (`train.loggers`).

The latter two through Lightning's loggers, with the settings that their own variables have (WANDB_MODE=offline,
WANDB_PROJECT, MLFLOW_TRACKING_URI, ...). A resumed run goes on in the same run of theirs. What of them fails while
training is said once and does not end it: metrics.jsonl has everything.
"""

import importlib
import json
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from m3vit.errors import InputError, first_line
from m3vit.files import write_json
from m3vit.training.board import Board
from m3vit.training.config import Config, plain

PROJECT = "m3vit"
IDS = "loggers.json"  # in the run folder: the ids of the run's other records


class Logger(Protocol):
    """What values are written to."""

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Remote:
    """One of Lightning's loggers; a failure is said, and nothing is written to it any more."""

    def __init__(self, name: str, logger: Any) -> None:
        self.name, self.logger = name, logger

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step."""
        self._try(lambda: self.logger.log_metrics(dict(values), step=step))

    def close(self) -> None:
        """Send what is left."""
        self._try(lambda: self.logger.finalize("success"))
        if self.name == "wandb" and self.logger is not None:
            self._try(lambda: self.logger.experiment.finish())

    def _try(self, call: Callable[[], Any]) -> None:
        if self.logger is None:
            return
        try:
            call()
        except Exception as error:  # of a server, a network, a disk: any
            self.logger = None
            words = f"{self.name} gets no more values ({first_line(error)})"
            warnings.warn(f"{words}: training goes on, metrics.jsonl has them", stacklevel=2)


class Loggers:
    """Several loggers as one."""

    def __init__(self, loggers: list[Logger]) -> None:
        self.loggers = loggers

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of a step to each; raises WriteError if the run folder's disk is full."""
        for logger in self.loggers:
            logger.write(values, step)

    def close(self) -> None:
        """Close all."""
        for logger in self.loggers:
            logger.close()


def open_loggers(config: Config, out: Path, first_step: int) -> Loggers:
    """Open those of `train.loggers`, to go on from a step; raise InputError for one that cannot be opened."""
    ids = _read_ids(out / IDS)
    found: list[Logger] = []
    for name in config.train.loggers:
        if name == "tensorboard":
            found.append(Board(out / "tensorboard", first_step))
            continue
        importlib.import_module(name)  # what is missing is named by the command line
        try:
            logger = MAKERS[name](out, ids.setdefault(name, uuid.uuid4().hex[:16] if name == "wandb" else ""))
            logger.log_hyperparams(_flat(plain(asdict(config))))
        except ModuleNotFoundError:
            raise
        except Exception as error:  # of a server, an account, a network: any
            raise InputError(f"train.loggers {name}: it cannot be opened ({first_line(error)})") from None
        ids[name] = str(logger.version)
        found.append(Remote(name, logger))
    if ids:
        write_json(out / IDS, ids)
    return Loggers(found)


def _read_ids(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        found = {}  # a new record then
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _wandb(out: Path, run: str) -> Any:
    from pytorch_lightning.loggers import WandbLogger

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    logger = WandbLogger(name=out.resolve().name, save_dir=out, version=run, project=project, resume="allow")
    _ = logger.experiment  # now, so that what is wrong is said now
    return logger


def _mlflow(out: Path, run: str) -> Any:
    from pytorch_lightning.loggers import MLFlowLogger

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table of a new database
    where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(out / 'mlflow.db').resolve()}"
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    return MLFlowLogger(experiment, run_name=out.resolve().name, tracking_uri=where, run_id=run or None)


MAKERS: dict[str, Callable[[Path, str], Any]] = {"wandb": _wandb, "mlflow": _mlflow}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration as {"train.lr": ...}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + str(name)] = value
    return found
