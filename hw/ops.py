"""Each opcode with its engine, and what both cost: memories, multipliers, cycles and bytes. No torch.

Cycles are those of the loops of hw/include/engine as they are written, trips times II, one loop after the other; a test
counts trips and entries of loops in the C++. What a loop costs beside its trips (depth of the pipeline, latency of
memory) no one has measured: Timing has what is assumed of it, LOOPS nothing, which makes a lower bound. Bytes are
those that C-simulation counts (M3VIT_COUNT); a test compares them, instruction by instruction. Fetching the instruction
itself is `fetch` and FETCH_BYTES, also for one that is skipped.

`queue` is the number of tokens of each expert that has any: what the router chose, which only EXPERTS depends on.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from m3vit.hw.hardware import BATCH, LEAST_TURN, PACKED_PROB_FRAC, STAGES, Hardware
from m3vit.hw.isa import (
    ACCUMULATOR_BITS,
    INSTRUCTIONS,
    KEY_BLOCK,
    ROW_WORDS,
    SCORE_BITS,
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
from m3vit.hw.opspec import LOOPS, Bytes, Engine, OnChip, OpSpec, Queue, Timing
from m3vit.hw.tables import PROB_FRAC, TABLES

PORTS = ("image", "weights", "gates", "params", "narrow_read", "narrow_write", "wide_read", "wide_write", "output")
PARAM_BITS = 32  # and of outputs
RING = 4  # blocks of keys and values on chip
NORM_PAIRS = 4  # places for pairs of rows that LayerNorm reads, sums and centres
NORM_SPAN = 16  # steps that LayerNorm gives a row at least
SETTLED = 16  # cycles from a word's loading to its use in attention
LEAD, LEAST_SPAN = 2, 8  # by how many tokens a port reads inputs ahead, and least steps of a token that is read
ROUTE_SPAN = 16  # steps that the router gives a token at least
WORD_BYTES = 4  # of an element of params
GATE_BITS = 16  # routing is discrete and gates are few: they keep 16 bits whatever the weights have
FETCH_BYTES = {"params": WORDS * WORD_BYTES}
_GELU = next(table for table in TABLES if table.name == "gelu_gap")
GELU_BITS, GELU_ENTRIES = max(_GELU.values()).bit_length(), _GELU.intervals + 1
TABLE_BITS = max(value.bit_length() for table in TABLES for value in table.values())
EXP_ENTRIES = min(table.intervals for table in TABLES) + 1  # of all tables but GELU's


def _tables(copies: int) -> OnChip:
    return OnChip("look-up tables", copies, TABLE_BITS, EXP_ENTRIES)


def _times(count: int, size: int) -> int:
    """Return how many groups of `size` hold `count`."""
    return -(-count // size)


def _words(h: Hardware, count: int, bits: int) -> int:
    """Return the words of a port that `count` values of `bits` take."""
    return -(-count // h.values(bits))


def _bytes(h: Hardware, words: int) -> int:
    return words * h.port_bits // 8


def _bytes_of(low: int) -> int:
    """Return how many places a narrow value has (src_low, dst_low of an instruction)."""
    return 2 if low else 1


# --- image and position: m3vit_engine_norm.h ------------------------------------------------------------------------


def image_cycles(i: Patches, h: Hardware, queue: Queue, t: Timing) -> int:
    """read_image: `pixels` values an iteration."""
    return t.loop(i.rows * i.n_in // h.pixels, reads=True, writes=True)


def image_traffic(i: Patches, h: Hardware, queue: Queue = ()) -> Bytes:
    return {"image": i.rows * i.n_in, "narrow_write": _bytes(h, i.rows * _words(h, i.n_in, h.act_word))}


def position_cycles(i: Position, h: Hardware, queue: Queue, t: Timing) -> int:
    """position: one word of the table an iteration."""
    return t.loop(i.rows * _words(h, i.n_out, PARAM_BITS), reads=True, writes=True)


def position_traffic(i: Position, h: Hardware, queue: Queue = ()) -> Bytes:
    row, table = (_bytes(h, _words(h, i.n_out, bits)) for bits in (h.wide_bits, PARAM_BITS))
    return {"params": i.rows * table, "wide_read": (i.rows - i.prefix) * row, "wide_write": i.rows * row}


# --- LayerNorm: m3vit_engine_norm.h ---------------------------------------------------------------------------------


def norm_memories(h: Hardware) -> list[OnChip]:
    lanes, words = h.norm_words * h.values(h.wide_bits), _words(h, h.max_dim, h.wide_bits)
    longest = _times(words, h.norm_words)
    return [
        OnChip("rows that were read", 2 * h.norm_words, h.port_bits, NORM_PAIRS * longest),
        OnChip("differences from the mean", 1, 44 * lanes, 4 * words),
        OnChip("the same, shifted", 1, 26 * lanes, 4 * words),
        OnChip("scales, biases", 2 * h.norm_words, PARAM_BITS * h.values(h.wide_bits), words),
        _tables(2),  # both of 1/sqrt
    ]


def norm_cycles(i: Norm, h: Hardware, queue: Queue, t: Timing) -> int:
    """layernorm: Load, then Row: norm_words an iteration (to wide tokens one), NORM_SPAN iterations a row at least, and
    twice those of whole words of results of two bytes; more rows than there are, by one for each port that reads ahead
    and three to drain its stages."""
    words, ports = _words(h, i.n_in, h.wide_bits), h.norm_words if i.mode == Mode.NARROW else 1
    rows = i.rows + ports + 3
    loads = 2 * _words(h, i.n_in, PARAM_BITS)
    twice = 2 * _words(h, i.n_in, h.act_word) * (h.values(h.act_word) // _normed(h)) if i.dst_low else 0
    span = max(_times(words, ports), NORM_SPAN, twice)
    return t.loop(loads, reads=True) + t.loop(rows * span, reads=True, writes=True)


def norm_traffic(i: Norm, h: Hardware, queue: Queue = ()) -> Bytes:
    row, params = (_bytes(h, _words(h, i.n_in, bits)) for bits in (h.wide_bits, PARAM_BITS))
    to_narrow = {"narrow_write": _bytes_of(i.dst_low) * i.rows * _bytes(h, _words(h, i.n_in, h.act_word))}
    written = to_narrow if i.mode == Mode.NARROW else {"wide_write": i.rows * row}
    return {"params": 2 * params, "wide_read": i.rows * row, **written}


def norm_needs(i: Norm) -> dict[str, int]:
    return {"max_dim": i.n_in}


# --- attention: m3vit_engine_attention.h ----------------------------------------------------------------------------


def attention_memories(h: Hardware) -> list[OnChip]:
    """Width is what is read or written in a cycle, whichever is more; `rounds`: of groups of queries, two of them."""
    rounds, sums, queries = 2 * BATCH, h.context_bits, h.softmax_queries
    keys, channels = h.group * KEY_BLOCK, h.group * h.head
    some, outputs = min(KEY_BLOCK, h.tile_out), min(h.head, h.tile_out)  # keys and channels on the array at once
    weights, weight_bits = max(h.value_queries * h.tile_in, h.lanes), (PACKED_PROB_FRAC if h.packed else PROB_FRAC) + 1
    return [
        OnChip("keys", 1, some * h.tile_in * h.act_word, RING * KEY_BLOCK * h.head // some // h.tile_in, "lut"),
        OnChip("values", 1, h.tile_in * outputs * h.act_word, RING * KEY_BLOCK * h.head // outputs // h.tile_in, "lut"),
        OnChip(
            "queries", h.score_queries, h.tile_in * h.act_word, 2 * h.groups * channels // h.score_queries // h.tile_in
        ),
        OnChip("products", 1, min(keys, h.tile_out) * h.product_bits, rounds * _times(keys, h.tile_out), "lut"),
        OnChip("scores", 1, h.lanes * SCORE_BITS, rounds * _times(keys, h.lanes), "lut"),
        OnChip("weights", 1, weights * weight_bits, rounds * _times(keys, weights), "lut"),
        OnChip("sums of before", 1, min(channels, h.tile_out) * sums, rounds * _times(channels, h.tile_out), "lut"),
        OnChip("context", 1, min(channels, h.tile_out) * sums, h.groups * _times(channels, h.tile_out)),
        OnChip(
            "finished",
            1,
            min(channels, h.tile_out) * sums,
            h.groups * _times(channels, h.tile_out),
            "uram" if h.finished_in_uram else "any",
        ),
        OnChip("total, maximum, divisor", 3 * queries, sums, h.groups * _times(h.group, queries)),
        _tables(h.lanes + 1),  # 2^-x of each score, 1/x
    ]


def attention_turn(i: Attention, h: Hardware) -> int:
    """Return the cycles of a group of queries and a block of keys, as begin_attention does."""
    width, keys = i.n_out // i.heads, min(i.rows, KEY_BLOCK)
    score = _times(h.group, h.score_queries) * _times(keys, h.tile_out) * _times(width, h.tile_in)
    value = _times(h.group, h.value_queries) * _times(keys, h.tile_in) * _times(width, h.tile_out)
    weighed = _times(h.group, h.softmax_queries) * max(_times(keys, h.softmax_scores), _times(width, h.softmax_sums))
    return max(score + value, weighed, LEAST_TURN)


def query_blocks(i: Attention, h: Hardware) -> list[int]:
    """Return the queries of each block, as begin_attention and next_attention do."""
    size = _times(i.rows, _times(i.rows, h.groups * h.group))
    return [min(size, i.rows - start) for start in range(0, i.rows, size)]


def attention_cycles(i: Attention, h: Hardware, queue: Queue, t: Timing) -> int:
    """attention: Rest; First reads the first job; Step: rounds of each block of keys of each head and block of queries,
    STAGES - 1 more, and those that write the last job."""
    width, length, blocks = i.n_out // i.heads, BATCH * attention_turn(i, h), _times(i.rows, KEY_BLOCK)
    words, queries = width // h.values(h.act_word), query_blocks(i, h)
    loads, reads = 2 * min(i.rows, KEY_BLOCK) * words, queries[0] * words
    used = _times(_times(queries[0], h.group), BATCH)
    writing = _times(queries[0] * _bytes_of(i.dst_low) * (width // h.divided), length) + 2
    rounds = max(
        used,
        STAGES - 1,
        _times(loads + SETTLED, length),
        _times(_times(reads + SETTLED, length), blocks),
        _times(used + writing, blocks),
    )
    steps = (i.heads * len(queries) * blocks * rounds + STAGES - 1 + writing) * length
    more = i.rows > KEY_BLOCK or i.heads * len(queries) > 1  # keys, queries to read meanwhile
    return (
        t.loop(max(KEY_BLOCK, h.groups))
        + t.loop(max(loads, reads), reads=True)
        + t.loop(steps, reads=more, writes=True)
    )


def attention_traffic(i: Attention, h: Hardware, queue: Queue = ()) -> Bytes:
    read = (2 * len(query_blocks(i, h)) + 1) * i.rows * i.n_out
    written = i.rows * i.n_out * _bytes_of(i.dst_low)
    return {"narrow_read": read * h.act_word // 8, "narrow_write": written * h.act_word // 8}


def attention_macs(i: Attention, queue: Queue) -> int:
    return 2 * i.rows**2 * i.n_out


def attention_needs(i: Attention) -> dict[str, int]:
    return {"max_head": i.n_out // i.heads}


# --- router: m3vit_engine_router.h ----------------------------------------------------------------------------------


def route_memories(h: Hardware) -> list[OnChip]:
    return [
        OnChip("logits", 4, h.port_bits, _words(h, h.max_experts, h.wide_bits)),
        OnChip("choices, queues", 2, 16 + PROB_FRAC + 1, h.max_rows * h.max_top),
        OnChip("counts, starts, active experts", 3, 16, h.max_experts),
        _tables(3),  # 2^-x of what is summed, and of what is chosen; 1/x
    ]


def route_cycles(i: Route, h: Hardware, queue: Queue, t: Timing) -> int:
    """route: Reset; Token, a logit an iteration, ROUTE_SPAN a token at least, three tokens more; Start; Place, II=2."""
    span = max(i.n_in, i.top_k, ROUTE_SPAN)
    token = t.loop((i.rows + 3) * span, reads=True)
    return 2 * t.loop(i.n_in) + token + t.loop(i.rows * i.top_k, 2)


def route_traffic(i: Route, h: Hardware, queue: Queue = ()) -> Bytes:
    return {"wide_read": i.rows * _bytes(h, _words(h, i.n_in, h.wide_bits))}


def route_needs(i: Route) -> dict[str, int]:
    return {"max_experts": i.n_in, "max_top": i.top_k}


# --- linear: m3vit_engine_linear.h ----------------------------------------------------------------------------------


class Tile(NamedTuple):
    """One tile_job: `outputs` rows of n_in weights for `tokens`; fresh: their inputs are read; adds: to wide; two: the
    inputs have two bytes each; writes_two: so have narrow results."""

    outputs: int
    n_in: int
    tokens: int
    fresh: bool
    adds: bool
    mode: Mode
    gate: bool
    two: bool = False
    writes_two: bool = False


def _input_ports(h: Hardware) -> int:
    """Return through how many ports a block's inputs are read: a step takes a word of each."""
    return 1 if h.tile_in == h.values(h.act_word) else 2


