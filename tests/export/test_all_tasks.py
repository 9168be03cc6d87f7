"""The graph of all tasks at once: one dispatch for all, as in training, with each task's own results."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image

from m3vit.digests import read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.export.onnx.graph import trace_all_tasks
from m3vit.export.onnx.lower import lower_moe
from m3vit.export.onnx.package import Content, export_package
from m3vit.export.onnx.parity import LIMIT, ParityError, check_parity
from m3vit.export.runtime import package as runtime
from m3vit.export.runtime import serve
from m3vit.export.runtime.options import Options
from m3vit.export.runtime.package import Package
from m3vit.export.runtime.predict import predict_files
from m3vit.files import sha256_file
from m3vit.models.budget import Budget, LayerBudget
from m3vit.models.multitask import MultiTaskModel
from m3vit.profiling import graph_macs
from tests.export.test_lowering import chosen_layer, make_layer, make_session, make_tokens, moe_graph, torch_layer
from tests.export.test_onnx import make_images, make_model

BUDGET = Budget(top_k={"depth": {1: 1}}, kept={"edge": {1: (1, 2)}, "depth": {1: (0, 2, 3)}})


def picture(height: int = 33, width: int = 50) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 255, (height, width, 3)).astype(np.uint8)


def budgets(model: MultiTaskModel, tasks: list[str]) -> list[Any]:
    """BUDGET as `lower_moe` takes it."""
    return list(zip(*(BUDGET.layers(task, model.backbone.moe_indices) for task in tasks), strict=True))


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    return make_model().eval()


@pytest.fixture(scope="module")
def exported(model: MultiTaskModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose tasks differ in what they use of the experts; read only."""
    out = tmp_path_factory.mktemp("all") / "package"
    content = Content(all_tasks=True, precisions=("fp32", "int8"), budget=BUDGET)
    export_package(model, out, content, info={}, check=lambda folder: check_parity(model, folder, make_images(2)))
    return out


@pytest.mark.parametrize("form", ["sparse", "wide"])
@pytest.mark.parametrize("uses", [[(2, range(6))] * 3, [(2, range(6)), (1, (0, 3)), (3, (1, 2, 3))]], ids=["as", "own"])
def test_lowered_layer_of_several_tasks(uses: list[tuple[int, Any]], form: str) -> None:
    layer, x = make_layer(6), make_tokens(3 * 40)
    rng = np.random.default_rng(2)
    layer["gate"] = rng.standard_normal((3, 6, 8)).astype(np.float32)
    layer["gate_bias"] = rng.standard_normal((3, 6)).astype(np.float32)
    expected = [
        chosen_layer(tokens, layer | {"gate": gate, "gate_bias": bias}, count, list(kept))
        for tokens, gate, bias, (count, kept) in zip(
            np.split(x, 3), layer["gate"], layer["gate_bias"], uses, strict=True
        )
    ]
    if uses[0] == uses[1]:
        np.testing.assert_allclose(torch_layer(x, layer, 2), np.concatenate(expected), atol=1e-5)
    graph = moe_graph(layer | {"gate": layer["gate"].reshape(18, 8)}, 2)
    for tensor in graph.graph.initializer:
        if tensor.name == "gate":
            tensor.CopyFrom(numpy_helper.from_array(layer["gate"], "gate"))
    budgets = tuple(LayerBudget(count, tuple(kept)) for count, kept in uses)
    found = make_session(lower_moe(graph, [budgets], form), 2).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=2e-6 * np.abs(found).max())


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_as_each_task_alone(exported: Path, threads: int) -> None:
    for precision, limit in (("fp32", 1e-6), ("int8", 0.05)):
        package = Package.load(exported, precision=precision, threads=threads)
        assert package.all_at_once
        for size in ((32, 48), (40, 24)):
            images = make_images(3, size)
            together = package.logits_all(images)
            assert list(together) == package.tasks
            for task, found in together.items():
                expected = package.logits(images, task)
                np.testing.assert_allclose(found, expected, rtol=0, atol=limit * np.abs(expected).max())


@pytest.mark.slow
def test_the_same_as_the_model(model: MultiTaskModel, exported: Path) -> None:
    images = make_images(2)
    with torch.no_grad():
        expected = model(torch.from_numpy(images), budget=BUDGET).logits
    for task, found in Package.load(exported).logits_all(images).items():
        np.testing.assert_allclose(found, expected[task], rtol=0, atol=LIMIT * expected[task].abs().max().item())


@pytest.mark.slow
def test_one_file_of_weights_and_an_entry(exported: Path) -> None:
    manifest = read_sealed_json(exported / "manifest.json", "")
    assert {path.name for path in exported.glob("*.onnx") if path.name.startswith("all")} == {
        "all.onnx",
        "all.int8.onnx",
    }
    places = {}
    for name in ("depth", "all"):
        graph = onnx.load(exported / f"{name}.onnx", load_external_data=False).graph
        places[name] = {t.name: t.external_data[1].value for t in graph.initializer if t.external_data}
    shared = places["depth"].keys() & places["all"].keys()
    assert len(shared) > 10 and all(places["depth"][name] == places["all"][name] for name in shared)
    entry = manifest["all_tasks"]
    assert entry["tasks"] == list(manifest["tasks"])
    assert entry["macs"] < sum(task["macs"] for task in manifest["tasks"].values())  # the prefix counts once
    for task in manifest["parity"]["tasks"].values():
        assert task["comparisons"] >= 48 and "int8, all tasks at once" in task["integer_errors"]


