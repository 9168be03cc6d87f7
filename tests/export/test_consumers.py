"""The same graphs run by others: onnx's reference evaluator, and OpenVINO, whose kernels are its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from m3vit.export.onnx.graph import of_task, trace_task, trace_tasks
from m3vit.export.onnx.lower import lower_moe
from m3vit.export.onnx.parity import LIMIT
from m3vit.export.onnx.quantize import quantize
from m3vit.export.runtime.ort import onnxruntime, session_options
from m3vit.export.runtime.package import Package
from m3vit.models.budget import LayerBudget
from m3vit.run_folder import load_run
from tests.conftest import Cli

pytestmark = pytest.mark.slow

Array = NDArray[np.float32]
TASKS = ("semseg", "depth", "normals", "edge")


# Of integers: an input between two of them may be rounded either way, and the next layers carry that on.
INTEGER_LIMIT = 5e-3


@pytest.fixture(scope="module")
def standard_package(cli: Cli, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of standard operators alone."""
    out = tmp_path_factory.mktemp("standard") / "onnx"
    result = cli("export", "onnx", tiny_run, "--out", out, "--attention", "standard")
    assert result.returncode == 0, result.stderr
    return out


def make_images(count: int, size: tuple[int, int]) -> Array:
    return np.random.default_rng(5).standard_normal((count, 3, *size)).astype(np.float32)


def run_reference(graph: Path, inputs: dict[str, Any]) -> Array:
    # Its Gelu is a function of its context, which shape inference provides.
    results: Any = ReferenceEvaluator(onnx.shape_inference.infer_shapes(onnx.load(graph))).run(None, inputs)
    return np.asarray(results[0])


def run_openvino(graph: Path, inputs: dict[str, Any], threads: int = 1) -> Array:
    """Run a graph with its dynamic shapes as they are, in float32 (on some CPUs bfloat16 is the default)."""
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(core.read_model(str(graph)), "CPU", options)
    return np.asarray(compiled(inputs)[0])


def run_onnxruntime(graph: Path, inputs: dict[str, Any]) -> Array:
    session = onnxruntime.InferenceSession(graph, session_options(0), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def assert_same(actual: Array, expected: Array, limit: float = LIMIT) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < limit * np.abs(expected).max()


@pytest.mark.parametrize("size", [(32, 48), (24, 40)], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_onnx_reference_runs_the_whole_graph(standard_package: Path, task: str, size: tuple[int, int]) -> None:
    images = make_images(2, size)
    expected = Package.load(standard_package, threads=1).logits(images, task)
    assert_same(run_reference(standard_package / f"{task}.onnx", {"image": images}), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_openvino_runs_the_whole_graph(standard_package: Path, task: str, threads: int) -> None:
    # NonZero, and Split by counts known at run time only, included; two batch sizes.
    for count in (1, 5):
        images = make_images(count, (32, 48))
        expected = Package.load(standard_package, threads=1).logits(images, task)
        assert_same(run_openvino(standard_package / f"{task}.onnx", {"image": images}, threads), expected)


@pytest.mark.xfail(
    reason="OpenVINO 2026.4 ignores antialias and exclude_outside of a cubic Resize (openvinotoolkit/openvino issue "
    "35893): the position embedding comes out wrong at sizes not trained at; export with --size"
)
def test_openvino_at_a_size_not_trained_at(standard_package: Path) -> None:
    images = make_images(2, (40, 64))
    expected = Package.load(standard_package, threads=1).logits(images, "semseg")
    assert_same(run_openvino(standard_package / "semseg.onnx", {"image": images}), expected)


@pytest.fixture(scope="module")
def traced(tiny_run: Path) -> dict[str, onnx.ModelProto]:
    """Graphs of one task before lowering: of any size, of a fixed one not trained at, and for one image of it."""
    model = load_run(tiny_run).model
    return {
        "any": of_task(trace_tasks(model, model.config.tasks), model, "normals"),  # as for the package
        "fixed": trace_task(model, "normals", opset=23, size=(40, 64)),
        "static": trace_task(model, "normals", size=(40, 64), batch=1),
    }


def test_openvino_at_a_size_not_trained_at_but_fixed(traced: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    # The exporter computes the position embedding of a fixed size: no cubic Resize is left.
    graph, path = lower_moe(copy(traced["fixed"])), tmp_path / "fixed.onnx"
    resizes = [node for node in graph.graph.node if node.op_type == "Resize"]
    modes = [attribute.s for node in resizes for attribute in node.attribute if attribute.name == "mode"]
    assert b"cubic" not in modes
    onnx.save(graph, path)
    images = {"image": make_images(2, (40, 64))}
    assert_same(run_openvino(path, images), run_onnxruntime(path, images))


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-mixed", "int8-experts"])
@pytest.mark.parametrize("form", ["sparse", "pruned", "static"])
def test_every_kind_of_graph(traced: dict[str, onnx.ModelProto], tmp_path: Path, form: str, precision: str) -> None:
    graph = copy(traced["static" if form == "static" else "any"])
    budgets = [LayerBudget(1, (1, 3))] if form == "pruned" else []
    lower_moe(graph, budgets, "wide" if form == "static" else "sparse")
    path = tmp_path / "graph.onnx"
    onnx.save(quantize(graph, precision), path)
    if form == "static":  # nothing about its shapes is left open
        operators = {node.op_type for node in onnx.load(path).graph.node}
        assert not operators & {"NonZero", "Split", "Shape", "Range"}
    images = {"image": make_images(1, (40, 64)) if form == "static" else make_images(2, (32, 48))}
    expected, limit = run_onnxruntime(path, images), LIMIT if precision == "fp32" else INTEGER_LIMIT
    assert_same(run_reference(path, images), expected, limit)
    assert_same(run_openvino(path, images), expected, limit)


def copy(graph: onnx.ModelProto) -> onnx.ModelProto:
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    return other


@pytest.mark.slow
def test_full_check_of_200_images(cli: Cli, tiny_run: Path, make_data: Any, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", train=4, val=198)
    words = ("export", "onnx", tiny_run, "--out", tmp_path / "onnx", "--data.root", data, "--check-images", 203)
    result = cli(*words)
    assert result.returncode == 0, result.stderr
    assert "comparing with torch on 198 val and 4 train and 1 noise images, each at every size" in result.stdout
    parity = json.loads((tmp_path / "onnx" / "manifest.json").read_text())["parity"]
    assert parity["passed"] and parity["full"] and parity["images"] == 203
    assert parity["image_sources"] == {"val": 198, "train": 4, "noise": 1}
    assert len(parity["sizes"]) == 3 and parity["threads"] == [1, 2]
    assert parity["race_hunt"]["tokens"] >= 1024 and parity["race_hunt"]["repeats"] >= 20
    for task in TASKS:
        entry = parity["tasks"][task]
        assert entry["worst_relative_error"] < LIMIT
        assert entry["comparisons"] + entry["near_tie_images"] >= 203 * 3 * 2
        assert entry["experts_not_hit"] == {}
