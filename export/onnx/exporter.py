"""What torch's ONNX exporter is told of our operators, spared, and has to say, while it traces and translates."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript import rewriter
from onnxscript.rewriter import RewriteRule
from onnxscript.rewriter.rules.common import slice_split_rule
from onnxscript.values import Opset
from torch import Tensor
from torch._decomp.decompositions import upsample_compute_output_size
from torch._prims_common import suggest_memory_format
from torch.onnx.errors import OnnxExporterError

import m3vit.models.moe  # noqa: F401 (defines m3vit::moe)
from m3vit.errors import InputError
from m3vit.export.onnx.attention import INPUTS as ATTENTION_INPUTS
from m3vit.export.onnx.attention import OPERATOR as ATTENTION
from m3vit.export.onnx.lower import DOMAIN, INPUTS, OPERATOR


@contextmanager
def exporter() -> Iterator[None]:
    """Adapt the exporter to our models: what the functions below say of it holds inside."""
    with ExitStack() as stack:
        for adapted in (
            _told, _quiet, _schemas, _of_their_operator, listed_once, composites_once, devices_once, _without_cache,
            _without_places,
        ):  # fmt: skip
            stack.enter_context(adapted())
        yield


_MOE = Opset(DOMAIN, 1)


def _moe_node(x: Any, gate: Any, gate_bias: Any, w1: Any, b1: Any, w2: Any, b2: Any, top_k: int) -> Any:
    """Translate m3vit::moe to one node of the same inputs; `lower_moe` does the rest."""
    return _MOE.MoE(x, gate, gate_bias, w1, b1, w2, b2, top_k=top_k)


def _attention_node(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate attention to one node m3vit::Attention, of which `lower_moe` makes what is asked for."""
    heads, dim = query.shape[1], query.shape[3]
    if attn_mask is not None or is_causal or enable_gqa or not isinstance(heads, int) or not isinstance(dim, int):
        raise InputError("cannot export to ONNX: the trunk's attention has a mask, or heads of an unknown number")
    return _MOE.Attention(query, key, value, heads=heads, scale=float(scale or dim**-0.5))


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.m3vit.moe.default: _moe_node,
    torch.ops.aten.scaled_dot_product_attention.default: _attention_node,
}
_FLOAT, _INT = OpSchema.AttrType.FLOAT, OpSchema.AttrType.INT
_OPERATORS = {
    OPERATOR: (INPUTS, {"top_k": _INT}),
    ATTENTION: (ATTENTION_INPUTS, {"heads": _INT, "scale": _FLOAT}),
}


@contextmanager
def _schemas() -> Iterator[None]:
    """Make m3vit's operators known while exporting: the exporter builds no node of an operator without a schema."""
    for operator, (inputs, attributes) in _OPERATORS.items():
        schema = OpSchema(
            operator,
            DOMAIN,
            1,
            inputs=[OpSchema.FormalParameter(name, "T") for name in inputs],
            outputs=[OpSchema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)"], "")],
            attributes=[OpSchema.Attribute(name, kind, "", required=True) for name, kind in attributes.items()],
        )
        onnx.defs.register_schema(schema)
    try:
        yield
    finally:
        for operator in _OPERATORS:
            onnx.defs.deregister_schema(operator, 1, DOMAIN)


@contextmanager
def _of_their_operator() -> Iterator[None]:
    """Try each rule of the exporter's optimizer on nodes of the operator that it is for, not on every node, and the one
    that looks at pairs of nodes, of all of them, on none, while exporting.

    That one makes one Split of two Slices that lie side by side, which no model here gains by. Of the others, of which
    there are 40, some twelfth of the time of a trace went into finding that a node is of another operator.
    """

    def only(rule: RewriteRule, operator: Any) -> Callable[..., Any]:
        def try_rewrite(model: Any, graph: Any, node: Any, **named: Any) -> Any:
            return own(rule, model, graph, node, **named) if operator.matches(node.op_type) else None

        own = type(rule).try_rewrite
        return try_rewrite

    changed: list[Any] = [slice_split_rule]
    try:
        slice_split_rule.try_rewrite = lambda *given, **named: None
        for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ()):  # of another version of onnxscript: on every node
            pattern: Any = getattr(rule, "_target_pattern", None)
            if rule is not slice_split_rule and getattr(pattern, "has_single_output_node", False):
                changed.append(rule)
                rule.try_rewrite = only(rule, pattern.output_node.op)
        yield
    finally:
        for rule in changed:
            vars(rule).pop("try_rewrite", None)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a class or a module another attribute of this name."""
    own = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def _without_places() -> AbstractContextManager[None]:
    """Do without the place in the source that torch notes of each node, while exporting: one in fifteen seconds of a
    trace, for graphs that do not hold it."""
    from torch.fx import config

    name = "do_not_emit_stack_traces"
    return _replaced(config, name, True) if hasattr(config, name) else nullcontext()  # another version of torch


_LISTED: dict[Any, Any] = {}  # by opset and what operators torch knows, the table of what translates which


@contextmanager
def listed_once() -> Iterator[None]:
    """Have the exporter list the functions that translate operators once a process, not anew for each graph, while
    exporting: it parses the sources of 500 of them, a sixth of the time of a small model's graph."""
    try:
        from torch.onnx._internal.exporter import _registration

        table: Any = _registration.ONNXRegistry
        own = vars(table)["from_torchlib"]
        operators: Any = torch._C._dispatch_get_all_op_names
    except (ImportError, AttributeError, KeyError):  # another version of torch: it lists them as often as it does
        yield
        return

    def from_torchlib(cls: Any, **opset: int) -> Any:
        key = tuple(opset.values()), frozenset(operators())  # libraries add operators: torch's own for quantising do
        if key not in _LISTED:
            _LISTED[key] = own.__get__(None, cls)(**opset)
        registry = copy(_LISTED[key])  # to which the translations of one export are added
        registry.functions = {operator: list(known) for operator, known in registry.functions.items()}
        return registry

    with _replaced(table, "from_torchlib", classmethod(from_torchlib)):
        yield


