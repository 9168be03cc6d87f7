"""The training loop: short enough to read. What one step does is in step.py, what a checkpoint holds below."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import torch

from m3vit.collectives import agree, gather, is_lost, leave_group, rank, total, world_size
from m3vit.data.loading import Batch, EpochBatches, TrainingSet, make_loader
from m3vit.data.opening import check_masks, open_split
from m3vit.errors import InputError, WriteError, first_line
from m3vit.evaluation.scoring import default_workers
from m3vit.files import writing
from m3vit.models.finite import not_finite
from m3vit.models.initialise import RANDOM, not_taken
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.order import carry_out
from m3vit.models.saved import current_names
from m3vit.run_folder import save_model
from m3vit.training.budgets import first_step
from m3vit.training.checkpoint import (
    MetricsLog,
    as_started,
    check_lost,
    load_state,
    lock_folder,
    prepare_folder,
    read_metrics,
    save_state,
    started_as,
    write_config,
)
from m3vit.training.config import Config
from m3vit.training.divergence import check_finite, check_weights
from m3vit.training.extending import KIND, check_finished, epochs_before, is_noted, words
from m3vit.training.launch import Fabric, launch, synchronise
from m3vit.training.loggers import Loggers, open_loggers
from m3vit.training.optim import learning_rate, make_average, make_optimizer
from m3vit.training.ordering import ordering, put_in_order
from m3vit.training.parts import ahead, freeze, frozen_epochs, table
from m3vit.training.sharding import (
    gathered,
    load_optimizer,
    load_weights,
    shard,
    share_buffers,
    unsharded,
)
from m3vit.training.starting import build, search
from m3vit.training.step import Stepper
from m3vit.training.stopping import SIGNALS, Stopped, stop_signals
from m3vit.training.validation import PROTOCOL, check_scored, is_best, validate
from m3vit.training.weighting import make_weighting

FORMAT = 2  # of last/state.pt

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what to show beside them


@dataclass
class LeftOut:
    """What was not trained on because it could not be read: messages of images, and of labels by task."""

    images: set[str] = field(default_factory=set)
    labels: dict[str, set[str]] = field(default_factory=dict)


def train(
    config: Config,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> LeftOut:
    """Train a model into the run folder `out`. A run killed at any moment resumes to the same weights.

    Started by torchrun, the processes train one model together; the first one writes the run folder, which all of them
    must see. `say` gets lines at the start: how images are normalised, what the weights begin as. Returns what of the
    training data could not be read and was left out (`data.on_error` skip). Raises `Stopped` if a signal asked for it.
    """
    config.check()
    fabric = launch(config.train)
    try:
        training = Training(fabric, config, out, resume, progress)
        if say and rank() == 0:
            if training.coverage:
                say(training.coverage)
            say(f"images are normalised with {training.model.normalisation}")
            if named := [name for name in dict.fromkeys(training.model.origins["from"].values()) if name != RANDOM]:
                say(f"weights begin as {' and '.join(named)}, the rest at random (model.json has the list)")
            for line in [*not_taken(training.model), *training.extended]:
                say(line)
            say(table(config.train, training.model))
            begun = config.model.pretrained or config.model.weights or config.model.started
            if begun and (patches := ahead(config.train, training.model)):
                say(patches)
        training.run()
    except (InputError, Stopped) as error:
        leave_group()
        if isinstance(error, WriteError):
            raise WriteError(f"{error}; then go on with --resume", error.everywhere) from None
        raise
    except RuntimeError as error:
        if world_size() > 1 and is_lost(error):
            raise InputError(
                f"another process of this training ended ({first_line(error)}): mend what its message says, then go on "
                "with --resume"
            ) from None
        raise
    leave_group()
    return training.left_out


class Training:
    """A run under way."""

    def __init__(self, fabric: Fabric, config: Config, out: Path, resume: bool, progress: Progress | None) -> None:
        self.fabric, self.out, self.progress = fabric, out, progress
        if resume:
            config = agree(lambda: as_started(config, out))
        settings, options = config.train, config.data
        splits = agree(
            lambda: [
                open_split(
                    options.layout,
                    options.root,
                    part,
                    config.model.tasks,
                    partial=options.on_error == "skip",
                    label_set=config.model.label_set,
                )
                for part in ("train", "val")
            ]
        )
        train_split, self.val_split = splits
        self.coverage = "; ".join(said for split in splits if (said := split.coverage()))
        if not resume and options.on_error == "stop":
            agree(lambda: None if rank() else check_masks(splits, default_workers()))
        agree(lambda: check_scored(config.model.tasks, config.model.label_set))
        both = sorted(set(train_split.ids) & set(self.val_split.ids))
        if both:
            raise InputError(
                f"{options.root} lists {len(both)} images in train and in val, such as {both[0]}: figures on val would "
                "be of images trained on; m3vit data check says more",
                everywhere=True,
            )
        if world_size() > len(self.val_split):
            raise InputError(f"{world_size()} processes for {len(self.val_split)} val images: start fewer", True)
        self.batches = agree(
            lambda: EpochBatches(len(train_split), settings.batch_size, settings.seed, rank(), world_size())
        )
        if settings.batch_size // world_size() < settings.accumulate:
            raise InputError(
                f"train.accumulate {settings.accumulate} is more than the {settings.batch_size // world_size()} images "
                "of each process in a batch",
                everywhere=True,
            )
        # A checkpoint has all weights: what they began as may be gone by now.
        goes_on = bool(gather(resume and (out / "last" / "state.pt").exists())[0])
        where = None if resume else out
        found = None if goes_on else search(config, train_split, where, fabric.device, progress)
        self.model = agree(lambda: build(config, bare=goes_on, coefficients=found))
        self.steps_per_epoch = len(self.batches)
        self.steps = settings.epochs * self.steps_per_epoch
        self.train_split = train_split
        if not goes_on and not first_step(settings, self.steps):
            carry_out(ordering(config, self.model.to(fabric.device), train_split))
        self.config = replace(config, model=self.model.config)  # with the numbers of its normalisation
        self.lock = agree(lambda: self.claim(resume))
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if rank():  # the first process goes on with the random state that the weights were drawn from, as if alone
            torch.manual_seed(settings.seed + (rank() << 32))
        self.model.backbone.checkpoint_activations = settings.checkpoint_activations

        synchronise(self.model, fabric)
        self.frozen = frozen_epochs(settings, self.model)
        freeze(self.model, self.frozen, settings.epochs)  # what is never trained; the rest DDP must know of
        self.weighting = make_weighting(config, fabric.device)
        mesh = getattr(fabric.strategy, "device_mesh", None)  # of fsdp
        self.average = make_average(settings, self.model, sharded=mesh is not None)
        self.wrapped = fabric.setup(self.model)
        if self.average is not None:
            self.average.to(fabric.device)
            if mesh is not None:
                shard(self.trained, mesh)
        optimizer = make_optimizer(settings, self.model, self.weighting.parameters())
        self.optimizer: Any = fabric.setup_optimizers(optimizer)
        self.stepper = Stepper(fabric, config, self.wrapped, self.optimizer, self.weighting, self.steps)

        size = (config.model.image_size[0], config.model.image_size[1])
        dataset = TrainingSet(
            train_split,
            size,
            settings.seed,
            self.model.normalisation,
            options.pipeline,
            options.flip,
            options.colour,
            options.cache,
        )
        self.loader = make_loader(dataset, self.batches, options.workers, pin_memory=fabric.device.type == "cuda")
        self.step = 0
        self.clock = (time.perf_counter(), 0)  # when the speed was last drawn, and at which step
        self.left_out = LeftOut()
        self.stop = stop_signals()

        state = agree(lambda: load_state(out)) if resume else None
        if state:
            self.restore(state)
        before = gather(epochs_before(self.config, out) if resume and not rank() else 0)[0]
        self.extended = [words(self.config, before, self.steps_per_epoch, self.stepper.start)] if before else []
        # Of the first process, which alone writes.
        self.log = cast(MetricsLog, agree(lambda: None if rank() else self.open_log(state)))
        self.loggers = cast(Loggers, agree(lambda: None if rank() else open_loggers(config, out, self.step + 1)))
        if state and state["processes"] != world_size():
            values = {"processes": world_size(), "processes_before": state["processes"]}
            self.record("resumed", values, "on another number of processes: the same up to rounding and random draws")
        if before:
            check_finished(out, before, self.step, self.steps_per_epoch)
            self.lengthen(before)

    def claim(self, resume: bool) -> IO[str] | None:
        """Make the run folder, in the first process, and keep others out of it until this one ends."""
        if rank():
            return None
        prepare_folder(self.config, self.out, resume, more_epochs=bool(resume and epochs_before(self.config, self.out)))
        return lock_folder(self.out)

    def lengthen(self, before: int) -> None:
        """Note that the run, finished `before`, is one of more epochs: a line in its log, then its config.yaml."""
        if not gather(rank() == 0 and is_noted(self.out, self.config.train.epochs))[0]:
            epochs = {"epochs": float(self.config.train.epochs), "epochs_before": float(before)}
            self.record(KIND, epochs, self.extended[0])

        def write() -> IO[str] | None:
            if rank():
                return None
            write_config(self.config, self.out)
            return lock_folder(self.out)  # of the new file; who waits for the old one still waits

        self.locks = (self.lock, agree(write))

    def open_log(self, state: dict[str, Any] | None) -> MetricsLog:
        """Return the log to go on with, or raise InputError if it is damaged or knows of a checkpoint that is gone."""
        if state is None:
            check_lost(self.out, self.steps_per_epoch)
            return MetricsLog(self.out, 0)
        return MetricsLog(self.out, self.step, state.get("log_lines", 0))

    @property
    def trained(self) -> MultiTaskModel:
        """The model that is evaluated and saved: the moving average, if there is one."""
        return self.model if self.average is None else cast(MultiTaskModel, self.average.module)

    def run(self) -> None:
        """Train to the end, or until a signal."""
        with self.stop:
            while True:
                if self.step and self.step % self.steps_per_epoch == 0:
                    self.evaluate(self.step // self.steps_per_epoch)
                if self.step >= self.steps:
                    break
                self.run_epoch()
        if rank() == 0:
            self.loggers.close()

    def run_epoch(self) -> None:
        """Train to the end of the epoch, and save."""
        settings = self.config.train
        self.batches.epoch, self.batches.start = divmod(self.step, self.steps_per_epoch)
        self.wrapped.train()
        freeze(self.model, self.frozen, self.batches.epoch)
        trained = 0
        self.clock = (time.perf_counter(), self.step)
        for batch in self.loader:
            images = self.exchange(batch)
            if self.step and self.step == self.stepper.start:
                self.order()
            if images:
                self.take_step(batch)
                trained += 1
            else:
                self.step += 1  # a step all the same: the schedule and a resumed run count on it
            if settings.checkpoint_steps and self.step % settings.checkpoint_steps == 0:
                if self.step % self.steps_per_epoch:
                    self.save()
        if not trained and not self.batches.start:
            first = sorted(self.left_out.images)[0] if self.left_out.images else "no batch"
            raise InputError(f"not one image of the epoch could be read ({first}): mend the data", everywhere=True)
        self.weighting.end_epoch()
        # The resume state last: where it says an epoch is done, its weights are on disk.
        check_weights(self.model, self.step, self.out)
        self.save_trained(self.out, self.step // self.steps_per_epoch)
        self.save()

    def order(self) -> None:
        """Put hidden units and channels in order, before the first step with smaller budgets."""
        try:
            with unsharded(self.model):
                moves = ordering(self.config, self.model, self.train_split)
        except InputError as error:  # an image that cannot be read
            raise InputError(f"{error}; {self.kept()}", everywhere=True) from None
        # Fabric's wrapper keeps the state that its optimiser had before a checkpoint was loaded.
        put_in_order(moves, self.model, None if self.average is None else self.trained, self.optimizer.optimizer)

    def take_step(self, batch: Batch) -> None:
        """Do one step of the optimiser."""
        settings = self.config.train
        images, labels = self.fabric.to_device((batch.images, batch.labels))
        lr = learning_rate(settings, self.step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        # What is checked is the same in every process, and so they stop together.
        values = self.stepper.gradients(self.step, images, labels)
        check_finite(values, self.step, self.out)
        norm = self.stepper.clip()
        if settings.precision != "16-mixed":  # whose scaler tries large scales, and skips those steps itself
            check_finite({"gradient norm": norm}, self.step, self.out)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        if self.progress:
            self.progress(self.step, self.steps, f"loss {values['loss']:.3f}")
        if self.step % settings.log_steps == 0 or self.step == self.steps:
            self.record("train", {"lr": lr, **values})
            self.chart(norm)

    def exchange(self, batch: Batch) -> int:
        """Return how many images all processes have for this step; stop if one of them was asked to, or must."""
        signals = [int(self.stop.received == kind) for kind in SIGNALS]
        images = 0 if batch.images is None else len(batch.images)
        mine = [*signals, int(bool(batch.failure)), len(batch.errors) + len(batch.unlabelled), images]
        *received, failures, errors, images = total(torch.tensor(mine)).tolist()
        for kind, count in zip(SIGNALS, received, strict=True):
            if count:
                self.save()
                raise Stopped(kind, self.step)
        if failures:
            cause = next(text for text in gather(batch.failure) if text)
            raise InputError(f"{cause}; {self.kept()}", everywhere=True)
        if errors:
            self.leave_out(gather((batch.errors, list(batch.unlabelled))))
        return int(images)

    def leave_out(self, found: list[tuple[list[str], list[tuple[str, str]]]]) -> None:
        """Note what could not be read, of all processes, or stop."""
        for message in [text for texts, _ in found for text in texts]:
            if self.config.data.on_error == "stop":
                raise InputError(
                    f"{message}, then go on with --resume; or train on what can be read with --data.on_error skip",
                    everywhere=True,
                )
            if message not in self.left_out.images:
                self.left_out.images.add(message)
                self.record("unreadable", {"count": len(self.left_out.images)}, message)
        for task, message in [pair for _, pairs in found for pair in pairs]:
            known = self.left_out.labels.setdefault(task, set())
            if message not in known:
                known.add(message)
                self.record("unlabelled", {task: len(known)}, message)

    def kept(self) -> str:
        """Save what there is, if it can be, and say how to go on."""
        try:
            self.save()
        except InputError as error:
            return f"and {error}"
        return f"everything up to step {self.step} is kept: go on with --resume"

    def evaluate(self, epoch: int) -> None:
        """Evaluate where it is due and not done yet, and keep the weights if they are the best."""
        due = self.config.train.eval_epochs and epoch % self.config.train.eval_epochs == 0
        lines = agree(lambda: [] if rank() else [line for line in read_metrics(self.out) if line["kind"] == "val"])
        lines = gather(lines)[0]
        if any(line["step"] == self.step for line in lines) or not (due or self.step == self.steps):
            return

        def progress(done: int, of: int) -> None:
            if self.stop.received:  # the checkpoint of this step is written already
                raise Stopped(self.stop.received, self.step)
            if self.progress:
                self.progress(self.step, self.steps, f"evaluating {done}/{of}")

        share_buffers(self.trained)
        with unsharded(self.trained):
            values = validate(self.val_split, self.trained, self.config.data.on_error, progress)
        # best/ of a run for budgets is one that they can be used of: trained for them by then.
        rivals, begun = [line for line in lines if line["step"] > self.stepper.start], self.step > self.stepper.start
        if begun and is_best([*rivals, values], self.config.model.tasks, self.config.train.best):
            # A run folder too. Before the line in the log: a run killed in between evaluates again.
            self.save_trained(self.out / "best", epoch, self.config)
        self.record("val", values)

    def record(self, kind: str, values: dict[str, float], message: str | None = None) -> None:
        """Write a line of metrics.jsonl, and its values for `train.loggers`."""
        words = {"message": message} if message else {}
        words |= {"protocol": PROTOCOL} if kind == "val" else {}
        line = {"kind": kind, "step": self.step, "epoch": self.step / self.steps_per_epoch, **values, **words}

        def write() -> None:
            if rank():
                return
            with writing(self.log.path, "its earlier lines are kept"):
                self.log.write(line)
            self.loggers.write({f"{kind}/{name}": value for name, value in values.items()}, self.step)

        agree(write)

    def chart(self, gradient_norm: float) -> None:
        """Log what differs from machine to machine, and so has no place in metrics.jsonl."""
        (start, step), now = self.clock, time.perf_counter()
        self.clock = (now, self.step)
        images = (self.step - step) * self.config.train.batch_size
        values = {"train/gradient_norm": gradient_norm, "speed/images_per_s": images / (now - start)}
        if self.fabric.device.type == "cuda":
            values["speed/peak_gib"] = torch.cuda.max_memory_allocated(self.fabric.device) / 2**30
        agree(lambda: None if rank() else self.loggers.write(values, self.step))

    def save_trained(self, folder: Path, epoch: int, config: Config | None = None) -> None:
        """Write the model that is evaluated, as a run folder with `config`; all call this, the first process writes."""
        weights = gathered(self.trained.state_dict())

        def write() -> None:
            if rank() == 0 and config:
                write_config(config, folder)
            if rank() == 0:
                save_model(folder, self.trained, epoch, weights, budgets_begun=self.step > self.stepper.start)

        agree(write)

    def save(self) -> None:
        """Write what resuming needs: the raw weights, the moving average, the random state of every process."""
        check_weights(self.model, self.step, self.out)
        cuda = self.fabric.device.type == "cuda"
        mine = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(self.fabric.device) if cuda else None}
        random_states = gather(mine)
        state = {
            "format": FORMAT,
            "step": self.step,
            "processes": world_size(),
            "model": gathered(self.model.state_dict()),
            "optimizer": gathered(self.optimizer.state_dict()),
            "weighting": self.weighting.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # the loss scale of 16-mixed
            "average": None if self.average is None else gathered(self.average.state_dict()),
            "random": random_states,
            "origins": self.model.origins,
            "log_lines": None if rank() else self.log.lines,
            "budgets_from": self.stepper.start,
        }
        agree(lambda: None if rank() else save_state(self.out, state))

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `save` wrote, or raise InputError if it is of another version or model, or diverged."""
        path = self.out / "last" / "state.pt"
        if state.get("format") != FORMAT:
            raise InputError(f"{path} is of another version: train again from the start", True)
        try:
            self.load(state)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InputError(
                f"{path} does not fit this run ({first_line(error)}): put back its own, or train again into another "
                "folder",
                everywhere=True,
            ) from None
        if broken := not_finite(state["model"]) or not_finite(state["average"] or {}):
            raise InputError(
                f"{path} holds {broken}: put back an earlier one, or train again into another folder with a lower "
                "--train.lr or with --train.grad_clip",
                everywhere=True,
            )

    def load(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint. A process that was not there then keeps the random state of its seed."""
        load_weights(self.model, current_names(state["model"]))
        load_optimizer(self.optimizer, state["optimizer"])  # after setup: it takes its tensors to the device
        self.model.origins = state.get("origins") or started_as(self.out)
        self.weighting.load_state_dict(state["weighting"])
        if state.get("precision"):
            self.fabric.strategy.precision.load_state_dict(state["precision"])
        if self.average is not None:
            load_weights(self.average, current_names(state["average"]))
        if rank() < len(state["random"]):
            mine = state["random"][rank()]
            torch.set_rng_state(mine["cpu"])
            if mine["cuda"] is not None and self.fabric.device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda"], self.fabric.device)
        self.step = state["step"]
        start = state.get("budgets_from", 0)
        if self.step > start:  # begun: of a run of more epochs, too
            self.stepper.start = start
        if not 0 < self.step <= self.steps or not state["processes"] > 0:
            raise ValueError(f"step {self.step} of {self.steps}")
