"""What a program costs: against the C++'s counters and figures worked out by hand; boards and their sources."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from m3vit.hw.boards import BOARDS, find_board
from m3vit.hw.cost import Assumptions, cost, lines_of, render, uniform_queues
from m3vit.hw.isa import Gate, Instruction, Linear, Mode, Op, Position
from m3vit.hw.network import Head, Network, maps_of, program_of
from m3vit.hw.ops import PORTS, needs
from tests.hw.programs import HARDWARE, Builds, Shape, frames_of, hardware_of, random_vit

ZCU104 = find_board("zcu104")


def network_of(s: Shape) -> Network:
    """The sizes of a random ViT."""
    moe = [block % 2 == 1 for block in range(s.depth)]
    widths = [3 + 4 * task for task in range(s.tasks)]
    return Network(
        grid=s.grid,
        patch=s.patch,
        prefix=s.prefix,
        dim=s.dim,
        heads=s.heads,
        mlps=[s.hidden if experts else s.mlp for experts in moe],
        top_ks=[s.top_k if experts else 0 for experts in moe],
        experts=s.experts,
        tasks=[Head(s.upscale**2 * 5, width) if s.upscale else Head(width) for width in widths],
        upscale=s.upscale or 1,
    )


@pytest.mark.parametrize("upscale", [0, 2])
def test_a_network_of_sizes_costs_what_its_program_does(upscale: int) -> None:
    shape = Shape(depth=4, upscale=upscale)
    image, _ = random_vit(shape)
    program = program_of(network_of(shape), shape.weight_bits, shape.act_bits, HARDWARE.port_bits)
    for task in range(shape.tasks):
        assert lines_of(program, HARDWARE, ZCU104, task) == lines_of(image.program, HARDWARE, ZCU104, task)


@pytest.mark.parametrize("upscale", [0, 2])
def test_a_network_with_inputs_of_two_bytes_costs_what_its_program_does(upscale: int) -> None:
    shape, hardware = Shape(depth=4, upscale=upscale, weight_bits=8, act_bits=8), hardware_of("w8a8")
    network = network_of(shape)
    names = maps_of(network)
    plain = program_of(network, 8, 8, hardware.port_bits)
    shape.fine = frozenset(names[upscale::3])
    image, _ = random_vit(shape)
    program = program_of(network, 8, 8, hardware.port_bits, shape.fine)
    assert needs(program) == needs(image.program)
    lines = [lines_of(one, hardware, ZCU104) for one in (program, image.program, plain)]
    assert lines[0] == lines[1]
    dearer = [line.op for line, before in zip(lines[0], lines[2], strict=True) if line != before]
    assert {Op.LINEAR, Op.NORM} < set(dearer)
    for line, before in zip(lines[0], lines[2], strict=True):
        assert line.loops >= before.loops and line.bytes["weights"] == before.bytes["weights"]
        assert all(line.bytes[port] >= before.bytes[port] for port in PORTS)


@pytest.mark.slow
def test_bytes_are_those_the_cpp_counts(builds: Builds, tmp_path: Path) -> None:
    """With the queues that the router really made: equal; with tokens spread at random: within 2 %."""
    shape = Shape(grid=(9, 13), tasks=2)
    image, _ = random_vit(shape)
    _, counters, routing = builds["w16a16"][0].run(tmp_path, image, frames_of(shape, 1), [1])
    counted = {port: sum(line[port] for line in counters) for port in PORTS}
    tokens = [int((routing == expert).sum()) for expert in range(shape.experts)]
    lines = lines_of(image.program, HARDWARE, ZCU104, 1, queues=[[count for count in tokens if count]])
    found = {port: sum(line.bytes[port] for line in lines) for port in PORTS}
    assert found == counted
    modelled = cost(image.program, HARDWARE, ZCU104, 1)["bytes"]
    assert sum(modelled.values()) == pytest.approx(sum(counted.values()), rel=0.02)


def test_queues_hold_every_choice() -> None:
    assert uniform_queues(1025, 16, 4) == [257] * 4 + [256] * 12
    assert uniform_queues(3, 256, 2) == [1] * 6
    assert sum(uniform_queues(129, 16, 2)) == 258


def test_floor_and_assumptions_by_hand() -> None:
    """1000 tokens of 256 channels to 64 outputs: 16.384 million products on 1382 multipliers, 32 KiB of weights."""
    program: list[Instruction] = [Linear(rows=1000, n_in=256, n_out=64, mode=Mode.NARROW, weights=0, params=0)]
    hardware = replace(HARDWARE, max_in=256)
    report = cost(program, hardware, ZCU104)
    floors = report["floor_ms"]
    assert floors["multipliers"] == pytest.approx(16_384_000 / 1382 / 300e3)
    assert floors["weights through one port"] == pytest.approx(32768 / 16 / 300e3)
    assert floors["weights over all of the bandwidth"] == pytest.approx(32768 / (19.2e6 * 0.92))
    assert report["ratio"] == report["ms"] / floors["multipliers"]
    packed = cost(program, replace(hardware, weight_bits=8, act_bits=8), ZCU104)
    assert packed["floor_ms"]["multipliers"] == pytest.approx(floors["multipliers"] / 2)
    # Nothing assumed: the loops alone. A slow memory: its bytes alone.
    free = cost(program, hardware, ZCU104, assumed=Assumptions(0, 0, 0))
    assert free["ms"] == free["loops_ms"] < report["ms"]
    slow = replace(ZCU104, bandwidth_gb_s=0.001)
    (line,) = lines_of(program, hardware, slow)
    assert line.cycles == line.memory == round(sum(line.bytes.values()) / (1e-3 * 1e3 * 0.92 / 300))
    assert "modelled" in report["note"] and "Modelled" in render(report)


def test_instructions_of_other_tasks_are_fetched_alone() -> None:
    program: list[Instruction] = [
        Gate(task=task, rows=9, n_in=16, n_out=4, weights=0, params=0) for task in range(2)
    ] + [Position(rows=9, n_out=16, params=0, prefix=1)]
    first, second = (lines_of(program, HARDWARE, ZCU104, task) for task in range(2))
    assert first[0] == second[1]._replace(pc=0) and first[1] == second[0]._replace(pc=1)
    assert first[1].macs == 0 and first[1].bytes["params"] == sum(first[1].bytes.values()) == 96
    assert [line.op for line in first] == [Op.GATE, Op.GATE, Op.POSITION]


def test_every_figure_of_a_board_has_a_source() -> None:
    assert {"zcu104", "zcu102", "kv260", "pynq-z2", "ultra96", "u50", "u55c", "u280", "vck190"} == set(BOARDS)
    for name, board in BOARDS.items():
        figures = json.loads(files("m3vit.hw").joinpath("board_files", f"{name}.json").read_text())
        for key, figure in figures.items():
            assert set(figure) == {"value", "source"} and len(figure["source"]) > 4, f"{name}: {key}"
            assert getattr(board, key) == figure["value"]
        assert min(board.lut, board.bram36, board.dsp, board.ports) > 0 and board.port_bits in (64, 128, 256, 512)
