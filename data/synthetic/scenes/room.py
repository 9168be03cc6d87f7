"""Random rooms: shell, windows, doors and pictures on the walls, furniture that does not overlap, clutter on top."""

import numpy as np

from m3vit.data.synthetic.scenes import furniture as pieces
from m3vit.data.synthetic.scenes.materials import (
    FloatArray,
    Material,
    Pattern,
    fabric,
    paint,
    pick,
    random_material,
    wood,
)
from m3vit.data.synthetic.scenes.place import Footprint, Light, Place
from m3vit.data.synthetic.scenes.solids import Builder, Furniture, Part, Shape

SCENE_CLASSES = (
    "wall floor cabinet bed chair sofa table door window bookshelf picture ceiling books television lamp".split()
)
"""The NYUD class names that occur; names as in `m3vit.label_sets.NYUD_CLASSES`."""

# What stands along the walls: the first piece always, two to four of the others.
THEMES: tuple[tuple[Builder, ...], ...] = (
    (pieces.bed, pieces.cabinet, pieces.cabinet, pieces.bookshelf, pieces.desk),
    (pieces.bed, pieces.bed, pieces.cabinet, pieces.bookshelf, pieces.floor_lamp),
    (pieces.sofa, pieces.sofa, pieces.cabinet, pieces.bookshelf, pieces.cabinet),
    (pieces.desk, pieces.desk, pieces.bookshelf, pieces.cabinet, pieces.bookshelf),
    (pieces.sofa, pieces.bed, pieces.cabinet, pieces.bookshelf, pieces.desk),
)
# What stands anywhere, turned at will.
FREE_STANDING: tuple[Builder, ...] = (
    pieces.dining_table, pieces.round_table, pieces.chair, pieces.chair, pieces.chair, pieces.sofa, pieces.floor_lamp,
)  # fmt: skip
# What stands on tables and cabinets; None leaves a gap.
CLUTTER: tuple[Builder | None, ...] = (
    pieces.book_pile, pieces.book_pile, pieces.television, pieces.table_lamp, pieces.table_lamp, None,
)  # fmt: skip

WALL_THICKNESS_M = 0.1
MAX_DOORS = 2


