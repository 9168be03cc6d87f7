"""Plug-ins, and runs that describe themselves: what opens without the tables it was trained with, what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3vit import plugins
from m3vit.data.nyud import NYUD
from m3vit.data.opening import add_layout, layout_for
from m3vit.data.sample import FileSplit
from m3vit.data.tools.check import _read_sample
from m3vit.digests import write_sealed_json
from m3vit.errors import InputError
from m3vit.label_sets import LABEL_SETS, NYUD_CLASSES, LabelSet, add_label_set, declare, describe
from m3vit.models.config import ModelConfig
from m3vit.pool import run_jobs
from m3vit.run_folder import load_run
from m3vit.training.config import Config, DataConfig
from tests.command_line import kept_state
from tests.conftest import TINY
from tests.test_cli import refused

ROOMS = """
from m3vit.data.nyud import NYUD
from m3vit.data.opening import add_layout
from m3vit.label_sets import LABEL_SETS, LabelSet, add_label_set

names = tuple(f"thing{number}" for number in range(40))
add_label_set(LabelSet("rooms", ("semseg", "depth"), {"semseg": names}))

class Rooms(NYUD):
    name, title, label_set, published = "rooms", "Rooms", "rooms", {}
    listings = "lists"

add_layout(Rooms)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "rooms_plugin.py"
    path.write_text(ROOMS)
    return path


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    (root / "gt_sets").rename(root / "lists")
    return root


@pytest.mark.slow
def test_a_layout_and_a_label_set_from_outside(cli: Callable, plugin: Path, data: Path, tmp_path: Path) -> None:
    run, package = tmp_path / "run", tmp_path / "onnx"
    words = ["synthetic-tiny", *TINY, f"--data.root={data}", "--train.epochs=1", "--out", run]
    refused(cli("train", *words, "--data.layout=rooms"), "data.layout is 'rooms': choose from nyud, pascal")
    ours = ["--data.layout=rooms", "--plugin", plugin, "--model.tasks=[semseg,depth]"]
    assert (result := cli("train", *words, *ours)).returncode == 0, result.stderr
    assert f"plugins:\n- {plugin}\n" in (run / "config.yaml").read_text()
    assert (result := cli("data", "check", data, f"--plugin={plugin}")).returncode == 0, result.stdout
    assert f"NYUD_MT (layout rooms): {data}" in result.stdout and "published" not in result.stdout

    # The run opens without the plug-in, with its own classes; the data's layout is what needs it.
    assert cli("export", "onnx", run, "--measure", 0, "--out", package).returncode == 0
    assert json.loads((package / "manifest.json").read_text())["tasks"]["semseg"]["classes"][0] == "thing0"
    words = (
        re.escape("expected one of gt_sets/ (nyud), ImageSets/Context/ (pascal), data.yaml (folder)"),
        re.escape(f"; {run} was trained with the plug-in {plugin}: give --plugin"),
    )
    refused(cli("eval", run), ".*".join(words))
    for folder in (run, package):
        assert (result := cli("eval", folder, "--data.root", data, "--plugin", plugin)).returncode == 0, result.stderr
    found = json.loads((run / "eval.json").read_text())["protocols"]["A"]
    assert found["label_set"] == "rooms" and "IoU_thing0" in found["tasks"]["semseg"]["torch"]
    assert (result := cli("eval", "--compare", run, package)).returncode == 0, result.stderr


def test_an_installed_package_brings_its_plugin(
    cli: Callable, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "rooms-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rooms\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[m3vit.plugins]\nrooms = rooms_plugin\n")
    plugin.rename(tmp_path / "site" / plugin.name)
    monkeypatch.syspath_prepend(tmp_path / "site")
    words = ["synthetic-tiny", *TINY, "--model.tasks=[depth]", "--data.layout=rooms"]
    assert (result := cli("init", *words, "--out", tmp_path / "run")).returncode == 0, result.stderr
    assert "label_set: rooms" in (text := (tmp_path / "run" / "config.yaml").read_text())
    assert "plugins:\n- rooms_plugin\n" in text
    with kept_state():  # opened by a program, where nothing has been imported yet
        plugins.recall(["rooms_plugin"], "a run")
        assert "rooms_plugin" in plugins.loaded() and not plugins.advice()
    (tmp_path / "site" / plugin.name).write_text("1 / 0")
    refused(
        cli("profile", *words), r"division by zero\): mend it; rooms brings it \(entry point rooms of m3vit.plugins\)"
    )


