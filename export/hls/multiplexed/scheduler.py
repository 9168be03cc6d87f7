"""From layers to programs: instructions, quantised weights, and where every tensor lies (buffer liveness).

A scheduler is told the layers in the order they run; of several programs, the layers of one after those of the other.
Weights are named by their layer and stored once, whatever programs use them. Tensors are narrow (inputs of products) or
wide (the residual stream, logits); a tensor's buffer is taken from its first use to its last, and others reuse its
place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3vit.export.hls.multiplexed.words import Floats, LinearWords, linear_words, norm_words, rounded
from m3vit.hw import isa
from m3vit.hw.hardware import PACKED_PROB_FRAC, PORT_BITS, round_up, row_unit, split_inputs, stored_bits
from m3vit.hw.isa import PIXEL_ZERO, ROW_WORDS, SCORE_FRAC, Instruction, Mode
from m3vit.hw.network import PARAMS_UNIT
from m3vit.hw.ops import GATE_BITS, needs
from m3vit.hw.output_memory import OutputLayout
from m3vit.hw.program import Builder, Image, Memory, allocate, program_words
from m3vit.hw.tables import NORM_FRAC, PROB_FRAC
from m3vit.hw.weights_file import ALIGNMENT

PIXEL_FRAC = 8
PARAM_BITS = 32
BLOCK = re.compile(r"blocks_(\d+)_")  # begins the names of a block's layers
Fracs = NDArray[np.int64] | int
Maps = list[tuple[Floats, Floats]]  # the weight [C, D] and bias [C] of each task


@dataclass
class Buffer:
    """A place in narrow or wide memory, used by steps `first` to `last`."""

    wide: bool
    size: int
    first: int
    last: int


@dataclass
class Tensor:
    """rows x columns in a buffer, from its row `start` on; `frac` of all columns, or (q, k, v) of attention's input.

    pitch: from one row to the next. groups: the columns lie in so many groups of `group` places, the first ones of each
    filled (heads of attention begin at words of a port); 0: side by side. offset: of the columns in a row. low: values
    have 16 bits, as two bytes that lie so far apart (isa.Instruction), and take two places each; 0: one place.
    """

    buffer: Buffer
    rows: int
    columns: int
    frac: Fracs
    pitch: int
    start: int = 0
    groups: int = 0
    group: int = 0
    offset: int = 0
    low: int = 0

    @property
    def places(self) -> int:
        """Places of a row that hold its columns, those between groups included; of two bytes each counts once."""
        return self.groups * self.group or self.columns


def spread(values: Floats, count: int, place: int, axis: int) -> Floats:
    """Return values with zeros after each `count` along an axis, so that each group of them takes `place`."""
    groups = values.shape[axis] // count
    apart = values.reshape(*values.shape[:axis], groups, count, *values.shape[axis + 1 :])
    padded = np.pad(apart, [(0, place - count if at == axis + 1 else 0) for at in range(apart.ndim)])
    return padded.reshape(*values.shape[:axis], groups * place, *values.shape[axis + 1 :])


@dataclass
class _Step:
    """An instruction whose fields `places` are still offsets within buffers."""

    instruction: Instruction
    places: dict[str, Buffer] = field(default_factory=dict)


class Units(NamedTuple):
    """Hidden units of an MLP, or of each expert, in parts that lie apart: part p has units ends[p - 1] to ends[p].

    A program with fewer units has the first parts alone, so every number of units that a program has is an end. Each
    part but the last is filled up with zeros to `unit`.
    """

    ends: tuple[int, ...]
    unit: int

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first unit of each part, and that after its last."""
        return list(zip((0, *self.ends[:-1]), self.ends, strict=True))

    @property
    def places(self) -> list[int]:
        """Where each part begins, filled up; and after these where the last one ends, which is not."""
        sizes = [round_up(end - start, self.unit) for start, end in self.spans[:-1]]
        last = self.spans[-1][1] - self.spans[-1][0]
        return [int(place) for place in np.cumsum([0, *sizes, last])]

    def parts(self, count: int) -> int:
        """Return how many parts hold so many units."""
        return self.ends.index(count) + 1

    def filled(self, values: Floats, axis: int) -> Floats:
        """Return values with zeros where parts are filled up."""
        found = []
        for (start, end), place, following in zip(self.spans, self.places, self.places[1:], strict=False):
            part = values.take(range(start, end), axis=axis)
            gap = [(0, 0)] * values.ndim
            gap[axis] = (0, following - place - (end - start))
            found.append(np.pad(part, gap))
        return np.concatenate(found, axis=axis)


