"""The layout `folder`: somebody's own data, as its data.yaml describes them. No torch."""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from m3vit.data.own.description import FILE, Description, open_description
from m3vit.data.own.files import Fault, Found, find, refuse
from m3vit.data.own.labels import read_label
from m3vit.data.reading import Size, image_size, image_turn, read_image
from m3vit.data.sample import FileSplit, Sample, check_shape, no_label
from m3vit.data.thinning import thin
from m3vit.errors import Defect, InputError
from m3vit.label_sets import LabelSet
from m3vit.normalisation import Normalisation
from m3vit.pool import run_jobs

MASKS_PER_JOB = 32
FEW_JOBS = 16  # sooner done here than processes are started


class Folder(FileSplit):
    """One split of a folder with a data.yaml.

    An image may lack labels of some tasks: those it has not are ignored or invalid everywhere. Images without a label
    of any of the tasks are not in the split. Labels of another size than the image are resized to it, nearest pixel.
    """

    name = "folder"
    title = "a folder with a data.yaml"
    described = FILE
    label_set = ""  # of each folder its own
    listings = FILE
    folders: ClassVar = {}
    releases: ClassVar = {}

    def __init__(
        self,
        root: str | Path,
        split: str,
        tasks: Sequence[str] | None = None,
        partial: bool = False,
        label_set: str = "",
    ) -> None:
        if not Path(root).is_dir():
            raise InputError(f"data root {Path(root)} not found: give the folder that holds {FILE} with --data.root")
        self.description = open_description(Path(root))
        tasks = tuple(self.description.tasks) if tasks is None else tasks
        self._begin(root, split, tasks, partial, label_set or self.description.label_set())
        found = find(self.description, self.tasks)
        refuse(self.description, found.faults)
        if split not in found.splits:
            raise InputError(f"{self.root / FILE} has no split {split}: it has {', '.join(found.splits)}")
        self._take(found)
        if not self.ids:
            words = f"no image of {split} has a label of {', '.join(self.tasks)}"
            raise InputError(f"{self.root}: {words}: change splits in {FILE}, or leave out tasks")

    def _take(self, found: Found) -> None:
        self.release = self.description.name
        self.files = found.files
        ids = found.splits.get(self.split, ())
        self.ids = tuple(found.labelled(ids, self.tasks) if self.tasks else ids)

    @classmethod
    def of(cls, description: Description, found: Found, split: str, tasks: Sequence[str]) -> "Folder":
        """Return a split of what was found, whatever is wrong with it: for the doctor, who says so."""
        self = object.__new__(cls)
        self.root, self.split, self.partial = description.folder, split, False
        self.description, self.label_set, self.tasks = description, description.label_set(), tuple(tasks)
        self._take(found)
        return self

    @classmethod
    def recognises(cls, root: Path) -> bool:
        """Return whether a folder has a data.yaml."""
        return (root / FILE).is_file()

    @classmethod
    def label_set_of(cls, root: str | Path) -> str:
        """Return the label set that data.yaml describes, or raise InputError."""
        if not str(root):
            raise InputError("data.layout folder takes its classes from data.yaml: give its folder as --data.root DIR")
        return open_description(Path(root)).label_set()

    @classmethod
    def normalisation_of(cls, root: str | Path) -> Normalisation | None:
        """Return the mean and std that data.yaml gives."""
        return open_description(Path(root)).normalisation

    @classmethod
    def misfit(cls, labels: LabelSet, tasks: Sequence[str], root: str | Path = "") -> str:
        """Return why the files do not label these tasks of a label set; nothing without a data.yaml to compare with."""
        if not str(root) or not cls.recognises(Path(root)):
            return ""  # of a finished run, which has its own description; opening a split says what is missing
        own = open_description(Path(root)).tasks
        if absent := [task for task in tasks if task not in own]:
            return f"it has no files for {', '.join(absent)}: leave them out of model.tasks ({', '.join(own)})"
        for task in tasks:
            ours, theirs = own[task].classes, labels.classes.get(task, ())
            if tuple(theirs) != ours:
                place = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if len({*pair}) > 1), None)
                words = f"{len(theirs)} classes of {task}, but {len(ours)} in {FILE}"
                if place is not None and len(ours) == len(theirs):
                    words = f"class {place} of {task} is {theirs[place]}, but {ours[place]} in {FILE}"
                return f"{words}: put back the {FILE} that the model was trained with, or train again"
        if "edge" in tasks and labels.edge_max_dist != own["edge"].max_dist:
            return f"edge_max_dist is {labels.edge_max_dist}, but {own['edge'].max_dist} in {FILE}: give the same"
        return ""

    @property
    def counts(self) -> dict[str, int]:
        """How many images of the split have a label, by task."""
        return {task: sum(name in self.files[task] for name in self.ids) for task in self.tasks}

    def has(self, index: int, kind: str) -> bool:
        """Return whether there is such a file for an image."""
        return self.ids[index] in self.files[kind]

    def place(self, kind: str) -> str:
        """Return the patterns of images or of a task's files."""
        return ", ".join(self.description.images if kind == "image" else self.description.tasks[kind].patterns)

    def path(self, index: int, kind: str) -> Path:
        """Return the file of an image or label, which need not exist."""
        name = self.ids[index]
        file = self.files[kind].get(name) or self.description.tasks[kind].patterns[0].replace("{id}", name)
        return self.description.root / file

    def read(self, index: int, kind: str, size: Size | None = None) -> NDArray:
        """Read an image or label as `load` returns it; `size` is the image's, read from its header if not given."""
        path = self.path(index, kind)
        if kind == "image":
            return read_image(path)
        if not self.has(index, kind):
            raise InputError(
                f"{path} not found: the image is not labelled", defect=Defect(path, "missing", "not found")
            )
        image = self.path(index, "image")
        turn = partial(image_turn, image)
        return read_label(path, self.description.tasks[kind], size or image_size(image), turn)

    def edge_truth(self, index: int) -> NDArray[np.bool_]:
        """Return the edges [H, W] of the labels, thinned."""
        return thin(self.read(index, "edge") == 1)

    def load(self, index: int) -> Sample:
        """Read one sample; a label that there is no file of is one that the image has not, whatever `partial` says."""
        image = self.read(index, "image")
        size = image.shape[0], image.shape[1]
        sample = Sample(self.ids[index], image, {})
        for task in self.tasks:
            if not self.has(index, task):
                sample.labels[task], sample.unlabelled[task] = no_label(task, size), ""
                continue
            try:
                sample.labels[task] = self.read(index, task, size)
                check_shape(self.path(index, task), task, sample.labels[task], size)
            except InputError as error:
                if not self.partial:
                    raise
                sample.labels[task], sample.unlabelled[task] = no_label(task, size), str(error)
        return sample

    def coverage(self) -> str:
        counts = self.counts
        if all(count == len(self) for count in counts.values()):
            return f"{len(self)} {self.split} images"
        return f"{len(self)} {self.split} images, with " + ", ".join(f"{task} {n}" for task, n in counts.items())


