"""What may be asked of `m3vit export hls`, by a program or on the command line. No torch."""

from dataclasses import dataclass
from typing import Annotated, Any

from m3vit.options import DataRoot, File, Positive, Value, positive


def _schedules() -> list[str]:
    from m3vit.export.hls.schedules import SCHEDULES

    return list(SCHEDULES)


ENGINES = (
    "part",
    "clock",
    "array",
    "port_bits",
    "ports",
    "residual_bits",
    "layer_bits",
    "config",
)  # of the multiplexed schedule alone
Bits = Annotated[int, Value(positive, "BITS")]


@dataclass(frozen=True)
class Request:
    """What a user asks for of a run's HLS project.

    Attributes:
        data_root: data set's folder (default: the one the run was trained on)
        samples: validation images to store for m3vit hw csim (default: 100, fewer of a large model, where each takes
            torch seconds a task, and all if there are not so many)
        schedule: spatial: a kernel for each layer, for models that fit on chip; multiplexed: one engine of each kind
            and weights in DDR, for models of any depth and any number of experts
        board: of the multiplexed schedule alone, such as zcu104, zcu102, kv260 or u50 (default: zcu104)
        part: FPGA, of a board's device, such as another speed grade (default: the board's)
        clock: MHz (default: the board's)
        array: outputs of the array of multipliers (default: what is fastest, modelled, of what fits)
        port_bits: width of a memory port (default: the board's)
        ports: 1 or 2 memory ports for weights (default: as the array)
        residual_bits: width of the residual stream, 32, or 16 with 8-bit feature maps (default: 32)
        layer_bits: linear maps whose inputs have 16 bits beside 8-bit feature maps, as blocks.10.mlp=16,heads=16: a
            block's attn.qkv, attn.proj, mlp.fc1 and mlp.fc2, heads.linear, heads.conv, or what such a name begins
            with; blocks.* is all blocks (default: none)
        config: file of m3vit hw explore, in place of the board, the bits and all of these (default: none)
        weight_bits: width of weights: spatial 6 to 24, multiplexed 8, 12 or 16 (default: 16)
        act_bits: width of feature maps: spatial 8 to 24 (default: 20), multiplexed 8, 10, 12, 14 or 16 (default: 16)
    """

    data_root: DataRoot | None = None
    samples: Positive | None = None
    schedule: Annotated[str, Value(choices=_schedules)] = "spatial"
    board: Annotated[str, Value(metavar="NAME")] | None = None
    part: Annotated[str, Value(metavar="PART")] | None = None
    clock: Annotated[int, Value(positive, "MHZ")] | None = None
    array: Annotated[int, Value(positive, "OUTPUTS")] | None = None
    port_bits: Bits | None = None
    ports: Positive | None = None
    residual_bits: Bits | None = None
    layer_bits: Annotated[str, Value(metavar="NAME=BITS,...")] | None = None
    config: File | None = None
    weight_bits: Bits | None = None
    act_bits: Bits | None = None

    @property
    def engines(self) -> dict[str, Any]:
        """What is given of the engines, as schedules.choose_options takes it."""
        return {name: getattr(self, name) for name in ENGINES}
