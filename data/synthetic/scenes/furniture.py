"""Pieces of furniture as lists of simple solids, in the local frame of `m3vit.data.synthetic.scenes.solids`.

Pillows count as the bed or sofa they lie on and desks as tables: as classes of their own they stay under 1 % of the
pixels and cannot be learned from a few hundred images.
"""

import numpy as np

from m3vit.data.synthetic.scenes.materials import Material, Pattern, fabric, paint, pick, random_material, wood
from m3vit.data.synthetic.scenes.solids import Furniture, Part, Shape, legs


def dining_table(rng: np.random.Generator) -> Furniture:
    """Build a table on four legs, of dining or coffee-table height."""
    width, depth, top = rng.uniform(0.8, 1.8), rng.uniform(0.6, 1.0), wood(rng)
    height = rng.uniform(0.35, 0.5) if rng.random() < 0.4 else rng.uniform(0.68, 0.8)
    parts = legs(rng, width, depth, height, rng.uniform(0.04, 0.08), top, "table")
    parts.append(Part(Shape.BOX, (width, depth, 0.04), (0, 0, height), top, "table"))
    return Furniture(parts, width, depth, height + 0.02)


def round_table(rng: np.random.Generator) -> Furniture:
    """Build a round table on a central foot."""
    diameter, height, top = rng.uniform(0.7, 1.2), rng.uniform(0.5, 0.78), pick(rng, (wood, paint))(rng)
    parts = [
        Part(Shape.CYLINDER, (diameter, diameter, 0.04), (0, 0, height), top, "table"),
        Part(Shape.CYLINDER, (0.09, 0.09, height), (0, 0, height / 2), top, "table"),
        Part(Shape.SHADE, (0.5 * diameter, 0.5 * diameter, 0.06), (0, 0, 0.03), top, "table"),
    ]
    inner = diameter / np.sqrt(2)  # things stand inside the inscribed square
    return Furniture(parts, diameter, diameter, height + 0.02 if inner > 0.45 else None)


def desk(rng: np.random.Generator) -> Furniture:
    """Build a desk: a table with a drawer pedestal."""
    width, depth, height = rng.uniform(1.1, 1.7), rng.uniform(0.6, 0.8), rng.uniform(0.7, 0.78)
    top = pick(rng, (wood, paint))(rng)
    front = pick(rng, (top, paint(rng)))
    parts = legs(rng, width, depth, height, rng.uniform(0.04, 0.07), top, "table")
    parts.append(Part(Shape.BOX, (width, depth, 0.04), (0, 0, height), top, "table"))
    parts.append(Part(Shape.BOX, (0.4, depth * 0.9, height - 0.06), (width / 2 - 0.27, 0, height / 2), top, "table"))
    for drawer in range(3):
        z = 0.06 + (drawer + 0.5) * (height - 0.12) / 3
        size = (0.36, 0.02, (height - 0.12) / 3 - 0.03)
        parts.append(Part(Shape.BOX, size, (width / 2 - 0.27, -depth * 0.45, z), front, "table"))
    return Furniture(parts, width, depth, height + 0.02)


def chair(rng: np.random.Generator) -> Furniture:
    """Build a dining chair on four legs or an office chair on a foot, either with or without armrests."""
    width, height, back = rng.uniform(0.42, 0.54), rng.uniform(0.42, 0.5), rng.uniform(0.38, 0.58)
    frame, seat = pick(rng, (wood, paint))(rng), fabric(rng)
    soft = pick(rng, (Shape.BOX, Shape.CUSHION))
    parts = [
        Part(soft, (width, width, 0.08), (0, 0, height), seat, "chair"),
        Part(soft, (width, 0.06, back), (0, width / 2 - 0.03, height + 0.1 + back / 2), pick(rng, (seat, frame)),
             "chair"),
    ]  # fmt: skip
    for side in (-1, 1):
        x = side * (width / 2 - 0.04)
        parts.append(Part(Shape.BOX, (0.04, 0.04, 0.25), (x, width / 2 - 0.03, height + 0.1), frame, "chair"))
    if rng.random() < 0.3:
        for side in (-1, 1):
            x = side * width / 2
            parts.append(Part(Shape.BOX, (0.05, width * 0.8, 0.04), (x, 0, height + 0.22), frame, "chair"))
            parts.append(Part(Shape.BOX, (0.04, 0.04, 0.22), (x, -width * 0.3, height + 0.11), frame, "chair"))
    if rng.random() < 0.35:
        parts.append(Part(Shape.CYLINDER, (0.07, 0.07, height), (0, 0, height / 2), frame, "chair"))
        parts.append(Part(Shape.SHADE, (width, width, 0.08), (0, 0, 0.05), frame, "chair"))
    else:
        parts += legs(rng, width, width, height, 0.045, frame, "chair")
    return Furniture(parts, width + 0.05, width, seat=(0.0, width / 2 - 0.2, height + 0.04))


