"""The training pipelines: geometry of each kind of label, against properties and against rendered scenes."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3vit.data.augment import (
    mirror,
    pad,
    photometric_distortion,
    random_crop,
    scale,
    to_labels,
    to_values,
    training_pair,
    zoom_rotate,
)
from m3vit.data.network_input import padded_place, resize_image
from m3vit.data.nyud import NYUD
from m3vit.data.opening import LAYOUTS
from m3vit.data.sample import Sample
from m3vit.data.synthetic.scenes import nyud, rendering
from m3vit.data.synthetic.scenes.rendering import Camera, Geometry, cast, find_view, render_image
from m3vit.data.synthetic.scenes.room import Room
from m3vit.normalisation import IMAGENET
from m3vit.tasks import IGNORE

SIZES = st.tuples(st.integers(8, 40), st.integers(8, 40))
SEEDS = st.integers(0, 2**32 - 1)
PIPELINES = ("simple", "m3vit", "invpt")


def make_sample(seed: int, size: tuple[int, int]) -> Sample:
    """Return a sample with every kind of label, some of it invalid."""
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(*size, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    invalid = rng.random(size) < 0.2
    labels: dict[str, Any] = {
        "semseg": np.where(invalid, IGNORE, rng.integers(0, 5, size)).astype(np.uint8),
        "human_parts": rng.integers(0, 3, size).astype(np.uint8),
        "saliency": rng.integers(0, 2, size).astype(np.uint8),
        "depth": np.where(invalid, 0, rng.uniform(1, 9, size)).astype(np.float32),
        "normals": np.where(invalid[..., None], 0, normals).astype(np.float32),
        "edge": rng.integers(0, 2, size).astype(np.uint8),
    }
    return Sample("made", rng.integers(0, 256, (*size, 3), dtype=np.uint8), labels)


def check_labels(sample: Sample, labels: dict[str, Tensor], size: tuple[int, int]) -> None:
    """Whatever was done to them: no new ids, unit normals, depths of the sample's range over the zoom."""
    for task in ("semseg", "human_parts", "saliency", "edge"):
        assert labels[task].shape == size
        assert set(labels[task].unique().tolist()) <= set(np.unique(sample.labels[task]).tolist()) | {IGNORE}, task
    assert labels["semseg"].dtype == labels["human_parts"].dtype == torch.int64
    assert labels["saliency"].dtype == labels["edge"].dtype == torch.uint8
    lengths = labels["normals"].norm(dim=0)
    assert labels["normals"].shape == (3, *size)
    assert ((lengths == 0) | ((lengths - 1).abs() < 1e-5)).all()
    assert labels["depth"].shape == size and (labels["depth"] >= 0).all()


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    size=SIZES,
    target=SIZES,
    pipeline=st.sampled_from(PIPELINES),
    layout=st.sampled_from(["nyud", "pascal"]),
)
def test_every_pipeline_keeps_labels_labels(
    seed: int, size: tuple[int, int], target: tuple[int, int], pipeline: str, layout: str
) -> None:
    sample = make_sample(seed, size)
    before = {task: label.copy() for task, label in sample.labels.items()}
    ranges = LAYOUTS[layout].m3vit_ranges
    pixels, labels = training_pair(pipeline, sample, target, np.random.default_rng(seed), IMAGENET, ranges=ranges)
    assert pixels.shape == (3, *target) and pixels.dtype == torch.float32 and torch.isfinite(pixels).all()
    check_labels(sample, labels, target)
    zoom = 2.0 if pipeline == "invpt" else 1.5
    valid = labels["depth"][labels["depth"] > 0]
    if len(valid):
        assert valid.min() >= 1 / zoom and valid.max() <= 9 * 2
    for task, label in before.items():
        np.testing.assert_array_equal(sample.labels[task], label, err_msg="the sample may be cached: never changed")


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, size=SIZES)
def test_mirroring_twice_is_nothing(seed: int, size: tuple[int, int]) -> None:
    values = to_values(make_sample(seed, size))
    for name, value in mirror(mirror(values)).items():
        assert type(value) is type(values[name])
        assert torch.equal(value.as_subclass(Tensor), values[name].as_subclass(Tensor)), name


