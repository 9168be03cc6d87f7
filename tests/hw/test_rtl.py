"""The expert engine's RTL: words of the reference, cycles of timed C-simulation, resources of the closed form."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m3vit.errors import InputError
from m3vit.hw import isa
from m3vit.hw.cost import Assumptions
from m3vit.hw.hardware import Hardware
from m3vit.hw.sim import rtl
from m3vit.hw.sim.emulator import Emulator
from m3vit.hw.tables import PROB_FRAC
from m3vit.hw.timed import Timed, Trace, evaluate
from tests.hw.opcodes import OPCODES, PIXELS, Bench, Machine
from tests.hw.programs import Simulator

pytestmark = pytest.mark.slow
SIZES = {"max_in": 96, "max_dim": 16, "max_rows": 200, "max_experts": 6, "max_top": 4, "max_head": 16}
# One array with two products a multiplier, words of 16 values and two ports of weights, and one with neither.
CONFIGURATIONS = {
    "w8a8": Hardware(8, 8, 48, **SIZES, token_block=64, groups=32, weight_ports=2, results=8),
    "w12a14": Hardware(12, 14, 16, **SIZES, token_block=32, groups=32, results=8),
}
DEPTHS = {"linear_first": rtl.FIRST_DEPTH, "compute_step": rtl.STEP_DEPTH}
FREE = 1e4  # GB/s: no bound


def needing(tool: str) -> None:
    """Skip the test where a tool is not installed."""
    try:
        rtl.find_tool(tool)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Simulator]]:
    """Of each configuration the RTL's bench and the timed C-simulation."""
    needing("verilator")
    folder = tmp_path_factory.mktemp("rtl")

    def build(name: str) -> tuple[Path, Simulator]:
        hardware = CONFIGURATIONS[name]
        bench = rtl.build(folder / name, hardware)
        return bench, Simulator.build(folder / f"{name}-timed", hardware, ["-O0", "-DM3VIT_TIMED"])

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CONFIGURATIONS, pool.map(build, CONFIGURATIONS), strict=True))


def layer_of(bench: Bench, tokens: Sequence[int] | None = None) -> tuple[rtl.Layer, np.ndarray, np.ndarray, list[int]]:
    """Return a random layer, both memories after it by the slow reference, and the tokens of each expert.

    tokens: of each expert; every token then has one, and its weight is 1 (which is not multiplied).
    """
    if tokens is None:
        program = list(OPCODES[isa.Op.EXPERTS].make(bench))
    else:
        program = chosen(bench, tokens)
    image, (narrow, wide) = bench.image(program), bench.start()
    machine = Machine(image, narrow.astype(np.int64), wide.astype(np.int64), np.zeros(image.memory.output, np.int64))
    route, experts = image.program
    assert isinstance(route, isa.Route) and isinstance(experts, isa.Experts)
    OPCODES[isa.Op.ROUTE].run(route, machine, np.zeros((*PIXELS, 3)))
    emulator = Emulator(image)
    state = emulator.state_after(np.zeros((*PIXELS, 3), np.uint8), 0, 1, (narrow, wide))
    OPCODES[isa.Op.EXPERTS].run(experts, machine, np.zeros((*PIXELS, 3)))
    layer = rtl.Layer(image, experts, narrow, wide, state.experts, state.scores)
    return layer, machine.narrow, machine.wide, [len(queue) for queue in machine.queue]


def chosen(bench: Bench, tokens: Sequence[int]) -> list[isa.Instruction]:
    """Return a program whose router sends so many tokens to each expert; all with the same sizes."""
    rows, order = sum(tokens), bench.rng.permutation(np.repeat(np.arange(len(tokens)), tokens))
    logits = np.where(np.arange(len(tokens)) == order[:, None], 1 << 24, -(1 << 24))
    places = bench.src("wide", rows, len(tokens), logits)
    route = isa.Route(task=-1, rows=rows, n_in=len(tokens), top_k=1, logit_frac=16, **places)
    width, hidden = 96, 64
    parts: dict[str, list[np.ndarray]] = {"weights": [], "params": []}
    for _ in tokens:
        parts["weights"].append(bench.signed(bench.h.weight_bits, 2 * width * hidden))
        parts["params"].append(np.concatenate([bench.linear_params(hidden), bench.linear_params(width)]))
    files = {name: bench.builder.put(name, np.stack(own)) for name, own in parts.items()}
    files |= {f"{name}_step": len(own[0]) for name, own in parts.items()}
    places = {**bench.src("narrow", rows, width), **bench.dst("wide", rows, width)}
    inner = bench.region("narrow", rows, hidden)
    more = {"experts": len(tokens), "hidden": inner["at"], "hidden_pitch": inner["pitch"], **bench.gelu()}
    return [route, isa.Experts(rows=rows, n_in=width, n_out=hidden, **files, **places, **more)]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_words_of_random_layers(engines: dict[str, tuple[Path, Simulator]], name: str) -> None:
    hardware, assumed = CONFIGURATIONS[name], Timed(300, FREE)
    for seed in range(6):
        layer, narrow, wide, _ = layer_of(Bench(hardware, seed))
        result = rtl.run(engines[name][0], layer, assumed)
        np.testing.assert_array_equal(result.wide, wide, err_msg=f"seed {seed}")
        np.testing.assert_array_equal(result.narrow, narrow, err_msg=f"seed {seed}")


