"""`m3vit data init` and `m3vit data show`: a folder as it lies on a disk, described and drawn."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3vit.data.own.description import open_description
from m3vit.data.own.layout import Folder
from m3vit.data.tools.begin import begin
from m3vit.data.tools.check import check
from m3vit.errors import InputError
from m3vit.report.sheet import CELL, show
from tests.command_line import kept_state
from tests.data.layouts import coded, unit_normals, write_nyud
from tests.data.own import BARE, DESCRIPTION, IDS, write_own

Cli = Callable[..., subprocess.CompletedProcess]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    with kept_state():
        yield


def photograph(path: Path, size: tuple[int, int] = (24, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8)).save(path)


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_what_is_written_can_be_trained_on_as_it_is(tmp_path: Path, cli: Cli) -> None:
    root = write_own(tmp_path / "own", None)
    result = cli("data", "init", root)
    assert result.returncode == 0, result.stderr
    assert "semseg of 8 (masks/{id}.png, 4 classes)" in result.stdout
    description = open_description(root)
    assert description.images == ("photos/{id}.*",) and description.unlabelled == "leave_out"
    assert description.tasks["semseg"].ids == {0: 0, 1: 1, 2: 2, 7: 3}  # 7 may be void: that is a question
    assert (description.tasks["depth"].metres, description.tasks["depth"].invalid) == (0.001, (0,))
    text = (root / "data.yaml").read_text()
    assert BARE in text and "is 7 one, or void" in text and "is that mm?" in text and "shares of pixels" in text
    assert check(root, workers=1).ok and len(Folder(root, "train")) + len(Folder(root, "val")) == len(IDS) - 1
    # It is the user's from now on.
    (root / "data.yaml").write_text(DESCRIPTION)
    result = cli("data", "init", root)
    assert result.returncode == 2 and "is there already" in result.stderr and "--overwrite" in result.stderr
    assert (root / "data.yaml").read_text() == DESCRIPTION
    assert cli("data", "init", root, "--overwrite").returncode == 0
    assert (root / "data.yaml").read_text() == text


def test_a_root_that_cannot_be_written_to_is_described_elsewhere(tmp_path: Path) -> None:
    root = write_own(tmp_path / "own", None)
    path, _ = begin(root, out=tmp_path / "described")
    assert path == tmp_path / "described" / "data.yaml" and not (root / "data.yaml").exists()
    split = Folder(path.parent, "val")
    assert split.load(0).image.ndim == 3 and check(path.parent, workers=1).ok
    assert split.path(0, "image").is_relative_to(root)


def test_names_with_endings_of_their_own(tmp_path: Path) -> None:
    """All in one folder; classes by name; normals, edges and saliency."""
    for index in range(6):
        name = f"scene{index}"
        photograph(tmp_path / f"{name}_rgb.png")
        save(tmp_path / f"{name}_mask.png", RNG.integers(0, 3, (24, 32)).astype(np.uint8))
        save(tmp_path / f"{name}_normals.png", coded(unit_normals(RNG, (24, 32))))
        save(tmp_path / f"{name}_edge.png", np.where(RNG.random((24, 32)) < 0.1, 255, 0).astype(np.uint8))
        np.save(tmp_path / f"{name}_depth.npy", RNG.uniform(1, 5, (24, 32)).astype(np.float32))
    (tmp_path / "classes.txt").write_text("floor\nwall\ndoor\n")
    begin(tmp_path)
    description = open_description(tmp_path)
    assert description.images == ("{id}_rgb.png",)
    assert {name: task.patterns for name, task in description.tasks.items()} == {
        "semseg": ("{id}_mask.png",),
        "normals": ("{id}_normals.png",),
        "edge": ("{id}_edge.png",),
        "depth": ("{id}_depth.npy",),
    }
    assert description.tasks["semseg"].classes == ("floor", "wall", "door")
    assert description.tasks["normals"].axes == ("right", "up", "towards")
    assert description.tasks["depth"].metres == 1.0
    sample = Folder(tmp_path, "train").load(0)
    assert not sample.unlabelled and set(sample.labels) == set(description.tasks)


def test_folders_and_lists_that_divide_are_taken_up(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            photograph(tmp_path / "a" / split / "images" / f"{index}.jpg")
            save(tmp_path / "a" / split / "labels" / f"{index}.png", RNG.integers(0, 3, (24, 32)).astype(np.uint8))
    begin(tmp_path / "a")
    description = open_description(tmp_path / "a")
    assert description.images == ("{folder}/images/{id}.jpg",)
    assert Folder(tmp_path / "a", "val").ids == ("val/0", "val/1") and len(Folder(tmp_path / "a", "train")) == 4
    root = write_own(tmp_path / "b", None)
    (root / "train.txt").write_text("".join(f"{name}\n" for name in IDS[:7]))
    (root / "val.txt").write_text("".join(f"photos/{name}\n" for name in IDS[7:9]))
    begin(root)
    assert open_description(root).splits.parts == {"train": "train.txt", "val": "val.txt"}


def test_frames_of_scenes_stay_together(tmp_path: Path) -> None:
    for scene in range(4):
        for frame in range(3):
            photograph(tmp_path / "rgb" / f"drive{scene}_{frame:04d}.jpg")
            save(tmp_path / "depth" / f"drive{scene}_{frame:04d}.png", np.full((24, 32), 2000 + frame, np.uint16))
    begin(tmp_path)
    assert open_description(tmp_path).splits.groups == "{group}_*"
    train, val = (Folder(tmp_path, split).ids for split in ("train", "val"))
    assert not {name[:6] for name in train} & {name[:6] for name in val}


def test_what_cannot_be_described_is_said(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match="holds no pictures"):
        begin(tmp_path)
    save(tmp_path / "masks" / "a.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match=r"no photographs that could be told from labels: it has masks/ \(semseg\)"):
        begin(tmp_path)
    colours = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    for index in range(3):
        photograph(tmp_path / "photos" / f"{index}.jpg")
        save(tmp_path / "coloured" / f"{index}.png", colours[RNG.integers(0, 2, (24, 32))])
    _, lines = begin(tmp_path)
    assert any("coloured/ is not used: masks in colours" in line for line in lines)
    assert any("masks/* looks like semseg, but its names fit no photograph" in line for line in lines)
    assert cli("data", "init", tmp_path / "nowhere").returncode == 2


def test_the_contact_sheet_shows_images_labels_and_gaps(tmp_path: Path, cli: Cli) -> None:
    root = write_own(tmp_path / "own")
    broken = root / "masks" / f"{Folder(root, 'val', ['semseg']).ids[0]}.png"
    broken.write_bytes(b"no picture")
    lines = show(root, tmp_path / "sheet.png", images=20)
    assert lines[0].startswith("semseg: ") and " train, " in lines[0]
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width >= 3 * CELL
    sky, road = (128, 0, 0), (0, 128, 0)  # VOC's colours of the first classes
    colours = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert {sky, road} <= colours
    result = cli("data", "show", root, "--out", tmp_path / "one.png", "--tasks", "depth", "--images", 2)
    assert result.returncode == 0 and "semseg" not in result.stdout
    assert cli("data", "show", root, "--out", tmp_path / "no.png", "--tasks", "edge").returncode == 2
    assert cli("data", "show", root, "--out", tmp_path / "no.html").returncode == 2, "what is written is a png"
    nyud = write_nyud(tmp_path / "nyud")
    assert len(show(nyud, tmp_path / "nyud.png")) == 4
