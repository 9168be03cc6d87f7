"""How images enter the network and outputs meet the labels, for each protocol."""

import numpy as np
import pytest
import torch

from m3vit.errors import InputError
from m3vit.evaluation.evaluate import normalised
from m3vit.evaluation.protocols import check_protocol, network_image, prediction
from m3vit.normalisation import IMAGENET


def test_a_resizes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    placed = network_image("A", "x", image, (32, 32))
    assert placed.pixels.shape == (32, 32, 3)
    assert (placed.rows, placed.columns) == (slice(0, 32), slice(0, 32))


def test_b_pads_in_the_middle_with_zero() -> None:
    image = np.full((5, 6, 3), 200, np.uint8)
    placed = network_image("B", "x", image, (8, 8))
    assert (placed.rows, placed.columns) == (slice(1, 6), slice(1, 7))  # 3 rows over: one above, two below
    pixels = normalised([placed], IMAGENET)[0]
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[1:6, 1:7] = True
    assert (pixels[:, ~inside] == 0).all()
    assert (pixels[:, inside] != 0).all()


def test_b_refuses_larger_images() -> None:
    with pytest.raises(InputError, match=r"image x is 9x8, larger than the network's 8x8.*protocol A"):
        network_image("B", "x", np.zeros((9, 8, 3), np.uint8), (8, 8))


def test_unknown_protocol() -> None:
    with pytest.raises(InputError, match="protocol 'C': choose from A, B"):
        check_protocol("C")


def test_a_takes_class_ids_by_the_floor_rule() -> None:
    """OpenCV's nearest neighbour, 4 -> 6 pixels: floor(x * 4 / 6) = 0 0 1 2 2 3."""
    logits = torch.eye(4)[:, None, :].expand(4, 4, 4)  # the column's number wins
    placed = network_image("A", "x", np.zeros((4, 6, 3), np.uint8), (4, 4))
    ids = prediction("A", "semseg", logits, placed, (4, 6))
    assert ids.dtype == np.uint8
    assert ids[0].tolist() == [0, 0, 1, 2, 2, 3]


def test_b_crops_the_padding() -> None:
    logits = torch.arange(64.0).view(1, 8, 8)
    placed = network_image("B", "x", np.zeros((5, 6, 3), np.uint8), (8, 8))
    np.testing.assert_array_equal(prediction("B", "depth", logits, placed, (5, 6)), logits[0, 1:6, 1:7].numpy())


def test_a_stores_eight_bits_truncated() -> None:
    placed = network_image("A", "x", np.zeros((1, 1, 3), np.uint8), (1, 1))
    # sigmoid(1) * 255 = 186.42 -> 186
    assert prediction("A", "saliency", torch.ones(1, 1, 1), placed, (1, 1))[0, 0] == pytest.approx(186 / 255)
    assert prediction("B", "saliency", torch.ones(1, 1, 1), placed, (1, 1))[0, 0] == pytest.approx(0.7310586)
    # Edge maps are stored as png under both.
    assert prediction("B", "edge", torch.ones(1, 1, 1), placed, (1, 1))[0, 0] == pytest.approx(186 / 255)


def test_a_costs_perfect_normals_a_third_of_a_degree() -> None:
    """The published figure of truth scored as a prediction: truncated to 8 bits (papers' code), not rounded."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(3, 64, 64))
    truth /= np.linalg.norm(truth, axis=0)
    placed = network_image("A", "x", np.zeros((64, 64, 3), np.uint8), (64, 64))
    angles = {}
    for protocol in "AB":
        guess = prediction(protocol, "normals", torch.from_numpy(7 * truth), placed, (64, 64))
        assert np.linalg.norm(guess, axis=-1) == pytest.approx(1, abs=1e-5)
        cosine = np.clip((guess * truth.transpose(1, 2, 0)).sum(axis=-1), -1, 1)
        angles[protocol] = np.degrees(np.arccos(cosine)).mean()
    assert 0.2 < angles["A"] < 0.5
    assert angles["B"] < 0.05


def test_a_truncates_normals_in_the_axes_of_the_files() -> None:
    """(0, 0.8, 0.6) up: stored y down it is (1 - 0.8) * 127.5 = 25.5 -> 25, y up it would be 229.5 -> 229."""
    logits = torch.tensor([0.0, 0.8, 0.6]).view(3, 1, 1)
    placed = network_image("A", "x", np.zeros((1, 1, 3), np.uint8), (1, 1))
    for y_down, stored in ((True, (127, 25, 204)), (False, (127, 229, 204))):
        expected = np.array(stored) / 127.5 - 1
        expected[1] *= -1 if y_down else 1
        guess = prediction("A", "normals", logits, placed, (1, 1), y_down=y_down)
        np.testing.assert_allclose(guess[0, 0], expected / np.linalg.norm(expected), atol=1e-6)
        exact = prediction("B", "normals", logits, placed, (1, 1), y_down=y_down)
        np.testing.assert_allclose(exact[0, 0], [0, 0.8, 0.6], atol=1e-6)  # nothing is stored


def test_a_truncates_the_resized_image() -> None:
    """8 pixels -> 4, weights -3/32, 19/32, 19/32, -3/32: halfway of a step from 0 to 7 is 3.5, which becomes 3."""
    row = np.array([0, 0, 0, 7, 7, 7, 7, 7], np.uint8)
    image = np.broadcast_to(row[None, :, None], (8, 8, 3)).copy()
    assert network_image("A", "x", image, (4, 4)).pixels[0, :, 0].tolist() == [0, 3, 7, 7]
    steps = np.where(np.arange(40) // 5 % 2, 255, 0).astype(np.uint8)  # overshoots on both sides: clipped
    image = np.broadcast_to(steps[None, :, None], (7, 40, 3)).copy()
    pixels = network_image("A", "x", image, (7, 97)).pixels
    assert pixels.min() == 0 and pixels.max() == 255 and (np.diff(pixels[0, :12, 0].astype(int)) >= 0).all()
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None, None], 3, 3)
    for value in (0, 1, 77, 128, 200, 254, 255):  # a flat area stays as it is
        flat = np.broadcast_to(grey[value], (11, 13, 3)).copy()
        for size in ((7, 9), (23, 31), (16, 16)):
            assert (network_image("A", "x", flat, size).pixels == value).all()


def test_logits_of_a_coarser_head_are_resized_first() -> None:
    logits = torch.rand(1, 2, 2)
    placed = network_image("A", "x", np.zeros((8, 8, 3), np.uint8), (8, 8))
    expected = torch.nn.functional.interpolate(logits[None], size=(8, 8), mode="bilinear")[0, 0]
    np.testing.assert_allclose(prediction("A", "depth", logits, placed, (8, 8)), expected)
