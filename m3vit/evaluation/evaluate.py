"""Score anything that turns images into logits, on one split, under one protocol, beside a trivial predictor."""

import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3vit.data.network_input import image_tensor, normalise
from m3vit.data.sample import Sample, Split
from m3vit.errors import InputError
from m3vit.evaluation.edge_pool import EdgeScorer
from m3vit.evaluation.meters import Statistics, check_meter, make_meter
from m3vit.evaluation.protocols import NetworkImage, as_read, as_stored, network_image
from m3vit.kinds import as_json
from m3vit.label_sets import LABEL_SETS
from m3vit.models.budget import FULL, Budget
from m3vit.models.finite import is_finite
from m3vit.models.multitask import MultiTaskModel
from m3vit.normalisation import Normalisation
from m3vit.tasks import TASKS, kind_of

Scores = dict[str, dict[str, float]]  # {task: {metric: value}}
Progress = Callable[[int, int], None]
Keep = Callable[[str, str, Tensor, NDArray[Any]], None]  # takes id, task, what is stored (`as_stored`), label


@dataclass
class Predictor:
    """Something that is scored.

    `run` takes up to `batch` images of `size` (height, width) and returns logits {task: [n, C, h, w]}, at any
    resolution.
    """

    name: str
    tasks: Sequence[str]
    label_set: str
    size: tuple[int, int]
    run: Callable[[list[NetworkImage]], dict[str, Tensor]]
    batch: int = 1


@dataclass
class Evaluation:
    """Per-image statistics of each task [n, K], in the order of `ids`, and how they were made.

    `fingerprints` [n] tell images apart: the CRC of an image's pixels; `label_prints` [n] those of its labels (none of
    an evaluation from before they were noted). `errors` are messages of images left out,
    `unlabelled` by task those of missing labels, whose images' statistics are all zero. `breakdowns` are sums of
    `Meter.breakdown` over the images, by task that has one; none if `quick`; of an evaluation that was read from files
    `told` has what was made of them.
    """

    protocol: str
    label_set: str
    ids: list[str]
    statistics: dict[str, Statistics]
    quick: bool = False
    errors: list[str] = field(default_factory=list)
    fingerprints: list[int] = field(default_factory=list)
    label_prints: list[int] = field(default_factory=list)
    unlabelled: dict[str, list[str]] = field(default_factory=dict)
    breakdowns: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] | None = None

    def explained(self) -> dict[str, dict[str, Any]]:
        """Return the breakdown of errors of each task that has one, as `Meter.explained` does."""
        if self.told is not None:
            return self.told
        meters = {task: make_meter(task, self.label_set, self.protocol) for task in self.breakdowns}
        return {task: meters[task].explained(total) for task, total in self.breakdowns.items()}

    def scores(self) -> Scores:
        """Return the metrics of each task over all images."""
        result: Scores = {}
        for task, rows in self.statistics.items():
            meter = make_meter(task, self.label_set, self.protocol, self.quick)
            result[task] = {name: float(value) for name, value in meter.compute(rows.sum(axis=0)).items()}
        return result


def fingerprint(image: NDArray[np.uint8]) -> int:
    """Return what tells an image [H, W, 3] from others: the CRC of its pixels."""
    return zlib.crc32(image.tobytes())


def label_print(sample: Sample, tasks: Sequence[str]) -> int:
    """Return what tells the labels of an image, of some tasks, from others: the CRC of their values, in order."""
    found = 0
    for task in sorted(tasks):
        there = b"-" if task in sample.unlabelled else np.ascontiguousarray(sample.labels[task]).tobytes()
        found = zlib.crc32(there, zlib.crc32(task.encode(), found))
    return found


