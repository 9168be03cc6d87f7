"""Each opcode with its engine, and what both cost: memories, multipliers, cycles and bytes. No torch.

Cycles are those of the loops of hw/include/engine as they are written: trips times II, and stages of a dataflow region
side by side (side_by_side, ping_pong); a test counts trips and entries of loops in the C++. What a loop costs beside
its trips (depth of the pipeline, latency of memory) no one has measured: Timing has what is assumed of it, LOOPS
nothing, which makes a lower bound. Bytes are those that C-simulation counts (M3VIT_COUNT); a test compares them,
instruction by instruction. Fetching the instruction itself is `fetch` and FETCH_BYTES, also for one that is skipped.

`queue` is the number of tokens of each expert that has any: what the router chose, which only EXPERTS depends on.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from m3vit.hw.hardware import Hardware
from m3vit.hw.isa import (
    ACCUMULATOR_BITS,
    INSTRUCTIONS,
    KEY_BLOCK,
    ROW_WORDS,
    TAPS,
    WORDS,
    Attention,
    Conv,
    Experts,
    Gate,
    Instruction,
    Linear,
    Mode,
    Norm,
    Op,
    Patches,
    Position,
    Route,
)
from m3vit.hw.tables import PROB_FRAC, TABLES

PORTS = ("image", "weights", "gates", "params", "narrow_read", "narrow_write", "wide_read", "wide_write", "output")
WORD_BYTES = 4  # of params, wide and output
GATE_BITS = 16  # routing is discrete and gates are few: they keep 16 bits whatever the weights have
FETCH_BYTES = {"params": WORDS * WORD_BYTES}
TABLE_BITS = max(value.bit_length() for table in TABLES for value in table.values())
TABLE_ENTRIES = max(table.intervals for table in TABLES) + 1

Queue = Sequence[int]
Bytes = dict[str, int]


class Timing(NamedTuple):
    """Cycles that each entry of a pipelined loop costs beside its trips; reads, writes: if it begins bursts of them."""

    depth: int = 0
    read: int = 0
    write: int = 0

    def loop(self, trips: int, ii: int = 1, reads: bool = False, writes: bool = False) -> int:
        """Return the cycles of one pass of a pipelined loop."""
        return trips * ii + self.depth + reads * self.read + writes * self.write


LOOPS = Timing()  # trips alone


class OnChip(NamedTuple):
    """Memories of one shape: how many, bits a word, words; "any": where they fit best, by depth."""

    name: str
    copies: int
    bits: int
    words: int
    kind: str = "any"  # or bram, or uram


class Engine(NamedTuple):
    """A part of the hardware, of which there is one: its memories and multipliers for a configuration."""

    memories: Callable[[Hardware], list[OnChip]]
    multipliers: Callable[[Hardware], int] = lambda h: 0


class OpSpec(NamedTuple):
    """An opcode: its fields, the engine that it runs on (a key of ENGINES), its cycles and the bytes by port.

    needs: the least buffers of Hardware for an instruction, but for max_rows. macs: multiply-accumulates.
    """

    instruction: type[Instruction]
    engine: str
    cycles: Callable[[Any, Hardware, Queue, Timing], int]
    traffic: Callable[[Any, Hardware, Queue], Bytes]
    needs: Callable[[Any], dict[str, int]] = lambda i: {}
    macs: Callable[[Any, Queue], int] = lambda i, queue: 0


def side_by_side(times: int, *stages: int) -> int:
    """Return the cycles of a dataflow region in a loop: the slowest stage sets the pace, the others fill it once."""
    return sum(stages) + (times - 1) * max(stages) if times else 0


def ping_pong(loads: list[int], computes: list[int]) -> int:
    """Return the cycles of steps of which each is computed while the next is loaded."""
    following = [*loads[1:], 0]
    return sum(loads[:1]) + sum(max(compute, load) for compute, load in zip(computes, following, strict=False))


def _tables(copies: int) -> OnChip:
    return OnChip("look-up tables", copies, TABLE_BITS, TABLE_ENTRIES)


# --- image and position: m3vit_engine_norm.h ------------------------------------------------------------------------


def image_cycles(i: Patches, h: Hardware, queue: Queue, t: Timing) -> int:
    """read_image: one pixel value an iteration, a loop for each line of a patch."""
    return i.rows * i.patch * t.loop(3 * i.patch, reads=True, writes=True)


def image_traffic(i: Patches, h: Hardware, queue: Queue = ()) -> Bytes:
    return {"image": i.rows * i.n_in, "narrow_write": i.rows * i.n_in * h.act_word // 8}


def position_cycles(i: Position, h: Hardware, queue: Queue, t: Timing) -> int:
    """position: one channel an iteration."""
    return i.rows * t.loop(i.n_out, reads=True, writes=True)


def position_traffic(i: Position, h: Hardware, queue: Queue = ()) -> Bytes:
    row = i.n_out * WORD_BYTES
    return {"params": i.rows * row, "wide_read": (i.rows - i.prefix) * row, "wide_write": i.rows * row}


# --- LayerNorm: m3vit_engine_norm.h ---------------------------------------------------------------------------------


def norm_memories(h: Hardware) -> list[OnChip]:
    return [
        OnChip("a row, in and out, double for dataflow", 2, 32, h.max_dim),
        OnChip("differences from the mean", 3, 48, h.max_dim),
        OnChip("scales, biases", 2, 32, h.max_dim),
        _tables(2),  # both of 1/sqrt
    ]


def norm_cycles(i: Norm, h: Hardware, queue: Queue, t: Timing) -> int:
    """layernorm: Load at II=2, then by token read_wide, normalise_row (Sum, Centre, Square, Scale), write_norm."""
    stages = (t.loop(i.n_in, reads=True), 4 * t.loop(i.n_in), t.loop(i.n_in, writes=True))
    return t.loop(i.n_in, 2, reads=True) + side_by_side(i.rows, *stages)


def norm_traffic(i: Norm, h: Hardware, queue: Queue = ()) -> Bytes:
    values = i.rows * i.n_in
    to_narrow = {"narrow_write": values * h.act_word // 8}
    written = to_narrow if i.mode == Mode.NARROW else {"wide_write": values * WORD_BYTES}
    return {"params": 2 * i.n_in * WORD_BYTES, "wide_read": values * WORD_BYTES, **written}


def norm_needs(i: Norm) -> dict[str, int]:
    return {"max_dim": i.n_in}


# --- attention: m3vit_engine_attention.h ----------------------------------------------------------------------------


def attention_memories(h: Hardware) -> list[OnChip]:
    head = h.max_head * h.act_word
    return [
        OnChip("keys and values, ping and pong", 4, head, KEY_BLOCK),
        OnChip("queries", 1, head, h.query_block),
        OnChip("context, total and maximum", 1, (h.max_head + 2) * ACCUMULATOR_BITS, h.query_block),
        _tables(2),  # 2^-x, 1/x
    ]


def attention_steps(i: Attention, h: Hardware) -> Iterator[tuple[int, int, bool, bool]]:
    """Yield (queries, keys, first, last block of keys) of each step of one head, as next_step does."""
    for query in range(0, i.rows, h.query_block):
        for key in range(0, i.rows, KEY_BLOCK):
            sizes = (min(h.query_block, i.rows - query), min(KEY_BLOCK, i.rows - key))
            yield *sizes, key == 0, key + KEY_BLOCK >= i.rows


def attention_cycles(i: Attention, h: Hardware, queue: Queue, t: Timing) -> int:
    """attention: load_keys of the next step beside compute_step of this one, in which Weight follows Score."""
    width = i.n_out // i.heads
    steps = i.heads * list(attention_steps(i, h))
    moved, padded = t.loop(width, reads=True), t.loop(h.max_head - width)
    loads = [keys * (2 * moved + padded) for _, keys, _, _ in steps]  # k, v, and the rest of max_head for both
    computes = [
        queries * (first * (moved + padded) + 2 * t.loop(keys) + last * t.loop(width, writes=True))
        for queries, keys, first, last in steps  # the query; Score, Weight; Divide
    ]
    return ping_pong(loads, computes)


def attention_traffic(i: Attention, h: Hardware, queue: Queue = ()) -> Bytes:
    read = sum(2 * keys + first * queries for queries, keys, first, _ in attention_steps(i, h)) * i.n_out
    return {"narrow_read": read * h.act_word // 8, "narrow_write": i.rows * i.n_out * h.act_word // 8}


def attention_macs(i: Attention, queue: Queue) -> int:
    return 2 * i.rows**2 * i.n_out


def attention_needs(i: Attention) -> dict[str, int]:
    return {"max_head": i.n_out // i.heads}


# --- router: m3vit_engine_router.h ----------------------------------------------------------------------------------


def route_memories(h: Hardware) -> list[OnChip]:
    return [
        OnChip("choices, queues", 2, 16 + PROB_FRAC + 1, h.max_rows * h.max_top),
        OnChip("counts, starts, active experts", 3, 16, h.max_experts),
        _tables(2),  # 2^-x, 1/x
    ]


def route_cycles(i: Route, h: Hardware, queue: Queue, t: Timing) -> int:
    """route: Reset; by token Logit, Softmax, Choose; Start; Place at II=2."""
    token = t.loop(i.n_in, reads=True) + t.loop(i.n_in) + t.loop(i.top_k)
    return 2 * t.loop(i.n_in) + i.rows * (token + t.loop(i.top_k, 2))


def route_traffic(i: Route, h: Hardware, queue: Queue = ()) -> Bytes:
    return {"wide_read": i.rows * i.n_in * WORD_BYTES}


def route_needs(i: Route) -> dict[str, int]:
    return {"max_experts": i.n_in, "max_top": i.top_k}


# --- linear: m3vit_engine_linear.h ----------------------------------------------------------------------------------


class Tile(NamedTuple):
    """One tile_job: `outputs` rows of n_in weights for `tokens`; fresh: their inputs are read; adds: to wide."""

    outputs: int
    n_in: int
    tokens: int
    fresh: bool
    adds: bool
    mode: Mode


def linear_memories(h: Hardware) -> list[OnChip]:
    steps = h.max_in // h.tile_in
    width = h.tile_in * h.act_word
    return [
        OnChip("inputs of a block of tokens", 1, width, h.token_block * steps, "uram" if h.uram else "bram"),
        OnChip("weight tiles, ping and pong", 2, h.tile_out * h.tile_in * h.weight_word, steps),
        OnChip("a token's inputs, double for dataflow", 2, width, steps),
        _tables(1),  # GELU
    ]


def gate_memories(h: Hardware) -> list[OnChip]:
    steps = h.max_in // h.tile_in
    return [
        OnChip("gate tiles, ping and pong", 2, h.gate_out * h.tile_in * GATE_BITS, steps),
        OnChip("a token's inputs, double for dataflow", 2, h.tile_in * h.act_word, steps),
    ]


def tiles(i: Linear | Gate | Experts | Conv, h: Hardware, queue: Queue = ()) -> Iterator[Tile]:
    """Yield the tiles of an instruction as next_tile does; of a gate all tokens are one block, read for each tile."""
    kept = not isinstance(i, Gate)
    size = h.tile_out if kept else h.gate_out
    maps = [(i.n_in, i.n_out, i.rows, i.mode)]
    if isinstance(i, Experts):
        both = ((i.n_in, i.n_out, Mode.NARROW), (i.n_out, i.n_in, i.mode))
        maps = [(n_in, n_out, tokens, mode) for tokens in queue for n_in, n_out, mode in both]
    for n_in, n_out, tokens, mode in maps:
        block = h.token_block if kept else tokens
        for base in range(0, tokens, block):
            for row in range(0, n_out, size):
                fresh, adds = not kept or row == 0, mode in (Mode.RESIDUAL, Mode.QUEUE)
                yield Tile(min(size, n_out - row), n_in, min(block, tokens - base), fresh, adds, mode)


def linear_cycles(i: Linear | Gate | Experts | Conv, h: Hardware, queue: Queue, t: Timing) -> int:
    """linear: load_tile of the next tile beside compute_tile of this one; weights, inputs and results one by one."""
    loads, computes = [], []
    for tile in tiles(i, h, queue):
        steps = -(-tile.n_in // h.tile_in)
        padded = steps * h.tile_in
        pad = t.loop(padded - tile.n_in)
        weights = t.loop(tile.outputs * tile.n_in, reads=True) + tile.outputs * pad
        loads.append(weights + t.loop(tile.outputs, ROW_WORDS, reads=True))
        taps = TAPS if isinstance(i, Conv) else 1  # loops of a row's inputs
        stages = (
            tile.fresh * (taps * t.loop(tile.n_in // taps, reads=True) + pad) + t.loop(steps),  # read_token, Copy
            tile.adds * t.loop(tile.outputs, reads=True),  # read_before
            t.loop(steps),  # multiply
            t.loop(tile.outputs, writes=True),  # write_row
        )
        computes.append(side_by_side(tile.tokens, *stages))
    return ping_pong(loads, computes)


def inside(i: Conv) -> int:
    """Return how many of the TAPS pixels that each pixel reads lie in the image, all pixels together."""
    width = i.columns * i.upscale
    return (3 * width - 2) * (3 * (i.rows // width) - 2)


def linear_traffic(i: Linear | Gate | Experts | Conv, h: Hardware, queue: Queue = ()) -> Bytes:
    weights, bits = ("gates", GATE_BITS) if isinstance(i, Gate) else ("weights", h.weight_word)
    act = h.act_word // 8
    ports = {Mode.NARROW: ("narrow_write", act), Mode.OUTPUT: ("output", WORD_BYTES)}
    moved = dict.fromkeys(PORTS, 0)
    for tile in tiles(i, h, queue):
        results = tile.tokens * tile.outputs
        port, size = ports.get(tile.mode, ("wide_write", WORD_BYTES))
        moved[weights] += tile.outputs * tile.n_in * bits // 8
        moved["params"] += tile.outputs * ROW_WORDS * WORD_BYTES
        moved["narrow_read"] += tile.fresh * tile.tokens * tile.n_in * act
        moved["wide_read"] += tile.adds * results * WORD_BYTES
        moved[port] += results * size
    if isinstance(i, Conv):
        moved["narrow_read"] = inside(i) * i.n_in // TAPS * act
    return {port: count for port, count in moved.items() if count}


def linear_macs(i: Linear | Gate | Experts | Conv, queue: Queue) -> int:
    return i.n_in * i.n_out * (2 * sum(queue) if isinstance(i, Experts) else i.rows)


def linear_needs(i: Linear | Gate | Experts | Conv) -> dict[str, int]:
    return {"max_in": max(i.n_in, i.n_out) if isinstance(i, Experts) else i.n_in}


def conv_needs(i: Conv) -> dict[str, int]:
    """As of a linear map; its rows are pixels, which the queues of experts need no place for."""
    return {"max_in": i.n_in, "max_rows": i.rows // i.upscale**2}


# --- the tables -----------------------------------------------------------------------------------------------------

ENGINES = {
    "linear": Engine(linear_memories, lambda h: h.tile_in * h.tile_out),
    "gate": Engine(gate_memories, lambda h: h.tile_in * h.gate_out),  # the linear engine's code with 16-bit weights
    "attention": Engine(attention_memories, lambda h: 2 * h.max_head),
    "norm": Engine(norm_memories),
    "router": Engine(route_memories),
    "stream": Engine(lambda h: []),  # passes over tokens: image, position
}
OPS = {
    Op.IMAGE: OpSpec(Patches, "stream", image_cycles, image_traffic),
    Op.LINEAR: OpSpec(Linear, "linear", linear_cycles, linear_traffic, linear_needs, linear_macs),
    Op.GATE: OpSpec(Gate, "gate", linear_cycles, linear_traffic, linear_needs, linear_macs),
    Op.POSITION: OpSpec(Position, "stream", position_cycles, position_traffic),
    Op.NORM: OpSpec(Norm, "norm", norm_cycles, norm_traffic, norm_needs),
    Op.ATTENTION: OpSpec(Attention, "attention", attention_cycles, attention_traffic, attention_needs, attention_macs),
    Op.ROUTE: OpSpec(Route, "router", route_cycles, route_traffic, route_needs),
    Op.EXPERTS: OpSpec(Experts, "linear", linear_cycles, linear_traffic, linear_needs, linear_macs),
    Op.CONV: OpSpec(Conv, "linear", linear_cycles, linear_traffic, conv_needs, linear_macs),
}
assert [OPS[op].instruction for op in OPS] == [INSTRUCTIONS[op] for op in Op if op != Op.END]


def needs(program: Sequence[Instruction]) -> dict[str, int]:
    """Return the least buffers of Hardware that hold a program: its fields max_*."""
    found = dict.fromkeys(("max_in", "max_dim", "max_rows", "max_experts", "max_top", "max_head"), 1)
    for instruction in program:
        rows = getattr(instruction, "rows", 1)
        for name, value in {"max_rows": rows, **OPS[instruction.op].needs(instruction)}.items():
            found[name] = max(found[name], value)
    return found


def memories(hardware: Hardware) -> list[OnChip]:
    """Return the on-chip memories of all engines."""
    return [memory for engine in ENGINES.values() for memory in engine.memories(hardware)]


def fetch(timing: Timing = LOOPS) -> int:
    """Return the cycles of fetching an instruction: read_instruction."""
    return timing.loop(WORDS, reads=True)


def cycles(
    instruction: Instruction,
    hardware: Hardware,
    queue: Queue = (),
    timing: Timing = LOOPS,
    skipped: bool = False,
) -> int:
    """Return the cycles of an instruction, its fetch included; `skipped`: nothing else."""
    return fetch(timing) + (0 if skipped else OPS[instruction.op].cycles(instruction, hardware, queue, timing))


def traffic(instruction: Instruction, hardware: Hardware, queue: Queue = (), skipped: bool = False) -> Bytes:
    """Return the bytes through each port of PORTS for an instruction, its fetch included; `skipped`: nothing else."""
    moved = dict.fromkeys(PORTS, 0) | ({} if skipped else OPS[instruction.op].traffic(instruction, hardware, queue))
    return {port: count + FETCH_BYTES.get(port, 0) for port, count in moved.items()}
