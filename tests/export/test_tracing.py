"""`m3vit hw trace`: layers of both schedules beside torch, edited projects included; what is wrong is named."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3vit.digests import write_sealed_json
from m3vit.errors import InputError
from m3vit.export.hls import tracing
from m3vit.export.hls.edits import clock_mhz, hardware_of, said_changes
from m3vit.export.hls.equalise import EQUALISED
from m3vit.export.hls.project import export_project
from m3vit.export.hls.tracing import Layer, compare, first_of, trace
from m3vit.hw.manifest import MANIFEST, read_manifest
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.saved import INFO
from m3vit.run_folder import Run
from tests.export.models import TASKS, make_images, make_model, make_samples

pytestmark = pytest.mark.slow
TASK = "semseg"


@pytest.fixture(autouse=True)
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3vit.hw.sim.csim.MULTIPLEXED_FLAGS", ("-O1", "-std=c++11", "-Wno-unknown-pragmas"))


def known(monkeypatch: pytest.MonkeyPatch, model: MultiTaskModel) -> None:
    """Let the run that a project came from be found: tests have models alone."""
    config: Any = SimpleNamespace(model=model.config)
    run = Run(Path("run"), config, model, {})
    monkeypatch.setattr(tracing, "find_run", lambda *_: (run, "torch: the model"))


def export(model: MultiTaskModel, out: Path, schedule: str = "multiplexed", **options: Any) -> Path:
    export_project(model, out, calibration=make_images(4, seed=9), samples=make_samples(), schedule=schedule, **options)
    return out


@pytest.fixture(scope="module")
def project(model: MultiTaskModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("tracing") / "project")


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(project, tmp_path / "copy"))


def edit(project: Path, name: str, old: str, new: str) -> None:
    text = (project / name).read_text()
    assert old in text, name
    (project / name).write_text(text.replace(old, new, 1))


def test_every_instruction_of_an_edited_project_is_torchs_layer(
    copy: Path, model: MultiTaskModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another array and clock: the same words, in every layer, near torch's; what changed is said."""
    known(monkeypatch, model)
    array = hardware_of(copy, read_manifest(copy)).tile_out
    edit(copy, "firmware/parameters.h", f"tile_out = {array};", "tile_out = 8;")
    edit(copy, "project.tcl", "clock_period 3.333", "clock_period 6.667")
    image = tmp_path / "image.png"
    Image.fromarray(make_images(1, seed=5)[0]).resize((80, 60)).save(image)
    found = trace(copy, image, TASK)
    layers = found["layers"]
    assert found["first"] == {"different": None, "out_of_bounds": None} and found["whole_frame_different"] == 0
    assert found["changes"] == {
        "firmware/parameters.h": f"tile_out {array}, now 8",
        "project.tcl": "clock_period 3.333, now 6.667",
    }
    assert clock_mhz(copy) == pytest.approx(150, rel=1e-3)
    assert hardware_of(copy, read_manifest(copy)).tile_out == 8
    assert all(layer["different"] == 0 for layer in layers)
    compared = [layer for layer in layers if "own" in layer]
    assert len(compared) == len(layers) - 2  # but the image and the choice of experts
    assert max(layer["error"] for layer in compared) < 1e-3 and max(layer["own"] for layer in compared) < 5e-4
    (route,) = (layer for layer in layers if layer["op"] == "route")
    assert route["decisions"] == 13 and route["flips"] == route["own_flips"] == 0
    assert [layer["name"] for layer in layers if layer["op"] in ("gate", "route", "experts")] == [
        "blocks_1_moe.gate",
        "blocks_1_moe.route",
        "blocks_1_moe",
    ]
    assert layers[-1]["name"] == f"head.{TASKS.index(TASK)}"


