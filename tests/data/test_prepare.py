"""The official NYU release in its exact format, tiny: prepared, then read by the loader; normals, edges, refusals."""

import json
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3vit.data.nyud import NYUD
from m3vit.data.tools import prepare
from m3vit.data.tools.prepare import CENTRE_PX, FOCAL_PX, find_edges, fit_normals, prepare_nyud
from m3vit.errors import InputError
from m3vit.tasks import IGNORE

h5py = pytest.importorskip("h5py")
savemat = pytest.importorskip("scipy.io").savemat

SIZE = (24, 32)
IMAGES = 5
NUM_NAMES = 894


def images(count: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the release's arrays as MATLAB indexes them: images [H, W, 3, N], the others [H, W, N]."""
    rng = np.random.default_rng(0)
    height, width = size
    depths = 2 + np.arange(count) + np.linspace(0, 1, height)[:, None, None] * np.ones((1, width, 1))
    raw = depths.copy()
    raw[:3, :4] = 0  # not measured
    raw[-1, -1] = 10.0  # clipped
    labels = np.full((height, width, count), 894)
    labels[height // 2 :] = 11
    labels[0] = 0
    instances = np.ones((height, width, count))
    instances[height // 2 :, width // 2 :] = 2
    return {
        "images": rng.integers(0, 256, (height, width, 3, count)).astype(np.uint8),
        "depths": depths.astype(np.float32),
        "rawDepths": raw.astype(np.float32),
        "labels": labels.astype(np.uint16),
        "instances": instances.astype(np.uint8),
    }


def write_labeled(path: Path, arrays: dict[str, np.ndarray], num_names: int = NUM_NAMES) -> Path:
    """Write MATLAB's v7.3: HDF5 behind a block of 512 bytes, axes reversed, chunked and compressed, names as refs."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            stored = array.T
            file.create_dataset(name, data=stored, chunks=(1, *stored.shape[1:]), compression="gzip")
            file[name].attrs["MATLAB_class"] = np.bytes_("uint8" if array.dtype == np.uint8 else array.dtype.name)
        names = file.create_dataset("names", (1, num_names), dtype=h5py.ref_dtype)
        word = file.create_dataset("#refs#/a", data=np.array([[ord(letter)] for letter in "wall"], np.uint16))
        names[...] = np.array([[word.ref] * num_names], dtype=object)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return path


def class_map() -> dict[str, np.ndarray]:
    mapping = np.full((1, NUM_NAMES), 40, np.uint8)
    mapping[0, 10] = 2  # label id 11 is a floor
    names = np.array([f"class {index}" for index in range(1, 41)], dtype=object)[None]
    return {"mapClass": mapping, "className": names, "allClassName": names}


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    labeled = write_labeled(tmp_path / "nyu_depth_v2_labeled.mat", images(IMAGES, SIZE))
    # As in the release: columns, counted from 1, not sorted.
    savemat(
        tmp_path / "splits.mat",
        {"trainNdxs": np.array([[5], [1], [3]], np.uint16), "testNdxs": np.array([[2], [4]], np.uint16)},
    )
    savemat(tmp_path / "classMapping40.mat", class_map(), do_compression=True)
    return {
        "labeled": labeled,
        "splits": tmp_path / "splits.mat",
        "classes": tmp_path / "classMapping40.mat",
        "out": tmp_path / "NYUD_MT",
    }


def run(sources: dict[str, Path], **options: Any) -> dict[str, Any]:
    return prepare_nyud(**sources, **{"workers": 1, **options})


def test_prepared_files_load_with_every_label(sources: dict[str, Path]) -> None:
    arrays = images(IMAGES, SIZE)
    calls: list[tuple[int, int]] = []
    run(sources, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (5, 5)
    train, val = NYUD(sources["out"], "train"), NYUD(sources["out"], "val")
    assert list(train.ids) == ["0005", "0001", "0003"] and list(val.ids) == ["0002", "0004"]
    sample = train.load(0)
    # JPEG of noise: near, and not transposed or mirrored.
    error = np.abs(sample.image.astype(int) - arrays["images"][..., 4]).mean()
    assert sample.image.shape == (*SIZE, 3) and error < 12, error
    semseg = sample.labels["semseg"]
    assert (semseg[0] == IGNORE).all() and (semseg[1:12] == 39).all() and (semseg[12:] == 1).all()
    depth, expected = sample.labels["depth"], arrays["depths"][..., 4]
    missing = arrays["rawDepths"][..., 4] == 0
    missing[-1, -1] = True
    assert (depth[missing] == 0).all() and (depth[~missing] == expected[~missing]).all()
    normals = sample.labels["normals"]
    assert (normals[missing] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(normals[~missing], axis=-1), 1, atol=1e-6)
    edge = sample.labels["edge"]
    # Between the labels, and between the two instances of the floor; the unlabelled row 0 joins the wall.
    assert (edge[11] == 1).all() and (edge[12:, 15] == 1).all() and edge.sum() == 32 + 12


def test_filled_depth_and_what_the_manifest_says(sources: dict[str, Path]) -> None:
    run(sources, depth="filled", sha256=True)
    sample = NYUD(sources["out"], "val").load(1)
    assert (sample.labels["depth"] == images(IMAGES, SIZE)["depths"][..., 3]).all()
    assert (sample.labels["normals"][:3, :4] == 0).all(), "normals come from measured depth only"
    notes = json.loads((sources["out"] / "prepared.json").read_text())
    assert notes["choices"]["depth"] == "filled" and notes["counts"] == {"train": 3, "val": 2}
    assert notes["official_counts"] is False and notes["size"] == list(SIZE)
    assert {name: len(source["sha256"]) for name, source in notes["sources"].items()} == {
        "labeled": 64,
        "splits": 64,
        "classes": 64,
    }


def test_workers_write_the_same_files(sources: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    run(sources)
    monkeypatch.setattr(prepare, "IMAGES_PER_CHUNK", 2)
    run({**sources, "out": tmp_path / "two"}, workers=2)
    names = sorted(str(path.relative_to(sources["out"])) for path in sources["out"].rglob("*.*"))
    assert len(names) == 5 * 5 + 3
    for name in names:
        assert (sources["out"] / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, sources: dict[str, Path]) -> None:
    """Numpy's arrays are traced: 60 images more cost less than two of them would (the file holds them all)."""
    size, peaks = (96, 128), []
    for count in (4, 64):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_labeled(folder / "labeled.mat", images(count, size))
        savemat(folder / "splits.mat", {"trainNdxs": np.arange(1, count)[:, None], "testNdxs": [[count]]})
        tracemalloc.start()
        run({**sources, "labeled": folder / "labeled.mat", "splits": folder / "splits.mat", "out": folder / "out"})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_image = 96 * 128 * (3 + 4 + 4 + 2 + 1)
    assert peaks[1] - peaks[0] < 2 * one_image, (peaks, one_image)


# --- normals --------------------------------------------------------------------------------------------------------


def rays(size: tuple[int, int], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the rays (x, y, 1), y down, of a camera like the Kinect's at this scale."""
    row, column = np.mgrid[1 : size[0] + 1, 1 : size[1] + 1]
    return (
        (column - CENTRE_PX[0] * scale) / (FOCAL_PX[0] * scale),
        (row - CENTRE_PX[1] * scale) / (FOCAL_PX[1] * scale),
    )


def normals_of(depth: np.ndarray, scale: float, radius: int) -> np.ndarray:
    focal, centre = [tuple(value * scale for value in pair) for pair in (FOCAL_PX, CENTRE_PX)]
    return fit_normals(depth.astype(np.float32), focal, centre, radius)  # type: ignore[arg-type]


def angle_deg(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip((found * truth).sum(axis=-1), -1, 1)))


@pytest.mark.parametrize("normal", [(0, 0, 1), (0, 1, 0.2), (0.6, 0, 0.8), (-0.48, 0.6, 0.64)])
def test_normals_of_planes_are_exact(normal: tuple[float, float, float]) -> None:
    unit = np.array(normal) / np.linalg.norm(normal)
    x, y = rays((120, 160), 0.25)
    # A point is z (x, -y, -1) in the axes of the normals; the plane is n . p = -2 m.
    facing = -(unit[0] * x - unit[1] * y - unit[2])
    depth = np.where(facing > 0.2, 2 / np.maximum(facing, 0.2), 0)
    found = normals_of(depth, 0.25, 2)
    seen = (found != 0).any(axis=-1)
    assert seen.sum() > 0.95 * (depth > 0).sum() and not seen[depth == 0].any()
    # Float32 depth: a relative error of 6e-8 over a slope measured across 5 pixels of 130 px focal length.
    assert angle_deg(found, np.broadcast_to(unit, found.shape))[seen].max() < 0.05


def test_normals_of_a_sphere() -> None:
    x, y = rays((120, 160), 0.25)
    distance, radius = 2.0, 0.6
    # z of the near hit of the ray (x, y, 1) with a sphere around (0, 0, distance).
    length = x**2 + y**2 + 1
    inside = distance**2 - length * (distance**2 - radius**2)
    depth = np.where(inside > 0, (distance - np.sqrt(np.maximum(inside, 0))) / length, 0)
    truth = np.stack([x * depth, -y * depth, -(depth - distance)], axis=-1) / radius
    found = normals_of(depth, 0.25, 2)
    facing = (depth > 0) & (truth[..., 2] > 0.6)  # the rim is seen too flat for a window of 5 pixels
    assert (found[facing] != 0).any(axis=-1).all()
    # A window's centre is up to 2 px off in each direction: 2.8 px / 130 px * 1.5 m / 0.6 (slope) / 0.6 m = 0.09 rad at
    # worst; its plane is that of its centre on average.
    angles = angle_deg(found, truth)[facing]
    assert angles.mean() < 1.0 and angles.max() < 8.0


def test_normals_do_not_mix_two_surfaces() -> None:
    """At a step from 2 m to 4 m both sides keep their normal; a naive fit tilts it by more than 60 degrees."""
    depth = np.full((60, 80), 2.0)
    depth[:, 40:] = 4.0
    found = normals_of(depth, 0.125, 3)
    np.testing.assert_allclose(found, np.broadcast_to([0, 0, 1], found.shape), atol=1e-5)


def test_normals_with_noise_holes_and_no_depth() -> None:
    rng = np.random.default_rng(0)
    inverse = 1 / 3 + rng.normal(0, 0.3 * prepare.INVERSE_DEPTH_STEP, (120, 160))
    inverse = np.round(inverse / prepare.INVERSE_DEPTH_STEP) * prepare.INVERSE_DEPTH_STEP
    depth = 1 / inverse
    depth[rng.random(depth.shape) < 0.3] = 0
    found = normals_of(depth, 1.0, prepare.WINDOW_RADIUS_PX)
    assert ((found != 0).any(axis=-1) == (depth > 0)).mean() > 0.99
    seen = (found != 0).any(axis=-1)
    assert angle_deg(found, np.broadcast_to([0, 0, 1], found.shape))[seen].mean() < 3
    assert not normals_of(np.zeros((9, 9)), 1.0, 3).any()
    lonely = np.zeros((30, 30))
    lonely[15, 15] = 2
    assert not normals_of(lonely, 1.0, 3).any(), "one pixel has no slope"


# --- edges ----------------------------------------------------------------------------------------------------------


def test_a_seam_between_objects_gives_one_line_and_a_wide_hole_none() -> None:
    regions = np.zeros((20, 60), np.int64)
    regions[:, :10], regions[:, 13:30] = 1, 2  # a seam of 3 columns
    regions[:, 52:] = 3  # a hole of 22
    edge = find_edges(regions)
    assert (edge.sum(axis=0) > 0).sum() == 1 and edge[:, 10:13].any(axis=1).all()
    assert not find_edges(np.zeros((4, 4), np.int64)).any()
    assert not find_edges(np.ones((4, 4), np.int64)).any()


# --- refusals -------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Path]], None]


def swap(sources: dict[str, Path]) -> None:
    sources["splits"], sources["classes"] = sources["classes"], sources["splits"]


def v5_labeled(sources: dict[str, Path]) -> None:
    sources["labeled"] = sources["splits"]


def text_labeled(sources: dict[str, Path]) -> None:
    sources["labeled"].write_text("<html>quota exceeded</html>")


def hdf5_splits(sources: dict[str, Path]) -> None:
    sources["splits"] = sources["labeled"]


def truncate(sources: dict[str, Path]) -> None:
    content = sources["labeled"].read_bytes()
    sources["labeled"].write_bytes(content[: len(content) // 2])


def damage(sources: dict[str, Path]) -> None:
    """Overwrite the compressed chunk of one image's depth."""
    with h5py.File(sources["labeled"], "r") as file:
        chunk = file["depths"].id.get_chunk_info_by_coord((1, 0, 0))
    content = bytearray(sources["labeled"].read_bytes())
    starts = [chunk.byte_offset + base for base in (0, 512)]  # HDF5 versions count with and without the user block
    (start,) = [start for start in starts if zlib_stream(content[start : start + chunk.size])]
    content[start : start + chunk.size] = b"\xff" * chunk.size
    sources["labeled"].write_bytes(content)


def zlib_stream(data: bytes) -> bool:
    try:
        return len(zlib.decompress(data)) == 4 * SIZE[0] * SIZE[1]
    except zlib.error:
        return False


def no_raw(sources: dict[str, Path]) -> None:
    with h5py.File(sources["labeled"], "r+") as file:
        del file["rawDepths"]


def other_size(sources: dict[str, Path]) -> None:
    with h5py.File(sources["labeled"], "r+") as file:
        del file["labels"]
        file["labels"] = np.zeros((IMAGES, 24, 32), np.uint16)  # not transposed


def write_splits(train: list[float], val: list[float]) -> Change:
    return lambda sources: savemat(sources["splits"], {"trainNdxs": np.array([train]).T, "testNdxs": np.array([val]).T})


def write_map(**fields: np.ndarray) -> Change:
    return lambda sources: savemat(sources["classes"], {**class_map(), **fields})


def short_map_without_names(sources: dict[str, Path]) -> None:
    with h5py.File(sources["labeled"], "r+") as file:
        del file["names"]
    write_map(mapClass=np.ones((1, 100), np.uint8))(sources)


def not_empty(sources: dict[str, Path]) -> None:
    sources["out"].mkdir()
    (sources["out"] / "thesis.tex").write_text("mine")


def missing(name: str) -> Change:
    return lambda sources: sources[name].unlink()


REFUSALS: list[tuple[Change, str]] = [
    (swap, "no trainNdxs: --splits and --classes seem to be swapped"),
    (v5_labeled, r"splits\.mat is a MATLAB v5 file, but the labelled release is MATLAB v7\.3"),
    (text_labeled, "is not an HDF5 file"),
    (hdf5_splits, r"is MATLAB v7\.3 \(HDF5\), but must be a v5 file: give splits\.mat"),
    (truncate, "cut off or damaged, download it again"),
    (damage, r"depths of image 2 cannot be read .*: it is cut off or damaged"),
    (no_raw, "has no array rawDepths"),
    (other_size, "arrays do not fit each other"),
    (missing("labeled"), "labeled.mat not found"),
    (missing("splits"), r"splits\.mat not found: give splits\.mat as --splits"),
    (missing("classes"), "classMapping40.mat not found"),
    (write_splits([1, 2, 6], [3]), "trainNdxs goes from 1 to 6, but the labelled file has images 1 to 5"),
    (write_splits([1, 2], [0, 3]), "testNdxs goes from 0 to 3"),
    (write_splits([1, 2, 2], [3]), "trainNdxs lists image 2 more than once"),
    (write_splits([1, 2, 4], [3, 4]), "1 images are in both splits, the first is 4"),
    (write_splits([1, 2.5], [3]), "must hold whole numbers"),
    (lambda sources: savemat(sources["splits"], {"trainNdxs": [[1]]}), "testNdxs is missing or empty"),
    (lambda sources: sources["splits"].write_bytes(b"broken" * 100), "is not a readable MATLAB v5 file"),
    (write_map(mapClass=np.ones((1, 40), np.uint8)), "covers 40 label ids, but the labelled file names 894 classes"),
    (write_map(mapClass=np.full((1, 894), 41, np.uint8)), "must hold classes 0 to 40"),
    (short_map_without_names, r"image \d: has label id 894, but --classes covers 1 to 100"),
    (not_empty, "is not empty"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_a_bad_source_is_named_and_nothing_is_left(sources: dict[str, Path], change: Change, message: str) -> None:
    change(sources)
    with pytest.raises(InputError, match=message):
        run(sources)
    left = {path.name for path in sources["out"].parent.iterdir()}
    assert left <= {"nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat", "NYUD_MT"}
    if "NYUD_MT" in left:
        assert [path.name for path in sources["out"].iterdir()] == ["thesis.tex"]


def test_a_full_disk_is_seen_before_the_start(sources: dict[str, Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match=r"5 images need about .* GB are free"):
        run(sources)


def test_unknown_depth(sources: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="depth is 'raw': choose from measured, filled"):
        run(sources, depth="raw")


def test_command(sources: dict[str, Path], cli: Callable[..., Any], tmp_path: Path) -> None:
    words = ["data", "prepare", "nyud", *(f"--{name}={path}" for name, path in sources.items())]
    result = cli(*words, "--workers", 1)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (
        f"3 training and 2 validation images in {sources['out']}, which are not the official 795 and 654"
    )
    result = cli("data", "check", sources["out"], "--workers", 1)
    assert result.returncode == 0 and "made by m3vit data prepare" in result.stdout, result.stdout
    result = cli(*words)
    assert result.returncode == 2 and "is not empty" in result.stderr
    assert cli("data", "prepare", "cityscapes").returncode == 2
