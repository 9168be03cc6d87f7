"""Four-legged animals of PASCAL VOC's classes, told apart by build, head, tail and coat.

Parts carry the names of PASCAL-Part ("lflleg": left front lower leg).  An animal faces -y and has its left at +x.
"""

from dataclasses import dataclass

import numpy as np

from m3vit.data.synthetic.scenes.materials import FloatArray, Material, Pattern, hsv_to_rgb, pick
from m3vit.data.synthetic.scenes.solids import (
    Assembly,
    Builder,
    Furniture,
    Shape,
    Vector,
    product,
    rotate_one,
    rotation,
)


@dataclass(frozen=True)
class _Build:
    """Proportions in metres and degrees; `neck_deg` is the neck's angle above the horizontal."""

    label: str
    height: float  # of the back
    length: float  # of the trunk
    trunk: tuple[float, float]  # its width and height
    leg: float  # thickness
    neck: tuple[float, float]  # length and thickness
    neck_deg: float
    head: Vector  # width, length, height
    muzzle: Vector
    ear: Vector
    tail: tuple[float, float, float]  # length, thickness, degrees above the horizontal
    paws: bool = False  # legs in one piece with a paw, as PASCAL-Part has them for cats and dogs
    horns: bool = False


_COW = _Build("cow", 1.38, 1.75, (0.66, 0.74), 0.15, (0.5, 0.4), 22, (0.25, 0.36, 0.3), (0.2, 0.26, 0.2),
              (0.2, 0.05, 0.1), (0.75, 0.05, -80), horns=True)  # fmt: skip
_HORSE = _Build("horse", 1.52, 1.65, (0.5, 0.6), 0.13, (0.85, 0.3), 52, (0.21, 0.42, 0.27), (0.16, 0.3, 0.18),
                (0.06, 0.05, 0.16), (0.8, 0.14, -72))  # fmt: skip
_SHEEP = _Build("sheep", 0.8, 1.05, (0.58, 0.58), 0.08, (0.26, 0.24), 35, (0.15, 0.24, 0.17), (0.11, 0.15, 0.11),
                (0.15, 0.04, 0.06), (0.18, 0.09, -60))  # fmt: skip
_DOG = _Build("dog", 0.6, 0.72, (0.22, 0.28), 0.075, (0.24, 0.16), 50, (0.18, 0.19, 0.17), (0.1, 0.16, 0.09),
              (0.06, 0.06, 0.13), (0.36, 0.05, 45), paws=True)  # fmt: skip
_CAT = _Build("cat", 0.34, 0.48, (0.18, 0.19), 0.05, (0.1, 0.11), 45, (0.15, 0.12, 0.13), (0.055, 0.05, 0.045),
              (0.05, 0.03, 0.075), (0.36, 0.035, 70), paws=True)  # fmt: skip


def cow(rng: np.random.Generator) -> Furniture:
    """Build a cow: heavy, level back, horns; blotched or brown."""
    brown = hsv_to_rgb(rng.uniform(0.04, 0.08), rng.uniform(0.4, 0.7), rng.uniform(0.25, 0.5))
    dark = pick(rng, (np.array([0.06, 0.06, 0.06]), brown))
    hide = Material(Pattern.BLOTCHES, np.array([0.92, 0.9, 0.87]), dark, rng.uniform(0.3, 0.5))
    if rng.random() < 0.3:
        hide = Material(Pattern.FLAT, brown, brown, 1.0)
    return _animal(rng, _COW, hide, hide, _plain(0.03, 0.35, 0.75))


def horse(rng: np.random.Generator) -> Furniture:
    """Build a horse: tall, high neck with a mane, long face; brown, black, grey or white."""
    coat = pick(rng, (hsv_to_rgb(rng.uniform(0.04, 0.08), rng.uniform(0.5, 0.8), rng.uniform(0.25, 0.55)),
                      np.array([0.1, 0.09, 0.09]), np.array([0.75, 0.74, 0.72])))  # fmt: skip
    hide = Material(Pattern.NOISE, coat, 0.85 * coat, 0.4)
    return _animal(rng, _HORSE, hide, _plain(0.06, 0.4, pick(rng, (0.08, 0.15, 0.7))), hide)