# Tokens of each expert, the memory's bandwidth, and how far cycles may be apart. Blocks of tokens and an expert without
# any; few tokens, so that each tile waits for the next one's weights; a memory of four bytes a cycle, which all wait
# for: it is idle while the last results are made, which timed C-simulation does not know.
CASES = {
    "products": ([40, 90, 0, 30, 25], FREE, 0.005),
    "weights": ([1, 2, 3, 0, 2, 1], FREE, 0.005),
    "memory": ([2, 1, 3, 2, 0, 2], 1.2 / 0.92, 0.05),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_cycles_are_those_of_timed_simulation(
    engines: dict[str, tuple[Path, Simulator]], tmp_path: Path, name: str, case: str
) -> None:
    """The depths are the RTL's; and what decides is what the case is meant for."""
    hardware, (bench, simulator) = CONFIGURATIONS[name], engines[name]
    tokens, bandwidth, within = CASES[case]
    layer, _, wide, queue = layer_of(Bench(hardware, 7), tokens)
    assert queue == tokens and (layer.weights == 1 << PROB_FRAC).all()
    os.environ["M3VIT_TIMED_TRACE"] = str(tmp_path / "trace.bin")
    try:
        pixels = np.zeros((1, *PIXELS, 3), np.uint8)
        simulator.run(tmp_path, layer.image, pixels, [0], (layer.narrow, layer.wide))
    finally:
        del os.environ["M3VIT_TIMED_TRACE"]
    trace = Trace.read(tmp_path / "trace.bin")
    assumed = Timed(300, bandwidth, Assumptions(), DEPTHS)
    cycles = evaluate(trace, hardware, assumed)
    own = (trace.records["pc"] == 1) & (trace.records["loop"] != trace.loops.index("engine_fetch"))
    result = rtl.run(bench, layer, assumed)
    np.testing.assert_array_equal(result.wide, wide)
    timed = int(cycles.total[own].sum())
    assert result.cycles == pytest.approx(timed, rel=within), f"{result.cycles} against {timed}"
    assert len(result.passes) == own.sum()
    bound = (cycles.memory > cycles.loops)[own].mean()
    waits = int(cycles.loops[own].sum()) / sum(queue)  # steps a token
    assert bound > 0.9 if case == "memory" else bound == 0
    assert (waits > 200) == (case != "products")
    moved = {port: int(count) for port, count in zip(trace.ports, trace.records["words"][own].sum(axis=0), strict=True)}
    assert {port: moved[port] for port in result.words} == result.words


# DSPs: the array, GELU, the router's weight (two words of four, two each), addresses. BRAM18, URAM.
GOLDEN = {"w8a8": (16 * 48 // 2 + 8 + 16 + 3, 214, 0), "w12a14": (16 * 16 + 8 + 16 + 2, 162, 0)}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_resources_are_the_closed_forms(tmp_path: Path, name: str) -> None:
    needing("yosys")
    found, expected = rtl.synthesise(tmp_path, CONFIGURATIONS[name], whole=False), rtl.modelled(CONFIGURATIONS[name])
    assert found[:3] == GOLDEN[name]
    assert found.dsp == expected.dsp and found.bram18 == pytest.approx(expected.bram18, rel=0.1)


def test_what_is_not_there_or_not_taken(
    engines: dict[str, tuple[Path, Simulator]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(Bench(CONFIGURATIONS["w8a8"], 0))[0]
    high = replace(layer, instruction=replace(layer.instruction, gelu_in=24))
    with pytest.raises(InputError, match="24 fractional bits: the RTL takes up to 23"):
        rtl.run(engines["w8a8"][0], high, Timed(300, FREE))
    with pytest.raises(InputError, match="token_block 48: the RTL takes powers of two"):
        rtl.build(tmp_path, replace(CONFIGURATIONS["w8a8"], token_block=48))
    with pytest.raises(InputError, match="folded tiles: the RTL has none; give engines without"):
        rtl.build(tmp_path, replace(CONFIGURATIONS["w8a8"], tile_out=64, folded=True))
    for tool, variable in rtl.TOOLS.items():
        monkeypatch.setenv(variable, "no-such-tool")
        with pytest.raises(
            InputError, match=f"no no-such-tool found: install it .apt-get install {tool}. or set {variable}"
        ):
            rtl.find_tool(tool)
