"""Run an exported package: onnxruntime, numpy and pillow; no torch.

Shapes: B images, C channels, H x W pixels.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from m3vit.errors import InputError
from m3vit.export.runtime.arrays import refusal, require_array
from m3vit.export.runtime.drawing import colourise as colourise
from m3vit.export.runtime.drawing import paint as paint
from m3vit.export.runtime.manifest import ALL as ALL
from m3vit.export.runtime.manifest import FORMAT as FORMAT
from m3vit.export.runtime.manifest import FORMAT_VERSION as FORMAT_VERSION
from m3vit.export.runtime.manifest import MANIFEST as MANIFEST
from m3vit.export.runtime.manifest import (
    PRECISIONS,
    budgets_of,
    check_passed,
    package_digests,
    read_manifest,
    with_budget,
)
from m3vit.export.runtime.manifest import file_entries as file_entries
from m3vit.export.runtime.opened import OpenedFiles
from m3vit.export.runtime.opened import PackageChanged as PackageChanged
from m3vit.export.runtime.ort import onnxruntime
from m3vit.export.runtime.processor import machine
from m3vit.export.runtime.sessions import Cache, Outputs, Sessions
from m3vit.heap import give_memory_back as give_memory_back
from m3vit.kinds import KINDS
from m3vit.pointers import check_no_link
from m3vit.pool import usable_cores

MAX_PATCHES = 8192  # of one image; memory grows with their square (a score matrix of 256 MiB for each head)
SMALL_MACS = 10**9  # multiply-accumulates of an image; below, there is little work to share between threads


class NotFinite(InputError):  # noqa: N818 (what it says, not that it is an error)
    """A prediction holds NaN or infinity: weights are damaged, or the input is extreme.

    `task`: of which; `images`: of which images, by their places among those given, `count` in all (None: as many as
    come).
    """

    def __init__(self, task: str, images: Sequence[int], count: int | None = None) -> None:
        self.task, self.images = task, tuple(images)
        of = f" of image {', '.join(map(str, self.images))}" if count != 1 else ""
        super().__init__(
            f"{task}{of} is not finite (NaN or infinity): the package's weights are damaged, or the input is extreme; "
            "try another image, or export the package again"
        )


class Package:
    """The graphs of a package, by task. A graph is loaded when it is first used; all share one weights file.

    `folder` is where it is, `manifest` the content of its manifest.json, `precision` the one of its graphs in use.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], precision: str, sessions: Sessions) -> None:
        self.folder, self.manifest, self.precision = folder, manifest, precision
        self._sessions = sessions
        self._one_backbone = False
        self._whole, self._by_budget = manifest, {manifest.get("budget"): self}

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        precision: str | None = None,
        threads: int | None = None,
        low_memory: bool = False,
        one_backbone: bool = False,
        cache: Path | str | None = None,
        verify: bool = True,
        budget: str | None = None,
    ) -> "Package":
        """Open a package.

        Args:
            folder: what `m3vit export onnx` wrote.
            precision: which of the package's precisions to run, such as int8; default: its first.
            threads: of onnxruntime, for each graph. None chooses by the size of the model, 0 takes one a usable core.
            low_memory: leave weights where they are, mapped from the file and shared by all tasks and processes,
                instead of laying them out anew for each graph; slower.
            one_backbone: run all tasks through one graph that takes the task as an input, and a small one for each
                head; the package must have been exported with it. Weights are in memory once, whatever the tasks.
            cache: a folder for graphs with weights laid out for this processor. Made when a graph is first used, and
                again if the package, the processor or onnxruntime changed; afterwards, loading is faster and takes
                less memory of its own.
            verify: refuse files, of the package and of the cache, that are not as they were written (sha256), and a
                package that did not pass the comparison with its model. False saves the time of hashing: all is then
                taken as it is now, at the caller's risk, for a package that was just verified.
            budget: which of the package's budgets to run, by its name; default: its first. `of`, and the argument of
                each prediction, switch between them.

        The manifest is checked in any case. A graph that is loaded later is the opened package's: after the folder was
        replaced by another package it comes from the old one or, where that is gone or was changed in place, is refused
        with `PackageChanged`; graphs in use do not change, but are refused once their weights are overwritten in place.

        Raises InputError for a missing or damaged manifest or file, and for what the package does not hold.
        """
        folder = Path(folder)
        if threads is not None and threads < 0:
            raise InputError(f"threads is {threads}: give 1 or more, 0 for one a core, or none to choose by the model")
        if low_memory and cache is not None:
            raise InputError("low_memory leaves weights as they are, a cache lays them out: choose one of the two")
        manifest = read_manifest(folder)
        check_no_link(folder / manifest["weights"]["file"], "the package's")
        precision = precision or manifest["precisions"][0]
        if precision not in manifest["precisions"]:
            there = f"{folder} holds {', '.join(manifest['precisions'])}, not {precision}: choose one of these"
            if precision not in PRECISIONS:
                raise InputError(f"{there}; an export can hold {', '.join(PRECISIONS)}")
            raise InputError(f"{there}, or export it with --precision {precision}")
        if one_backbone and not manifest["backbone"]:
            raise InputError(f"{folder} has no graph of the backbone alone: export it with --one-backbone")
        files = OpenedFiles(folder, package_digests(manifest), "export it again")
        if verify:
            check_passed(folder, manifest)
            for name in files.digests:
                files.check(name)
        else:
            files.trust()
        threads = default_threads(manifest) if threads is None else threads or usable_cores()
        kept = None if cache is None else Cache(Path(cache), machine(), verify)
        sessions = Sessions(files, manifest["weights"]["file"], threads, low_memory, kept)
        package = cls(folder, manifest, precision, sessions)
        package._one_backbone = one_backbone
        return package if budget is None else package.of(budget)

    @property
    def budgets(self) -> list[str]:
        """The names of the package's budgets, the default first; none of a package with one that has no name."""
        return budgets_of(self._whole)

    def of(self, budget: str | None) -> "Package":
        """Return the package under one of its budgets (None: this one): the same graphs, loaded once for all of them.

        Raises InputError for a name that the package does not have.
        """
        if budget is None or budget == self.manifest.get("budget"):
            return self
        if budget not in self._by_budget:
            manifest = with_budget(self._whole, budget, self.folder)
            other = Package(self.folder, manifest, self.precision, self._sessions)
            other._whole, other._by_budget, other._one_backbone = self._whole, self._by_budget, self._one_backbone
            self._by_budget[budget] = other
        return self._by_budget[budget]

    @property
    def tasks(self) -> list[str]:
        """The names of the package's tasks."""
        return list(self.manifest["tasks"])

    def entry(self, task: str) -> dict[str, Any]:
        """Return what the manifest says about a task, or raise InputError."""
        if not isinstance(task, str) or task not in self.manifest["tasks"]:
            raise InputError(f"this package has no task {task!r}: it has {', '.join(self.tasks)}")
        return dict(self.manifest["tasks"][task])

    def session(self, task: str) -> onnxruntime.InferenceSession:
        """Return the onnxruntime session of a task's graph; input `image`, output named like the task."""
        entry = self.entry(task)
        return self._sessions.get(entry["graphs"][self.precision], ("image",), {task: entry["channels"]})

    @property
    def all_at_once(self) -> bool:
        """Whether one graph computes all tasks: the package holds it (--all-tasks), and one_backbone was not asked."""
        return bool(self.manifest.get("all_tasks")) and not self._one_backbone

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn RGB images uint8 [B, H, W, 3] into the graphs' input float32 [B, 3, H, W]."""
        image = self.manifest["image"]
        scaled = images.astype(np.float32) / np.float32(255)
        normal = (scaled - np.float32(image["mean"])) / np.float32(image["std"])
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))

    def logits(self, images: NDArray[Any], task: str, *, budget: str | None = None) -> NDArray[np.float32]:
        """Return the logits float32 [B, C, H, W] of a task, at the images' size, under a budget of the package.

        `images` are RGB uint8 [B, H, W, 3], or already normalised float32 [B, 3, H, W]. Raises InputError for
        another shape or type, and for a size that the graph does not take (`predict` resizes); `NotFinite` for logits
        that are no numbers.
        """
        if budget is not None:
            return self.of(budget).logits(images, task)
        images = self._ready(images, task)
        return _finite(_joined([self._run(part, task) for part in self._parts(images, task)]), task)

    def logits_all(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Return the logits of every task, {task: float32 [B, C, H, W]}; images and errors as `logits` says.

        Where the package has a graph of all tasks at once (`all_at_once`), and the images are not so large that the
        attention of all tasks would take gigabytes, that one runs; else one task's after the other's. The results are
        the same up to rounding; of graphs in integers, that of a scale taken over the tokens of all tasks.
        """
        ready = self._ready(images, self.tasks[0])
        if not self.all_at_once or self._patches(ready.shape[2:]) * len(self.tasks) > MAX_PATCHES:
            return {task: self.logits(ready, task) for task in self.tasks}
        graph = self.manifest["all_tasks"]["graphs"][self.precision]
        outputs: Outputs = {task: self.entry(task)["channels"] for task in self.tasks}
        runs = [self._sessions.run(graph, {"image": part}, outputs) for part in self._parts(ready, self.tasks[0])]
        joined = (_joined(parts) for parts in zip(*runs, strict=True))
        return {task: _finite(logits, task) for task, logits in zip(self.tasks, joined, strict=True)}

    def _ready(self, images: NDArray[Any], task: str) -> NDArray[np.float32]:
        """Return images as the graph of a task takes them, normalised, or raise InputError as `logits` says."""
        require_array(images, "images are", "uint8 [B, H, W, 3], or float32 [B, 3, H, W] normalised")
        if images.ndim != 4 or images.size == 0:
            raise InputError(f"images have shape {images.shape}: give [B, H, W, 3] uint8 or [B, 3, H, W] float32")
        if images.dtype == np.uint8 and images.shape[3] == 3:
            images = self.normalise(images)
        elif images.dtype != np.float32 or images.shape[1] != 3:
            raise InputError(
                f"images are {images.dtype} {images.shape}: give uint8 [B, H, W, 3], or float32 [B, 3, H, W] normalised"
            )
        elif not np.isfinite(images).all():  # a graph in integers would make numbers of it
            damaged = [place for place, one in enumerate(images) if not np.isfinite(one).all()]
            raise InputError(f"images hold NaN or infinity (in {', '.join(map(str, damaged))}): give finite values")
        height, width = images.shape[2:]
        if (target := self._graph_size(task, height, width)) != (height, width):
            raise InputError(
                f"{task} cannot run on {height}x{width} images: resize them to {target[0]}x{target[1]}, "
                "or predict one at a time"
            )
        return images

    def _parts(self, images: NDArray[np.float32], task: str) -> list[NDArray[np.float32]]:
        """Return images in batches that the graph of a task takes: one by one, if it is static."""
        step = self.entry(task)["batch"] or len(images)
        return [images[start : start + step] for start in range(0, len(images), step)]

    def _run(self, images: NDArray[np.float32], task: str) -> NDArray[np.float32]:
        """Run a task's graph, or the backbone and the task's head, on normalised images that it takes."""
        entry, run = self.entry(task), self._sessions.run
        if not self._one_backbone:
            return run(entry["graphs"][self.precision], {"image": images}, {task: entry["channels"]})[0]
        inputs = {"image": images, "task": np.array([entry["number"]])}
        (features,) = run(self.manifest["backbone"]["graphs"][self.precision], inputs, {"features": None})
        return run(entry["heads"][self.precision], {"features": features}, {task: entry["channels"]})[0]

    @overload
    def predict(  # type: ignore[overload-overlap]
        self, image: NDArray[np.uint8], task: Literal["all"], *, resize: bool = False, budget: str | None = None
    ) -> dict[str, NDArray[Any]]: ...

    @overload
    def predict(
        self, image: NDArray[np.uint8], task: str, *, resize: bool = False, budget: str | None = None
    ) -> NDArray[Any]: ...

    def predict(
        self, image: NDArray[np.uint8], task: str, *, resize: bool = False, budget: str | None = None
    ) -> NDArray[Any] | dict[str, NDArray[Any]]:
        """Return a task's prediction for one RGB image uint8 [H, W, 3], at the image's own size.

        `budget`: which of the package's budgets is run (default: the one it was opened with).

        semseg: class ids uint8 [H, W]. depth: metres float32 [H, W]. normals: unit vectors float32 [H, W, 3],
        x right, y up, z towards the camera. edge: probability float32 [H, W]. all: {task: prediction} of every task,
        computed at once where the package can (`logits_all`).

        A graph of dynamic size takes every image of at least one patch; where the patch size does not divide the
        image, the nearest size that it does divide is used, and the result resized back. With `resize` the image is
        taken at the size the graph is fixed to, or, if dynamic, the size the model was trained at: less memory for
        large photographs. Raises InputError for an image of another type or shape, an unknown task, and, without
        `resize`, for an image that is too small, too large (MAX_PATCHES) or not of the graph's fixed size; `NotFinite`
        for a prediction that is no number.
        """
        require_array(image, "image is", "uint8 [H, W, 3], RGB")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise InputError(f"image is {image.dtype} {image.shape}: give uint8 [H, W, 3], RGB")
        if budget is not None:
            return self.of(budget).predict(image, task, resize=resize)
        if task == ALL:
            return self._predict_all(image, resize)
        prediction: NDArray[Any] = self.predict_batch(image[None], task, resize=resize)[0]
        return prediction

    def _predict_all(self, image: NDArray[np.uint8], resize: bool) -> dict[str, NDArray[Any]]:
        if not self.all_at_once:
            return {task: self.predict(image, task, resize=resize) for task in self.tasks}
        height, width = image.shape[:2]
        target = self._target(self.tasks[0], height, width, resize)
        ready = image if target == (height, width) else _resized_image(image, target)
        predictions = {}
        for task, logits in self.logits_all(ready[None]).items():
            kind = KINDS[self.entry(task)["decode"]]
            decoded = kind.decode(logits)[0]
            predictions[task] = decoded if target == (height, width) else kind.resized(decoded, (height, width))
        return predictions

    @overload
    def predict_batch(
        self, images: NDArray[np.uint8], task: str, *, resize: bool = False, return_exceptions: Literal[False] = False
    ) -> NDArray[Any]: ...

    @overload
    def predict_batch(
        self, images: NDArray[np.uint8], task: str, *, resize: bool = False, return_exceptions: Literal[True]
    ) -> list[NDArray[Any] | InputError]: ...

    def predict_batch(
        self, images: NDArray[np.uint8], task: str, *, resize: bool = False, return_exceptions: bool = False
    ) -> NDArray[Any] | list[NDArray[Any] | InputError]:
        """Return the predictions of RGB images uint8 [B, H, W, 3], each as `predict` says: [B, H, W] or [B, H, W, 3].

        Batches of which an onnxruntime run would need too much memory (MAX_PATCHES in all) are run in parts.

        An image whose prediction is not finite raises `NotFinite` with its place in the batch. With
        `return_exceptions` the others are kept: a list of B, each the prediction or the `NotFinite` of its image.
        """
        require_array(images, "images are", "uint8 [B, H, W, 3], RGB")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.size == 0:
            raise InputError(f"images are {images.dtype} {images.shape}: give uint8 [B, H, W, 3], RGB")
        height, width = images.shape[1:3]
        entry = self.entry(task)
        target = self._target(task, height, width, resize)
        at_once = max(1, MAX_PATCHES // self._patches(target))
        if target != (height, width):
            images = np.stack([_resized_image(image, target) for image in images])
        results: list[NDArray[Any] | InputError] = []
        for start in range(0, len(images), at_once):
            results += self._decoded(images[start : start + at_once], task, start, len(images))
        for place, one in enumerate(results):
            if isinstance(one, InputError) and not return_exceptions:
                raise one
            if not isinstance(one, InputError) and target != (height, width):
                results[place] = KINDS[entry["decode"]].resized(one, (height, width))
        return results if return_exceptions else np.stack(results)  # type: ignore[arg-type]

    def _decoded(self, images: NDArray[np.uint8], task: str, start: int, count: int) -> list[NDArray[Any] | InputError]:
        """Return the prediction, or what is wrong with it, of each of some images: those from `start` of `count`."""
        try:
            return list(KINDS[self.entry(task)["decode"]].decode(self.logits(images, task)))
        except NotFinite:
            if len(images) == 1:
                return [NotFinite(task, [start], count)]
            parts = [self._decoded(images[n : n + 1], task, start + n, count) for n in range(len(images))]
            return [one for part in parts for one in part]

    @overload
    def predict_iter(
        self,
        images: Iterable[NDArray[np.uint8]],
        task: str,
        *,
        resize: bool = False,
        return_exceptions: Literal[False] = False,
    ) -> Iterator[NDArray[Any]]: ...

    @overload
    def predict_iter(
        self, images: Iterable[NDArray[np.uint8]], task: str, *, resize: bool = False, return_exceptions: Literal[True]
    ) -> Iterator[NDArray[Any] | InputError]: ...

    def predict_iter(
        self,
        images: Iterable[NDArray[np.uint8]],
        task: str,
        *,
        resize: bool = False,
        return_exceptions: bool = False,
    ) -> Iterator[NDArray[Any] | InputError]:
        """Yield the prediction of each image as it comes: for streams, and sets that do not fit in memory.

        An image that `predict` refuses ends it with an InputError that names its place. With `return_exceptions` that
        error is yielded in its place, and the next image follows.
        """
        self.entry(task)  # an unknown task is noticed now, not with the first image
        try:
            if isinstance(images, str | bytes | os.PathLike):
                raise TypeError
            stream = iter(images)
        except TypeError:
            raise refusal(images, "images are", "an iterable of uint8 [H, W, 3], RGB") from None
        return self._predict_iter(stream, task, resize, return_exceptions)

    def _predict_iter(
        self, images: Iterator[NDArray[np.uint8]], task: str, resize: bool, return_exceptions: bool
    ) -> Iterator[NDArray[Any] | InputError]:
        result: NDArray[Any] | InputError
        for place, image in enumerate(images):
            try:
                result = self.predict(image, task, resize=resize)
            except NotFinite:
                result = NotFinite(task, [place])
            except InputError as error:
                result = InputError(f"image {place}: {error}")
            if isinstance(result, InputError) and not return_exceptions:
                raise result
            yield result

    def _patches(self, size: Sequence[int]) -> int:
        """Return how many patches an image of (height, width) has."""
        patch = self.entry(self.tasks[0])["patch_multiple"]
        return int(size[0] // patch) * int(size[1] // patch)

    def _target(self, task: str, height: int, width: int, resize: bool) -> tuple[int, int]:
        """Return the size (height, width) to run an image at, or raise InputError as `predict` says."""
        entry = self.entry(task)
        fixed, patch = entry["input_size"], entry["patch_multiple"]
        if resize:
            chosen = fixed or self.manifest["image"]["train_size"]
            return chosen[0], chosen[1]
        if fixed and tuple(fixed) != (height, width):
            raise InputError(
                f"the image is {height}x{width} (height x width) and {task} was exported for {fixed[0]}x{fixed[1]} "
                "only: give such images, allow resizing, or export without a fixed size"
            )
        if min(height, width) < patch:
            raise InputError(f"the image is {height}x{width} (height x width): {task} needs at least {patch}x{patch}")
        target = self._graph_size(task, height, width)
        patches = self._patches(target)
        if patches > MAX_PATCHES and not fixed:
            raise InputError(
                f"the image is {height}x{width} (height x width), {patches} patches of {patch}x{patch}: attention over "
                f"more than {MAX_PATCHES} takes gigabytes; allow resizing (--resize), or give a smaller image"
            )
        return target

    def _graph_size(self, task: str, height: int, width: int) -> tuple[int, int]:
        """Return the size (height, width) nearest to the given one that the task's graph takes."""
        entry = self.entry(task)
        if entry["input_size"]:
            return entry["input_size"][0], entry["input_size"][1]
        patch = entry["patch_multiple"]
        return max(patch, round(height / patch) * patch), max(patch, round(width / patch) * patch)


def _joined(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the batches of several runs as one, without a copy where there was one run."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _finite(logits: NDArray[np.float32], task: str) -> NDArray[np.float32]:
    """Return the logits of a task, or raise `NotFinite` with the places of those that are no numbers."""
    if not np.isfinite(logits).all():
        damaged = [place for place, one in enumerate(logits) if not np.isfinite(one).all()]
        raise NotFinite(task, damaged, len(logits))
    return logits


def default_threads(manifest: dict[str, Any]) -> int:
    """Return the threads to use for a package: one a core that may be used, but at most two for small models.

    A model of 0.05 billion multiply-accumulates still took 0.8 of the time on two threads; more were not measured.
    """
    return min(2, usable_cores()) if manifest["macs"] < SMALL_MACS else usable_cores()


def _resized_image(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
