"""What every loader returns, and what loaders of files have in common. No torch."""

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from m3vit.data.reading import Size, ending, naming, other_spelling
from m3vit.errors import Defect, InputError
from m3vit.files import not_there, read_bounded, special
from m3vit.label_sets import LABEL_SETS, LabelSet, resolve
from m3vit.normalisation import Normalisation
from m3vit.tasks import TASKS, kind_of


@dataclass
class Sample:
    """One image [H, W, 3] uint8 and its labels, in the conventions of m3vit.tasks.

    semseg, human_parts, saliency, edge [H, W] uint8; depth [H, W] float32; normals [H, W, 3] float32. Where the label
    of a task is missing or cannot be read (`Split.partial`), it is ignored or invalid everywhere, and `unlabelled` says
    why: nothing, where data of one's own (m3vit.data.own) just have none.
    """

    id: str
    image: NDArray[np.uint8]
    labels: dict[str, NDArray]
    unlabelled: dict[str, str] = field(default_factory=dict)


class Ranges(NamedTuple):
    """What the pipeline m3vit draws from: zooms (the ends of a range, or the values to choose from) and a rotation.

    With a rotation, up to `rotation_deg` to either side, the zoom is of the range.
    """

    zoom: tuple[float, ...]
    rotation_deg: float


class Split(Protocol):
    """One split of a data set: `ids` of its images, the `tasks` whose labels `load` reads.

    `partial`: an image may lack labels of some tasks.
    """

    label_set: str  # key of m3vit.label_sets.LABEL_SETS
    release: str  # of the data set, as found on disk
    root: Path
    split: str
    ids: Sequence[str]
    tasks: Sequence[str]
    partial: bool
    m3vit_ranges: Ranges | None  # of the data set's images, None if nobody published any

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return what `path` and `read` take: "image" and the tasks."""
        ...

    def __len__(self) -> int: ...

    def coverage(self) -> str:
        """Return in words how many images have a label of each task; "" where all are to have all."""
        ...

    def has(self, index: int, kind: str) -> bool:
        """Return whether an image is to have such a file."""
        ...

    def path(self, index: int, kind: str) -> Path:
        """Return the file of an image or label, which need not exist."""
        ...

    def read(self, index: int, kind: str, size: Size | None = None) -> NDArray:
        """Read an image or label as `load` returns it; `size` is the image's, read from its header if not given."""
        ...

    def load(self, index: int) -> Sample:
        """Read one sample, or raise InputError naming the file that is missing, damaged or of the wrong size."""
        ...

    def edge_truth(self, index: int) -> NDArray[np.bool_]:
        """Return the boundary pixels [H, W] that odsF is scored against; not the labels trained on."""
        ...


