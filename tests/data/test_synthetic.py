"""Synthetic scenes: labels against independent geometry, files against the NYUD_MT layout, refusals."""

import hashlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("embreex")

from m3vit.data.synthetic.dataset import synthesize
from m3vit.data.synthetic.scenes.nyud import CLASS_IDS, Labels, Scene, render_scene
from m3vit.data.synthetic.scenes.rendering import Geometry, focal_px, pixel_rays
from m3vit.data.synthetic.scenes.room import SCENE_CLASSES, Room
from m3vit.errors import InputError

SIZE = (48, 64)
TRAIN, VAL = 4, 2
ENDINGS = {"images": "jpg", "segmentation": "png", "edge": "npy", "normals": "npy", "depth": "npy"}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(np.random.default_rng([0, 0, index]), SIZE) for index in range(4)]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "set"
    synthesize(out, train=TRAIN, val=VAL, size=SIZE, workers=1)
    return out


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def back_project(depth: np.ndarray) -> np.ndarray:
    """Return points (H, W, 3) in the frame of the normals: x right, y up, z towards the camera."""
    height, width = depth.shape
    y, x = np.mgrid[:height, :width] + 0.5
    focal = focal_px(width)
    return np.stack([(x - width / 2) / focal * depth, -(y - height / 2) / focal * depth, -depth], axis=-1)


def differentiated_normals(depth: np.ndarray) -> np.ndarray:
    """Return the normals (H-2, W-2, 3) of central differences of the surface."""
    points = back_project(depth.astype(np.float64))
    rightwards, upwards = points[1:-1, 2:] - points[1:-1, :-2], points[:-2, 1:-1] - points[2:, 1:-1]
    normals = np.cross(rightwards, upwards)  # right x up = towards the camera
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True)


def median_angle_deg(depth: np.ndarray, normals: np.ndarray, smooth: np.ndarray) -> float:
    cosine = (differentiated_normals(depth) * normals[1:-1, 1:-1]).sum(axis=-1)[smooth]
    return float(np.degrees(np.median(np.arccos(np.clip(cosine, -1, 1)))))