def sofa(rng: np.random.Generator) -> Furniture:
    """Build an armchair or a sofa of two or three seats, with seat cushions and loose pillows."""
    seats, depth, cover = int(rng.integers(1, 4)), rng.uniform(0.8, 1.0), fabric(rng)
    width, arm, height = 0.65 * seats + 0.4, rng.uniform(0.14, 0.2), rng.uniform(0.38, 0.45)
    cushions = pick(rng, (cover, cover, fabric(rng)))
    parts = [
        Part(Shape.BOX, (width, depth, height * 0.6), (0, 0, height * 0.3 + 0.05), cover, "sofa"),
        Part(Shape.CUSHION, (width, 0.24, 0.9), (0, depth / 2 - 0.12, 0.45), cover, "sofa"),
    ]
    for side in (-1, 1):
        x = side * (width - arm) / 2
        parts.append(Part(pick(rng, (Shape.BOX, Shape.CUSHION)), (arm, depth, 0.6), (x, 0, 0.32), cover, "sofa"))
    for seat in range(seats):
        x = (seat - (seats - 1) / 2) * 0.65
        parts.append(Part(Shape.CUSHION, (0.65, depth - 0.22, 0.2), (x, -0.1, height), cushions, "sofa"))
    pillow = fabric(rng)
    for group in range(1, 1 + int(rng.integers(0, 3))):
        x = (rng.integers(seats) - (seats - 1) / 2) * 0.65
        centre = (x, depth / 2 - 0.3, height + 0.24)
        parts.append(Part(Shape.CUSHION, (0.44, 0.18, 0.38), centre, pillow, "sofa", group))
    middle = ((seats - 1) // 2 - (seats - 1) / 2) * 0.65  # of a seat cushion at or beside the middle
    return Furniture(parts, width, depth, seat=(middle, depth / 2 - 0.38, height + 0.09))


def bed(rng: np.random.Generator) -> Furniture:
    """Build a single or double bed with headboard, mattress, blanket and pillows."""
    width, depth, height = rng.uniform(0.9, 1.8), rng.uniform(1.9, 2.1), rng.uniform(0.32, 0.5)
    frame, sheet, blanket, pillow = wood(rng), paint(rng), fabric(rng), fabric(rng)
    headboard = rng.uniform(0.7, 1.2)
    parts = [
        Part(Shape.BOX, (width, depth, 0.2), (0, 0, height * 0.5), frame, "bed"),
        Part(Shape.BOX, (width - 0.04, depth - 0.08, 0.22), (0, 0, height + 0.08), sheet, "bed"),
        Part(Shape.BOX, (width + 0.03, depth * 0.68, 0.26), (0, -0.15 * depth, height + 0.09), blanket, "bed"),
        Part(Shape.BOX, (width + 0.06, 0.06, headboard), (0, depth / 2, headboard / 2 + 0.1), frame, "bed"),
    ]
    parts += legs(rng, width, depth, height, 0.07, frame, "bed")
    pillows = 2 if width > 1.3 else 1
    for group in range(1, 1 + pillows):
        x = (group - 1 - (pillows - 1) / 2) * width / 2
        parts.append(Part(Shape.CUSHION, (0.62, 0.4, 0.2), (x, depth * 0.38, height + 0.25), pillow, "bed", group))
    return Furniture(parts, width + 0.06, depth + 0.06)


def cabinet(rng: np.random.Generator) -> Furniture:
    """Build a wardrobe or a chest: a box with a grid of fronts, each with a handle."""
    tall = rng.random() < 0.4
    width, depth = rng.uniform(0.6, 1.4), rng.uniform(0.35, 0.6)
    height = rng.uniform(1.5, 2.1) if tall else rng.uniform(0.5, 1.0)
    columns, rows = int(rng.integers(1, 4)), int(rng.integers(1, 3) if tall else rng.integers(1, 5))
    body, handle = pick(rng, (wood, paint))(rng), paint(rng)
    front = pick(rng, (body, body, paint(rng)))
    parts = [Part(Shape.BOX, (width, depth, height), (0, 0, height / 2), body, "cabinet")]
    for column in range(columns):
        for row in range(rows):
            x, z = (column + 0.5) / columns * width - width / 2, (row + 0.5) / rows * height
            size = (width / columns - 0.03, 0.02, height / rows - 0.03)
            parts.append(Part(Shape.BOX, size, (x, -depth / 2, z), front, "cabinet"))
            parts.append(Part(Shape.BOX, (0.12, 0.03, 0.03), (x, -depth / 2 - 0.02, z), handle, "cabinet"))
    return Furniture(parts, width, depth + 0.04, None if tall else height)


def bookshelf(rng: np.random.Generator) -> Furniture:
    """Build an open shelf, most of it filled with blocks of books."""
    width, depth, height = rng.uniform(0.7, 1.5), rng.uniform(0.25, 0.35), rng.uniform(1.0, 2.1)
    board, shelves = pick(rng, (wood, wood, paint))(rng), int(height / 0.36)
    parts = [Part(Shape.BOX, (width, 0.02, height), (0, depth / 2, height / 2), board, "bookshelf")]
    for side in (-1, 1):
        parts.append(Part(Shape.BOX, (0.04, depth, height), (side * width / 2, 0, height / 2), board, "bookshelf"))
    for shelf in range(shelves + 1):
        z = shelf * (height - 0.04) / shelves + 0.015
        parts.append(Part(Shape.BOX, (width - 0.04, depth - 0.02, 0.04), (0, 0, z), board, "bookshelf"))
    for shelf in range(shelves):
        x, z = -width / 2 + 0.03, shelf * (height - 0.04) / shelves + 0.035
        while x < width / 2 - 0.15 and rng.random() < 0.93:
            size = (rng.uniform(0.05, 0.25), rng.uniform(0.15, 0.22), rng.uniform(0.18, 0.29))
            patterns = (Pattern.PATCHES, Pattern.FLAT, Pattern.STRIPES)
            spine = random_material(rng, patterns, saturation=(0.2, 0.9), value=(0.2, 0.8), period_m=(0.03, 0.06))
            parts.append(Part(Shape.BOX, size, (x + size[0] / 2, -0.02, z + size[2] / 2), spine, "books", 1))
            x += size[0] + pick(rng, (0.004, 0.1))
    return Furniture(parts, width + 0.04, depth)


def book_pile(rng: np.random.Generator) -> Furniture:
    """Build one to four books lying on each other."""
    parts: list[Part] = []
    z = 0.0
    for _ in range(int(rng.integers(2, 6))):
        size = (rng.uniform(0.2, 0.28), rng.uniform(0.14, 0.2), rng.uniform(0.03, 0.06))
        cover = random_material(
            rng, (Pattern.FLAT, Pattern.STRIPES), saturation=(0.2, 0.9), value=(0.2, 0.9), period_m=(0.03, 0.1)
        )
        centre = (rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02), z + size[2] / 2)
        parts.append(Part(Shape.BOX, size, centre, cover, "books"))
        z += size[2]
    return Furniture(parts, 0.3, 0.22)