def test_mirror_turns_normals() -> None:
    sample = make_sample(0, (8, 9))
    once = to_labels(mirror(to_values(sample)))["normals"]
    expected = sample.labels["normals"][:, ::-1] * (-1, 1, 1)
    np.testing.assert_array_equal(once.permute(1, 2, 0).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_exact(turns: int) -> None:
    """Turning counter-clockwise by 90 degrees is numpy's rot90, and turns the vectors alike."""
    sample = make_sample(0, (12, 12))
    labels = to_labels(zoom_rotate(to_values(sample), 1.0, 90.0 * turns))
    for task in ("semseg", "saliency", "edge", "depth"):
        np.testing.assert_array_equal(labels[task].numpy(), np.rot90(sample.labels[task], turns), err_msg=task)
    x, y, z = np.moveaxis(np.rot90(sample.labels["normals"], turns), -1, 0)
    for _ in range(turns):  # what pointed right points up
        x, y = -y, x
    np.testing.assert_allclose(labels["normals"].numpy(), [x, y, z], atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, angle=st.floats(-20, 20), zoom=st.floats(0.75, 1.5))
def test_rotation_brings_in_only_what_is_ignored(seed: int, angle: float, zoom: float) -> None:
    sample = make_sample(seed, (20, 24))
    for task in ("semseg", "saliency", "edge"):
        sample.labels[task][:] = 1
    labels = to_labels(zoom_rotate(to_values(sample), zoom, angle))
    for task in ("semseg", "saliency", "edge"):
        assert set(labels[task].unique().tolist()) <= {1, IGNORE}


def render(seed: int, size: tuple[int, int]) -> tuple[Sample, Geometry, Camera]:
    """Render a room; return its sample, and what is needed to render it again."""
    rng = np.random.default_rng(seed)
    room, geometry, camera = find_view(lambda: Room(rng), nyud._view_score, rng, size)
    labels = nyud.labels_of(geometry, cast(geometry, camera, size))
    kept = {"semseg": labels.segmentation, "depth": labels.depth, "normals": labels.normals}
    return Sample("rendered", render_image(geometry, room, camera, size, rng), kept), geometry, camera


def test_depth_scales_as_the_rendered_zoom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zooming in by 2 shows what the same camera, with twice the focal length, renders; at half the depth."""
    size = (48, 64)
    sample, geometry, camera = render(1, size)
    focal = rendering.focal_px
    monkeypatch.setattr(rendering, "focal_px", lambda width: 2 * focal(width))
    near = nyud.labels_of(geometry, cast(geometry, camera, size))
    zoomed = to_labels(zoom_rotate(to_values(sample), 2.0, 0.0))
    # Nearest neighbour: a pixel of the zoomed map lies half a source pixel off at most; edges are left to differ.
    ratio = near.depth / (2 * zoomed["depth"].numpy())
    assert np.median(np.abs(ratio - 1)) < 0.01
    assert (np.abs(ratio - 1) < 0.1).mean() > 0.9
    cosine = (near.normals * zoomed["normals"].permute(1, 2, 0).numpy()).sum(axis=-1)
    assert (cosine > 0.999).mean() > 0.85
    # Scaling the image (invpt) does the same.
    scaled = scale(to_values(sample), 2.0)["depth"][0, 24:72, 32:96]
    assert np.median(np.abs(near.depth / (2 * scaled.numpy()) - 1)) < 0.01


def test_rotating_a_rendered_scene_turns_its_normals() -> None:
    """A camera rolled clockwise sees the scene turned counter-clockwise: labels rendered again agree."""
    size = (64, 64)
    sample, geometry, camera = render(2, size)
    cos, sin = np.cos(np.radians(20)), np.sin(np.radians(20))
    right, down, forward = camera.axes
    axes = np.stack([right * cos + down * sin, down * cos - right * sin, forward])  # right moves towards down
    rolled = nyud.labels_of(geometry, cast(geometry, Camera(camera.position, axes), size))
    turned = to_labels(zoom_rotate(to_values(sample), 1.0, 20.0))
    inside = turned["semseg"].numpy() != IGNORE
    same = turned["semseg"].numpy()[inside] == rolled.segmentation[inside]
    assert same.mean() > 0.85
    cosine = (turned["normals"].permute(1, 2, 0).numpy() * rolled.normals).sum(axis=-1)[inside][same]
    assert (cosine > 0.999).mean() > 0.85


def test_a_crop_without_a_part_has_nothing_to_learn() -> None:
    sample = make_sample(0, (8, 8))
    sample.labels["human_parts"][:] = 0
    assert (to_labels(to_values(sample))["human_parts"] == IGNORE).all()
    sample.labels["human_parts"][3, 3] = 1
    assert (to_labels(to_values(sample))["human_parts"] == 0).sum() == 63


def test_crop_avoids_a_single_class() -> None:
    """One half of the image is one class: a crop that is 75 % or more of it is drawn again, up to ten times."""
    sample = make_sample(0, (16, 64))
    sample.labels = {"semseg": np.zeros((16, 64), np.uint8)}
    sample.labels["semseg"][:, 32:] = 1
    shares = []
    for seed in range(200):
        crop = random_crop(to_values(sample), (16, 16), np.random.default_rng(seed))["semseg"]
        assert crop.shape == (1, 16, 16)
        share = float((crop == 1).float().mean())
        shares.append(max(share, 1 - share))
    # Of 49 places, those with the border at 4 < x < 12 pass (7): P(11 draws all fail) = (42/49)^11 = 18 %.
    assert 0.7 < np.mean(np.array(shares) < 0.75) < 0.92


def test_padding() -> None:
    assert padded_place((5, 8), (8, 8)) == (slice(1, 6), slice(0, 8))
    labels = {"semseg": torch.ones(5, 8, dtype=torch.int64), "depth": torch.ones(5, 8), "normals": torch.ones(3, 5, 8)}
    pixels, padded = pad(torch.ones(3, 5, 8), labels, (8, 8))
    assert pixels.sum() == 3 * 40 and pixels.shape == (3, 8, 8)
    assert (padded["semseg"] == IGNORE).sum() == 24
    assert (padded["depth"] == 0).sum() == 24 and (padded["normals"] == 0).sum() == 72


def test_cubic_resize_is_opencvs() -> None:
    """OpenCV's INTER_CUBIC: weights with a = -0.75, no antialiasing. 8 pixels -> 4: sources at 0.5, 2.5, 4.5, 6.5."""
    row = np.array([0, 0, 0, 200, 200, 200, 200, 200], np.uint8)
    image = np.broadcast_to(row[None, :, None], (8, 8, 3)).copy()
    # At distance 1/2 the four weights are -3/32, 19/32, 19/32, -3/32.
    # 0.5: pixels -1 (repeated) .. 2 = 0 0 0 0 -> 0
    # 2.5: pixels 1 2 3 4 = 0 0 200 200 -> 200 * (19 - 3) / 32 = 100; 4.5: pixels 3 .. 6 -> 200; 6.5 -> 200
    assert resize_image(image, (4, 4), cubic=True)[0, :, 0].tolist() == [0, 100, 200, 200]


def test_photometric_distortion_is_deterministic_and_keeps_the_type() -> None:
    image = make_sample(0, (10, 12)).image
    results = [photometric_distortion(image, np.random.default_rng(seed)) for seed in range(20)]
    again = [photometric_distortion(image, np.random.default_rng(seed)) for seed in range(20)]
    for one, other in zip(results, again, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.uint8 and one.shape == image.shape
    assert len({result.tobytes() for result in results}) > 12
    grey = np.full((4, 4, 3), 90, np.uint8)  # saturation and hue leave grey alone, brightness and contrast do not
    assert all((photometric_distortion(grey, np.random.default_rng(s)).std(axis=-1) < 1.5).all() for s in range(20))


def test_pipelines_differ_in_what_they_change() -> None:
    sample = make_sample(1, (30, 40))
    simple = training_pair("simple", sample, (30, 40), np.random.default_rng(0), IMAGENET, flip=False)
    np.testing.assert_array_equal(simple[1]["depth"].numpy(), sample.labels["depth"])
    rngs = map(np.random.default_rng, range(20))
    pairs = [training_pair("m3vit", sample, (30, 40), rng, IMAGENET, ranges=NYUD.m3vit_ranges) for rng in rngs]
    depths = {float(labels["depth"].max()) for _, labels in pairs}
    top = float(sample.labels["depth"].max())
    assert max(depths) == pytest.approx(top) and min(depths) < top / 1.2  # zooms 1, 1.2, 1.5
    ranges = [layout.m3vit_ranges for layout in LAYOUTS.values()]
    assert [one and one.rotation_deg for one in ranges] == [0, 20, None], "none is published for data of one's own"