def refuse_masks(splits: Sequence[Folder], workers: int, progress: Callable[[int, int], None] | None = None) -> None:
    """Open every mask of classes; raise one InputError that names those that cannot be read or have other ids."""
    jobs = [
        (place, task, start)
        for place, split in enumerate(splits)
        for task in split.tasks
        if split.description.tasks[task].classes
        for start in range(0, len(split), MASKS_PER_JOB)
    ]
    faults = []
    workers = workers if len(jobs) >= FEW_JOBS else 1
    with closing(run_jobs(_read_masks, jobs, workers, initializer=_begin, initargs=(list(splits),))) as finished:
        for done, found in enumerate(finished, 1):
            faults += found
            if progress:
                progress(done, len(jobs))
    if faults:
        refuse(splits[0].description, faults, "; or train on what can be read with --data.on_error skip")


_splits: list[Folder] = []  # in each process of the pool


def _begin(splits: list[Folder]) -> None:
    _splits[:] = splits


def _read_masks(job: tuple[int, str, int]) -> list[Fault]:
    """Return what is wrong with some masks of a task."""
    split, task, start = _splits[job[0]], job[1], job[2]
    found = []
    for index in range(start, min(start + MASKS_PER_JOB, len(split))):
        if split.has(index, task):
            try:
                split.read(index, task)
            except InputError as error:
                found.append(Fault("values", str(error), split.split, split.ids[index]))
    return found
