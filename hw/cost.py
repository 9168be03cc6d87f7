"""What a program costs on a board: cycles by instruction and engine, bytes by port, floors. No torch.

Everything here is modelled. The cycles are those of the loops of hw/include/engine as they are written (m3vit.hw.ops),
with what Assumptions adds for pipelines and memory. The floor is what no engine on this board could be faster than:
every multiplier of the budget busy in every cycle, each weight read once, through one port or over all of the memory's
bandwidth.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from m3vit.hw import ops
from m3vit.hw.boards import BUDGETS, Board, resources
from m3vit.hw.hardware import Hardware
from m3vit.hw.isa import Experts, Instruction, Op, Route
from m3vit.hw.ops import ENGINES, LOOPS, ON_ARRAY, OPS, PORTS, Timing

PORTS_OF_WEIGHTS = {1: "one port", 2: "two ports"}
LOOSE = 1.5  # an engine this far above its multipliers and its busiest port waits for its own loops


@dataclass(frozen=True)
class Assumptions:
    """What is assumed of pipelines and memory, which no tool said.

    depth: cycles to fill and drain a pipelined loop. read, write: from the request of a burst to its first word, and
    from the last word to the answer, paid at each entry of a loop that moves words (68.5 measured on a ZCU102, see
    docs/accelerator.md). efficiency: of the memory's peak bandwidth. A port moves at most a word a cycle.
    """

    depth: int = 12
    read: int = 70
    write: int = 40
    efficiency: float = 0.92

    @property
    def timing(self) -> Timing:
        """What entering a loop costs."""
        return Timing(self.depth, self.read, self.write)


class Line(NamedTuple):
    """An instruction: `loops` are the trips alone, `memory` its bytes over the bandwidth, `cycles` what it takes."""

    pc: int
    op: Op
    engine: str
    macs: int
    loops: int
    memory: int
    cycles: int
    bytes: dict[str, int]


def uniform_queues(rows: int, experts: int, top_k: int) -> list[int]:
    """Return how many tokens each expert with any has, if every token drew `top_k` different ones at random."""
    used = max(top_k, min(experts, round(experts * (1 - (1 - top_k / experts) ** rows))))
    whole, more = divmod(rows * top_k, used)
    return [whole + 1] * more + [whole] * (used - more)


def _timing(board: Board, assumed: Assumptions) -> Timing:
    """Return what is assumed of loops, with what the board's memory gives."""
    a_cycle = board.bandwidth_gb_s * 1e3 * assumed.efficiency / board.clock_mhz
    return assumed.timing._replace(bytes_a_cycle=a_cycle)


def lines_of(
    program: Sequence[Instruction],
    hardware: Hardware,
    board: Board,
    task: int = 0,
    assumed: Assumptions = Assumptions(),
    queues: Sequence[Sequence[int]] = (),
) -> list[Line]:
    """Return what each instruction costs in a frame of `task`.

    queues: of each layer with experts the tokens of those that have any; without, as uniform_queues.
    """
    given, lines, queue = iter(queues), [], list[int]()
    timing = _timing(board, assumed)
    for pc, i in enumerate(program):
        skipped = i.task not in (-1, task)
        if isinstance(i, Route) and not skipped:
            queue = list(next(given, uniform_queues(i.rows, i.n_in, i.top_k)))
        chosen = queue if isinstance(i, Experts) else ()
        moved = ops.traffic(i, hardware, chosen, skipped)
        loops, timed = (ops.cycles(i, hardware, chosen, t, skipped) for t in (LOOPS, timing))
        memory = round(sum(moved.values()) / timing.bytes_a_cycle)
        macs = 0 if skipped else OPS[i.op].macs(i, chosen)
        lines.append(Line(pc, i.op, OPS[i.op].engine, macs, loops, memory, max(timed, memory), moved))
    return lines


