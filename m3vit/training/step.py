"""One optimiser step: the losses of a batch that lies in parts on several processes, and their gradient.

What comes out is that of the whole batch on one process, up to the order of floating-point sums: every loss divides by
the pixel counts of the whole batch (`BatchCounts`), and the routing losses are those of the sums over all processes'
tokens (`add_up`). Only what is drawn at random inside the model (router noise, dropped paths) differs.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from m3vit.collectives import total, world_size
from m3vit.data.augment import to_labels, to_values
from m3vit.data.sample import Sample, no_label
from m3vit.label_sets import resolve
from m3vit.models.budget import Budget
from m3vit.models.multitask import MultiTaskModel, Output
from m3vit.models.router import Routing
from m3vit.models.slices import gradients_in_place
from m3vit.training.budgets import (
    Whole,
    as_used,
    distances_count,
    first_step,
    of_step,
    output_distance,
    pass_shares,
    space,
    token_distance,
)
from m3vit.training.config import Config, TrainConfig
from m3vit.training.launch import Fabric
from m3vit.training.losses import BatchCounts, loss_options, task_loss
from m3vit.training.routing_losses import RoutingSums, routing_losses, sums_for
from m3vit.training.sharding import clip_gradients, is_sharded
from m3vit.training.weighting import Fixed, GradientMethod

Labels = dict[str, Tensor]


class Part(NamedTuple):
    """Images and labels of one forward pass; `counts` is False for a stand-in, whose routing is nobody's concern."""

    images: Tensor
    labels: Labels
    counts: bool = True


