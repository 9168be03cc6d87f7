"""How the accelerator scales, modelled: tasks and budgets in turn, 4 to 256 experts, ports, 129 to 4097 tokens.

Usage: python benchmarks/scaling.py [--plot FILE.png] [--json FILE]

All of it is the closed form of `m3vit hw cost` for M3ViT-S (384 channels, 12 blocks, experts in every second one, top-4
of 16, four tasks with linear heads) on a ZCU104 at W8A8, engines fitted to each case; budgets, which differ in experts
a token, have the engines of the whole model. Nothing was synthesised. Tokens are spread over experts at random.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from m3vit.files import write_json
from m3vit.hw.boards import find_board
from m3vit.hw.cost import cost
from m3vit.hw.fit import fit
from m3vit.hw.hardware import Hardware
from m3vit.hw.network import Head, Network, program_of

BITS = (8, 8)
WIDTHS = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
M3VIT_S = Network(
    grid=(30, 40),
    patch=16,
    prefix=1,
    dim=384,
    heads=12,
    mlps=[1536, 384] * 6,
    top_ks=[0, 4] * 6,
    experts=16,
    tasks=[Head(width * 16) for width in WIDTHS.values()],
    upscale=4,
)
GRIDS = {129: (8, 16), 257: (16, 16), 577: (24, 24), 1025: (32, 32), 2049: (32, 64), 4097: (64, 64)}


BOARD = find_board("zcu104")
FITTED: dict[str, Hardware] = {}  # by network and what is fixed: to fit engines takes half a minute


def engines(network: Network, **fixed: Any) -> Hardware:
    """Return the engines fitted to a network."""
    key = f"{network} {fixed}"
    if key not in FITTED:
        FITTED[key] = fit(program_of(network, *BITS, BOARD.port_bits), *BITS, BOARD, fixed)
    return FITTED[key]


def frame(network: Network, task: int = 0, hardware: Hardware | None = None, **fixed: Any) -> dict[str, Any]:
    """Return the cost of a frame, with engines fitted to the network, or others."""
    program = program_of(network, *BITS, BOARD.port_bits)
    return cost(program, hardware or engines(network, **fixed), BOARD, task)


def row(report: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of a frame: ms, MB, of which weights, and tile_out of its engines."""
    moved = report["bytes"]
    return {
        "ms": report["ms"],
        "mb": sum(moved.values()) / 1e6,
        "weights_mb": moved["weights"] / 1e6,
        "gates_mb": moved["gates"] / 1e6,
        "array": report["hardware"]["tile_out"],
        "tokens_a_block": report["hardware"]["token_block"],
    }


def switching() -> list[dict[str, Any]]:
    """Return each task in every frame, and all in turn: engines are those of the program, whatever runs."""
    program_frames = [frame(M3VIT_S, task) for task in range(len(WIDTHS))]
    rows = [{"case": name, **row(report)} for name, report in zip(WIDTHS, program_frames, strict=True)]
    return [*rows, in_turn(rows)]


def in_turn(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean frame: nothing is kept from one to the next."""
    mean = {key: sum(one[key] for one in rows) / len(rows) for key in rows[0] if key != "case"}
    return {"case": "all in turn, a frame each", **mean}


def budgets() -> list[dict[str, Any]]:
    """Return budgets of four, two and one expert a token, and all in turn, with the engines of the whole model."""
    rows = []
    for top_k in (4, 2, 1):
        fewer = replace(M3VIT_S, top_ks=[0, top_k] * 6)
        rows.append({"case": f"{top_k} experts a token", **row(frame(fewer, hardware=engines(M3VIT_S)))})
    return [*rows, in_turn(rows)]


def experts() -> list[dict[str, Any]]:
    """Return 4 to 256 experts, four a token."""
    counts = (4, 8, 16, 32, 64, 128, 256)
    return [{"case": count, **row(frame(replace(M3VIT_S, experts=count)))} for count in counts]


def ports() -> list[dict[str, Any]]:
    """Return one and two ports of weights, which is what the engines have, at many and at few tokens."""
    small = replace(M3VIT_S, grid=GRIDS[129])
    return [
        {"case": f"{count}, {tokens} tokens", **row(frame(network, weight_ports=count))}
        for tokens, network in ((1201, M3VIT_S), (129, small))
        for count in (1, 2)
    ]


def tokens() -> list[dict[str, Any]]:
    """Return 129 to 4097 tokens."""
    return [{"case": count, **row(frame(replace(M3VIT_S, grid=grid)))} for count, grid in GRIDS.items()]


SERIES = {"tasks": switching, "budgets": budgets, "experts": experts, "ports of weights": ports, "tokens": tokens}


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw ms and MB against each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.5), layout="constrained")
    figure.suptitle("M3ViT-S, W8A8, ZCU104: modelled, nothing was synthesised")
    places = list(figure.subplots(2, 3).flat)
    for empty in places[len(found) :]:
        empty.remove()
    for axes, (name, rows) in zip(places, found.items(), strict=False):
        cases = [str(one["case"]).replace(", ", "\n") for one in rows]
        axes.bar(range(len(rows)), [one["ms"] for one in rows], color="0.75")
        axes.set(title=name, ylabel="ms a frame")
        axes.set_xticks(range(len(rows)), cases, fontsize=8)
        other = axes.twinx()
        other.plot([one["mb"] for one in rows], "o-", color="C0", label="all")
        other.plot([one["weights_mb"] for one in rows], "s--", color="C1", label="weights")
        other.set(ylabel="MB a frame", ylim=(0, None))
        other.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("modelled: M3ViT-S at 480x640 unless told otherwise, W8A8, ZCU104, the first task unless told otherwise")
    found = {}
    for name, series in SERIES.items():
        rows = found[name] = series()
        print(f"\n{name:<28}{'ms':>9}{'MB':>9}{'weights':>9}{'gates':>8}{'array':>7}{'block':>7}")
        for one in rows:
            sizes = f"{one['array']:>7.0f}{one['tokens_a_block']:>7.0f}"
            print(
                f"{one['case']!s:<28}{one['ms']:>9.2f}{one['mb']:>9.1f}{one['weights_mb']:>9.1f}{one['gates_mb']:>8.3f}{sizes}"
            )
    if args.plot:
        plot(found, args.plot)
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
