"""The doctor on labels that can be read but are hardly right: blank, of one value, or depths that are not metres."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from m3vit.data.pascal_context import normals_classes
from m3vit.data.synthetic.dataset import synthesize
from m3vit.data.tools.check import check, render
from m3vit.data.tools.plausibility import look, oddities, statistics
from m3vit.tasks import IGNORE
from tests.data.layouts import save_anno, save_label_map, write_nyud, write_pascal

SIZE = (24, 32)
NYUD_IDS = {"train": [f"{index:04}" for index in range(8)], "val": ["0100", "0101"]}
PASCAL_IDS = {"train": [f"2008_{index:06}" for index in range(8)], "val": ["2009_000100"]}
KINDS = ("blank", "constant", "unit")


def warnings(root: Path) -> list[tuple[str, str, str, str]]:
    problems = [problem for problem in check(root, workers=1).problems if problem.severity != "note"]
    assert {problem.severity for problem in problems} <= {"warning"} and {p.kind for p in problems} <= set(KINDS)
    return [(problem.kind, problem.split, problem.file, problem.message) for problem in problems]


@pytest.fixture
def nyud(tmp_path: Path) -> Path:
    return write_nyud(tmp_path / "NYUD", "NYUD_MT", {split: tuple(ids) for split, ids in NYUD_IDS.items()})


@pytest.fixture
def pascal(tmp_path: Path) -> Path:
    return write_pascal(tmp_path / "PASCAL", {split: tuple(ids) for split, ids in PASCAL_IDS.items()})


def put(root: Path, folder: str, names: list[str], array: NDArray) -> None:
    for name in names:
        if folder in ("depth", "normals", "edge"):
            np.save(root / folder / f"{name}.npy", array)
        else:
            Image.fromarray(array).save(root / folder / f"{name}.png")


def test_blank_labels(nyud: Path) -> None:
    assert warnings(nyud) == []
    put(nyud, "depth", NYUD_IDS["train"], np.zeros(SIZE, np.float32))
    put(nyud, "segmentation", ["0003"], np.zeros(SIZE, np.uint8))
    put(nyud, "normals", ["0100"], np.zeros((*SIZE, 3), np.float32))
    assert warnings(nyud) == [
        ("blank", "train", "segmentation/", "semseg: 1 of 8 images (12.5 %), such as 0003"),
        ("blank", "train", "depth/", "depth: 8 of 8 images (100.0 %), such as 0000, 0001, 0002"),
        ("blank", "val", "normals/", "normals: 1 of 2 images (50.0 %), such as 0100"),
    ]
    report = check(nyud, workers=1)
    assert not report.ok and report.statistics["depth"]["blank_images"] == 8
    assert "warning: labels that are ignored or invalid at every pixel: 3" in render(report)


def test_constant_labels(nyud: Path) -> None:
    put(nyud, "depth", ["0002"], np.full(SIZE, 2.5, np.float32))
    put(nyud, "segmentation", NYUD_IDS["train"][:6], np.full(SIZE, 5, np.uint8))
    put(
        nyud,
        "segmentation",
        NYUD_IDS["train"][6:],
        np.where(np.arange(32) < 9, 0, 1).astype(np.uint8)[None].repeat(24, 0),
    )
    put(nyud, "normals", NYUD_IDS["val"], np.dstack([np.zeros((*SIZE, 2)), np.ones(SIZE)]).astype(np.float32))
    put(nyud, "edge", NYUD_IDS["val"], np.zeros(SIZE, np.float32))
    assert warnings(nyud) == [
        (
            "constant",
            "train",
            "segmentation/",
            "semseg: 8 of 8 images (100.0 %) have one value: chair in 6, wall in 2, such as 0000, 0001, 0002",
        ),
        ("constant", "train", "depth/", "depth: 1 of 8 images (12.5 %) have one value: 2.5 m in 1, such as 0002"),
        (
            "constant",
            "val",
            "normals/",
            "normals: 2 of 2 images (100.0 %) have one value: (0, 0, 1) in 2, such as 0100, 0101",
        ),
        ("constant", "val", "edge/", "edge: 2 of 2 images (100.0 %) have one value: 0 in 2, such as 0100, 0101"),
    ]


@pytest.mark.parametrize(
    ("factor", "words"),
    [(10, "below 94"), (1 / 10, "below 0.94"), (1 / 9.9, "below 0.9")],
    ids=["tenths of metres", "tens of metres", "divided by the largest"],
)
def test_depth_of_another_unit(nyud: Path, factor: float, words: str) -> None:
    for name in NYUD_IDS["train"]:
        depth = np.load(nyud / "depth" / f"{name}.npy")
        np.save(nyud / "depth" / f"{name}.npy", (depth * factor).astype(np.float32))
    ((kind, split, file, message),) = warnings(nyud)
    assert (kind, split, file) == ("unit", "train", "depth/")
    assert message.startswith("depth: 8 of 8 images (100.0 %) have 95 % of their depths") and words in message
    assert "where metres of a room give 1 to 15" in message


def test_one_odd_image_in_hundreds_is_no_warning_of_unit() -> None:
    rng = np.random.default_rng(0)
    looks = [look("depth", rng.uniform(0.7, 9.9, SIZE).astype(np.float32)) for _ in range(199)]
    close = look("depth", rng.uniform(0.7, 0.95, SIZE).astype(np.float32))
    ids = [str(index) for index in range(202)]
    assert oddities("depth", "nyud", ids[:200], [*looks, close]) == []
    assert [kind for kind, _ in oddities("depth", "nyud", ids, [*looks, close, close, close])] == ["unit"]


def test_what_is_usual_in_pascal_context_is_no_warning(pascal: Path) -> None:
    """Most images show no person, some only classes without normals, and some nothing salient."""
    without_normals = np.flatnonzero(~normals_classes())[1:]  # 0 is no class
    sky = np.full(SIZE, without_normals[0])
    sky[:5] = without_normals[1]
    for name in PASCAL_IDS["train"][:4]:
        save_label_map(pascal / "pascal-context" / "trainval" / f"{name}.mat", sky)
    put(pascal, "sal_distill", PASCAL_IDS["train"][:2], np.zeros(SIZE, np.uint8))
    assert warnings(pascal) == []


def test_what_is_unusual_in_pascal_context(pascal: Path) -> None:
    for name in PASCAL_IDS["train"]:
        save_anno(pascal / "human_parts" / f"{name}.mat", name, [])
        save_label_map(pascal / "pascal-context" / "trainval" / f"{name}.mat", np.full(SIZE, 3))
    put(pascal, "sal_distill", PASCAL_IDS["train"][:3], np.full(SIZE, 255, np.uint8))
    found = [(kind, split, message.split(",")[0]) for kind, split, _, message in warnings(pascal)]
    assert found[0] == ("blank", "train", "human_parts: 8 of 8 images (100.0 %)")
    assert found[-2:] == [
        ("constant", "train", "saliency: 3 of 8 images (37.5 %) have one value: 1 in 3"),
        ("constant", "train", "edge: 8 of 8 images (100.0 %) have one value: 0 in 8"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nyud", "pascal"])
def test_rendered_scenes_give_no_warning(tmp_path: Path, layout: str) -> None:
    synthesize(tmp_path / "data", layout=layout, train=24, val=8, size=(48, 64), seed=3, workers=1)
    assert warnings(tmp_path / "data") == []


def test_figures_against_loops() -> None:
    rng = np.random.default_rng(1)
    depth = rng.uniform(0.5, 9, SIZE).astype(np.float32) * (rng.random(SIZE) < 0.7)
    valid = sorted(float(value) for value in depth.ravel() if value > 0)
    found = look("depth", depth)
    assert found.valid_share == pytest.approx(len(valid) / depth.size) and found.max_m == valid[-1]
    below = sum(value <= found.reach_m for value in valid) / len(valid)
    assert below == pytest.approx(0.95, abs=2 / len(valid)) and found.value is None
    normals = np.zeros((*SIZE, 3), np.float32)
    normals[3, 4] = normals[5, 6] = (0, 0.6, 0.8)
    assert look("normals", normals).value == (0.0, 0.6, 0.8)
    assert look("normals", normals).valid_share == pytest.approx(2 / (24 * 32))
    normals[5, 6] = (0, 0.8, 0.6)
    assert look("normals", normals).value is None
    ids = rng.choice(np.array([0, 4, 255], np.uint8), SIZE)
    assert look("semseg", ids).valid_share == pytest.approx(float(np.mean(ids != IGNORE)))
    assert look("semseg", np.where(ids == 255, ids, 7).astype(np.uint8)).value == 7
    edge = (rng.random(SIZE) < 0.2).astype(np.uint8)
    looks = [look("edge", edge), look("edge", 1 - edge)]
    assert statistics("edge", "nyud", looks)["positive_share"] == pytest.approx(0.5)


def test_command_fails_and_says_so(cli: Callable[..., subprocess.CompletedProcess], nyud: Path) -> None:
    put(nyud, "depth", NYUD_IDS["val"], np.zeros(SIZE, np.float32))
    result = cli("data", "check", nyud, "--workers", 1)
    assert result.returncode == 1 and "depth: 2 of 2 images (100.0 %), such as 0100, 0101" in result.stdout
    assert "not ok: 0 errors, 1 warnings" in result.stdout
