"""Articulated people: a random build, a pose of joint angles, clothes, and the solids that follow from them.

Parts carry the names of PASCAL-Part ("luarm": left upper arm, from the person's own view).  A person faces -y and
has their left at +x.  Lengths in the code are shares of the stature unless they end in _m; the shares are those of
common anthropometric tables (Drillis and Contini 1964), rounded.
"""

from dataclasses import dataclass

import numpy as np

from m3vit.data.synthetic.scenes.materials import FloatArray, Material, Pattern, hsv_to_rgb, pick, random_material
from m3vit.data.synthetic.scenes.solids import Assembly, Furniture, Part, Shape, moved, product, rotate_one, rotation

PART_NAMES = tuple(
    (
        "hair head lear lebrow leye lfoot lhand llarm llleg luarm luleg mouth neck nose rear rebrow reye rfoot rhand "
        "rlarm rlleg ruarm ruleg torso"
    ).split()
)

LEFT, RIGHT = 1, -1  # the sign of x
_SIDES = ((LEFT, "l"), (RIGHT, "r"))

# Lengths between joints, and thicknesses, as shares of the stature.
UPPER_LEG, LOWER_LEG, ANKLE = 0.245, 0.246, 0.042
UPPER_ARM, LOWER_ARM, HAND = 0.17, 0.15, 0.085
HIP_TO_SHOULDER, NECK, HEAD = 0.285, 0.055, 0.135
HIP_HALF_WIDTH = 0.048
THIGH_THICK = 0.092


@dataclass(frozen=True)
class Limb:
    """Joint angles of an arm or a leg in degrees, all 0 when it hangs down.

    `swing` is forward, `spread` sideways and away from the body, `twist` inward about its own axis, `bend` at the
    elbow or knee.
    """

    swing: float = 0.0
    spread: float = 0.0
    twist: float = 0.0
    bend: float = 0.0


@dataclass(frozen=True)
class Pose:
    """Joint angles in degrees: the trunk's `lean` forward, the head's `nod` and `look` to the left, limbs by side."""

    lean: float
    nod: float
    look: float
    arms: dict[int, Limb]
    legs: dict[int, Limb]


@dataclass
class _Body(Assembly):
    """A person under construction, around the middle between the hips, in shares of the stature."""

    girth: float  # thickness of everything, 1 = average
    shoulder: float  # half width


@dataclass(frozen=True)
class _Outfit:
    """What a person wears; `sleeves` and `legs` are how much of the arms and legs is covered, 0..2 (2: to the end)."""

    skin: Material
    hair: Material
    shirt: Material
    trousers: Material
    shoes: Material
    sleeves: float
    legs: float
    hair_style: str  # "bald", "short" or "long"


def person(rng: np.random.Generator) -> Furniture:
    """Build somebody who stands or walks, or now and then sits on the ground."""
    kind = pick(rng, ("stand",) * 5 + ("walk",) * 5 + ("raise",) * 3 + ("akimbo", "ground"))
    body = _build(rng, _POSES[kind](rng))
    lowest = min(_lowest_m(part) for part in body.parts)
    parts = moved(body.parts, (0.0, 0.0, -lowest))
    return Furniture(parts, 0.6, 1.0 if kind == "ground" else 0.6)


