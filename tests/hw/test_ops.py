"""Each opcode alone: C++, emulator and a slow reference, word for word; and its costs.

Every opcode of OPS is tested by what tests/hw/opcodes.py has of it; one that has nothing there fails.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3vit.errors import InputError
from m3vit.hw import isa, ops
from m3vit.hw.hardware import Hardware
from m3vit.hw.isa import WORDS, Instruction, Mode, Op, decode
from m3vit.hw.ops import ENGINES, LOOPS, OPS, PORTS, Timing
from m3vit.hw.sim.emulator import Emulator
from tests.hw.opcodes import OPCODES, PIXELS, Bench, Machine
from tests.hw.programs import FORMATS, HARDWARE, Builds, Simulator, hardware_of

INSTANCES = 6
TASK = 1  # of the frame: instructions for task 0 are skipped


def parametrise_ops(function: Any) -> Any:
    return pytest.mark.parametrize("op", OPS, ids=lambda op: op.name.lower())(function)


@pytest.mark.parametrize("name", FORMATS)
@parametrise_ops
def test_alone_word_for_word(builds: Builds, tmp_path: Path, op: Op, name: str) -> None:
    assert op in OPCODES, f"{op.name} has no reference: give it one in tests/hw/opcodes.py"
    hardware = hardware_of(name)
    bench = Bench(hardware, seed=op)
    program = [instruction for _ in range(INSTANCES) for instruction in OPCODES[op].make(bench)]
    image, (narrow, wide) = bench.image(program), bench.start()
    pixels = bench.rng.integers(0, 256, (*PIXELS, 3), dtype=np.uint8)

    machine = Machine(image, narrow.astype(np.int64), wide.astype(np.int64), np.zeros(image.memory.output, np.int64))
    saturated, moved = {}, {}
    for pc, instruction in enumerate(image.program):
        machine.saturated = 0
        skipped = instruction.task not in (-1, TASK)
        if not skipped:
            OPCODES[instruction.op].run(instruction, machine, pixels)
        if machine.saturated:
            saturated[pc] = machine.saturated
        moved[pc] = ops.traffic(instruction, hardware, [len(tokens) for tokens in machine.queue if tokens], skipped)

    emulator = Emulator(image)
    state = emulator.state_after(pixels, TASK, len(image.program), (narrow, wide))
    for memory in ("narrow", "wide", "output"):
        words = getattr(state, memory).numpy()
        if not (op == Op.EXPERTS and memory == "narrow"):  # hidden channels, which the emulator does not store
            np.testing.assert_array_equal(words, getattr(machine, memory), err_msg=f"emulator, {memory}")
    assert state.saturated == saturated
    assert [int(one) for ids in state.expert_ids for one in ids.ravel()] == machine.routing

    for place, simulator in enumerate(builds[name]):
        folder = tmp_path / str(place)
        outputs, counters, routing = simulator.run(folder, image, pixels[None], [TASK], (narrow, wide))
        words = np.fromfile(folder / "memories.bin", narrow.dtype, narrow.size)
        np.testing.assert_array_equal(words, machine.narrow, err_msg="C++, narrow")
        words = np.fromfile(folder / "memories.bin", np.int32, offset=narrow.nbytes)
        np.testing.assert_array_equal(words, machine.wide, err_msg="C++, wide")
        np.testing.assert_array_equal(outputs[0], machine.output)
        assert routing.tolist() == machine.routing
        assert {line["pc"]: line["saturated"] for line in counters if line["saturated"]} == saturated
        for line in counters[: len(program)]:
            assert {port: line[port] for port in PORTS} == moved[line["pc"]], image.program[line["pc"]]
    assert len({instruction.task for instruction in program}) > 1 or op == Op.EXPERTS
    assert saturated or op in (Op.IMAGE, Op.ROUTE)  # they have nothing to hold


@parametrise_ops
def test_words_there_and_back(op: Op) -> None:
    """Random instances, and each field at both ends of its range."""
    bench = Bench(HARDWARE, seed=op)
    for instruction in [one for _ in range(20) for one in OPCODES[op].make(bench)]:
        words = instruction.encode()
        assert words.dtype == np.int32 and words.shape == (WORDS,) and decode(words) == instruction
    kind = OPS[op].instruction
    for field in kind.layout():
        for value in field.range if field.kind is int else Mode:
            changed = replace(instruction, **{field.name: value})
            assert decode(changed.encode()) == changed
    low, high = next(field for field in kind.layout() if field.name == "rows").range
    for value in (low - 1, high + 1):
        with pytest.raises(AssertionError):
            replace(instruction, rows=value).encode()


def test_words_that_are_no_instruction() -> None:
    words = isa.End().encode()
    words[isa.OPCODE] = 99
    with pytest.raises(InputError, match="the program is of another version or damaged"):
        decode(words)


@parametrise_ops
def test_fields_of_an_opcode_have_words_of_their_own(op: Op) -> None:
    taken = [isa.OPCODE]
    for field in OPS[op].instruction.layout():
        taken += [field.word, *([field.word + 1] if field.c_type == "long long" else [])]
    assert len(set(taken)) == len(taken) and max(taken) < WORDS
    assert OPS[op].engine in ENGINES


# --- cycles, counted by hand ----------------------------------------------------------------------------------------

NOWHERE: dict[str, int] = {"weights": 0, "params": 0}
# 16 x 16 multipliers, 16 outputs a gate tile, blocks of 32 tokens, 32 queries (one at once) and 64 keys, heads of up to
# 32; words of 8 narrow values, weights or gates, and of 4 wide ones. Inputs come through two ports, four tokens ahead;
# tokens that are read take 8 steps each, the least.
CYCLES: dict[Op, tuple[Instruction, list[int], int]] = {
    Op.IMAGE: (isa.Patches(rows=6, n_in=48, patch=4, columns=3), [], 6 * 48),
    Op.POSITION: (isa.Position(rows=7, n_out=32, params=0, prefix=1), [], 7 * 8),
    # 24 channels are 6 words: of scales, and of biases. 5 rows, one ahead and 3 more take 16 steps each,
    # the least.
    Op.NORM: (
        isa.Norm(
            rows=5, n_in=24, n_out=24, params=0, mode=Mode.WIDE, shift=0, bias_shift=0, sqrt_dim=0, eps=1
        ),
        [],
        2 * 6 + (5 + 4) * 16,
    ),
    # A head of 24 channels is 3 words. 64 to clear what it leaves of 32. Blocks of 24, 24 and 22 queries, and of 64 and
    # 6 keys. A query takes 16 cycles: 4 passes of keys x 2 steps of channels, 4 steps of keys x 2 passes of channels;
    # a round of 8 of them 128. A block of keys is 384 words, which with 16 to settle take 4 rounds; 24 queries take 3.
    # The first block is read in 384. So 3 x 2 x 4 rounds, 3 more, and 3 to write: 24 x 3 times 8
    # values, 1 round, and 2.
    Op.ATTENTION: (
        isa.Attention(rows=70, n_in=72, n_out=24, heads=1, score_shift=0, value_shift=0),
        [],
        64 + 384 + (3 * 2 * 4 + 3 + 3) * 128,
    ),
    # 9 to reset; 50 tokens and three more of 16 steps, the least; 9 starts; 50 x 3 places at II = 2.
    Op.ROUTE: (isa.Route(rows=50, n_in=9, top_k=3, logit_frac=20), [], 9 + 53 * 16 + 9 + 300),
    # 20 outputs: tiles of 16 and 4, 64 and 16 words of weights. 10 tokens, four ahead and one more: 8 steps each,
    # beside 16; the second tile, 10 tokens and one more, has 2 steps = 22.
    Op.LINEAR: (isa.Linear(rows=10, n_in=32, n_out=20, mode=Mode.NARROW, **NOWHERE), [], 64 + 120 + 22),
    # One tile of 9 outputs, 36 words, and 15 x 8.
    Op.GATE: (isa.Gate(rows=10, n_in=32, n_out=9, **NOWHERE), [], 36 + 120),
    # One expert has 3 tokens, 16 -> 16 -> 16: 32 words of weights a map. Each map reads its inputs: 3 tokens, four
    # ahead and one more, of 8 steps.
    Op.EXPERTS: (
        isa.Experts(
            rows=10, n_in=16, n_out=16, gelu_in=9, gelu_out=9, experts=5, hidden_pitch=16,
            weights_step=0, params_step=0, **NOWHERE,
        ),
        [3],
        32 + 64 + 64,
    ),
    # 8 pixels of 2 tokens, two ahead and one more; 9 x 16 features are 18 words. 3 x 18 = 54 words of weights.
    Op.CONV: (isa.Conv(rows=8, n_in=144, n_out=3, columns=1, upscale=2, **NOWHERE), [], 54 + 11 * 18),
}  # fmt: skip


@pytest.fixture(scope="session", params=["w16a16", "folded"])
def trips(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Hardware, Simulator]:
    """Engines, and their simulator that counts, in place of expert_loads, the iterations of pipelined loops times their
    II, and in place of saturated values the entries of these loops."""

    def edit(text: str) -> str:
        text = text.replace("M3VIT_COUNT(expert_loads, queue.num_active)", "M3VIT_COUNT(expert_loads, 0)")
        text = text.replace("M3VIT_COUNT(saturated, 1)", "M3VIT_COUNT(saturated, 0)")
        if "Fetch:" in text:  # of every instruction, before it is known
            return text
        text = re.sub(r"(for \([^\n]*\n +#pragma HLS PIPELINE II)", r"M3VIT_COUNT(saturated, 1); \1", text)
        return re.sub(r"#pragma HLS PIPELINE II=(\d+)", r"M3VIT_COUNT(expert_loads, \1);", text)

    folded = replace(hardware_of("w8a8"), tile_out=128, folded=True)  # and with inputs of two bytes
    hardware = HARDWARE if request.param == "w16a16" else folded
    return hardware, Simulator.build(tmp_path_factory.mktemp("trips") / "build", hardware, ["-O0"], edit)


@parametrise_ops
def test_cycles_are_the_trips_of_the_loops(trips: tuple[Hardware, Simulator], tmp_path: Path, op: Op) -> None:
    """The C++ counts iterations and entries."""
    hardware, simulator = trips
    bench = Bench(hardware, seed=100 + op)
    program = [instruction for _ in range(INSTANCES) for instruction in OPCODES[op].make(bench)]
    image, start = bench.image(program), bench.start()
    pixels = np.zeros((*PIXELS, 3), np.uint8)
    _, counters, _ = simulator.run(tmp_path, image, pixels[None], [TASK], start)
    machine = Machine(image, *(words.astype(np.int64) for words in start), np.zeros(0, np.int64))
    for line, instruction in zip(counters, image.program, strict=False):
        if isinstance(instruction, isa.Route):
            OPCODES[Op.ROUTE].run(instruction, machine, pixels)
        queue = [len(tokens) for tokens in machine.queue if tokens]
        skipped = instruction.task not in (-1, TASK)
        for timing, counted in ((LOOPS, 0), (Timing(depth=1), line["saturated"])):
            cycles = ops.cycles(instruction, hardware, queue, timing, skipped) - ops.fetch(hardware, timing)
            assert line["expert_loads"] + counted == cycles, instruction


@parametrise_ops
def test_cycles_are_those_counted_by_hand(op: Op) -> None:
    assert op in CYCLES, f"count the cycles of a small {op.name} by hand"
    instruction, queue, expected = CYCLES[op]
    assert ops.cycles(instruction, HARDWARE, queue) == expected + 6  # the fetch


def test_no_tokens_take_no_time() -> None:
    instruction, _, _ = CYCLES[Op.EXPERTS]
    assert ops.cycles(instruction, HARDWARE, []) == 6
    assert ops.traffic(instruction, HARDWARE, []) == dict.fromkeys(PORTS, 0) | {"params": 96}
