"""Timed C-simulation: what loops and ports write down is what the closed form counts; time is made of it by hand."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from m3vit.errors import InputError
from m3vit.hw.cost import Assumptions, lines_of
from m3vit.hw.hardware import Hardware
from m3vit.hw.isa import Experts, Gate, Instruction, Linear
from m3vit.hw.ops import LOOPS, cycles
from m3vit.hw.program import Image
from m3vit.hw.sim.emulator import Emulator
from m3vit.hw.timed import Timed, Trace, assumed_of, assumptions_said, evaluate, frame_report
from tests.hw.programs import FOLDED, HARDWARE, INCLUDE, Shape, Simulator, frames_of, hardware_of, random_vit
from tests.hw.test_cost import ZCU104

PASS = re.compile(
    r"pipelined<loop_(\w+), (\d+)> (\w+);\n(?: *\w+:\n)?"
    r"[^\n]*\bfor \([^\n]*\n *#pragma HLS PIPELINE II=(\d+)\n *(\w+)\.tick\(\);"
)
HEADERS = sorted((INCLUDE / "engine").glob("*.h"))


def test_every_pipelined_loop_has_an_object_with_its_ii() -> None:
    found = []
    for header in HEADERS:
        text = header.read_text()
        passes = PASS.findall(text)
        assert len(passes) == len(re.findall(r"#pragma HLS PIPELINE II=", text)), header.name
        for loop, ii, name, pragma, ticked in passes:
            assert ii == pragma and name == ticked, f"{header.name}: {loop}"
            found.append(loop)
    timed = (INCLUDE / "engine" / "m3vit_timed.h").read_text()
    assert sorted(found) == sorted(re.findall(r"^    loop_(\w+),", timed, re.MULTILINE))
    names = re.findall(r"\\\"(\w+)\\\"", timed.partition("fputs")[2].partition("ports")[0])
    assert names[0] == "loops" and sorted(names[1:]) == sorted(found)


def test_no_engine_reaches_memory_past_a_port() -> None:
    """Pointers to words are in the types of ports alone, so nothing is moved that is not written down."""
    for header in HEADERS:
        assert not re.search(r"typename words<C>::\w+ \*|uint8_t \*|int32_t \*\w+[,)]", header.read_text()), header.name


TIMED = {"w16a16": hardware_of("w16a16"), "w8a8": FOLDED}


@pytest.fixture(scope="module", params=TIMED)
def timed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Simulator]:
    """The simulator of a format with -DM3VIT_TIMED."""
    folder = tmp_path_factory.mktemp("timed") / "build"
    return request.param, Simulator.build(folder, TIMED[request.param], ["-O2", "-DM3VIT_TIMED"])


def run(
    simulator: Simulator, folder: Path, shape: Shape, task: int
) -> tuple[Image, Trace, np.ndarray, list[list[int]]]:
    """Return the program, the trace, the outputs and the tokens of each expert of one frame."""
    image, _ = random_vit(shape)
    os.environ["M3VIT_TIMED_TRACE"] = str(folder / "trace.bin")
    try:
        outputs, _, routing = simulator.run(folder, image, frames_of(shape, 1), [task])
    finally:
        del os.environ["M3VIT_TIMED_TRACE"]
    layers = routing.reshape(-1, (shape.grid[0] * shape.grid[1] + shape.prefix) * shape.top_k)
    queues = [[int(count) for count in np.bincount(layer) if count] for layer in layers]
    return image, Trace.read(folder / "trace.bin"), outputs, queues


@pytest.mark.slow
# Of the first, tiles of 16 outputs are left over, of an even number of steps, in a layer and in its experts.
@pytest.mark.parametrize(
    "shape",
    [
        Shape(grid=(9, 13), tasks=2, dim=144, heads=9, mlp=124, hidden=124),
        Shape(depth=4, upscale=2, experts=8, hidden=100),
    ],
)
def test_loops_are_the_closed_forms_and_frames_within_five_percent(
    timed: tuple[str, Simulator], tmp_path: Path, shape: Shape
) -> None:
    name, simulator = timed
    hardware = TIMED[name]
    shape.weight_bits, shape.act_bits, shape.wide_bits = hardware.weight_bits, hardware.act_bits, hardware.wide_bits
    shape.wide_frac = 16 if shape.wide_bits == 32 else 8
    image, trace, outputs, queues = run(simulator, tmp_path, shape, 1)
    expected = Emulator(image).run(frames_of(shape, 1)[0], 1).outputs
    np.testing.assert_array_equal(outputs[0], expected)

    assumed = assumed_of(ZCU104, ZCU104.clock_mhz)
    report = frame_report(trace.of_frame(0), image.program, hardware, assumed, "a task")
    lines = lines_of(image.program, hardware, ZCU104, 1, queues=queues)
    for line, entry in zip(lines, report["instructions"], strict=True):
        assert entry["loops_cycles"] == line.loops, image.program[line.pc]
        assert entry["cycles"] == pytest.approx(line.cycles, rel=0.05), image.program[line.pc]
    assert report["cycles"] == pytest.approx(sum(line.cycles for line in lines), rel=0.05)
    moved = {port: entry["bytes"] for port, entry in report["ports"].items()}
    counted = {port: sum(line.bytes[port] for line in lines) for port in lines[0].bytes}
    assert moved["weights"] + moved.get("more_weights", 0) == counted["weights"]
    assert moved["keys"] + moved["narrow_in"] == counted["narrow_read"]
    assert moved["narrow_out"] == counted["narrow_write"]
    assert moved["wide_in"] + moved["more_wide_in"] == counted["wide_read"]
    assert moved["wide"] + moved["more_wide"] == counted["wide_write"]
    assert (moved["image"], moved["output"]) == (counted["image"], counted["output"])

    check_runs(trace, image.program, hardware)

    # The end is fetched too, which no instruction of the closed form is.
    free = evaluate(trace, hardware, Timed(300, 1e9, Assumptions(0, 0, 0)))
    end = cycles(image.program[0], hardware, (), LOOPS, skipped=True)
    assert int(free.loops.sum()) == sum(line.loops for line in lines) + end


def check_runs(trace: Trace, program: Sequence[Instruction], hardware: Hardware) -> None:
    """Each port of weights reads its part of a tile in one run, each port of inputs whole rows."""
    names = [port for port in ("weights", "more_weights") if port == "weights" or hardware.weight_ports == 2]
    steps = trace.records[trace.records["loop"] == trace.loops.index("compute_step")]
    places = dict(zip(trace.ports, range(len(trace.ports)), strict=True))
    runs, words = ({port: steps[name][:, place] for port, place in places.items()} for name in ("runs", "words"))
    for port in names:
        assert runs[port].max() == 1 and words[port].max() > 1, port
    for pc, i in enumerate(program):
        if not isinstance(i, Linear | Gate | Experts):
            continue
        own = steps["pc"] == pc
        width = min(i.n_in, i.n_out) if isinstance(i, Experts) else i.n_in
        row = width // hardware.values(hardware.act_word)
        for port in ("narrow_in", "keys"):
            assert (words[port][own] >= runs[port][own] * row).all(), (pc, port)


def records(*passes: tuple[int, int, int, dict[str, tuple[int, int]]]) -> Trace:
    """A trace of passes (loop, II, trips, {port: (words, runs)}) of a first instruction; who writes does so last."""
    ports = ["weights", "gates", "params", "wide", "image"]
    kind = [(name, "<u4") for name in ("frame", "pc", "loop", "ii", "trips", "written")]
    array = np.zeros(len(passes), [*kind, ("words", "<u4", (5,)), ("runs", "<u4", (5,))])
    for entry, (loop, ii, trips, moved) in zip(array, passes, strict=True):
        entry["loop"], entry["ii"], entry["trips"], entry["written"] = loop, ii, trips, trips
        for port, (words, runs) in moved.items():
            entry["words"][ports.index(port)], entry["runs"][ports.index(port)] = words, runs
    return Trace(["first", "second"], ports, array)


def test_time_by_hand() -> None:
    """Passes of 100 trips on 128-bit ports at 300 MHz, with a memory that is no bound, and one that is."""
    trace = records(
        (0, 1, 100, {}),
        (0, 2, 100, {"weights": (100, 1)}),
        (1, 1, 100, {"wide": (100, 10)}),
        (1, 1, 100, {"gates": (80, 1), "params": (80, 2)}),  # one bus
        (1, 1, 100, {"image": (100, 5)}),
    )

    def total(**given: object) -> list[int]:
        return evaluate(trace, HARDWARE, Timed(300, **{"bandwidth_gb_s": 1e6, **given})).total.tolist()  # type: ignore[arg-type]

    assert total() == [112, 200 + 12 + 70, 100 + 12 + 40, 160 + 12 + 70, 100 + 12 + 70]
    assert total(base=Assumptions(0, 0, 0)) == [100, 200, 100, 160, 100]
    assert total(base=Assumptions(0, 0, 0), depths={"second": 5}) == [100, 200, 105, 165, 105]
    # The last write 30 trips before the end: its answer is 10 cycles behind; 50 before it, it is there.
    for trips, waited in ((30, 10), (50, 0)):
        trace.records["written"] = trace.records["trips"] - trips
        assert total()[2] == 100 + 12 + waited
    trace.records["written"] = trace.records["trips"]
    # A word of 128 bits is two beats of 64; the image moves single bytes.
    assert total(base=Assumptions(0, 0, 0), bus_bits=64) == [100, 200, 200, 320, 100]
    assert total(base=Assumptions(0, 0, 0), gap=3) == [100, 200, 130, 169, 115]
    # 4.8 GB/s at 300 MHz are 16 bytes a cycle; half of it: two cycles a word.
    slow = Timed(300, 2.4, Assumptions(0, 0, 0, 1.0))
    assert evaluate(trace, HARDWARE, slow).total.tolist() == [100, 200, 200, 320, 100]
    assert evaluate(trace, HARDWARE, Timed(150, 2.4, Assumptions(0, 0, 0, 1.0))).total.tolist()[2] == 100
    loops, memory = assumptions_said(trace, Timed(300, 19.2, depths={"second": 5}))
    assert "II 1 and depth 12: first" in loops and "II 2 and depth 12: first" in loops
    assert "II 1 and depth 5: second" in loops and "70 cycles to a pass's first word" in memory


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"[]\n", b'{"loops": [], "ports": ["a"]}\n' + b"x" * 5):
        (tmp_path / "trace.bin").write_bytes(content)
        with pytest.raises(InputError, match="not a trace of timed C-simulation"):
            Trace.read(tmp_path / "trace.bin")