def cycles_of(
    instruction: Instruction,
    hardware: Hardware,
    board: Board,
    queue: Sequence[int] = (),
    assumed: Assumptions = Assumptions(),
) -> int:
    """Return the cycles of one instruction that runs, as lines_of has them."""
    timing = _timing(board, assumed)
    memory = round(sum(ops.traffic(instruction, hardware, queue).values()) / timing.bytes_a_cycle)
    return max(ops.cycles(instruction, hardware, queue, timing), memory)


def products_of(engine: str, h: Hardware) -> int:
    """Return the products that an engine makes in a cycle; linear maps and attention take turns on one array."""
    return h.tile_in * h.tile_out if engine in ON_ARRAY else 0


def _bound(engine: str, h: Hardware, lines: Sequence[Line], port_bytes: int) -> tuple[str, int]:
    """Return what an engine could not be faster than as it is, its multipliers or a port, and those cycles."""
    multipliers = products_of(engine, h)
    busy = {f"port {port}": sum(line.bytes[port] for line in lines) // port_bytes for port in PORTS}
    if multipliers:
        busy["multipliers"] = sum(line.macs for line in lines) // multipliers
    name = max(busy, key=lambda key: busy[key])
    return name, busy[name]


def floor(
    lines: Sequence[Line], hardware: Hardware, board: Board, assumed: Assumptions, weights: int
) -> dict[str, float]:
    """Return the milliseconds that each of three things takes at least; weights: bytes of those that a frame uses."""
    products = board.products_a_dsp if max(hardware.weight_bits, hardware.act_bits) <= 8 else 1
    per_ms = board.clock_mhz * 1e3
    multipliers = int(BUDGETS["dsp"] * board.dsp) * products
    return {
        "multipliers": sum(line.macs for line in lines) / (multipliers * per_ms),
        f"weights through {PORTS_OF_WEIGHTS[hardware.weight_ports]}": weights
        / (hardware.weight_ports * board.port_bits // 8 * per_ms),
        "weights over all of the bandwidth": weights / (board.bandwidth_gb_s * 1e6 * assumed.efficiency),
    }


def weights_used(program: Sequence[Instruction], hardware: Hardware, lines: Sequence[Line], task: int) -> int:
    """Return the bytes of the weights that a frame uses, each once; of experts, of those that have tokens."""
    total, used = 0, 0
    for i, line in zip(program, lines, strict=True):
        if isinstance(i, Route) and i.task in (-1, task):
            used = len(uniform_queues(i.rows, i.n_in, i.top_k))
        if i.task in (-1, task) and line.bytes["weights"]:
            copies = 2 * used if isinstance(i, Experts) else 1
            total += copies * i.n_in * i.n_out * hardware.weight_word // 8  # type: ignore[attr-defined]
    return total


def cost(
    program: Sequence[Instruction],
    hardware: Hardware,
    board: Board,
    task: int = 0,
    assumed: Assumptions = Assumptions(),
) -> dict[str, Any]:
    """Return what `m3vit hw cost` prints, as JSON values: the instructions, the engines, the frame, the floor."""
    lines = lines_of(program, hardware, board, task, assumed)
    per_ms, port_bytes = board.clock_mhz * 1e3, board.port_bits // 8
    engines = {}
    for engine in ENGINES:
        own = [line for line in lines if line.engine == engine]
        cycles = sum(line.cycles for line in own)
        if not cycles:
            continue
        multipliers, macs = products_of(engine, hardware), sum(line.macs for line in own)
        name, least = _bound(engine, hardware, own, port_bytes)
        memory = sum(line.memory for line in own)
        if max(least, memory) * LOOSE < cycles:
            bound = f"its loops (then {name}, {least / per_ms:.2f} ms)"
        else:
            bound = name if least >= memory else "bandwidth of the memory"
        engines[engine] = {
            "products_a_cycle": multipliers,
            "macs": macs,
            "loops_ms": sum(line.loops for line in own) / per_ms,
            "ms": cycles / per_ms,
            "macs_a_cycle": macs / cycles,
            "bytes": sum(sum(line.bytes.values()) for line in own),
            "bound": bound,
        }
    frame, loops = (sum(getattr(line, name) for line in lines) / per_ms for name in ("cycles", "loops"))
    floors = floor(lines, hardware, board, assumed, weights_used(program, hardware, lines, task))
    return {
        "note": "modelled; nothing was synthesised",
        "board": board.name,
        "clock_mhz": board.clock_mhz,
        "hardware": hardware.plain(),
        "assumed": asdict(assumed),
        "task": task,
        "ms": frame,
        "loops_ms": loops,
        "floor_ms": floors,
        "ratio": frame / max(floors.values()),
        "macs": sum(line.macs for line in lines),
        "bytes": {port: sum(line.bytes[port] for line in lines) for port in PORTS},
        "engines": engines,
        "resources": resources(hardware),
        "budget": {name: int(share * getattr(board, name)) for name, share in BUDGETS.items()},
        "instructions": [line._asdict() | {"op": line.op.name.lower()} for line in lines],
    }


def render(report: dict[str, Any]) -> str:
    """Return the table for people."""
    h, assumed = report["hardware"], report["assumed"]
    stream = f"{h['wide_bits']}-bit residual stream, " if h["wide_bits"] != 32 else ""
    fine = " (some inputs 16)" if h.get("max_bytes") else ""
    rows = [("engine", "products/cycle", "GMAC", "MACs/cycle", "MB", "loops ms", "ms", "bound by")]
    for name, e in report["engines"].items():
        numbers = (f"{e['macs'] / 1e9:.2f}", f"{e['macs_a_cycle']:.0f}", f"{e['bytes'] / 1e6:.1f}")
        times = (f"{e['loops_ms']:.2f}", f"{e['ms']:.2f}", e["bound"])
        rows.append((name, str(e["products_a_cycle"] or ""), *numbers, *times))
    total = (f"{report['macs'] / 1e9:.2f}", "", f"{sum(report['bytes'].values()) / 1e6:.1f}")
    rows.append(("frame", "", *total, f"{report['loops_ms']:.2f}", f"{report['ms']:.2f}", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(
            cell.ljust(width) if column in (0, 7) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    name = max(report["floor_ms"], key=lambda key: report["floor_ms"][key])
    floors = ", ".join(f"{key} {value:.2f}" for key, value in report["floor_ms"].items())
    ports = ", ".join(f"{port} {count / 1e6:.1f}" for port, count in report["bytes"].items() if count)
    others = [
        f"budget {budget}: {found['ms']:.2f} ms, {found['macs'] / 1e9:.2f} GMAC, {found['bytes'] / 1e6:.1f} MB, "
        f"{found['instructions']} instructions"
        for budget, found in report.get("budgets", {}).items()
    ]
    of_budget = f", budget {report['of_budget']}" if "of_budget" in report else ""
    used = ", ".join(f"{kind} {count} of {report['budget'][kind]}" for kind, count in report["resources"].items())
    return "\n".join(
        [
            f"Modelled, task {report['task']}{of_budget}: {report['board']} at {report['clock_mhz']} MHz, "
            f"{h['weight_bits']}-bit weights, {h['act_bits']}-bit activations{fine}, {stream}"
            f"array {h['tile_in']} x {h['tile_out']}, blocks of {h['token_block']} tokens",
            *table,
            *others,
            f"floor, ms: {floors}; the frame is {report['ratio']:.1f} times its {name}",
            f"MB by port: {ports}",
            f"resources: {used}",
            f"assumed: {assumed['depth']} cycles a loop for its pipeline, {assumed['read']} a burst read and "
            f"{assumed['write']} a burst written, {assumed['efficiency']:.0%} of the memory's bandwidth; tokens "
            "spread over experts at random; `loops ms` has none of these",
        ]
    )