def away_from_edges(labels: Labels) -> np.ndarray:
    """Return the inner pixels (H-2, W-2) without an edge among their eight neighbours."""
    height, width = labels.edge.shape
    windows = [labels.edge[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
    return np.max(windows, axis=0) == 0


def test_floor_pixels_lie_on_the_floor(scenes: list[Scene]) -> None:
    """Depth, intrinsics, pose and class agree: floor pixels have world height 0."""
    seen = 0
    for scene in scenes:
        floor = scene.labels.segmentation == CLASS_IDS["floor"]
        points = back_project(scene.labels.depth)[floor] * (1, -1, -1)  # to right, down, forward
        world = points @ scene.camera.axes + scene.camera.position
        np.testing.assert_allclose(world[:, 2], 0, atol=1e-5)  # float32 depth of a few metres
        seen += int(floor.sum())
    assert seen > 500


def test_depth_agrees_with_trimesh() -> None:
    """Depth is the forward distance of the hits that trimesh's own ray-triangle code finds."""
    rng = np.random.default_rng(0)
    geometry = Geometry(Room(rng))
    camera = render_scene(np.random.default_rng([0, 0, 0]), SIZE).camera  # any pose inside a room will do
    origins, directions = pixel_rays(camera, SIZE)
    origins, directions = origins[::37], directions[::37]
    _, depth = geometry.trace(origins, directions)
    points, rays, _ = geometry.mesh.ray.intersects_location(origins, directions, multiple_hits=False)
    along = (points - camera.position) @ camera.axes[2]
    assert len(rays) == len(origins)
    np.testing.assert_allclose(depth[rays], along, atol=1e-4)  # trimesh's hit is in float32


def test_normals_are_unit_and_face_the_camera(scenes: list[Scene]) -> None:
    for scene in scenes:
        normals = scene.labels.normals
        np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-6)
        towards = -back_project(scene.labels.depth)
        assert ((normals * towards).sum(axis=-1) > -1e-6).all()
        assert np.mean(normals[..., 2] > 0) > 0.8


def test_normals_up_is_positive_y(scenes: list[Scene]) -> None:
    for scene in scenes:
        up = scene.labels.normals[..., 1]
        assert (up[scene.labels.segmentation == CLASS_IDS["floor"]] > 0.5).all()
        assert (up[scene.labels.segmentation == CLASS_IDS["ceiling"]] < -0.5).all()


def test_normals_agree_with_depth(scenes: list[Scene]) -> None:
    """Also after a flip, where x changes sign."""
    for scene in scenes:
        labels, smooth = scene.labels, away_from_edges(scene.labels)
        assert smooth.mean() > 0.3
        assert median_angle_deg(labels.depth, labels.normals, smooth) < 0.1
        flipped = labels.normals[:, ::-1] * (-1, 1, 1)
        assert median_angle_deg(labels.depth[:, ::-1], flipped, smooth[:, ::-1]) < 0.1


def test_edges_are_at_class_borders(scenes: list[Scene]) -> None:
    for scene in scenes:
        segmentation, edge = scene.labels.segmentation, scene.labels.edge
        assert edge[:, :-1][segmentation[:, 1:] != segmentation[:, :-1]].all()
        assert edge[:-1][segmentation[1:] != segmentation[:-1]].all()
        assert 0.02 < edge.mean() < 0.4


def test_views_are_not_dull(scenes: list[Scene]) -> None:
    for scene in scenes:
        share = np.bincount(scene.labels.segmentation.ravel()) / scene.labels.segmentation.size
        assert share.max() < 0.6
        assert (share > 0.005).sum() >= 5
        assert 20 < scene.image.mean() < 235
        assert scene.image.std() > 15


def test_layout(data_set: Path) -> None:
    train = (data_set / "gt_sets" / "train.txt").read_text().splitlines()
    val = (data_set / "gt_sets" / "val.txt").read_text().splitlines()
    assert train == ["0001", "0002", "0003", "0004"]
    assert val == ["0005", "0006"]
    for folder, ending in ENDINGS.items():
        assert sorted(path.name for path in (data_set / folder).iterdir()) == [
            f"{name}.{ending}" for name in train + val
        ]
    assert sorted(path.name for path in data_set.iterdir()) == sorted([*ENDINGS, "gt_sets", "synthetic.json"])
    manifest = json.loads((data_set / "synthetic.json").read_text())
    assert manifest["arguments"] == {"layout": "nyud", "train": 4, "val": 2, "size": [48, 64], "seed": 0}
    assert manifest["camera"]["focal_px"] == pytest.approx(51.886)  # 518.86 px * 64 / 640


def test_files(data_set: Path) -> None:
    classes = {CLASS_IDS[name] for name in SCENE_CLASSES}
    for name in ("0001", "0006"):
        with Image.open(data_set / "images" / f"{name}.jpg") as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 48))
        with Image.open(data_set / "segmentation" / f"{name}.png") as segmentation:
            assert segmentation.mode == "L"
            assert set(np.unique(np.asarray(segmentation)).tolist()) <= classes
        depth, normals, edge = (np.load(data_set / folder / f"{name}.npy") for folder in ("depth", "normals", "edge"))
        assert (depth.dtype, depth.shape) == (np.float32, SIZE)
        assert (normals.dtype, normals.shape) == (np.float32, (*SIZE, 3))
        assert (edge.dtype, edge.shape) == (np.float32, SIZE)
        assert 0.4 < depth.min() and depth.max() < 12
        assert set(np.unique(edge).tolist()) == {0.0, 1.0}


