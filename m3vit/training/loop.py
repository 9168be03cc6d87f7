"""The training loop: short enough to read, on Lightning Fabric for devices, precision and processes."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from m3vit.data.loading import EpochBatches, TrainingSet, make_loader
from m3vit.data.opening import open_split
from m3vit.data.sample import Split
from m3vit.errors import InputError
from m3vit.evaluation.evaluate import evaluate, torch_predictor
from m3vit.files import atomic_path, is_empty
from m3vit.models.multitask import MultiTaskModel
from m3vit.tasks import resolve
from m3vit.training.checkpoint import MetricsLog, load_state, read_metrics, save_model, save_state
from m3vit.training.config import Config, TrainConfig, differences, read_config
from m3vit.training.losses import routing_losses, task_loss

# Keys that may change between a run and its continuation: they do not change what is computed.
FREE_TO_CHANGE = (
    "data.root",
    "data.workers",
    "data.cache",
    "data.on_error",
    "train.log_steps",
    "train.checkpoint_steps",
)

PROTOCOL = "A"  # of the evaluations between epochs

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what to show beside them


def prepare_folder(config: Config, out: Path, resume: bool) -> None:
    """Make the run folder and its config.yaml, or raise InputError rather than touch another run."""
    config.check()
    if resume and (out / "config.yaml").exists():
        changed = differences(read_config(out / "config.yaml"), config, FREE_TO_CHANGE)
        if changed:
            raise InputError(f"{out} was started with other values of {', '.join(changed)}: resume with the same ones")
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder")
    if not is_empty(out):
        hint = "it is not a run folder" if resume else "continue it with --resume, or choose another folder"
        raise InputError(f"{out} exists and is not empty: {hint}")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "config.yaml") as path:
        path.write_text(config.to_yaml())


def build(config: Config) -> MultiTaskModel:
    """Return the model with weights drawn from the run's seed."""
    torch.manual_seed(config.train.seed)
    return MultiTaskModel(config.model)


def initialise(config: Config, out: Path) -> None:
    """Write a run folder with untrained weights (`m3vit init`)."""
    model = build(config)
    prepare_folder(config, out, resume=False)
    save_model(out, model, epoch=0)


