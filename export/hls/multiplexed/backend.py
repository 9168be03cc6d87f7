"""The hls4ml backend VitisMoE: one engine of each kind, time-multiplexed by a program, weights in DDR.

hls4ml converts the same leaf modules to the same layers as for the spatial schedule; the pass `build_schedule` turns
the ModelGraph into a program, buffers and one weight image instead of a kernel for each layer. This module is imported
by every `import hls4ml` (it is a plugin), so it imports neither torch nor the rest of the exporter.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hls4ml.backends import VitisBackend, VivadoBackend
from hls4ml.model.flow import register_flow
from hls4ml.model.optimizer import model_optimizer

from m3vit.errors import InputError
from m3vit.export.hls.multiplexed.plugin import NAME
from m3vit.export.hls.multiplexed.scheduler import BLOCK, Maps, Scheduler, Tensor, Units
from m3vit.hw.design import Design
from m3vit.hw.fit import fit
from m3vit.hw.hardware import Hardware
from m3vit.hw.output_memory import OutputLayout
from m3vit.hw.program import Image

LINEAR = ("Dense", "Conv1D", "PointwiseConv1D")
MOE_WEIGHTS = ("router_w", "router_b", "w1", "b1", "w2", "b2")


@dataclass
class Planned:
    """What the pass leaves for the writer, as `schedule` of the ModelGraph."""

    image: Image
    hardware: Hardware
    tensors: list[dict[str, Any]]  # of weights_map.json
    sum_bits: int
    output_fracs: list[int]  # of each task
    output_layout: OutputLayout
    filled: list[str]  # of hidden units that lie apart: what is filled up with zeros, for people


class VitisMoEBackend(VitisBackend):
    """See the module."""

    def __init__(self) -> None:
        super(VivadoBackend, self).__init__(name=NAME)
        self._register_layer_attributes()
        self._register_flows()

    def _register_flows(self) -> None:
        schedule = register_flow("schedule", ["vitismoe:build_schedule"], requires=["optimize"], backend=self.name)
        self._default_flow = register_flow("ip", None, requires=["optimize", schedule], backend=self.name)
        self._writer_flow = register_flow(
            "write", ["make_stamp", "vitismoe:write_hls"], requires=["vitismoe:ip"], backend=self.name
        )

    def create_initial_config(self, **options: Any) -> dict[str, Any]:
        """Return Vitis' configuration for the board, and ours under NAME.

        design: Design as a dictionary; formats: Formats as one; grid, patch: of the image; programs: what each has
        (m3vit.export.hls.budgets).
        """
        design = options.pop("design", {"board": "zcu104"})
        board = Design(**design).target
        ours = {key: options.pop(key) for key in ("formats", "grid", "patch", "programs")} | {
            "board": board.name,
            "design": design,
        }
        period = round(1000 / board.clock_mhz, 3)
        config = super().create_initial_config(part=board.part, clock_period=period, **options)
        return {**config, NAME: ours}

    @model_optimizer()
    def build_schedule(self, model: Any) -> bool:
        """Plan the graph. Raises InputError for layers without an engine and models that do not fit."""
        model.schedule = _Planner(model, model.config.config[NAME]).plan()
        return False


def _values(node: Any, name: str) -> np.ndarray:
    return np.asarray(node.get_weights(name).data_unquantized, dtype=np.float64)


def _linear(node: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [out, in] and bias [out] of hls4ml's Dense, which holds [in, out]."""
    bias = _values(node, "bias").ravel()
    return _values(node, "weight").reshape(-1, len(bias)).T, bias


