"""The images a package is compared with torch on: the run's own data, read when they are needed."""

from collections.abc import Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from m3vit.data.network_input import network_input
from m3vit.data.opening import open_split
from m3vit.data.sample import Split
from m3vit.errors import InputError
from m3vit.normalisation import Normalisation
from m3vit.run_folder import Run

SPLITS = ("val", "train")


class ParityImages(Sequence[NDArray[np.float32]]):
    """`count` normalised images [3, H, W]: the first ones of each split in turn, then noise."""

    def __init__(
        self, splits: dict[str, Split], count: int, size: tuple[int, int], normalisation: Normalisation
    ) -> None:
        self.size, self.normalisation = size, normalisation
        self.places: list[tuple[Split | None, int]] = []  # split (None: noise) and index
        self.sources: dict[str, int] = {}  # how many are of which split, or noise
        for name, split in splits.items():
            taken = min(len(split), count - len(self.places))
            self.places += [(split, index) for index in range(taken)]
            self.sources |= {name: taken} if taken else {}
        if noise := count - len(self.places):
            self.places += [(None, index) for index in range(noise)]
            self.sources["noise"] = noise

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.float32]: ...
    @overload
    def __getitem__(self, index: slice) -> list[NDArray[np.float32]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        split, number = self.places[index]
        if split is None:
            return np.random.default_rng(number).standard_normal((3, *self.size), dtype=np.float32)
        return np.asarray(network_input(split.load(number).image, self.size, self.normalisation).numpy())


def parity_images(run: Run, data_root: str | None, count: int, *, exactly: bool) -> ParityImages:
    """Return up to `count` validation images of a run; noise alone if its data are not there.

    `exactly`: where the validation split is shorter, its training images follow, then noise. Raises InputError for a
    `data_root` that was given and cannot be opened.
    """
    size = (run.config.model.image_size[0], run.config.model.image_size[1])
    root = data_root or run.config.data.root
    splits: dict[str, Split] = {}
    try:
        for name in SPLITS if exactly else SPLITS[:1]:
            splits[name] = open_split(run.config.data.layout, root, name, [])
    except InputError:
        if data_root and not splits:  # asked for: a mistake, not a reason to do without
            raise
    if splits and not exactly:
        count = min(count, len(splits[SPLITS[0]]))
    return ParityImages(splits, count, size, run.model.normalisation)