def learning_rate(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of step number `step` (0, 1, ...), stepped once an iteration."""
    total, warmup = train.epochs * steps_per_epoch, train.warmup_epochs * steps_per_epoch
    if step < warmup:
        return train.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total - warmup, 1)
    if train.schedule == "poly":
        return train.lr * (1 - done) ** 0.9
    return train.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(train: TrainConfig, model: MultiTaskModel) -> torch.optim.Optimizer:
    """Return the optimiser. AdamW decays weights, of gates too; not biases, norms, positions and prefix tokens."""
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay
        )

    # An expert's bias is a row of a matrix [E, H]: decided by name, not by the number of dimensions.
    def decayed(name: str, parameter: Tensor) -> bool:
        return parameter.ndim > 1 and not name.endswith(
            (".b1", ".b2", "pos_embed", "cls_token", "dist_token", "reg_token", "rope.freqs")
        )

    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decayed(n, p)], "weight_decay": train.weight_decay},
        {"params": [p for n, p in named if not decayed(n, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.lr)


def step_losses(
    config: Config, model: Any, images: Tensor, labels: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of all losses, and each unweighted one by name."""
    output = model(images, native=config.train.native_losses)
    losses = {
        task: task_loss(task, logits.float(), labels[task], config.train.edge_positive_weight)
        for task, logits in output.logits.items()
    }
    resolved = resolve(config.model.tasks, config.model.label_set)
    weights = {task.name: task.weight for task in resolved} | config.train.task_weights
    # Distilled outputs weigh what their task weighs (M3ViT's code: losses/loss_schemes.py).
    losses |= {
        f"{task}/distilled{level}": task_loss(task, logits.float(), labels[task], config.train.edge_positive_weight)
        for level, outputs in output.distilled.items()
        for task, logits in outputs.items()
    }
    total = torch.stack([weights[name.split("/")[0]] * loss for name, loss in losses.items()]).sum()
    routing_weights = config.train.routing_weights()
    for name, loss in routing_losses(output.routings, routing_weights).items():
        losses[name] = loss
        total = total + routing_weights[name] * loss
    return total, losses


def train(config: Config, out: Path, resume: bool = False, progress: Progress | None = None) -> int:
    """Train a model into the run folder `out`. A run killed at any moment resumes to the same weights.

    Returns how many training images could not be read and were left out (`data.on_error` skip).
    """
    settings = config.train
    config.check()
    train_split = open_split(config.data.layout, config.data.root, "train", config.model.tasks)
    val_split = open_split(config.data.layout, config.data.root, "val", config.model.tasks)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("training on several processes is not there yet: start m3vit train without torchrun")
    try:
        # One device: left to itself, Fabric starts a process for every GPU it sees.
        fabric = Fabric(
            accelerator=settings.accelerator,
            devices=1,
            precision=settings.precision,  # type: ignore[arg-type]
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"train.accelerator {settings.accelerator} cannot be used here: {error}") from None
    batches = EpochBatches(len(train_split), settings.batch_size, settings.seed)
    model = build(config)
    prepare_folder(config, out, resume)
    if settings.threads:
        torch.set_num_threads(settings.threads)

    wrapped, optimizer = fabric.setup(model, make_optimizer(settings, model))
    state = load_state(out) if resume else None
    step = 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])  # after setup: it takes its tensors to the parameters' device
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        step = state["step"]

    size = (config.model.image_size[0], config.model.image_size[1])
    options = config.data
    dataset = TrainingSet(
        train_split, size, settings.seed, options.pipeline, options.flip, options.colour, options.cache
    )
    loader = make_loader(dataset, batches, config.data.workers, pin_memory=fabric.device.type == "cuda")
    steps_per_epoch = len(batches)
    steps = settings.epochs * steps_per_epoch
    log = MetricsLog(out, step)
    board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def save() -> None:
        check_weights(model, step, out)
        rng = {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if fabric.device.type == "cuda" else [],
        }
        save_state(out, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, **rng})

    unreadable: set[str] = set()

    def record(kind: str, values: dict[str, float], message: str | None = None) -> None:
        words = {"message": message} if message else {}
        log.write({"kind": kind, "step": step, "epoch": step / steps_per_epoch, **values, **words})
        for name, value in values.items():
            board.add_scalar(f"{kind}/{name}", value, step)

    while step < steps:
        wrapped.train()
        batches.epoch, batches.start = divmod(step, steps_per_epoch)
        for images, labels, errors in loader:
            for message in errors:
                if options.on_error == "stop":
                    raise InputError(f"{message}; or leave such images out with --data.on_error skip")
                if message not in unreadable:
                    unreadable.add(message)
                    record("unreadable", {"count": len(unreadable)}, message)
            if images is None:
                step += 1  # a step all the same: the schedule and a resumed run count on it
                continue
            images, labels = fabric.to_device((images, labels))
            lr = learning_rate(settings, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            total, losses = step_losses(config, wrapped, images, labels)
            values = {"loss": float(total.detach())} | {name: float(loss.detach()) for name, loss in losses.items()}
            check_finite(values, step, out)
            optimizer.zero_grad()
            fabric.backward(total)
            norm = fabric.clip_gradients(
                wrapped, optimizer, max_norm=settings.grad_clip or math.inf, error_if_nonfinite=False
            )
            if settings.precision != "16-mixed":  # whose scaler tries large scales, and skips those steps itself
                check_finite({"gradient norm": float(norm)}, step, out)  # type: ignore[arg-type]
            optimizer.step()
            step += 1
            if progress:
                progress(step, steps, f"loss {values['loss']:.3f}")
            if step % settings.log_steps == 0 or step == steps:
                record("train", {"lr": lr, **values})
            if settings.checkpoint_steps and step % settings.checkpoint_steps == 0 and step % steps_per_epoch:
                save()
        epoch = step // steps_per_epoch
        check_weights(model, step, out)
        if settings.eval_epochs and epoch % settings.eval_epochs == 0 and step < steps:
            record("val", validate(val_split, model, options.on_error))
        # The resume state last: where it says an epoch is done, its evaluation and weights are on disk.
        save_model(out, model, epoch)
        save()
    if not any(line["kind"] == "val" and line["step"] == step for line in read_metrics(out)):
        record("val", validate(val_split, model, options.on_error))
    board.close()
    return len(unreadable)


def validate(split: Split, model: MultiTaskModel, on_error: str) -> dict[str, float]:
    """Return the metrics under the protocol that takes any image size, with the quick edge metric instead of odsF."""
    found = evaluate(split, torch_predictor(model), PROTOCOL, quick=True, skip_unreadable=on_error == "skip")
    return flat(found.scores()) | ({"unreadable": float(len(found.errors))} if found.errors else {})


def check_finite(values: dict[str, float], step: int, out: Path) -> None:
    """Stop a diverged run before it overwrites its last good checkpoint."""
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        kept = "The last checkpoint is kept" if (out / "last" / "state.pt").exists() else "There is no checkpoint yet"
        raise InputError(
            f"training diverged at step {step}: {', '.join(broken)} not finite. {kept} in {out}; start again with a "
            "lower --train.lr or with --train.grad_clip"
        )


def check_weights(model: MultiTaskModel, step: int, out: Path) -> None:
    """Stop before weights that are not finite are written or evaluated."""
    check_finite({name: float(value.detach().abs().max()) for name, value in model.named_parameters()}, step, out)


def flat(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Turn {task: {metric: value}} into {"task/metric": value}, without the IoU of each class."""
    return {
        f"{task}/{metric}": value
        for task, values in scores.items()
        for metric, value in values.items()
        if not metric.startswith("IoU_")
    }
