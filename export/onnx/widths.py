"""Dense MLPs of a traced graph with the first of their hidden units alone, and weights of which these are a beginning.

Shapes: D embedding dimension, H hidden units, w of them that are used.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from m3vit.errors import InputError
from m3vit.models.multitask import MultiTaskModel

Array = NDArray[np.generic]


def narrow_mlps(graph: ModelProto, model: MultiTaskModel, widths: Mapping[int, int], nested: bool = False) -> None:
    """Give the dense MLPs of `widths`, by block, so many hidden units, in place; `lower_moe` drops what is not used.

    Blocks of width 0 are not in the graph: it was traced without them.

    nested: all MLPs have their first weight as [w, D] instead of [D, w], turned when the graph is loaded: of another
    width it is then a beginning of the same bytes, as are the bias [w] and the second weight [w, D].
    """
    whole = model.backbone.mlp_widths()
    chosen = {block: widths.get(block, hidden) for block, hidden in whole.items()}
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.graph.initializer
        if len(tensor.dims) == 2 and set(tensor.dims) & set(whole.values())
    }
    taken: set[str] = set()
    last = max(model.heads.blocks, default=len(model.backbone.trunk.blocks) - 1)  # what comes after is not in the graph
    for block, width in chosen.items():
        if block <= last and width and (width < whole[block] or nested):
            _narrow(graph, model.backbone.trunk.blocks[block].mlp, block, width, nested, weights, taken)


def _narrow(
    graph: ModelProto, mlp: Any, block: int, width: int, nested: bool, weights: Mapping[str, Array], taken: set[str]
) -> None:
    """Change one MLP. `weights`: of the graph. `taken`: products of other blocks, which may have the same weights."""
    first, second = (layer.weight.detach().cpu().numpy() for layer in (mlp.fc1, mlp.fc2))
    into, out_of = (_product(graph, weight.T, block, weights, taken) for weight in (first, second))
    name = f"model.backbone.trunk.blocks.{block}.mlp"
    if nested:
        turned = f"{name}.fc1/turned"
        node = helper.make_node("Transpose", [f"{name}.fc1.first{width}"], [turned], turned, perm=[1, 0])
        graph.graph.node.insert(0, node)
        into.input[1] = _add(graph, f"{name}.fc1.first{width}", first[:width], turned)
    else:
        into.input[1] = _add(graph, f"{name}.fc1.first{width}.T", first[:width].T)
    out_of.input[1] = _add(graph, f"{name}.fc2.first{width}.T", second.T[:width])
    if mlp.fc1.bias is not None:
        # By its place: the exporter has one tensor for all that hold the same numbers, such as zeros.
        (adds,) = [node for node in graph.graph.node if node.op_type == "Add" and into.output[0] in node.input]
        place = 1 - list(adds.input).index(into.output[0])
        bias = mlp.fc1.bias.detach().cpu().numpy()[:width]
        adds.input[place] = _add(graph, f"{name}.fc1.first{width}.bias", bias)


def _product(graph: ModelProto, weight: Array, block: int, weights: Mapping[str, Array], taken: set[str]) -> NodeProto:
    """Return the product with a weight; blocks of equal weights have theirs in order."""
    for node in graph.graph.node:
        found = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if found is not None and node.output[0] not in taken and np.array_equal(found, weight):
            taken.add(node.output[0])
            return node
    raise InputError(
        f"cannot export a part of the MLP of block {block}: the exporter made something else of it than two products; "
        "leave its width out of the budget"
    )


def _add(graph: ModelProto, name: str, values: Array, instead: str = "") -> str:
    """Add a tensor to a graph; return its name, or that of what is made of it."""
    graph.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    return instead or name
