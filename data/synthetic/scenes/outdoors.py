"""Streets and meadows under a sky: the outdoor half of the PASCAL scenes."""

import numpy as np

from m3vit.data.synthetic.scenes.animals import FARM, dog, sheep
from m3vit.data.synthetic.scenes.materials import (
    FloatArray,
    Material,
    Pattern,
    hsv_to_rgb,
    paint,
    pick,
    random_material,
    value_noise,
    wood,
)
from m3vit.data.synthetic.scenes.people import person
from m3vit.data.synthetic.scenes.place import Light, Place
from m3vit.data.synthetic.scenes.props import floor_plant
from m3vit.data.synthetic.scenes.solids import Builder, Furniture, Part, Shape, Vector
from m3vit.data.synthetic.scenes.vehicles import TRAFFIC

GROUND_M = 120.0  # side of the ground; beyond it there is sky
STAGE_M = 4.5  # subjects stand within this of the middle
LAYER_M = 0.003  # between strips of ground that lie on each other: so thin that no pixel shows their sides


class Outdoors(Place):
    """A street with houses and traffic, or a meadow with trees and animals, about `people` persons or about those."""

    def __init__(self, rng: np.random.Generator, people: int) -> None:
        super().__init__()
        self._draw_weather(rng)
        self._street = bool(rng.random() < 0.5)
        subjects: list[Furniture] = [person(rng) for _ in range(people)]
        others: tuple[Builder, ...] = (
            (*TRAFFIC, *TRAFFIC, dog, floor_plant) if self._street else (*FARM, *FARM, sheep, dog)
        )
        least = 0 if people else 1
        subjects += [pick(rng, others)(rng) for _ in range(int(rng.integers(least, least + 3)))]
        if self._street:
            self._build_street(rng)
        else:
            self._build_meadow(rng)
        for subject in subjects:
            self._put_on_stage(rng, subject)
        self._subjects = list(self.targets)
        self._build_background(rng)

    def draw_view(self, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        """Draw a place at eye height, 2 to 8 m from a subject, a little below or above its middle."""
        x, y, z = pick(rng, self._subjects) if self._subjects else (0.0, 0.0, 0.8)
        about = rng.uniform(0, 2 * np.pi)
        distance = rng.uniform(2.0, 5.0) + 2.2 * max(0.0, 2 * z - 1.9) + (2.0 if z < 0.75 and self._street else 0.0)
        position = np.array([x + distance * np.cos(about), y + distance * np.sin(about), rng.uniform(0.9, 1.8)])
        return position, np.array([x, y, z + rng.normal(0.1, 0.15)]) + rng.normal(0, 0.25, 3) * np.array([1, 1, 0])

    def draw_ambient(self, rng: np.random.Generator, up_N1: FloatArray) -> FloatArray:
        """Draw the sky's light: bluish when it is clear, stronger from above."""
        strength = rng.uniform(0.75, 1.0) if self._overcast else rng.uniform(0.35, 0.55)
        tint = np.array([1.0, 1.0, 1.0]) if self._overcast else np.array([0.9, 1.0, 1.15])
        return np.asarray(strength * (0.75 + 0.35 * up_N1) * tint)

    def draw_num_lights(self, rng: np.random.Generator) -> int:
        """Return one: the sun."""
        return 1

    def draw_light(self, rng: np.random.Generator) -> Light:
        """Draw the sun, between 20 and 65 degrees high."""
        about, height = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(20, 65))
        towards = np.array([np.cos(about) * np.cos(height), np.sin(about) * np.cos(height), np.sin(height)])
        power = 0.25 if self._overcast else rng.uniform(0.9, 1.5)
        return Light(towards, power, np.array([1.06, 1.0, 0.9]), blur=0.3 if self._overcast else 0.02, distant=True)

    def sky(self, directions_N3: FloatArray) -> FloatArray:
        """Return a gradient from the horizon to the zenith with clouds."""
        x, y, z = directions_N3.T
        flat = np.hypot(x, y) + 1e-6
        rise_N1 = np.clip(z / flat / 0.8, 0, 1)[:, None]
        colour_N3 = self._horizon + (self._zenith - self._horizon) * np.sqrt(rise_N1)
        about, up = 6 * np.arctan2(y, x), 9 * z / flat
        seed = np.full(len(x), 7)
        cloud = 0.65 * value_noise(about, up, seed) + 0.35 * value_noise(2.7 * about, 2.7 * up, seed)
        share_N1 = np.clip((cloud - self._clear) * 4, 0, 0.85)[:, None]
        return np.power(colour_N3 + share_N1 * (0.97 - colour_N3), 2.2)

    def _draw_weather(self, rng: np.random.Generator) -> None:
        self._overcast = bool(rng.random() < 0.3)
        hue = rng.uniform(0.55, 0.62)
        self._zenith = hsv_to_rgb(hue, 0.08 if self._overcast else rng.uniform(0.45, 0.75), rng.uniform(0.7, 0.95))
        self._horizon = hsv_to_rgb(hue, 0.05 if self._overcast else rng.uniform(0.1, 0.3), rng.uniform(0.85, 1.0))
        self._clear = rng.uniform(0.35, 0.8)

    def _slab(self, label: str, material: Material, width: float, y: float, top: float) -> None:
        """Add a strip of ground along x."""
        size = (GROUND_M, width, 0.5)
        self._add([Part(Shape.BOX, size, (0, y, top - 0.25), material, label)], (0, 0, 0), 0.0)

    def _build_meadow(self, rng: np.random.Generator) -> None:
        self._slab("grass", _lawn(rng), GROUND_M, 0, 0)
        if rng.random() < 0.4:  # a path
            earth = random_material(rng, (Pattern.NOISE,), hue=(0.06, 0.11), saturation=(0.15, 0.4),
                                    value=(0.45, 0.7), period_m=(0.3, 0.8))  # fmt: skip
            self._slab("ground", earth, rng.uniform(1.2, 3.0), rng.uniform(-6, 6), LAYER_M)
        if rng.random() < 0.4:
            self._add(_fence(rng), (0, pick(rng, (-1, 1)) * rng.uniform(6, 12), 0), 0.0)

    def _build_street(self, rng: np.random.Generator) -> None:
        grey = rng.uniform(0.25, 0.5)
        asphalt = Material(Pattern.NOISE, np.full(3, grey), np.full(3, 0.8 * grey), 0.5)
        paving = random_material(rng, (Pattern.TILES, Pattern.CHECKER), hue=(0.05, 0.6), saturation=(0, 0.15),
                                 value=(0.5, 0.8), period_m=(0.4, 0.8))  # fmt: skip
        self._slab("grass", _lawn(rng), GROUND_M, 0, -LAYER_M)
        self._slab("sidewalk", paving, 14.0, 0, 0)
        middle = rng.uniform(-2.5, 2.5)
        self._slab("road", asphalt, 7.0, middle, LAYER_M)
        white = np.full(3, 0.9)
        line = Material(Pattern.FLAT, white, white, 1.0)
        dashes = [Part(Shape.BOX, (1.8, 0.14, 4 * LAYER_M), (4.0 * i, middle, 0), line, "road") for i in range(-12, 13)]
        self._add(dashes, (0, 0, 0), 0.0)

    def _put_on_stage(self, rng: np.random.Generator, subject: Furniture) -> None:
        long = subject.depth_m > 3.0
        for _ in range(12):
            x, y = rng.uniform(-STAGE_M, STAGE_M, 2)
            yaw_rad = rng.uniform(0, 2 * np.pi)
            if long:  # vehicles along the road
                yaw_rad = pick(rng, (0.5, -0.5)) * np.pi + rng.normal(0, 0.05)
            if self._try_place(rng, subject, float(x), float(y), yaw_rad):
                return

    def _build_background(self, rng: np.random.Generator) -> None:
        """Surround the stage with houses along the street and trees all round."""
        if self._street:
            for side in (1, -1):
                x = -40.0
                while x < 40:
                    house = _house(rng)
                    y = side * (8.5 + 0.5 * house.depth_m + rng.uniform(0, 3))
                    if rng.random() < 0.8:
                        yaw_rad = 0.0 if side > 0 else np.pi
                        self._add(house.parts, (x + 0.5 * house.width_m, y, 0), yaw_rad)
                    x += house.width_m + pick(rng, (0.0, 1.5, 5.0))
        for _ in range(int(rng.integers(6, 14)) if self._street else int(rng.integers(14, 34))):
            about, distance = rng.uniform(0, 2 * np.pi), rng.uniform(11, 34)
            x, y = distance * np.cos(about), distance * np.sin(about)
            if self._street and abs(y) < 6.5:
                continue
            self._add(_tree(rng), (float(x), float(y), 0), 0.0)


