"""The wheel: complete, and enough to predict with in an environment that has no torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("export", "hw", "data")  # m3vit/NAME is a link to NAME


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of the tracked files: a left-over build/ in the checkout would make setuptools ship deleted files.
    for name in tracked():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(folder / "source")]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listing.split("\n") if name and (ROOT / name).exists()]


@pytest.mark.slow
def test_wheel_holds_every_tracked_file(wheel: Path) -> None:
    shipped = set(zipfile.ZipFile(wheel).namelist())
    linked = {f"m3vit/{name}" for name in tracked() if name.startswith(tuple(f"{folder}/" for folder in LINKED))}
    links = {f"m3vit/{folder}" for folder in LINKED}
    expected = linked | {name for name in tracked() if name.startswith("m3vit/")} - links
    assert not expected - shipped, f"missing from the wheel: {sorted(expected - shipped)}"


@pytest.mark.slow
def test_predict_in_an_environment_without_torch(
    wheel: Path, onnx_package: Path, tiny_data: Path, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-compile", str(wheel)], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0
    image = next((tiny_data / "images").iterdir())
    words = ["predict", onnx_package, "--task", "depth", image, "--raw", "--out", tmp_path / "out"]
    result = subprocess.run([python, "-m", "m3vit.cli", *map(str, words)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".npy", ".png"]
    refused = subprocess.run(
        [python, "-m", "m3vit.cli", "eval", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert refused.returncode == 2 and "pip install '.[train]' in the checkout" in refused.stderr
