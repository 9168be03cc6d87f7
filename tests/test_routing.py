"""m3vit routing: what it writes, what the report makes of it, what it refuses."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3vit.images import read_image
from m3vit.report import panel
from m3vit.report.charts import expert_colour
from m3vit.report.panel import Tile, Tiles
from m3vit.report.routed import patch_map
from m3vit.report.routing import coloured, laid_over, read_routing
from m3vit.run_folder import load_run
from tests.conftest import TINY
from tests.test_cli import refused

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess]
TASKS = ["semseg", "depth", "normals", "edge"]


@pytest.fixture(scope="module")
def routed(cli: Cli, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run, its routing measured."""
    run = tmp_path_factory.mktemp("routed") / "run"
    shutil.copytree(tiny_run, run)
    result = cli("routing", run, "--maps", 1)
    assert result.returncode == 0, result.stderr
    assert "For the same patch, two tasks have" in result.stdout and "3 images of NYUD_MT, val" in result.stdout
    assert not result.stderr or "Warning" not in result.stderr
    return run


def read(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "routing" / "routing.json").read_text())
    return found


def test_the_folder_holds_what_its_json_lists(routed: Path) -> None:
    found = read(routed)
    assert {path.name for path in (routed / "routing").iterdir()} == {*found["files"], "routing.json"}
    charts = ["use", "shared", "information", *(f"{task}-block1" for task in TASKS)]
    assert found["files"] == [f"{chart}.png" for chart in (*charts, "map-0010")]
    for name in found["files"]:
        with Image.open(routed / "routing" / name) as picture:
            assert min(picture.size) > 100
    assert found["format"] == 1 and found["data"]["split"] == "val" and found["images"] == 3
    assert found["patches_per_image"] == 24 and found["tasks"] == TASKS and list(found["use"]) == ["1"]
    assert found["run"]["weights_sha256"] == load_run(routed).info["weights_sha256"]


