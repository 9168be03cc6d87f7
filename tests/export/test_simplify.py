"""Traced programs, simplified, against the functions that they were traced from."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnxscript import rewriter
from onnxscript.optimizer import optimize
from torch import Tensor, nn
from torch._export import utils as export_utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import config as fx_config
from torch.onnx._internal.exporter import _registration
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.utils._pytree import tree_leaves

from m3vit.errors import InputError
from m3vit.export.onnx.exporter import SHAPES, composites_once, devices_once, exporter, listed_once, shapes_alone
from m3vit.export.onnx.graph import _trace
from m3vit.export.onnx.simplify import ATEN, RESHAPES, without_decomposing

DECOMPOSED = {ATEN.elu.default: lambda x, *rest: torch.where(x > 0, x, torch.expm1(x))}


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.norm = nn.BatchNorm2d(4)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("kept", torch.arange(12.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def traced(module: nn.Module) -> ExportedProgram:
    axes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    with exporter():
        return torch.export.export(module.eval(), (torch.randn(2, 4, 6, 10),), dynamic_shapes=axes, strict=False)


def decomposed(program: ExportedProgram, table: dict[Any, Any]) -> ExportedProgram:
    with exporter():
        return program.run_decompositions(table)


def targets(program: ExportedProgram) -> set[object]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def assert_equal(program: ExportedProgram, module: nn.Module) -> None:
    for shape in ((2, 4, 6, 10), (5, 4, 8, 4), (3, 4, 4, 12)):
        x = torch.randn(shape)
        assert torch.equal(program.module()(x.clone()), module(x.clone()))


def grid(*vectors: Tensor, indexing: str = "ij") -> Tensor:
    return torch.stack(torch.meshgrid(*vectors, indexing=indexing))


SIMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten two of three sizes": lambda x: x.flatten(2),
    "flatten the first": lambda x: x.flatten(0, 1).unsqueeze(0),
    "unflatten into sizes of the image": lambda x: x.flatten(2).mT.unflatten(1, x.shape[2:]).mT,
    "view like another": lambda x: (x * 2).flatten(0, 1).view_as(x),
    "a reshape that copies": lambda x: x.mT.reshape(-1, 4, x.shape[2] * x.shape[3]),
    "sizes of a quotient": lambda x: x.unflatten(2, (x.shape[2] // 2, 2)).unflatten(4, (x.shape[3] // 2, 2)),
    "a transpose": lambda x: x.mT.mT + x.mT.mT,
    "resampled": lambda x: F.interpolate(x, size=(5, 7), mode="bicubic", antialias=True),
    "resampled to half": lambda x: F.interpolate(
        x, size=(x.shape[2] // 2, x.shape[3] // 2), mode="bicubic", antialias=True
    ),
    "a cast": lambda x: x.to(torch.float64).to(torch.float32),
    "a cast that is none": lambda x: x.to(torch.float32) + x.to(torch.float32),
    "a cast, and where to": lambda x: x.to("cpu", torch.float64).to("cpu", torch.float32) + x.to("cpu", torch.float32),
    "in place, of something new": lambda x: (x + 1).relu_() * 2,
    "slices of all": lambda x: x[:, :, None, :] + x[:, 0:, None],
    "slices of a part": lambda x: x[:, 1:, None, ::2],
    "a grid of three": lambda x: grid(x[0, 0, 0], torch.arange(3.0), x[0, 1, :, 0]) * 2,
    "columns before rows": lambda x: grid(x[0, 0, 0], x[0, 1, :, 0], torch.arange(3.0), indexing="xy") * 2,
    "a grid of one": lambda x: grid(x[0, 0, 0], indexing="xy") + grid(x[0, 1, 0]),
    "a grid of sizes known nowhere else": lambda x: grid(x[0, 0, 0, ::2], x[0, 0, 1:, 0]).flatten(1),
    "one coordinate of a grid": lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, :, 0], indexing="ij")[1] + x[1, 1].mT,
}


@pytest.mark.parametrize("name", SIMPLE)
def test_nothing_is_left_to_decompose(name: str) -> None:
    module = Function(SIMPLE[name])
    program = without_decomposing(traced(module))
    assert not targets(program) & (RESHAPES - {ATEN.reshape.default})
    table = dict.fromkeys([ATEN.to.dtype, ATEN._upsample_bicubic2d_aa.vec, ATEN.mT.default, ATEN.flatten.using_ints])
    table[ATEN.meshgrid.indexing] = None
    assert decomposed(program, table) is program
    assert_equal(program, module)


def test_normalisation_by_running_moments_and_dropout() -> None:
    module = Function(lambda x: x)
    module.function = lambda x: module.dropout(module.norm(x)).relu_() + module.dropout(x)
    program = without_decomposing(traced(module))
    assert not targets(program) & {ATEN.batch_norm.default, ATEN.dropout.default, ATEN.relu_.default}
    assert_equal(program, module)


def test_outputs_keep_their_names_where_nothing_is_left_of_a_node() -> None:
    module = Function(lambda x: x)
    module.function = lambda x: module.dropout(x * 2)
    program = traced(module)
    names = [spec.arg.name for spec in program.graph_signature.output_specs]  # type: ignore[union-attr]
    assert names == [node.name for node in without_decomposing(program).graph.output_node().args[0]]  # type: ignore[union-attr]
    assert_equal(program, module)


def test_a_shape_that_cannot_be_said_size_by_size_stays() -> None:
    module = Function(lambda x: (2 * x[:, :, ::2, ::2]).flatten(2).view_as(x[:, :, ::2, ::2]))
    program = without_decomposing(traced(module))
    assert ATEN.view_as.default in targets(program)
    assert_equal(program, module)


def test_outputs_read_nothing_of_each_other() -> None:
    """Shapes of one are not taken from the other, although they are equal."""

    def pooled(x: Tensor) -> Tensor:
        return (2 * x[:, :, ::2, ::2]).mT.flatten(2, 3).unflatten(2, (-1, (x.shape[2] + 1) // 2)).flatten(1, 2)

    module = Function(lambda x: torch.stack([pooled(x + 1), pooled(x + 2)]))
    program = without_decomposing(traced(module))
    (stack,) = (node for node in program.graph.nodes if node.target is ATEN.stack.default)
    above: list[set[object]] = []
    for node in stack.args[0]:
        found, new = {node}, [node]
        while new:
            new = [other for one in new for other in one.all_input_nodes if other not in found]
            found |= {*new}
        above.append({one for one in found if one.target is ATEN.add.Tensor})
    assert [len(one) for one in above] == [1, 1] and not above[0] & above[1]
    assert_equal(program, module)


def in_place_seen_elsewhere(x: Tensor) -> Tensor:
    y = x - 1
    return y * 2 + y.relu_()


def in_place_on_a_view(x: Tensor) -> Tensor:
    y = x - 1
    y.flatten(1)[:, 2:].relu_()
    return y


@pytest.mark.parametrize("function", [in_place_seen_elsewhere, in_place_on_a_view])
def test_what_changes_its_input_is_decomposed(function: Callable[[Tensor], Tensor]) -> None:
    module = Function(function)
    program = without_decomposing(traced(module))
    found = decomposed(program, {})
    assert found is not program and ATEN.relu_.default not in targets(found)
    assert_equal(found, module)


def test_what_the_table_has_is_decomposed() -> None:
    module = Function(F.elu)
    program = without_decomposing(traced(module))
    assert decomposed(program, {}) is program
    found = decomposed(program, DECOMPOSED)
    assert found is not program and ATEN.elu.default not in targets(found)
    assert_equal(found, module)


ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "floats and numbers": lambda x: (x * 2 + x.relu()) / 3,
    "dimensions moved": lambda x: torch.movedim(x, 1, 2) * 2,  # has no translation of its own
    "a copy, and where to": lambda x: x.to("cpu", torch.float32, copy=True) + 1,
    "shapes": lambda x: x.flatten(2).unflatten(2, x.shape[2:])[:, :, 1:].expand(-1, -1, -1, x.shape[3]),
}
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "divided by a size": lambda x: x / (1 + x.shape[2]),
    "integers added": lambda x: x + torch.arange(x.shape[3]),
    "integers divided": lambda x: x * (torch.arange(x.shape[3]) / 2),
    "truth multiplied": lambda x: (x > 0) * x,
    "two widths": lambda x: x + x.double(),
    "two widths, and where to": lambda x: x + x.to("cpu", torch.float64),
}


@pytest.mark.parametrize("name", [*ALIKE, *MIXED])
def test_types_are_promoted_where_they_are_not_alike(name: str) -> None:
    module = Function((ALIKE | MIXED)[name])
    program = without_decomposing(traced(module))
    with exporter():
        exported = torch.onnx.export(program, (), dynamo=True, verbose=False)
    assert exported is not None
    passed_over = not list(decomposed(program, {}).graph_module.modules())
    assert passed_over == (name in ALIKE)
    session = ort.InferenceSession(exported.model_proto.SerializeToString())
    for shape in ((2, 4, 6, 10), (5, 4, 8, 4)):
        x = torch.randn(shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(x))


def test_the_exporters_table_is_listed_once_and_what_one_export_adds_is_not_the_nexts() -> None:
    own = vars(ONNXRegistry)["from_torchlib"]
    for _ in range(2):  # the second time it is listed already
        with listed_once():
            first = ONNXRegistry.from_torchlib(opset_version=20)
            relu, moe = torch.ops.aten.relu.default, torch.ops.m3vit.moe.default
            first.register_op(moe, lambda x: x)
            second = ONNXRegistry.from_torchlib(opset_version=20)
            assert first.is_registered(moe) and not second.is_registered(moe)
            assert first.get_decomps(relu) == second.get_decomps(relu) != []
            assert second.opset_version == 20 and ONNXRegistry.from_torchlib(opset_version=18).opset_version == 18
        assert vars(ONNXRegistry)["from_torchlib"] is own
    anew = ONNXRegistry.from_torchlib(opset_version=20)
    assert anew.functions.keys() == second.functions.keys()


def test_an_operator_that_is_known_since_the_exporters_table_was_listed_is_in_the_next() -> None:
    """As torch's own for quantising, which it defines when their module is first imported."""
    of_late = SimpleNamespace(qualified_name="m3vit_listed::of_late", function=lambda x: x, is_complex=False)
    listed = [*_registration.onnxscript_apis.get_torchlib_ops(), of_late]
    apis = SimpleNamespace(get_torchlib_ops=lambda: listed)
    with pytest.MonkeyPatch.context() as patch, listed_once():
        patch.setattr(_registration, "onnxscript_apis", apis)
        before = ONNXRegistry.from_torchlib(opset_version=20)
        with torch.library._scoped_library("m3vit_listed", "DEF") as library:
            library.define("of_late(Tensor x) -> Tensor")
            operator = torch.ops.m3vit_listed.of_late.default
            assert not before.is_registered(operator)
            assert ONNXRegistry.from_torchlib(opset_version=20).is_registered(operator)