def step_losses(
    config: Config,
    model: Any,
    images: Tensor,
    labels: Labels,
    tasks: Sequence[str] | None = None,
    weights: dict[str, float] | None = None,
    counts: BatchCounts | None = None,
    tokens_count: bool = True,
    passes: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the losses of `tasks` (default: all), and each unweighted one by name.

    Auxiliary outputs (`depth/distilled0`) weigh what their task weighs (M3ViT's code: losses/loss_schemes.py).
    With `counts`, the contribution of these images to the losses of the batch counted there; routing losses are those
    of all processes' tokens of this pass, without this process's unless `tokens_count`, and means over the `passes` of
    the step, to which this one contributes its share.
    """
    output = model(images, tasks=tasks, native=config.train.native_losses)
    return whole_losses(config, output, labels, weights, counts, tokens_count, passes)


def whole_losses(
    config: Config,
    output: Output,
    labels: Labels,
    weights: Mapping[str, float] | None = None,
    counts: BatchCounts | None = None,
    tokens_count: bool = True,
    passes: int = 1,
    share: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what `step_losses` does, of an output of the whole model.

    `share`: what part of the step's loss this pass will be, which alone balances the routers: they count for all of it.
    """
    resolved = resolve(config.model.tasks, config.model.label_set)
    loss, losses = task_losses(config, output, labels, weights or task_weights(config), counts)
    routing_weights = config.train.routing_weights()
    if output.routings and routing_weights:
        routings = output.routings if tokens_count else [without_tokens(routing) for routing in output.routings]
        of_all = len(output.logits) / len(resolved)
        found = routing_losses(add_up(sums_for(routings, routing_weights)), routing_weights, of_all)
        found = {name: value / passes for name, value in found.items()}
        loss = loss + torch.stack([routing_weights[name] * value for name, value in found.items()]).sum() / share
        losses |= found
    return loss, losses


def smaller_losses(
    config: Config,
    output: Output,
    whole: Whole,
    labels: Labels,
    weights: Mapping[str, float],
    counts: BatchCounts,
    images: int,
    tokens_count: bool = True,
    distances: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a smaller budget's pass, and its parts: the tasks' losses, and the distances to the whole.

    Distances are means over the `images` of the batch, of which these may be a part; without `tokens_count` none of
    them. Of fewer tasks than the model has, tokens weigh as much less. Routers are balanced by the whole model's pass.
    `distances`: how much of their weights the distances have (`distances_count`).
    """
    train = config.train
    loss, _ = task_losses(config, output, labels, weights, counts)
    share = int(tokens_count) / max(images, 1)
    tokens = token_distance(output, whole).sum() * share * len(output.logits) / len(config.model.tasks)
    outputs = output_distance(output, whole, weights).sum() * share
    parts = {"budget/loss": loss, "budget/tokens": tokens, "budget/outputs": outputs}
    return loss + distances * (train.budget_tokens * tokens + train.budget_outputs * outputs), parts


def task_weights(config: Config) -> dict[str, float]:
    """Return the fixed weight of each task."""
    resolved = resolve(config.model.tasks, config.model.label_set)
    return {task.name: task.weight for task in resolved} | config.train.task_weights


def task_losses(
    config: Config, output: Output, labels: Labels, weights: Mapping[str, float], counts: BatchCounts | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted sum of the losses of an output's tasks, auxiliary outputs too, and each unweighted one."""
    outputs = dict(output.logits) | {
        f"{task}/{name}": logits for name, auxiliary in output.auxiliary.items() for task, logits in auxiliary.items()
    }
    losses = {}
    for name, logits in outputs.items():
        task = task_of(name)
        options, named = loss_options(task, config.train), config.train.losses.get(task, "")
        losses[name] = task_loss(task, logits.float(), labels[task], options, counts, named)
    return torch.stack([weights[task_of(name)] * value for name, value in losses.items()]).sum(), losses


def task_of(name: str) -> str:
    """Return the task of a loss: "depth" of "depth" and of "depth/distilled0"."""
    return name.split("/")[0]


def without_tokens(routing: Routing) -> Routing:
    """Return a routing of no tokens, whose sums are 0 and still lead back to the router's parameters."""
    fields: list[Any] = [field[:, :0] if isinstance(field, Tensor) and field.ndim == 3 else field for field in routing]
    return Routing(*fields)


def add_up(layers: list[RoutingSums]) -> list[RoutingSums]:
    """Return each layer's sums over the tokens of all processes; the gradient is this process's.

    Their losses are the same in each process, and the sum of the processes' gradients is that of all tokens. One
    all_reduce for all layers, in float64: it holds counts exactly up to 2^53 (float32: 2^24; large batches have more).
    """
    if not dist.is_initialized():
        return layers
    fields = [name for name in RoutingSums._fields if name != "allowed_RE" and getattr(layers[0], name) is not None]
    mine = [getattr(sums, name) for sums in layers for name in fields]
    everyone = total(torch.cat([tensor.detach().double().flatten() for tensor in mine]), in_place=True)
    parts = everyone.split([tensor.numel() for tensor in mine])
    joined = iter([_in_place_of(tensor, part) for tensor, part in zip(mine, parts, strict=True)])
    return [sums._replace(**{name: next(joined) for name in fields}) for sums in layers]


def _in_place_of(mine: Tensor, values: Tensor) -> Tensor:
    """Return `values` in the shape and dtype of `mine`, and with its gradient."""
    values = values.view_as(mine).to(mine.dtype)
    return values + (mine - mine.detach()) if mine.requires_grad else values  # adds 0


def stand_in(config: Config, device: torch.device) -> Part:
    """Return an image without labels: what a process runs that has none, so that the others need not wait."""
    height, width = config.model.image_size
    labels = {task: no_label(task, (height, width)) for task in config.model.tasks}
    sample = Sample("", np.zeros((height, width, 3), np.uint8), labels)
    tensors = {task: label[None].to(device) for task, label in to_labels(to_values(sample)).items()}
    return Part(torch.zeros(1, 3, height, width, device=device), tensors, counts=False)


def choose_tasks(train: TrainConfig, tasks: list[str], step: int) -> list[str]:
    """Return the tasks of a step, in their order: the same in every process."""
    if not train.tasks_per_step:
        return tasks
    chosen = np.random.default_rng([4, train.seed, step]).choice(len(tasks), train.tasks_per_step, replace=False)
    return [tasks[index] for index in sorted(chosen)]


class Stepper:
    """Turns batches into gradients and steps of the optimiser."""

    def __init__(
        self, fabric: Fabric, config: Config, model: Any, optimizer: Any, weighting: Fixed, steps: int = 0
    ) -> None:
        """`steps`: of the whole training; 0: not known, and what depends on them is as at its end."""
        self.fabric, self.config, self.optimizer, self.weighting = fabric, config, optimizer, weighting
        self.wrapped = model
        self.model: MultiTaskModel = model.module
        self.stand_in = stand_in(config, fabric.device)
        self.space = space(self.model, config.train) if config.train.budgets else None
        self.images = 0  # of the batch, of all processes
        self.steps, self.distances = steps, 1.0
        self.start = first_step(config.train, steps)  # the first step with smaller budgets

    def gradients(self, step: int, images: Tensor | None, labels: Labels) -> dict[str, float]:
        """Compute the gradient of step number `step` from this process's share of its batch (None: no image).

        Returns the weighted loss, the unweighted losses of all processes, and the weights where they change; nothing of
        tasks that no pixel of the batch is labelled for.
        """
        train = self.config.train
        parts = self.split(images, labels)
        counts = BatchCounts(labels if images is not None else self.stand_in.labels)
        labelled = counts.labelled()
        budgets = of_step(train, self.space, step, self.start)
        self.distances = distances_count(train, step, self.steps, self.start)
        if self.space is not None:
            self.images = int(total(torch.tensor([0 if images is None else len(images)])))
        tasks = choose_tasks(train, self.config.model.tasks, step)
        scale = len(self.config.model.tasks) / len(tasks)
        weights = self.weighting.weights()
        self.optimizer.zero_grad()
        if isinstance(self.weighting, GradientMethod):
            sums, shares = self.combined(step, parts, counts, tasks, labelled, weights, scale, budgets)
        else:
            # Gradients are averaged over the processes (by both strategies); their parts of a loss are to be added.
            sums = self.passes(parts, counts, tasks, weights, scale * world_size(), budgets, reduce=True)
            shares = {}
        routing_weights = train.routing_weights()
        routing = {name: float(sums.pop(name)) for name in routing_weights if name in sums}
        values = dict(zip(sums, total(torch.stack(list(sums.values()))).tolist(), strict=True))
        smaller = {name: value for name, value in values.items() if name.startswith("budget/")}
        values = {name: value for name, value in values.items() if task_of(name) in labelled}
        loss = sum(weights[task_of(name)] * value for name, value in values.items())
        learned = [task for task in tasks if task in labelled]
        if learned:
            self.weighting.observe({task: values[task] for task in learned}, scale, self.fabric.backward)
        loss += sum(routing_weights[name] * value for name, value in routing.items())
        values |= routing
        if train.weighting != "fixed":
            values |= {f"weight/{task}": weights[task] for task in tasks}
        return {"loss": scale * loss} | values | smaller | shares

    def clip(self) -> float:
        """Clip the gradient and return its norm before."""
        limit = self.config.train.grad_clip or math.inf
        if is_sharded(self.model):
            return float(clip_gradients([p for group in self.optimizer.param_groups for p in group["params"]], limit))
        norm = self.fabric.clip_gradients(self.wrapped, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        return float(norm)  # type: ignore[arg-type]

    def split(self, images: Tensor | None, labels: Labels) -> list[Part]:
        """Return the parts of this process's share: as many on each process, stand-ins among them if need be."""
        count = self.config.train.accumulate
        found = []
        if images is not None:
            pieces = [images.tensor_split(count), *(label.tensor_split(count) for label in labels.values())]
            found = [
                Part(piece, dict(zip(labels, rest, strict=True)))
                for piece, *rest in zip(*pieces, strict=True)
                if len(piece)
            ]
        return found + [self.stand_in] * (count - len(found))

    def passes(
        self,
        parts: list[Part],
        counts: BatchCounts,
        tasks: list[str],
        weights: dict[str, float],
        factor: float,
        budgets: Sequence[Budget],
        reduce: bool,
    ) -> dict[str, Tensor]:
        """Add the gradients of all parts to the parameters', `reduce`d over processes; return the unweighted losses.

        Of each part every budget has a pass, of which the weighted mean is learned from (`pass_shares`): the whole
        model's losses are returned, and the means of the smaller ones', as budget/...
        """
        sums: dict[str, Tensor] = {}
        shares = pass_shares(self.config.train, len(budgets))
        for place, part in enumerate(parts):
            whole: Whole | None = None
            for number, budget in enumerate(budgets):
                # Sharded gradients are reduced after each pass, since until then each process holds them whole.
                last = place == len(parts) - 1 and number == len(budgets) - 1
                wait = world_size() > 1 and not is_sharded(self.model) and not (reduce and last)
                keep = self.fabric.no_backward_sync(self.wrapped) if wait else None
                # Of one process no one else is to be told of gradients.
                place_of = gradients_in_place if whole is not None and world_size() == 1 else nullcontext
                with keep or nullcontext():
                    loss, losses, output = self.losses(
                        part, budget, whole, tasks, weights, counts, len(parts), shares[number]
                    )
                    with place_of():
                        self.fabric.backward(loss * (factor * shares[number]))
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach() / (1 if whole is None else len(budgets) - 1)
                if whole is None and len(budgets) > 1:
                    whole = Whole.of(output)
                del loss, losses, output  # before the next pass, which takes as much memory
        return sums

    def losses(
        self,
        part: Part,
        budget: Budget,
        whole: Whole | None,
        tasks: list[str],
        weights: dict[str, float],
        counts: BatchCounts,
        passes: int,
        share: float,
    ) -> tuple[Tensor, dict[str, Tensor], Output]:
        """Return the losses of one pass, which is that `share` of the step's: the whole model's, or a smaller one's.

        Smaller ones' come after it, and learn from it.
        """
        alone = share == 1
        # Fabric looks through what a model is given for tensors, and stops at a Budget.
        options = {} if alone else {"budget": self.model.uses(budget, tasks), "keep_tokens": True}
        if whole is not None and world_size() > 1 and not is_sharded(self.model):
            options["keep_unused"] = True
        with nullcontext() if whole is None else as_used(self.model.heads):
            output = self.wrapped(part.images, tasks=tasks, native=self.config.train.native_losses, **options)
        if whole is None:
            found = whole_losses(self.config, output, part.labels, weights, counts, part.counts, passes, share)
        else:
            loss, losses = smaller_losses(
                self.config, output, whole, part.labels, weights, counts, self.images, part.counts, self.distances
            )
            found = loss if output.unused is None else loss + output.unused, losses
        return *found, output

    def combined(
        self,
        step: int,
        parts: list[Part],
        counts: BatchCounts,
        tasks: list[str],
        labelled: set[str],
        weights: dict[str, float],
        scale: float,
        budgets: Sequence[Budget],
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Compute each task's gradient by itself, and combine those of the parameters that several tasks share.

        A task that is not labelled in this batch has no gradient but of its routing, which is added as it is: weighed
        like the others', the shortest gradient would count most (mgda).
        """
        method = self.weighting
        assert isinstance(method, GradientMethod)
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        ends = np.cumsum([parameter.numel() for parameter in parameters.values()]).tolist()
        columns = {name: slice(end - p.numel(), end) for (name, p), end in zip(parameters.items(), ends, strict=True)}
        jacobian = torch.zeros(len(tasks), ends[-1], device=self.fabric.device)
        reached = dict.fromkeys(parameters, 0)  # by how many tasks
        sums: dict[str, Tensor] = {}
        for row, task in zip(jacobian, tasks, strict=True):
            found = self.passes(parts, counts, [task], weights, scale, budgets, reduce=False)
            sums |= {name: value + sums.get(name, 0) for name, value in found.items()}
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    row[columns[name]] = parameter.grad.flatten()
                    reached[name] += 1
                    parameter.grad = None
        jacobian = total(jacobian, in_place=True)
        shared = [jacobian[:, columns[name]] for name, count in reached.items() if count > 1]
        weighed = [place for place, task in enumerate(tasks) if task in labelled]
        gramian = sum((part @ part.T for part in shared), jacobian.new_zeros(len(tasks), len(tasks)))
        mixed = jacobian.new_ones(len(tasks))
        if weighed:
            mixed[weighed] = method.combine(gramian[weighed][:, weighed], step + self.config.train.seed)
        for name, parameter in parameters.items():
            if reached[name]:
                mix = mixed if reached[name] > 1 else torch.ones_like(mixed)
                parameter.grad = (mix @ jacobian[:, columns[name]]).view_as(parameter)
        shares = {f"gradient/{task}": value for task, value in zip(tasks, mixed.tolist(), strict=True)}
        return sums, {name: value for name, value in shares.items() if name.partition("/")[2] in labelled}
