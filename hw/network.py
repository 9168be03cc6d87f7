"""The program of a network by its sizes alone, as the exporter would write it, without weights. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from m3vit.hw import isa
from m3vit.hw.hardware import round_up, row_unit, split_inputs, stored_bits
from m3vit.hw.isa import TAPS, Instruction, Mode
from m3vit.hw.layer_bits import OF_BLOCK, names_of_maps
from m3vit.hw.weights_file import ALIGNMENT

PARAMS_UNIT = ALIGNMENT // 4  # rows of tables in params begin at its multiples: words of any port


@dataclass(frozen=True)
class Head:
    """Of one task: outputs of the Linear on a token; with a convolution (channels > 0), its channels."""

    outputs: int
    channels: int = 0


@dataclass(frozen=True)
class Network:
    """Sizes of a ViT.

    prefix: class and register tokens. mlps: of each block the hidden width, with experts that of one of them; top_ks:
    of each block the experts a token has, 0 in a dense one. same_gates: all tasks share one router. pre_norm:
    LayerNorm before the blocks. upscale: outputs of a head a token and side.
    """

    grid: tuple[int, int]
    patch: int
    prefix: int
    dim: int
    heads: int
    mlps: Sequence[int]
    top_ks: Sequence[int]
    experts: int
    tasks: Sequence[Head]
    upscale: int
    same_gates: bool = False
    pre_norm: bool = False


def maps_of(n: Network) -> list[str]:
    """Return the names of the maps whose inputs may have 16 bits."""
    return names_of_maps(range(len(n.mlps)), any(head.channels for head in n.tasks))


def program_of(
    n: Network, weight_bits: int, act_bits: int, port_bits: int, fine: frozenset[str] = frozenset()
) -> list[Instruction]:
    """Return the program; its offsets, shifts and fractions are 0. Sizes are filled up as the exporter does.

    fine: names of maps_of whose inputs have two bytes.
    """
    found: list[Instruction] = []
    sizes: dict[str, Any]
    nowhere: dict[str, Any] = {"weights": 0, "params": 0}
    patches, dim, several = n.grid[0] * n.grid[1], n.dim, len(n.tasks) > 1
    rows = patches + n.prefix
    unit = row_unit(stored_bits(weight_bits), stored_bits(act_bits), port_bits)
    seen = n.heads * round_up(dim // n.heads, port_bits // stored_bits(act_bits))  # by attention

    def low(name: str) -> int:
        """Return src_low of a map, and dst_low of what writes its inputs."""
        return port_bits // 8 if name in fine else 0

    def linear(count: int, n_in: int, n_out: int, mode: Mode, name: str = "", writes: str = "", **more: int) -> None:
        """Add a linear map by its name, and that of the map that reads what it writes to narrow."""
        if mode in (Mode.WIDE, Mode.RESIDUAL) and len(parts := split_inputs(round_up(n_in, unit), unit)) > 1:
            for place, part in enumerate(parts):
                linear(count, part, n_out, Mode.RESIDUAL if place else mode, name)
            return
        sizes = {"rows": count, "n_in": round_up(n_in, unit), "n_out": n_out}
        found.append(isa.Linear(mode=mode, src_low=low(name), dst_low=low(writes), **sizes, **more, **nowhere))

    def norm(count: int, mode: Mode = Mode.NARROW, writes: str = "") -> None:
        scaling = {"params": 0, "shift": 0, "bias_shift": 0, "sqrt_dim": 0, "eps": 1}
        found.append(isa.Norm(rows=count, n_in=dim, n_out=dim, mode=mode, dst_low=low(writes), **scaling))

    found.append(isa.Patches(rows=patches, n_in=3 * n.patch**2, patch=n.patch, columns=n.grid[1]))
    linear(patches, 3 * n.patch**2, dim, Mode.WIDE)
    found.append(isa.Position(rows=rows, n_out=round_up(dim, PARAMS_UNIT), params=0, prefix=n.prefix))
    if n.pre_norm:
        norm(rows, Mode.WIDE)
    for block, (hidden, top_k) in enumerate(zip(n.mlps, n.top_ks, strict=True)):
        qkv, proj, fc1, fc2 = (f"blocks.{block}.{name}" for name in OF_BLOCK)
        norm(rows, writes=qkv)
        linear(rows, dim, 3 * seen, Mode.NARROW, qkv)
        shifts = {"score_shift": 0, "value_shift": 0, "dst_low": low(proj)}
        found.append(isa.Attention(rows=rows, n_in=3 * seen, n_out=seen, heads=n.heads, **shifts))
        linear(rows, seen, dim, Mode.RESIDUAL, proj)
        norm(rows, writes=fc1)
        if not top_k:
            linear(rows, dim, hidden, Mode.NARROW, fc1, fc2, gelu_in=0)
            linear(rows, hidden, dim, Mode.RESIDUAL, fc2)
            continue
        for task in [-1] if n.same_gates or not several else range(len(n.tasks)):
            sizes = {"rows": rows, "n_in": round_up(dim, unit), "n_out": n.experts, "src_low": low(fc1)}
            found.append(isa.Gate(task=task, **sizes, **nowhere))
        found.append(isa.Route(rows=rows, n_in=n.experts, top_k=top_k, logit_frac=0))
        steps: dict[str, Any] = {"weights_step": 0, "params_step": 0, "hidden_pitch": 0, "gelu_in": 0, "gelu_out": 0}
        steps |= {"src_low": low(fc1), "dst_low": low(fc2)}
        sizes = {"rows": rows, "n_in": round_up(dim, unit), "n_out": round_up(hidden, unit)}
        found.append(isa.Experts(experts=n.experts, **sizes, **steps, **nowhere))
    norm(patches, writes="heads.linear")
    for place, head in enumerate(n.tasks):
        task = place if several else -1
        if not head.channels:
            linear(patches, dim, head.outputs, Mode.OUTPUT, "heads.linear", task=task)
            continue
        features = round_up(head.outputs // n.upscale**2, unit)
        linear(patches, dim, features * n.upscale**2, Mode.NARROW, "heads.linear", "heads.conv", task=task)
        pixels: dict[str, Any] = {"columns": n.grid[1], "upscale": n.upscale, "src_low": low("heads.conv")}
        sizes = {"rows": patches * n.upscale**2, "n_in": TAPS * features, "n_out": head.channels}
        found.append(isa.Conv(task=task, **sizes, **pixels, **nowhere))
    return found