class FileSplit(ABC):
    """One split of a layout: a data set as files. A layout is a subclass (m3vit.data.opening.LAYOUTS).

    It says where which files are, and `read` reads one. Nothing is ever written into `root`.

    name: of the layout (`data.layout`); title: of the data set, in words; described: its folders, in words.
    label_set: what it labels, if nobody names another list of as many classes (m3vit.label_sets).
    listings: the folder of the lists of ids, one file for each split; a data set is recognised by it.
    folders: by "image" and task; where there are several, files of the first folder are taken before the others'.
    releases: the ending of the files, by release, and "image" and task. Releases are told apart by these.
    needs: tasks whose files are read too for the labels of a task.
    published: images of each split of the release. m3vit_ranges: of the pipeline m3vit.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    described: ClassVar[str]
    label_set: str
    listings: ClassVar[str]
    folders: ClassVar[Mapping[str, tuple[str, ...]]]
    releases: ClassVar[Mapping[str, Mapping[str, str]]]
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    published: ClassVar[Mapping[str, int]] = {}
    m3vit_ranges: Ranges | None = None
    release: str
    ids: Sequence[str]
    tasks: Sequence[str]

    def __init__(
        self,
        root: str | Path,
        split: str,
        tasks: Sequence[str] | None = None,
        partial: bool = False,
        label_set: str = "",
    ) -> None:
        self._begin(root, split, tasks, partial, label_set or type(self).label_set)
        if not self.root.is_dir():
            raise InputError(
                f"data root {self.root} not found: give the folder that holds {self.listings}/ with --data.root"
            )
        self.ids = self._read_ids()
        self.release = self.detect(self.root, self.kinds)
        self._check_folders()
        self._check_first()

    def _begin(self, root: str | Path, split: str, tasks: Sequence[str] | None, partial: bool, label_set: str) -> None:
        """Note what is asked for, or raise InputError if the files do not label it."""
        self.root, self.split, self.partial, self.label_set = Path(root), split, partial, label_set
        self.tasks = tuple(self.labels.tasks if tasks is None else tasks)
        if self.tasks:  # none: images alone
            resolve(self.tasks, self.label_set)
            self.check_fits(self.labels, self.tasks, self.root)

    @property
    def labels(self) -> LabelSet:
        """The label set, by its name."""
        return LABEL_SETS[self.label_set]

    @classmethod
    def label_set_of(cls, root: str | Path) -> str:
        """Return the label set of the files in `root`: the layout's, unless they describe one of their own."""
        return cls.label_set

    @classmethod
    def normalisation_of(cls, root: str | Path) -> Normalisation | None:
        """Return the mean and std of images that the files in `root` ask for; None: the model's."""
        return None

    @classmethod
    def check_fits(cls, labels: LabelSet, tasks: Sequence[str], root: str | Path = "") -> None:
        """Raise InputError unless the files label these tasks of a label set: each one, in as many classes."""
        if reason := cls.misfit(labels, tasks, root):
            raise InputError(f"model.label_set {labels.name} does not fit data.layout {cls.name}: {reason}")

    @classmethod
    def misfit(cls, labels: LabelSet, tasks: Sequence[str], root: str | Path = "") -> str:
        """Return why the files in `root` do not label these tasks of a label set, and what to do; nothing if they do.

        What the layout says holds for every root.
        """
        own = LABEL_SETS[cls.label_set]
        if absent := [task for task in tasks if task not in own.tasks]:
            return f"it has no files for {', '.join(absent)}: leave them out of model.tasks ({', '.join(own.tasks)})"
        advice = f"give a label set like {own.name}, or another layout"
        for task in tasks:
            if (ours := own.channels(task)) != (theirs := labels.channels(task)):
                return f"{theirs} classes of {task}, but {ours} in the files: {advice}"
        if any(kind_of(task).has_axes for task in tasks) and labels.normals_y_down != own.normals_y_down:
            return f"normals_y_down is {labels.normals_y_down}, but {own.normals_y_down} in the files: {advice}"
        if any(TASKS[task].matches_edges for task in tasks) and labels.edge_max_dist != own.edge_max_dist:
            return f"edge_max_dist is {labels.edge_max_dist}, but {own.edge_max_dist} for the data set: {advice}"
        return ""

    @classmethod
    def recognises(cls, root: Path) -> bool:
        """Return whether a folder holds a data set of this layout, from names alone."""
        return (root / cls.listings).is_dir()

    @classmethod
    def detect(cls, root: Path, kinds: Sequence[str]) -> str:
        """Return which release `root` holds, from the names in the folders of `kinds`, or raise InputError."""
        if len(cls.releases) == 1:
            return next(iter(cls.releases))
        endings = cls.endings()
        found: dict[str, Counter[str]] = {}
        for kind in kinds:
            folder = root / cls.folders[kind][0]
            if not folder.is_dir():
                raise InputError(
                    f"{folder} not found: {root} holds {held(root)}; extract the archive again, or leave out the task"
                )
            found[kind] = Counter(Path(name).suffix for name in names_in(folder) if ending(name) in endings)
        for release, expected in cls.releases.items():
            if all(set(found[kind]) & endings == {expected[kind]} for kind in kinds):
                return release
        here = "; ".join(
            f"{cls.folders[kind][0]}/ {', '.join(f'{number} {end[1:]}' for end, number in counts.items()) or 'none'}"
            for kind, counts in found.items()
        )
        there = "; ".join(
            f"{release} has {', '.join(f'{cls.folders[kind][0]}/*{expected[kind]}' for kind in kinds)}"
            for release, expected in cls.releases.items()
        )
        advice = "extract one archive afresh"
        for expected in cls.releases.values():
            if all({ending(f"_{spelt}") for spelt in found[kind]} == {expected[kind]} for kind in kinds):
                spelt = sorted({spelt for counts in found.values() for spelt in counts} - endings)
                advice = f"rename *{', *'.join(spelt)}, for endings are read as the layout spells them"
        raise InputError(f"{root} is neither release of {cls.title}, it holds {here}. {there}: {advice}")

    @classmethod
    def endings(cls) -> set[str]:
        """Return the endings of all files of all releases."""
        return {end for endings in cls.releases.values() for end in endings.values()}

    @classmethod
    def unchecked(cls, root: Path, split: str, ids: Sequence[str], release: str, tasks: Sequence[str]) -> "FileSplit":
        """Return a split of these images without a look at the disk: for the doctor, who says what is wrong there."""
        self = object.__new__(cls)
        self.root, self.split, self.ids, self.release, self.tasks = root, split, tuple(ids), release, tuple(tasks)
        self.partial = False
        return self

    def _read_ids(self) -> tuple[str, ...]:
        folder = self.root / self.listings
        splits = [name[:-4] for name in names_in(folder) if name.endswith(".txt")] if folder.is_dir() else []
        if not splits:
            raise InputError(
                f"{folder} holds no lists of images: {self.root} is not in the layout {self.described}, "
                f"it holds {held(self.root)}"
            )
        if self.split not in splits:
            raise InputError(f"{folder / self.split}.txt not found: {folder} has {', '.join(splits)}")
        listing = folder / f"{self.split}.txt"
        if not listing.is_file():  # a pipe would block
            why = special(listing.stat().st_mode) if listing.exists() else not_there(listing)
            raise InputError(f"{listing} is not a regular file ({why}): it holds one image id a line")
        with naming(listing):
            ids = [line.strip() for line in read_bounded(listing).decode("utf-8-sig").splitlines()]
        ids = [name for name in ids if name]
        if not ids:
            raise InputError(f"{listing} lists no image: extract the archive again")
        seen = set()
        for name in ids:
            if name in seen:
                raise InputError(f"{listing} lists {name} twice: each image is listed once")
            # An id becomes a file's name: it must stay within the data set's folders.
            if not is_id(name):
                raise InputError(f"{listing} lists {name!r}, which is not an image's id (a file name without ending)")
            seen.add(name)
        return tuple(ids)

    def _check_folders(self) -> None:
        """Raise InputError if a folder that the tasks need is absent."""
        for kind in self.kinds:
            for part in (kind, *self.needs.get(kind, ())):
                if not any((self.root / folder).is_dir() for folder in self.folders[part]):
                    raise InputError(
                        f"{self.root / self.folders[part][0]} not found, needed for {kind}: {self.root} holds "
                        f"{held(self.root)}; extract the archive again, or leave out the task"
                    )

    def _check_first(self) -> None:
        """Raise InputError if the first image or one of its labels is absent: a folder not extracted, or half."""
        for kind in ("image",) if self.partial else self.kinds:
            path = self.path(0, kind)
            if not path.is_file():
                other = other_spelling(path)
                advice = f"rename {other} and its like" if other else "extract the archive again"
                if kind != "image":
                    advice += ", or train on the labels there are: m3vit train --data.on_error skip"
                raise InputError(
                    f"{path} {not_there(path)}, though {self.listings}/{self.split}.txt lists {len(self)} images: "
                    f"{path.parent} holds {held(path.parent)}; {advice}"
                )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return what `path` and `read` take: "image" and the tasks."""
        return ("image", *self.tasks)

    def __len__(self) -> int:
        return len(self.ids)

    def coverage(self) -> str:
        """Return in words how many images have a label of each task; "" where all are to have all."""
        return ""

    def has(self, index: int, kind: str) -> bool:
        """Return whether an image is to have such a file; in a published data set each has all."""
        return True

    def place(self, kind: str) -> str:
        """Return in words where the files of images or of a task are, from the root."""
        return f"{self.folders[kind][0]}/"

    def path(self, index: int, kind: str) -> Path:
        """Return the file of an image or label, which need not exist."""
        name = f"{self.ids[index]}{self.releases[self.release][kind]}"
        first, *others = (self.root / folder / name for folder in self.folders[kind])
        if not others or first.is_file():
            return first
        return next((path for path in others if path.is_file()), first)

    @abstractmethod
    def read(self, index: int, kind: str, size: Size | None = None) -> NDArray:
        """Read an image or label as `load` returns it; `size` is the image's, read from its header if not given."""

    def edge_truth(self, index: int) -> NDArray[np.bool_]:
        """Return the boundary pixels [H, W] that odsF is scored against; not the labels trained on."""
        raise InputError(f"the layout {self.name} has no edge_truth, which edges are scored against: leave them out")

    def load(self, index: int) -> Sample:
        """Read one sample, or raise InputError naming the file that is missing, damaged or of the wrong size.

        With `partial`, only for the image: a label that cannot be read is one that the image does not have.
        """
        image = self.read(index, "image")
        size = image.shape[0], image.shape[1]
        sample = Sample(self.ids[index], image, {})
        for task in self.tasks:
            try:
                sample.labels[task] = self.read(index, task, size)
                check_shape(self.path(index, task), task, sample.labels[task], size)
            except InputError as error:
                if not self.partial:
                    raise
                sample.labels[task], sample.unlabelled[task] = no_label(task, size), str(error)
        return sample


