"""Export to ONNX: whole graphs against the model, and the package's files."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from m3vit.digests import read_sealed_json
from m3vit.errors import InputError
from m3vit.export.onnx import graph as graph_module
from m3vit.export.onnx.graph import export_task
from m3vit.export.onnx.package import Content, budget_of, export_package
from m3vit.export.onnx.parity import (
    BATCH,
    FORCES,
    LIMIT,
    NOISE_ROUNDS,
    Record,
    _Batch,
    _compare,
    _near_ties,
    check_parity,
)
from m3vit.export.runtime.package import Package, file_entries
from m3vit.kinds import KINDS
from m3vit.kinds.decoding import DECODINGS
from m3vit.label_sets import LABEL_SETS
from m3vit.models.budget import Budget
from m3vit.models.config import ModelConfig
from m3vit.models.multitask import MultiTaskModel
from m3vit.models.router import Routing
from m3vit.profiling import profile
from m3vit.tasks import TASKS

pytestmark = pytest.mark.slow

Array = NDArray[np.float32]
NAMES = LABEL_SETS["nyud"].tasks
UNITS = {
    "argmax": "class id",
    "identity": "m",
    "unit_vector": "unit vector: x right, y up, z towards the camera",
    "sigmoid": "probability",
}


def make_session(graph: ModelProto, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def moe_layer(model: MultiTaskModel) -> Any:
    """The model's only layer of experts."""
    return model.backbone.trunk.blocks[1].mlp


def make_model(class_token: bool = True, **changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    trunk_args = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, global_pool="")
    changes = {"num_experts": 4, "top_k": 2, **changes}
    config = ModelConfig(
        trunk="vit_tiny_patch16_224",
        trunk_args={**trunk_args, "class_token": class_token},
        image_size=(32, 48),
        **changes,
    )
    model = MultiTaskModel(config)
    with torch.no_grad():  # the initial one is too small to notice if it were laid out wrongly
        torch.nn.init.normal_(model.get_parameter("backbone.trunk.pos_embed"))
    return model