def _lawn(rng: np.random.Generator) -> Material:
    green = hsv_to_rgb(rng.uniform(0.19, 0.33), rng.uniform(0.35, 0.75), rng.uniform(0.3, 0.65))
    return Material(Pattern.NOISE, green, rng.uniform(0.6, 0.9) * green, rng.uniform(0.25, 1.2))


def _tree(rng: np.random.Generator) -> list[Part]:
    """A trunk below a crown of a few balls, or a fir."""
    height, bark = rng.uniform(3.5, 8.0), wood(rng)
    green = hsv_to_rgb(rng.uniform(0.18, 0.4), rng.uniform(0.4, 0.8), rng.uniform(0.2, 0.5))
    leaves = Material(Pattern.NOISE, green, 0.55 * green, rng.uniform(0.3, 0.6))
    parts = [Part(Shape.CYLINDER, (0.3, 0.3, 0.5 * height), (0, 0, 0.25 * height), bark, "tree")]
    if rng.random() < 0.3:
        for level in range(3):
            width = height * (0.5 - 0.12 * level)
            z = height * (0.35 + 0.22 * level)
            parts.append(Part(Shape.CONE, (width, width, 0.42 * height), (0, 0, z), leaves, "tree"))
        return parts
    for _ in range(6):
        x, y = (float(value) * height for value in rng.uniform(-0.16, 0.16, 2))
        size, z = rng.uniform(0.3, 0.45) * height, rng.uniform(0.55, 0.85) * height
        parts.append(Part(Shape.BEAD, (size, size, 0.85 * size), (x, y, z), leaves, "tree"))
    return parts