def test_another_split_and_budget_in_the_place_of_the_first(
    cli: Cli, routed: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(routed / "routing", out)
    words = (
        "--out",
        out,
        "--maps",
        1,
        "--overlay",
        "--limit",
        2,
        "--split",
        "train",
        "--top-k",
        "depth=1",
        "--batch",
        2,
    )
    result = cli("routing", routed, *words, "--data.root", tiny_data, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    less = json.loads((out / "routing.json").read_text())
    assert {path.name for path in out.iterdir()} == {*less["files"], "routing.json"}
    assert less["images"] == 2 and less["data"]["split"] == "train" and "map-0000.png" in less["files"]
    assert sum(less["use"]["1"]["tasks"]["depth"]["chosen"]) == pytest.approx(1, abs=1e-5)
    assert sum(less["use"]["1"]["tasks"]["semseg"]["chosen"]) == pytest.approx(2, abs=1e-5)
    assert less["budget"]["top_k"]["depth"] == {"1": 1}


def test_the_report_shows_them(cli: Cli, routed: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert cli("report", routed, "--images", 1, "--out", page).returncode == 0
    text = page.read_text()
    assert text.count("<svg") == 2 + 2 + 7 and "For the same patch, two tasks have" in text
    everything = read(routed)["apart"]["all"]
    assert json.loads(page.with_suffix(".json").read_text())["routing"] == {"images": 3, **everything}


def test_what_is_refused_and_what_is_not_shown(cli: Cli, routed: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    refused(cli("routing", routed, "--out", tmp_path), r"is not empty and holds no routing \(no routing.json\)")
    out = tmp_path / "out"
    shutil.copytree(routed / "routing", out)
    (out / "mine.txt").write_text("mine")
    refused(cli("routing", routed, "--out", out), r"holds files that are not the routing's \(mine.txt\)")
    refused(cli("routing", routed, "--maps", 0, "--overlay"), "--overlay is of maps, and --maps 0 draws none")
    refused(cli("routing", routed, "--split", "test"), "gt_sets/test.txt not found: .* has train, val")
    refused(cli("routing", routed, "--top-k", 9), "--top-k is '9': give a number, 1 to 4")
    dense = tmp_path / "dense"
    tiny = [word for word in TINY if "num_experts" not in word]
    words = ("init", "synthetic-tiny", *tiny, f"--data.root={tiny_data}", "--model.moe_blocks=none", "--out", dense)
    assert cli(*words).returncode == 0
    refused(cli("routing", dense), r"has no blocks with experts \(model.moe_blocks\)")
    found, note = read_routing(routed, "0" * 64)
    assert found is None and "is of other weights than the run's: make it again with m3vit routing" in note
    found, note = read_routing(dense, "0" * 64)
    assert found is None and note.endswith(f"was not measured: m3vit routing {dense}.")


def test_a_panel_of_a_run(cli: Cli, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    photograph = tiny_data / "images" / "0010.jpg"
    result = cli("panel", tiny_run, photograph, "--out", tmp_path / "all.png", "--block", 1)
    assert result.returncode == 0 and re.fullmatch(rf"{tmp_path}/all.png: (\d+)x1\d+ pixels, \d+ kB\n", result.stdout)
    assert cli("panel", tiny_run, photograph, "--out", tmp_path / "less.png", "--no-input").returncode == 0
    run = load_run(tiny_run)
    for name, columns in (("all", 5), ("less", 4)):
        with Image.open(tmp_path / f"{name}.png") as found:
            picture = np.asarray(found.convert("RGB")).astype(int)
        across = (1200 - 6 * (columns - 1)) // columns
        down = round(across * 32 / 48)
        assert picture.shape[1] == across * columns + 6 * (columns - 1)
        # The middle of each patch of the last row: the colour of its first expert, for each task.
        firsts = patch_map(run.model, read_image(photograph))[0]
        for place, grid in enumerate(firsts):
            left = (columns - 4 + place) * (across + 6)
            for (row, column), expert in np.ndenumerate(grid):
                y = picture.shape[0] - down + (2 * row + 1) * down // 8
                x = left + (2 * column + 1) * across // 12
                assert np.abs(picture[y, x] - expert_colour(expert)).max() < 8  # in few colours
        # Without the input there are only pictures of predictions: none of the photograph's pixels.
        assert (np.abs(picture[25:100, : across // 2] - 210).max(axis=-1) < 30).mean() > 0.5 or name == "less"


def test_a_panel_of_a_package(cli: Cli, onnx_package: Path, tiny_data: Path, tmp_path: Path) -> None:
    photograph = tiny_data / "images" / "0010.jpg"
    assert cli("panel", onnx_package, photograph, "--out", tmp_path / "a.png", "--width", 600).returncode == 0
    with Image.open(tmp_path / "a.png") as found:
        assert found.size[0] in range(590, 601) and found.size[1] < 120  # one row
    refused(cli("panel", onnx_package, photograph, "--out", tmp_path / "a.png", "--block", 1), "--block is of a run")


def test_a_panel_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    tiles, image = Tiles([Tile("depth", noise, False)]), Tile("input", noise, False)
    whole = panel.draw(tiles, image, 0.75, 350)
    few = panel.encode(whole, panel.COLOURS)
    found = panel.shrunk(tiles, image, 0.75, 350)
    assert found is not None and found[1] == panel.encode(whole, None)
    monkeypatch.setattr(panel, "MAX_BYTES", len(few))
    found = panel.shrunk(tiles, image, 0.75, 350)
    assert found is not None and found[1] == few
    monkeypatch.setattr(panel, "MAX_BYTES", len(few) - 1)
    found = panel.shrunk(tiles, image, 0.75, 350)
    assert found is not None and len(found[1]) < len(few) and 300 <= found[0].width < 320
    monkeypatch.setattr(panel, "MAX_BYTES", 1000)
    assert panel.shrunk(tiles, image, 0.75, 350) is None


def test_what_a_panel_refuses(cli: Cli, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    photograph, out = tiny_data / "images" / "0010.jpg", tmp_path / "a.png"
    refused(cli("panel", tiny_run, photograph, "--out", tmp_path / "a.jpg"), "give a file name .* ending in .png")
    refused(cli("panel", tiny_run, photograph, "--out", out, "--width", 200), "--width 200: give at least 300 pixels")
    refused(cli("panel", tiny_run, photograph, "--out", out, "--block", 0), "--block 0: .* has experts in 1")
    refused(cli("panel", tiny_run, tmp_path / "none.jpg", "--out", out), "none.jpg not found: give image files")
    Image.fromarray(np.zeros((50, 10, 3), np.uint8)).save(tmp_path / "tall.png")
    refused(cli("panel", tiny_run, tmp_path / "tall.png", "--out", out), "is more than 4 times as tall as wide")
    assert not out.exists()


def test_colours_of_a_map() -> None:
    assert len({expert_colour(expert) for expert in range(20)}) == 20 and expert_colour(20) == expert_colour(0)
    picture = coloured(np.array([[0, 3], [3, 1]]))
    assert picture.shape == (2, 2, 3) and picture[0, 1].tolist() == list(expert_colour(3))
    over = laid_over(np.zeros((5, 7, 3), np.uint8), picture)
    assert over.shape == (5, 7, 3) and (over[0, 0] == np.rint(0.6 * picture[0, 0])).all()
    assert (over[4, 6] == over[3, 4]).all() and (over[4, 6] == np.rint(0.6 * picture[1, 1])).all()
