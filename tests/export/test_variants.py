"""Everything a package can be told to hold, through the command line, on the tiny trained run."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from m3vit.cli import main
from m3vit.errors import InputError
from m3vit.export.runtime.package import Package
from m3vit.label_sets import LABEL_SETS

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess[str]]
NAMES = LABEL_SETS["nyud"].tasks


def export(cli: Cli, run: Path, out: Path, *words: object) -> dict[str, Any]:
    """Export and return the manifest."""
    done = cli("export", "onnx", run, "--out", out, *words)
    assert done.returncode == 0, done.stderr
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return manifest


@pytest.fixture(scope="module")
def full(cli: Cli, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with two precisions and one backbone for all tasks."""
    out = tmp_path_factory.mktemp("variants") / "full"
    export(cli, tiny_run, out, "--precision", "fp32", "int8", "--one-backbone", "--measure", 3)
    return out


def image(seed: int = 0, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.slow
def test_fewer_experts_and_what_it_costs(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    words = ("--prune", "coverage=0.7", "--top-k", "depth=1", "--calibrate", 5, "--measure", 3)
    manifest = export(cli, tiny_run, tmp_path / "pruned", *words, "--precision", "fp32", "int8-experts")
    assert manifest["parity"]["passed"]
    assert set(manifest["tasks"]) == set(NAMES)
    for task in NAMES:
        experts = manifest["tasks"][task]["experts"]
        assert experts["top_k"] == (1 if task == "depth" else 2) and experts["trained_top_k"] == 2
        (kept,), (share,) = experts["kept"].values(), experts["coverage"].values()
        assert experts["top_k"] <= len(kept) <= 4 and share >= 0.7
        names = {tensor.name for tensor in onnx.load(tmp_path / "pruned" / f"{task}.onnx").graph.initializer}
        held = {int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name}
        assert held == set(kept)
        row = manifest["measured"]["tasks"][task]
        assert {"metric", "torch", "fp32", "int8-experts", "loss_percent"} == set(row)
    assert manifest["measured"]["images"] == 3
    assert any(len(entry["experts"]["kept"]["1"]) < 4 for entry in manifest["tasks"].values())
    words = ("--keep", 2, "--calibrate", 3, "--measure", 0, "--tasks", "edge", "depth")
    kept = export(cli, tiny_run, tmp_path / "kept", *words)
    assert "measured" not in kept and list(kept["tasks"]) == ["depth", "edge"]
    assert all(len(entry["experts"]["kept"]["1"]) == 2 for entry in kept["tasks"].values())
    whole, small = (
        Package.load(tmp_path / name).manifest["tasks"]["edge"]["graphs"]["fp32"] for name in ("pruned", "kept")
    )
    assert small["weight_bytes"] <= whole["weight_bytes"]


@pytest.mark.slow
def test_a_static_package_computes_the_same(cli: Cli, tiny_run: Path, onnx_package: Path, tmp_path: Path) -> None:
    manifest = export(cli, tiny_run, tmp_path / "static", "--static", "--size", "32x48")
    assert manifest["form"] == "wide" and manifest["parity"]["passed"]
    graph = onnx.load(tmp_path / "static" / "depth.onnx")
    assert not {"NonZero", "Split", "If", "Loop"} & {node.op_type for node in graph.graph.node}
    dims = [axis.dim_value for axis in graph.graph.input[0].type.tensor_type.shape.dim]
    assert dims == [1, 3, 32, 48]
    images = np.stack([image(seed) for seed in range(3)])
    static, sparse = Package.load(tmp_path / "static"), Package.load(onnx_package)
    for task in NAMES:
        expected = sparse.logits(images, task)
        np.testing.assert_allclose(static.logits(images, task), expected, atol=1e-5 * np.abs(expected).max())


def test_one_backbone_serves_all_tasks(full: Path) -> None:
    each, shared = Package.load(full), Package.load(full, one_backbone=True)
    for size in ((32, 48), (40, 24)):
        for task in (*NAMES, *reversed(NAMES)):
            np.testing.assert_array_equal(shared.predict(image(1, size), task), each.predict(image(1, size), task))
    # One session of the backbone, whatever the tasks, and a small one for each head.
    assert sorted(shared._sessions.sessions) == ["backbone.onnx", *sorted(f"{task}.head.onnx" for task in NAMES)]


def test_one_backbone_for_some_of_the_tasks(cli: Cli, tiny_run: Path, full: Path, tmp_path: Path) -> None:
    export(cli, tiny_run, tmp_path / "some", "--one-backbone", "--tasks", "edge", "depth")
    package, whole = Package.load(tmp_path / "some", one_backbone=True), Package.load(full)
    assert package.tasks == ["depth", "edge"]
    for task in package.tasks:
        np.testing.assert_array_equal(package.predict(image(), task), whole.predict(image(), task))


def test_low_memory_and_threads_change_nothing_that_matters(full: Path) -> None:
    for precision, limit in (("fp32", 1e-5), ("int8", 0.05)):
        usual = Package.load(full, precision=precision, threads=1)
        for options in ({"low_memory": True, "threads": 2}, {"one_backbone": True, "low_memory": True, "threads": 1}):
            other = Package.load(full, precision=precision, **options)  # type: ignore[arg-type]
            for task in NAMES:
                expected = usual.logits(image()[None], task)
                np.testing.assert_allclose(
                    other.logits(image()[None], task), expected, atol=limit * np.abs(expected).max()
                )


def test_a_cache_is_made_once_for_a_machine(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Package.load(full, threads=1)
    cached = Package.load(full, threads=1, cache=tmp_path / "cache")
    np.testing.assert_array_equal(cached.predict(image(), "depth"), plain.predict(image(), "depth"))
    (home,) = (tmp_path / "cache").iterdir()
    assert home.name.startswith("depth-") and (home / "weights.bin").stat().st_size > 0
    times = {path.name: path.stat().st_mtime_ns for path in home.iterdir()}
    again = Package.load(full, threads=1, cache=tmp_path / "cache")
    np.testing.assert_array_equal(again.predict(image(), "depth"), plain.predict(image(), "depth"))
    assert times == {path.name: path.stat().st_mtime_ns for path in home.iterdir()}
    monkeypatch.setattr("m3vit.export.runtime.processor.cpu_flags", lambda: {"another", "processor", "vnni"})
    Package.load(full, threads=1, cache=tmp_path / "cache").predict(image(), "depth")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr("m3vit.export.runtime.processor.EXACT", ("another", "option"))  # of what made the graph
    Package.load(full, threads=1, cache=tmp_path / "cache").predict(image(), "depth")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_integers_do_not_saturate_however_a_package_is_loaded(full: Path, tmp_path: Path) -> None:
    """On processors without VNNI onnxruntime's 8-bit products do unless it is told otherwise: ten times as far off."""
    pixels = np.random.default_rng(0).standard_normal((1, 3, 32, 48)).astype(np.float32)
    exact = Package.load(full, precision="fp32", threads=1).logits(pixels, "normals")
    for way in ({}, {"low_memory": True}, {"cache": tmp_path / "cache"}, {"cache": tmp_path / "cache"}):
        found = Package.load(full, precision="int8", threads=1, **way).logits(pixels, "normals")  # type: ignore[arg-type]
        assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max(), way


def test_precisions_share_one_file_and_are_scored(cli: Cli, full: Path, tiny_data: Path) -> None:
    manifest = json.loads((full / "manifest.json").read_text())
    graphs = manifest["tasks"]["edge"]["graphs"]
    assert graphs["int8"]["weight_bytes"] < 0.6 * graphs["fp32"]["weight_bytes"]
    apart = sum(entry["graphs"][p]["weight_bytes"] for entry in manifest["tasks"].values() for p in ("fp32", "int8"))
    assert manifest["weights"]["bytes"] < 0.4 * apart
    done = cli("eval", full, "--precision", "int8", "--data.root", tiny_data)
    assert done.returncode == 0, done.stderr
    result = json.loads((full / "eval.json").read_text())["protocols"]["A"]
    assert result["precision"] == "int8"
    row = manifest["measured"]["tasks"]["depth"]
    assert result["tasks"]["depth"]["onnx"]["rmse"] == pytest.approx(row["int8"])
    assert row["loss_percent"]["int8"] == pytest.approx(100 * (row["int8"] - row["torch"]) / row["torch"])


@pytest.mark.slow
def test_a_sweep_shows_the_trade_off(cli: Cli, tiny_run: Path, tmp_path: Path) -> None:
    done = cli("export", "onnx", tiny_run, "--sweep", "--measure", 2, "--calibrate", 3, "--out", tmp_path / "sweep")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert list(result["tasks"]) == list(NAMES)
    for points in result["tasks"].values():
        assert {point["top_k"] for point in points} == {1, 2}
        assert {point["precision"] for point in points} == {"fp32", "int8", "int8-mixed", "int8-experts"}
        keys = [(point["precision"], point["top_k"], point["experts"]) for point in points]
        assert len(set(keys)) <= len(keys) and any(point["pareto"] for point in points)
        smallest = min(points, key=lambda point: point["bytes"])
        assert smallest["precision"] == "int8" and smallest["bytes"] < 0.7 * points[0]["bytes"]
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "ways tried" in done.stdout and "processor time" in done.stdout
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    refused = cli("export", "onnx", tiny_run, "--sweep", "--out", tmp_path / "mine")
    assert refused.returncode == 2 and "holds something else" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "flow"], "no task 'flow'"),
        (["--static"], "give it too, such as --size 224x224"),
        (["--precision", "int4"], "give one or more of fp32, fp16, int8, int8-mixed, int8-experts, int4-experts"),
        (["--precision", "int8", "int8"], "each once"),
        (["--prune", "0.9"], "give coverage=SHARE"),
        (["--keep", "9"], "--keep is 9: give 1 to the number of experts, 4"),
        (["--keep", "2", "--prune", "coverage=0.9"], "not allowed with argument"),
        (["--top-k", "flow=1"], "task=number"),
        (["--one-backbone", "--top-k", "1"], "one backbone serves all tasks with the same experts"),
        (["--sweep", "--precision", "int8"], "--sweep tries precisions"),
        (["--precision", "int8", "--data.root", "nowhere"], "give --data.root DIR, or --measure 0"),
        (["--measure", "-1"], "give a whole number, 0 or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_requests_that_cannot_be_met(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    # In this process: a new one would spend its time importing torch.
    try:
        code = main(["export", "onnx", str(tiny_run), "--out", str(tmp_path / "out"), *words])
    except SystemExit as stopped:  # the argument parser's own refusals
        code = int(stopped.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_an_unknown_precision_of_a_package(full: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"holds fp32, int8, not int8-mixed"):
        Package.load(full, precision="int8-mixed")
    assert main(["eval", str(tiny_run), "--precision", "int8"]) == 2
    assert "of an ONNX package" in capsys.readouterr().err
