"""Lowering of m3vit::Attention, an exported graph's other custom operator: softmax(scale q k^T) v of all heads.

Two forms. `standard`: a product, Softmax and a product, operators of every runtime; onnxruntime takes the scale and
the transposition of k into the first product. `fused`: com.microsoft.MultiHeadAttention, a kernel that onnxruntime
alone has; it never holds all scores of a head at once, and where q, k and v are parts of one linear map (all of timm's
but those with rotary positions or normalised q and k) it takes them as they come, without a transposition.

Shapes: B images, A heads, T tokens, d = D / A.
"""

from typing import Any

import numpy as np
from onnx import NodeProto, helper

OPERATOR, INPUTS = "Attention", ("q", "k", "v")
FUSED_DOMAIN = "com.microsoft"
FORMS = ("fused", "standard")
_PARTS = [2, 0, 3, 1, 4]  # how timm lays [B, T, 3, A, d] out as [3, B, A, T, d]


def lower_attention(node: NodeProto, form: str, values: Any, add: Any) -> list[NodeProto]:
    """Return the nodes that compute what an m3vit::Attention node does, in order.

    q, k, v and the output are [B, A, T, d]. `values`, `add`: the graph's constants and a collector of nodes (lower.py).
    """
    q, k, v = node.input
    scale = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
    if form == "standard":
        factor = values.add(f"attention_scale_{scale:.9g}", np.array(scale, np.float32))
        scores = add("products", "MatMul", q, add("keys", "Transpose", k, perm=[0, 1, 3, 2]))
        shares = add("shares", "Softmax", add("scores", "Mul", scores, factor), axis=-1)
        add("mixed", "MatMul", shares, v)
    else:
        heads = next(attribute.i for attribute in node.attribute if attribute.name == "heads")
        linear = _one_linear(node, values)
        if linear is not None:
            parts = add.many(["query", "key", "value"], "Split", linear, axis=-1, num_outputs=3)
        else:
            parts = [
                add(what, "Reshape", add(f"{what}_rows", "Transpose", one, perm=[0, 2, 1, 3]), values.int64([0, 0, -1]))
                for what, one in zip(("query", "key", "value"), (q, k, v), strict=True)
            ]
        options = {"domain": FUSED_DOMAIN, "num_heads": heads, "scale": scale}
        mixed = add("rows", "MultiHeadAttention", *parts, **options)
        split = add("by_head", "Reshape", mixed, values.int64([0, 0, heads, -1]))
        add("mixed", "Transpose", split, perm=[0, 2, 1, 3])
    add.nodes[-1].output[0] = node.output[0]  # the rest of the graph knows it by this name
    return list(add.nodes)


def _one_linear(node: NodeProto, values: Any) -> str | None:
    """Return the tensor [B, T, 3 * D] of which q, k and v are the thirds, if they are."""
    sources = []
    for place, name in enumerate(node.input):
        squeeze = values.producers.get(name)
        part = values.producers.get(squeeze.input[0]) if squeeze is not None and squeeze.op_type == "Squeeze" else None
        if part is None or part.op_type != "Slice":
            return None
        if not all(values.is_constant(one) for one in part.input[1:]):
            return None
        first, _, axis, *_ = (int(values.read(one).item()) for one in part.input[1:4])
        if (first, axis) != (place, 0):
            return None
        sources.append(part.input[0])
    laid_out = values.producers.get(sources[0])
    if len(set(sources)) > 1 or laid_out is None or laid_out.op_type != "Transpose":
        return None
    if helper.get_attribute_value(laid_out.attribute[0]) != _PARTS:
        return None
    reshape = values.producers.get(laid_out.input[0])
    return None if reshape is None or reshape.op_type != "Reshape" else reshape.input[0]


def drop_round_trips(nodes: list[NodeProto]) -> None:
    """Connect what reads a fused attention's output as rows to the rows themselves, in place.

    After it the model turns [B, A, T, d] into [B, T, D] again, which is what the kernel gave.
    """
    producers = {name: node for node in nodes for name in node.output}
    renamed: dict[str, str] = {}
    for node in nodes:
        chain = [node]
        for operator in ("Transpose", "Transpose", "Reshape", "MultiHeadAttention"):
            before = producers.get(chain[-1].input[0])
            if before is None or before.op_type != operator:
                break
            chain.append(before)
        if node.op_type == "Reshape" and len(chain) == 5:
            renamed[node.output[0]] = chain[-1].output[0]
    for node in nodes:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