class Scheduler:
    """Collects the programs of one model. `wide_frac`: of every wide tensor but logits and outputs; wide_bits: of all
    but outputs.

    port_bits: of the ports that will read it: rows begin at their words, inputs of products fill steps of the array.
    """

    def __init__(
        self,
        tasks: int,
        weight_bits: int,
        act_bits: int,
        wide_frac: int,
        port_bits: int = PORT_BITS,
        wide_bits: int = 32,
    ) -> None:
        act_word = stored_bits(act_bits)
        self.unit, self.lanes = row_unit(stored_bits(weight_bits), act_word, port_bits), port_bits // act_word
        self.output_lanes = port_bits // PARAM_BITS
        self.tasks, self.weight_bits, self.act_bits, self.wide_frac = tasks, weight_bits, act_bits, wide_frac
        self.steps: list[_Step] = []
        self.buffers: list[Buffer] = []
        self.ended: list[tuple[list[_Step], list[Buffer]]] = []  # programs before
        self.stored: dict[str, dict[str, Any]] = {}  # fields of what is in the image, by name
        self.builder = Builder(weight_bits, act_bits, wide_bits)
        self.tensors: list[dict[str, Any]] = []  # of the weight file, for weights_map.json
        self.output_size = self.image_size = 0
        self.output_layout = OutputLayout(0, 1, [], [])
        self.largest_sum_bits = 0

    # --- bookkeeping ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin another program, of the same layers or some of them."""
        self.ended.append((self.steps, self.buffers))
        self.steps, self.buffers = [], []

    def _tensor(
        self,
        wide: bool,
        rows: int,
        columns: int,
        frac: Fracs,
        start: int = 0,
        groups: int = 0,
        group: int = 0,
        fine: bool = False,
    ) -> Tensor:
        """Return a new tensor that lies after `start` rows of its buffer; fine: its values have two bytes."""
        step, pitch = len(self.steps), round_up(groups * group or columns, self.unit) * (2 if fine else 1)
        buffer = Buffer(wide, (start + rows) * pitch, step, step)
        self.buffers.append(buffer)
        return Tensor(buffer, rows, columns, frac, pitch, start, groups, group, low=self.lanes if fine else 0)

    def _add(self, instruction: Instruction, src: Tensor | None, dst: Tensor | None, **others: Buffer) -> None:
        """Append an instruction that reads src and writes dst."""
        places = dict(others)
        for name, tensor in (("src", src), ("dst", dst)):
            if tensor is not None:
                setattr(instruction, name, tensor.start * tensor.pitch + tensor.offset)
                setattr(instruction, f"{name}_pitch", tensor.pitch)
                if tensor.low:
                    setattr(instruction, f"{name}_low", tensor.low)
                places[name] = tensor.buffer
        for buffer in places.values():
            buffer.last = len(self.steps)
        self.steps.append(_Step(instruction, places))

    def _note(self, name: str, section: str, offset: int, shape: tuple[int, ...], **facts: Any) -> None:
        self.tensors.append({"name": name, "section": section, "offset": offset, "shape": list(shape), **facts})

    def _words(self, name: str, weight: Floats, bias: Floats, x: Tensor, y_frac: Fracs, **options: Any) -> LinearWords:
        bits = options.pop("bits", self.weight_bits)
        assert isinstance(x.frac, int)
        if x.groups:
            weight = spread(weight, x.columns // x.groups, x.group, 1)
        weight = np.pad(weight, ((0, 0), (0, round_up(weight.shape[1], self.unit) - weight.shape[1])))
        words = linear_words(weight, bias, bits, (16 if x.low else self.act_bits, x.frac), y_frac, name, **options)
        self.largest_sum_bits = max(self.largest_sum_bits, words.sum_bits)
        return words

    def _store(
        self,
        name: str,
        weight: Floats,
        bias: Floats,
        x: Tensor,
        y_frac: Fracs,
        section: str = "weights",
        **options: Any,
    ) -> dict[str, Any]:
        """Put a linear map into the image, unless it is there; return the instruction's fields."""
        if name in self.stored:
            return self.stored[name]
        words = self._words(name, weight, bias, x, y_frac, **options)
        weights, params = self.builder.put(section, words.weights), self.builder.put("params", words.params)
        shape = words.weights.shape
        self._note(f"{name}.weight", section, weights, shape, frac_min=int(words.fracs.min()), rows_have_fracs=True)
        self._note(f"{name}.rows", "params", params, (shape[0], ROW_WORDS))
        return self.stored.setdefault(name, {"n_in": words.inputs, "weights": weights, "params": params})

    def _table(self, name: str, values: np.ndarray, **facts: Any) -> int:
        """Put a table into params; return where it lies."""
        if name not in self.stored:
            self.stored[name] = {"params": self.builder.put("params", values)}
            self._note(name, "params", self.stored[name]["params"], values.shape, **facts)
        return int(self.stored[name]["params"])

    # --- layers -----------------------------------------------------------------------------------------------------

    def image(self, grid: tuple[int, int], patch: int) -> Tensor:
        """Patches of the image, in the order (y, x, colour), pixel - 128."""
        rows, columns = grid
        patches, width = rows * columns, 3 * patch * patch
        self.image_size = patches * width
        dst = self._tensor(False, patches, width, PIXEL_FRAC)
        self._add(isa.Patches(rows=patches, n_in=width, patch=patch, columns=columns), None, dst)
        return dst

    def embed(self, name: str, x: Tensor, weight: Floats, bias: Floats, prefix: int) -> Tensor:
        """Linear on patches; returns all tokens, of which the first `prefix` are not set yet (see position)."""
        dst = self._tensor(True, x.rows, len(weight), self.wide_frac, prefix)
        self._wide(name, x, weight, bias, dst, Mode.WIDE, missing=PIXEL_ZERO)
        return Tensor(dst.buffer, x.rows + prefix, len(weight), self.wide_frac, dst.pitch)

    def position(self, name: str, x: Tensor, table: Floats, prefix: int) -> Tensor:
        """Prefix tokens and position embedding, in place: table [N, D]."""
        words = rounded(table, self.wide_frac, PARAM_BITS)
        words = np.pad(words, ((0, 0), (0, round_up(x.columns, PARAMS_UNIT) - x.columns)))
        params = self._table(f"{name}.table", words, frac=self.wide_frac)
        self._add(isa.Position(rows=x.rows, n_out=words.shape[1], params=params, prefix=prefix), None, x)
        return x

    def norm(
        self,
        name: str,
        x: Tensor,
        scale: Floats,
        bias: Floats,
        eps: float,
        frac: int,
        wide: bool = False,
        skip: int = 0,
        fine: bool = False,
    ) -> Tensor:
        """LayerNorm of the tokens after the first `skip`, to narrow tokens of `frac` (fine: and 16 bits), or to wide
        ones."""
        assert isinstance(x.frac, int)
        rows, n = x.rows - skip, x.columns
        out_frac = self.wide_frac if wide else frac
        words = norm_words(scale, bias, eps, x.frac, out_frac, NORM_FRAC)
        biases = round_up(n, PARAMS_UNIT)
        params = self._table(f"{name}.scale_bias", np.pad(words.params.reshape(2, n), ((0, 0), (0, biases - n))))
        source = Tensor(x.buffer, rows, n, x.frac, x.pitch, x.start + skip)
        dst = self._tensor(wide, rows, n, out_frac, fine=fine)
        names = ("shift", "bias_shift", "sqrt_dim", "eps")
        fields = {name: getattr(words, name) for name in names}
        mode = Mode.WIDE if wide else Mode.NARROW
        self._add(isa.Norm(rows=rows, n_in=n, n_out=n, mode=mode, params=params, biases=biases, **fields), source, dst)
        return dst

    def linear(
        self,
        name: str,
        x: Tensor,
        weight: Floats,
        bias: Floats,
        frac: Fracs,
        gelu: tuple[int, int] | None = None,
        units: tuple[Units, int] | None = None,
        fine: bool = False,
    ) -> Tensor:
        """Linear to narrow tokens of `frac` (fine: and 16 bits); `gelu` = (fraction before, after): followed by GELU.

        units: how the outputs lie, and how many of them this program has (default: all).
        """
        count = len(weight)
        if units:
            weight, bias = (units[0].filled(values, 0) for values in (weight, bias))
            part = units[0].parts(units[1])
            count = units[0].places[part - 1] + units[1] - units[0].spans[part - 1][0]
        fields = self._store(name, weight, bias, x, gelu[0] if gelu else self._per_row(frac, len(weight)))
        dst = self._tensor(False, x.rows, count, gelu[1] if gelu else frac, fine=fine)
        fields = fields | ({"gelu_in": gelu[0], "gelu_out": gelu[1]} if gelu else {})
        self._add(isa.Linear(mode=Mode.NARROW, rows=x.rows, n_out=count, **fields), x, dst)
        return dst

    @staticmethod
    def _per_row(frac: Fracs, rows: int) -> Fracs:
        """Return the fraction of each output: those of q, k and v hold for a third of them each."""
        return frac if isinstance(frac, int) else np.repeat(frac, rows // len(frac))

    def linear_added(
        self,
        name: str,
        x: Tensor,
        weight: Floats,
        bias: Floats,
        residual: Tensor,
        units: tuple[Units, int] | None = None,
        frac: int | None = None,
    ) -> Tensor:
        """Linear, added to the residual stream in place; units: as of `linear`, of its inputs. frac: of the stream from
        here on (default: as before)."""
        assert isinstance(residual.frac, int)
        now = residual.frac if frac is None else frac
        added = replace(residual, frac=now)
        self._wide(name, x, weight, bias, added, Mode.RESIDUAL, units, rescale=residual.frac - now)
        return added

    def _wide(
        self,
        name: str,
        x: Tensor,
        weight: Floats,
        bias: Floats,
        dst: Tensor,
        mode: Mode,
        units: tuple[Units, int] | None = None,
        rescale: int = 0,
        **options: Any,
    ) -> None:
        """Linear to wide tokens; one of many inputs in parts, each added to those before, so that tiles stay small.
        rescale: fractional bits that what is there loses."""
        if x.groups:
            weight, x = spread(weight, x.columns // x.groups, x.group, 1), replace(x, groups=0, columns=x.places)
        parts, several = split_inputs(round_up(x.columns, self.unit), self.unit), False
        if units:
            weight, places = units[0].filled(weight, 1), units[0].places
            several, count = len(units[0].ends) > 1, units[0].parts(units[1])
            sizes = [end - start for start, end in pairwise(places[: count + 1])]
            parts = [one for size in sizes for one in split_inputs(round_up(size, self.unit), self.unit)]
        start = 0
        for place, size in enumerate(parts):
            part = weight[:, start : start + size]
            suffix = f".part{place}" if several or len(parts) > 1 else ""
            fields = self._store(name + suffix, part, bias * (place == 0), x, dst.frac, **options)
            shape: dict[str, Any] = {"mode": Mode.RESIDUAL if place else mode, "rows": x.rows, "n_out": len(weight)}
            shape["rescale"] = rescale * (place == 0)
            self._add(isa.Linear(**shape, **fields), replace(x, offset=start * (2 if x.low else 1)), dst)
            start += size

    def qkv(self, name: str, x: Tensor, weight: Floats, bias: Floats, fracs: Fracs, heads: int) -> Tensor:
        """Linear to (q | k | v), each head at words of its own: what it leaves of the last one is 0."""
        width = len(weight) // (3 * heads)
        group = round_up(width, self.lanes)
        weight, bias = (spread(values, width, group, 0) for values in (weight, bias))
        y = self.linear(name, x, weight, bias, fracs)
        return replace(y, columns=3 * heads * width, groups=3 * heads, group=group)

    def attention(self, name: str, qkv: Tensor, heads: int, frac: int, fine: bool = False) -> Tensor:
        """Self-attention of (q | k | v) tokens to narrow tokens of `frac`; fine: of 16 bits."""
        assert not isinstance(qkv.frac, int)
        q_frac, k_frac, v_frac = (int(value) for value in qkv.frac)
        dim = qkv.places // 3
        dst = self._tensor(False, qkv.rows, qkv.columns // 3, frac, groups=heads, group=dim // heads, fine=fine)
        fields = {"heads": heads, "score_shift": q_frac + k_frac - SCORE_FRAC, "value_shift": v_frac - frac}
        # Softmax weights of 9 bits, where two products of 8-bit values are to share a multiplier.
        fields["weight_drop"] = PROB_FRAC - PACKED_PROB_FRAC if max(self.weight_bits, self.act_bits) <= 8 else 0
        self._add(isa.Attention(rows=qkv.rows, n_in=3 * dim, n_out=dim, **fields), qkv, dst)
        return dst

    def moe_added(
        self,
        name: str,
        x: Tensor,
        weights: dict[str, Floats],
        top_k: int | Sequence[int],
        logit_frac: int,
        hidden: tuple[int, int],
        residual: Tensor,
        units: tuple[Units, int] | None = None,
        fine: bool = False,
    ) -> Tensor:
        """Router and experts, added to the residual stream in place.

        weights: router_w [R, E, D] and router_b [R, E] (logits in base 2), w1 [E, H, D], b1, w2 [E, D, H], b2;
        `hidden`: fractions of the hidden channels before and after GELU; fine: these have 16 bits. top_k: of each task.
        units: as of `linear`.
        """
        gates, biases = weights["router_w"], weights["router_b"]
        tasks, experts, _ = gates.shape
        logits = self._tensor(True, x.rows, experts, logit_frac)
        same = tasks > 1 and all(np.array_equal(gates[0], g) for g in gates) and not np.ptp(biases, axis=0).any()
        for task in range(1 if same or tasks == 1 else tasks):
            gate = (gates[task], biases[task], x, logit_frac)
            fields = self._store(f"{name}.gate{task}", *gate, "gates", bits=GATE_BITS)
            only = -1 if same or tasks == 1 else task
            self._add(isa.Gate(task=only, rows=x.rows, n_out=experts, **fields), x, logits)
        counts = [top_k] * tasks if isinstance(top_k, int) else list(top_k)
        for task in range(tasks) if len(set(counts)) > 1 else [-1]:
            route = isa.Route(task=task, rows=x.rows, n_in=experts, top_k=counts[task], logit_frac=logit_frac)
            self._add(route, logits, None)
        w1, b1, w2, b2 = (weights[key] for key in ("w1", "b1", "w2", "b2"))
        how, count = units or (Units((w1.shape[1],), self.unit), w1.shape[1])
        for part, (start, end) in enumerate(how.spans[: how.parts(count)]):
            own = (w1[:, start:end], b1[:, start:end], w2[:, :, start:end], b2 * (part == 0))
            self._experts(f"{name}.part{part}" if len(how.ends) > 1 else name, x, own, hidden, residual, fine)
        return residual

    def _experts(
        self, name: str, x: Tensor, weights: Sequence[Floats], hidden: tuple[int, int], residual: Tensor, fine: bool
    ) -> None:
        """Some hidden units of all experts: w1 [E, H, D], b1 [E, H], w2 [E, D, H], b2 [E, D]."""
        w1, b1, w2, b2 = weights
        experts, width, dim = w1.shape
        filled, inputs = round_up(width, self.unit), round_up(dim, self.unit)  # also outputs of one map, of the other
        w1, b1 = (np.pad(values, [(0, 0), (0, filled - width), (0, 0)][: values.ndim]) for values in (w1, b1))
        w2, b2 = (np.pad(values, [(0, 0), (0, inputs - dim), (0, 0)][: values.ndim]) for values in (w2, b2))
        w2 = np.pad(w2, ((0, 0), (0, 0), (0, filled - width)))
        inner = self._tensor(False, x.rows, filled, hidden[1], fine=fine)
        stored = self.stored.get(name)
        fields = dict(stored or self._store_experts(name, x, inner, (w1, b1, w2, b2), (hidden[0], residual.frac)))
        fields |= {"gelu_in": hidden[0], "gelu_out": hidden[1], "experts": experts, "hidden_pitch": inner.pitch}
        fields["dst_low"] = inner.low
        shape: dict[str, Any] = {"rows": x.rows, "n_in": inputs, "n_out": filled}
        self._add(isa.Experts(**shape, **fields), x, residual, hidden=inner.buffer)

    def _store_experts(
        self, name: str, x: Tensor, inner: Tensor, weights: Sequence[Floats], fracs: tuple[int, Fracs]
    ) -> dict[str, Any]:
        """Put experts into the image; return the instruction's fields. fracs: of both maps' results."""
        w1, b1, w2, b2 = weights
        packed: dict[str, list[np.ndarray]] = {"weights": [], "params": []}
        for e in range(len(w1)):
            first = self._words(f"{name}.expert{e}.w1", w1[e], b1[e], x, fracs[0])
            second = self._words(f"{name}.expert{e}.w2", w2[e], b2[e], inner, fracs[1])
            packed["weights"].append(np.concatenate([first.weights.ravel(), second.weights.ravel()]))
            packed["params"].append(np.concatenate([first.params, second.params]))
        fields = self.stored.setdefault(name, {})
        for section, parts in packed.items():
            size = -(-len(parts[0]) // ALIGNMENT) * ALIGNMENT
            fields[section] = self.builder.put(section, np.concatenate([np.pad(p, (0, size - len(p))) for p in parts]))
            fields[f"{section}_step"] = size
            self._note(f"{name}.experts", section, fields[section], (len(w1), size))
        return fields

    def head(self, name: str, x: Tensor, maps: Maps, fracs: list[int]) -> None:
        """The Linear of each task to the output memory; task r's outputs have fracs[r]."""
        pitch = self._lay_out(x.rows, [len(weight) for weight, _ in maps]).token_pitch
        for task, ((weight, bias), frac) in enumerate(zip(maps, fracs, strict=True)):
            shape: dict[str, Any] = {"rows": x.rows, "n_out": len(weight), "mode": Mode.OUTPUT, "dst_pitch": pitch}
            only = task if len(maps) > 1 else -1
            fields = self._store(f"{name}.{task}", weight, bias, x, frac)
            self._add(isa.Linear(task=only, **shape, **fields), x, None)

    def _lay_out(self, tokens: int, counts: list[int], pixels: int = 1) -> OutputLayout:
        """Lay out the output memory: of each task `counts` outputs for each of a token's pixels."""
        pitches = [round_up(count, self.output_lanes) for count in counts]
        self.output_layout = OutputLayout(pixels * max(pitches), pixels, counts, pitches)
        self.output_size = tokens * self.output_layout.token_pitch
        return self.output_layout

    def pixel_head(
        self,
        name: str,
        x: Tensor,
        features: tuple[Maps, list[int]],
        outputs: tuple[Maps, list[int]],
        columns: int,
        upscale: int,
        unrectified: int = 0,
        fine: bool = False,
    ) -> None:
        """The Linear of each task, and the convolution of what it gives, to the output memory.

        features, outputs: maps and the fractions of what they give; fine: features have 16 bits. A convolution's
        weights are [C, 9 M], in the order [3, 3, M]. columns: tokens side by side; upscale: pixels of a token and side;
        unrectified: a pixel's first features, which pass by the ReLU.
        """
        (maps, fracs), (kernels, output_fracs) = features, outputs
        layout = self._lay_out(x.rows, [len(kernel) for kernel, _ in kernels], upscale**2)
        for task, ((weight, bias), (kernel, kernel_bias)) in enumerate(zip(maps, kernels, strict=True)):
            only = task if len(maps) > 1 else -1
            # The features of a pixel fill steps of the array too: what is added to them is 0.
            count = len(weight) // upscale**2
            filled = round_up(count, self.unit)
            weight, bias = (spread(values, count, filled, 0) for values in (weight, bias))
            kernel = spread(kernel, count, filled, 1)
            pixels = self._tensor(False, x.rows, len(weight), fracs[task], fine=fine)
            fields = self._store(f"{name}.features{task}", weight, bias, x, fracs[task])
            shape: dict[str, Any] = {"rows": x.rows, "n_out": len(weight), "mode": Mode.NARROW}
            self._add(isa.Linear(task=only, **shape, **fields), x, pixels)
            fields = self._store(f"{name}.{task}", kernel, kernel_bias, pixels, output_fracs[task])
            shape = {"rows": x.rows * upscale**2, "n_out": len(kernel)}
            shape |= {"columns": columns, "upscale": upscale, "unrectified": unrectified}
            shape |= {"dst_pitch": layout.token_pitch, "pixel_pitch": layout.pixel_pitches[task]}
            self._add(isa.Conv(task=only, **shape, **fields), pixels, None)

    @property
    def limits(self) -> dict[str, int]:
        """What the programs so far need of the hardware: fields of Hardware."""
        return needs([step.instruction for steps, _ in self.programs for step in steps])

    @property
    def programs(self) -> list[tuple[list[_Step], list[Buffer]]]:
        """The steps and buffers of each program so far."""
        return [*self.ended, (self.steps, self.buffers)]

    # --- the end ----------------------------------------------------------------------------------------------------

    def build(self) -> Image:
        """Place the buffers and return the image: the memories are those of the program that needs most."""
        sizes = {False: 0, True: 0}
        for steps, buffers in self.programs:
            for wide in (False, True):
                chosen = [buffer for buffer in buffers if buffer.wide == wide]
                offsets, size = allocate([(b.size, b.first, b.last) for b in chosen])
                sizes[wide] = max(sizes[wide], size)
                places = {id(buffer): offset for buffer, offset in zip(chosen, offsets, strict=True)}
                for step in steps:
                    for name, buffer in step.places.items():
                        if buffer.wide == wide:
                            setattr(step.instruction, name, getattr(step.instruction, name) + places[id(buffer)])
        memory = Memory(sizes[False], sizes[True], self.output_size, self.image_size, self.tasks)
        first, *others = [[step.instruction for step in steps] for steps, _ in self.programs]
        return self.builder.build(first, memory, *others)

    def named_tensors(self) -> list[dict[str, Any]]:
        """Return where each tensor lies in its section of the weight file: name, section, offset (elements), shape."""
        room = program_words(sum(len(steps) + 1 for steps, _ in self.programs) - 1)
        return [{**t, "offset": t["offset"] + (room if t["section"] == "params" else 0)} for t in self.tensors]