@contextmanager
def composites_once() -> Iterator[None]:
    """Have torch look up its operators that are made of others once, not for each of thirty libraries, while exporting.

    Again if there are others: what is imported meanwhile may define some.
    """
    try:
        from torch._export import utils

        module: Any = utils
        own, registered = module._materialize_cpp_cia_ops, torch._C._dispatch_get_registrations_for_dispatch_key
    except (ImportError, AttributeError):  # another version of torch
        yield
        return
    known: set[int] = set()

    def once() -> None:
        count = len(registered("CompositeImplicitAutograd"))
        if count not in known:
            own()
            known.add(count)

    with _replaced(module, "_materialize_cpp_cia_ops", once):
        yield


@contextmanager
def devices_once() -> Iterator[None]:
    """Have torch ask once whether there is a GPU, not for each operation, while exporting: where there is none it looks
    for a driver in all folders of libraries, a fourteenth of the time of a trace."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    own = vars(FakeTensorMode).get("avoid_device_init")
    if not isinstance(own, property) or own.fget is None:  # another version of torch
        yield
        return
    ask: Callable[[Any], bool] = own.fget
    known: list[bool] = []

    def once(mode: Any) -> bool:
        if not known:
            known.append(ask(mode))
        return known[0]

    with _replaced(FakeTensorMode, "avoid_device_init", property(once)):
        yield


def _without_cache() -> AbstractContextManager[Any]:
    """Do without torch's cache of what operators make of which shapes, while exporting.

    With sizes that are not known, next to nothing is found in it, and all is put into it: a tenth to a fifth of the
    time of a trace.
    """
    from torch._dynamo import config

    known = hasattr(config, "fake_tensor_cache_enabled")
    return config.patch(fake_tensor_cache_enabled=False) if known else nullcontext()


def _resized(x: Tensor, size: Sequence[int] | None, corners: bool, factors: Sequence[float] | None = None) -> Tensor:
    sides = upsample_compute_output_size(x.shape, size, factors)
    return x.new_empty((*x.shape[:2], *sides)).to(memory_format=suggest_memory_format(x))


def _normalised(x: Tensor, *more: Any) -> Tensor:
    return x.new_empty(x.shape)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


SHAPES: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.upsample_bilinear2d.vec: _resized,
    torch.ops.aten.layer_norm.default: _normalised,
    torch.ops.aten.linear.default: _linear,
}


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Say what shapes bilinear resizing, LayerNorm and linear maps give, while tracing.

    Torch finds them by taking each apart into others of sizes that are not known: a third of the time of a trace.
    """
    if not all(hasattr(operator, "py_kernels") and hasattr(operator, "_dispatch_cache") for operator in SHAPES):
        yield  # another version of torch
        return
    key = torch._C.DispatchKey
    own = {operator: dict(operator.py_kernels) for operator in SHAPES}
    try:
        for operator, shape in SHAPES.items():
            operator.py_kernels.update(dict.fromkeys((key.Autograd, key.CompositeImplicitAutograd), shape))
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator, kernels in own.items():
            operator.py_kernels.clear()
            operator.py_kernels.update(kernels)
            operator._dispatch_cache.clear()


@contextmanager
def _told() -> Iterator[None]:
    """Say in a line what of a model no graph can have: decoders of others may hold anything."""
    from torch._dynamo.exc import UserError
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    try:
        yield
    except GuardOnDataDependentSymNode as error:
        raise InputError(
            "cannot export to ONNX: what the model does depends on a tensor's values (if, int() or float() of a "
            "tensor): use operators on tensors, such as torch.where"
        ) from error
    except UserError as error:
        said = " ".join(str(error).split())
        if "specialized it to be a constant" in said:
            said = "the model is written for one size of images: take sizes from x.shape, or give --size HEIGHTxWIDTH"
        raise InputError(f"cannot export to ONNX: {said}") from error
    except OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = " ".join(str(cause).split())
        if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", said):
            said = f"torch's exporter has no translation of {found[1]}, which the model uses: use other operators"
        raise InputError(f"cannot export to ONNX: {said}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings and progress, which are about its own workings, while exporting."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
