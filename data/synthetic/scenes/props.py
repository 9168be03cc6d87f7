"""Small and middling things beside people: bottles, plants, seats with somebody on them, laid tables."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from m3vit.data.synthetic.scenes import furniture as pieces
from m3vit.data.synthetic.scenes.materials import Material, Pattern, hsv_to_rgb, paint, pick, random_material
from m3vit.data.synthetic.scenes.people import sitting_person
from m3vit.data.synthetic.scenes.solids import Builder, Furniture, Part, Shape, moved, next_group, product, rotation


def bottle(rng: np.random.Generator) -> Furniture:
    """Build a bottle of green, brown, clear or coloured glass or plastic, with a label and a cap."""
    height, width = rng.uniform(0.26, 0.36), rng.uniform(0.085, 0.11)
    colour = pick(rng, (hsv_to_rgb(0.36, 0.7, 0.3), hsv_to_rgb(0.06, 0.75, 0.28), hsv_to_rgb(0.55, 0.25, 0.8),
                        hsv_to_rgb(rng.random(), 0.7, 0.75)))  # fmt: skip
    glass = Material(Pattern.FLAT, colour, colour, 0.1)
    sticker = random_material(rng, (Pattern.FLAT, Pattern.STRIPES), saturation=(0.1, 0.8), value=(0.6, 1.0),
                              period_m=(0.03, 0.06))  # fmt: skip
    parts = [
        Part(Shape.CYLINDER, (width, width, 0.58 * height), (0, 0, 0.29 * height), glass, "bottle", name="body"),
        Part(Shape.SPHERE, (width, width, 0.28 * height), (0, 0, 0.58 * height), glass, "bottle", name="body"),
        Part(Shape.CYLINDER, (0.36 * width, 0.36 * width, 0.34 * height), (0, 0, 0.8 * height), glass, "bottle",
             name="body"),
        Part(Shape.CYLINDER, (0.42 * width, 0.42 * width, 0.06 * height), (0, 0, 0.98 * height), paint(rng), "bottle",
             name="cap"),
        Part(Shape.CYLINDER, (1.03 * width, 1.03 * width, 0.26 * height), (0, 0, 0.32 * height), sticker, "bottle",
             name="body"),
    ]  # fmt: skip
    return Furniture(parts, width, width)


def _plant(rng: np.random.Generator, height: float, spread: float) -> Furniture:
    """Build a pot with a bush or with long leaves."""
    pot_height = 0.32 * height
    clay = pick(rng, (Material(Pattern.FLAT, hsv_to_rgb(0.04, 0.6, 0.6), np.zeros(3), 1.0), paint(rng)))
    green = hsv_to_rgb(rng.uniform(0.25, 0.38), rng.uniform(0.5, 0.85), rng.uniform(0.25, 0.6))
    leaf = Material(Pattern.NOISE, green, 0.55 * green, 0.12)
    pot = 0.55 * spread
    upside_down = rotation("x", np.pi)  # the wide end above
    parts = [Part(Shape.SHADE, (pot, pot, pot_height), (0, 0, pot_height / 2), clay, "pottedplant", 0, upside_down,
                  "pot")]  # fmt: skip
    if rng.random() < 0.5:
        for _ in range(9):
            x, y = rng.uniform(-0.28, 0.28, 2) * spread
            z, size = rng.uniform(0.45, 0.85) * height, rng.uniform(0.35, 0.55) * spread
            parts.append(Part(Shape.BEAD, (size, size, 0.9 * size), (float(x), float(y), z), leaf, "pottedplant",
                              name="plant"))  # fmt: skip
    else:
        count = int(rng.integers(9, 15))
        for number in range(count):
            about, tilt = 2 * np.pi * number / count + rng.uniform(-0.2, 0.2), np.radians(rng.uniform(10, 55))
            turn = product(rotation("z", about), rotation("x", -tilt))
            length = rng.uniform(0.55, 0.8) * height
            x, y, z = 0.5 * length * turn[:, 2]
            size_leaf = (0.2 * spread, 0.03 * spread, length)
            parts.append(Part(Shape.SPHERE, size_leaf, (float(x), float(y), pot_height + float(z)), leaf,
                              "pottedplant", 0, turn, "plant"))  # fmt: skip
    return Furniture(parts, spread, spread)


def floor_plant(rng: np.random.Generator) -> Furniture:
    """Build a plant in a tub on the floor."""
    return _plant(rng, rng.uniform(0.8, 1.4), rng.uniform(0.5, 0.75))


def table_plant(rng: np.random.Generator) -> Furniture:
    """Build a plant for a table or a cabinet."""
    return _plant(rng, rng.uniform(0.3, 0.5), rng.uniform(0.24, 0.36))


def sofa(rng: np.random.Generator) -> Furniture:
    """Build a sofa that is one object with its pillows."""
    piece = pieces.sofa(rng)
    return replace(piece, parts=[replace(part, group=0) for part in piece.parts])


def occupied(rng: np.random.Generator, build: Builder = pieces.chair) -> Furniture:
    """Build a chair or a sofa with somebody on it."""
    seat = build(rng)
    assert seat.seat is not None
    somebody = moved(sitting_person(rng, seat.seat), (0, 0, 0), group=next_group(seat.parts))
    return Furniture(seat.parts + somebody, seat.width_m + 0.3, seat.depth_m + 0.9)


def set_table(guests: int) -> Callable[[np.random.Generator], Furniture]:
    """Return a builder of a dining table with chairs at its long sides, `guests` of them occupied."""

    def build(rng: np.random.Generator) -> Furniture:
        table = pieces.dining_table(rng)
        while table.top_m is None or table.top_m < 0.6:
            table = pieces.dining_table(rng)
        parts = list(table.parts)
        places = [(x, side) for side in (1, -1) for x in ((-0.3, 0.3) if table.width_m > 1.3 else (0.0,))]
        order = [places[int(i)] for i in rng.permutation(len(places))]
        free = int(rng.integers(0, max(1, len(order) - guests) + 1))
        for number, (x, side) in enumerate(order[: guests + free]):
            chair = occupied(rng) if number < guests else pieces.chair(rng)
            # Guests sit back from the table's edge by what their bellies need.
            away = 0.5 * table.depth_m + (0.34 if number < guests else rng.uniform(0.05, 0.3))
            yaw_rad = 0.0 if side > 0 else np.pi
            parts += moved(chair.parts, (x * table.width_m * 0.85, side * away, 0), yaw_rad, next_group(parts))
        return Furniture(parts, table.width_m + 0.1, table.depth_m + 1.5, surface=table)

    return build