def no_label(task: str, size: Size) -> NDArray:
    """Return the label of an image that has none for a task: every pixel ignored, or invalid."""
    return kind_of(task).no_label(size)


def check_shape(path: Path, task: str, label: NDArray, size: Size) -> None:
    """Raise InputError unless a layout's `read` made a label of the shape that the task's kind has."""
    if label.shape != (shape := (*size, *kind_of(task).label_shape)):
        words = f"is read as {list(label.shape)}, and {task} has {list(shape)}"
        raise InputError(f"{path} {words}: mend the layout's read", defect=Defect(path, "values", words))


def is_id(name: str) -> bool:
    """Return whether a line of a list can be an image's id: it becomes a file's name within the data set's folders."""
    return ".." not in name and name.isprintable() and len(name) <= 200 and not any(mark in name for mark in "/\\ ")


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted, or raise InputError."""
    with naming(folder):
        return sorted(os.listdir(folder))


def held(folder: Path) -> str:
    """Say what a folder holds, in a few words: its first names and how many there are."""
    if not folder.is_dir():
        return "nothing (there is no such folder)"
    names = [f"{name}/" if (folder / name).is_dir() else name for name in names_in(folder)[:6]]
    more = len(names_in(folder)) - len(names)
    return (", ".join(names) or "nothing") + (f" and {more} more" if more else "")
