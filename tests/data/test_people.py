"""Articulated people: anatomy in the world, and left and right as a camera sees them."""

import numpy as np
import pytest

pytest.importorskip("embreex")

from m3vit.data.synthetic.scenes.furniture import chair
from m3vit.data.synthetic.scenes.materials import FloatArray
from m3vit.data.synthetic.scenes.meshes import unit_meshes
from m3vit.data.synthetic.scenes.people import PART_NAMES, person
from m3vit.data.synthetic.scenes.place import Light, Place
from m3vit.data.synthetic.scenes.props import occupied, set_table
from m3vit.data.synthetic.scenes.rendering import Camera, Geometry, cast
from m3vit.data.synthetic.scenes.solids import Furniture, Part, Shape, product, rotate, rotation

# Seen from in front in every pose.
LIMBS = {side + limb for side in "lr" for limb in ("uarm", "larm", "hand", "uleg", "lleg", "foot")}


class Stage(Place):
    """One object at the origin."""

    def __init__(self, piece: Furniture) -> None:
        super().__init__()
        self._add(piece.parts, (0, 0, 0), 0.0)

    def draw_view(self, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        raise NotImplementedError

    def draw_ambient(self, rng: np.random.Generator, up_N1: FloatArray) -> FloatArray:
        raise NotImplementedError

    def draw_num_lights(self, rng: np.random.Generator) -> int:
        raise NotImplementedError

    def draw_light(self, rng: np.random.Generator) -> Light:
        raise NotImplementedError


def vertices(part: Part) -> np.ndarray:
    """Return the vertices (V, 3) of a part in its object's frame."""
    local = unit_meshes()[part.shape][0] * np.array(part.size)
    return (local if part.turn is None else rotate(local, part.turn)) + np.array(part.centre)


def named(piece: Furniture, name: str) -> np.ndarray:
    return np.concatenate([vertices(part) for part in piece.parts if part.name == name])


@pytest.fixture(scope="module")
def crowd() -> list[Furniture]:
    return [person(np.random.default_rng(seed)) for seed in range(40)]


def test_parts_have_the_names_of_pascal_part(crowd: list[Furniture]) -> None:
    assert len(PART_NAMES) == 24
    for somebody in crowd:
        names = {part.name for part in somebody.parts}
        assert names <= set(PART_NAMES)
        assert names >= LIMBS | {"head", "neck", "torso", "leye", "reye", "nose", "mouth"}
        assert {part.label for part in somebody.parts} == {"person"}


def test_people_stand_on_the_ground(crowd: list[Furniture]) -> None:
    for somebody in crowd:
        lowest = min(vertices(part)[:, 2].min() for part in somebody.parts)
        assert abs(lowest) < 0.03  # a soft sole is a bit larger than its ellipsoid
        tallest = max(vertices(part)[:, 2].max() for part in somebody.parts)
        assert 0.6 < tallest < 2.45  # a child on the ground .. arms overhead


def test_segments_touch_their_neighbours(crowd: list[Furniture]) -> None:
    """No joint is open: the nearest vertices of neighbours are at most a few centimetres apart."""
    chain = [("head", "neck"), ("neck", "torso")]
    for side in "lr":
        chain += [("torso", side + "uarm"), (side + "uarm", side + "larm"), (side + "larm", side + "hand")]
        chain += [("torso", side + "uleg"), (side + "uleg", side + "lleg"), (side + "lleg", side + "foot")]
    for somebody in crowd[:12]:
        for first, second in chain:
            gaps = np.linalg.norm(named(somebody, first)[:, None] - named(somebody, second)[None], axis=-1)
            assert gaps.min() < 0.05, (first, second)


def test_left_is_the_persons_own_left() -> None:
    """A camera in front (at -y, looking along +y) sees the left hand side on the right of its image."""
    camera = Camera(np.array([0, -3.5, 1.0]), np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]))
    for seed in range(8):
        geometry = Geometry(Stage(person(np.random.default_rng(seed))))
        parts = cast(geometry, camera, (96, 96)).parts
        names = np.array([part.name for part in geometry.parts] + [""])[parts]
        column = {name: np.nonzero(names == name)[1].mean() for name in ("luarm", "ruarm", "luleg", "ruleg")}
        row = {name: np.nonzero(names == name)[0].mean() for name in ("torso", "lfoot")}
        assert column["luarm"] > column["ruarm"]
        assert column["luleg"] > column["ruleg"] - 1  # they overlap in a stride
        assert row["lfoot"] > row["torso"]


def test_sitting_people_rest_on_their_seat() -> None:
    for seed in range(10):
        piece = occupied(np.random.default_rng(seed), chair)
        body = [part for part in piece.parts if part.label == "person"]
        seat = chair(np.random.default_rng(seed)).seat  # the same draws
        assert seat is not None
        hips = next(part for part in body if part.name == "torso")
        assert 0 < hips.centre[2] - seat[2] < 0.15
        assert min(vertices(part)[:, 2].min() for part in body) > -0.12  # feet reach the floor or hang
        assert {part.group for part in piece.parts} == {0, 1}  # two instances


@pytest.mark.parametrize("guests", [0, 1, 2])
def test_tables_seat_their_guests(guests: int) -> None:
    for seed in range(6):
        piece = set_table(guests)(np.random.default_rng(seed))
        groups = {part.group for part in piece.parts if part.label == "person"}
        assert len(groups) == guests
        assert piece.surface is not None and piece.surface.top_m is not None


@pytest.mark.parametrize(("axis", "point", "image"), [
    ("x", (0, 1, 0), (0, 0, 1)), ("y", (0, 0, 1), (1, 0, 0)), ("z", (1, 0, 0), (0, 1, 0)),
])  # fmt: skip
def test_rotations_are_right_handed(axis: str, point: tuple, image: tuple) -> None:
    """A quarter turn takes y to z about x, z to x about y, x to y about z."""
    quarter = rotation(axis, np.pi / 2)
    np.testing.assert_allclose(rotate(np.array([point], float), quarter), [image], atol=1e-12)
    np.testing.assert_allclose(product(quarter, quarter.T), np.eye(3), atol=1e-12)


@pytest.mark.parametrize("shape", list(Shape))
def test_shapes_fit_the_unit_cube(shape: Shape) -> None:
    points, faces = unit_meshes()[shape]
    assert np.abs(points).max() <= 0.5 + 1e-9
    assert np.ptp(points[:, 2]) == pytest.approx(1.0, abs=0.02)
    assert faces.max() == len(points) - 1


def test_same_seed_same_person() -> None:
    def build(seed: int) -> list[tuple]:
        return [(part.shape, part.size, part.centre, part.name) for part in person(np.random.default_rng(seed)).parts]

    assert build(3) == build(3) != build(4)
