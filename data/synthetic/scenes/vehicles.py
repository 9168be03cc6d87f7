"""Cars and buses.  A vehicle faces -y; wheels carry the names of PASCAL-Part."""

from collections.abc import Sequence

import numpy as np

from m3vit.data.synthetic.scenes.materials import Material, Pattern, hsv_to_rgb, pick, random_material
from m3vit.data.synthetic.scenes.solids import Builder, Furniture, Part, Shape, Vector, rotation


def _plain(hue: float, saturation: float, value: float, glow: float = 0.0) -> Material:
    colour = hsv_to_rgb(hue, saturation, value)
    return Material(Pattern.FLAT, colour, colour, 1.0, 0.0, glow)


def _coat(rng: np.random.Generator) -> Material:
    """Draw a car paint: a strong colour, or white, grey or black."""
    if rng.random() < 0.4:
        return _plain(0.6, 0.05, pick(rng, (0.08, 0.4, 0.7, 0.92)))
    return random_material(rng, (Pattern.FLAT,), saturation=(0.5, 0.9), value=(0.3, 0.85))


def _wheels(label: str, diameter: float, width: float, half_track: float, axles: Sequence[float]) -> list[Part]:
    """Return wheels with a bright hub on axles at these y."""
    turn = rotation("y", np.pi / 2)
    tyre, hub = _plain(0, 0, 0.07), _plain(0.6, 0.03, 0.7)
    parts = []
    for number, (y, side) in enumerate(((y, side) for y in axles for side in (1, -1)), start=1):
        centre = (side * half_track, y, diameter / 2)
        name = f"wheel_{number}"
        parts.append(Part(Shape.CYLINDER, (diameter, diameter, width), centre, tyre, label, 0, turn, name))
        size = (0.55 * diameter, 0.55 * diameter, width + 0.03)
        parts.append(Part(Shape.CYLINDER, size, centre, hub, label, 0, turn, name))
    return parts


def _lights(label: str, half_width: float, half_length: float, height: float) -> list[Part]:
    """Return white lights in front and red ones behind."""
    front, back = _plain(0.15, 0.1, 1.0, 0.3), _plain(0, 0.9, 0.7, 0.2)
    parts = []
    for number, side in enumerate((1, -1), start=1):
        size: Vector = (0.3, 0.06, 0.16)
        for end, material in ((-1, front), (1, back)):
            name = f"headlight_{number}" if end < 0 else ""
            centre = (side * (half_width - 0.25), end * half_length, height)
            parts.append(Part(Shape.BOX, size, centre, material, label, 0, None, name))
    return parts


def car(rng: np.random.Generator) -> Furniture:
    """Build a saloon or an estate car: body, glass cabin, roof, wheels, lights, bumpers."""
    length, width, paint = rng.uniform(3.7, 4.7), rng.uniform(1.65, 1.85), _coat(rng)
    waist, roof, wheel = rng.uniform(0.82, 0.95), rng.uniform(1.4, 1.6), rng.uniform(0.6, 0.7)
    glass, trim = _plain(0.58, 0.25, 0.16), _plain(0, 0, 0.15)
    estate = rng.random() < 0.4
    cabin = length * (0.66 if estate else 0.56)
    back = (0.5 * length - 0.52 * cabin) if estate else 0.05 * length
    parts = [
        Part(Shape.CUSHION, (width, length, waist - 0.2), (0, 0, 0.5 * waist + 0.12), paint, "car"),
        Part(Shape.BOX, (0.94 * width, 0.93 * length, 0.4), (0, 0, 0.42), paint, "car"),
        Part(Shape.CABIN, (0.92 * width, cabin, roof - waist + 0.08), (0, back, 0.5 * (roof + waist)), glass, "car"),
        Part(Shape.CUSHION, (0.8 * width, 0.66 * cabin, 0.1), (0, back, roof + 0.03), paint, "car"),
    ]
    for y in (-0.02, 0.02) if estate else (0.0,):  # door pillars
        size = (0.9 * width, 0.09, roof - waist)
        parts.append(Part(Shape.CABIN, size, (0, back + y * length * 5, 0.5 * (roof + waist)), paint, "car"))
    for end in (-1, 1):
        parts.append(Part(Shape.BOX, (0.9 * width, 0.12, 0.16), (0, end * 0.485 * length, 0.36), trim, "car"))
    parts += _lights("car", 0.5 * width, 0.468 * length, 0.66)
    parts += _wheels("car", wheel, 0.22, 0.5 * width - 0.09, (-0.31 * length, 0.3 * length))
    return Furniture(parts, width + 0.2, length + 0.2)


def bus(rng: np.random.Generator) -> Furniture:
    """Build a bus: a tall box with a band of windows all round, doors, wheels and lights."""
    length, width, height = rng.uniform(7.5, 11.0), 2.5, rng.uniform(2.7, 3.1)
    paint, band = _coat(rng), pick(rng, (_coat(rng), _plain(0, 0, 0.9)))
    glass = _plain(0.58, 0.25, 0.14)
    parts = [
        Part(Shape.BOX, (width, length, height - 0.4), (0, 0, 0.5 * height + 0.2), paint, "bus"),
        Part(Shape.BOX, (width + 0.02, length + 0.02, 0.25), (0, 0, 0.85), band, "bus"),
        Part(Shape.CUSHION, (width - 0.1, length - 0.2, 0.3), (0, 0, height), paint, "bus"),
        Part(Shape.BOX, (width - 0.3, 0.1, 1.25), (0, -0.5 * length, height - 1.05), glass, "bus"),
        Part(Shape.BOX, (width - 0.6, 0.1, 0.8), (0, 0.5 * length, height - 0.9), glass, "bus"),
        Part(Shape.BOX, (1.5, 0.14, 0.25), (0, -0.5 * length, height - 0.2), _plain(0.13, 0.8, 0.9, 0.4), "bus"),
    ]
    count = int(length / 1.3)
    for number in range(count):
        y = (number + 0.5) / count * (length - 0.4) - 0.5 * (length - 0.4)
        for side in (-1, 1):
            door = side < 0 and number in (0, count // 2)
            low = 0.5 if door else height - 1.5
            size = (0.06, (length - 0.4) / count - 0.18, height - 0.45 - low)
            parts.append(Part(Shape.BOX, size, (side * 0.5 * width, y, low + 0.5 * size[2]), glass, "bus"))
    parts += _lights("bus", 0.5 * width, 0.5 * length, 0.65)
    parts += _wheels("bus", 0.95, 0.3, 0.5 * width - 0.12, (-0.3 * length, 0.28 * length))
    return Furniture(parts, width + 0.2, length + 0.2)


TRAFFIC: tuple[Builder, ...] = (car, car, car, bus)
