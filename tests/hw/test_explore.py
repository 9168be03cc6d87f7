"""What is fixed of the engines: designs, configuration files, the search; and what is refused."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from m3vit.errors import InputError
from m3vit.hw.boards import fits, resources
from m3vit.hw.cost import lines_of
from m3vit.hw.design import SIZES, design_of, read_design
from m3vit.hw.explore import configuration, explore, front, points, render
from m3vit.hw.fit import Candidates, FrameTimes, fit, least_hardware, possible
from m3vit.hw.isa import Instruction
from m3vit.hw.network import Head, Network, program_of
from tests.hw.programs import HARDWARE

NETWORK = Network((6, 8), 8, 1, 64, 2, [128, 64], [0, 2], 4, [Head(9), Head(3)], 1)
SMALL = design_of("kv260", port_bits=64)


def programs(weight_bits: int, act_bits: int, port_bits: int) -> list[Instruction]:
    return program_of(NETWORK, weight_bits, act_bits, port_bits)


def test_part_clock_and_ports_change_the_board() -> None:
    design = design_of(None, part="xczu9eg-ffvb1156-3-e", clock=250, array=64, port_bits=64, ports=2)
    assert design.board == "zcu102" and design.sizes == {"tile_out": 64, "weight_ports": 2}
    board = design.target
    assert (board.part, board.clock_mhz, board.port_bits) == ("xczu9eg-ffvb1156-3-e", 250, 64)
    assert board.dsp == design_of("zcu102").target.dsp


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"part": "xc6slx9"}, "what its device holds is not known here: choose a part of"),
        ({"board": "zcu104", "part": "xczu9eg-x"}, "zcu104 has a xczu7ev.*: give --board zcu102"),
        ({"board": "zcu104", "clock": 5000}, "--clock 5000: give 50 to 600 MHz"),
        ({"board": "zcu104", "port_bits": 256}, "--port-bits 256: zcu104 has 64, 128"),
        ({"board": "zcu104", "array": 65}, "--array 65: choose from 16, 24"),
        ({"board": "zcu104", "ports": 3}, "--ports 3: choose from 1, 2"),
        ({"board": "nowhere"}, "--board nowhere: choose from"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        design_of(**{"board": None, **given})


def test_fronts_hold_what_nothing_beats() -> None:
    """Against a slow reference: a point is on a front if no other is as fast with less, or faster with as much."""
    found = list(points(programs, [(8, 8), (8, 16)], SMALL))
    assert len({p.hardware.act_bits for p in found}) == 2 and all(fits(p.hardware, SMALL.target) for p in found)
    for resource in ("lut", "bram36", "dsp"):
        kept = {(p.ms, p.takes[resource]) for p in front(found, resource)}
        every = {(p.ms, p.takes[resource]) for p in found}
        assert kept == {a for a in every if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in every)}


def test_the_fastest_is_the_fastest_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all engines of a few sizes, each counted as a whole."""
    few = {
        **{"tile_out": (144, 128, 96, 64, 16), "lanes": (32, 16), "groups": (64, 32), "token_block": (256, 32)},
        **{
            "tiles_in_lut": (False, True),
            "gates_in_lut": (True, False),
            "folded": (False, True),
            "weight_ports": (2, 1),
        },
        **{"norm_words": (2, 1), "wide_bits": (32,)},
        **{"norm_in_lut": (False, True), "results": (16, 8), "divided": (16, 4), "finished_in_uram": (True, False)},
    }
    assert set(few) == set(SIZES)
    monkeypatch.setattr("m3vit.hw.fit.SIZES", few)
    board = design_of("kv260").target
    program = programs(8, 8, board.port_bits)
    least = least_hardware(program, 8, 8, board)
    candidates = Candidates(program, least, board, {})
    found = [(one.cycles, replace(candidates.base, **one.sizes)) for one in candidates]
    assert all(resources(h) == one.takes for one, (_, h) in zip(candidates, found, strict=True))
    assert all(
        fits(h, board) and cycles == sum(line.cycles for line in lines_of(program, h, board)) for cycles, h in found
    )
    whole: dict[int, int] = {}  # the least LUTs of engines that take so many cycles
    times = FrameTimes(program, board)
    for values in product(*few.values()):
        size = replace(least, uram=board.uram > 0, **dict(zip(few, values, strict=True)))
        if possible(size, board) and fits(size, board):
            cycles = times.cycles(size)
            whole[cycles] = min(whole.get(cycles, 1 << 30), resources(size)["lut"])
    fastest = min(whole)
    assert min(cycles for cycles, _ in found) == fastest
    assert min(resources(h)["lut"] for cycles, h in found if cycles == fastest) == whole[fastest]
    assert min(resources(h)["lut"] for _, h in found) == min(whole.values())


def test_a_configuration_comes_back_and_is_what_is_built(tmp_path: Path) -> None:
    report = explore(programs, [(8, 8)], SMALL)
    path = tmp_path / "engines.json"
    path.write_text(json.dumps(report["fastest"]["configuration"]))
    design, bits = read_design(path)
    assert bits == {"weight_bits": 8, "act_bits": 8} and design.target == SMALL.target
    program = programs(8, 8, 64)
    hardware = fit(program, 8, 8, design.target, design.sizes)
    assert {name: getattr(hardware, name) for name in SIZES} == dict(design.sizes)
    assert (
        report["fastest"]["ms"] == FrameTimes(program, design.target).cycles(hardware) / design.target.clock_mhz / 1e3
    )
    assert configuration(hardware, design) == report["fastest"]["configuration"]
    assert hardware.tile_out == fit(program, 8, 8, design.target).tile_out  # what is fitted is the fastest too
    assert "ms against dsp" in render(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": {"tile_out": 17}}, "tile_out 17: choose from 16"),
        ({"sizes": {"colour": 1}}, "colour is not a size of the engines"),
        ({"sizes": {"tiles_in_lut": 1}}, "tiles_in_lut 1: choose from false, true"),
        ({"clock": "fast"}, "clock is 'fast': give a whole number"),
        ({"board": 7}, "board is 7: give a name"),
        ({"task": 1}, "has task, which is no key"),
        ({"sizes": None}, "is not a configuration of the engines"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "engines.json"
    path.write_text(json.dumps({**configuration(replace(HARDWARE, port_bits=64), SMALL), **change}))
    with pytest.raises(InputError, match=message):
        read_design(path)


def test_engines_that_do_not_fit_are_refused_with_the_nearest() -> None:
    board = design_of("kv260").target
    with pytest.raises(
        InputError, match=r"tile_out 256 does not fit kv260 .*lut of .*the nearest that fits is tile_out"
    ):
        fit(programs(16, 16, 128), 16, 16, board, {"tile_out": 256})
