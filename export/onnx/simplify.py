"""Rewriting of what torch.export traced to operators that the ONNX exporter translates as they are.

Else the exporter decomposes what it cannot translate, for which it traces the whole program a second time: two fifths
of the time of a trace. It runs it once more, a tenth, to find out where types are to be promoted; here they are alike.
Operators that reshape are rewritten to one, whose sizes are numbers, taken from one tensor, or -1: their own
translations compute each shape from that of their input, in several nodes.
"""

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.onnx._internal.exporter._registration import ONNXRegistry

ATEN = torch.ops.aten
WHOLE = 2**63 - 1  # the end of a slice that has none


def without_decomposing(program: ExportedProgram) -> ExportedProgram:
    """Return the program, simplified, whose `run_decompositions` traces it again only if there is something to do; nor
    does the exporter's promotion of types, which goes through all modules, where it would change nothing."""
    for module in _modules(program):
        simplify(module)
    program.run_decompositions = partial(_decomposed, program)  # type: ignore[method-assign]
    return program


def simplify(module: GraphModule) -> None:
    """Rewrite a traced graph in place: its outputs keep their values, to the bit, and their names."""
    # Expression of a size -> the node that has it, if that reads the inputs alone: what a task's outputs are made of
    # must be nothing of another's.
    sizes: dict[str, Node] = {}
    known = {node for node in module.graph.nodes if node.op == "placeholder"}
    for node in list(module.graph.nodes):
        if isinstance(node.meta.get("val"), torch.SymInt):
            if known.issuperset(node.all_input_nodes):
                known.add(node)
                sizes.setdefault(str(node.meta["val"]), node)
        elif node.op == "call_function" and node.target in RESHAPES:
            _reshaped(node, sizes)
        elif node.op == "call_function" and node.target is ATEN.meshgrid.indexing:
            _gridded(node, sizes)
        elif node.op == "call_function" and node.target in RULES:
            RULES[node.target](node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _modules(program: ExportedProgram) -> list[GraphModule]:
    every = torch.nn.Module.modules(program.graph_module)  # which the exporter may be told has none
    return [module for module in every if isinstance(module, GraphModule)]


def _decomposed(program: ExportedProgram, table: Mapping[Any, Callable[..., Any]]) -> ExportedProgram:
    """Return the program, decomposed by the table if that changes anything."""
    targets = {node.target for module in _modules(program) for node in module.graph.nodes}
    if any(target in table or _unlike_a_function(target) for target in targets) or _untranslated(targets):
        program = ExportedProgram.run_decompositions(program, dict(table))
    # Its removal of assertions goes through all modules too: one that is left is not of one type (_of_one_type).
    if all(_of_one_type(node) for module in _modules(program) for node in module.graph.nodes):
        program.graph_module.modules = lambda *given, **named: iter(())  # type: ignore[method-assign]
    return program


def _of_one_type(node: Node) -> bool:
    """Return whether all that an operator computes with is float32, but for numbers that are known; no assertion is."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or node.target in UNLIKE:
        return True
    if not node.target._schema.returns:  # it asserts something
        return False
    for argument, given in zip(node.target._schema.arguments, node.args, strict=False):
        number = isinstance(given, Node) and not isinstance(given.meta.get("val"), torch.Tensor)
        if number and not isinstance(argument.type, torch.IntType):  # a size that is computed with
            return False
    made = node.meta.get("val")
    values = [value.meta.get("val") for value in node.all_input_nodes]
    values += made if isinstance(made, list | tuple) else [made]
    types = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    return types <= {torch.float32}


def _untranslated(targets: set[Any]) -> bool:
    """Return whether the exporter has no translation of some operator that torch defines by others, which is in no
    table: decomposing takes it apart all the same."""
    composite = [one for one in targets if isinstance(one, torch._ops.OpOverload) and one._can_decompose()]
    known = ONNXRegistry.from_torchlib()
    return not all(known.is_registered(target) for target in composite)


def _unlike_a_function(target: Any) -> bool:
    """Return whether an operator changes its inputs, or runs graphs."""
    mutates = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return mutates or isinstance(target, torch._ops.HigherOrderOperator)


# --- rules -----------------------------------------------------------------------------------------------------------


def _reshaped(node: Node, sizes: dict[str, Node]) -> None:
    """Say a new shape size by size, unless two of its sizes are no known ones and none of the input."""
    source: Any = node.args[0]
    of_source = [str(size) for size in source.meta["val"].shape]
    shape: list[Any] = [
        size if isinstance(size, int) else sizes.get(str(size), size) for size in node.meta["val"].shape
    ]
    symbolic = [place for place, size in enumerate(shape) if not isinstance(size, int)]
    unknown = [place for place in symbolic if not isinstance(shape[place], Node)]
    for place in list(unknown):
        if len(unknown) > 1 and str(shape[place]) in of_source:
            shape[place] = _size_before(node, source, of_source.index(str(shape[place])))
            unknown.remove(place)
    if len(unknown) > 1:
        return
    for place in unknown or symbolic[-1:]:
        shape[place] = -1
    _become(node, ATEN.reshape.default, source, shape)


def _gridded(node: Node, sizes: dict[str, Node]) -> None:
    """Each coordinate of a grid is one of the vectors, repeated along the others. (Rotary positions are of a grid.)"""
    vectors: Any = node.args[0]
    values = [vector.meta["val"] for vector in vectors]
    if any(value.ndim != 1 for value in values):
        return
    order = list(range(len(vectors)))  # of the vectors along the axes
    if node.kwargs["indexing"] == "xy":
        order[:2] = order[1::-1]
    shape: list[Any] = []
    for place in order:
        size = values[place].shape[0]
        shape.append(size if isinstance(size, int) else sizes.get(str(size)) or _size_before(node, vectors[place], 0))
    for coordinate in list(node.users):
        which: Any = coordinate.args[1]
        along = [-1 if place == which else 1 for place in order]
        with node.graph.inserting_before(coordinate):
            row = node.graph.call_function(ATEN.reshape.default, (vectors[which], along))
        row.meta["val"] = values[which].reshape(along)
        _become(coordinate, ATEN.expand.default, row, shape)


def _size_before(node: Node, source: Node, axis: int) -> Node:
    """Put before a node one that says a size of a tensor."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(ATEN.sym_size.int, (source, axis))
    made.meta["val"] = source.meta["val"].shape[axis]
    return made


def _become(node: Node, target: Any, *args: Any, **kwargs: Any) -> None:
    node.target, node.args, node.kwargs = target, args, kwargs


def _pass_on(node: Node) -> None:
    """Use a node's input in its place, but for outputs of the graph, whose names are known elsewhere."""
    source: Any = node.args[0]
    node.replace_all_uses_with(source, delete_user_cb=lambda user: user.op != "output")
    if not node.users:
        node.graph.erase_node(node)


def _resampled(node: Node) -> None:
    """Resampling to a size is what the operator is without overload."""
    if node.args[1] is not None:
        _become(node, ATEN._upsample_bicubic2d_aa.default, *node.args[:3])


def _cast(node: Node) -> None:
    """A cast to what is there already is none."""
    source: Any = node.args[0]
    if source.meta["val"].dtype == node.args[1]:
        _pass_on(node)
    else:
        _become(node, ATEN._to_copy.default, source, dtype=node.args[1])


def _moved(node: Node) -> None:
    """A cast, where the tensor is on that device already."""
    source: Any = node.args[0]
    device: Any = node.args[1]
    if (
        len(node.args) == 3 and not node.kwargs and torch.device(device) == source.meta["val"].device
    ):  # no copy is asked for
        node.args = (source, node.args[2])
        _cast(node)


def _transposed(node: Node) -> None:
    _become(node, ATEN.transpose.int, node.args[0], -2, -1)


def _rectified(node: Node) -> None:
    """In place is as good as not where nothing else sees the input, which is no view of anything."""
    source: Any = node.args[0]
    made = source.args[0].target if source.target is operator.getitem else source.target
    new = isinstance(made, torch._ops.OpOverload) and not any(value.alias_info for value in made._schema.returns)
    if new and len(source.users) == 1:
        _become(node, ATEN.relu.default, source)


def _normalised(node: Node) -> None:
    """Batch normalisation by running moments: the first of what the operator for that returns."""
    x, weight, bias, mean, variance, training, momentum, eps = node.args[:8]
    if training:
        return
    arguments: Any = (x, weight, bias, mean, variance, momentum, eps)
    with node.graph.inserting_before(node):
        made = node.graph.call_function(ATEN._native_batch_norm_legit_no_training.default, arguments)
    empty = node.meta["val"].new_empty(0)
    made.meta["val"] = (node.meta["val"], empty, empty)
    _become(node, operator.getitem, made, 0)


def _dropped(node: Node) -> None:
    """Dropout when not training: nothing."""
    if node.args[2] is False:
        _pass_on(node)


def _sliced(node: Node) -> None:
    """A slice of all there is: nothing."""
    start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])[2:]
    if start in (0, None) and end in (None, WHOLE) and step == 1:
        _pass_on(node)


def _asserted(node: Node) -> None:
    """What a tensor is was asserted when it was traced; the exporter would remove it."""
    node.graph.erase_node(node)


UNLIKE = {ATEN.index_select.default, ATEN.index.Tensor, ATEN.lift_fresh_copy.default}  # indices, whose type is another
RESHAPES = {ATEN.flatten.using_ints, ATEN.unflatten.int, ATEN.view_as.default, ATEN.view.default, ATEN.reshape.default}
RULES: dict[Any, Callable[[Node], None]] = {
    ATEN._upsample_bicubic2d_aa.vec: _resampled,
    ATEN.to.dtype: _cast,
    ATEN.to.device: _moved,
    ATEN.mT.default: _transposed,
    ATEN.relu_.default: _rectified,
    ATEN.batch_norm.default: _normalised,
    ATEN.dropout.default: _dropped,
    ATEN.slice.Tensor: _sliced,
    ATEN._assert_tensor_metadata.default: _asserted,
}