def sitting_person(rng: np.random.Generator, seat: tuple[float, float, float]) -> list[Part]:
    """Build somebody who sits with their weight on the point `seat` (metres) of a chair that faces -y."""
    child = rng.random() < 0.15
    stature_m = rng.uniform(1.1, 1.4) if child else rng.uniform(1.52, 1.92)
    hip_m = seat[2] + 0.45 * THIGH_THICK * stature_m
    # Raise the knees by as much as the lower legs are longer than the chair is high.
    rise = ((LOWER_LEG + ANKLE) * stature_m - hip_m) / (UPPER_LEG * stature_m)
    swing = 90 + float(np.degrees(np.arcsin(np.clip(rise, -0.1, 0.45))))
    legs = {side: Limb(swing, rng.uniform(2, 14), 0, swing + rng.uniform(-12, 18)) for side, _ in _SIDES}
    arms = {
        side: pick(rng, (Limb(rng.uniform(15, 35), rng.uniform(4, 14), rng.uniform(0, 25), rng.uniform(50, 80)),
                         Limb(rng.uniform(30, 60), rng.uniform(2, 12), rng.uniform(5, 30), rng.uniform(60, 110)),
                         Limb(rng.uniform(-5, 15), rng.uniform(6, 20), 0, rng.uniform(10, 50))))
        for side, _ in _SIDES
    }  # fmt: skip
    body = _build(rng, Pose(rng.uniform(-8, 12), rng.uniform(0, 20), rng.uniform(-45, 45), arms, legs), stature_m)
    return moved(body.parts, (seat[0], seat[1], hip_m))


# --- poses ----------------------------------------------------------------------------------------------------------


def _hanging_arm(rng: np.random.Generator) -> Limb:
    return Limb(rng.uniform(-8, 12), rng.uniform(5, 14), rng.uniform(0, 20), rng.uniform(5, 35))


def _straight_leg(rng: np.random.Generator) -> Limb:
    return Limb(rng.uniform(-3, 5), rng.uniform(2, 8), 0, rng.uniform(0, 8))


def _standing(rng: np.random.Generator) -> Pose:
    """Both arms down, or one of them bent as if it held something."""
    arms = {side: _hanging_arm(rng) for side, _ in _SIDES}
    if rng.random() < 0.45:
        arms[pick(rng, (LEFT, RIGHT))] = Limb(rng.uniform(10, 50), rng.uniform(5, 20), rng.uniform(0, 50),
                                              rng.uniform(60, 115))  # fmt: skip
    legs = {side: _straight_leg(rng) for side, _ in _SIDES}
    return Pose(rng.uniform(-3, 6), rng.uniform(-8, 20), rng.uniform(-50, 50), arms, legs)


def _walking(rng: np.random.Generator) -> Pose:
    """One leg ahead, the arms against the legs."""
    ahead = pick(rng, (LEFT, RIGHT))
    stride = rng.uniform(14, 34)
    legs = {
        ahead: Limb(stride, rng.uniform(0, 4), 0, rng.uniform(3, 15)),
        -ahead: Limb(-0.6 * stride, rng.uniform(0, 4), 0, rng.uniform(12, 45)),
    }
    arms = {
        side: Limb((-1 if side == ahead else 1) * stride * rng.uniform(0.5, 1.2), rng.uniform(4, 12), 10,
                   rng.uniform(15, 60))
        for side, _ in _SIDES
    }  # fmt: skip
    return Pose(rng.uniform(0, 9), rng.uniform(-5, 12), rng.uniform(-25, 25), arms, legs)


def _raised(rng: np.random.Generator) -> Pose:
    """One arm or both up: forward, sideways or overhead."""
    pose = _standing(rng)
    arms = dict(pose.arms)
    for side in pick(rng, ((LEFT,), (RIGHT,), (LEFT, RIGHT))):
        arms[side] = pick(rng, (
            Limb(0, rng.uniform(115, 160), 0, rng.uniform(0, 45)),
            Limb(rng.uniform(65, 100), rng.uniform(0, 25), 0, rng.uniform(0, 30)),
            Limb(0, rng.uniform(65, 100), -90, rng.uniform(0, 90)),  # forearms up
        ))  # fmt: skip
    return Pose(pose.lean, pose.nod, pose.look, arms, pose.legs)


def _akimbo(rng: np.random.Generator) -> Pose:
    """Hands on the hips."""
    pose = _standing(rng)
    arms = {side: Limb(-20, rng.uniform(35, 48), 80, rng.uniform(85, 105)) for side, _ in _SIDES}
    return Pose(pose.lean, pose.nod, pose.look, arms, {side: Limb(0, rng.uniform(4, 12)) for side, _ in _SIDES})