def normalised(images: list[NetworkImage], normalisation: Normalisation) -> Tensor:
    """Return the network's input float32 [n, 3, H, W]; padding is zero."""
    batch = []
    for image in images:
        pixels = normalise(image_tensor(image.pixels), normalisation)
        inside = torch.zeros_like(pixels)
        inside[:, image.rows, image.columns] = pixels[:, image.rows, image.columns]
        batch.append(inside)
    return torch.stack(batch)


def torch_predictor(model: MultiTaskModel, batch: int = 1, budget: Budget = FULL) -> Predictor:
    """Return the model, with what a budget uses of it, as a predictor: all tasks in one pass, where its parameters are.

    Raises InputError for a budget that the model cannot keep to.
    """
    model.uses(budget, model.config.tasks)
    config = model.config
    height, width = config.image_size

    @torch.inference_mode()
    def run(images: list[NetworkImage]) -> dict[str, Tensor]:
        model.eval()
        inputs = normalised(images, model.normalisation)
        logits = model(inputs.to(next(model.parameters()).device), budget=budget).logits
        return {task: value.float().cpu() for task, value in logits.items()}

    return Predictor("torch", config.tasks, config.label_set, (height, width), run, batch)


def evaluate(
    split: Split,
    predictor: Predictor,
    protocol: str = "A",
    *,
    indices: Sequence[int] | None = None,
    quick: bool = False,
    skip_unreadable: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Evaluation:
    """Return the statistics of the predictor's tasks over the images `indices` (default: all) of a split.

    `quick` scores edges pixel by pixel instead of by odsF. An unreadable file raises InputError naming it, or with
    `skip_unreadable` its image is left out and the message kept; the labels that an image of a partial split lacks are
    left out of their task's statistics. Edges are matched in `workers` processes. `keep` gets every prediction.
    """
    if predictor.label_set != split.label_set:
        raise InputError(
            f"the model predicts the classes of {predictor.label_set}, the data are {split.label_set}: give data of "
            "the label set it was trained on"
        )
    tasks = predictor.tasks
    meters = {task: check_meter(task, split.label_set, protocol, quick) for task in tasks}
    y_down = LABEL_SETS[split.label_set].normals_y_down
    chosen = list(range(len(split)) if indices is None else indices)
    result = Evaluation(protocol, split.label_set, [], {}, quick, unlabelled={task: [] for task in tasks})
    rows: dict[str, list[Statistics]] = {task: [] for task in tasks}
    with ExitStack() as stack:
        matched = [task for task in tasks if TASKS[task].on_edge_truth(quick)]
        edges = {task: stack.enter_context(EdgeScorer(split, task, protocol, workers)) for task in matched}
        for start in range(0, len(chosen), predictor.batch):
            samples: list[tuple[int, Sample]] = []
            for index in chosen[start : start + predictor.batch]:
                try:
                    samples.append((index, split.load(index)))
                except InputError as error:
                    if not skip_unreadable:
                        raise
                    result.errors.append(str(error))
            if not samples:
                continue
            images = [network_image(protocol, sample.id, sample.image, predictor.size) for _, sample in samples]
            logits = predictor.run(images)
            for place, (image, (index, sample)) in enumerate(zip(images, samples, strict=True)):
                result.ids.append(sample.id)
                result.fingerprints.append(fingerprint(sample.image))
                result.label_prints.append(label_print(sample, tasks))
                for task in tasks:
                    if not is_finite(logits[task][place]):
                        raise InputError(
                            f"{predictor.name} predicts {task} of image {sample.id} as numbers that are not finite: "
                            "its weights are damaged or training diverged"
                        )
                    if task in sample.unlabelled:
                        result.unlabelled[task].append(sample.unlabelled[task])
                    size = sample.image.shape[:2]
                    stored = as_stored(protocol, task, logits[task][place], image, size, y_down=y_down)
                    guess = as_read(protocol, task, stored, y_down=y_down)
                    if keep:
                        keep(sample.id, task, stored, sample.labels[task])
                    if task in edges and task in sample.unlabelled:
                        edges[task].leave_out()
                    elif task in edges:
                        edges[task].submit(index, guess)
                    else:
                        rows[task].append(meters[task].image(guess, sample.labels[task]))
                        broken = None if quick else meters[task].breakdown(guess, sample.labels[task])
                        if broken is not None:
                            result.breakdowns[task] = result.breakdowns.get(task, 0) + broken
            if progress:
                progress(min(start + predictor.batch, len(chosen)), len(chosen))
        rows |= {task: scorer.results() for task, scorer in edges.items()}
    if not result.ids:
        raise InputError(f"no image could be scored: {'; '.join(result.errors[:2]) or 'the split is empty'}")
    result.statistics = {task: np.stack(found) for task, found in rows.items()}
    return result


def untrained_classes(tallies: dict[str, NDArray[np.float64]], label_set: str) -> dict[str, list[str]]:
    """Return, by task with classes, the names of those that no training label has, from sums of `Kind.tally`."""
    result = {}
    for task, tally in tallies.items():
        ids = kind_of(task).classes_in(tally)
        if ids is not None:
            names = LABEL_SETS[label_set].classes[task]
            result[task] = [name for place, name in enumerate(names) if place not in ids]
    return result


def read_untrained_classes(split: Split, progress: Progress | None = None) -> dict[str, list[str]]:
    """Return the same of a split of training images, of whose labels those that cannot be read are left out."""
    sums: dict[str, NDArray[np.float64]] = {}
    tasks = [task for task in split.tasks if task in LABEL_SETS[split.label_set].classes]
    for index in range(len(split)) if tasks else ():
        for task in tasks:
            try:
                sums[task] = sums.get(task, 0) + kind_of(task).tally(split.read(index, task))
            except InputError:
                continue
        if progress:
            progress(index + 1, len(split))
    return untrained_classes(sums, split.label_set)


class TrivialPredictor:
    """Predicts the same for every pixel of every image: what a network that looks at nothing could do.

    Fitted on the training labels: the most frequent class, the mean depth, the mean normal; every pixel an edge and
    salient, the best constant there is for F. `constants` has the share of edges and of salient pixels all the same.
    `left_out`: labels that could not be read. `untrained`: as `untrained_classes` returns them.
    """

    def __init__(
        self,
        constants: dict[str, Any],
        label_set: str,
        left_out: int = 0,
        untrained: dict[str, list[str]] | None = None,
    ) -> None:
        self.constants, self.label_set, self.left_out, self.untrained = constants, label_set, left_out, untrained

    @classmethod
    def fit(cls, split: Split, progress: Progress | None = None) -> "TrivialPredictor":
        """Read every label of a split once; of a partial one those that can be read."""
        sums: dict[str, NDArray[np.float64]] = {}
        left_out = 0
        for index in range(len(split)):
            try:
                sample = split.load(index)
            except InputError:
                if not split.partial:
                    raise
                left_out += len(split.tasks)
                continue
            left_out += sum(bool(text) for text in sample.unlabelled.values())
            for task, label in sample.labels.items():
                sums[task] = sums.get(task, 0) + kind_of(task).tally(label)
            if progress:
                progress(index + 1, len(split))
        constants = {task: as_json(kind_of(task).constant(total)) for task, total in sums.items()}
        return cls(constants, split.label_set, left_out, untrained_classes(sums, split.label_set))

    def predictor(self, size: tuple[int, int]) -> Predictor:
        """Return it as a predictor of constant logits."""
        vectors = {}
        for task, constant in self.constants.items():
            channels = LABEL_SETS[self.label_set].channels(task)
            vectors[task] = torch.from_numpy(kind_of(task).constant_logits(constant, channels))

        def run(images: list[NetworkImage]) -> dict[str, Tensor]:
            return {task: vector.view(1, -1, 1, 1).expand(len(images), -1, 1, 1) for task, vector in vectors.items()}

        return Predictor("trivial", list(self.constants), self.label_set, size, run)
