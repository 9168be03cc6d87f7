"""What rooms and outdoor scenes have in common: placed objects on free ground, light, and where to look from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m3vit.data.synthetic.scenes.materials import FloatArray, pick
from m3vit.data.synthetic.scenes.solids import Builder, Furniture, Part, PlacedPart, Shape, Vector


@dataclass(frozen=True)
class Light:
    """A lamp at `position`, or, if `distant`, the sun in the direction `position`; `blur` is its size (soft shadows).

    `power` times `tint` (3,) is its light at no distance.
    """

    position: FloatArray
    power: float
    tint: FloatArray
    blur: float
    distant: bool = False


@dataclass(frozen=True)
class Footprint:
    """An axis-aligned rectangle of ground that is taken."""

    x: float
    y: float
    half_x: float
    half_y: float

    def overlaps(self, other: "Footprint") -> bool:
        """Return whether the two share any ground."""
        return abs(self.x - other.x) < self.half_x + other.half_x and abs(self.y - other.y) < self.half_y + other.half_y


class Place(ABC):
    """A scene: `parts` in the world, and points worth looking at.

    `targets` are the middles of large objects, `details` those of the small things on them.
    """

    clutter: tuple[Builder | None, ...] = ()  # what stands on tables and the like; None leaves a gap

    def __init__(self) -> None:
        self.parts: list[PlacedPart] = []
        self.targets: list[Vector] = []
        self.details: list[Vector] = []
        self._instances = 0
        self._taken: list[Footprint] = []

    @abstractmethod
    def draw_view(self, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        """Draw where a camera is (3,) and the point (3,) it looks at."""

    @abstractmethod
    def draw_ambient(self, rng: np.random.Generator, up_N1: FloatArray) -> FloatArray:
        """Draw the light (N, 3) from all around on surfaces whose unit normals have these upward components."""

    @abstractmethod
    def draw_num_lights(self, rng: np.random.Generator) -> int:
        """Draw how many lights `draw_light` shall be asked for."""

    @abstractmethod
    def draw_light(self, rng: np.random.Generator) -> Light:
        """Draw one light."""

    def sky(self, directions_N3: FloatArray) -> FloatArray:
        """Return the linear-light colours (N, 3) that are seen where nothing is hit."""
        return np.zeros(directions_N3.shape)

    def _add(self, parts: Sequence[Part], origin: Vector, yaw_rad: float) -> None:
        """Add an object; each of its groups becomes an instance."""
        instances: dict[int, int] = {}
        for part in parts:
            if part.group not in instances:
                instances[part.group] = self._instances
                self._instances += 1
            self.parts.append(PlacedPart(part, origin, yaw_rad, instances[part.group]))

    def _try_place(self, rng: np.random.Generator, piece: Furniture, x: float, y: float, yaw_rad: float) -> bool:
        """Put a piece on the ground unless it overlaps another, and return whether it was put."""
        cos, sin = abs(float(np.cos(yaw_rad))), abs(float(np.sin(yaw_rad)))
        half_x = (piece.width_m * cos + piece.depth_m * sin) / 2
        half_y = (piece.width_m * sin + piece.depth_m * cos) / 2
        footprint = Footprint(x, y, half_x, half_y)
        if any(footprint.overlaps(other) for other in self._taken):
            return False
        self._taken.append(footprint)
        self._add(piece.parts, (x, y, 0.0), yaw_rad)
        top_m = max(part.centre[2] + part.size[2] / 2 for part in piece.parts)
        self.targets.append((x, y, top_m / 2))
        carrier = piece.surface or piece
        if carrier.top_m is not None:
            self._clutter(rng, carrier, carrier.top_m, x, y, yaw_rad)
        return True

    def _clutter(self, rng: np.random.Generator, piece: Furniture, top_m: float, x: float, y: float,
                 yaw_rad: float) -> None:  # fmt: skip
        """Stand small things in a row on a piece's top."""
        round_top = piece.parts[0].shape is Shape.CYLINDER and piece.width_m == piece.depth_m
        width, depth = (side / np.sqrt(2) if round_top else side for side in (piece.width_m, piece.depth_m))
        cos, sin = float(np.cos(yaw_rad)), float(np.sin(yaw_rad))
        left = -width / 2 + 0.02
        while left < width / 2 - 0.2:
            build = pick(rng, self.clutter)
            if build is None:
                left += 0.2
                continue
            thing = build(rng)
            if left + thing.width_m > width / 2 or thing.depth_m > depth:
                left += 0.1
                continue
            slack = (depth - thing.depth_m) / 2
            along, across = left + thing.width_m / 2, rng.uniform(-slack, slack)
            origin = (x + along * cos - across * sin, y + along * sin + across * cos, top_m)
            self._add(thing.parts, origin, yaw_rad)
            self.details.append((origin[0], origin[1], top_m + 0.15))
            left += thing.width_m + rng.uniform(0.03, 0.3)
