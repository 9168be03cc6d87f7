"""From outside the package: tasks of a known and of a new kind, a layout and a decoder, through every command."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3vit.losses import LOSSES
from m3vit.run_folder import load_run
from tests.command_line import kept_state
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


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page of the documentation."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    return [part.partition("```")[0] for part in text.split(f"```{language}\n")[1:]]


def test_the_example_of_the_documentation(
    cli: Callable, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module,), (toml,) = blocks("plugins.md", "python"), blocks("plugins.md", "toml")
    assert len(module.splitlines()) <= 62
    info = tmp_path / "site" / "fields_for_m3vit-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fields-for-m3vit\nVersion: 1.0\n")
    points = re.sub(r'\[project.entry-points."(.*)"\]', r"[\1]", toml).replace('"', "")
    (info / "entry_points.txt").write_text(points)
    (tmp_path / "site" / "fields_for_m3vit.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    ours = ["--data.layout=meadows", "--model.tasks=[height]", "--model.head=one_by_one", "--train.losses.height=huber"]
    words = ["train", "synthetic-tiny", *TINY, *ours, f"--data.root={data}", "--train.native_losses=[]"]
    assert (result := cli(*words, "--train.epochs=1", "--out", run)).returncode == 0, result.stderr
    recorded = (run / "config.yaml").read_text()
    assert "- m3vit.losses:huber\n" in recorded and "- m3vit.datasets:meadows\n" in recorded
    with kept_state():  # opened by a program, where nothing has been added yet
        assert load_run(run).config.train.losses == {"height": "huber"} and "huber" in LOSSES
    refused(cli(*words, "--train.losses.height=hubert", "--out", tmp_path / "x"), "'hubert': choose from huber")
    monkeypatch.undo()
    said = r"was trained with the plug-in m3vit.tasks:height: install the package that brings it"
    refused(cli(*words, "--train.epochs=1", "--out", run, "--resume"), said)


def test_resuming_without_the_plug_in_says_which(cli: Callable, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "synthetic-tiny", *TINY, "--data.layout=fields", "--model.tasks=[height]", f"--data.root={data}"]
    words += ["--train.native_losses=[]", "--train.epochs=1", "--out", run]
    assert (result := cli(*words, "--plugin", PLUGIN)).returncode == 0, result.stderr
    refused(
        cli(*words, "--resume"), rf"'fields': choose from .*run was trained with the plug-in {PLUGIN}: give --plugin"
    )
    assert cli(*words, "--resume", "--plugin", PLUGIN).returncode == 0