def _on_the_ground(rng: np.random.Generator) -> Pose:
    """Legs stretched out or drawn up, leaning back on the arms or with the arms round the knees."""
    if rng.random() < 0.5:
        legs = {side: Limb(rng.uniform(84, 90), rng.uniform(2, 15), 0, rng.uniform(0, 10)) for side, _ in _SIDES}
        arms = {side: Limb(rng.uniform(-50, -35), rng.uniform(8, 18), 0, rng.uniform(0, 8)) for side, _ in _SIDES}
        return Pose(rng.uniform(-22, -10), rng.uniform(5, 20), rng.uniform(-40, 40), arms, legs)
    swing = rng.uniform(122, 132)
    legs = {side: Limb(swing, rng.uniform(2, 10), 0, swing - rng.uniform(38, 42)) for side, _ in _SIDES}
    arms = {side: Limb(rng.uniform(50, 65), rng.uniform(0, 8), 20, rng.uniform(20, 45)) for side, _ in _SIDES}
    return Pose(rng.uniform(8, 18), rng.uniform(0, 20), rng.uniform(-40, 40), arms, legs)


_POSES = {"stand": _standing, "walk": _walking, "raise": _raised, "akimbo": _akimbo, "ground": _on_the_ground}


# --- body -----------------------------------------------------------------------------------------------------------


def _build(rng: np.random.Generator, pose: Pose, stature_m: float | None = None) -> _Body:
    if stature_m is None:
        stature_m = rng.uniform(1.05, 1.4) if rng.random() < 0.12 else rng.uniform(1.52, 1.95)
    body = _Body("person", stature_m, rng.uniform(0.88, 1.25), rng.uniform(0.1, 0.122))
    outfit = _draw_outfit(rng)
    upright = rotation("x", np.radians(pose.lean))
    _add_trunk(body, outfit, upright)
    _add_head(rng, body, outfit, upright, pose)
    for side, letter in _SIDES:
        _add_arm(body, outfit, upright, pose.arms[side], side, letter)
        _add_leg(body, outfit, pose.legs[side], side, letter)
    return body


def _draw_outfit(rng: np.random.Generator) -> _Outfit:
    cloth = (Pattern.FLAT, Pattern.FLAT, Pattern.FLAT, Pattern.NOISE, Pattern.STRIPES, Pattern.CHECKER)
    tone = rng.random()  # light to dark
    skin = hsv_to_rgb(rng.uniform(0.045, 0.085), 0.32 + 0.3 * tone + rng.uniform(-0.05, 0.05), 0.93 - 0.6 * tone)
    hair = pick(rng, (
        hsv_to_rgb(rng.uniform(0.04, 0.1), rng.uniform(0.2, 0.6), rng.uniform(0.05, 0.2)),
        hsv_to_rgb(rng.uniform(0.04, 0.09), rng.uniform(0.4, 0.7), rng.uniform(0.2, 0.45)),
        hsv_to_rgb(rng.uniform(0.09, 0.13), rng.uniform(0.3, 0.55), rng.uniform(0.6, 0.85)),
        hsv_to_rgb(0.1, rng.uniform(0.0, 0.1), rng.uniform(0.4, 0.8)),
    ))  # fmt: skip
    shirt = random_material(rng, cloth, saturation=(0.0, 0.85), value=(0.15, 0.95), period_m=(0.06, 0.16))
    trousers = random_material(rng, (Pattern.FLAT, Pattern.FLAT, Pattern.NOISE), hue=(0.0, 0.7),
                               saturation=(0.05, 0.6), value=(0.08, 0.65), period_m=(0.06, 0.15))  # fmt: skip
    shoes = random_material(rng, (Pattern.FLAT,), saturation=(0.0, 0.6), value=(0.05, 0.8))
    return _Outfit(
        skin=Material(Pattern.FLAT, skin, skin, 0.1),
        hair=Material(Pattern.NOISE, hair, 0.75 * hair, 0.05),
        shirt=shirt,
        trousers=trousers,
        shoes=shoes,
        sleeves=pick(rng, (2.0, 2.0, 0.55, 0.55, 0.0)),
        legs=pick(rng, (2.0, 2.0, 2.0, 0.7, 1.2)),
        hair_style=pick(rng, ("short",) * 5 + ("long",) * 4 + ("bald",)),
    )


