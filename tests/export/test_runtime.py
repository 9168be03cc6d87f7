"""The runtime, on a package made by hand: what the graphs compute is known, and no torch is needed."""

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from m3vit.digests import write_sealed_json
from m3vit.errors import InputError
from m3vit.export.runtime.package import FORMAT, FORMAT_VERSION, Package, colourise
from m3vit.kinds.classes import NOT_LABELLED
from m3vit.kinds.decoding import decode
from m3vit.tasks import palette

CHANNELS = {"semseg": 3, "depth": 1, "normals": 3, "edge": 1}
DECODE = {"semseg": "argmax", "depth": "identity", "normals": "unit_vector", "edge": "sigmoid"}


def file_entry(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def make_package(folder: Path, size: tuple[int, int] | None = None, batch: int | None = None) -> Path:
    """A package whose logits are the first C channels of its input: mean 0 and std 1, so pixel / 255."""
    folder.mkdir(parents=True)
    tasks: dict[str, Any] = {}
    (folder / "weights.bin").write_bytes(b"weights")
    axes = [batch or "batch", 3, *(size or ("height", "width"))]
    for task, channels in CHANNELS.items():
        picked = numpy_helper.from_array(np.arange(channels), "channels")
        node = helper.make_node("Gather", ["image", "channels"], [task], axis=1)
        graph = helper.make_graph(
            [node],
            task,
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, axes)],
            [helper.make_tensor_value_info(task, TensorProto.FLOAT, [batch or "batch", channels, *axes[2:]])],
            initializer=[picked],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, folder / f"{task}.onnx")
        tasks[task] = {
            "graphs": {"fp32": file_entry(folder / f"{task}.onnx")},
            "channels": channels,
            "decode": DECODE[task],
            "input_size": size,
            "batch": batch,
            "patch_multiple": 4,
        }
    tasks["semseg"]["palette"] = palette("abc")
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "precisions": ["fp32"],
        "weights": file_entry(folder / "weights.bin"),
        "image": {"mean": [0, 0, 0], "std": [1, 1, 1], "train_size": [8, 12]},
        "tasks": tasks,
        "backbone": None,
        "macs": 0,
    }
    write_sealed_json(folder / "manifest.json", manifest)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_package(tmp_path / "package")


def make_image(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_decode_by_hand() -> None:
    logits = np.array([[[[1.0, -2.0]], [[3.0, -1.0]], [[2.0, -7.0]]]], np.float32)  # [1, 3, 1, 2]
    np.testing.assert_array_equal(decode(logits, "argmax"), np.array([[[1, 1]]], np.uint8))
    np.testing.assert_array_equal(decode(logits[:, :1], "identity"), logits[:, 0])
    # |(1, 3, 2)|^2 = 14, |(-2, -1, -7)|^2 = 54
    expected = np.array([[[[1, 3, 2], [-2, -1, -7]]]]) / np.sqrt([14, 54])[:, None]
    np.testing.assert_allclose(decode(logits, "unit_vector"), expected, rtol=1e-6)
    extreme = np.array([[[[0.0, np.log(3), -1e4, 1e4]]]], np.float32)
    np.testing.assert_allclose(decode(extreme, "sigmoid"), [[[0.5, 0.75, 0, 1]]], rtol=1e-6)
    assert not decode(np.zeros((1, 3, 1, 1), np.float32), "unit_vector").any()


def test_logits_of_both_kinds_of_input(folder: Path) -> None:
    package = Package.load(folder)
    package.manifest["image"].update(mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.5])
    images = np.stack([make_image(8, 12)] * 2)
    logits = package.logits(images, "normals")
    expected = ((images / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]).transpose(0, 3, 1, 2)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(package.logits(expected.astype(np.float32), "normals"), expected.astype(np.float32))


