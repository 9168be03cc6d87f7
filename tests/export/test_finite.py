"""What is no number is an error: in weights before an export, in a comparison, and in predictions."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from PIL import Image

from m3vit.cli import main
from m3vit.digests import read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation.artefacts import onnx_predictor
from m3vit.evaluation.protocols import NetworkImage
from m3vit.export.hls.project import export_project
from m3vit.export.onnx.from_run import Request, export_run
from m3vit.export.onnx.package import Content, _require_finite_tensors, export_package
from m3vit.export.runtime.manifest import MANIFEST
from m3vit.export.runtime.package import NotFinite, Package
from m3vit.export.runtime.predict import predict_files
from m3vit.label_sets import LabelSet, add_label_set
from m3vit.normalisation import IMAGENET
from m3vit.run_folder import load_run
from tests.command_line import kept_state
from tests.export.films import write_film
from tests.export.models import make_images, make_model, make_samples
from tests.export.test_runtime import make_package

BLACK, WHITE = np.zeros((8, 12, 3), np.uint8), np.full((8, 12, 3), 255, np.uint8)


@pytest.fixture
def bright(tmp_path: Path) -> Path:
    """A package that is finite for black pixels alone: 1 / 1e-39 is infinite in float32."""
    folder = make_package(tmp_path / "bright")
    manifest = read_sealed_json(folder / MANIFEST, "")
    manifest["image"]["std"] = [1e-39] * 3
    write_sealed_json(folder / MANIFEST, manifest)
    return folder


# Numpy says so too, of the normalisation.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_are_checked_before_long_work(tmp_path: Path, value: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.heads.get_parameter("depth.linear.bias")[0] = value
        model.heads.get_parameter("edge.linear.weight")[0, 0] = value
    lines: list[str] = []
    with pytest.raises(InputError, match=r"weights are not finite .* heads.depth.linear.bias, heads.edge.*weight\)"):
        export_package(model, tmp_path / "onnx", info={}, progress=lines.append)
    for schedule in ("spatial", "multiplexed"):
        with pytest.raises(InputError, match="weights are not finite"):
            export_project(
                model, tmp_path / "hls", calibration=make_images(4), samples=make_samples(), schedule=schedule
            )
    assert not lines and list(tmp_path.iterdir()) == []


def test_tensors_that_folding_or_quantising_made() -> None:
    # Such as a convolution into which a BatchNorm with a variance below 0 was folded.
    for value, kind in ((np.nan, np.float32), (np.inf, np.float16), (0, np.int64), (1, np.float32)):
        tensor = numpy_helper.from_array(np.array([1, value], kind), "conv.bias")
        graph = helper.make_model(helper.make_graph([], "depth", [], [], initializer=[tensor]))
        if np.isfinite(value):
            _require_finite_tensors(graph, "depth.onnx")
            continue
        with pytest.raises(InputError, match=r"depth.onnx would hold weights that are not finite .* in conv.bias"):
            _require_finite_tensors(graph, "depth.onnx")


@pytest.mark.slow
def test_a_failed_comparison_leaves_what_was_there(
    tiny_run: Path, tiny_data: Path, onnx_package: Path, tmp_path: Path
) -> None:
    out = tmp_path / "onnx"
    shutil.copytree(onnx_package, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run = load_run(tiny_run)
    with torch.no_grad():  # finite, but what is computed with it is not
        run.model.heads.get_parameter("depth.linear.weight").fill_(3e38)
    said: list[str] = []
    request = Request(measure=0, data_root=str(tiny_data))
    with pytest.raises(InputError, match=r"nothing was written to .*: the package does not compute .* not finite"):
        export_run(run, out, Content(tasks=("depth",)), request, say=said.append)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert not any(str(tmp_path / ".") in line and "/." in line for line in said)  # names of the folder it has now


def test_predictions_that_are_no_numbers(bright: Path) -> None:
    package = Package.load(bright)
    assert package.predict(BLACK, "depth").max() == 0
    for task in package.tasks:
        with pytest.raises(NotFinite, match=f"^{task} is not finite .* weights are damaged, or the input is extreme"):
            package.predict(WHITE, task)
    with pytest.raises(NotFinite, match="depth of image 1 is not finite") as refused:
        package.logits(np.stack([BLACK, WHITE, BLACK]), "depth")
    assert refused.value.images == (1,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_no_numbers(bright: Path, value: float) -> None:
    package = Package.load(bright)
    normalised = np.zeros((3, 3, 8, 12), np.float32)
    assert not package.logits(normalised, "depth").any()
    normalised[1:, 0, 3, 4] = value
    with pytest.raises(InputError, match=r"images hold NaN or infinity \(in 1, 2\)"):
        package.logits(normalised, "depth")


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_batches_name_the_images(bright: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("m3vit.export.runtime.package.MAX_PATCHES", 6 * at_once)
    package = Package.load(bright)
    batch = np.stack([BLACK, BLACK, WHITE, BLACK, WHITE])
    with pytest.raises(NotFinite, match="depth of image 2 is not finite") as refused:
        package.predict_batch(batch, "depth")
    assert refused.value.images == (2,)
    results = package.predict_batch(batch, "depth", return_exceptions=True)
    check_flags(results, package)
    odd = package.predict_batch(batch[:, :, :11], "depth", return_exceptions=True)
    assert [one.shape for one in odd if isinstance(one, np.ndarray)] == [(8, 11)] * 3  # resized, as ever
    assert isinstance(package.predict_batch(batch[:2], "depth"), np.ndarray)


def check_flags(results: list[Any], package: Package) -> None:
    assert [isinstance(one, NotFinite) for one in results] == [False, False, True, False, True]
    assert [one.images for one in results if isinstance(one, NotFinite)] == [(2,), (4,)]
    for place in (0, 1, 3):
        np.testing.assert_array_equal(results[place], package.predict(BLACK, "depth"))


def test_streams_name_the_images_and_can_go_on(bright: Path) -> None:
    package = Package.load(bright)
    stream: list[NDArray[np.uint8]] = [BLACK, BLACK, WHITE, BLACK, WHITE]
    seen = []
    with pytest.raises(NotFinite, match="depth of image 2 is not finite"):
        for prediction in package.predict_iter(stream, "depth"):
            seen.append(prediction)
    assert len(seen) == 2
    check_flags(list(package.predict_iter(stream, "depth", return_exceptions=True)), package)
    small = list(package.predict_iter([BLACK[:2], BLACK], "depth", return_exceptions=True))
    assert "image 0: the image is 2x12" in str(small[0]) and isinstance(small[1], np.ndarray)


def test_a_folder_goes_on_and_says_which(bright: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "in"
    images.mkdir()
    for name, picture in (("a", BLACK), ("b", WHITE), ("c", BLACK)):
        Image.fromarray(picture).save(images / f"{name}.png")
    assert main(["predict", str(bright), str(images), "--task", "all", "--raw", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "1 of the inputs failed" in said.err and f"{images / 'b.png'}: semseg is not finite" in said.err
    assert {path.name.split("_")[0] for path in (tmp_path / "out").iterdir()} == {"a", "c"}
    outcome = predict_files(bright, "depth", [images / "b.png"], tmp_path / "again")
    assert len(outcome.failures) == 1 and not outcome.written and not (tmp_path / "again").exists()


def test_a_film_says_which_frame(bright: Path, tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mkv", [BLACK, BLACK, WHITE, BLACK], codec="ffv1")
    outcome = predict_files(bright, "depth", [film], tmp_path / "out")
    ((_, reason),) = outcome.failures
    assert reason.startswith("frame 3: depth is not finite") and not outcome.written


def test_an_evaluation_names_the_image(bright: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_sealed_json(bright / MANIFEST, "")
    image = {**manifest["image"], **IMAGENET.plain()}
    write_sealed_json(bright / MANIFEST, {**manifest, "label_set": "letters", "image": image})
    with kept_state():
        add_label_set(LabelSet("letters", tuple(manifest["tasks"]), {"semseg": tuple("abc")}, 0.01))
        predictor = onnx_predictor(Package.load(bright))
    whole = NetworkImage("kitchen", WHITE, slice(0, 8), slice(0, 12))
    predictor.run([replace(whole, pixels=BLACK)])
    # The evaluation normalises by itself: no pixel is infinite, as one of this package is.
    monkeypatch.setattr(Package, "_run", lambda self, images, task: np.full_like(images, np.inf))
    with pytest.raises(InputError, match="image kitchen: semseg is not finite"):
        predictor.run([whole])