def test_a_wrong_kernel_and_a_wrong_layer_are_named(
    copy: Path, model: MultiTaskModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding of LayerNorm in the C++ is changed; and of the model the scales of one LayerNorm, after the export."""
    known(monkeypatch, other := make_model({"class_token": True, "init_values": 0.5}))
    norm: Any = other.backbone.trunk.blocks[1].norm2
    norm.weight.data *= 2
    edit(copy, "firmware/nnet_utils/m3vit_engine_norm.h", "I.shift);", "I.shift) + 1;")
    found = trace(copy, None, TASK)
    assert found["first"] == {"different": "blocks_0_norm1", "out_of_bounds": "blocks_1_norm2"}
    assert found["changes"] == {"firmware/nnet_utils/m3vit_engine_norm.h": ""}


def test_maps_in_parts_are_compared_where_they_are_whole(
    model: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding of 192 inputs in six parts, added to nothing; fc2 of 64 in two, added to the residual stream."""
    known(monkeypatch, model)
    monkeypatch.setattr("m3vit.hw.hardware.SPLIT_INPUTS", 32)
    found = trace(export(model, tmp_path / "project"), None, TASK)
    embeds = [layer for layer in found["layers"] if layer["name"].startswith("embed")]
    assert len(embeds) == 6 and ["own" in layer for layer in embeds] == 5 * [False] + [True]
    assert [layer["name"] for layer in found["layers"] if layer["name"].startswith("blocks_0_fc2")] == [
        "blocks_0_fc2.part0",
        "blocks_0_fc2.part1",
    ]
    assert max(layer["error"] for layer in found["layers"] if "error" in layer) < 1e-3


@pytest.mark.parametrize("bits", [(8, 8), (16, 16)])
def test_heads_with_convolutions(bits: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, model := make_model(head="conv"))
    project = export(model, tmp_path / "project", weight_bits=bits[0], act_bits=bits[1])
    found = trace(project, None, TASK)
    assert [layer["op"] for layer in found["layers"][-2:]] == ["linear", "conv"]
    assert found["first"]["different"] is None and found["layers"][-1]["own"] < (0.1 if bits == (8, 8) else 1e-3)
    # At 8 bits with channels of like reach: torch's model is changed by the same factors.
    assert (project / EQUALISED).is_file() == (bits == (8, 8))
    owns = {layer["name"]: layer["own"] for layer in found["layers"] if "own" in layer}
    assert max(owns.values()) < (0.05 if bits == (8, 8) else 5e-4), owns
    if bits == (8, 8):  # as a project of before the factors were written down
        manifest = read_manifest(project)
        manifest["files"].pop(EQUALISED)
        write_sealed_json(project / MANIFEST, manifest)
        (project / EQUALISED).unlink()
        found = trace(project, None, TASK)
        assert "export it again" in found["torch"] and not any("own" in layer for layer in found["layers"])


def test_hls4mls_trace_of_an_edited_spatial_project(
    spatial: Path, model: MultiTaskModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer of the C++ is torch's, but for the one that was made wrong, and nothing is left in the project."""
    known(monkeypatch, model)
    copy = Path(shutil.copytree(spatial, tmp_path / "copy"))
    edit(copy, "project.tcl", "clock_period 5", "clock_period 6")
    edit(copy, "build_lib.sh", "-O3", "-O0")
    before = sorted(copy.rglob("*"))
    found = trace(copy, None, TASK)
    assert sorted(copy.rglob("*")) == before and found["changes"]["project.tcl"] == "clock_period 5, now 6"
    names = [layer["name"] for layer in found["layers"]]
    assert names[:3] == ["embed", "position", "blocks_0_norm1"] and names[-1] == "head"
    assert {"blocks_1_moe.route", "add_3"} <= set(names)
    assert max(layer["error"] for layer in found["layers"] if "error" in layer) < 1e-3
    assert found["first"]["out_of_bounds"] is None and found["simulators"] == ["C++"]
    edit(copy, "m3vit_bridge.cpp", "nnet::trace_type_size = element_size;", "")
    with pytest.raises(InputError, match=r"no longer laid out as hls4ml writes it.*changed since the export"):
        trace(copy, None, TASK)


def test_a_project_whose_run_is_not_there(project: Path, tmp_path: Path) -> None:
    """The simulators are compared all the same, and it is said; names that are not there are refused."""
    found = trace(project, None, None)
    assert found["torch"].startswith("torch: the run that the project came from is not beside it")
    assert found["task"] == TASKS[0] and all("own" not in layer for layer in found["layers"])
    assert found["first"] == {"different": None, "out_of_bounds": None}
    with pytest.raises(InputError, match="--task saliency: this project has depth, semseg, edge"):
        trace(project, None, "saliency")
    with pytest.raises(InputError, match="image"):
        trace(project, tmp_path / "none.png")
    with pytest.raises(InputError):
        trace(project, None, TASK, tmp_path)


def test_comparisons_by_hand() -> None:
    """Without torch: words that differ are counted, and the first layer with any is named."""
    words = np.arange(6).reshape(2, 3)
    layers = [
        Layer("a", "linear", {"emulator": words, "C++": words}),
        Layer("b", "linear", {"emulator": words, "C++": words + (words > 3)}, saturated=2),
        Layer("c", "route", {}, experts={"emulator": words, "C++": words[::-1]}),
    ]
    entries = compare(layers, None, np.zeros((1, 1, 3), np.uint8), 0)
    assert [entry["different"] for entry in entries] == [0, 2, 6] and entries[1]["saturated"] == 2
    assert first_of(entries, 0.1) == {"different": "b", "out_of_bounds": None}
    assert first_of([{"name": "x", "own": 0.1}, {"name": "y", "own": float("nan")}], 0.1)["out_of_bounds"] == "y"


def test_changes_of_other_files_have_no_values(project: Path) -> None:
    assert said_changes(project, read_manifest(project), ["Makefile", "project.tcl"]) == {
        "Makefile": "",
        "project.tcl": "",
    }


def test_the_run_beside_a_project_is_found_by_its_weights(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = {"run": {"weights_sha256": "b" * 64}}
    for name, digest in (("one", "a"), ("two", "b")):
        (tmp_path / name).mkdir()
        write_sealed_json(tmp_path / name / INFO, {"weights_sha256": digest * 64})
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(
        tracing, "load_run", lambda folder: SimpleNamespace(folder=folder, info={"weights_sha256": "a" * 64})
    )
    found, said = tracing.find_run(tmp_path / "project", manifest, None)
    assert found is not None and found.folder.name == "two" and said.endswith("two")
    assert tracing.find_run(tmp_path / "project", {}, None)[0] is None  # nothing says which one it was
    with pytest.raises(InputError, match="--run one has other weights than the run that"):
        tracing.find_run(tmp_path / "project", manifest, Path("one"))
