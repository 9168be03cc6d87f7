"""`m3vit hw cost`: of a recipe, of a run, of a project."""

import json
from pathlib import Path

import pytest

from m3vit.commands.hls import run_cost, run_explore
from m3vit.digests import UncheckedWarning
from m3vit.errors import InputError
from m3vit.hw.boards import find_board
from m3vit.hw.cost import lines_of
from m3vit.hw.hardware import Hardware
from m3vit.hw.manifest import MANIFEST, WEIGHTS, read_manifest
from m3vit.hw.program import Image

RECIPE = ["synthetic-tiny", "--model.label_set=nyud"]


def test_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_cost(
        [*RECIPE, "--board", "zcu102", "--weight-bits", "8", "--task", "depth", "--json", str(tmp_path / "a.json")]
    )
    printed = capsys.readouterr().out
    assert "Modelled" in printed and "zcu102 at 300 MHz, 8-bit weights, 16-bit" in printed and "floor, ms" in printed
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["hardware"]["weight_bits"] == 8 and report["task"] == 1
    assert report["ms"] == pytest.approx(sum(engine["ms"] for engine in report["engines"].values()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pascal-small"], "the model has pup heads"),
        ([*RECIPE, "--board", "zcu1"], "--board zcu1: choose from kv260"),
        ([*RECIPE, "--task", "saliency"], "--task is 'saliency': this model has semseg"),
        ([*RECIPE, "--act-bits", "9"], "act_bits is 9: the multiplexed schedule has 8, 10"),
        ([*RECIPE, "--model.image_size=[96,32768]", "--model.trunk_args.patch_size=8"], "tokens, and the queues"),
        (["nowhere"], "unknown recipe 'nowhere'"),
        ([*RECIPE, "--clock", "1"], "--clock 1: give 50 to 600 MHz"),
        ([*RECIPE, "--engines", "nowhere.json"], "nowhere.json"),
    ],
)
def test_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_cost(words)


def test_what_is_explored_is_what_is_costed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, words = tmp_path / "engines.json", [*RECIPE, "--board", "kv260", "--port-bits", "64", "--weight-bits", "8"]
    run_explore([*words, "--act-bits", "8", "--out", str(file), "--json", str(tmp_path / "fronts.json")])
    assert f"{file}: the fastest" in capsys.readouterr().out
    run_cost([*RECIPE, "--engines", str(file), "--json", str(tmp_path / "cost.json")])
    fastest = json.loads((tmp_path / "fronts.json").read_text())["fastest"]
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["ms"] == pytest.approx(fastest["ms"]) and cost["resources"] == fastest["takes"]
    with pytest.raises(InputError, match="says all of the engines: leave out --weight-bits, --clock"):
        run_cost([*RECIPE, "--engines", str(file), "--weight-bits", "8", "--clock", "200"])


@pytest.mark.slow
def test_of_a_project(project: Path, tmp_path: Path) -> None:
    """Its own engines and program; on another board those that fit there."""
    run_cost([str(project), "--task", "edge", "--json", str(tmp_path / "own.json")])
    own = json.loads((tmp_path / "own.json").read_text())
    assert own["board"] == "zcu104" and own["hardware"] == read_manifest(project)["hardware"] and own["task"] == 2
    program, hardware = Image.read(project / WEIGHTS).program, Hardware(**own["hardware"])
    assert own["bytes"]["weights"] == sum(
        line.bytes["weights"] for line in lines_of(program, hardware, find_board("zcu104"), 2)
    )
    run_cost([str(project), "--board", "zcu102", "--json", str(tmp_path / "other.json")])
    other = json.loads((tmp_path / "other.json").read_text())
    assert other["board"] == "zcu102" and other["hardware"]["tile_out"] >= own["hardware"]["tile_out"]
    with pytest.raises(InputError, match=r"--board u50 has ports of 256 bits, and .* was written for 128: export it"):
        run_cost([str(project), "--board", "u50"])
    with pytest.raises(InputError, match="was exported with its bits: leave out --weight-bits"):
        run_cost([str(project), "--weight-bits", "8"])


@pytest.mark.slow
def test_engines_that_wrote_single_outputs_are_of_another_version(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["output_layout"], manifest["sha256"]
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.warns(UncheckedWarning), pytest.raises(InputError, match="engines of another version, whose cost"):
        run_cost([str(copy)])