class Room(Place):
    """A furnished room, centred on the z axis."""

    clutter = CLUTTER

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.width_m = rng.uniform(3.2, 6.5)
        self.depth_m = rng.uniform(3.5, 7.0)
        self.height_m = rng.uniform(2.35, 3.1)
        self._doors = 0
        self._build_shell(rng)
        self._furnish(rng)
        if rng.random() < 0.6:
            x, y = rng.uniform(-0.25, 0.25) * self.width_m, rng.uniform(-0.25, 0.25) * self.depth_m
            self._add(pieces.ceiling_lamp(rng).parts, (x, y, self.height_m), 0.0)

    def draw_view(self, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        """Draw a position at sitting or standing height, and a target near a piece of furniture."""
        x, y = rng.uniform(-0.5, 0.5) * (self.width_m - 0.5), rng.uniform(-0.5, 0.5) * (self.depth_m - 0.5)
        position = np.array([x, y, rng.uniform(1.0, 1.8)])
        target = np.array([rng.uniform(-0.35, 0.35) * self.width_m, rng.uniform(-0.35, 0.35) * self.depth_m, 0.8])
        if self.targets:
            target = 0.25 * target + 0.75 * np.array(pick(rng, self.targets))
        target[2] = rng.uniform(0.4, 1.3)
        return position, target

    def draw_ambient(self, rng: np.random.Generator, up_N1: FloatArray) -> FloatArray:
        """Draw grey light that is a little stronger from above."""
        return (rng.uniform(0.25, 0.5) * (1 + 0.15 * up_N1)).repeat(3, axis=1)

    def draw_num_lights(self, rng: np.random.Generator) -> int:
        """Draw one lamp or two."""
        return int(rng.integers(1, 3))

    def draw_light(self, rng: np.random.Generator) -> Light:
        """Draw a warm or cold lamp below the ceiling."""
        x, y = rng.uniform(-0.4, 0.4) * self.width_m, rng.uniform(-0.4, 0.4) * self.depth_m
        position = np.array([x, y, self.height_m - rng.uniform(0.1, 0.5)])
        power = 3.0 * rng.uniform(0.5, 1.0)
        tint = 1 + rng.uniform(-0.12, 0.12) * np.array([1.0, 0.0, -1.0])
        return Light(position, power, tint, blur=0.06)

    def _furnish(self, rng: np.random.Generator) -> None:
        first, *others = pick(rng, THEMES)
        order = rng.permutation(len(others))[: int(rng.integers(2, 5))]
        for build in [first, *(others[int(i)] for i in order)]:
            self._place_at_wall(rng, build(rng))
        for _ in range(int(rng.integers(4, 10))):
            self._place_freely(rng, pick(rng, FREE_STANDING)(rng))

    def _build_shell(self, rng: np.random.Generator) -> None:
        width, depth, height, thick = self.width_m, self.depth_m, self.height_m, WALL_THICKNESS_M
        wall_patterns = (Pattern.FLAT, Pattern.FLAT, Pattern.FLAT, Pattern.NOISE, Pattern.STRIPES, Pattern.TILES)
        common = random_material(rng, wall_patterns, saturation=(0, 0.4), value=(0.5, 0.95), period_m=(0.1, 0.5))
        ceiling = random_material(
            rng, (Pattern.FLAT, Pattern.FLAT, Pattern.TILES), saturation=(0, 0.08), value=(0.8, 1), period_m=(0.4, 0.6)
        )
        slab = (width + 1, depth + 1, thick)
        self._add([Part(Shape.BOX, slab, (0, 0, -thick / 2), _flooring(rng), "floor")], (0, 0, 0), 0.0)
        self._add([Part(Shape.BOX, slab, (0, 0, height + thick / 2), ceiling, "ceiling")], (0, 0, 0), 0.0)
        for side in range(4):
            length, distance = (width, depth / 2) if side % 2 == 0 else (depth, width / 2)
            yaw_rad = -side * np.pi / 2
            # The wall's frame: x along it, +y outward, its inner face in y = 0.
            origin = (-distance * float(np.sin(yaw_rad)), distance * float(np.cos(yaw_rad)), 0.0)
            material = common
            if rng.random() < 0.2:
                material = random_material(
                    rng, wall_patterns[2:], saturation=(0.1, 0.6), value=(0.3, 0.9), period_m=(0.1, 0.4)
                )
            size = (length + 2 * thick, thick, height)
            self._add([Part(Shape.BOX, size, (0, thick / 2, height / 2), material, "wall")], origin, yaw_rad)
            self._decorate(rng, length, origin, yaw_rad)

    def _decorate(self, rng: np.random.Generator, length: float, origin: tuple[float, float, float],
                  yaw_rad: float) -> None:  # fmt: skip
        """Hang windows, doors, pictures and televisions on a wall, from left to right."""
        x = -length / 2 + rng.uniform(0.2, 0.8)
        while x < length / 2 - 0.5:
            kind = pick(rng, ("window",) * 5 + ("door",) * 3 + ("picture",) * 7 + ("television",) + ("gap",) * 4)
            if kind == "door" and self._doors >= MAX_DOORS:
                kind = "picture"
            width, height = {
                "window": (rng.uniform(0.7, 1.8), rng.uniform(0.8, 1.3)),
                "door": (rng.uniform(0.75, 0.95), rng.uniform(1.95, 2.1)),
                "picture": (rng.uniform(0.35, 1.1), rng.uniform(0.35, 0.9)),
                "television": (1.1, 0.65),
                "gap": (rng.uniform(0.3, 1.0), 0.0),
            }[kind]
            if x + width > length / 2 - 0.1:
                return
            centre = x + width / 2
            frame = pick(rng, (wood, paint))(rng)
            if kind == "window":
                self._add(_window(rng, centre, width, height, frame), origin, yaw_rad)
            elif kind == "door":
                self._add(_door(rng, centre, width, height, frame), origin, yaw_rad)
                self._doors += 1
                cos, sin = float(np.cos(yaw_rad)), float(np.sin(yaw_rad))
                inward = -0.4  # keep the floor in front of it free
                clear_x, clear_y = centre * cos - inward * sin, centre * sin + inward * cos
                self._taken.append(Footprint(origin[0] + clear_x, origin[1] + clear_y, 0.4, 0.4))
            elif kind == "picture":
                self._add(_picture(rng, centre, width, height, frame), origin, yaw_rad)
            elif kind == "television":
                size, middle = (width, 0.06, height), (centre, -0.03, 1.2 + height / 2)
                screen = Part(Shape.BOX, size, middle, pieces.dark_screen(rng), "television")
                self._add([screen], origin, yaw_rad)
            x += width + rng.uniform(0.15, 0.9)

    def _place_at_wall(self, rng: np.random.Generator, piece: Furniture) -> None:
        """Put a piece with its back to some wall, if one of a dozen tries is free."""
        for _ in range(12):
            side = int(rng.integers(4))
            yaw_rad = -side * np.pi / 2
            length, distance = (self.width_m, self.depth_m / 2) if side % 2 == 0 else (self.depth_m, self.width_m / 2)
            slack = (length - piece.width_m) / 2
            if slack < 0.05:
                continue
            along, out = rng.uniform(-slack, slack), distance - piece.depth_m / 2 - 0.04
            cos, sin = float(np.cos(yaw_rad)), float(np.sin(yaw_rad))
            if self._try_place(rng, piece, along * cos - out * sin, along * sin + out * cos, yaw_rad):
                return

    def _place_freely(self, rng: np.random.Generator, piece: Furniture) -> None:
        """Put a piece anywhere at any angle, if one of a dozen tries is free."""
        reach = 0.5 * float(np.hypot(piece.width_m, piece.depth_m)) + 0.05
        if min(self.width_m, self.depth_m) < 2 * reach + 0.2:
            return
        for _ in range(12):
            yaw_rad = rng.uniform(0, 2 * np.pi)
            x = rng.uniform(reach - self.width_m / 2, self.width_m / 2 - reach)
            y = rng.uniform(reach - self.depth_m / 2, self.depth_m / 2 - reach)
            if self._try_place(rng, piece, x, y, yaw_rad):
                return


def _flooring(rng: np.random.Generator) -> Material:
    if rng.random() < 0.5:
        wooden = (Pattern.WOOD, Pattern.WOOD, Pattern.TILES, Pattern.CHECKER, Pattern.NOISE)
        return random_material(
            rng, wooden, hue=(0.04, 0.14), saturation=(0.1, 0.6), value=(0.25, 0.8), period_m=(0.08, 0.5)
        )
    others = (Pattern.FLAT, Pattern.NOISE, Pattern.CHECKER, Pattern.TILES)
    return random_material(rng, others, saturation=(0, 0.5), value=(0.2, 0.8), period_m=(0.1, 0.5))


def _window(rng: np.random.Generator, x: float, width: float, height: float, frame: Material) -> list[Part]:
    """A glowing pane that shows sky and greenery, in a cross-barred frame."""
    sill = rng.uniform(0.8, 1.0)
    sky = random_material(
        rng, (Pattern.OUTDOORS,), hue=(0.5, 0.65), saturation=(0.05, 0.4), value=(0.85, 1.0), period_m=(0.5, 1.0)
    )
    green = random_material(rng, (Pattern.FLAT,), hue=(0.15, 0.45), saturation=(0.2, 0.6), value=(0.3, 0.7))
    pane = Material(Pattern.OUTDOORS, sky.colour, green.colour, sky.period_m, 0.0, rng.uniform(0.8, 1.6))
    parts = [Part(Shape.BOX, (width, 0.02, height), (x, 0, sill + height / 2), pane, "window")]
    for side in (-1, 0, 1):
        centre = (x + side * width / 2, 0, sill + height / 2)
        parts.append(Part(Shape.BOX, (0.07, 0.04, height), centre, frame, "window"))
    for end in (0, 1):
        centre = (x, 0, sill + end * height)
        parts.append(Part(Shape.BOX, (width + 0.07, 0.04, 0.07), centre, frame, "window"))
    return parts


def _door(rng: np.random.Generator, x: float, width: float, height: float, leaf: Material) -> list[Part]:
    """A closed door with two panels and a knob."""
    panel = pick(rng, (leaf, leaf, paint(rng)))
    parts = [
        Part(Shape.BOX, (width, 0.04, height), (x, 0, height / 2), leaf, "door"),
        Part(Shape.SPHERE, (0.07, 0.08, 0.07), (x + 0.42 * width, -0.05, 1.0), paint(rng), "door"),
    ]
    for share in (0.27, 0.72):
        parts.append(Part(Shape.BOX, (width * 0.7, 0.054, height * 0.35), (x, 0, height * share), panel, "door"))
    return parts


def _picture(rng: np.random.Generator, x: float, width: float, height: float, frame: Material) -> list[Part]:
    """A framed painting at eye height."""
    middle = rng.uniform(1.2, 1.5) + height / 2
    patterns = (Pattern.PATCHES, Pattern.PATCHES, Pattern.NOISE, Pattern.STRIPES, Pattern.CHECKER, Pattern.OUTDOORS)
    art = random_material(rng, patterns, saturation=(0.2, 0.9), value=(0.2, 0.9), period_m=(0.08, 0.3))
    if rng.random() < 0.2:
        art = fabric(rng)  # a wall hanging
    return [
        Part(Shape.BOX, (width, 0.03, height), (x, 0, middle), frame, "picture"),
        Part(Shape.BOX, (width - 0.1, 0.04, height - 0.1), (x, 0, middle), art, "picture"),
    ]
