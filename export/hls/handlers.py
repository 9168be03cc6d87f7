"""From leaf modules (leaf.py) to hls4ml layer descriptions; and `register`, which makes hls4ml know all of ours."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import hls4ml
import numpy as np
from hls4ml.converters import register_pytorch_layer_handler
from hls4ml.converters.pytorch_to_hls import get_supported_pytorch_layers
from hls4ml.model.layers import layer_map, register_layer
from torch import Tensor

from m3vit.export.hls import ir, leaf, templates

Shape = list[Any]
Description = dict[str, Any]


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _linear(module: leaf.VitLinear, shape: Shape) -> tuple[Description, Shape]:
    n_out, n_in = module.weight.shape
    # hls4ml's own layer: on tokens it becomes a PointwiseConv1D. Its weight is [in, out].
    description = {"class_name": "Dense", "n_in": n_in, "n_out": n_out, "use_bias": True}
    weights = {"weight_data": _array(module.weight).T.copy(), "bias_data": _array(module.bias)}
    return {**description, **weights}, [*shape[:-1], n_out]


def _gelu(module: leaf.VitGelu, shape: Shape) -> tuple[Description, Shape]:
    return {"n_tok": shape[1], "n_dim": shape[2]}, shape


def _layernorm(module: leaf.VitLayerNorm, shape: Shape) -> tuple[Description, Shape]:
    weights = {"scale_data": _array(module.scale), "bias_data": _array(module.bias)}
    return {"n_tok": shape[1], "n_dim": shape[2], "eps": module.eps, **weights}, shape


def _position(module: leaf.VitPosition, shape: Shape) -> tuple[Description, Shape]:
    n_tok, n_dim = module.table.shape
    description = {"n_tok": n_tok, "n_dim": n_dim, "n_prefix": module.prefix, "table_data": _array(module.table)}
    return description, [shape[0], n_tok, n_dim]


def _attention(module: leaf.VitAttention, shape: Shape) -> tuple[Description, Shape]:
    n_dim = shape[2] // 3
    return {"n_tok": shape[1], "n_dim": n_dim, "n_head": module.num_heads}, [*shape[:2], n_dim]


def _moe(module: leaf.VitMoE, shape: Shape) -> tuple[Description, Shape]:
    n_exp, n_hid, n_dim = module.w1.shape
    description = {
        "moe_index": module.layer,
        "n_tok": shape[1],
        "n_dim": n_dim,
        "n_hid": n_hid,
        "n_exp": n_exp,
        "n_top": module.top_k,
        "n_task": module.router_w.shape[0],
    }
    return {**description, **{f"{name}_data": _array(getattr(module, name)) for name in ir.VitMoE.WEIGHTS}}, shape


def _task_head(module: leaf.VitTaskHead, shape: Shape) -> tuple[Description, Shape]:
    description = {
        "n_tok": shape[1],
        "n_dim": shape[2],
        "n_prefix": module.prefix,
        "n_out": max(module.widths),
        "n_task": len(module.widths),
        "widths": list(module.widths),
        "eps": module.eps,
        "scale": module.scale.tolist(),
    }
    weights = {"weight_data": _array(module.weight), "bias_data": _array(module.bias)}
    return {**description, **weights}, [shape[0], shape[1] - module.prefix, description["n_out"]]


def _pixel_head(module: leaf.VitPixelHead, shape: Shape) -> tuple[Description, Shape]:
    description = {
        "n_tok": shape[1],
        "n_dim": shape[2],
        "n_row": module.grid[0],
        "n_column": module.grid[1],
        "n_scale": module.upscale,
        "n_unrectified": module.unrectified,
        "n_out": max(module.widths),
        "n_task": len(module.widths),
        "channels": list(module.channels),
    }
    weights = {"weight_data": _array(module.weight), "bias_data": _array(module.bias)}
    return {**description, **weights}, [*shape[:2], description["n_out"]]


HANDLERS: dict[str, Callable[[Any, Shape], tuple[Description, Shape]]] = {
    "VitLinear": _linear,
    "VitGelu": _gelu,
    "VitLayerNorm": _layernorm,
    "VitPosition": _position,
    "VitAttention": _attention,
    "VitMoE": _moe,
    "VitTaskHead": _task_head,
    "VitPixelHead": _pixel_head,
}


def _hls4ml_handler(name: str) -> Callable[..., tuple[Description, Shape]]:
    """Wrap one of HANDLERS in the signature that hls4ml's PyTorch converter calls."""

    def handler(
        operation: str,
        layer_name: str,
        input_names: list[str],
        input_shapes: list[Shape],
        node: Any,
        class_object: Any,
        data_reader: Any,
        config: Any,
    ) -> tuple[Description, Shape]:
        description, shape = HANDLERS[name](class_object, input_shapes[0])
        return {"class_name": name, "name": layer_name, "inputs": input_names, **description}, shape

    return handler


def include_dir() -> Path:
    """Return the folder of the kernels' C++ headers."""
    return Path(str(files("m3vit.hw") / "include"))


def register() -> None:
    """Make our layers known to hls4ml's process-wide registries; safe to call again."""
    if "VitLinear" in get_supported_pytorch_layers():
        return
    for name in HANDLERS:
        register_pytorch_layer_handler(name, _hls4ml_handler(name))
    for layer in ir.LAYERS:
        if layer.__name__ not in layer_map:
            register_layer(layer.__name__, layer)
    backend = hls4ml.backends.get_backend("Vitis")
    for template in templates.TEMPLATES:
        backend.register_template(template)
    for header in sorted(include_dir().glob("*.h")):
        backend.register_source(header)
