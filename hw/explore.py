"""Search of engines for a program by the closed form: what is fastest for what it takes of a board. No torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from m3vit.errors import InputError
from m3vit.hw.boards import BUDGETS
from m3vit.hw.design import SIZES, Design
from m3vit.hw.fit import Candidates, check_tokens, least_hardware
from m3vit.hw.hardware import PORT_WIDTHS, Hardware
from m3vit.hw.isa import Instruction

Programs = Callable[[int, int, int], Sequence[Instruction]]  # of weight bits, act bits, port bits


class Point(NamedTuple):
    """Engines, the milliseconds of a frame, and what they take."""

    ms: float
    base: Hardware
    sizes: dict[str, Any]
    takes: dict[str, int]

    @property
    def hardware(self) -> Hardware:
        return replace(self.base, **self.sizes)


def points(programs: Programs, bits: Sequence[tuple[int, int]], design: Design) -> Iterator[Point]:
    """Yield the engines that fit the design's board and may be on a front."""
    widths = [design.target.port_bits] if design.port_bits else [w for w in PORT_WIDTHS if w <= design.target.port_bits]
    for weight_bits, act_bits in bits:
        for width in widths:
            board = Design(design.board, design.part, design.clock, width).target
            program = programs(weight_bits, act_bits, width)
            hardware = least_hardware(program, weight_bits, act_bits, board, design.sizes.get("wide_bits", 32))
            check_tokens(hardware.max_rows)
            candidates = Candidates(program, hardware, board, design.sizes)
            for found in candidates:
                yield Point(found.cycles / board.clock_mhz / 1e3, candidates.base, found.sizes, found.takes)


def front(found: Sequence[Point], resource: str) -> list[Point]:
    """Return the points that no other one beats in time at no more of a resource, fastest first."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda p: (p.ms, p.takes[resource], sum(p.takes.values()))):
        if not kept or point.takes[resource] < kept[-1].takes[resource]:
            kept.append(point)
    return kept


def explore(
    programs: Programs, bits: Sequence[tuple[int, int]], design: Design, layer_bits: str | None = None
) -> dict[str, Any]:
    """Return the fronts of time against each resource, and the fastest, as JSON values.

    layer_bits: what the programs have of --layer-bits, which the configurations say. Raises InputError if nothing fits.
    """
    found = list(points(programs, bits, design))
    if not found:
        given = ", ".join(f"{name} {value}" for name, value in design.sizes.items()) or "any array"
        raise InputError(f"nothing fits {design.board} with {given}: m3vit hw cost says what is over")
    kinds = [name for name in BUDGETS if getattr(design.target, name)]
    fronts = {kind: front(found, kind) for kind in kinds}
    fastest = min(found, key=lambda p: (p.ms, sum(p.takes.values())))
    return {
        "note": "modelled; nothing was synthesised",
        "board": design.board,
        "tried": len(found),
        "budget": {name: int(BUDGETS[name] * getattr(design.target, name)) for name in kinds},
        "fronts": {kind: [_plain(p, design, layer_bits) for p in front_] for kind, front_ in fronts.items()},
        "fastest": _plain(fastest, design, layer_bits),
    }


def _plain(point: Point, design: Design, layer_bits: str | None) -> dict[str, Any]:
    return {"ms": point.ms, "takes": point.takes, "configuration": configuration(point.hardware, design, layer_bits)}


def configuration(h: Hardware, design: Design, layer_bits: str | None = None) -> dict[str, Any]:
    """Return the configuration file of engines: what read_design reads."""
    chosen = Design(design.board, design.part, design.clock, h.port_bits, {name: getattr(h, name) for name in SIZES})
    layers = {"layer_bits": layer_bits} if layer_bits else {}
    return {**chosen.plain(), "weight_bits": h.weight_bits, "act_bits": h.act_bits, **layers}


SHOWN = 12  # points of a front


def render(report: Mapping[str, Any]) -> str:
    """Return the fronts for people."""
    lines = [f"Modelled, {report['board']}: {report['tried']} engines fit; budgets {_takes(report['budget'])}"]
    for kind, points_ in report["fronts"].items():
        lines.append(f"ms against {kind}, the fastest first:")
        step = max(1, -(-len(points_) // SHOWN))
        lines += [f"  {_line(point)}" for point in points_[::step]]
        if step > 1:
            lines.append(f"  (one in {step} of {len(points_)}; --json has all)")
    return "\n".join([*lines, f"fastest: {_line(report['fastest'])}"])


def _takes(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _line(point: Mapping[str, Any]) -> str:
    c, sizes = point["configuration"], point["configuration"]["sizes"]
    chosen = f"W{c['weight_bits']}A{c['act_bits']}, array {sizes['tile_out']}, lanes {sizes['lanes']}"
    buffers = f"{sizes['groups']} groups, blocks of {sizes['token_block']}"
    ports = f"ports of {c['port_bits']} bits, weights through {sizes['weight_ports']}"
    stream = f", residual stream of {sizes['wide_bits']} bits" if sizes["wide_bits"] != 32 else ""
    return f"{point['ms']:8.2f} ms  {chosen}{stream}, {buffers}, {ports}; {_takes(point['takes'])}"
