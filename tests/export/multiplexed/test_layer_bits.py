"""Inputs of 16 bits for some linear maps beside 8-bit activations: what they gain, and where they cannot be."""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from m3vit.commands.hls import run_cost, run_explore
from m3vit.errors import InputError
from m3vit.export.hls import leaf, tracing
from m3vit.export.hls.multiplexed import schedule
from m3vit.export.hls.verify import verify_project
from m3vit.hw.boards import resources
from m3vit.hw.hardware import Hardware
from m3vit.hw.layer_bits import chosen_maps, names_of_maps, parse_layer_bits
from m3vit.hw.manifest import WEIGHTS
from m3vit.hw.sim import rtl
from m3vit.hw.sim.csim import find_compiler, tokenise
from m3vit.hw.weights_file import HEADER_WORDS, MAGIC, MAGIC_TWO, Header
from m3vit.run_folder import Run
from tests.export.models import TASKS, make_images, make_model
from tests.export.multiplexed.exporting import export
from tests.hw.programs import Shape, random_vit
from tests.test_cli import refused

NAMES = names_of_maps(range(2), conv=True)
OF_BLOCKS = [name for name in NAMES if name.startswith("blocks")]
RECIPE = ["synthetic-tiny", "--model.label_set=nyud", "--board", "kv260", "--weight-bits", "8", "--act-bits", "8"]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("heads=16", ["heads.conv", "heads.linear"]),
        ("heads.conv=16", ["heads.conv"]),
        ("blocks.1.mlp=16", ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
        ("blocks.*.mlp.fc2 = 16", ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]),
        ("blocks=16", OF_BLOCKS),
        ("blocks.*=16,blocks.0=8,blocks.0.attn.proj=16", ["blocks.0.attn.proj", *OF_BLOCKS[4:]]),
    ],
)
def test_names_take_what_begins_with_them(text: str, chosen: list[str]) -> None:
    assert sorted(chosen_maps(parse_layer_bits(text), NAMES)) == sorted(chosen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads", "'heads' is not NAME=BITS with 8 or 16 bits"),
        ("heads=12", "'heads=12' is not NAME=BITS"),
        ("heads=16,", "'' is not NAME=BITS"),
        ("=16", "'=16' is not NAME=BITS"),
        ("blocks.2=16", "has no blocks.2: give blocks.N.attn.qkv, .*heads.conv, or what .* N is 0, 1 or \\*"),
        ("block=16", "this model has no block"),
        ("blocks.0.mlp.fc=16", "this model has no blocks.0.mlp.fc"),
        ("*=16", "this model has no \\*"),
        ("heads=8", "the inputs of heads have 8 bits without it"),
        ("heads=16,heads.conv=16", "the inputs of heads.conv have 16 bits without it"),
        ("heads=16,heads=8", "no layer is left with 16 bits"),
        ("blocks.0=16,blocks=8,heads=16", "blocks.0=16: the others choose the same maps without it: leave it out"),
        ("heads.conv=16,heads=8,blocks=16", "heads.conv=16: the others choose the same"),
        ("blocks.0.mlp=16,blocks=16", "blocks.0.mlp=16: the others choose the same"),
        ("blocks.*.mlp=16,blocks.0=16,blocks.0.attn=8", "blocks.0=16: the others choose the same"),
        ("", "--layer-bits '': '' is not NAME=BITS"),
    ],
)
def test_what_names_nothing_or_changes_nothing(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen_maps(parse_layer_bits(text), NAMES)


@pytest.mark.slow
def test_sixteen_bits_where_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of 16 bits activations are all that is lost: with all maps at 16, but not attention, a hundredth is
    left; with some less than with none. The C++ gives the emulator's words."""
    model, images = make_model(head="conv", top_k=4), make_images(3, seed=7)
    lowered = leaf.lower(model)
    tokens = torch.from_numpy(tokenise(images, lowered.patch))
    with torch.no_grad():
        wanted = [lowered(tokens, torch.full((3, 1), float(task))).numpy() for task in range(len(TASKS))]
    errors: list[list[float]] = []
    projects = {name: tmp_path / name for name in ("none", "heads", "all")}
    for project, layers in zip(projects.values(), (None, "heads=16", "blocks=16,heads=16"), strict=True):
        manifest = export(model, project, weight_bits=16, act_bits=8, layer_bits=layers)
        found = schedule.runner(project, manifest).run(images)
        errors.append([float(np.abs(found[:, task] - one).mean()) for task, one in enumerate(wanted)])
        header, precision = Header.read(project / WEIGHTS), manifest["precision"]
        assert header and (header.magic, header.two_bytes) == ((MAGIC_TWO, 1) if layers else (MAGIC, 0))
        assert ("maps_of_16_bits" in precision) == (layers is not None) == ("max_bytes" in manifest["hardware"])
    assert precision["maps_of_16_bits"] == sorted(NAMES)
    assert precision["layer_bits"]["blocks_0_gelu"] == {"input": 16, "result": 16}
    for none, heads, everything in zip(*errors, strict=True):
        assert heads < 0.9 * none and everything < 0.02 * none
    verify_project(projects["all"])  # raises where words differ
    run_cost([str(projects["all"]), "--json", str(tmp_path / "cost.json")])
    report = json.loads((tmp_path / "cost.json").read_text())
    counted = json.loads((projects["all"] / "csim.json").read_text())["traffic"][TASKS[0]]
    assert sum(report["bytes"].values()) == sum(counted.values())  # every expert has all tokens
    run = Run(Path("run"), SimpleNamespace(model=model.config), model, {})  # type: ignore[arg-type]
    monkeypatch.setattr(tracing, "find_run", lambda *_: (run, "torch: the model"))
    traced = tracing.trace(projects["all"])["layers"]
    assert not any(layer.get("different") for layer in traced)
    # What channels were divided by, torch's LayerNorms do not have; what fc1 gives, in two bytes, they do not change.
    errors_of = {layer["name"]: layer.get("error") for layer in traced}
    assert all(errors_of[name] < 1e-3 for name in ("blocks_0_fc1", "blocks_0_fc2", "blocks_1_moe", "pixel_head.0"))
    text = (projects["all"] / "README.md").read_text()
    assert "(16, in two bytes: the inputs of blocks.0.attn.proj" in text
    with pytest.raises(InputError, match="inputs of two bytes: the RTL has those of one"):
        rtl.write_sources(tmp_path / "rtl", Hardware(**{**manifest["hardware"], "folded": False}))
    # An accelerator for one byte does not take the file, nor a reader of before.
    (tmp_path / "load.cpp").write_text(
        '#include "m3vit_host.h"\nint main(int, char **names) { device_memory m; return m.load(names[1]) ? 0 : 2; }\n'
    )
    flags = ["-std=c++11", "-w", "-O0", f"-I{projects['none']}"]
    subprocess.run([find_compiler(), *flags, tmp_path / "load.cpp", "-o", tmp_path / "load"], check=True)
    for name, code in (("none", 0), ("all", 2)):
        done = subprocess.run([tmp_path / "load", projects[name] / WEIGHTS], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "has activations of two bytes, which this accelerator has not" in done.stderr


def test_files_of_programs_without_are_what_they_were(tmp_path: Path) -> None:
    """weights.bin and its header begin as before; engines without inputs of two bytes say nothing of them."""
    image, limits = random_vit(Shape(weight_bits=8, act_bits=8))
    image.write(tmp_path / "plain.bin")
    assert not image.two_bytes and limits["max_bytes"] == 0
    words = np.fromfile(tmp_path / "plain.bin", np.int64, HEADER_WORDS)
    assert words[0] == MAGIC and not words[18:].any()
    hardware = Hardware(8, 8, 16, **limits)
    assert "max_bytes" not in hardware.plain() and not hardware.two_bytes
    with_two = replace(hardware, max_bytes=64)
    assert resources(with_two)["lut"] > resources(hardware)["lut"]
    assert resources(with_two)["dsp"] == resources(hardware)["dsp"]


def test_explored_costed_and_built_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, given = tmp_path / "engines.json", ["--layer-bits", "blocks.0.mlp=16,heads=16"]
    plain = [*RECIPE[2:], "--port-bits", "64", "--array", "32", "--ports", "1"]
    run_explore([*RECIPE[:2], *plain, *given, "--out", str(file), "--json", str(tmp_path / "fronts.json")])
    configuration = json.loads(file.read_text())
    assert configuration["layer_bits"] == given[1]
    costs = []
    for words in (["--engines", str(file)], [*plain, *given], plain):
        run_cost([*RECIPE[:2], *words, "--json", str(tmp_path / "cost.json")])
        costs.append(json.loads((tmp_path / "cost.json").read_text()))
    assert costs[0]["ms"] == costs[1]["ms"] > costs[2]["ms"]
    assert costs[0]["ms"] == pytest.approx(json.loads((tmp_path / "fronts.json").read_text())["fastest"]["ms"])
    assert costs[0]["hardware"]["max_bytes"] and "max_bytes" not in costs[2]["hardware"]
    assert "8-bit activations (some inputs 16)" in capsys.readouterr().out
    with pytest.raises(InputError, match="says all of the engines: leave out --layer-bits"):
        run_cost([*RECIPE[:2], "--engines", str(file), *given])
    file.write_text(json.dumps({**configuration, "layer_bits": 16}))
    with pytest.raises(InputError, match="layer_bits is 16: give a name"):
        run_cost([*RECIPE[:2], "--engines", str(file)])
    wrong: dict[str, Any]
    for wrong, message in (
        ({"layer_bits": ""}, "layer_bits '': '' is not NAME=BITS"),
        ({"layer_bits": "blocks.99=16"}, "layer_bits blocks.99=16: this model has no blocks.99"),
        ({"layer_bits": "heads=8"}, "layer_bits heads=8: the inputs of heads have 8 bits without it"),
        ({"clock": 5}, "clock 5: give 50 to 600 MHz"),
        ({"part": "xc1"}, "part xc1: what its device holds is not known here"),
        ({"port_bits": 7}, "port_bits 7: kv260 has 64, 128"),
        ({"board": "nope"}, "board nope: choose from"),
        ({"weight_bits": 3}, "weight_bits is 3: the multiplexed schedule has"),
    ):
        file.write_text(json.dumps({**configuration, **wrong}))
        with pytest.raises(InputError, match=f"^{re.escape(str(file))}: {message}"):
            run_cost([*RECIPE[:2], "--engines", str(file)])


def test_where_it_cannot_be(cli: Callable[..., subprocess.CompletedProcess], tiny_run: Path, tmp_path: Path) -> None:
    words = ("export", "hls", tiny_run, "--out", tmp_path / "out", "--layer-bits", "heads=16")
    refused(cli(*words), "--layer-bits: the spatial schedule has no engines to fit")
    words = (*words, "--schedule", "multiplexed")
    refused(cli(*words), "--layer-bits with --act-bits 16")
    refused(cli(*words, "--act-bits", 10), "--layer-bits with --act-bits 10")
    refused(cli(*words[:6], "blocks.9=16", *words[7:], "--act-bits", 8), "this model has no blocks.9: give blocks.N")
    assert not (tmp_path / "out").exists()
    for command in ("cost", "explore"):
        refused(cli("hw", command, tiny_run, "--layer-bits", "heads=16", "--act-bits", 16), "give --act-bits 8 too")
