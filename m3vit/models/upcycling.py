"""Up-cycling: experts that start as the MLP of the (pretrained) dense ViT they replace.

Shapes: D embedding dimension, H_d hidden width of the dense MLP, H hidden width of an expert, E experts, K experts per
token; G = H_d / H shards of the dense MLP, C = E / G copies of each shard, m = K / G copies that a token runs through.

The dense MLP b2 + sum_g W2_g gelu(W1_g x + b1_g) is a sum over shards of its hidden units. Expert c * G + g is copy c
of shard g, and all shards of a copy have the same gate row, hence the same score: the top K are the m best copies,
each with all its shards ("virtual groups" of He et al., arXiv 2410.07524, section 3.2). A token's output is then

    sum_{chosen c} s_c * (sum_g of expert outputs),    s_c = score of each expert of copy c,

which is the dense output, if the experts' W2 are the dense ones times 1 / sum_{chosen c} s_c. As the weights are not
renormalised here, that sum depends on the token, from m / E for zero gates to 1 / G for a decided router; it is the
same for all tokens only if K = E, or in the limit of zero gates. Hence W2 times E / m, b2 times (E / m) / G (K experts
add it), and small gates: with gates of relative size a (model.upcycle_gates; 1 is the usual random size) the layer's
output is the dense one times 1 + O(a). The gates must not be zero. Their order, which does not depend on a, is what
keeps the shards of a copy together, and what sends tokens to different copies, so that these diverge from the first
step on. The larger a, the longer training leaves the shards of a copy together: after steps that move the gates by more
than a, a token may find a shard twice and another one not at all.

So it must hold that H divides H_d, that G divides E and K, and that the dense MLP is what an expert is: Linear, GELU,
Linear. Router noise would pick shards of different copies, so it must be off unless G = 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from m3vit.errors import InputError
from m3vit.models.moe import MoELayer
from m3vit.models.of_timm import Mlp


@torch.no_grad()
def upcycle(layer: MoELayer, mlp: nn.Module, gates: float, where: str) -> None:
    """Set the experts of `layer` to shards of a dense `mlp`, and its gates to virtual groups of size `gates`.

    Raises InputError, naming the block `where`, if the layer cannot then compute what the MLP does.
    """
    bank, router = layer.experts, layer.router
    num_experts, top_k = len(bank.w1), router.top_k
    dense = plain_mlp(mlp, where)
    shards = count_shards(layer, dense, where)
    copies = num_experts // shards
    put_copies(layer, slice(None), dense, shards, num_experts * shards / top_k)  # times E / m
    for gate in router.gates:
        gate.copy_(gate[:copies].repeat_interleave(shards, dim=0) * gates)


def count_shards(layer: MoELayer, dense: Any, where: str, mlps: int = 1) -> int:
    """Return G, how many experts make up an MLP, or raise InputError if the layer cannot hold `mlps` MLPs in copies."""
    (num_experts, hidden, _), top_k = layer.experts.w1.shape, layer.router.top_k
    width = dense.fc1.out_features
    shards = width // hidden
    if width % hidden or num_experts % max(shards * mlps, 1) or top_k % max(shards, 1):
        several = f" (for {mlps} of them, {shards * mlps} must divide it)" if mlps > 1 else ""
        raise InputError(
            f"up-cycling: the MLP of {where} is {width} wide and an expert {hidden} (model.expert_ratio), so "
            f"{width / hidden:g} experts make up the MLP; that must be a whole number that divides model.num_experts "
            f"({num_experts}){several} and model.top_k ({top_k})"
        )
    if layer.router.noise > 0 and shards > 1:
        raise InputError(
            f"up-cycling: model.router_noise {layer.router.noise} would pick parts of different copies of the "
            f"MLP; give 0, or experts as wide as the MLP (model.expert_ratio {width / layer.experts.w1.shape[2]:g})"
        )
    return shards


@torch.no_grad()
def put_copies(layer: MoELayer, rows: slice, dense: Any, shards: int, scale: float) -> None:
    """Set some of the experts to copies of the shards of a dense MLP, its second Linear times `scale`."""
    w1, b1, w2, b2 = (getattr(layer.experts, name)[rows] for name in ("w1", "b1", "w2", "b2"))
    copies, hidden = len(w1) // shards, w1.shape[1]
    # Expert c * G + g: where scores tie (in ONNX, with tiny gates), the first ones win, again whole copies.
    w1.copy_(dense.fc1.weight.unflatten(0, (shards, hidden)).repeat(copies, 1, 1))
    w2.copy_(dense.fc2.weight.unflatten(1, (shards, hidden)).transpose(0, 1).repeat(copies, 1, 1) * scale)
    b1.zero_()
    b2.zero_()
    if dense.fc1.bias is not None:
        b1.copy_(dense.fc1.bias.unflatten(0, (shards, hidden)).repeat(copies, 1))
    if dense.fc2.bias is not None:
        b2.copy_((dense.fc2.bias * (scale / shards)).expand_as(b2))


def plain_mlp(mlp: nn.Module, where: str) -> Any:
    """Return `mlp` if it is Linear, exact GELU, Linear, as an expert is; raise InputError otherwise."""
    act, norm = getattr(mlp, "act", nn.Identity()), getattr(mlp, "norm", nn.Identity())
    # timm and torch have several classes for GELU, and approximations of it: compare what it computes.
    probe = torch.linspace(-4, 4, 65, dtype=torch.float64, device="cpu")  # also of a model on the meta device
    plain = type(mlp) is Mlp and isinstance(norm, nn.Identity) and torch.equal(act(probe), F.gelu(probe))
    if not plain:
        raise InputError(
            f"up-cycling: {where} has a {type(mlp).__name__} with {type(act).__name__} and "
            f"{type(norm).__name__}, and experts are Linear, exact GELU, Linear without a norm: give a trunk of such "
            "MLPs, or model.init random"
        )
    return mlp
