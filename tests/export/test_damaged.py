"""Damaged, swapped and edited packages: one line that says which file, never a stack trace or a silent result."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.digests import write_sealed_json
from m3vit.errors import InputError
from m3vit.evaluation.artefacts import onnx_predictor
from m3vit.export.onnx.package import export_package
from m3vit.export.runtime.package import Package, file_entries
from m3vit.run_folder import load_run
from tests.command_line import kept_state
from tests.conftest import Cli
from tests.test_cli import refused

pytestmark = pytest.mark.slow

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


@pytest.fixture
def package(onnx_package: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(onnx_package, tmp_path / "package"))


def edit(package: Path, change: Callable[[dict[str, Any]], object], rehash: bool = False) -> None:
    """Change the manifest under a valid digest; `rehash` makes its hashes those of the files: no checksum sees it."""
    path = package / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    for entry in file_entries(manifest) if rehash else ():
        entry["sha256"] = hashlib.sha256((package / entry["file"]).read_bytes()).hexdigest()
    write_sealed_json(path, manifest)


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def predict(package: Path, task: str = "depth", **options: Any) -> Any:
    return Package.load(package, threads=1).predict(IMAGE, task, **options)


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["depth.onnx", "weights.bin"])
def test_truncated_files(package: Path, name: str, share: float) -> None:
    content = (package / name).read_bytes()
    (package / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=rf"{name} does not match manifest.json \(sha256 \w+, not \w+\)"):
        Package.load(package)
    if (name, share) == ("weights.bin", 0.999):  # what is missing is another task's
        return
    with pytest.raises(InputError, match=r"onnxruntime cannot load .*depth.onnx: .*; export the package again"):
        Package.load(package, verify=False).predict(IMAGE, "depth")


def test_swapped_graphs(package: Path) -> None:
    swap(package / "depth.onnx", package / "edge.onnx")
    with pytest.raises(InputError, match=r"depth.onnx does not match manifest.json"):
        Package.load(package)


def test_folder_instead_of_a_file(package: Path) -> None:
    (package / "weights.bin").unlink()
    (package / "weights.bin").mkdir()
    with pytest.raises(InputError, match=r"weights.bin not found: the package is incomplete"):
        Package.load(package)


@pytest.mark.slow
def test_files_of_another_package(cli: Cli, package: Path, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    # The same architecture with other weights: sizes and names are all as they should be.
    model, other = load_run(tiny_run).model, tmp_path / "other"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.01
    export_package(model, other, info={})
    image, out = tiny_data / "images" / "0000.jpg", tmp_path / "out"
    for name in ("weights.bin", "depth.onnx", "manifest.json"):
        swap(package / name, other / name)
        # Under a manifest from elsewhere, the files are the ones that do not match.
        blamed = r"\w+\.(bin|onnx)" if name == "manifest.json" else name
        for folder in (package, other):
            with pytest.raises(InputError, match=rf"^{blamed} does not match manifest.json \(sha256 \w+, not \w+\)"):
                Package.load(folder)
        refused(cli("predict", package, "--task", "depth", image, "--out", out), rf"{blamed} does not match")
        swap(package / name, other / name)
    assert not out.exists()
    predict(package)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["tasks"]["depth"]["graphs"]["fp32"].pop("sha256"),
        lambda manifest: manifest["weights"].pop("sha256"),
        lambda manifest: manifest["tasks"]["depth"]["graphs"]["fp32"].update(file="../depth.onnx"),
        lambda manifest: manifest["tasks"]["depth"]["graphs"]["fp32"].update(file=5),
        lambda manifest: manifest["tasks"]["depth"]["graphs"].pop("fp32"),
        lambda manifest: manifest["tasks"]["depth"].update(graphs=[]),
        lambda manifest: manifest.update(precisions=[]),
        lambda manifest: manifest.update(precisions=[1]),
        lambda manifest: manifest["tasks"]["depth"].update(decode="sum"),
        lambda manifest: manifest["tasks"]["depth"].update(decode=["identity"]),
        lambda manifest: manifest["tasks"]["semseg"].update(palette=[]),
        lambda manifest: manifest["image"].update(mean=[0.5]),
        lambda manifest: manifest.update(tasks=[]),
    ],
)
def test_edited_manifests(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(package, change)
    with pytest.raises(InputError, match=r"manifest.json is damaged, entries are missing or of the wrong kind"):
        Package.load(package)


@pytest.mark.parametrize("wanted", ["none.onnx", "", "\0", "..", "weights.bin"])
def test_manifest_that_names_another_file(package: Path, wanted: str) -> None:
    edit(package, lambda manifest: manifest["tasks"]["depth"]["graphs"]["fp32"].update(file=wanted))
    with pytest.raises(InputError, match=r"not found|does not match|is damaged"):
        Package.load(package)


def test_graph_of_another_task_under_a_valid_hash(package: Path) -> None:
    swap(package / "depth.onnx", package / "edge.onnx")
    edit(package, lambda manifest: None, rehash=True)
    with pytest.raises(InputError, match=r"depth.onnx"):
        predict(package)


@pytest.mark.parametrize(
    "changes", [{"decode": "unit_vector", "channels": 3}, {"decode": "argmax", "channels": 40, "palette": [[0, 0, 0]]}]
)
def test_decoding_that_does_not_fit_the_graph(package: Path, changes: dict[str, Any]) -> None:
    edit(package, lambda manifest: manifest["tasks"]["depth"].update(changes))
    with pytest.raises(InputError, match=r"depth|is damaged"):
        predict(package)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["image"].update(mean=["a", "b", "c"]),
        lambda manifest: manifest["image"].update(mean=[0.5, 0.5, None]),
        lambda manifest: manifest["image"].update(mean=[0.5, 0.5, 10**400]),
        lambda manifest: manifest["image"].update(std=[0, 1, 1]),
        lambda manifest: manifest["image"].update(train_size=["a", "b"]),
        lambda manifest: manifest["image"].update(train_size=[0, 0]),
        lambda manifest: manifest["tasks"]["depth"].update(patch_multiple="8"),
        lambda manifest: manifest["tasks"]["depth"].update(input_size=["a", "b"]),
        lambda manifest: manifest["tasks"]["semseg"]["palette"].__setitem__(0, ["a", "b", "c"]),
        lambda manifest: manifest["tasks"]["semseg"]["palette"].__setitem__(0, [0, 0, 256]),
        lambda manifest: manifest["tasks"]["semseg"].update(classes=7),
    ],
)
def test_manifest_with_senseless_values(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(package, change)
    with pytest.raises(InputError, match=r"manifest.json is damaged"):
        predict(package, resize=True)


def test_labels_that_do_not_fit_the_graphs(package: Path) -> None:
    edit(package, lambda manifest: manifest["labels"]["label_set"]["classes"]["semseg"].pop())
    with kept_state(), pytest.raises(InputError, match=r"semseg is argmax with 40 channels, and argmax with 39 in the"):
        onnx_predictor(Package.load(package))


def test_manifest_nested_without_end(package: Path) -> None:
    (package / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"manifest.json"):
        Package.load(package)