def television(rng: np.random.Generator) -> Furniture:
    """Build a television on a foot; the screen is nearly black and sometimes faintly lit."""
    width = rng.uniform(0.7, 1.2)
    screen = dark_screen(rng)
    parts = [
        Part(Shape.BOX, (width, 0.05, width * 0.58), (0, 0, width * 0.29 + 0.06), screen, "television"),
        Part(Shape.BOX, (0.3, 0.2, 0.03), (0, 0, 0.015), screen, "television"),
        Part(Shape.BOX, (0.08, 0.04, 0.1), (0, 0, 0.05), screen, "television"),
    ]
    return Furniture(parts, width, 0.2)


def dark_screen(rng: np.random.Generator) -> Material:
    """Draw the material of a television screen."""
    patterns = (Pattern.FLAT, Pattern.FLAT, Pattern.NOISE)
    return random_material(
        rng, patterns, hue=(0.5, 0.7), saturation=(0.0, 0.3), value=(0.02, 0.12), period_m=(0.2, 0.4)
    )


def _lampshade(rng: np.random.Generator) -> Material:
    glow = pick(rng, (0.0, 0.6, 1.0))
    return random_material(rng, (Pattern.FLAT,), hue=(0.08, 0.16), saturation=(0.05, 0.5), value=(0.75, 1), glow=glow)


def _standing_lamp(rng: np.random.Generator, height: float, shade: float) -> Furniture:
    stand = paint(rng)
    parts = [
        Part(Shape.CYLINDER, (0.6 * shade, 0.6 * shade, 0.03), (0, 0, 0.015), stand, "lamp"),
        Part(Shape.CYLINDER, (0.04, 0.04, height), (0, 0, height / 2), stand, "lamp"),
        Part(Shape.SHADE, (shade, shade, 0.75 * shade), (0, 0, height), _lampshade(rng), "lamp"),
    ]
    return Furniture(parts, shade, shade)


def floor_lamp(rng: np.random.Generator) -> Furniture:
    """Build a lamp that stands on the floor."""
    return _standing_lamp(rng, rng.uniform(1.3, 1.7), rng.uniform(0.4, 0.55))


def table_lamp(rng: np.random.Generator) -> Furniture:
    """Build a lamp that stands on furniture."""
    return _standing_lamp(rng, rng.uniform(0.35, 0.5), rng.uniform(0.24, 0.34))


def ceiling_lamp(rng: np.random.Generator) -> Furniture:
    """Build a pendant; z = 0 is the ceiling and it hangs below."""
    drop, size, shade = rng.uniform(0.3, 0.7), rng.uniform(0.35, 0.6), _lampshade(rng)
    shape = pick(rng, (Shape.SHADE, Shape.SPHERE))
    parts = [
        Part(Shape.CYLINDER, (0.03, 0.03, drop), (0, 0, -drop / 2), shade, "lamp"),
        Part(shape, (size, size, size * rng.uniform(0.5, 0.9)), (0, 0, -drop), shade, "lamp"),
    ]
    return Furniture(parts, size, size)
