"""Find the coefficients of merged runs on images without labels (model.merge_coefficients entropy).

AdaMerging (arXiv 2310.02575), its layer-wise form: the shared trunk is B + sum_r c_lr (r - B) for the weights B that
all runs r began from, with a coefficient of each run for each layer l. What the runs learnt is mixed well if
predictions are decided: the coefficients are to make the mean entropy of the predictions small. Adam begins at 0.3 with
a rate of 1e-3 and is kept within 0 and 1, as in the authors' code (github.com/EnnengYang/AdaMerging). A layer here is a
block of the trunk, or what stands before the blocks; there it is a tensor.

Every task predicts as the merged model starts to: through the shared trunk, its own run's MLPs where that model has
experts, and its own run's head. A task has no say that predicts a measure (depth, normals), which has no entropy, or
whose head the model does not take whole. A run of such tasks alone keeps 0.3: its coefficients would follow what is
good for others.

Shapes: L layers, N runs, B images.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from m3vit.errors import InputError
from m3vit.models.config import ModelConfig, init_sources
from m3vit.models.from_run import HEADS, TRUNK, Taken, Trained, dense_tensors, fit, read_trained
from m3vit.models.merging import began_from, layer_of, merge
from m3vit.models.multitask import MultiTaskModel
from m3vit.normalisation import Normalisation, parse
from m3vit.tasks import kind_of

START, RATE = 0.3, 1e-3
Batches = Callable[[Normalisation], Iterator[Tensor]]


class Found(NamedTuple):
    """Coefficients of `runs` by layer, and how they were found.

    held: the runs that kept `START`. entropy: before and after, in nats, over the images of the first step.
    """

    layers: dict[str, list[float]]
    runs: list[str]
    held: list[str]
    entropy: tuple[float, float]
    steps: int
    images: int

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**self._asdict(), "entropy": list(self.entropy)}


def report(found: Mapping[str, Any]) -> str:
    """Return in lines, for people, what `Found.plain` gave."""
    before, after = found["entropy"]
    words = f"entropy {before:.4f} at first, then {after:.4f}"
    lines = [f"coefficients found in {found['steps']} steps of {found['images']} images without labels: {words}"]
    width = max(map(len, ("layer", *found["layers"])))
    lines.append("  ".join([f"{'layer':<{width}}", *(f"{run:>6}" for run in found["runs"])]))
    for layer, numbers in found["layers"].items():
        columns = zip(numbers, found["runs"], strict=True)
        lines.append("  ".join([f"{layer:<{width}}", *(f"{number:>{max(6, len(run))}.3f}" for number, run in columns)]))
    if found["held"]:
        lines.append(f"kept at {START}, for no entropy of theirs can be taken: {', '.join(found['held'])}")
    return "\n".join(lines)


def find_coefficients(
    config: ModelConfig,
    batches: Batches,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Found:
    """Find the coefficients of the runs that a configuration merges.

    batches: gives, for how images are normalised, batches [B, 3, H, W] of the model's size, as many as are asked for.

    Raises InputError if the runs cannot be merged so, or no task of theirs has an entropy.
    """
    model = MultiTaskModel(config)
    runs = [read_trained(one, "model.init merge: ") for one in init_sources(config.init)[1]]
    base = began_from(model)
    assert base is not None  # ModelConfig.check
    layers = list(dict.fromkeys(layer_of(name) for name in dense_tensors(model)))
    start = [[START] * len(runs) for _ in layers]
    # What is wrong is said before the search.
    _, taken = merge(model, runs, base, dict(zip(layers, start, strict=True)))
    blend = Blend(model, runs, base, taken, layers, device)
    if not any(blend.tasks):
        raise InputError(
            f"model.merge_coefficients entropy: none of {', '.join(config.tasks)} has predictions with an entropy "
            "(classes or probabilities, of a head taken whole): give a number for each run, or none for their mean"
        )
    names = [run.name for run in runs]
    held = [place for place, tasks in enumerate(blend.tasks) if not tasks]
    coefficients = torch.tensor(start, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=RATE)
    images = batches(parse(runs[0].images, f"normalisation of {runs[0].folder}"))
    first = before = None
    for step in range(config.merge_steps):
        batch = next(images).to(device)
        optimizer.zero_grad()
        entropy = blend.add_gradient(coefficients, batch)
        if not math.isfinite(entropy):
            raise InputError(
                f"model.merge_coefficients entropy: that of merged predictions is {entropy} in step {step + 1}: the "
                "runs do not mix; give a number for each run, or none for their mean"
            )
        if first is None:
            first, before = batch, entropy
        assert coefficients.grad is not None
        coefficients.grad[:, held] = 0
        optimizer.step()
        with torch.no_grad():
            coefficients.clamp_(0, 1)
        if progress:
            progress(step + 1, config.merge_steps, f"entropy {entropy:.3f}")
    assert first is not None and before is not None
    with torch.no_grad():
        after = float(blend.entropy(coefficients, first))
    rounded = [[round(number, 6) for number in row] for row in coefficients.tolist()]
    layerwise = dict(zip(layers, rounded, strict=True))
    return Found(
        layerwise, names, [names[place] for place in held], (before, after), config.merge_steps, config.merge_images
    )


class Blend:
    """The entropy of the runs' predictions as a function of the coefficients [L, N].

    tasks: of each run, those that have a say.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        runs: Sequence[Trained],
        base: Mapping[str, Tensor],
        taken: Sequence[Taken],
        layers: Sequence[str],
        device: torch.device | str = "cpu",
    ) -> None:
        dense = MultiTaskModel(replace(model.config, moe_blocks="none", init="random", merge_coefficients=[]))
        self.model = dense.eval().requires_grad_(False).to(device)
        own = tuple(f"blocks.{index}.mlp." for index in model.backbone.moe_indices)
        self.shared: dict[str, tuple[int, Tensor, Tensor]] = {}  # row of the coefficients, B, the differences [N, ...]
        self.own = [{name: v.to(device) for name, v in one.values.items() if name.startswith(HEADS)} for one in taken]
        for name in dense_tensors(model):
            values = [fit(model, run, name).to(device) for run in runs]
            if name.startswith(own) or not values[0].is_floating_point():
                for ours, value in zip(self.own, values, strict=True):
                    ours[f"{TRUNK}{name}"] = value
            else:
                start = base[name].to(values[0])
                differences = torch.stack([value - start for value in values])
                self.shared[f"{TRUNK}{name}"] = layers.index(layer_of(name)), start, differences
        self.tasks = [
            [task for task in run.config.tasks if self._counts(task, run, one)]
            for run, one in zip(runs, taken, strict=True)
        ]

    def _counts(self, task: str, run: Trained, taken: Taken) -> bool:
        """Return whether a task's entropy is one of the run's own predictions."""
        config = self.model.config
        if task not in config.tasks or not kind_of(task).has_entropy:
            return False
        heads = [name for name in self.model.state_dict() if name.startswith(HEADS) and task in name.split(".")]
        same_classes = run.classes.get(task, ()) == tuple(config.labels.classes.get(task, ()))
        return same_classes and all(name in taken.values for name in heads)

    def of_run(self, place: int, coefficients: Tensor, images: Tensor) -> Tensor:
        """Return the entropy of one run's predictions for images: the mean over pixels, the sum over its tasks."""
        state = {
            name: start + torch.tensordot(coefficients[row].to(start), differences, dims=1)
            for name, (row, start, differences) in self.shared.items()
        }
        tasks = self.tasks[place]
        output = functional_call(self.model, state | self.own[place], (images, tasks, tasks))
        return torch.stack([kind_of(task).entropy(output.logits[task]).mean() for task in tasks]).sum()

    def entropy(self, coefficients: Tensor, images: Tensor) -> Tensor:
        """Return the sum over the runs that have any."""
        places = [place for place, tasks in enumerate(self.tasks) if tasks]
        return torch.stack([self.of_run(place, coefficients, images) for place in places]).sum()

    def add_gradient(self, coefficients: Tensor, images: Tensor) -> float:
        """Add the gradient to that of the coefficients, run by run, to hold one's activations; return the entropy."""
        found = 0.0
        for place, tasks in enumerate(self.tasks):
            if tasks:
                entropy = self.of_run(place, coefficients, images)
                entropy.backward()
                found += float(entropy.detach())
        return found