def split_rows(values: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    """Return the first `counts[0]` rows, the next `counts[1]`, ..."""
    return np.split(values, np.cumsum(counts)[:-1])


class _Planner:
    """Walks a ModelGraph, once for each program, and tells the scheduler its layers.

    Linears are held back until their consumer is met: embedding and positions, GELU and residual additions are parts of
    what the linear engine does when it writes.
    """

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self.formats, self.settings = settings["formats"], settings
        self.nodes = list(model.get_layers())
        self.model = model
        inputs = {node.name: node for node in self.nodes if node.class_name in ("Input", "InputLayer")}
        self.tasks = next(node for node in self.nodes if node.class_name == "VitTaskHead").get_attr("n_task")
        self.inputs = set(inputs)
        self.activated = {node.outputs[0] for node in self.nodes if node.class_name == "VitGelu"}
        self.tensors: dict[str, Tensor] = {}
        self.pending: dict[str, Any] = {}  # output name -> node whose work its consumer will order
        self.last_use = {name: place for place, node in enumerate(self.nodes) for name in node.inputs}
        weight_bits, act_bits = self.formats["weight_bits"], self.formats["act_bits"]
        self.design = Design(**settings["design"])
        self.board = self.design.target
        wide, wide_bits = self.formats["wide"], self.formats["wide_bits"]
        self.scheduler = Scheduler(self.tasks, weight_bits, act_bits, wide, self.board.port_bits, wide_bits)
        self.output_fracs: list[int] = []
        self.programs: list[dict[str, dict[int, Any]]] = settings["programs"]
        self.program = self.programs[0]

    def block(self, node: Any) -> int:
        """Return the block that a layer is of, -1 for one before or after the blocks."""
        found = BLOCK.match(node.name)
        return int(found[1]) if found else -1

    def left_out(self, node: Any) -> bool:
        """Return whether the program leaves a layer out."""
        return bool(self.program["width"].get(self.block(node)) == 0)

    def units(self, block: int) -> tuple[Units, int]:
        """Return how a block's hidden units lie, and how many of them the program has."""
        counts = {program["width"][block] for program in self.programs} - {0}
        return Units(tuple(sorted(counts)), self.scheduler.unit), int(self.program["width"][block])

    def frac(self, node: Any, kind: str = "result") -> int:
        """Return the fraction chosen for a layer."""
        return int(self.formats["layers"][node.name][kind])

    def fine(self, node: Any, kind: str = "result") -> bool:
        """Return whether what a layer writes has 16 bits beside others of 8."""
        return kind in self.formats["bits"].get(node.name, {})

    def consumers(self, node: Any) -> list[Any]:
        """Return the layers that read a layer's output."""
        return [other for other in self.nodes if node.outputs[0] in other.inputs]

    def refuse(self, node: Any, why: str) -> InputError:
        return InputError(
            f"cannot export to HLS: the multiplexed schedule has no engine for layer {node.name} ({node.class_name}) "
            f"{why}; use a plain ViT block (LayerNorm, attention, GELU MLP or experts, each with a residual)"
        )

    def plan(self) -> Planned:
        rules = {
            "VitPosition": self.position,
            "VitLayerNorm": self.norm,
            "VitGelu": self.gelu,
            "VitAttention": self.attention,
            "Merge": self.add,
            "VitMoE": self.moe,
            "VitTaskHead": self.head,
            "VitPixelHead": self.pixel_head,
        }
        scheduler = self.scheduler
        for number, program in enumerate(self.programs):
            self.program = program
            if number:
                scheduler.begin()
                self.tensors, self.pending = {}, {}
            for place, node in enumerate(self.nodes):
                if self.left_out(node):
                    self.pending[node.outputs[0]] = node
                elif node.class_name in LINEAR:
                    self.pending[node.outputs[0]] = node
                elif node.class_name in rules:
                    rules[node.class_name](node, place)
                elif node.name not in self.inputs:
                    raise self.refuse(node, "at all")
        image = scheduler.build()
        bits = (scheduler.weight_bits, scheduler.act_bits)
        first, *others = (image.program_of(number) for number in range(len(self.programs)))
        hardware = fit(first, *bits, self.board, self.design.sizes, [one for other in others for one in other])
        facts = (scheduler.named_tensors(), scheduler.largest_sum_bits, self.output_fracs, scheduler.output_layout)
        return Planned(image, hardware, *facts, self.filled())

    def filled(self) -> list[str]:
        """Return what is filled up where the budgets' hidden units lie apart."""
        found = []
        for block in sorted({self.block(node) for node in self.nodes} - {-1}):
            units, _ = self.units(block)
            sizes = [(end - start, -(end - start) % units.unit) for start, end in units.spans[:-1]]
            if any(zeros for _, zeros in sizes):
                parts = ", ".join(f"{size} + {zeros}" if zeros else str(size) for size, zeros in sizes)
                found.append(
                    f"block {block}: hidden units of smaller budgets are filled up to multiples of {units.unit} with "
                    f"zeros, which are computed too ({parts})"
                )
        return found

    def take_linear(self, node: Any, name: str) -> Any:
        """Return the held-back Linear that computes an input of `node`, which must be its only consumer."""
        linear = self.pending.pop(name, None)
        if linear is None or linear.class_name not in LINEAR or len(self.consumers(linear)) != 1:
            raise self.refuse(node, "without a Linear of its own before it")
        return linear

    def position(self, node: Any, place: int) -> None:
        embed = self.take_linear(node, node.inputs[0])
        if embed.inputs[0] not in self.inputs:
            raise self.refuse(embed, "before the positions")
        patches = self.scheduler.image(tuple(self.settings["grid"]), self.settings["patch"])
        prefix, patch = node.get_attr("n_prefix"), self.settings["patch"]
        weight, bias = _linear(embed)
        # From (colour, y, x) to (y, x, colour), as an image lies in memory.
        weight = weight.reshape(len(bias), 3, patch, patch).transpose(0, 2, 3, 1).reshape(len(bias), -1)
        tokens = self.scheduler.embed(embed.name, patches, weight, bias, prefix)
        table = _values(node, "table").reshape(node.get_attr("n_tok"), -1)
        self.tensors[node.outputs[0]] = self.scheduler.position(node.name, tokens, table, prefix)

    def norm(self, node: Any, place: int) -> None:
        # A norm before all blocks (CLIP) writes the residual stream itself.
        wide = not all(other.class_name in (*LINEAR, "VitMoE") for other in self.consumers(node))
        scale, bias = _values(node, "scale").ravel(), _values(node, "bias").ravel()
        x = self.stream(node, node.inputs[0])
        arguments = (scale, bias, node.get_attr("eps"), self.frac(node))
        fine = self.fine(node) and not wide
        self.tensors[node.outputs[0]] = self.scheduler.norm(node.name, x, *arguments, wide=wide, fine=fine)

    def stream(self, node: Any, name: str) -> Tensor:
        if name not in self.tensors:
            raise self.refuse(node, f"after {name}")
        return self.tensors[name]

    def gelu(self, node: Any, place: int) -> None:
        linear = self.take_linear(node, node.inputs[0])
        x, units = self.stream(linear, linear.inputs[0]), self.units(self.block(node))
        gelu = (self.frac(node, "input"), self.frac(node))
        arguments = (linear.name, x, *_linear(linear), 0, gelu, units, self.fine(node))
        self.tensors[node.outputs[0]] = self.scheduler.linear(*arguments)

    def attention(self, node: Any, place: int) -> None:
        linear = self.take_linear(node, node.inputs[0])
        fracs = np.array([self.frac(node, kind) for kind in ("query", "key", "value")])
        heads, frac = node.get_attr("n_head"), self.frac(node)
        qkv = self.scheduler.qkv(linear.name, self.stream(linear, linear.inputs[0]), *_linear(linear), fracs, heads)
        self.tensors[node.outputs[0]] = self.scheduler.attention(node.name, qkv, heads, frac, self.fine(node))

    def moe(self, node: Any, place: int) -> None:
        self.pending[node.outputs[0]] = node

    def add(self, node: Any, place: int) -> None:
        branches = [name for name in node.inputs if name in self.pending]
        others = [name for name in node.inputs if name in self.tensors]
        if len(branches) != 1 or len(others) != 1 or not self.tensors[others[0]].buffer.wide:
            raise self.refuse(node, "other than the residual stream plus a Linear or experts")
        if self.last_use[others[0]] != place:
            raise self.refuse(node, "whose residual is used again later")
        residual, branch = self.tensors[others[0]], self.pending.pop(branches[0])
        if self.left_out(branch):
            self.tensors[node.outputs[0]] = residual
            return
        x = self.stream(branch, branch.inputs[0])
        if branch.class_name == "VitMoE":
            self.tensors[node.outputs[0]] = self.experts(branch, x, residual)
        else:
            arguments = (branch.name, x, *_linear(branch), residual)
            # The second map of an MLP: its inputs are the hidden units.
            units = self.units(self.block(branch)) if branch.inputs[0] in self.activated else None
            frac = self.formats["layers"].get(branch.name, {}).get("stream")
            self.tensors[node.outputs[0]] = self.scheduler.linear_added(*arguments, units, frac)

    def experts(self, node: Any, x: Tensor, residual: Tensor) -> Tensor:
        sizes = {name: node.get_attr(name) for name in ("n_task", "n_exp", "n_hid", "n_dim")}
        R, E, H, D = sizes.values()
        shapes = ((R, E, D), (R, E), (E, H, D), (E, H), (E, D, H), (E, D))
        weights = {name: _values(node, name).reshape(shape) for name, shape in zip(MOE_WEIGHTS, shapes, strict=True)}
        hidden = (self.frac(node, "hidden"), self.frac(node, "active"))
        block = self.block(node)
        arguments = (weights, self.program["top_k"][block], self.frac(node, "logit"), hidden, residual)
        return self.scheduler.moe_added(node.name, x, *arguments, self.units(block), self.fine(node, "active"))

    def head(self, node: Any, place: int) -> None:
        if any(other.class_name == "VitPixelHead" for other in self.consumers(node)):
            self.pending[node.outputs[0]] = node
        else:
            normed, maps = self.head_maps(node)
            self.output_fracs = self.output_fracs_of(node)
            self.scheduler.head(node.name, normed, maps, self.output_fracs)

    def pixel_head(self, node: Any, place: int) -> None:
        head = self.pending.pop(node.inputs[0], None)
        if head is None:
            raise self.refuse(node, "without the heads' Linears before it")
        normed, maps = self.head_maps(head)
        channels = list(node.get_attr("channels"))
        weight, bias = _values(node, "weight").reshape(sum(channels), -1), _values(node, "bias").ravel()
        self.output_fracs = self.output_fracs_of(node)
        convs = list(zip(split_rows(weight, channels), split_rows(bias, channels), strict=True))
        names = {"columns": "n_column", "upscale": "n_scale", "unrectified": "n_unrectified"}
        pixels = {name: node.get_attr(attribute) for name, attribute in names.items()}
        features = (maps, self.output_fracs_of(head))
        fine = self.fine(head, "output0")
        self.scheduler.pixel_head(node.name, normed, features, (convs, self.output_fracs), **pixels, fine=fine)

    def output_fracs_of(self, node: Any) -> list[int]:
        return [self.frac(node, f"output{task}") for task in range(self.tasks)]

    def head_maps(self, node: Any) -> tuple[Tensor, Maps]:
        """Schedule the heads' LayerNorm; return its tokens, and the Linear of each task."""
        widths, dim = list(node.get_attr("widths")), node.get_attr("n_dim")
        x = self.stream(node, node.inputs[0])
        affine = (np.array(node.get_attr("scale")), np.zeros(dim))
        form = (node.get_attr("eps"), self.frac(node, "normed"))
        options = {"skip": node.get_attr("n_prefix"), "fine": self.fine(node, "normed")}
        normed = self.scheduler.norm(f"{node.name}.norm", x, *affine, *form, **options)
        weight, bias = _values(node, "weight").reshape(sum(widths), dim), _values(node, "bias").ravel()
        return normed, list(zip(split_rows(weight, widths), split_rows(bias, widths), strict=True))