def _house(rng: np.random.Generator) -> Furniture:
    """A house with rows of windows, a door, and a flat or a hipped roof."""
    width, depth, height = rng.uniform(6, 14), rng.uniform(7, 10), rng.uniform(3.5, 12)
    wall = random_material(rng, (Pattern.FLAT,), hue=(0.0, 0.6), saturation=(0.05, 0.45), value=(0.45, 0.95))
    glass = hsv_to_rgb(0.58, rng.uniform(0.1, 0.35), rng.uniform(0.12, 0.4))
    front = Material(Pattern.PANES, wall.colour, glass, rng.uniform(1.6, 2.6))
    parts: list[Part] = [
        Part(Shape.BOX, (width, depth, height), (0, 0, height / 2), front, "building"),
        Part(Shape.BOX, (width + 0.02, depth + 0.02, 0.5), (0, 0, 0.25), paint(rng), "building"),
        Part(Shape.BOX, (1.1, 0.1, 2.2), (rng.uniform(-0.3, 0.3) * width, -depth / 2, 1.1), wood(rng), "building"),
    ]
    if rng.random() < 0.6:
        tiles = random_material(rng, (Pattern.STRIPES,), hue=(0.0, 0.08), saturation=(0.2, 0.6), value=(0.25, 0.6),
                                period_m=(0.3, 0.5))  # fmt: skip
        size: Vector = (width + 0.6, depth + 0.6, 2.6)
        parts.append(Part(Shape.CABIN, size, (0, 0, height + 1.3), tiles, "building"))
    return Furniture(parts, width, depth)


def _fence(rng: np.random.Generator) -> list[Part]:
    timber = wood(rng)
    parts = [Part(Shape.BOX, (60, 0.05, 0.12), (0, 0, z), timber, "fence") for z in (0.5, 1.0)]
    parts += [Part(Shape.BOX, (0.12, 0.12, 1.2), (2.0 * i, 0, 0.6), timber, "fence") for i in range(-15, 16)]
    return parts
