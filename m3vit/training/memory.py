"""`m3vit profile RECIPE --train`: the memory of a training step, predicted, and the largest batch that a device holds.

A step is taken on fake tensors, which have shapes, types and lifetimes but no values, in torch's own tracker of memory:
what it counts are the tensors that torch allocates, at their peak. The experts of a layer get as many tokens each. Not
counted is what allocators and libraries keep besides: `LIBRARIES` and `SLACK` are set aside of a GPU's memory for it,
and a process on the CPU may hold more than its tensors (docs/training.md, "Memory").
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from m3vit.errors import InputError
from m3vit.models.meta import without_values
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.trial import refusing
from m3vit.training.budgets import Whole
from m3vit.training.config import GRADIENT_METHODS, Config
from m3vit.training.losses import BatchCounts
from m3vit.training.parts import freeze, frozen_epochs
from m3vit.training.step import choose_tasks, smaller_losses, stand_in, task_weights, whole_losses

GIB, MIB = 2**30, 2**20
LIBRARIES = 1 * GIB  # CUDA's context and the libraries' workspaces
SLACK = 0.08  # of the rest, for what the allocator cannot use
DEVICES = {  # GiB, as vendors name them
    "T4": 16,
    "V100-16GB": 16,
    "V100-32GB": 32,
    "RTX3090": 24,
    "RTX4090": 24,
    "RTX5090": 32,
    "L4": 24,
    "A10": 24,
    "A6000": 48,
    "L40S": 48,
    "A100-40GB": 40,
    "A100-80GB": 80,
    "H100": 80,
    "H200": 141,
}
KINDS = {"Parameter": "weights", "Buffer": "weights", "Gradient": "gradients"}  # torch's names; others: activations


class Step(NamedTuple):
    """Bytes at the peak of a step, by what they are of: weights, gradients, optimiser, activations; and of all."""

    weights: int
    gradients: int
    optimiser: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def device_bytes(name: str) -> int:
    """Return a device's memory, by a name of DEVICES or a size such as 24GB; raise InputError for others."""
    known = {device.lower(): size for device, size in DEVICES.items()}
    sized = re.fullmatch(r"(\d+(?:\.\d+)?) ?gi?b", name.lower())
    if name.lower() not in known and not sized:
        raise InputError(f"--device {name}: give one of {', '.join(DEVICES)}, or its memory, such as 24GB")
    return int(float(sized[1]) * GIB) if sized else known[name.lower()] * GIB


def predict_step(config: Config, images: int) -> Step:
    """Return what a step on so many images holds at its peak, in the one process that has them."""
    train = config.train
    if train.strategy == "fsdp":
        raise InputError("the memory of train.strategy fsdp is not predicted: it depends on what the processes share")
    apart = train.weighting in GRADIENT_METHODS
    with refusing(config.model):
        with without_values():
            model = MultiTaskModel(config.model)
        model.backbone.checkpoint_activations = train.checkpoint_activations
        freeze(model, frozen_epochs(train, model), train.epochs)
        labels = stand_in(config, torch.device("cpu")).labels
        tasks = choose_tasks(train, config.model.tasks, 0)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _hide_frozen(model.to_empty(device="cpu"))
            step = _peak(config, model, -(-images // train.accumulate), labels, tasks[:1] if apart else tasks)
    trained = _trained_bytes(model)
    if train.ema:
        step = step._replace(weights=step.weights + sum(t.nbytes for t in model.state_dict().values()))
    if apart:  # each task's gradient, in float32
        step = step._replace(gradients=step.gradients + len(tasks) * trained)
    elif step.gradients < trained and train.accumulate > 1:
        step = step._replace(gradients=trained)  # of the parts before
    return step


def _peak(config: Config, model: MultiTaskModel, count: int, labels: dict[str, Tensor], tasks: list[str]) -> Step:
    """Go forward and back once, and return the peak, with the optimiser's state beside it."""
    precision = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.train.precision)
    images = torch.empty(count, 3, *config.model.image_size)
    batch = {name: one.expand(count, *one.shape[1:]).clone() for name, one in labels.items()}
    tracker = MemTracker()
    tracker.track_external(model.train(), images, *batch.values())
    with tracker:
        counts, whole = BatchCounts(batch), None
        # A smaller budget's pass follows, with the gradients there and what it learns from: at most as large as this.
        for _ in range(1 + bool(config.train.budgets)):
            tracker.reset_mod_stats()
            with torch.autocast("cpu", precision, enabled=precision is not None):
                output = model(images, tasks, config.train.native_losses, keep_tokens=True)
                if whole is None:
                    loss, parts = whole_losses(config, output, batch, counts=counts)
                else:
                    loss, parts = smaller_losses(config, output, whole, batch, task_weights(config), counts, count)
            whole = Whole.of(output) if config.train.budgets else None
            del output
            loss.backward()
            del loss, parts
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    sums = dict.fromkeys(Step._fields, 0)
    for kind, size in snapshot.items():
        name = str(getattr(kind, "value", kind))
        if name != "Total":
            sums[KINDS.get(name, "activations")] += int(size)
    trained = _trained_bytes(model)
    states = 2 if config.train.optimizer == "adamw" else bool(config.train.momentum)
    step = Step(**sums)._replace(optimiser=states * trained)
    # While the optimiser steps, all gradients are there, and as much again for what it computes; activations are gone.
    stepping = Step(step.weights, trained, step.optimiser, trained)
    return max(step, stepping, key=lambda one: one.total)


def _hide_frozen(model: MultiTaskModel) -> None:
    """Make buffers of what is not trained: the tracker wants a gradient of every parameter."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())


def _trained_bytes(model: MultiTaskModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def predict(config: Config, device: str | None) -> dict[str, Any]:
    """Return the memory of a step of the configuration, an image's part of it, and the largest batch, as JSON values.

    Two batches are predicted, and the line through them taken. One process: with several, a process has its share of
    the batch, and gradients once more.
    """
    size = config.train.batch_size
    step = predict_step(config, size)
    small = max(1, size // 2) if size > 1 else 2
    other = predict_step(config, small)
    each = (step.total - other.total) / (size - small)
    fixed = step.total - each * size
    found = {
        "batch_size": size,
        "bytes": {**step._asdict(), "total": step.total},
        "bytes_an_image": round(each),
        "bytes_without_images": round(fixed),
    }
    if device is not None:
        room = (device_bytes(device) - LIBRARIES) * (1 - SLACK)
        largest = max(0, int((room - fixed) // max(each, 1)))
        found |= {"device": device, "device_bytes": device_bytes(device), "largest_batch": largest}
    return found


def said(found: dict[str, Any]) -> str:
    """Return a prediction in words."""
    parts = found["bytes"]
    sizes = ", ".join(f"{name} {parts[name] / MIB:,.0f}" for name in Step._fields)
    text = (
        f"a training step on {found['batch_size']} images in one process (train.batch_size): "
        f"{parts['total'] / MIB:,.0f} MiB of tensors at its peak, predicted ({sizes}); an image more: "
        f"{found['bytes_an_image'] / MIB:,.1f} MiB"
    )
    if "device" in found:
        gib, batch = found["device_bytes"] / GIB, found["largest_batch"]
        fits = f"up to train.batch_size {batch}" if batch else "not even one image"
        text += (
            f"\n{found['device']}, {gib:g} GiB: {fits} fits a process (without {LIBRARIES // GIB} GiB for CUDA's "
            f"context and libraries and {SLACK:.0%} for the allocator)"
        )
    return text
