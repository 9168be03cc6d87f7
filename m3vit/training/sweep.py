"""`m3vit sweep`: trainings of one recipe with other values of some keys, chosen by Optuna.

Each trial is `m3vit train` in a process of its own, into DIR/trial-0000, trial-0001, ... Optuna's study is in
DIR/study.log: a sweep that was stopped or killed goes on where it was, its unfinished trial too. The first trial is the
recipe as it is, if its values lie in the space.

What is optimised: a task's headline metric of the last evaluation while training (edges by the quick one), or the mean
over tasks of its gain over the first finished trial in percent, as delta_m is (m3vit/evaluation/gain.py).
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from m3vit.errors import InputError, short
from m3vit.files import require_empty, write_json
from m3vit.signals import StopSignals
from m3vit.tasks import TASKS
from m3vit.training.checkpoint import lock_folder, read_metrics
from m3vit.training.stopping import SIGNALS
from m3vit.training.validation import headline

MEAN = "mean"
STUDY, SETTINGS, RESULT, METRICS = "study.log", "settings.json", "sweep.json", "metrics.jsonl"
POLL_S = 0.5
FAILURES = 3  # in a row from the first trial on: then something is wrong with all of them
Say = Callable[[str], None]


@dataclass(frozen=True)
class Axis:
    """A key and what it may be: one of `choices` (as written), or a number from low to high."""

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def suggest(self, trial: optuna.Trial) -> str:
        """Return a trial's value as the command line takes it."""
        if self.choices:
            return str(trial.suggest_categorical(self.key, self.choices))
        if self.whole:
            return str(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def holds(self, value: Any) -> Any:
        """Return what of the axis a configuration's value is, None if it is none of it."""
        if self.choices:
            same = [choice for choice in self.choices if _same(choice, value)]
            return same[0] if same else None
        fits = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if not fits or not self.low <= value <= self.high:
            return None
        return value if self.whole else float(value)


def _same(choice: str, value: Any) -> bool:
    """Return whether a choice as it is written is a configuration's value."""
    import yaml

    try:
        return bool(yaml.safe_load(choice) == value) or choice == str(value)
    except yaml.YAMLError:
        return False


def read_axis(text: str) -> Axis:
    """Read KEY=LOW..HIGH, KEY=log:LOW..HIGH or KEY=A,B,C (whole numbers if both ends are), or raise InputError."""
    key, equals, values = text.partition("=")
    if not equals or not re.fullmatch(r"(model|data|train)(\.\w+)+", key):
        raise InputError(
            f"--space {text}: give KEY=VALUES, such as train.lr=log:1e-4..1e-2, model.top_k=1..4 or "
            "train.batch_size=4,8,16"
        )
    found = re.fullmatch(r"(log:)?([^.:,\s]*?[\d.]+(?:e-?\d+)?)\.\.([^,\s]+)", values)
    if not found:
        choices = _split(values)
        if len(choices) < 2 or not all(choices) or len(set(choices)) < len(choices):
            raise InputError(f"--space {text}: give two or more different values, or a range such as 1e-4..1e-2")
        return Axis(key, tuple(choices))
    log, low, high = found.groups()
    try:
        ends = float(low), float(high)
    except ValueError:
        raise InputError(f"--space {text}: {low} and {high} are not two numbers") from None
    whole = all(re.fullmatch(r"[+-]?\d+", end) for end in (low, high))
    if not ends[0] < ends[1]:
        raise InputError(f"--space {text}: the lower end {low} is not below the upper end {high}")
    if log and ends[0] <= 0:
        raise InputError(f"--space {text}: a logarithmic range begins above 0")
    return Axis(key, (), *ends, bool(log), whole)


def _split(text: str) -> list[str]:
    """Split at commas that are not inside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def value_of(config: Any, key: str) -> Any:
    """Return a configuration's value by its dotted key, None if it has none."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    return config


class Stopped(Exception):  # noqa: N818 (not an error)
    """A signal asked the sweep to stop; its trial can be taken up again."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__("stopped; go on with --resume")


@dataclass
class Sweep:
    """A sweep in its folder.

    words: of `m3vit train`, the recipe first. plugins: as given to --plugin. tasks: those that the trainings report.
    evaluations: of a training.
    """

    folder: Path
    words: Sequence[str]
    plugins: Sequence[str]
    axes: Sequence[Axis]
    tasks: Sequence[str]
    objective: str
    evaluations: int
    prune: bool
    say: Say

    def open(self, resume: bool, seed: int, first: dict[str, Any] | None) -> None:
        """Make the folder or open it again, or raise InputError if it is another sweep's. first: trial 0's values."""
        settings = {
            "words": self.train_words({}),
            "space": [vars(axis) | {"choices": list(axis.choices)} for axis in self.axes],
            "objective": self.objective,
        }
        path = self.folder / SETTINGS
        if path.exists():
            if not resume:
                raise InputError(f"{self.folder} holds a sweep: go on with --resume, or choose another folder")
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise InputError(f"{path} is damaged: start the sweep in another folder") from None
            if known != settings:
                other = ", ".join(name for name in settings if known.get(name) != settings[name])
                raise InputError(f"{self.folder} is of a sweep with another {other}: give the same, or another folder")
        else:
            require_empty(self.folder, "sweep", "give a new folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
        self.lock = lock_folder(self.folder, 1, SETTINGS)  # two sweeps would train one trial in one folder
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        higher = self.objective == MEAN or TASKS[self.objective].higher_is_better
        pruner = optuna.pruners.MedianPruner(n_startup_trials=3) if self.prune else optuna.pruners.NopPruner()
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(self.folder / STUDY))),
            study_name="sweep",
            load_if_exists=True,
            direction="maximize" if higher else "minimize",
            pruner=pruner,
        )
        # Gone on with, it draws others than it drew before.
        self.study.sampler = optuna.samplers.TPESampler(seed=seed + len(self.trials()))
        if first is not None:
            self.study.enqueue_trial(first, skip_if_exists=True)

    def close(self) -> None:
        """Let others go on with the sweep."""
        self.lock.close()

    def trials(self) -> list[FrozenTrial]:
        """Return all trials so far."""
        return self.study.get_trials(deepcopy=False)

    def run(self, count: int) -> None:
        """Train until `count` trials are at an end; raises `Stopped`, and InputError if the first ones all fail."""
        while True:
            ended = [trial for trial in self.trials() if trial.state.is_finished()]
            failed = [trial for trial in ended if trial.state == TrialState.FAIL]
            if len(failed) >= FAILURES and len(failed) == len(ended):
                raise InputError(
                    f"the first {len(failed)} trials failed, the last with: {failed[-1].user_attrs.get('failure', '?')}"
                )
            if len(ended) >= count:
                return
            running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
            trial = optuna.Trial(self.study, running[0]._trial_id) if running else self.study.ask()
            self.train(trial)
            write_json(self.folder / RESULT, self.result())

    def train(self, trial: optuna.Trial) -> None:
        """Run a trial to its end, and tell the study."""
        values = {axis.key: axis.suggest(trial) for axis in self.axes}
        out = self.folder / f"trial-{trial.number:04d}"
        command = [sys.executable, "-m", "m3vit.cli", "train", *self.train_words(values)]
        command += ["--out", str(out), "--resume"]
        self.say(f"trial {trial.number}: {', '.join(f'{key}={value}' for key, value in values.items())}")
        log = self.folder / f"{out.name}.log"
        with StopSignals(SIGNALS) as stop, open(log, "ab") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                pruned = self.watch(trial, child, out, stop)
            finally:
                if child.poll() is None:  # interrupted
                    child.kill()
                    child.wait()
        if stop.received:
            raise Stopped(stop.received)
        if pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            self.say(f"trial {trial.number}: ended early, worse than most at this point")
        elif child.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            failure = lines[-1] if lines else f"exit code {child.returncode}"
            trial.set_user_attr("failure", failure)
            self.study.tell(trial, state=TrialState.FAIL)
            self.say(f"trial {trial.number}: failed: {failure}")
        else:
            self.finish(trial, evaluations_of(out))

    def watch(self, trial: optuna.Trial, child: subprocess.Popen, out: Path, stop: StopSignals) -> bool:
        """Wait for a training, report its evaluations; return whether it was ended because others are better."""
        told = size = 0
        log = out / METRICS
        while child.poll() is None:
            time.sleep(POLL_S)
            if stop.received:
                child.terminate()
                child.wait()
                return False
            before, size = size, log.stat().st_size if log.exists() else 0
            if size == before:
                continue
            found = evaluations_of(out)
            for place in range(told, min(len(found), self.evaluations - 1)):  # the last one is the result
                value = self.figure(found[place])
                if value is not None and self.prune:
                    trial.report(value, place)
                    if trial.should_prune():
                        child.terminate()
                        child.wait()
                        return True
            told = len(found)
        return False

    def finish(self, trial: optuna.Trial, found: list[dict[str, Any]]) -> None:
        """Tell the study how good a trial is that was trained to its end."""
        if "baseline" not in self.study.user_attrs:
            self.study.set_user_attr("baseline", {task: found[-1].get(headline(task)) for task in self.tasks})
        value = self.figure(found[-1])
        metrics = {headline(task): found[-1].get(headline(task)) for task in self.tasks}
        trial.set_user_attr("metrics", metrics)
        if value is None:
            trial.set_user_attr("failure", "no image is labelled for what is optimised")
            self.study.tell(trial, state=TrialState.FAIL)
            return
        self.study.tell(trial, value)
        figures = ", ".join(f"{name} {figure:.3f}" for name, figure in metrics.items() if figure is not None)
        self.say(f"trial {trial.number}: {self.objective} {value:.3f} ({figures})")

    def figure(self, values: dict[str, Any]) -> float | None:
        """Return what an evaluation is worth; None if that cannot be said (yet)."""
        if self.objective != MEAN:
            return values.get(headline(self.objective))
        baseline = self.study.user_attrs.get("baseline", {})
        gains = []
        for task in self.tasks:
            value, before = values.get(headline(task)), baseline.get(task)
            if value is not None and before:
                gains.append((value - before) / before * (100 if TASKS[task].higher_is_better else -100))
        return sum(gains) / len(gains) if gains else None

    def result(self) -> dict[str, Any]:
        """Return all trials as JSON values, the best first, then those without a value."""
        rows = [
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                "value": trial.value if trial.state == TrialState.COMPLETE else None,
                "keys": trial.params,
                **{name: trial.user_attrs[name] for name in ("metrics", "failure") if name in trial.user_attrs},
            }
            for trial in self.trials()
        ]
        sign = -1 if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        rows.sort(key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0)))
        return {"objective": self.objective, "words": self.train_words({}), "trials": rows}

    def best_words(self) -> list[str]:
        """Return the words of `m3vit train` that make the best trial again, or raise InputError without one."""
        best = self.result()["trials"][0]
        if best["value"] is None:
            raise InputError(f"no trial in {self.folder} came to its end: see the .log files there")
        return self.train_words(best["keys"])

    def train_words(self, values: dict[str, Any]) -> list[str]:
        """Return the words of `m3vit train` with these values."""
        given = [word for plugin in self.plugins for word in ("--plugin", plugin)]
        return [*self.words, *(f"--{key}={value}" for key, value in values.items()), *given]


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    """Return the evaluations in a run's metrics.jsonl so far."""
    return [line for line in read_metrics(run) if line["kind"] == "val"]


def check_objective(objective: str, tasks: Sequence[str]) -> None:
    """Raise InputError if the trainings do not report what is to be optimised."""
    if objective != MEAN and objective not in tasks:
        raise InputError(f"--objective {short(objective)}: give mean, or a task of the model: {', '.join(tasks)}")
