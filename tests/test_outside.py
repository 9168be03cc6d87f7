"""From outside the package: tasks of a known and of a new kind, a layout and a decoder, through every command."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import TINY
from tests.test_cli import refused

PLUGIN = Path(__file__).parent / "outside" / "fields.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("fields"), np.random.default_rng(0)
    for folder in ("photos", "height", "wetness", "lists"):
        (root / folder).mkdir()
    for split, names in {"train": "abcdefgh", "val": "xyz"}.items():
        (root / "lists" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(root / "photos" / f"{name}.png")
            np.save(root / "height" / f"{name}.npy", rng.uniform(0.5, 2, (32, 48)).astype(np.float32))
            np.save(root / "wetness" / f"{name}.npy", rng.uniform(1, 2, (32, 48)).astype(np.float32))
    return root


def test_the_whole_path(cli: Callable, data: Path, tmp_path: Path) -> None:
    run, package, out, plugin = tmp_path / "run", tmp_path / "onnx", tmp_path / "out", ["--plugin", PLUGIN]
    ours = ["--data.layout=fields", "--model.tasks=[height,wetness]", "--model.head=per_pixel"]
    words = ["synthetic-tiny", *TINY, *ours, f"--data.root={data}", "--train.native_losses=[]", "--train.epochs=2"]
    for command in (
        ("data", "check", data),
        ("train", *words, "--out", run),
        ("eval", run),
        ("routing", run, "--maps", 0),
        ("export", "onnx", run, "--out", package),
        ("predict", package, "--task", "wetness", data / "photos" / "x.png", "--raw", "--out", out),
        ("predict", package, "--task", "height", data / "photos" / "x.png", "--overlay", "--out", out),
        ("eval", package, "--data.root", data),
        ("report", run),
    ):
        result = cli(*command, *plugin)
        assert result.returncode == 0, (command, result.stdout, result.stderr)
    wetness = np.load(out / "x_wetness.npy")
    assert wetness.shape == (32, 48) and 0 < wetness.min() and wetness.max() < 1
    scores = json.loads((run / "report.json").read_text())["tasks"]
    assert abs(scores["wetness"]["torch"] - scores["wetness"]["onnx"]) < 0.01 and scores["height"]["metric"] == "rmse"
    routed = json.loads((run / "routing" / "routing.json").read_text())
    assert routed["tasks"] == ["height", "wetness"] and list(routed["labels"]) == ["height"]  # of the new kind no bins
    for command in (("eval", run), ("predict", package, data, "--task", "height", "--out", out)):
        refused(cli(*command), "unknown.* kind|of the kind share.*plug-in.*fields.py")