def test_processes_of_a_pool_know_what_this_one_was_told(plugin: Path) -> None:
    with kept_state():
        plugins.load(str(plugin))
        described = describe("nyud")
        described["label_set"] = {**described["label_set"], "name": "told"}
        declare(described, "x", ["fog"])
        found = list(run_jobs(describe, ["rooms", "told"], 2))
        assert [one["label_set"]["name"] for one in found] == ["rooms", "told"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 / 0\n", "cannot be imported (ZeroDivisionError in bad_plugin.py, line 1: division by zero): mend it"),
        ("import no_such_module_here\n", "ModuleNotFoundError in bad_plugin.py, line 1: No module named"),
        ("def (\n", "cannot be imported (SyntaxError"),
        ("raise SystemExit(0)\n", "cannot be imported (SystemExit"),
        ("from m3vit.label_sets import *\nadd_label_set(LabelSet('x', ('depth', 'fog'), {}))\n", "unknown task fog"),
    ],
)
def test_bad_plugins_are_one_line(cli: Callable, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad_plugin.py"
    path.write_text(text)
    refused(cli("profile", "synthetic-tiny", "--plugin", path), re.escape(words))


def test_what_is_no_plugin(cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "json.py").touch()
    (tmp_path / "__main__.py").touch()
    for given, words in (
        (tmp_path / "__main__.py", "there is a module __main__ already"),
        (tmp_path / "absent.py", "not found: give the name of an installed module, or a .py file"),
        ("no.such.module", "plug-in no.such.module not found"),
        (tmp_path / "json.py", "there is a module json already"),
        ("-x", "--plugin expects one argument"),
    ):
        refused(cli("profile", "synthetic-tiny", "--plugin", given), words)
    refused(cli("profile", "synthetic-tiny", "--plugins=[a]"), "give --plugin MODULE")
    refused(cli("data", "synth", "--out", tmp_path / "d", "--plugin", "x"), "unrecognized arguments: --plugin")


def test_a_run_never_runs_a_file_that_nobody_named(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(tiny_run, run)
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    text = "".join(line for line in (run / "config.yaml").read_text().splitlines(True) if not line.startswith("#"))
    (run / "config.yaml").write_text(text.replace("plugins: []", f"plugins: [{tmp_path / 'evil.py'}]"))
    with kept_state(), pytest.warns(UserWarning, match="no digest"):
        load_run(run)
        assert f"was trained with the plug-in {tmp_path / 'evil.py'}" in plugins.advice() and not mark.exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as python -m m3vit has it
    (tmp_path / "package").mkdir()
    shutil.copy("evil.py", "package/__init__.py")
    for name in ("evil", "package.evil", "antigravity"):  # the last is installed, and no plug-in
        with kept_state():
            plugins.recall([name], "a run")
            assert f"was trained with the plug-in {name}: give --plugin" in plugins.advice() and not mark.exists()


def test_a_run_of_other_classes_than_the_table_has(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    info = json.loads((run / "model.json").read_text())
    info.pop("digest", None)
    info["labels"]["label_set"]["classes"]["semseg"][0] = "rampart"
    write_sealed_json(run / "model.json", info)
    with kept_state():
        config = load_run(run).config.model
        assert config.labels.classes["semseg"][:2] == ("rampart", "floor") and config.label_set.startswith("nyud-")
        assert LABEL_SETS["nyud"].classes["semseg"] == NYUD_CLASSES
    labels = info.pop("labels")
    write_sealed_json(run / "model.json", info)  # as runs were before they described themselves
    with kept_state():
        assert load_run(run).config.model.label_set == "nyud"
        del LABEL_SETS["nyud"]
        with pytest.raises(InputError, match=r"model.label_set is 'nyud': choose from pascal"):
            load_run(run)
    info["labels"] = {**labels, "version": 9}
    write_sealed_json(run / "model.json", info)
    with pytest.raises(InputError, match="describes its labels in another version than 1"):
        load_run(run)


def test_descriptions_are_json_and_come_back() -> None:
    for name in LABEL_SETS:
        assert declare(json.loads(json.dumps(describe(name))), "x", ()) == name
    with kept_state():
        described = json.loads(json.dumps(describe("pascal")))
        labels = LABEL_SETS.pop("pascal")
        declare(described, "x", ["fog"])
        assert LABEL_SETS["pascal"] == labels
    described["tasks"]["fog"] = {**described["tasks"]["semseg"], "name": "fog", "code": ["meter"]}
    described["label_set"] |= {"name": "weather", "tasks": ["semseg", "fog"]}
    with kept_state(), pytest.raises(InputError, match="unknown task fog, whose meter it cannot hold"):
        declare(described, "x", ["fog"])
    with kept_state():  # the run's model has not that task
        assert LABEL_SETS[declare(described, "x", ["semseg"])].tasks == ("semseg",)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("label_set", "name"), ["x"]),
        (("label_set", "name"), "auto"),
        (("label_set", "tasks"), [["x"]]),
        (("label_set", "classes", "semseg"), "semseg"),
        (("label_set", "classes", "semseg", 0), []),
        (("label_set", "edge_max_dist"), "0.01"),
        (("label_set", "edge_max_dist"), 1e308),
        (("label_set", "tolerated"), 1),
        (("tasks",), []),
        (("tasks", "fog"), ["x"]),
        (("tasks", "fog", "name"), "mist"),
        (("tasks", "fog", "kind"), {}),
        (("tasks", "fog", "code"), 1),
        (("tasks", "fog", "meter"), "x"),
        (("tasks", "fog", "weight"), "1"),
        (("tasks", "fog", "tolerated"), {"blank": "1"}),
        (("tasks", "fog", "reach"), [1, 2]),
        (("tasks", "fog", "more"), 1),
    ],
)
def test_descriptions_of_the_wrong_types_are_refused(keys: tuple, value: object) -> None:
    described = describe("nyud")
    described["tasks"]["fog"] = {**described["tasks"]["depth"], "name": "fog", "code": []}
    described["label_set"] |= {"name": "weather", "tasks": ["semseg", "edge", "fog"]}
    with kept_state():
        assert declare(described, "x", ["fog"]) == "weather"
    part = described
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    with kept_state(), pytest.raises(InputError, match=r"^x describes "):
        declare(described, "x", ["fog"])


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"name": ""}, "lacks name"),
        ({"name": "nyud"}, "is there already"),
        ({"label_set": "none"}, "unknown label set 'none'"),
        ({"folders": {"image": ("a",)}}, "lacks folders of semseg"),
        ({"folders": dict.fromkeys(NYUD.folders, "a")}, "lacks folders of image: give a tuple"),
        ({"releases": {"one": {"image": ".png"}}}, "lacks the ending of semseg in one"),
        ({"edge_truth": FileSplit.edge_truth}, "lacks edge_truth, which edges are scored against"),
    ],
)
def test_incomplete_layouts_are_refused(parts: dict, words: str) -> None:
    with kept_state(), pytest.raises(InputError, match=words):
        add_layout(type("Mine", (NYUD,), {"name": "mine", **parts}))
    with pytest.raises(InputError, match=r"lacks .*title.*, read: define them"):
        add_layout(type("Bare", (FileSplit,), {"name": "bare"}))
    with pytest.raises(InputError, match="is no layout"):
        add_layout(NYUD_CLASSES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (LabelSet("nyud", ("depth",), {}), "is there already"),
        (LabelSet("x", (), {}), r"has the tasks \(\)"),
        (LabelSet("x", ("semseg",), {}), "the classes .* of semseg: give 2 to 254"),
        (LabelSet("x", ("semseg",), {"semseg": ("a", "a")}), "the classes .* of semseg: give 2 to 254"),
        (LabelSet("x", ("edge",), {}), "lacks edge_max_dist, which edges are scored by"),
        (LabelSet("x", ("edge",), {}, 1e9), "has edge_max_dist 1000000000.0, .* at most 0.1"),
        (LabelSet("x", ("depth",), {"depth": ("near", "far")}), "the classes .* of depth, which has none"),
        (LabelSet("x", ("semseg",), {"semseg": (1, 2)}), r"label set 'x'.classes is .* expected dict"),  # type: ignore
        (LabelSet("auto", ("depth",), {}), "is no label set"),
        ("x", "is no label set"),
    ],
)
def test_incomplete_label_sets_are_refused(labels: LabelSet, words: str) -> None:
    with kept_state(), pytest.raises(InputError, match=words):
        add_label_set(labels)