def by_the_optimizers_rules(x: Tensor) -> Tensor:
    x = x.transpose(1, 2).transpose(2, 1).relu().relu().clamp(min=0.5).clamp(max=4) * 1 + 0
    x = F.batch_norm(F.conv2d(F.pad(x, (1, 1, 1, 1)), torch.ones(4, 4, 1, 1)), torch.ones(4), torch.ones(4))
    return x.reshape(-1, 4).reshape(4, -1).unsqueeze(0).squeeze(0).unsqueeze(0)


def test_rules_of_the_exporters_optimizer_do_the_same_when_tried_on_nodes_of_their_operator_alone() -> None:
    """And each is tried as it was on all nodes again, and torch notes where nodes come from, afterwards."""
    patched = set()

    def optimized() -> ir.Model:
        axes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
        x = (torch.randn(2, 4, 6, 10),)
        program = torch.onnx.export(
            Function(by_the_optimizers_rules).eval(), x, dynamic_shapes=axes, dynamo=True, verbose=False, optimize=False
        )
        assert program is not None
        before = len(program.model.graph)
        patched.update(rule for rule in rewriter._DEFAULT_REWRITE_RULES if "try_rewrite" in vars(rule))
        optimize(program.model)
        assert len(program.model.graph) < before - 6
        return program.model

    def nodes(model: ir.Model) -> list[tuple[Any, ...]]:
        return [(n.op_type, n.name, [v and v.name for v in n.inputs], str(n.attributes)) for n in model.graph]

    plain = nodes(optimized())
    assert not patched and not fx_config.do_not_emit_stack_traces
    with exporter():
        assert fx_config.do_not_emit_stack_traces
        assert nodes(optimized()) == plain
    assert len(patched) > 20
    assert not any("try_rewrite" in vars(rule) for rule in rewriter._DEFAULT_REWRITE_RULES)
    assert not fx_config.do_not_emit_stack_traces


