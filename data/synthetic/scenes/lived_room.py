"""Rooms with people, pets, plants and bottles: the indoor half of the PASCAL scenes."""

import numpy as np

from m3vit.data.synthetic.scenes import furniture as pieces
from m3vit.data.synthetic.scenes import props
from m3vit.data.synthetic.scenes.animals import PETS
from m3vit.data.synthetic.scenes.materials import FloatArray, pick
from m3vit.data.synthetic.scenes.people import person
from m3vit.data.synthetic.scenes.room import Room
from m3vit.data.synthetic.scenes.solids import Builder, Vector

AT_WALLS: tuple[Builder, ...] = (
    props.sofa, pieces.cabinet, pieces.bookshelf, pieces.bed, pieces.cabinet, pieces.floor_lamp,
)  # fmt: skip
# What the picture may be about where nobody is in it.
SUBJECTS: tuple[Builder, ...] = (
    props.sofa, pieces.chair, props.floor_plant, props.set_table(0), props.set_table(0), *PETS, *PETS,
)  # fmt: skip
FREE_STANDING: tuple[Builder, ...] = (pieces.chair, pieces.chair, props.floor_plant, pieces.round_table, *PETS)


class LivedRoom(Room):
    """A room about `people` persons or, if there is none, about a pet, a plant or a piece of furniture."""

    clutter = (props.bottle, props.bottle, props.bottle, props.table_plant, pieces.television, pieces.book_pile, None)

    def __init__(self, rng: np.random.Generator, people: int) -> None:
        self._people = people
        self._subjects: list[Vector] = []
        super().__init__(rng)

    def draw_view(self, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        """Draw a place at eye height that looks at a subject of the picture, the nearer the smaller it is."""
        if not self._subjects or rng.random() < 0.15:
            return super().draw_view(rng)
        x, y, z = pick(rng, self._subjects)
        near, far, low, high = (0.8, 1.6, 0.5, 1.2) if z < 0.35 else (1.4, 4.0, 0.9, 1.7)
        if not self._people and self.details and rng.random() < 0.4:  # what stands on the tables
            x, y, z = pick(rng, self.details)
            near, far, low, high = 0.9, 1.6, z + 0.1, z + 0.6
        about, distance = rng.uniform(0, 2 * np.pi), rng.uniform(near, far)
        reach = np.array([0.5 * self.width_m - 0.25, 0.5 * self.depth_m - 0.25])
        place = np.clip(np.array([x, y]) + distance * np.array([np.cos(about), np.sin(about)]), -reach, reach)
        position = np.array([place[0], place[1], rng.uniform(low, high)])
        spread = 0.12 * distance
        return position, np.array([x, y, z + 0.05]) + rng.normal(0, spread, 3) * np.array([1, 1, 0.6])

    def _furnish(self, rng: np.random.Generator) -> None:
        """Put the subjects down first, so that there is room for them."""
        left = self._people
        while left > 0:
            guests = min(left, 2)
            kind = pick(rng, ("stand",) * 4 + ("chair", "sofa", "table"))
            if kind == "table":
                self._place_freely(rng, props.set_table(guests)(rng))
                left -= guests - 1
            elif kind == "stand":
                self._place_freely(rng, person(rng))
            else:
                self._place_freely(rng, props.occupied(rng, pieces.chair if kind == "chair" else props.sofa))
            left -= 1
        if not self._people or rng.random() < 0.25:
            self._place_freely(rng, pick(rng, SUBJECTS)(rng))
        self._subjects = list(self.targets)
        order = rng.permutation(len(AT_WALLS))[: int(rng.integers(2, 5))]
        for index in order:
            self._place_at_wall(rng, AT_WALLS[int(index)](rng))
        for _ in range(int(rng.integers(1, 5))):
            self._place_freely(rng, pick(rng, FREE_STANDING)(rng))