def test_a_layout_without_published_ranges_has_no_pipeline_of_them() -> None:
    with kept_state():
        add_layout(type("Mine", (NYUD,), {"name": "mine", "m3vit_ranges": None}))
        model = ModelConfig(label_set="auto", tasks=["depth"])
        config = Config(model, DataConfig(layout="mine", pipeline="m3vit"))
        assert config.model.label_set == "nyud"
        with pytest.raises(InputError, match=r"data.layout mine has no m3vit_ranges: give simple or invpt"):
            config.check()


def test_labels_of_another_shape_than_their_kinds_are_refused(tiny_data: Path) -> None:
    class Flat(NYUD):
        def read(self, index: int, kind: str, size: Any = None) -> Any:
            array = super().read(index, kind, size)
            return array[..., 0] if kind == "normals" else array

    split = Flat(tiny_data, "val", ("depth", "normals"))
    with pytest.raises(InputError, match=r"read as \[32, 48\], and normals has \[32, 48, 3\]: mend the layout's read"):
        split.load(0)
    (problem,) = _read_sample(split, 0).problems
    assert problem.kind == "values" and "is read as [32, 48]" in problem.message


def test_other_names_for_as_many_classes(tiny_data: Path) -> None:
    with kept_state():
        add_label_set(LabelSet("mine", ("semseg", "depth"), {"semseg": tuple(f"c{i}" for i in range(40))}))
        add_label_set(LabelSet("few", ("semseg",), {"semseg": ("a", "b")}))
        assert layout_for("mine", tiny_data, ["semseg"]) == "nyud"
        split = NYUD(tiny_data, "val", ("semseg", "depth"), label_set="mine")
        assert split.labels.classes["semseg"][0] == "c0" and split.load(0).labels["semseg"].max() < 40
        with pytest.raises(InputError, match=r"few does not fit data.layout nyud: 2 classes of semseg, but 40"):
            NYUD(tiny_data, "val", ("semseg",), label_set="few")
