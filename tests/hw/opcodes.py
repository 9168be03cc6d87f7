"""For each opcode random instances, and a slow reference in whole numbers: what tests/hw/test_ops.py compares.

A new opcode is a function that makes instructions and one that executes one, and their row in OPCODES.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from m3vit.hw import arithmetic, isa
from m3vit.hw.hardware import Hardware, round_up
from m3vit.hw.isa import KEY_BLOCK, SCORE_BITS, SCORE_FRAC, Mode, Op
from m3vit.hw.program import Builder, Image, Memory, row_words
from m3vit.hw.tables import NORM_FRAC, PROB_FRAC

PIXELS = (12, 24)  # of the frame that every instance of IMAGE cuts up
TASKS = 2


class Bench:
    """Memories with random contents, and the file of instructions that work on them."""

    def __init__(self, hardware: Hardware, seed: int) -> None:
        self.h, self.rng = hardware, np.random.default_rng(seed)
        self.builder = Builder(hardware.weight_bits, hardware.act_bits)
        self.parts: dict[str, list[np.ndarray]] = {"narrow": [], "wide": []}
        self.output_size = 1

    def between(self, low: int, high: int) -> int:
        """Return a whole number from low to high."""
        return int(self.rng.integers(low, high + 1))

    def signed(self, bits: int, *size: int) -> np.ndarray:
        """Return signed numbers of `bits` bits, all sizes alike, with the extremes among them."""
        values = self.rng.integers(-(1 << bits - 1), 1 << bits - 1, size) >> self.rng.integers(0, bits, size)
        extreme = self.rng.choice([-(1 << bits - 1), (1 << bits - 1) - 1], size)
        return np.where(self.rng.random(size) < 0.02, extreme, values)

    def sized(self, most: int) -> int:
        """Return a whole number of the array's steps, up to `most` values."""
        return self.h.tile_in * self.between(1, most // self.h.tile_in)

    def low(self) -> int:
        """Return src_low or dst_low of an instruction: values of one byte, or of two where there are such."""
        return self.between(0, 1) * self.h.values(8) if self.h.two_bytes else 0

    def region(
        self, memory: str, rows: int, columns: int, values: np.ndarray | None = None, low: int = 0
    ) -> dict[str, int]:
        """Return offset and pitch of rows in a memory, which hold `values` or anything (0 in a last word's rest)."""
        unit, stored = self.h.tile_in, self.h.act_word if memory == "narrow" else 32
        places = 2 * round_up(columns, low) if low else columns
        pitch, gap = round_up(places, unit) + unit * self.between(0, 1), unit * self.between(0, 2)
        words = self.signed(self.h.act_bits if memory == "narrow" else 32, rows, pitch)
        if low:
            for column in range(columns, round_up(columns, low)):
                words[:, byte_places(column, low)] = 0
        elif values is None:
            words[:, columns : round_up(columns, self.h.values(stored))] = 0
        else:
            words[:, :columns] = values
        offset = sum(part.size for part in self.parts[memory]) + gap
        self.parts[memory] += [np.zeros(gap, np.int64), words.ravel()]
        return {"at": offset, "pitch": pitch}

    def src(self, memory: str, rows: int, columns: int, values: np.ndarray | None = None) -> dict[str, int]:
        """Return where an instruction reads; from narrow, also how many bytes its values have."""
        low = self.low() if memory == "narrow" else 0
        place = self.region(memory, rows, columns, values, low)
        return {"src": place["at"], "src_pitch": place["pitch"], **({"src_low": low} if memory == "narrow" else {})}

    def dst(self, memory: str, rows: int, columns: int, low: int = 0) -> dict[str, int]:
        if memory == "output":
            lanes = self.h.values(32)
            offset, pitch = (round_up(n, lanes) + lanes * self.between(0, 1) for n in (self.output_size, columns))
            self.output_size = offset + rows * pitch
            return {"dst": offset, "dst_pitch": pitch}
        place = self.region(memory, rows, columns, low=low)
        return {"dst": place["at"], "dst_pitch": place["pitch"], **({"dst_low": low} if low else {})}

    def linear_params(self, n_out: int) -> np.ndarray:
        """Return biases and shifts of n_out outputs: results from far beyond their format to nothing."""
        shifts = self.rng.integers(-17, 36, n_out)
        return row_words(self.signed(31, n_out), self.rng.integers(0, 12, n_out), shifts)

    def linear(self, section: str, n_out: int, n_in: int) -> dict[str, int]:
        """Put a linear map into the file."""
        bits = self.h.weight_bits if section == "weights" else 16
        weights = self.builder.put(section, self.signed(bits, n_out, n_in))
        return {"weights": weights, "params": self.builder.put("params", self.linear_params(n_out))}

    def gelu(self) -> dict[str, int]:
        bits = self.h.act_bits
        return {"gelu_in": self.between(0, bits + 6), "gelu_out": self.between(0, bits + 2)}

    def task(self) -> int:
        """Return the task of an instruction: all, or one."""
        return self.between(-1, TASKS - 1)

    def image(self, program: list[isa.Instruction]) -> Image:
        """Return the file."""
        narrow, wide = (sum(part.size for part in self.parts[name]) + 1 for name in ("narrow", "wide"))
        height, width = PIXELS
        return self.builder.build(program, Memory(narrow, wide, self.output_size, 3 * height * width, TASKS))

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the narrow and wide memory before a frame."""
        kind = np.int8 if self.h.act_bits <= 8 else np.int16
        narrow, wide = (np.concatenate([*self.parts[name], np.zeros(1, np.int64)]) for name in ("narrow", "wide"))
        return narrow.astype(kind), wide.astype(np.int32)


@dataclass
class Machine:
    """The accelerator's state for the references: memories in whole numbers, and what is counted."""

    image: Image
    narrow: np.ndarray
    wide: np.ndarray
    output: np.ndarray
    queue: list[list[tuple[int, int]]] = field(default_factory=list)  # (token, weight) of each expert
    routing: list[int] = field(default_factory=list)
    saturated: int = 0

    def hold(self, x: int, bits: int) -> int:
        """Return x held to signed bits."""
        low, high = -(1 << bits - 1), (1 << bits - 1) - 1
        self.saturated += not low <= x <= high
        return min(max(x, low), high)

    def hold_narrow(self, x: int, low: int) -> int:
        """Return x held to the bits of narrow values, or to two bytes, both from -128 to 127."""
        if not low:
            return self.hold(x, self.image.act_bits)
        least, most = -128 * 256, 127 * 256 + 127
        self.saturated += not least <= x <= most
        return min(max(x, least), most)

    def narrowed(self, x: int, gelu_in: int, gelu_out: int, low: int) -> int:
        """Return x as a narrow value, after GELU unless gelu_in < 0."""
        x = self.hold_narrow(x, low)
        if gelu_in < 0:
            return x
        raw = int(arithmetic.gelu_raw(np.array(x), gelu_in))
        return self.hold_narrow(shifted(raw, arithmetic.gelu_frac(gelu_in) - gelu_out), low)

    def values(self, at: int, count: int, low: int) -> list[int]:
        """Return narrow values from a place on."""
        if not low:
            return [int(value) for value in self.narrow[at : at + count]]
        pairs = [self.narrow[[at + place for place in byte_places(n, low)]].tolist() for n in range(count)]
        return [256 * high + rest for high, rest in pairs]

    def put(self, at: int, values: list[int], low: int) -> None:
        """Write narrow values from a place on."""
        for n, value in enumerate(values):
            if not low:
                self.narrow[at + n] = value
                continue
            high = next(high for high in range(-128, 128) if -128 <= value - 256 * high <= 127)
            for place, byte in zip(byte_places(n, low), (high, value - 256 * high), strict=True):
                self.narrow[at + place] = byte

    def sums(self, section: str, weights: int, params: int, x: list[int], n_out: int) -> list[int]:
        """Return the rounded sums of a linear map for one token."""
        found = []
        for o in range(n_out):
            row = getattr(self.image, section)[weights + o * len(x) : weights + (o + 1) * len(x)].tolist()
            bias, shifts = self.image.params[params + 2 * o : params + 2 * o + 2].tolist()
            total = sum(a * b for a, b in zip(x, row, strict=True)) + (bias << (shifts >> 8))
            found.append(shifted(total, (shifts & 255) - 64))
        return found


def byte_places(n: int, low: int) -> tuple[int, int]:
    """Return where value n of a row has its high and its low byte: words of `low` places take turns."""
    word, lane = divmod(n, low)
    return 2 * word * low + lane, (2 * word + 1) * low + lane


def shifted(x: int, shift: int) -> int:
    """Return x * 2^-shift, rounded half up."""
    return x + (1 << shift - 1) >> shift if shift > 0 else x << -shift


# --- image and position ---------------------------------------------------------------------------------------------


def make_image(b: Bench) -> Iterator[isa.Instruction]:
    height, width = PIXELS
    for patch in (p for p in (1, 2, 3, 4, 6, 12) if 3 * p % b.h.pixels == 0):
        rows, n_in = height * width // patch**2, 3 * patch**2
        place = b.dst("narrow", rows, n_in)
        yield isa.Patches(task=b.task(), rows=rows, n_in=n_in, patch=patch, columns=width // patch, **place)


def run_image(i: isa.Patches, m: Machine, pixels: np.ndarray) -> None:
    for t in range(i.rows):
        y, x = t // i.columns * i.patch, t % i.columns * i.patch
        patch = pixels[y : y + i.patch, x : x + i.patch].astype(np.int64) - 128
        m.narrow[i.dst + t * i.dst_pitch :][: i.n_in] = patch.ravel()


def make_position(b: Bench) -> Iterator[isa.Instruction]:
    rows, n_out = b.between(1, 40), b.sized(48)
    params = b.builder.put("params", b.signed(32, rows, n_out))
    place = b.dst("wide", rows, n_out)
    yield isa.Position(task=b.task(), rows=rows, n_out=n_out, params=params, prefix=b.between(0, min(rows, 3)), **place)


def run_position(i: isa.Position, m: Machine, pixels: np.ndarray) -> None:
    for t in range(i.rows):
        for d in range(i.n_out):
            place = i.dst + t * i.dst_pitch + d
            before = 0 if t < i.prefix else int(m.wide[place])
            m.wide[place] = m.hold(before + int(m.image.params[i.params + t * i.n_out + d]), 32)


# --- linear maps ----------------------------------------------------------------------------------------------------


def make_linear(b: Bench) -> Iterator[isa.Instruction]:
    # Where tiles are folded, those after the first.
    rows, n_in, n_out = b.between(1, 80), b.sized(b.h.max_in), b.between(1, 70) + b.h.tile_out * b.h.folded
    for mode in (Mode.NARROW, Mode.WIDE, Mode.RESIDUAL, Mode.OUTPUT):
        memory = {Mode.NARROW: "narrow", Mode.OUTPUT: "output"}.get(mode, "wide")
        gelu = b.gelu() if mode == Mode.NARROW and b.rng.random() < 0.6 else {}
        to = b.dst(memory, rows, n_out, b.low() if mode == Mode.NARROW else 0)
        places = {**b.src("narrow", rows, n_in), **to, **b.linear("weights", n_out, n_in)}
        yield isa.Linear(task=b.task(), rows=rows, n_in=n_in, n_out=n_out, mode=mode, **places, **gelu)


def run_linear(i: isa.Linear | isa.Gate, m: Machine, pixels: np.ndarray) -> None:
    section = "gates" if isinstance(i, isa.Gate) else "weights"
    for t in range(i.rows):
        x = m.values(i.src + t * i.src_pitch, i.n_in, i.src_low)
        place = i.dst + t * i.dst_pitch
        sums = m.sums(section, i.weights, i.params, x, i.n_out)
        if i.mode == Mode.NARROW:
            assert isinstance(i, isa.Linear)
            m.put(place, [m.narrowed(y, i.gelu_in, i.gelu_out, i.dst_low) for y in sums], i.dst_low)
            continue
        for o, y in enumerate(sums):
            if i.mode == Mode.OUTPUT:
                m.output[place + o] = m.hold(y, 32)
            else:
                m.wide[place + o] = m.hold(y + (int(m.wide[place + o]) if i.mode == Mode.RESIDUAL else 0), 32)


def make_gate(b: Bench) -> Iterator[isa.Instruction]:
    rows, n_in, n_out = b.between(1, 80), b.sized(b.h.max_in), b.between(1, 40)
    places = {**b.src("narrow", rows, n_in), **b.dst("wide", rows, n_out), **b.linear("gates", n_out, n_in)}
    yield isa.Gate(task=b.task(), rows=rows, n_in=n_in, n_out=n_out, **places)


# --- LayerNorm ------------------------------------------------------------------------------------------------------


def make_norm(b: Bench) -> Iterator[isa.Instruction]:
    for mode in (Mode.NARROW, Mode.WIDE):
        rows, n = b.between(1, 40), b.between(1, b.h.max_dim)
        values = b.signed(32, rows, n) >> b.rng.integers(0, 31, (rows, 1))
        values[b.between(0, rows - 1)] = b.between(-5000, 5000)  # the variance is 0
        biases = round_up(n, b.h.tile_in)
        table = np.concatenate([np.pad(b.signed(18, n), (0, biases - n)), b.signed(31, n)])
        to = b.dst("narrow", rows, n, b.low()) if mode == Mode.NARROW else b.dst("wide", rows, n)
        places = {**b.src("wide", rows, n, values), **to}
        scaling = {"shift": b.between(2, 28), "bias_shift": b.between(0, 6), "sqrt_dim": round(n**0.5 * 2**16)}
        scaling["biases"] = biases
        sizes = {"rows": rows, "n_in": n, "n_out": n, "eps": max(1, int(2.0 ** b.rng.uniform(0, 60)))}
        yield isa.Norm(task=b.task(), mode=mode, params=b.builder.put("params", table), **sizes, **places, **scaling)


def run_norm(i: isa.Norm, m: Machine, pixels: np.ndarray) -> None:
    scales, biases = (m.image.params[i.params + start :][: i.n_in].tolist() for start in (0, i.biases))
    for t in range(i.rows):
        x = m.wide[i.src + t * i.src_pitch :][: i.n_in].tolist()
        d = [i.n_in * value - sum(x) for value in x]
        bits = 0  # that occur in a magnitude
        for value in d:
            bits |= abs(value)
        drop = max(max(bits, 1).bit_length() - 24, 0)
        d = [shifted(value, drop) for value in d]
        squares = (i.eps >> 2 * drop if drop < 32 else 0) + sum(value * value for value in d)
        mantissa, exponent = (int(part[0]) for part in arithmetic.rsqrt(np.array([squares])))
        factor, found = shifted(mantissa * i.sqrt_dim, 16), []
        for c, value in enumerate(d):
            y = shifted(value * factor, 20 + exponent - NORM_FRAC)
            z = shifted(y * scales[c] + (biases[c] << i.bias_shift), i.shift)
            found.append(m.hold_narrow(z, i.dst_low) if i.mode == Mode.NARROW else m.hold(z, 32))
        if i.mode == Mode.NARROW:
            m.put(i.dst + t * i.dst_pitch, found, i.dst_low)
        else:
            m.wide[i.dst + t * i.dst_pitch :][: i.n_in] = found


# --- attention ------------------------------------------------------------------------------------------------------


def make_attention(b: Bench) -> Iterator[isa.Instruction]:
    bits = b.h.act_bits
    # Scores of every size, and scores of which most are beyond SCORE_BITS.
    for least, most in ((bits - 8, 2 * bits - 4), (2 * bits - 36, 2 * bits - 32)):
        heads, rows = b.between(1, 3), int(b.rng.choice([1, 20, 64, 65, 130]))
        n_out = heads * b.sized(b.h.max_head)
        qkv = b.region("narrow", rows, 3 * n_out)  # of one byte each
        places = {"src": qkv["at"], "src_pitch": qkv["pitch"], **b.dst("narrow", rows, n_out, b.low())}
        shifts = {"score_shift": b.between(least, most), "value_shift": b.between(-4, 6)}
        shifts["weight_drop"] = PROB_FRAC - 8 if b.h.packed else b.between(0, 1) * b.between(0, 9)
        yield isa.Attention(task=b.task(), rows=rows, n_in=3 * n_out, n_out=n_out, heads=heads, **places, **shifts)


def run_attention(i: isa.Attention, m: Machine, pixels: np.ndarray) -> None:
    width = i.n_out // i.heads
    rows = np.stack([m.narrow[i.src + t * i.src_pitch :][: i.n_in] for t in range(i.rows)])
    qkv = rows.reshape(i.rows, 3, i.heads, width)
    for head in range(i.heads):
        q, k, v = (qkv[:, part, head] for part in range(3))
        for t in range(i.rows):
            scores = [shifted(int(product), i.score_shift) for product in k @ q[t]]
            total, sums = _context(m, scores, v, i.weight_drop)
            mantissa, shift = (int(part[0]) for part in arithmetic.reciprocal(np.array([total])))
            found = [shifted(shifted(value, 8) * mantissa, 20 + shift - 8 + i.value_shift) for value in sums]
            place = i.dst + t * i.dst_pitch + head * width * (2 if i.dst_low else 1)
            m.put(place, [m.hold_narrow(y, i.dst_low) for y in found], i.dst_low)


def _context(m: Machine, scores: list[int], v: np.ndarray, drop: int) -> tuple[int, list[int]]:
    """Return the sums of weights and of weighted values of one query, block by block."""
    top, total, sums = 0, 0, [0] * v.shape[1]
    for start in range(0, len(scores), KEY_BLOCK):
        block = [m.hold(score, SCORE_BITS) for score in scores[start : start + KEY_BLOCK]]
        ceiling = -(-max(block) // (1 << SCORE_FRAC))
        if start == 0:
            top = ceiling
        elif ceiling > top:
            total, *sums = (shifted(value, min(ceiling - top, 60)) for value in (total, *sums))
            top = ceiling
        below = np.array([(top << SCORE_FRAC) - score for score in block])
        weights = arithmetic.exp2_neg(below, SCORE_FRAC, PROB_FRAC - drop) << drop
        total += int(weights.sum())
        added = weights @ v[start : start + KEY_BLOCK]
        sums = [a + int(b) for a, b in zip(sums, added, strict=True)]
    return total, sums


# --- router and experts ---------------------------------------------------------------------------------------------


def make_route(b: Bench) -> Iterator[isa.Instruction]:
    yield _route(b, b.between(1, 60), int(b.rng.choice([1, 4, 9, 33])), b.task())


def _route(b: Bench, rows: int, experts: int, task: int) -> isa.Route:
    frac = b.between(14, 24)
    logits = (b.rng.normal(0, 2, (rows, experts)).round(1) * 2.0**frac).astype(np.int64)  # with ties
    top_k = b.between(1, min(experts, b.h.max_top))
    place = b.src("wide", rows, experts, logits)
    return isa.Route(task=task, rows=rows, n_in=experts, top_k=top_k, logit_frac=frac, **place)


def run_route(i: isa.Route, m: Machine, pixels: np.ndarray) -> None:
    m.queue = [[] for _ in range(i.n_in)]
    for t in range(i.rows):
        logits = m.wide[i.src + t * i.src_pitch :][: i.n_in].tolist()
        order = sorted(range(i.n_in), key=lambda e: (-logits[e], e))[: i.top_k]
        below = np.array([max(logits) - logit for logit in logits])
        weights = arithmetic.exp2_neg(below, i.logit_frac, PROB_FRAC).tolist()
        mantissa, shift = (int(part[0]) for part in arithmetic.reciprocal(np.array([sum(weights)])))
        for expert in order:
            m.queue[expert].append((t, shifted(weights[expert] * mantissa, 20 + shift - PROB_FRAC)))
        m.routing += order


def make_experts(b: Bench) -> Iterator[isa.Instruction]:
    """With the route that fills their queues: both for all tasks, since queues outlast an instruction."""
    rows, n_in, n_out, experts = b.between(1, 70), b.sized(48), b.sized(48), b.between(1, 6)
    yield _route(b, rows, experts, -1)
    maps = [(n_out, n_in), (n_in, n_out)]
    packed: dict[str, list[np.ndarray]] = {"weights": [], "params": []}
    for _ in range(experts):
        packed["weights"].append(np.concatenate([b.signed(b.h.weight_bits, *shape).ravel() for shape in maps]))
        packed["params"].append(np.concatenate([b.linear_params(shape[0]) for shape in maps]))
    gap = b.h.tile_in * b.between(0, 1)
    files: dict[str, int] = {}
    for name, parts in packed.items():
        files[name] = b.builder.put(name, np.stack([np.pad(part, (0, gap)) for part in parts]))
        files[f"{name}_step"] = len(parts[0]) + gap
    places = {**b.src("narrow", rows, n_in), **b.dst("wide", rows, n_in)}
    low = b.low()
    hidden = b.region("narrow", rows, n_out, low=low)
    inner = {"experts": experts, "hidden": hidden["at"], "hidden_pitch": hidden["pitch"], "dst_low": low}
    yield isa.Experts(rows=rows, n_in=n_in, n_out=n_out, **files, **places, **inner, **b.gelu())


def run_experts(i: isa.Experts, m: Machine, pixels: np.ndarray) -> None:
    for e, tokens in enumerate(m.queue):
        weights, params = i.weights + e * i.weights_step, i.params + e * i.params_step
        for place, (t, score) in enumerate(tokens):
            x = m.values(i.src + t * i.src_pitch, i.n_in, i.src_low)
            first = m.sums("weights", weights, params, x, i.n_out)
            hidden = [m.narrowed(y, i.gelu_in, i.gelu_out, i.dst_low) for y in first]
            m.put(i.hidden + place * i.hidden_pitch, hidden, i.dst_low)
            second = m.sums("weights", weights + i.n_in * i.n_out, params + 2 * i.n_out, hidden, i.n_in)
            for c, y in enumerate(second):
                at = i.dst + t * i.dst_pitch + c
                m.wide[at] = m.hold(int(m.wide[at]) + shifted(m.hold(y, 32) * score, PROB_FRAC), 32)


# --- convolution of heads -------------------------------------------------------------------------------------------


def make_conv(b: Bench) -> Iterator[isa.Instruction]:
    for upscale in (1, 2, 3):
        lines, columns, features = b.between(1, 5), b.between(1, 5), b.sized(b.h.max_in // isa.TAPS)
        tokens, n_in, n_out = lines * columns, isa.TAPS * features, b.between(1, 40)
        places = b.src("narrow", tokens, upscale**2 * features) | b.linear("weights", n_out, n_in)
        pitch = round_up(n_out, b.h.values(32)) + b.h.values(32) * b.between(0, 1)
        places |= b.dst("output", tokens, upscale**2 * pitch) | {"pixel_pitch": pitch}
        sizes = {"rows": tokens * upscale**2, "n_in": n_in, "n_out": n_out, "columns": columns, "upscale": upscale}
        yield isa.Conv(task=b.task(), **sizes, **places)


def run_conv(i: isa.Conv, m: Machine, pixels: np.ndarray) -> None:
    s, features = i.upscale, i.n_in // 9
    width, height = i.columns * s, i.rows // (i.columns * s)

    def place(y: int, x: int) -> tuple[int, int]:
        """Return the token that holds a pixel, and which one of its pixels that is."""
        return y // s * i.columns + x // s, y % s * s + x % s

    for y in range(height):
        for x in range(width):
            taps: list[int] = []
            for row in (y - 1, y, y + 1):
                for column in (x - 1, x, x + 1):
                    if 0 <= row < height and 0 <= column < width:
                        token, pixel = place(row, column)
                        at = i.src + token * i.src_pitch + pixel * features * (2 if i.src_low else 1)
                        taps += [max(value, 0) for value in m.values(at, features, i.src_low)]
                    else:
                        taps += [0] * features
            token, pixel = place(y, x)
            for o, value in enumerate(m.sums("weights", i.weights, i.params, taps, i.n_out)):
                m.output[i.dst + token * i.dst_pitch + pixel * i.pixel_pitch + o] = m.hold(value, 32)


class Opcode(NamedTuple):
    """How an opcode is tested: random instances, and a reference that executes one."""

    make: Callable[[Bench], Iterator[isa.Instruction]]
    run: Callable[[Any, Machine, np.ndarray], None]


OPCODES = {
    Op.IMAGE: Opcode(make_image, run_image),
    Op.LINEAR: Opcode(make_linear, run_linear),
    Op.GATE: Opcode(make_gate, run_linear),
    Op.POSITION: Opcode(make_position, run_position),
    Op.NORM: Opcode(make_norm, run_norm),
    Op.ATTENTION: Opcode(make_attention, run_attention),
    Op.ROUTE: Opcode(make_route, run_route),
    Op.EXPERTS: Opcode(make_experts, run_experts),
    Op.CONV: Opcode(make_conv, run_conv),
}