def test_scenes_are_those_of_version_0_1(data_set: Path) -> None:
    """The demo's figures are about these very scenes: the ids of the labels are held exactly, floats by their means."""
    digest, means = hashlib.sha256(), []
    for name in ("0001", "0002", "0003"):
        with Image.open(data_set / "segmentation" / f"{name}.png") as segmentation:
            digest.update(np.asarray(segmentation).tobytes())
        digest.update(np.load(data_set / "edge" / f"{name}.npy").astype(np.uint8).tobytes())
        with Image.open(data_set / "images" / f"{name}.jpg") as image:
            means.append([np.load(data_set / "depth" / f"{name}.npy").mean(), np.asarray(image).mean()])
    assert digest.hexdigest() == "ed2d4da4ab536f456b0fea62243dbdaa071270a7836d2d118034387e56052319"
    np.testing.assert_allclose(np.mean(means, axis=0), [3.0614, 118.2405], rtol=1e-3)


@pytest.mark.process
def test_same_arguments_same_bytes_whatever_the_workers(data_set: Path, tmp_path: Path) -> None:
    """Two workers get a chunk each."""
    synthesize(tmp_path / "again", train=TRAIN, val=VAL, size=SIZE, workers=2)
    assert digests(tmp_path / "again") == digests(data_set)


def test_images_depend_on_seed_and_split_but_not_on_counts(data_set: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    synthesize(tmp_path / "few", train=1, val=1, size=SIZE, workers=1, progress=lambda *done: calls.append(done))
    synthesize(tmp_path / "other", train=1, val=1, size=SIZE, seed=1, workers=1)
    original, few, other = digests(data_set), digests(tmp_path / "few"), digests(tmp_path / "other")
    assert calls == [(1, 2), (2, 2)]
    assert few["images/0001.jpg"] == original["images/0001.jpg"]  # train 0
    assert few["images/0002.jpg"] == original["images/0005.jpg"]  # val 0
    assert few["images/0001.jpg"] != few["images/0002.jpg"]
    for folder, ending in ENDINGS.items():
        assert few[f"{folder}/0001.{ending}"] != other[f"{folder}/0001.{ending}"]


def test_whole_data_set_is_not_rendered_again(data_set: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise AssertionError

    before = digests(data_set)
    synthesize(data_set, train=TRAIN, val=VAL, size=SIZE, workers=7, progress=fail)
    assert digests(data_set) == before


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "empty"
    out.mkdir()
    synthesize(out, train=1, val=1, size=(32, 48), workers=1)
    assert (out / "synthetic.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "set", train=2, val=2, size=(32, 48), workers=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "coco"}, "layout 'coco' is unknown: choose from nyud, pascal"),
        ({"train": 0}, "train is 0, but must be at least 1"),
        ({"val": -3}, "val is -3, but must be at least 1"),
        ({"workers": 0}, "workers is 0, but must be at least 1"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
        ({"size": (31, 64)}, "size is 31 x 64 pixels, but height and width must each be at least 32"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        synthesize(tmp_path / "set", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_occupied_folders_are_refused(data_set: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds a synthetic data set of .* not of"):
        synthesize(data_set, train=TRAIN, val=VAL, size=SIZE, seed=5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and holds no synthetic\.json: name a new folder"):
        synthesize(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        synthesize(tmp_path / "notes.txt")


def test_incomplete_data_set_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "set"
    synthesize(out, train=1, val=1, size=(32, 48), workers=1)
    (out / "depth" / "0002.npy").unlink()
    with pytest.raises(InputError, match=r"0002\.npy is missing"):
        synthesize(out, train=1, val=1, size=(32, 48))


@pytest.mark.parametrize("package", ["trimesh", "embreex"])
def test_missing_renderer_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package} is not installed.*pip install -e '.*\[train\]'"):
        synthesize(tmp_path / "set")


@pytest.mark.process
def test_torch_is_not_imported() -> None:
    modules = "m3vit.data.synthetic.dataset, m3vit.data.synthetic.scenes.rendering"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_limit_of_file_sizes_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, before[1]))  # as a full disk; depths of 64 x 64 take 16 KiB
    try:
        with pytest.raises(InputError, match=r"data cannot be written \(.*\): nothing is left of it"):
            synthesize(tmp_path / "data", train=1, val=1, size=(64, 64), workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