def _add_trunk(body: _Body, outfit: _Outfit, upright: FloatArray) -> None:
    """Hips, waist and chest, all named torso, and the neck."""
    girth = body.girth
    body.add("torso", Shape.SPHERE, (2.1 * HIP_HALF_WIDTH + 0.1 * girth, 0.13 * girth, 0.15),
             rotate_one(0, 0, 0.005, upright), outfit.trousers, upright)  # fmt: skip
    middle = 0.5 * HIP_TO_SHOULDER + 0.028
    width = 2 * body.shoulder + 0.02
    body.add("torso", Shape.TRUNK, (width, 0.138 * girth, HIP_TO_SHOULDER + 0.065),
             rotate_one(0, 0, middle, upright), outfit.shirt, upright)  # fmt: skip
    base = HIP_TO_SHOULDER + 0.045 + 0.5 * NECK
    body.add("neck", Shape.CYLINDER, (0.062, 0.062, NECK + 0.03), rotate_one(0, 0, base, upright),
             outfit.skin, upright)  # fmt: skip


def _add_head(rng: np.random.Generator, body: _Body, outfit: _Outfit, upright: FloatArray, pose: Pose) -> None:
    """Skull, face and hair, turned about the top of the neck."""
    base = rotate_one(0, 0, HIP_TO_SHOULDER + 0.04 + NECK, upright)
    # The neck takes back most of the trunk's lean.
    turn = product(rotation("z", np.radians(pose.look)), rotation("x", np.radians(0.3 * pose.lean + pose.nod)))

    def add(name: str, shape: Shape, size: tuple[float, float, float], x: float, y: float, z: float,
            material: Material) -> None:  # fmt: skip
        body.add(name, shape, size, base + rotate_one(x, y, z + 0.5 * HEAD, turn), material, turn)

    add("head", Shape.SPHERE, (0.092, 0.112, HEAD), 0, 0, 0, outfit.skin)
    dark = Material(Pattern.FLAT, np.array([0.06, 0.05, 0.05]), np.zeros(3), 0.1)
    lips = Material(Pattern.FLAT, np.clip(outfit.skin.colour * (0.85, 0.5, 0.5), 0, 1), np.zeros(3), 0.1)
    add("nose", Shape.BEAD, (0.016, 0.026, 0.028), 0, -0.056, -0.008, outfit.skin)
    add("mouth", Shape.BEAD, (0.034, 0.012, 0.011), 0, -0.05, -0.034, lips)
    for side, letter in _SIDES:
        add(letter + "eye", Shape.BEAD, (0.017, 0.012, 0.011), side * 0.02, -0.0505, 0.011, dark)
        add(letter + "ebrow", Shape.BEAD, (0.023, 0.012, 0.006), side * 0.02, -0.051, 0.023, outfit.hair)
        add(letter + "ear", Shape.BEAD, (0.014, 0.026, 0.036), side * 0.046, 0.004, -0.002, outfit.skin)
    if outfit.hair_style != "bald":
        add("hair", Shape.SPHERE, (0.103, 0.116, 0.116), 0, 0.012, 0.02, outfit.hair)
    if outfit.hair_style == "long":
        length = rng.uniform(0.13, 0.2)
        add("hair", Shape.CUSHION, (0.108, 0.05, length), 0, 0.045, 0.035 - 0.5 * length, outfit.hair)


