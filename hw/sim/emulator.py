"""The accelerator in torch: runs the program of a weights file with the same integers, word for word, as the C++.

Integers are held in float64, in which every sum is exact: below 2^ACCUMULATOR_BITS, checked when a file is opened. What
multiplies may use narrower types, as far as its sums are exact in these (m3vit.hw.sim.linear).

Shapes: N tokens, D channels, E experts, K experts a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m3vit.errors import InputError
from m3vit.hw import arithmetic, isa
from m3vit.hw.isa import BIAS_SHIFT_LIMIT, CONTEXT_DROP, ROW_WORDS, SCORE_BITS, Mode
from m3vit.hw.program import Image
from m3vit.hw.sim.attention import attend
from m3vit.hw.sim.linear import Linear, rounded
from m3vit.hw.sim.threads import each
from m3vit.hw.tables import NORM_FRAC, PROB_FRAC


class FrameResult(NamedTuple):
    """One frame: outputs int32 [n] as in the output memory, expert ids [N, K] of each MoE layer, and how many values
    were beyond their format, by instruction."""

    outputs: np.ndarray
    expert_ids: list[np.ndarray]
    saturated: dict[int, int]


@dataclass
class _State:
    """Memories, the queues and what was observed; narrow and wide are flat float64 tensors of integers."""

    narrow: Tensor
    wide: Tensor
    output: Tensor
    experts: np.ndarray
    scores: np.ndarray
    expert_ids: list[np.ndarray] = field(default_factory=list)
    saturated: dict[int, int] = field(default_factory=dict)
    counting: Lock = field(default_factory=Lock)  # threads count what is beyond at once

    def add_saturated(self, pc: int, count: int) -> None:
        """Count values that were beyond their format in the instruction at pc."""
        with self.counting:
            self.saturated[pc] = self.saturated.get(pc, 0) + count

    def copy(self) -> "_State":
        """Return a state that can go on by itself."""
        tensors = (self.narrow.clone(), self.wide.clone(), self.output.clone())
        return _State(*tensors, self.experts, self.scores, list(self.expert_ids), dict(self.saturated))


def _rows(memory: Tensor, offset: int, pitch: int, rows: int, columns: int) -> Tensor:
    """Return a [rows, columns] view of a flat memory."""
    return memory.as_strided((rows, columns), (pitch, 1), offset)


def _values(memory: Tensor, offset: int, pitch: int, rows: int, columns: int, low: int) -> Tensor:
    """Return the narrow values [rows, columns] of a flat memory; low: src_low of what reads them, as their columns are
    whole words then."""
    if not low:
        return _rows(memory, offset, pitch, rows, columns)
    words = memory.as_strided((rows, columns // low, 2, low), (pitch, 2 * low, low, 1), offset)
    return (words[:, :, 0] * 256 + words[:, :, 1]).reshape(rows, columns)


def _put_values(memory: Tensor, offset: int, pitch: int, values: Tensor, low: int) -> None:
    """Write narrow values [rows, columns] into a flat memory, as two bytes each if `low` (dst_low) is not 0; what they
    leave of the last word of a row is then 0."""
    rows, columns = values.shape
    if not low:
        _rows(memory, offset, pitch, rows, columns).copy_(values)
        return
    filled = F.pad(values, (0, -columns % low)).view(rows, -1, low)
    words = memory.as_strided((*filled.shape[:2], 2, low), (pitch, 2 * low, low, 1), offset)
    words[:, :, 0] = torch.floor((filled + 128) / 256)
    words[:, :, 1] = filled - 256 * words[:, :, 0]


def _inputs(state: _State, i: isa.Linear | isa.Gate | isa.Experts) -> Tensor:
    """Return the inputs [rows, n_in] of a linear map."""
    return _values(state.narrow, i.src, i.src_pitch, i.rows, i.n_in, i.src_low)


@cache
def _gelu_table(bits: int, frac_in: int, frac_out: int, two: bool) -> tuple[Tensor, Tensor]:
    """GELU of every `bits`-bit value, from the lowest, saturated (two: to two bytes); and where it was beyond that."""
    x = np.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=np.int64)
    raw = arithmetic.shift_round(arithmetic.gelu_raw(x, frac_in), arithmetic.gelu_frac(frac_in) - frac_out)
    held = arithmetic.hold_two_bytes(raw) if two else arithmetic.saturate(raw, bits)
    return torch.from_numpy(held.astype(np.float64)), torch.from_numpy(held != raw)


class Emulator:
    """Runs frames by one program of a weights file: that of `budget`, by its number.

    Opening it prepares the weights; frames do not affect one another.
    """

    def __init__(self, image: Image, budget: int = 0) -> None:
        self.image, self.program = image, image.program_of(budget)
        self.bits, self.wide_bits = image.act_bits, image.wide_bits
        self.prepared: dict[int, Any] = {pc: self._prepare(i) for pc, i in enumerate(self.program)}
        self.first_task_step = next((pc for pc, i in enumerate(self.program) if i.task >= 0), len(self.program))

    @classmethod
    def open(cls, path: Path, budget: int = 0) -> "Emulator":
        """Open a weights file, or raise InputError."""
        return cls(Image.read(path), budget)

    # --- weights ----------------------------------------------------------------------------------------------------

    def _linear(self, weights: np.ndarray, at: int, params: int, n_in: int, n_out: int, low: int) -> Linear:
        matrix = weights[at : at + n_in * n_out].reshape(n_out, n_in)
        words = self.image.params[params : params + ROW_WORDS * n_out].reshape(n_out, ROW_WORDS).astype(np.int64)
        bias = words[:, 0] << (words[:, 1] >> 8 & BIAS_SHIFT_LIMIT - 1)
        shift = (words[:, 1] & 255) - isa.SHIFT_OFFSET
        return Linear(matrix, bias, shift, self.bits, two=low > 0)

    def _prepare(self, i: isa.Instruction) -> Any:
        image = self.image
        match i:
            case isa.Linear() | isa.Gate() | isa.Conv():
                weights = image.gates if isinstance(i, isa.Gate) else image.weights
                return self._linear(weights, i.weights, i.params, i.n_in, i.n_out, i.src_low)
            case isa.Experts():
                return [self._expert(i, e) for e in range(i.experts)]
            case isa.Position():
                table = image.params[i.params : i.params + i.rows * i.n_out].reshape(i.rows, i.n_out)
                return torch.from_numpy(table).double()
            case isa.Norm():
                starts = (i.params, i.params + (i.biases or i.n_in))
                scale, bias = (torch.from_numpy(image.params[at : at + i.n_in]).double() for at in starts)
                return scale, bias * 2.0**i.bias_shift
        return None

    def _expert(self, i: isa.Experts, e: int) -> tuple[Linear, Linear]:
        """Return both maps of an expert."""
        at, params = i.weights + e * i.weights_step, i.params + e * i.params_step
        first = self._linear(self.image.weights, at, params, i.n_in, i.n_out, i.src_low)
        at, params = at + i.n_in * i.n_out, params + ROW_WORDS * i.n_out
        return first, self._linear(self.image.weights, at, params, i.n_out, i.n_in, i.dst_low)

    # --- frames -----------------------------------------------------------------------------------------------------

    def run(self, pixels: np.ndarray, task: int) -> FrameResult:
        """Run one frame uint8 [H, W, 3] for one task (an unknown one counts as 0)."""
        return self.run_tasks(pixels, [task])[0]

    @torch.inference_mode()
    def run_tasks(self, pixels: np.ndarray, tasks: list[int]) -> list[FrameResult]:
        """Run one frame for several tasks; what no task changes runs once."""
        memory = self.image.memory
        if pixels.dtype != np.uint8 or pixels.size != memory.image:
            raise InputError(f"a frame is {pixels.dtype} {pixels.shape}: give uint8 with {memory.image} values")
        start = self._start()
        self._run(start, range(self.first_task_step), -1, pixels)
        results = []
        for place, task in enumerate(tasks):
            state = start if place == len(tasks) - 1 else start.copy()
            wanted = task if 0 <= task < memory.tasks else 0
            self._run(state, range(self.first_task_step, len(self.program)), wanted, pixels)
            outputs = state.output.numpy().astype(np.int32)
            results.append(FrameResult(outputs, state.expert_ids, state.saturated))
        return results

    @torch.inference_mode()
    def state_after(
        self, pixels: np.ndarray, task: int, steps: int, start: tuple[np.ndarray, np.ndarray] | None = None
    ) -> _State:
        """Return the memories after the first `steps` instructions of a frame; `start`: narrow and wide before it."""
        state = self._start()
        if start is not None:
            state.narrow, state.wide = (torch.from_numpy(words.astype(np.float64)) for words in start)
        self._run(state, range(steps), task, pixels)
        return state

    @torch.inference_mode()
    def steps(self, pixels: np.ndarray, task: int) -> Iterator[tuple[int, "_State"]]:
        """Yield each instruction that a frame of a task runs, and the memories after it: one state, which goes on."""
        state = self._start()
        for pc, instruction in enumerate(self.program):
            if instruction.task in (-1, task):
                self._step(state, pc, instruction, pixels)
                yield pc, state

    def _start(self) -> _State:
        memory, empty = self.image.memory, np.zeros((0, 0), np.int64)
        narrow, wide, output = (torch.zeros(n, dtype=torch.float64) for n in memory[:3])
        return _State(narrow, wide, output, empty, empty)

    def _run(self, state: _State, steps: range, task: int, pixels: np.ndarray) -> None:
        for pc in steps:
            i = self.program[pc]
            if i.task < 0 or i.task == task:
                self._step(state, pc, i, pixels)

    def _step(self, state: _State, pc: int, i: isa.Instruction, pixels: np.ndarray) -> None:
        match i:
            case isa.Patches():
                p, columns = i.patch, i.columns
                grid = pixels.reshape(i.rows // columns, p, columns, p, 3).transpose(0, 2, 1, 3, 4)
                patches = torch.from_numpy(np.ascontiguousarray(grid).reshape(i.rows, i.n_in))
                _rows(state.narrow, i.dst, i.dst_pitch, i.rows, i.n_in).copy_(patches).sub_(isa.PIXEL_ZERO)
            case isa.Linear():
                self._store(state, pc, i, self.prepared[pc](_inputs(state, i)))
            case isa.Gate():
                y = self.prepared[pc](_inputs(state, i))
                _rows(state.wide, i.dst, i.dst_pitch, *y.shape).copy_(self._hold(state, pc, y, self.wide_bits))
            case isa.Conv():
                self._conv(state, pc, i)
            case isa.Position():
                rows = _rows(state.wide, i.dst, i.dst_pitch, i.rows, i.n_out)
                rows[: i.prefix] = 0
                rows.copy_(self._hold(state, pc, rows + self.prepared[pc], self.wide_bits))
            case isa.Norm():
                self._norm(state, pc, i)
            case isa.Attention():
                self._attention(state, pc, i)
            case isa.Route():
                self._route(state, i)
            case isa.Experts():
                self._experts(state, pc, i)
            case _:
                raise AssertionError(f"no emulation of {i}")

    def _hold(self, state: _State, pc: int, x: Tensor, bits: int, two: bool = False) -> Tensor:
        """Return x held to `bits` signed bits, or (two) to what two bytes hold, in place; count what was beyond."""
        low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
        if two:
            low, high = -(2.0**15), float(isa.TWO_BYTES_MOST)
        if x.numel():
            least, most = x.aminmax()
            if least < low or most > high:
                state.add_saturated(pc, int(((x < low) | (x > high)).sum()))
                x.clamp_(low, high)
        return x

    def _narrow(self, state: _State, pc: int, x: Tensor, i: isa.Linear | isa.Experts) -> Tensor:
        """Return x as narrow values, after GELU unless gelu_in < 0."""
        two, bits = i.dst_low > 0, 16 if i.dst_low else self.bits
        x = self._hold(state, pc, x, self.bits, two)
        if i.gelu_in < 0:
            return x
        table, beyond = _gelu_table(bits, i.gelu_in, i.gelu_out, two)
        places = x.add_(1 << (bits - 1)).to(torch.int32).view(-1)
        if beyond.any() and (count := int(beyond[places].sum())):
            state.add_saturated(pc, count)
        return table.index_select(0, places).view(x.shape)

    def _store(self, state: _State, pc: int, i: isa.Linear, y: Tensor) -> None:
        if i.mode == Mode.NARROW:
            _put_values(state.narrow, i.dst, i.dst_pitch, self._narrow(state, pc, y, i), i.dst_low)
            return
        memory, bits = (state.output, 32) if i.mode == Mode.OUTPUT else (state.wide, self.wide_bits)
        rows = _rows(memory, i.dst, i.dst_pitch, *y.shape)
        if i.mode == Mode.RESIDUAL:
            y.add_(rounded(rows.clone(), 2.0**-i.rescale) if i.rescale else rows)
        rows.copy_(self._hold(state, pc, y, bits))

    def _conv(self, state: _State, pc: int, i: isa.Conv) -> None:
        s, columns, tokens = i.upscale, i.columns, i.rows // i.upscale**2
        features = i.n_in // isa.TAPS
        x = _values(state.narrow, i.src, i.src_pitch, tokens, s * s * features, i.src_low)
        x = x.reshape(tokens, s * s, features).clone()
        x[..., i.unrectified :].clamp_(min=0)
        lines = x.reshape(-1, columns, s, s, features).transpose(1, 2).reshape(-1, columns * s, features)
        padded = F.pad(lines, (0, 0, 1, 1, 1, 1))
        around = padded.unfold(0, 3, 1).unfold(1, 3, 1).permute(0, 1, 3, 4, 2)  # [lines, columns, 3, 3, features]
        y = self._hold(state, pc, self.prepared[pc](around.reshape(-1, i.n_in)), 32)
        by_token = y.reshape(-1, s, columns, s, i.n_out).transpose(1, 2).reshape(tokens, s * s, i.n_out)
        pitches = (i.dst_pitch, i.pixel_pitch or i.n_out, 1)
        state.output.as_strided(by_token.shape, pitches, i.dst).copy_(by_token)

    def _norm(self, state: _State, pc: int, i: isa.Norm) -> None:
        scale, bias = self.prepared[pc]
        x = _rows(state.wide, i.src, i.src_pitch, i.rows, i.n_in)
        d = x * i.n_in - x.sum(dim=1, keepdim=True)
        largest = d.abs().amax(dim=1).clamp_(min=1).long().numpy()
        drop = np.maximum(arithmetic.exponent_of(largest) - 23, 0)
        d = rounded(d, torch.from_numpy(np.ldexp(1.0, -drop))[:, None])
        eps = np.where(drop < 32, np.right_shift(np.int64(i.eps), np.minimum(2 * drop, 63)), 0)
        whole = d.long()
        mantissa, shift = arithmetic.rsqrt((whole * whole).sum(dim=1).numpy() + eps)
        factor = arithmetic.shift_round(mantissa * i.sqrt_dim, 16).astype(np.float64)
        y = d.mul_(torch.from_numpy(factor)[:, None])
        y = rounded(y, torch.from_numpy(np.ldexp(1.0, NORM_FRAC - 20 - shift))[:, None])
        z = rounded(y.mul_(scale).add_(bias), 2.0**-i.shift)
        if i.mode == Mode.NARROW:
            z = self._hold(state, pc, z, self.bits, i.dst_low > 0)
            _put_values(state.narrow, i.dst, i.dst_pitch, z, i.dst_low)
        else:
            z = self._hold(state, pc, z, self.wide_bits)
            _rows(state.wide, i.dst, i.dst_pitch, i.rows, i.n_in).copy_(z)

    def _attention(self, state: _State, pc: int, i: isa.Attention) -> None:
        rows, heads, dim = i.rows, i.heads, i.n_out
        qkv = _rows(state.narrow, i.src, i.src_pitch, rows, 3 * dim).reshape(rows, 3, heads, dim // heads)
        q, k, v = qkv.permute(1, 2, 3, 0)  # [heads, width, rows]

        def hold(scores: Tensor) -> Tensor:
            return self._hold(state, pc, scores, SCORE_BITS)

        sums = attend(q, k, v, i.score_shift, i.weight_drop, self.bits, hold)
        mantissa, shift = arithmetic.reciprocal(sums[:, -1:].long().numpy())
        product = rounded(sums[:, :-1], 2.0**-CONTEXT_DROP).long().numpy() * mantissa  # may be over 53 bits
        y = torch.from_numpy(arithmetic.shift_round(product, 20 + shift - CONTEXT_DROP + i.value_shift))
        y = self._hold(state, pc, y.double(), self.bits, i.dst_low > 0)
        _put_values(state.narrow, i.dst, i.dst_pitch, y.permute(2, 0, 1).reshape(rows, dim), i.dst_low)

    @staticmethod
    def _route(state: _State, i: isa.Route) -> None:
        logits = _rows(state.wide, i.src, i.src_pitch, i.rows, i.n_in).long().numpy()
        order = np.argsort(-logits, axis=1, kind="stable")[:, : i.top_k]  # ties: the lowest id
        best = logits.max(axis=1, keepdims=True)
        weights = arithmetic.exp2_neg(best - logits, i.logit_frac, PROB_FRAC)
        mantissa, shift = arithmetic.reciprocal(weights.sum(axis=1, keepdims=True))
        chosen = np.take_along_axis(weights, order, axis=1)
        state.experts = order
        state.scores = arithmetic.shift_round(chosen * mantissa, 20 + shift - PROB_FRAC)
        state.expert_ids.append(order)

    def _experts(self, state: _State, pc: int, i: isa.Experts) -> None:
        x = _inputs(state, i)
        rows = _rows(state.wide, i.dst, i.dst_pitch, i.rows, i.n_in)
        chosen = [np.nonzero(state.experts == e) for e in range(i.experts)]

        def of_expert(e: int) -> Tensor:
            token, slot = chosen[e]
            first, second = self.prepared[pc][e]
            hidden = self._narrow(state, pc, first(x[torch.from_numpy(token)]), i)
            y = self._hold(state, pc, second(hidden), 32)
            scores = torch.from_numpy(state.scores[token, slot].astype(np.float64))[:, None]
            return rounded(y.mul_(scores), 2.0**-PROB_FRAC)

        active = [e for e in range(i.experts) if len(chosen[e][0])]
        size = state.experts.size // max(len(active), 1) * i.n_in
        for e, y in zip(active, each(lambda place: of_expert(active[place]), len(active), size), strict=True):
            places = torch.from_numpy(chosen[e][0])
            rows[places] = self._hold(state, pc, y.add_(rows[places]), self.wide_bits)