@pytest.mark.parametrize("size", [(8, 12), (4, 4), (9, 13), (17, 6)])
def test_predictions_have_the_images_own_size(folder: Path, size: tuple[int, int]) -> None:
    package = Package.load(folder, threads=1)
    image = make_image(*size)
    kinds = {"semseg": np.uint8, "depth": np.float32, "normals": np.float32, "edge": np.float32}
    for task in package.tasks:
        prediction = package.predict(image, task)
        assert prediction.shape == ((*size, 3) if task == "normals" else size)
        assert prediction.dtype == kinds[task]
        assert colourise(prediction, task, package.manifest).shape == (*size, 3)
    lengths = np.linalg.norm(package.predict(image, "normals"), axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    if size == (8, 12):  # run as it is
        np.testing.assert_array_equal(package.predict(image, "semseg"), image.argmax(axis=2))
        np.testing.assert_allclose(package.predict(image, "depth"), image[..., 0] / 255, rtol=1e-6)


def test_resized_prediction_stays_in_place(folder: Path) -> None:
    # A half-black, half-red image of 10 x 18 runs at 8 x 20: the border must come back to column 9.
    image = np.zeros((10, 18, 3), np.uint8)
    image[:, 9:, 1] = 255
    ids = Package.load(folder).predict(image, "semseg")
    np.testing.assert_array_equal(ids[:, :8], 0)
    np.testing.assert_array_equal(ids[:, 10:], 1)


def test_fixed_size(tmp_path: Path) -> None:
    package = Package.load(make_package(tmp_path / "fixed", size=(8, 12)))
    assert package.predict(make_image(8, 12), "edge").shape == (8, 12)
    with pytest.raises(InputError, match=r"the image is 16x20 .* edge was exported for 8x12 only"):
        package.predict(make_image(16, 20), "edge")
    assert package.predict(make_image(16, 20), "edge", resize=True).shape == (16, 20)


def test_dynamic_graph_with_resize_runs_at_the_trained_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package.load(folder)
    seen: list[tuple[int, ...]] = []
    logits = package.logits

    def spy(images: NDArray[Any], task: str) -> NDArray[np.float32]:
        seen.append(images.shape)
        return logits(images, task)

    monkeypatch.setattr(package, "logits", spy)
    assert package.predict(make_image(2, 3), "depth", resize=True).shape == (2, 3)
    assert seen == [(1, 8, 12, 3)]


def test_batches_and_streams_equal_single_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package.load(folder, threads=1)
    images = np.random.default_rng(1).integers(0, 256, (5, 9, 14, 3), dtype=np.uint8)
    monkeypatch.setattr("m3vit.export.runtime.package.MAX_PATCHES", 14)  # 6 patches an image: runs of 2, 2 and 1
    for task in package.tasks:
        single = [package.predict(image, task) for image in images]
        np.testing.assert_array_equal(package.predict_batch(images, task), np.stack(single))
        np.testing.assert_array_equal(np.stack(list(package.predict_iter(iter(images), task))), np.stack(single))
    with pytest.raises(InputError, match="images are"):
        package.predict_batch(images[0], "depth")


def test_graphs_for_one_image_take_batches(tmp_path: Path) -> None:
    package = Package.load(make_package(tmp_path / "static", (8, 12), batch=1))
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    np.testing.assert_allclose(package.predict_batch(images, "depth"), images[..., 0] / 255, rtol=1e-6)


def test_what_a_package_does_not_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds fp32, not int8: .* --precision int8"):
        Package.load(folder, precision="int8")
    with pytest.raises(InputError, match="--one-backbone"):
        Package.load(folder, one_backbone=True)
    with pytest.raises(InputError, match="choose one of the two"):
        Package.load(folder, low_memory=True, cache=tmp_path)


def test_bad_requests_are_refused(folder: Path) -> None:
    package = Package.load(folder)
    with pytest.raises(InputError, match="no task 'flow': it has semseg, depth, normals, edge"):
        package.predict(make_image(8, 8), "flow")
    with pytest.raises(InputError, match=r"image is 3x9 .* at least 4x4"):
        package.predict(make_image(3, 9), "depth")
    with pytest.raises(InputError, match="image is float64"):
        package.predict(np.zeros((8, 8, 3)), "depth")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="resize them to 8x12"):
        package.logits(make_image(9, 11)[None], "depth")
    for wrong in (np.zeros((8, 8, 3), np.uint8), np.zeros((1, 3, 8, 8)), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(InputError, match="give "):
            package.logits(wrong, "depth")
    with pytest.raises(InputError, match="threads is -1"):
        Package.load(folder, threads=-1)


def test_changed_files_are_refused(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"weighty")
    with pytest.raises(
        InputError, match=r"weights.bin does not match manifest.json \(sha256 \w+, not \w+\): the package"
    ):
        Package.load(folder)
    Package.load(folder, verify=False)
    (folder / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"weights.bin not found: the package is incomplete"):
        Package.load(folder)
    (folder / "depth.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"onnxruntime cannot load .*depth.onnx"):
        Package.load(folder, verify=False).predict(make_image(8, 8), "depth")


def test_graphs_that_the_manifest_did_not_mean_are_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tasks"]["depth"]["graphs"] = manifest["tasks"]["edge"]["graphs"]
    manifest["tasks"]["semseg"].update(channels=4, palette=palette("abcd"))
    write_sealed_json(path, manifest)
    package = Package.load(folder)
    with pytest.raises(InputError, match=r"edge.onnx is not the graph that manifest.json describes"):
        package.predict(make_image(8, 8), "depth")
    with pytest.raises(InputError, match=r"semseg.onnx is not the graph"):
        package.predict(make_image(8, 8), "semseg")
    assert package.predict(make_image(8, 8), "edge").shape == (8, 8)


def test_damaged_manifests_are_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    good = json.loads(path.read_text())

    def refused(match: str, **changes: Any) -> None:
        write_sealed_json(path, {**good, **changes})
        with pytest.raises(InputError, match=match):
            Package.load(folder)

    refused("not an m3vit package's", format="other")
    refused("format version 1, this m3vit reads 2", format_version=1)
    lacking: list[dict[str, Any]] = [
        {"tasks": {}},
        {"tasks": {"depth": {}}},
        {"tasks": []},
        {"image": None},
        {"weights": "weights.bin"},
        {"precisions": []},
        {"precisions": ["fp32", "int8"]},
        {"backbone": {"graphs": {}}},
        {"macs": None},
        {"tasks": {"depth": {**good["tasks"]["depth"], "graphs": {}}}},
    ]
    for changes in lacking:
        refused("is damaged", **changes)
    refused("is damaged", weights={**good["weights"], "file": "../weights.bin"})
    path.write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        Package.load(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"manifest.json not found: give the folder"):
        Package.load(folder)
    with pytest.raises(InputError, match=r"depth.onnx is a file: give the folder"):
        Package.load(folder / "depth.onnx")


def test_colours(folder: Path) -> None:
    manifest = Package.load(folder).manifest
    ids = np.array([[0, 2, 255]], np.uint8)
    assert colourise(ids, "semseg", manifest).tolist() == [
        [list(palette("abc")[0]), list(palette("abc")[2]), list(NOT_LABELLED)]
    ]
    edges = np.array([[0, 1]], np.float32)
    assert colourise(edges, "edge", manifest).tolist() == [[[255] * 3, [0] * 3]]
    normals = np.array([[[0, 0, 1], [-1, 0, 0]]], np.float32)
    assert colourise(normals, "normals", manifest).tolist() == [[[128, 128, 255], [0, 128, 128]]]
    brightness = colourise(np.linspace(1, 5, 50, dtype=np.float32)[None], "depth", manifest)[0].astype(int).sum(axis=1)
    assert (np.diff(brightness) <= 0).all() and brightness[0] > 600 and brightness[-1] < 10  # near bright
    assert not colourise(np.full((2, 2), np.nan, np.float32), "depth", manifest).any()


FREED = """
import sys
import numpy as np
from m3vit.heap import give_memory_back, trim

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

if sys.argv[1] == "give":
    give_memory_back()
big = np.ones(30 << 20, np.uint8)
del big  # from now on glibc keeps freed blocks of up to 30 MiB
before = resident_mib()
blocks = [(np.ones(6 << 20, np.uint8), np.ones(50_000, np.uint8)) for _ in range(20)]
blocks = [small for _, small in blocks]  # one lies behind each freed block
if sys.argv[1] == "trim":
    trim()
print(resident_mib() - before)
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_goes_back_to_the_system() -> None:
    kept, given, trimmed = (
        int(subprocess.run([sys.executable, "-c", FREED, way], check=True, capture_output=True, text=True).stdout)
        for way in ("keep", "give", "trim")
    )
    assert max(given, trimmed) < 10 and kept > 60, "of 120 MiB freed"
