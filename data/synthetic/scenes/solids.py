"""What everything in a scene is made of: simple solids with a material and labels.

Local frame of an object: it stands on z = 0, its back is at +y (towards a wall), its centre at x = y = 0; metres.
A person or animal therefore faces -y, and its left is at +x.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from m3vit.data.synthetic.scenes.materials import FloatArray, Material, pick

Vector = tuple[float, float, float]


class Shape(Enum):
    """A solid that fits the unit cube around the origin before it is scaled."""

    BOX = "box"
    CYLINDER = "cylinder"  # axis z
    SHADE = "shade"  # cone frustum, narrower at the top
    SPHERE = "sphere"
    CUSHION = "cushion"  # superellipsoid: a box with soft corners
    LIMB = "limb"  # a rounded bar along z, thinner below
    TRUNK = "trunk"  # a rounded body, narrower below
    BEAD = "bead"  # a coarse sphere, for small things
    CABIN = "cabin"  # a box whose top is shorter along y and a little narrower: the upper half of a car
    CONE = "cone"  # axis z, the tip above


@dataclass(frozen=True)
class Part:
    """One solid of an object; parts of one `group` are one instance (borders between instances are edges).

    `turn` (3, 3) rotates the solid about its centre. `name` is a body part in the vocabulary of PASCAL-Part.
    """

    shape: Shape
    size: Vector
    centre: Vector
    material: Material
    label: str
    group: int = 0
    turn: FloatArray | None = field(default=None, compare=False)
    name: str = ""


@dataclass(frozen=True)
class Furniture:
    """An object with its footprint.

    `top_m` is the height of the surface that small things may stand on, `seat` the point where someone's hips rest
    (above it the thighs), `surface` the piece among several whose top is to be used.
    """

    parts: list[Part]
    width_m: float
    depth_m: float
    top_m: float | None = None
    seat: Vector | None = None
    surface: "Furniture | None" = None


Builder = Callable[[np.random.Generator], Furniture]


@dataclass(frozen=True)
class PlacedPart:
    """A part in the scene: turned by `yaw_rad` about z, then moved to `origin`; `instance` is unique per object."""

    part: Part
    origin: Vector
    yaw_rad: float
    instance: int


@dataclass
class Assembly:
    """A living thing under construction: what `add` gets is in units of `unit_m`."""

    label: str
    unit_m: float
    parts: list[Part] = field(default_factory=list, init=False)

    def add(self, name: str, shape: Shape, size: Vector, centre: FloatArray | Vector, material: Material,
            turn: FloatArray | None = None) -> None:  # fmt: skip
        """Add a solid with the name of a body part."""
        width, depth, height = (float(value) * self.unit_m for value in size)
        x, y, z = (float(value) * self.unit_m for value in centre)
        self.parts.append(Part(shape, (width, depth, height), (x, y, z), material, self.label, 0, turn, name))


def legs(rng: np.random.Generator, width: float, depth: float, height: float, thick: float, material: Material,
         label: str) -> list[Part]:  # fmt: skip
    """Build four legs at the corners of a width x depth footprint."""
    shape = pick(rng, (Shape.BOX, Shape.BOX, Shape.CYLINDER))
    return [
        Part(shape, (thick, thick, height), (x * (width - thick) / 2, y * (depth - thick) / 2, height / 2), material,
             label)
        for x in (-1, 1)
        for y in (-1, 1)
    ]  # fmt: skip


def product(left: FloatArray, right: FloatArray) -> FloatArray:
    """Return a matrix product, written out: the same floats whatever the BLAS."""
    return np.asarray((left[:, :, None] * right[None, :, :]).sum(axis=1))


def rotation(axis: str, angle_rad: float) -> FloatArray:
    """Return the matrix (3, 3) that rotates by an angle about "x", "y" or "z"."""
    cos, sin = float(np.cos(angle_rad)), float(np.sin(angle_rad))
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = cos
    matrix[first, second], matrix[second, first] = -sin, sin
    return matrix


def rotate_one(x: float, y: float, z: float, turn: FloatArray) -> FloatArray:
    """Return one point (3,) rotated by a matrix (3, 3)."""
    return np.asarray(rotate(np.array([[x, y, z]]), turn)[0])


def rotate(points_N3: FloatArray, turn: FloatArray) -> FloatArray:
    """Return points (N, 3) rotated by one matrix (3, 3) or by one of their own each (N, 3, 3)."""
    x, y, z = points_N3.T
    return np.stack([turn[..., row, 0] * x + turn[..., row, 1] * y + turn[..., row, 2] * z for row in range(3)], axis=1)


def moved(parts: Sequence[Part], offset: Vector, yaw_rad: float = 0.0, group: int = 0) -> list[Part]:
    """Return parts turned about the z axis, then moved, with their groups counted from `group` on."""
    turn = rotation("z", yaw_rad)
    result = []
    for part in parts:
        x, y, z = (float(value) for value in rotate(np.array([part.centre]), turn)[0] + np.array(offset))
        own = part.turn
        if yaw_rad:
            own = turn if own is None else product(turn, own)
        result.append(replace(part, centre=(x, y, z), turn=own, group=part.group + group))
    return result


def next_group(parts: Sequence[Part]) -> int:
    """Return the first group number that no part has."""
    return 1 + max((part.group for part in parts), default=-1)