def _add_segment(body: _Body, name: str, top: FloatArray, turn: FloatArray, length: float, thick: float,
                 cover: Material, skin: Material, covered: float) -> FloatArray:  # fmt: skip
    """Add one limb segment, `covered` (0..1) of it from the top by cloth, and return its lower joint."""

    def add(start: float, end: float, width: float, material: Material) -> None:
        middle = top + rotate_one(0, 0, -0.5 * (start + end), turn)
        body.add(name, Shape.LIMB, (width, width, end - start), middle, material, turn)

    reach = 0.35 * thick  # over the joints, so that bent ones stay closed
    if covered < 1:
        add(-reach, length + reach, thick, skin)
    if covered > 0:
        add(-reach, covered * length + reach, 1.14 * thick, cover)
    return top + rotate_one(0, 0, -length, turn)


def _add_arm(body: _Body, outfit: _Outfit, upright: FloatArray, limb: Limb, side: int, letter: str) -> None:
    thick = 0.058 * (0.5 + 0.5 * body.girth)
    shoulder = rotate_one(side * (body.shoulder + 0.012), 0, HIP_TO_SHOULDER + 0.015, upright)
    upper = product(upright, _limb_turn(limb, side))
    elbow = _add_segment(body, letter + "uarm", shoulder, upper, UPPER_ARM, thick, outfit.shirt, outfit.skin,
                         min(outfit.sleeves, 1.0))  # fmt: skip
    lower = product(upper, rotation("x", np.radians(-limb.bend)))
    wrist = _add_segment(body, letter + "larm", elbow, lower, LOWER_ARM, 0.82 * thick, outfit.shirt, outfit.skin,
                         float(np.clip(outfit.sleeves - 1, 0, 1)))  # fmt: skip
    palm = wrist + rotate_one(0, 0, -0.42 * HAND, lower)
    body.add(letter + "hand", Shape.SPHERE, (0.03, 0.05, HAND + 0.015), palm, outfit.skin, lower)


def _add_leg(body: _Body, outfit: _Outfit, limb: Limb, side: int, letter: str) -> None:
    thick = THIGH_THICK * (0.35 + 0.65 * body.girth)
    upper = _limb_turn(limb, side)
    hip = np.array([side * HIP_HALF_WIDTH, 0.0, 0.0])
    knee = _add_segment(body, letter + "uleg", hip, upper, UPPER_LEG, thick, outfit.trousers, outfit.skin,
                        min(outfit.legs, 1.0))  # fmt: skip
    lower = product(upper, rotation("x", np.radians(limb.bend)))
    ankle = _add_segment(body, letter + "lleg", knee, lower, LOWER_LEG, 0.74 * thick, outfit.trousers, outfit.skin,
                         float(np.clip(outfit.legs - 1, 0, 1)))  # fmt: skip
    turn = product(lower, rotation("z", side * np.radians(10)))
    sole = ankle + rotate_one(0, -0.034, -0.5 * ANKLE + 0.004, turn)
    body.add(letter + "foot", Shape.CUSHION, (0.058, 0.15, ANKLE + 0.012), sole, outfit.shoes, turn)


def _limb_turn(limb: Limb, side: int) -> FloatArray:
    """Return the rotation of a limb's upper segment from hanging down."""
    spread = rotation("y", -side * np.radians(limb.spread))
    swing = rotation("x", -np.radians(limb.swing))
    return product(product(spread, swing), rotation("z", -side * np.radians(limb.twist)))


def _lowest_m(part: Part) -> float:
    """Return a height that no point of a rounded part is below (that of the ellipsoid in its box)."""
    turn = np.eye(3) if part.turn is None else part.turn
    return part.centre[2] - 0.5 * float(np.sqrt(((turn[2] * np.array(part.size)) ** 2).sum()))