def sheep(rng: np.random.Generator) -> Furniture:
    """Build a sheep: a woolly ball on thin legs with a dark or white face."""
    wool = Material(Pattern.NOISE, np.array([0.93, 0.9, 0.82]), np.array([0.66, 0.62, 0.54]), 0.07)
    face = _plain(0.08, 0.15, pick(rng, (0.12, 0.12, 0.8)))
    return _animal(rng, _SHEEP, wool, face, face, head_coat=face, leg_coat=face)


def dog(rng: np.random.Generator) -> Furniture:
    """Build a dog: slim, long muzzle, hanging ears, tail up; one or two colours."""
    coats = [hsv_to_rgb(rng.uniform(0.05, 0.1), rng.uniform(0.2, 0.7), value) for value in (0.75, 0.4, 0.15, 0.9)]
    coat = pick(rng, coats)
    hide = Material(pick(rng, (Pattern.FLAT, Pattern.BLOTCHES)), coat, pick(rng, coats), 0.2)
    return _animal(rng, _DOG, hide, Material(Pattern.FLAT, 0.7 * coat, coat, 0.1), hide)


def cat(rng: np.random.Generator) -> Furniture:
    """Build a cat: small, round head, pointed ears, a long tail held up; often striped."""
    coat = pick(rng, (hsv_to_rgb(0.07, 0.65, 0.8), hsv_to_rgb(0.09, 0.15, 0.5), np.array([0.1, 0.1, 0.1]),
                      np.array([0.9, 0.88, 0.85])))  # fmt: skip
    hide = Material(pick(rng, (Pattern.STRIPES, Pattern.FLAT)), coat, 0.6 * coat, 0.08)
    return _animal(rng, _CAT, hide, hide, _plain(0.03, 0.3, 0.75))


FARM: tuple[Builder, ...] = (cow, horse, sheep)
PETS: tuple[Builder, ...] = (dog, cat)


def _plain(hue: float, saturation: float, value: float) -> Material:
    colour = hsv_to_rgb(hue, saturation, value)
    return Material(Pattern.FLAT, colour, colour, 1.0)


def _animal(rng: np.random.Generator, build: _Build, coat: Material, hair: Material, muzzle: Material,
            head_coat: Material | None = None, leg_coat: Material | None = None) -> Furniture:  # fmt: skip
    """Put an animal together; `hair` is that of ears, tail and mane."""
    body = Assembly(build.label, rng.uniform(0.85, 1.12))
    width, height = build.trunk
    middle = build.height - height / 2
    trunk = Shape.SPHERE if build.label == "sheep" else Shape.CUSHION
    body.add("torso", trunk, (width, build.length, height), (0, 0, middle), coat)

    neck_length, neck_thick = build.neck
    neck_deg = build.neck_deg + rng.uniform(-14, 10)
    if not build.paws and rng.random() < 0.3:
        neck_deg = rng.uniform(-60, -40)  # grazing
    up, out = float(np.sin(np.radians(neck_deg))), float(np.cos(np.radians(neck_deg)))
    root = np.array([0, -(build.length / 2 - 0.4 * neck_thick), middle + 0.2 * height])
    tip = root + neck_length * np.array([0, -out, up])
    along = rotation("x", np.radians(90 - neck_deg))  # takes z to the neck's direction
    neck_size = (0.72 * neck_thick, neck_thick, neck_length + 0.9 * neck_thick)
    body.add("neck", Shape.CUSHION, neck_size, (root + tip) / 2, coat, along)
    if build.label == "horse":
        mane = (root + tip) / 2 + rotate_one(0, 0.5 * neck_thick, 0, along)
        body.add("neck", Shape.CUSHION, (0.07, 0.14, neck_length + 0.15), mane, hair, along)
    _add_head(rng, build, body, tip, neck_deg, head_coat or coat, hair, muzzle)
    _add_legs(rng, build, body, leg_coat or coat, muzzle)

    tail_length, tail_thick, tail_deg = build.tail
    tail_deg += rng.uniform(-12, 12)
    lift = rotation("x", -np.radians(90 - tail_deg))  # takes z backwards and up
    rump = np.array([0, build.length / 2 - 0.02, build.height - 0.18 * height])
    end = rump + rotate_one(0, 0, tail_length / 2, lift)
    body.add("tail", Shape.CUSHION, (tail_thick, tail_thick, tail_length), end, hair, lift)
    length = (build.length + 2 * neck_length) * body.unit_m
    return Furniture(body.parts, max(width * body.unit_m, 0.5 * length), length)