def test_operators_made_of_others_are_looked_up_once_and_again_when_there_are_more() -> None:
    own, collect = export_utils._materialize_cpp_cia_ops, export_utils._collect_all_valid_cia_ops
    with pytest.MonkeyPatch.context() as patch:
        times: list[None] = []
        patch.setattr(export_utils, "_materialize_cpp_cia_ops", lambda: (times.append(None), own())[1])
        expected = collect()
        assert len(times) > 10
        times.clear()
        with composites_once():
            assert collect() == expected and collect() == expected and len(times) == 1
            with torch.library._scoped_library("m3vit_listed", "FRAGMENT") as library:
                library.define("of_others(Tensor x) -> Tensor")
                library.impl("of_others", torch.relu, "CompositeImplicitAutograd")
                assert torch.ops.m3vit_listed.of_others.default in collect() and len(times) == 2
    assert export_utils._materialize_cpp_cia_ops is own


@pytest.mark.parametrize("there", [False, True])
def test_devices_are_asked_for_once(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    times: list[None] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: (times.append(None), there)[1])

    def made() -> tuple[list[bool], int]:
        times.clear()
        modes = [FakeTensorMode() for _ in range(3)]
        return [mode.avoid_device_init for mode in modes], len(times)

    before = made()
    assert before == ([not there] * 3, 3)
    with devices_once():
        assert made() == ([not there] * 3, 1)
    with devices_once():  # anew in another export: nothing is kept
        assert made()[1] == 1
    assert made() == before


SHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda x: F.interpolate(x, (2 * x.shape[-2], 40), mode="bilinear"),
    "factor": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "factors, corners": lambda x: F.interpolate(x, scale_factor=(2.0, 0.5), mode="bilinear", align_corners=True),
    "channels last": lambda x: F.interpolate(x.to(memory_format=torch.channels_last), (8, 12), mode="bilinear"),
    "half": lambda x: F.interpolate(x.half(), (8, 12), mode="bilinear"),
    "norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)),
    "norm of two": lambda x: F.layer_norm(x.transpose(1, 3)[:, :, :3], (3, 4), torch.ones(3, 4), torch.zeros(3, 4)),
    "linear": lambda x: F.linear(x.permute(0, 2, 3, 1), torch.ones(5, 4)),
    "linear of two, with a bias": lambda x: F.linear(
        x.permute(0, 2, 3, 1).flatten(0, 2), torch.ones(5, 4), torch.ones(5)
    ),
    "linear of a vector": lambda x: F.linear(x[0, :, 0, 0], torch.ones(5, 4)) + x[0, 0, 0, :5],
}


@pytest.mark.parametrize("name", SHAPED)
def test_shapes_that_are_said_are_those_torch_finds(name: str) -> None:
    """Of every value of the traced program; and afterwards torch finds them itself again."""

    def values() -> list[tuple[Any, ...]]:
        nodes = traced(Function(SHAPED[name])).graph.nodes
        found = [value for node in nodes for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
        return [(str(v.shape), v.dtype, str(v.stride())) for v in found]

    own = [dict(operator.py_kernels) for operator in SHAPES]
    with shapes_alone():
        assert all(operator.py_kernels != before for operator, before in zip(SHAPES, own, strict=True))
        said = values()
    assert [operator.py_kernels for operator in SHAPES] == own
    assert said == values()


NO_GRAPH: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "values": (lambda x: x * float(x.max()), "depends on a tensor's values"),
    "one size": (
        lambda x: x + torch.zeros(6, 1),
        "written for one size of images: take sizes from x.shape, or give --size",
    ),
    "no translation": (lambda x: torch.cdist(x, x), "has no translation of aten._cdist_forward"),
}


@pytest.mark.parametrize("name", NO_GRAPH)
def test_what_no_graph_can_have_is_said_in_a_line(name: str) -> None:
    function, said = NO_GRAPH[name]
    module: Any = Function(function)
    with pytest.raises(InputError, match=f"cannot export to ONNX: .*{said}"):
        _trace(module, module, {"x": torch.randn(2, 4, 6, 10)}, [(0, "batch"), (2, "height"), (3, "width")], ["y"], 18)
