"""What every loader returns, and what loaders of files have in common. No torch."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from m3vit.data.reading import Size, naming, other_spelling
from m3vit.errors import InputError
from m3vit.files import not_there, read_bounded, special
from m3vit.label_sets import resolve
from m3vit.tasks import kind_of


@dataclass
class Sample:
    """One image [H, W, 3] uint8 and its labels, in the conventions of m3vit.tasks.

    semseg, human_parts, saliency, edge [H, W] uint8; depth [H, W] float32; normals [H, W, 3] float32. Where the label
    of a task is missing or cannot be read (`Split.partial`), it is ignored or invalid everywhere, and `unlabelled` says
    why.
    """

    id: str
    image: NDArray[np.uint8]
    labels: dict[str, NDArray]
    unlabelled: dict[str, str] = field(default_factory=dict)


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

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return what `path` and `read` take: "image" and the tasks."""
        ...

    def __len__(self) -> int: ...

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
    """The part of a Split that does not depend on the layout. Nothing is ever written into `root`."""

    label_set: str
    release: str
    ids: Sequence[str]
    tasks: Sequence[str]
    layout: str  # in words, for messages
    listings: str  # folder of the lists of ids, one file for each split

    def __init__(self, root: str | Path, split: str, tasks: Sequence[str], partial: bool = False) -> None:
        self.root, self.split, self.tasks, self.partial = Path(root), split, tuple(tasks), partial
        if self.tasks:  # none: images alone
            resolve(self.tasks, self.label_set)
        if not self.root.is_dir():
            raise InputError(
                f"data root {self.root} not found: give the folder that holds {self.listings}/ with --data.root"
            )
        self.ids = self._read_ids()

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
                f"{folder} holds no lists of images: {self.root} is not in the layout {self.layout}, "
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

    @abstractmethod
    def path(self, index: int, kind: str) -> Path:
        """Return the file of an image or label, which need not exist."""

    @abstractmethod
    def read(self, index: int, kind: str, size: Size | None = None) -> NDArray:
        """Read an image or label as `load` returns it; `size` is the image's, read from its header if not given."""

    @abstractmethod
    def edge_truth(self, index: int) -> NDArray[np.bool_]:
        """Return the boundary pixels [H, W] that odsF is scored against; not the labels trained on."""

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
            except InputError as error:
                if not self.partial:
                    raise
                sample.labels[task], sample.unlabelled[task] = no_label(task, size), str(error)
        return sample


def no_label(task: str, size: Size) -> NDArray:
    """Return the label of an image that has none for a task: every pixel ignored, or invalid."""
    return kind_of(task).no_label(size)


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