def _add_head(rng: np.random.Generator, build: _Build, body: Assembly, tip: FloatArray, neck_deg: float, coat: Material,
              hair: Material, muzzle: Material) -> None:  # fmt: skip
    """Add the head with muzzle, ears, eyes and horns at the end of the neck."""
    wide, long, tall = build.head
    droop_deg = rng.uniform(15, 35) - min(0.0, neck_deg)
    turn = rotation("z", np.radians(rng.uniform(-40, 40)))
    turn = product(turn, rotation("x", np.radians(droop_deg)))

    def at(x: float, y: float, z: float) -> FloatArray:
        return np.asarray(tip + rotate_one(x, y, z, turn))

    body.add("head", Shape.SPHERE, (wide, 1.25 * long, tall), at(0, -0.3 * long, 0), coat, turn)
    snout, dark = "nose" if build.label == "cat" else "muzzle", _plain(0, 0, 0.05)
    body.add(snout, Shape.CUSHION, build.muzzle, at(0, -0.85 * long, -0.14 * tall), muzzle, turn)
    if build.paws:
        end = at(0, -0.85 * long - 0.5 * build.muzzle[1], -0.05 * tall)
        body.add("nose", Shape.BEAD, (0.035, 0.03, 0.03), end, dark, turn)
    upright = build.label in ("cat", "horse")
    ear = Shape.CONE if upright else Shape.SPHERE
    spread, level = (0.34, 0.5) if upright else (0.52, 0.1) if build.label == "dog" else (0.6, 0.4)
    eye = 0.14 * wide
    for side, letter in ((1, "l"), (-1, "r")):
        body.add(letter + "ear", ear, build.ear, at(side * spread * wide, 0, level * tall), hair, turn)
        body.add(letter + "eye", Shape.BEAD, (eye, eye, eye), at(side * 0.34 * wide, -0.62 * long, 0.18 * tall), dark,
                 turn)  # fmt: skip
        if build.horns:
            tilt = product(turn, rotation("y", side * np.radians(40)))
            root = at(side * 0.42 * wide, 0.02, 0.55 * tall)
            body.add(letter + "horn", Shape.CONE, (0.06, 0.06, 0.22), root, _plain(0.1, 0.2, 0.85), tilt)


def _add_legs(rng: np.random.Generator, build: _Build, body: Assembly, coat: Material,
              paw: Material) -> None:  # fmt: skip
    """Add four legs in mid-step or standing."""
    width, height = build.trunk
    hip = build.height - 0.6 * height
    stride_deg = rng.uniform(0, 22)
    for side, letter in ((1, "l"), (-1, "r")):
        for end, place in ((-1, "f"), (1, "b")):
            step_deg = stride_deg * side * end + rng.uniform(-3, 3)
            top = np.array([side * (0.5 * width - 0.6 * build.leg), end * (0.5 * build.length - 0.9 * build.leg), hip])
            turn = rotation("x", -np.radians(step_deg))
            half = hip / np.cos(np.radians(step_deg)) / 2
            for level, thick, part in ((0.5, 1.35, "uleg"), (1.5, 0.85, "lleg")):
                centre = top + rotate_one(0, 0, -level * half, turn)
                name = letter + place + ("leg" if build.paws else part)
                body.add(name, Shape.LIMB, (thick * build.leg, thick * build.leg, 1.15 * half), centre, coat, turn)
            foot = top + rotate_one(0, 0, -2 * half, turn) + (0, -0.3 * build.leg, 0.35 * build.leg)
            if build.paws:
                size = (1.2 * build.leg, 1.7 * build.leg, 0.7 * build.leg)
                body.add(letter + place + "pa", Shape.CUSHION, size, foot, paw)