def linear_memories(h: Hardware) -> list[OnChip]:
    """Tiles: memories of a word each for every output, so many that a step of inputs is read at once; both in each."""
    joined, kind = h.tile_in // h.values(h.act_word), "uram" if h.uram else "bram"
    ports = _input_ports(h)  # each has tokens of its own
    tokens = _times(h.token_block, ports)
    tiles_in, gates_in = ("lut" if in_lut else "bram" for in_lut in (h.tiles_in_lut, h.gates_in_lut))
    weights, gates = h.values(h.weight_word), h.values(GATE_BITS)
    banks, gate_banks = h.tile_in // weights, h.tile_in // gates
    words, gate_words = 2 * h.max_in // weights // banks, 2 * h.max_in // gates // gate_banks
    at_once = 2 if h.folded else 1  # steps
    inputs = tokens * _times(h.max_cached // h.tile_in, at_once)
    return [
        OnChip("inputs of a block of tokens", ports * joined * at_once, h.port_bits, inputs, kind),
        OnChip("weights of two tiles", banks * h.tile_out, h.port_bits, words, tiles_in),
        OnChip("gates of two tiles", gate_banks * h.gate_out, h.port_bits, gate_words, gates_in),
        OnChip("table of GELU", h.results, GELU_BITS, GELU_ENTRIES),
    ]


def tiles(i: Linear | Gate | Experts | Conv, h: Hardware, queue: Queue = ()) -> Iterator[Tile]:
    """Yield the tiles of an instruction as next_tile does."""
    size = h.gate_out if isinstance(i, Gate) else h.tile_out
    writes_two = isinstance(i, Linear | Experts) and i.dst_low > 0
    maps = [(i.n_in, i.n_out, i.rows, i.mode, i.src_low > 0)]
    if isinstance(i, Experts):
        both = ((i.n_in, i.n_out, Mode.NARROW, i.src_low > 0), (i.n_out, i.n_in, i.mode, writes_two))
        maps = [(n_in, n_out, tokens, mode, two) for tokens in queue for n_in, n_out, mode, two in both]
    for n_in, n_out, tokens, mode, two in maps:
        block = _times(tokens, _times(tokens, h.token_block))
        for base in range(0, tokens, block):
            first = Tile(
                min(size, n_out),
                n_in,
                min(block, tokens - base),
                True,
                mode in (Mode.RESIDUAL, Mode.QUEUE),
                mode,
                isinstance(i, Gate),
                two,
                writes_two and mode == Mode.NARROW,
            )
            yield first
            more, rest = divmod(max(n_out - size, 0), size)
            following = first._replace(fresh=False)
            yield from [following] * more
            if rest:
                yield following._replace(outputs=rest)


def _half(tile: Tile, h: Hardware) -> int:
    """Return the outputs of the first half of a tile: half of the words of results, if they are narrow. A router's
    tiles have one part."""
    unit = h.values(h.act_word)
    return tile.outputs if tile.gate else min(tile.outputs, _times(_times(tile.outputs, unit), 2) * unit)


def _folded(tile: Tile, h: Hardware) -> bool:
    """Return whether two rows of the array make each output of a tile."""
    few = not tile.fresh and not tile.gate and _half(tile, h) <= h.fold
    return h.folded and few and (tile.two or tile.n_in // h.tile_in % 2 == 0)


def _results(tile: Tile, h: Hardware) -> int:
    """Return the steps in which a token's results are written: a wide word of both halves at once, `results` narrow
    values, or a word of the output."""
    if tile.mode == Mode.NARROW:
        whole = 2 * _words(h, tile.outputs, h.act_word) * (h.values(h.act_word) // h.results)
        return whole if tile.writes_two else _times(tile.outputs, h.results)
    return _words(h, tile.outputs, PARAM_BITS) if tile.mode == Mode.OUTPUT else _words(h, _half(tile, h), h.wide_bits)


def _result_words(tile: Tile, h: Hardware) -> int:
    """Return the words of a token's results."""
    bits = {Mode.NARROW: h.act_word, Mode.OUTPUT: PARAM_BITS}
    return _words(h, tile.outputs, bits.get(tile.mode, h.wide_bits)) * (2 if tile.writes_two else 1)


def _alike(i: Linear | Gate | Experts | Conv, h: Hardware, queue: Queue) -> Iterator[tuple[list[Tile], int]]:
    """Yield the tiles of each expert that has other tokens than those before, and how many have as many; of other
    instructions all tiles."""
    if not isinstance(i, Experts):
        yield list(tiles(i, h)), 1
        return
    for tokens in dict.fromkeys(queue):
        yield list(tiles(i, h, [tokens])), list(queue).count(tokens)


def linear_cycles(i: Linear | Gate | Experts | Conv, h: Hardware, queue: Queue, t: Timing) -> int:
    """linear: First loads a tile; of each tile Step, which multiplies, writes the token before, and loads the next."""
    bits = h.values(GATE_BITS if isinstance(i, Gate) else h.weight_word)
    narrow = h.values(h.act_word)

    @cache
    def counted(tile: Tile) -> tuple[int, int, int, int, int]:
        """Return the steps that load a tile, those that work on it, and of these those after the last result; the bytes
        that loading and working move."""
        params = _words(h, ROW_WORDS * tile.outputs, PARAM_BITS)
        rows = _half(tile, h) if h.weight_ports == 2 else tile.outputs  # whose weights come through a port
        places = tile.n_in * (2 if tile.two else 1)
        span, ahead = max(places // h.tile_in // (2 if _folded(tile, h) else 1), _results(tile, h)), 0
        if tile.fresh:
            ports = 1 if isinstance(i, Conv) else _input_ports(h)
            span, ahead = max(span, places // narrow // ports, LEAST_SPAN), LEAD * ports
        steps = (tile.tokens + 1 + ahead) * span
        loads, rest = max(rows * (tile.n_in // bits), params), span - _results(tile, h)
        loaded, moved = (sum(part.values()) for part in (_loaded(i, tile, h), _moved(i, tile, h)))
        return loads, steps, rest, loaded, moved

    @cache
    def worked(tile: Tile, following: Tile | None) -> int:
        """Return the cycles of a tile beside which the next one is loaded."""
        reads = tile.fresh or tile.adds or following is not None
        _, steps, rest, _, moved = counted(tile)
        loads, _, _, loaded, _ = counted(following) if following else (0, 0, 0, 0, 0)
        trips = max(steps, loads, round((moved + loaded) / t.bytes_a_cycle))
        return t.loop(trips, reads=reads, writes=True, after=trips - steps + rest)

    # The first tile of any expert takes the same to load, and one expert's last tile is followed by another's first.
    cycles, first, last = 0, None, None
    for group, times in _alike(i, h, queue):
        first = group[0]
        cycles += times * sum(worked(*pair) for pair in zip(group, [*group[1:], first], strict=True))
        if not isinstance(i, Experts) or group[0] == next(tiles(i, h, queue[-1:])):
            last = group[-1]
    if last is not None:
        cycles += worked(last, None) - worked(last, first)
    return cycles + t.loop(counted(first)[0] if first else 0, reads=True)


def inside(i: Conv) -> int:
    """Return how many of the TAPS pixels that each pixel reads lie in the image, all pixels together."""
    width = i.columns * i.upscale
    return (3 * width - 2) * (3 * (i.rows // width) - 2)


def _loaded(i: Linear | Gate | Experts | Conv, tile: Tile, h: Hardware) -> Bytes:
    """Return the bytes that a tile itself is: its weights and parameters."""
    weights, bits = ("gates", GATE_BITS) if isinstance(i, Gate) else ("weights", h.weight_word)
    params = _bytes(h, _words(h, ROW_WORDS * tile.outputs, PARAM_BITS))
    return {weights: tile.outputs * tile.n_in * bits // 8, "params": params}


def _moved(i: Linear | Gate | Experts | Conv, tile: Tile, h: Hardware) -> Bytes:
    """Return the bytes that a tile's pass reads and writes of tokens; of a 3x3 convolution's inputs about so many."""
    results = _bytes(h, tile.tokens * _result_words(tile, h))
    inputs = tile.fresh * tile.tokens * tile.n_in * (2 if tile.two else 1) * h.act_word // 8
    ports = {Mode.OUTPUT: "output", Mode.NARROW: "narrow_write"}
    return {
        "narrow_read": inputs,
        "wide_read": tile.adds * results,
        ports.get(tile.mode, "wide_write"): results,
    }


def linear_traffic(i: Linear | Gate | Experts | Conv, h: Hardware, queue: Queue = ()) -> Bytes:
    act = h.act_word // 8
    moved = dict.fromkeys(PORTS, 0)
    counts = Counter[Tile]()  # most tiles are like others
    for group, times in _alike(i, h, queue):
        counts.update(group * times)
    for tile, times in counts.items():
        for part in (_loaded(i, tile, h), _moved(i, tile, h)):
            for port, count in part.items():
                moved[port] += times * count
    if isinstance(i, Conv):
        moved["narrow_read"] = inside(i) * i.n_in // TAPS * act * _bytes_of(i.src_low)
    return {port: count for port, count in moved.items() if count}


def linear_macs(i: Linear | Gate | Experts | Conv, queue: Queue) -> int:
    return i.n_in * i.n_out * (2 * sum(queue) if isinstance(i, Experts) else i.rows)


def linear_needs(i: Linear | Gate | Experts | Conv) -> dict[str, int]:
    if isinstance(i, Experts):
        return {
            "max_in": max(i.n_in, i.n_out),
            "max_bytes": 2 * max(i.n_in * (i.src_low > 0), i.n_out * (i.dst_low > 0)),
        }
    return {"max_in": i.n_in, "max_bytes": 2 * i.n_in * (i.src_low > 0)}


def conv_needs(i: Conv) -> dict[str, int]:
    """As of a linear map; its rows are pixels, which the queues of experts need no place for."""
    return linear_needs(i) | {"max_rows": i.rows // i.upscale**2}


# --- the tables -----------------------------------------------------------------------------------------------------


def _normed(h: Hardware) -> int:
    """Return how many values LayerNorm takes in a cycle."""
    return h.norm_words * h.values(h.wide_bits)


def _shifted_in_attention(h: Hardware) -> int:
    """Return the bits that attention shifts in a cycle: of scores, weights and sums of before."""
    return h.lanes * (h.product_bits + PROB_FRAC + 6) + h.softmax_queries * h.softmax_sums * h.context_bits


def _folding(h: Hardware) -> int:
    """Return the LUTs of folded tiles: each result adds the sum of another row, one of those of a quarter of the array,
    and inputs of half the spans are one of two."""
    chosen = _times(h.fold, h.results)
    whole = 1 + _times(chosen, 4) + h.two_bytes  # of high bytes it is 256 times its own
    return h.results * ACCUMULATOR_BITS * whole + h.tile_out // h.span // 2 * h.tile_in * h.act_word


def _chosen_bytes(h: Hardware, values: int) -> int:
    """Return the LUTs that choose which byte of so many results is written, if some have two."""
    return values * h.act_word * h.two_bytes


# DSPs of a lane: GELU 1, the router's weight 2; 2^-x 1, a division of 40 by 20 bits 4; LayerNorm n x 2, d^2 2, d times
# the factor 2, times the scale 1. Linear maps, routers and attention have one array.
LUT_PER_NORM = 420  # n x, if it is made of LUTs
ENGINES = {
    "linear": Engine(
        linear_memories,
        lambda h: h.multipliers,
        lambda h: h.results + 2 * 2 * h.values(h.wide_bits),
        # Of narrow tokens, which wide ones share; a stream of 16 bits is shifted itself.
        lambda h: h.results + (2 * h.port_bits // ACCUMULATOR_BITS if h.wide_bits < PARAM_BITS else 0),
        # Operands are one of up to four.
        lambda h: (
            h.tile_out * h.tile_in * max(h.act_word, h.weight_word)
            + _folding(h) * h.folded
            # A sum is added to as it is or, between the bytes of its inputs, times 256.
            + h.tile_out * ACCUMULATOR_BITS * h.two_bytes
            + _chosen_bytes(h, h.results)
        ),
    ),
    # Shifted in each lane: a score, a weight (few bits both), a sum of before; and what is divided.
    "attention": Engine(
        attention_memories,
        dsps=lambda h: h.lanes + 4 * h.divided,
        shifters=lambda h: h.divided + _shifted_in_attention(h) // ACCUMULATOR_BITS,
        luts=lambda h: _chosen_bytes(h, h.divided),
    ),
    "norm": Engine(
        norm_memories,
        dsps=lambda h: (5 if h.norm_in_lut else 7) * _normed(h),
        shifters=lambda h: 3 * _normed(h),
        luts=lambda h: LUT_PER_NORM * _normed(h) * h.norm_in_lut + _chosen_bytes(h, _normed(h)),
    ),
    "router": Engine(route_memories),
    "stream": Engine(lambda h: []),  # passes over tokens: image, position
}
ON_ARRAY = ("linear", "attention")  # engines whose products are the array's
OPS = {
    Op.IMAGE: OpSpec(Patches, "stream", image_cycles, image_traffic),
    Op.LINEAR: OpSpec(Linear, "linear", linear_cycles, linear_traffic, linear_needs, linear_macs),
    Op.GATE: OpSpec(Gate, "linear", linear_cycles, linear_traffic, linear_needs, linear_macs),
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
    found = dict.fromkeys(("max_in", "max_dim", "max_rows", "max_experts", "max_top", "max_head"), 1) | {"max_bytes": 0}
    for instruction in program:
        rows = getattr(instruction, "rows", 1)
        for name, value in {"max_rows": rows, **OPS[instruction.op].needs(instruction)}.items():
            found[name] = max(found[name], value)
    return found


def memories(hardware: Hardware) -> list[OnChip]:
    """Return the on-chip memories of all engines."""
    return [memory for engine in ENGINES.values() for memory in engine.memories(hardware)]


def fetch(hardware: Hardware, timing: Timing = LOOPS) -> int:
    """Return the cycles of fetching an instruction: read_instruction."""
    return timing.loop(_words(hardware, WORDS, PARAM_BITS), reads=True)


def cycles(
    instruction: Instruction,
    hardware: Hardware,
    queue: Queue = (),
    timing: Timing = LOOPS,
    skipped: bool = False,
) -> int:
    """Return the cycles of an instruction, its fetch included; `skipped`: nothing else."""
    return fetch(hardware, timing) + (
        0 if skipped else OPS[instruction.op].cycles(instruction, hardware, queue, timing)
    )


def traffic(instruction: Instruction, hardware: Hardware, queue: Queue = (), skipped: bool = False) -> Bytes:
    """Return the bytes through each port of PORTS for an instruction, its fetch included; `skipped`: nothing else."""
    moved = dict.fromkeys(PORTS, 0) | ({} if skipped else OPS[instruction.op].traffic(instruction, hardware, queue))
    return {port: count + FETCH_BYTES.get(port, 0) for port, count in moved.items()}
