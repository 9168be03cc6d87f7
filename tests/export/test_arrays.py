"""What people give for images: arrays are predicted, everything else is named, with a way to make an array of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m3vit.errors import InputError
from m3vit.export.runtime.package import Package
from m3vit.images import read_image
from tests.export.test_runtime import make_package

ARRAY = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package.load(make_package(tmp_path_factory.mktemp("arrays") / "package"))


CALLS: dict[str, Callable[[Package, Any], Any]] = {
    "predict": lambda package, value: package.predict(value, "depth"),
    "predict_batch": lambda package, value: package.predict_batch(value, "depth"),
    "logits": lambda package, value: package.logits(value, "depth"),
    "predict_iter": lambda package, value: list(package.predict_iter(value, "depth")),
}
THINGS: list[tuple[Any, str]] = [
    (Image.fromarray(ARRAY), r"a PIL image \(RGB, 12 x 8\).*numpy.asarray\(image.convert\('RGB'\)\).*read_image"),
    ("photo.jpg", r"a path \(photo.jpg\).*m3vit.export.images.read_image"),
    (Path("photo.jpg"), r"a path \(photo.jpg\)"),
    (b"\xff\xd8", "a bytes|image 0"),
    ([[1]], "a list of 1"),
    ([ARRAY.tolist()], "a list of 1|image 0: image is a list of 8"),
    ((ARRAY.tolist(),), "a tuple of 1|image 0: image is a list of 8"),
    (torch.from_numpy(ARRAY), r"a torch.Tensor.*numpy.asarray|image 0: image is a torch.Tensor"),
    (torch.from_numpy(ARRAY[None]), r"a torch.Tensor|image 0: image is a torch.Tensor"),
    (np.ma.masked_array(ARRAY, ARRAY > 9), "a masked array.*filled|image 0: image is a masked array"),
    (None, "a NoneType"),
    (7, "a int"),
    (np.uint8(7), "a numpy.uint8"),
    ({"image": ARRAY}, "a dict|image 0: image is a path"),
    (object(), "a object"),
]
WRONG_ARRAYS = [
    ARRAY.astype(dtype) for dtype in (np.int64, np.float64, np.float16, np.int8, np.uint16, bool, object, ">f4", "U3")
] + [ARRAY[..., 0], ARRAY[..., :2], ARRAY[:0], np.zeros((8, 12, 4), np.uint8), np.array(5, np.uint8), np.zeros((0, 3))]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("thing", "said"), THINGS, ids=lambda value: type(value).__name__)
def test_what_is_no_array(package: Package, call: str, thing: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        CALLS[call](package, thing)
    assert "\n" not in str(refused.value) and "give " in str(refused.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("array", WRONG_ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_of_another_kind(package: Package, call: str, array: Any) -> None:
    if call == "predict_iter":
        if array.size == 0:
            return  # nothing to predict
        array = [array]
    elif call != "predict":
        array = array[None]
    with pytest.raises(InputError, match="give "):
        CALLS[call](package, array)


def test_lists_of_images_are_a_stream_but_no_batch(package: Package) -> None:
    single = package.predict(ARRAY, "depth")
    for stream in ([ARRAY, ARRAY], (ARRAY, ARRAY), iter([ARRAY] * 2), np.stack([ARRAY] * 2)):
        np.testing.assert_array_equal(list(package.predict_iter(stream, "depth")), [single] * 2)
    for call in ("predict_batch", "logits"):
        with pytest.raises(InputError, match=r"images are a list of 2: give .*numpy.stack"):
            CALLS[call](package, [ARRAY, ARRAY])


def test_the_advice_works(package: Package, tmp_path: Path) -> None:
    expected = package.predict(ARRAY, "depth")
    Image.fromarray(ARRAY).save(tmp_path / "photo.png")
    picture = Image.open(tmp_path / "photo.png")
    for array in (
        np.asarray(picture.convert("RGB")),
        read_image(tmp_path / "photo.png"),
        np.asarray(torch.from_numpy(ARRAY)),
        np.stack([ARRAY])[0],
        np.asfortranarray(ARRAY),
        ARRAY[::-1][::-1],
    ):
        np.testing.assert_array_equal(package.predict(array, "depth"), expected)


@pytest.mark.parametrize("task", ["flow", "", None, 3, ["depth"], ("depth", "edge")])
def test_tasks_that_are_none(package: Package, task: Any) -> None:
    for call in (package.predict, package.predict_batch, package.logits, package.predict_iter):
        images = ARRAY if call == package.predict else ARRAY[None]
        with pytest.raises(InputError, match=r"this package has no task .*: it has semseg, depth, normals, edge"):
            call(images, task)


def test_a_precision_that_no_export_has(package: Package) -> None:
    with pytest.raises(
        InputError, match=r"not bf16: .* can hold fp32, fp16, int8, int8-mixed, int8-experts"
    ) as refused:
        Package.load(package.folder, precision="bf16")
    assert "--precision" not in str(refused.value)