@pytest.mark.slow
def test_what_the_tasks_share_counts_once(model: MultiTaskModel) -> None:
    each = [graph_macs(model.config, task, (32, 48)) for task in model.config.tasks]
    single, dense = make_model(router="single"), make_model(moe_blocks="none")
    together = graph_macs(model.config, model.config.tasks, (32, 48))
    assert together < sum(each)
    for alike in (single, dense):  # all but the heads
        assert graph_macs(alike.config, alike.config.tasks, (32, 48)) < together


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 48), (33, 50)])
def test_predicting_all(exported: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    package, image = Package.load(exported), picture(*size)
    for resize in (False, True):
        found = package.predict(image, "all", resize=resize)
        for task in package.tasks:
            np.testing.assert_allclose(found[task], package.predict(image, task, resize=resize), rtol=1e-4, atol=1e-4)
    assert "all.onnx" in package._sessions.sessions
    fresh = Package.load(exported)
    monkeypatch.setattr(runtime, "MAX_PATCHES", 24 * len(package.tasks) - 1)  # too large for all at once
    np.testing.assert_array_equal(fresh.predict(picture(32, 48), "all")["depth"].shape, (32, 48))
    assert "all.onnx" not in fresh._sessions.sessions


@pytest.mark.slow
def test_a_package_without_the_graph_runs_its_tasks_in_turn(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "package"))
    manifest = read_sealed_json(folder / "manifest.json", "")
    del manifest["all_tasks"]  # as an older one
    write_sealed_json(folder / "manifest.json", manifest)
    package, whole = Package.load(folder), Package.load(exported)
    assert not package.all_at_once
    image = picture()
    for task, found in package.predict(image, "all").items():
        np.testing.assert_array_equal(found, whole.predict(image, task))


@pytest.mark.slow
def test_another_graph_is_noticed(model: MultiTaskModel, exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "package"))
    graph = onnx.load(folder / "all.onnx", load_external_data=False)
    (biases,) = [tensor for tensor in graph.graph.initializer if tensor.name.endswith(".router.biases")]
    changed = numpy_helper.to_array(biases).copy()
    changed[1, 0, 2] += 5  # one task's router
    biases.CopyFrom(numpy_helper.from_array(changed, biases.name))
    onnx.save(graph, folder / "all.onnx")
    manifest = read_sealed_json(folder / "manifest.json", "")
    manifest["all_tasks"]["graphs"]["fp32"]["sha256"] = sha256_file(folder / "all.onnx")
    write_sealed_json(folder / "manifest.json", manifest)
    with pytest.raises(ParityError, match=r"depth: all tasks at once, 32x48, batch 3, 1 threads: relative error"):
        check_parity(model, folder, make_images(2))


@pytest.mark.slow
def test_other_runtimes_run_it(model: MultiTaskModel, exported: Path, tmp_path: Path) -> None:
    images, package = make_images(2), Package.load(exported)
    expected = package.logits_all(images)
    path = tmp_path / "all.onnx"
    onnx.save(lower_moe(trace_all_tasks(model, package.tasks), budgets(model, package.tasks)), path)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path))
    results: Any = ReferenceEvaluator(graph).run(None, {"image": images})
    for found, task in zip(results, package.tasks, strict=True):
        np.testing.assert_allclose(found, expected[task], rtol=0, atol=LIMIT * np.abs(expected[task]).max())
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answer = compiled({"image": images})
    for place, task in enumerate(package.tasks):
        np.testing.assert_allclose(answer[place], expected[task], rtol=0, atol=LIMIT * np.abs(expected[task]).max())


@pytest.mark.slow
def test_files_and_the_service_use_it(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    used: list[str] = []
    original = Package.logits_all
    monkeypatch.setattr(Package, "logits_all", lambda *words: used.append("all") or original(*words))
    outcome = predict_files(exported, "all", [tmp_path / "photo.png"], tmp_path / "out", Options(raw=True))
    package = Package.load(exported)
    assert not outcome.failures and len(outcome.written) == 2 * len(package.tasks) and used == ["all"]
    service = serve.Service(package, package.tasks, serve.Limits())
    data = (tmp_path / "photo.png").read_bytes()
    answer = service._work(data, "all", serve.Answer(serve.Format.NPY, serve.Resize.AUTO, False))
    values = np.load(io.BytesIO(bytes(answer.body)))
    figures = json.loads(
        bytes(service._work(data, "all", serve.Answer(serve.Format.JSON, serve.Resize.AUTO, True)).body)
    )
    service.pool.shutdown()
    assert used == ["all"] * 3 and list(figures["tasks"]) == package.tasks and figures["height"] == 33
    for task in package.tasks:
        np.testing.assert_array_equal(values[task], np.load(tmp_path / "out" / f"photo_{task}.npy"))
        assert figures["tasks"][task]["picture"].startswith("data:image/png")


def test_one_task_alone_has_no_graph_of_all(model: MultiTaskModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two tasks or more: leave out --all-tasks"):
        export_package(model, tmp_path / "package", Content(tasks=("depth",), all_tasks=True), info={})
