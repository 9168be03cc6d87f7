"""Legends and overlays: what they say is in the prediction, and is drawn in the colours that are in the picture."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3vit.export.runtime.drawing import Scale, Swatches, blend, legend, overlay, paint, ticks
from m3vit.export.runtime.summary import summarise
from m3vit.kinds import KINDS
from m3vit.tasks import palette

CLASSES = ("wall", "floor_mat", "other_structure")
SEMSEG: dict[str, Any] = {"decode": "argmax", "palette": palette(CLASSES), "classes": list(CLASSES)}
DEPTH: dict[str, Any] = {"decode": "identity", "unit": "m"}
NORMALS: dict[str, Any] = {"decode": "unit_vector"}
EDGE: dict[str, Any] = {"decode": "sigmoid"}
MANIFEST = {"tasks": {"semseg": SEMSEG, "depth": DEPTH, "normals": NORMALS, "edge": EDGE}}


def predictions(height: int, width: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(height, width, 3)).astype(np.float32)
    return {
        "semseg": rng.integers(0, 3, (height, width), dtype=np.uint8),
        "depth": rng.uniform(1, 5, (height, width)).astype(np.float32),
        "normals": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
        "edge": rng.uniform(0, 1, (height, width)).astype(np.float32),
    }


def test_legend_of_classes_names_those_in_the_picture() -> None:
    ids = np.zeros((10, 20), np.uint8)
    ids[:3], ids[9, 19] = 2, 200  # 60 pixels, and one of a class that the package does not know
    meaning = legend(ids, "semseg", SEMSEG)
    assert isinstance(meaning, Swatches)
    colours = palette(CLASSES)
    assert meaning.items == (
        ("wall 70 %", colours[0]),
        ("other structure 30 %", colours[2]),
        ("class 200 < 1 %", (0, 0, 0)),
    )
    film = legend(ids, "semseg", SEMSEG, rows=2)
    assert isinstance(film, Swatches) and [name for name, _ in film.items] == ["wall", "other structure", "class 200"]


def test_legend_without_names_counts() -> None:
    meaning = legend(np.ones((4, 4), np.uint8), "semseg", {"decode": "argmax", "palette": palette("ab")})
    assert isinstance(meaning, Swatches) and meaning.items[0][0] == "class 1 100 %"


def test_legend_of_depth_spans_the_pictures_range() -> None:
    depth = np.linspace(1, 5, 1001, dtype=np.float32).reshape(1, -1)
    meaning = legend(depth, "depth", DEPTH)
    assert isinstance(meaning, Scale) and meaning.title == "depth, m"
    np.testing.assert_allclose((meaning.low, meaning.high), (1.08, 4.92), rtol=1e-5)  # 2 % off each end
    given = legend(depth, "depth", DEPTH, (0.5, 9.0))
    assert isinstance(given, Scale) and (given.low, given.high) == (0.5, 9.0)
    # The scale's ends have the colours of the nearest and farthest pixel.
    picture = paint(depth, "identity", (), (1.0, 5.0))
    np.testing.assert_array_equal(given.colours[[0, -1]], picture[0, [0, -1]])
    nothing = legend(np.zeros((3, 3), np.float32), "depth", DEPTH)
    assert isinstance(nothing, Scale) and (nothing.low, nothing.high) == (0, 1)


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 1, "0.0 0.2 0.4 0.6 0.8 1.0"),
        (0.37, 4.21, "1 2 3 4"),
        (2, 300, "50 100 150 200 250 300"),
        (9.99, 10.01, "9.990 9.995 10.000 10.005 10.010"),
        (3, 3, "3"),
        (-1, 1, "-1.0 -0.5 0.0 0.5 1.0"),
    ],
)
def test_ticks(low: float, high: float, texts: str) -> None:
    assert " ".join(text for _, text in ticks(low, high)) == texts


@pytest.mark.parametrize("task", MANIFEST["tasks"])
@pytest.mark.parametrize("size", [(1, 1), (37, 61), (3000, 2), (5, 900), (400, 600)])
def test_overlays_of_all_sizes(task: str, size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    drawn = overlay(image, predictions(*size)[task], task, MANIFEST)
    assert drawn.dtype == np.uint8 and drawn.shape[1] >= max(size[1], 320)
    assert size[0] < drawn.shape[0] <= 4096 + 1200


def test_overlay_is_the_blend_above_the_legend() -> None:
    image = np.random.default_rng(1).integers(0, 256, (200, 400, 3), dtype=np.uint8)
    for task, prediction in predictions(200, 400).items():
        entry = MANIFEST["tasks"][task]
        drawn = overlay(image, prediction, task, MANIFEST)
        np.testing.assert_array_equal(drawn[:200], blend(image, prediction, entry["decode"], entry.get("palette", ())))
        panel = drawn[200:].reshape(-1, 3)
        assert (panel == 255).all(axis=1).mean() > 0.3 and (panel < 80).all(axis=1).any(), "text on white"
        if task == "semseg":
            for colour in palette(CLASSES):
                assert (panel == colour).all(axis=1).sum() > 100, "a swatch of each class"


def test_small_images_are_enlarged_by_a_whole_number() -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 100, 3), dtype=np.uint8)
    ids = np.zeros((50, 100), np.uint8)
    drawn = overlay(image, ids, "semseg", MANIFEST, rows=1)  # without names
    larger = np.asarray(Image.fromarray(image).resize((400, 200), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
        drawn[:200, :400], blend(larger, ids.repeat(16).reshape(200, 400), "argmax", SEMSEG["palette"])
    )


def test_enlarged_classes_have_borders_without_steps() -> None:
    """A diagonal border: the enlarged one is never more than a pixel from the straight line."""
    row, column = np.mgrid[:20, :20]
    found = KINDS["argmax"].enlarged(np.where(column > row, 7, 255).astype(np.uint8), 8)
    row, column = np.mgrid[:160, :160]
    beside = column - row - 4  # pixels from the line
    assert set(np.unique(found)) == {7, 255}
    inside = (np.minimum(row, column) > 8) & (np.maximum(row, column) < 152)
    assert (found == np.where(beside > 0, 7, 255))[inside & (np.abs(beside) > 2)].all()
    assert (KINDS["argmax"].enlarged(np.full((3, 4), 9, np.uint8), 2) == 9).all()


def test_areas_of_classes_are_named_where_there_is_room() -> None:
    image, ids = np.full((200, 400, 3), 128, np.uint8), np.zeros((200, 400), np.uint8)
    ids[:, 200:], ids[90:96, 300:306] = 1, 2  # halves, and a spot too small for its name
    plain = blend(image, ids, "argmax", SEMSEG["palette"])
    changed = (overlay(image, ids, "semseg", MANIFEST)[:200] != plain).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert set(ids[changed].tolist()) == {0, 1}, "a name stays in its area"
    left, right = columns[columns < 200], columns[columns >= 200]
    assert np.ptp(left) < 40 < np.ptp(right) < 80, '"wall" is shorter than "floor mat"'
    assert abs(left.mean() - 100) < 15 and abs(rows[columns < 200].mean() - 100) < 15, "in the middle of its half"
    film = overlay(image, ids, "semseg", MANIFEST, rows=1)[:200]
    np.testing.assert_array_equal(film, plain)


def test_the_place_of_a_name_is_in_the_largest_square() -> None:
    """Against the plain search over all squares."""
    rng = np.random.default_rng(0)
    ids = (rng.random((23, 31)) < 0.15).astype(np.uint8).cumsum(axis=1).astype(np.uint8) % 3
    for place in KINDS["argmax"].places(ids, SEMSEG):
        index = [name.replace("_", " ") for name in CLASSES].index(place.name)
        sides = [
            side
            for side in range(1, 24)
            for row in range(24 - side)
            for column in range(32 - side)
            if (ids[row : row + side, column : column + side] == index).all()
        ]
        assert place.side == max(sides)
        top, left = round(place.row - place.side / 2), round(place.column - place.side / 2)
        assert (ids[top : top + max(sides), left : left + max(sides)] == index).all()
    assert len(KINDS["argmax"].places(np.full((4, 4), 200, np.uint8), SEMSEG)) == 0, "a class without a name"


def test_blend_by_hand() -> None:
    image = np.array([[[100, 150, 50]]], np.uint8)  # grey 0.299 * 100 + 0.587 * 150 + 0.114 * 50 = 123.65
    red = blend(image, np.zeros((1, 1), np.uint8), "argmax", [(255, 0, 0)])
    assert red.tolist() == [[[202, 49, 49]]]  # 0.6 * 255 + 0.4 * 123.65 = 202.46, 0.4 * 123.65 = 49.46
    assert blend(image, np.zeros((1, 1), np.float32), "sigmoid").tolist() == image.tolist()
    assert blend(image, np.ones((1, 1), np.float32), "sigmoid").tolist() == [[[255, 0, 160]]]


def test_frames_of_a_film_have_one_size_whatever_they_show() -> None:
    entry = {"decode": "argmax", "palette": palette(range(60)), "classes": [f"class_{index}" for index in range(60)]}
    image, manifest = np.zeros((90, 330, 3), np.uint8), {"tasks": {"semseg": entry}}
    one = overlay(image, np.zeros((90, 330), np.uint8), "semseg", manifest, rows=3)
    many = overlay(
        image, np.arange(90 * 330, dtype=np.uint32).reshape(90, 330).astype(np.uint8) % 60, "semseg", manifest, rows=3
    )
    assert one.shape == many.shape
    still = overlay(image, np.arange(60, dtype=np.uint8).repeat(495).reshape(90, 330), "semseg", manifest)
    assert still.shape[0] > many.shape[0], "an image's legend lists them all"


def test_summary_by_hand() -> None:
    ids = np.array([[2, 2, 2, 0]], np.uint8)
    assert summarise(ids, SEMSEG)["classes"] == [
        {"id": 2, "name": "other structure", "colour": list(palette(CLASSES)[2]), "pixels": 3, "share": 0.75},
        {"id": 0, "name": "wall", "colour": list(palette(CLASSES)[0]), "pixels": 1, "share": 0.25},
    ]
    depth = summarise(np.array([[1, 2, 3, 6, 0, np.nan, -1, np.inf]], np.float32), DEPTH)
    assert (depth["min"], depth["median"], depth["mean"], depth["max"], depth["valid_share"]) == (1, 2.5, 3, 6, 0.5)
    assert sum(depth["histogram"]["counts"]) == 4 and depth["histogram"]["edges"][0] == 1
    nothing = summarise(np.zeros((2, 2), np.float32), DEPTH)
    assert nothing["median"] is None and nothing["histogram"] is None and nothing["valid_share"] == 0
    normals = summarise(np.array([[[0, 0, 1], [0, 0.8, 0.6], [-1, 0, 0], [0, 1, 0]]], np.float32), NORMALS)
    assert normals["facing"] == {"right": 0, "left": 0.25, "up": 0.5, "down": 0, "towards the camera": 0.25}
    assert normals["mean"] == [-0.25, 0.45, 0.4]
    edge = summarise(np.array([[0, 0.25, 0.75, 1]], np.float32), EDGE)
    assert (edge["mean"], edge["max"], edge["share_above_half"]) == (0.5, 1, 0.5)
    assert edge["histogram"]["counts"][0] == 1 and edge["histogram"]["counts"][-1] == 1