def make_images(n: int, size: tuple[int, int] = (32, 48)) -> Array:
    return np.random.default_rng(0).standard_normal((n, 3, *size)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    return make_model().eval()


@pytest.fixture(scope="module")
def exported(model: MultiTaskModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "package"
    lines: list[str] = []
    manifest = export_package(model, out, info={"checkpoint": "abc"}, progress=lines.append)
    assert manifest == read_sealed_json(out / "manifest.json", "")
    assert any("depth" in line for line in lines)
    return out


def arrays_of(path: Path) -> dict[str, NDArray[np.generic]]:
    """The tensors of a graph by name, those in weights.bin included."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def contains(arrays: dict[str, NDArray[np.generic]], tensor: torch.Tensor) -> bool:
    """Whether a matrix is among the arrays, either way round."""
    wanted = tensor.detach().numpy()
    return any(np.array_equal(array, turned) for array in arrays.values() for turned in (wanted, wanted.T))


def test_parity_of_the_whole_package(model: MultiTaskModel, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "package")
    report = check_parity(model, folder, make_images(2))
    assert list(report) == list(NAMES)
    for entry in report.values():
        assert entry["worst_relative_error"] < LIMIT / 10
        assert entry["experts_not_hit"] == {}
        # 3 sizes x (batch 3 + batch 1) x (1 and 2 threads), and more if noise was needed for an expert
        assert entry["comparisons"] + entry["near_tie_images"] >= 24
    recorded = json.loads((folder / "manifest.json").read_text())["parity"]
    assert recorded["passed"] and recorded["tasks"] == report
    assert recorded["sizes"] == [[32, 48], [40, 64], [24, 40]]


def test_parity_failure_is_raised_and_recorded(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "package")
    other = make_model()
    with torch.no_grad():
        moe_layer(other).experts.w2[2] *= 1.1
    with pytest.raises(RuntimeError, match=r"does not compute what the model computes .* semseg: 32x48, batch 3"):
        check_parity(other, folder, make_images(2))
    assert not json.loads((folder / "manifest.json").read_text())["parity"]["passed"]
    assert other.training  # as it was


def test_experts_without_tokens_are_reported(tmp_path: Path) -> None:
    # The zero gate of a single router sends every token to experts 0 and 1 at equal scores; identical experts make
    # the choice invisible. Whichever two torch takes, the other two are untested, and the report says so.
    model = make_model(tasks=["depth"], router="single")
    with torch.no_grad():
        mlp = moe_layer(model)
        mlp.router.gates[0].zero_()
        for parameter in mlp.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    export_package(model, tmp_path / "package", Content(size=(32, 48)), info={})
    report = check_parity(model, tmp_path / "package", make_images(1))["depth"]
    assert len(report["experts_not_hit"]["1"]) == 2
    assert report["near_tie_tokens"] > 0


def test_full_check_reaches_experts_that_no_image_does(tmp_path: Path) -> None:
    # A constant in what the router reads, which experts 0 and 1 like and 2 and 3 dislike: no image gets there.
    model = make_model(tasks=["depth"])
    with torch.no_grad():
        model.get_parameter("backbone.trunk.blocks.1.norm2.bias").fill_(3)
        moe_layer(model).router.gates[0][:2] += 1
        moe_layer(model).router.gates[0][2:] -= 1
    export_package(model, tmp_path / "package", info={})
    images, ticks = make_images(5), list[tuple[int, int]]()
    quick = check_parity(model, tmp_path / "package", images)["depth"]
    assert quick["experts_not_hit"] == {"1": [2, 3]} and quick["experts_forced"] == {}
    full = check_parity(model, tmp_path / "package", images, full=True, progress=lambda *counts: ticks.append(counts))[
        "depth"
    ]
    assert full["experts_not_hit"] == {} and full["experts_forced"] == {"1": [2, 3]}
    # 2 threads x (3 sizes x (2 + 1 + 1 alone + 5 images) + 43 images, 1,032 tokens, + noise, unforced and forced); a
    # force has to overcome 2 x 32 dimensions x 3: only the largest does.
    assert full["comparisons"] == 2 * (3 * 9 + 43 + NOISE_ROUNDS * (BATCH + 1) + len(FORCES) * BATCH)
    assert ticks == [(done, 10) for done in range(1, 11)]  # 3 sizes x (1 + 2) + 1
    assert moe_layer(model).router.gate(0)[1].abs().max() == 0  # no force left in the model
    with torch.no_grad():
        moe_layer(model).experts.w2[3] *= 1.1
    check_parity(model, tmp_path / "package", images)  # the quick check cannot see it
    with pytest.raises(RuntimeError, match="depth: 32x48, batch 3, 1 threads: relative error"):
        check_parity(model, tmp_path / "package", images, full=True)


def test_experts_that_a_task_may_not_use_are_no_gap(tmp_path: Path) -> None:
    model = make_model(tasks=["depth", "edge"], experts_per_task={"depth": [1, 3]})
    export_package(model, tmp_path / "package", info={})
    report = check_parity(model, tmp_path / "package", make_images(2), full=True)
    assert all(not entry["experts_not_hit"] for entry in report.values())
    assert not {0, 2} & set(report["depth"]["experts_forced"].get("1", []))


def test_near_ties_are_counted_per_image() -> None:
    # 2 images of 2 tokens, K = 2 of 3: only the 3rd token's 2nd and 3rd scores are closer than 1e-5 of the 2nd.
    scores = torch.tensor([[[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.4, 0.3, 0.3 - 1e-7], [0.6, 0.3, 0.1]]])
    weights, ids = scores.topk(2)
    assert _near_ties([Routing(scores, weights, ids)], 2).tolist() == [0, 1]


class FakePackage:
    """Answers each call with the next of `answers`, the last one for ever."""

    def __init__(self, *answers: Array) -> None:
        self.answers = list(answers)

    def logits(self, images: Array, task: str) -> Array:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer[: len(images)]


def test_findings_of_a_comparison() -> None:
    right = make_images(3, (8, 8))
    wrong, broken = right + 0.1, np.full_like(right, np.nan)

    def findings(runners: list[Any], ties: list[int]) -> tuple[Record, str]:
        record = Record()
        batch = _Batch(torch.from_numpy(right), alone=3)
        _compare(runners, "depth", batch, right, np.array(ties), record)
        return record, "; ".join(record.all_failures())

    sound = FakePackage(right)
    record, text = findings([sound, sound], [0, 0, 0])
    assert (record.errors, record.sound, text) == ([0.0] * 8, {"8x8": 8}, "")
    assert "8x8, batch 3, 1 threads: relative error" in findings([FakePackage(wrong), sound], [1, 1, 0])[1]
    record, text = findings([FakePackage(wrong), sound], [1, 1, 1])
    assert (record.near_tie_images, len(record.errors), text) == (4, 4, "")  # the run with 2 threads was sound
    assert "repeated runs differ" in findings([FakePackage(right, right, wrong), sound], [1, 1, 1])[1]
    assert "not finite" in findings([FakePackage(broken), sound], [1, 1, 1])[1]
    assert "repeated" not in findings([FakePackage(broken), sound], [1, 1, 1])[1]  # NaN is as NaN was
    everywhere_wrong = FakePackage(wrong)
    text = findings([everywhere_wrong, everywhere_wrong], [1, 1, 1])[1]
    assert text == "8x8: every image has router near ties and differs; use other images"


@pytest.mark.parametrize(
    "changes",
    [
        {"class_token": False, "num_experts": 1, "top_k": 1},
        {"router": "task_conditioned"},
        {
            "moe_blocks": "none",
            "head": "conv",
            "head_stride": 2,
            "head_args": {"blocks": 2, "width": 6, "unrectified": 2},
        },
        {"head": "taskexpert", "head_args": {"blocks": [1], "width": 6, "memory": False, "gates": "token"}},
    ],
    ids=str,
)
def test_other_models_at_sizes_not_traced(changes: dict[str, Any]) -> None:
    model = make_model(tasks=["depth", "normals"], **changes)
    opset = 23 if changes.get("router") else 20
    session = make_session(export_task(model, "normals", opset=opset), 1)
    for shape in ((1, 32, 48), (3, 48, 32), (2, 8, 8), (1, 72, 40)):
        images = torch.randn(shape[0], 3, *shape[1:])
        with torch.no_grad():
            expected = model.eval()(images, ["normals"]).logits["normals"].numpy()
        actual = session.run(["normals"], {"image": images.numpy()})[0]
        assert np.abs(actual - expected).max() < LIMIT * np.abs(expected).max()


@pytest.mark.parametrize("task", NAMES)
def test_graph_holds_its_own_gate_and_head_only(model: MultiTaskModel, exported: Path, task: str) -> None:
    arrays = arrays_of(exported / f"{task}.onnx")
    gates = moe_layer(model).router.gates
    for other in NAMES:
        assert contains(arrays, gates[model.task_id(other)]) == (other == task)
        assert contains(arrays, model.heads.get_parameter(f"{other}.linear.weight")) == (other == task)


def test_pup_heads_and_no_distillation(tmp_path: Path) -> None:
    model = make_model(tasks=["depth", "normals"], head="pup", distillation=[0])
    with torch.no_grad():  # BatchNorm's statistics start as the identity
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                    assert tensor is not None
                    tensor.uniform_(0.5, 1.5)
    export_package(model, tmp_path / "package", info={})
    report = check_parity(model, tmp_path / "package", make_images(2))
    assert model.training  # as it was: exporting in evaluation mode changed no statistics
    for task, other in (("depth", "normals"), ("normals", "depth")):
        assert report[task]["worst_relative_error"] < LIMIT
        arrays = arrays_of(tmp_path / "package" / f"{task}.onnx")
        # The exporter folds BatchNorm into the convolutions before it, but not into the last one.
        assert contains(arrays, model.heads.get_parameter(f"{task}.output.weight"))
        assert not contains(arrays, model.heads.get_parameter(f"{other}.output.weight"))
        own = sum(parameter.numel() for name, parameter in model.named_parameters() if own_part(name, task))
        floats = sum(array.size for array in arrays.values() if array.dtype == np.float32)
        assert floats < own + 10_000  # constants and running statistics; one 3x3 convolution has 589,824


@pytest.mark.parametrize("head", ["multiscale", "taskexpert"])
def test_heads_that_read_several_blocks(head: str, tmp_path: Path) -> None:
    arguments = {"blocks": 2, "width": 6, "head_width": 5} | ({"experts": 3} if head == "taskexpert" else {})
    model = make_model(tasks=["depth", "normals"], head=head, head_args=arguments)
    with torch.no_grad():  # no two are the same
        for parameter in model.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    export_package(model, tmp_path / "package", Content(tasks=("depth",), one_backbone=True), info={})
    report = check_parity(model, tmp_path / "package", make_images(2))
    assert report["depth"]["worst_relative_error"] < LIMIT
    used, arrays = {id(p) for p in model.heads.used_by("depth")}, arrays_of(tmp_path / "package" / "depth.onnx")
    for name, parameter in model.heads.named_parameters():
        if id(parameter) not in used:
            assert not contains(arrays, parameter), name
        elif parameter.ndim > 1:
            assert contains(arrays, parameter), name


@pytest.mark.parametrize(("moe_blocks", "rank"), [("odd", None), ("none", 2)])
def test_experts_of_a_decoder_that_are_left_out_are_not_in_the_graph(
    moe_blocks: str, rank: int | None, tmp_path: Path
) -> None:
    arguments = {"blocks": 2, "width": 6, "head_width": 5, "experts": 3, "rank": rank}
    model = make_model(tasks=["depth", "normals"], moe_blocks=moe_blocks, head="taskexpert", head_args=arguments)
    first, last = model.heads.blocks
    budget = Budget(decoder={"depth": {first: (1,), last: (0, 2)}, "normals": {first: (0, 1), last: (0, 2)}})
    content = Content(budget=budget, all_tasks=True, precisions=("fp32", "int8"))
    manifest = export_package(model, tmp_path / "package", content, info={})
    assert budget_of(manifest).decoder == budget.decoder
    report = check_parity(model, tmp_path / "package", make_images(2))
    assert all(one["worst_relative_error"] < LIMIT for one in report.values())
    arrays = arrays_of(tmp_path / "package" / "depth.onnx").values()
    for shared, kept in zip(model.heads.shared, ((1,), (0, 2)), strict=True):
        bank = shared.bank if rank is None else shared.bank.down
        for expert, weight in enumerate(bank.weight.unflatten(0, (3, rank or 6))):
            held = any(weight.detach().numpy().tobytes() in array.tobytes() for array in arrays)
            assert held == (expert in kept)
    macs = profile(model.config)["tasks"]["depth"]["macs"]["total"]
    patches = 24
    assert macs - manifest["tasks"]["depth"]["macs"] == 3 * patches * (
        6 + (9 * 6 * 6 if rank is None else 10 * 6 * rank)
    ), "3 fewer"


def own_part(name: str, task: str) -> bool:
    return not name.startswith(("heads.", "distillation.")) or name.startswith(f"heads.{task}.")


def test_task_conditioned_graph_holds_no_task_embedding() -> None:
    model = make_model(router="task_conditioned", tasks=["depth", "normals"])
    graph = export_task(model, "normals", opset=23)  # traced for the test of sizes too
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    router = moe_layer(model).router
    assert contains(arrays, router.gate(1)[0])
    biases = [array for name, array in arrays.items() if name.endswith("mlp.router.bias")]
    np.testing.assert_allclose(biases, [router.gate(1)[1].detach().numpy()], atol=1e-6)  # sum order
    assert not any(contains(arrays, parameter) for parameter in router.parameters())


def test_weights_are_shared_and_aligned(exported: Path) -> None:
    distinct: dict[str, int] = {}
    listed = 0
    for task in NAMES:
        for tensor in onnx.load(exported / f"{task}.onnx", load_external_data=False).graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                assert place["location"] == "weights.bin"
                offset, length = int(place["offset"]), int(place["length"])
                assert offset % (4096 if length >= 16384 else 64) == 0
                with open(exported / "weights.bin", "rb") as file:
                    file.seek(offset)
                    distinct[hashlib.sha256(file.read(length)).hexdigest()] = length
                listed += length
            else:
                assert len(tensor.raw_data) < 1024
    size = (exported / "weights.bin").stat().st_size
    assert sum(distinct.values()) <= size < sum(distinct.values()) * 1.05 + 4096
    assert listed > 3 * size  # what four separate files would hold


def test_graphs_are_small_and_tell_nothing_of_this_machine(exported: Path) -> None:
    for task in NAMES:
        path = exported / f"{task}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(path, load_external_data=False)
        domains = {"", "com.microsoft"}  # of the fused attention
        assert {node.domain for node in graph.graph.node} | {entry.domain for entry in graph.opset_import} == domains
        (image,), (output,) = graph.graph.input, graph.graph.output
        assert (image.name, output.name) == ("image", task)
        names = [axis.dim_param or axis.dim_value for axis in image.type.tensor_type.shape.dim]
        assert names == ["batch", 3, "height", "width"]
        content = path.read_bytes()
        assert len(content) < 100_000
        for leak in (b"site-packages", b"torch/", b'File "', str(Path.cwd()).encode()):
            assert leak not in content


def test_manifest_describes_every_file(exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["run"] == {"checkpoint": "abc"}
    assert {path.name for path in exported.iterdir()} == {"manifest.json", "weights.bin", *(f"{t}.onnx" for t in NAMES)}
    assert len(file_entries(manifest)) == 1 + len(NAMES)
    for entry in file_entries(manifest):
        assert (exported / entry["file"]).stat().st_size == entry["bytes"]
        assert hashlib.sha256((exported / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    semseg = manifest["tasks"]["semseg"]
    assert len(semseg["classes"]) == len(semseg["palette"]) == semseg["channels"] == 40
    assert {task.kind for task in TASKS.values()} == set(DECODINGS) == set(KINDS)
    units = {task: entry["unit"] for task, entry in manifest["tasks"].items()}
    assert units == {name: UNITS[TASKS[name].kind] for name in units}


def test_a_task_traced_alone_or_beside_others_has_the_same_tensors(model: MultiTaskModel, exported: Path) -> None:
    beside = arrays_of(exported / "edge.onnx")
    alone = {t.name: numpy_helper.to_array(t) for t in export_task(model, "edge", attention="fused").graph.initializer}
    for graph in (beside, alone):  # constants that the exporter numbers, by their content
        for name in [name for name in graph if name.startswith("val_")]:
            array = graph.pop(name)
            graph[f"{array.dtype} {array.shape} {array.tobytes().hex()}"] = array
    assert beside.keys() == alone.keys()
    assert all(np.array_equal(beside[name], alone[name]) for name in beside)


def test_fixed_size_graph_refuses_another_size(tmp_path: Path) -> None:
    model = make_model(tasks=["depth"])
    with pytest.raises(InputError, match="size is 30x48: give positive multiples of the patch size 8"):
        export_task(model, "depth", size=(30, 48))
    export_package(model, tmp_path / "package", Content(size=(40, 56)), info={})
    report = check_parity(model, tmp_path / "package", make_images(3))
    assert report["depth"]["worst_relative_error"] < LIMIT
    package = Package.load(tmp_path / "package")
    image = np.zeros((48, 64, 3), np.uint8)
    with pytest.raises(InputError, match=r"the image is 48x64 .* exported for 40x56 only"):
        package.predict(image, "depth")
    assert package.predict(image, "depth", resize=True).shape == (48, 64)
    with pytest.raises(InputError, match="resize them to 40x56"):
        package.logits(image[None], "depth")


def test_bad_requests_are_refused(model: MultiTaskModel) -> None:
    with pytest.raises(InputError, match="no task 'flow'"):
        export_task(model, "flow")
    with pytest.raises(InputError, match="opset is 17: give 20 to 23"):
        export_task(model, "depth", opset=17)


def test_out_that_is_no_package_is_refused(model: MultiTaskModel, exported: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("keep me")
    with pytest.raises(InputError, match="is a file"):
        export_package(model, mine, info={})
    with pytest.raises(InputError, match="not empty and holds no package"):
        export_package(model, tmp_path, info={})
    (tmp_path / "manifest.json").write_text('{"name": "web app"}')
    with pytest.raises(InputError, match="not an m3vit package's"):
        export_package(model, tmp_path, info={})
    shutil.copy(exported / "manifest.json", tmp_path)
    with pytest.raises(InputError, match=r"not the package's \(mine.txt\)"):
        export_package(model, tmp_path, info={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "mine.txt"]


def test_replacing_and_failing(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tasks=["depth"])
    folder = shutil.copytree(exported, tmp_path / "package")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: object, **kwargs: object) -> ModelProto:
        raise RuntimeError("no memory")

    monkeypatch.setattr(graph_module, "trace_tasks", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        export_package(model, folder, info={})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    depth = onnx.load(exported / "depth.onnx")
    monkeypatch.setattr(graph_module, "trace_tasks", lambda *args, **kwargs: depth)
    export_package(model, folder, info={})
    assert sorted(path.name for path in folder.iterdir()) == ["depth.onnx", "manifest.json", "weights.bin"]
    assert Package.load(folder).tasks == ["depth"]
    assert [path.name for path in tmp_path.iterdir()] == ["package"]  # nothing temporary left
