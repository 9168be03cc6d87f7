"""onnxruntime leaves nothing behind under HOME: in processes of their own, which begin without what conftest sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.test_runtime import make_package
from tests.export.test_serve_limits import picture

pytestmark = pytest.mark.process

# What a process of these tests may know of the environment: onnxruntime writes nothing either where it takes its
# surroundings for a CI service (TF_BUILD, GITHUB_ACTIONS and others), and then they would tell nothing.
KEPT = ("PATH", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT")


def left_behind(home: Path, *command: str) -> list[str]:
    """Run a command with an empty HOME and return the files in it afterwards."""
    home.mkdir()
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | {"HOME": str(home)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]


def test_prediction_leaves_no_file(tmp_path: Path) -> None:
    package = make_package(tmp_path / "onnx")
    (tmp_path / "image.png").write_bytes(picture(8, 12))
    words = ("predict", package, tmp_path / "image.png", "--task", "depth", "--out", tmp_path / "out")
    assert left_behind(tmp_path / "home", "-m", "m3vit.cli", *map(str, words)) == []
    assert list((tmp_path / "out").iterdir())


def test_exporting_leaves_no_file(tmp_path: Path) -> None:
    program = (
        "import sys, m3vit.export.onnx.parity, m3vit.export.onnx.quantize, m3vit.export.onnx.sweep as sweep\n"
        "sweep.onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    )
    package = make_package(tmp_path / "onnx")
    files = left_behind(tmp_path / "home", "-c", program, str(package / "depth.onnx"))
    assert [name for name in files if "onnxruntime" in name.lower()] == []


def test_the_library_would_leave_some(tmp_path: Path) -> None:
    """If this fails, onnxruntime has changed: `m3vit.export.runtime.ort` may have nothing to do any more."""
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 32) or sys.platform != "linux":
        pytest.skip("of 1.32 on Linux")
    assert any("onnxruntime" in name for name in left_behind(tmp_path / "home", "-c", "import onnxruntime"))
