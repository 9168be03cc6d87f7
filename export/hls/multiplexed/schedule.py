"""The multiplexed schedule: one engine of each kind, a program, weights in DDR; for models of any depth.

Written by hls4ml backend VitisMoE; simulated by its test bench beside the emulator, and scored by the emulator.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hls4ml
import numpy as np

from m3vit.export.hls import leaf
from m3vit.export.hls.budgets import calibrate_all, lowered_of, programs_of
from m3vit.export.hls.conversion import convert
from m3vit.export.hls.equalise import equalise, write_changes
from m3vit.export.hls.multiplexed import plugin
from m3vit.export.hls.multiplexed.formats import LIMITS, Formats, choose, few
from m3vit.export.hls.multiplexed.plugin import NAME
from m3vit.export.hls.multiplexed.readme import readme
from m3vit.export.hls.multiplexed.simulation import real_outputs, simulate
from m3vit.export.hls.multiplexed.tracing import trace
from m3vit.export.hls.schedules import Options, Runner
from m3vit.hw.fit import check_tokens, require_fit
from m3vit.hw.layer_bits import chosen_maps, names_of_maps
from m3vit.hw.manifest import WEIGHTS, budget_names
from m3vit.hw.network import Head, Network, maps_of, program_of
from m3vit.hw.output_memory import MANIFEST_KEY
from m3vit.hw.sim.emulator import Emulator
from m3vit.models.multitask import MultiTaskModel

__all__ = ["LIMITS", "readme", "simulate", "trace"]  # parts of a schedule
ACT_BITS = 16
BOARD: str | None = "zcu104"
SEVERAL_BUDGETS = True
CHECK_FRAMES = 1  # stored images that `make check` runs, each for every budget and task


def write(
    folder: Path, model: MultiTaskModel, calibration: np.ndarray, options: Options
) -> tuple[leaf.LoweredModel, dict[str, Any]]:
    """Write sources and weights; see schedules.Schedule."""
    rows, columns = (side // model.backbone.patch_size for side in model.config.image_size)
    check_tokens(rows * columns + model.backbone.trunk.num_prefix_tokens)
    budgets = list(options.budgets.values())
    lowered = lowered_of(model, budgets)
    require_engines(lowered[0], options)
    return lowered[0], write_project(lowered, programs_of(model, budgets), calibration, options, folder)


def sizes_of(model: leaf.LoweredModel) -> Network:
    """Return the sizes of a lowered model."""
    blocks: list[Any] = list(model.blocks)
    banks = [block.moe if block.is_moe else None for block in blocks]
    dim = model.position.table.shape[1]
    if hasattr(model, "pixel_head"):
        upscale, features = model.pixel_head.upscale, model.head.widths
        tasks = [Head(width, count) for width, count in zip(features, model.pixel_head.channels, strict=True)]
    else:
        upscale, tasks = 1, [Head(width) for width in model.head.widths]
    gates = [bank for bank in banks if bank is not None]
    same = all(
        (bank.router_w == bank.router_w[:1]).all() and (bank.router_b == bank.router_b[:1]).all() for bank in gates
    )
    return Network(
        grid=model.grid,
        patch=model.patch,
        prefix=model.head.prefix,
        dim=dim,
        heads=blocks[0].attn.num_heads,
        mlps=[
            block.fc1.weight.shape[0] if bank is None else bank.w1.shape[1]
            for block, bank in zip(blocks, banks, strict=True)
        ],
        top_ks=[0 if bank is None else bank.top_k for bank in banks],
        experts=max((bank.w1.shape[0] for bank in gates), default=1),
        tasks=tasks,
        upscale=upscale,
        same_gates=same,
        pre_norm=hasattr(model, "norm_pre"),
    )


def map_names(model: leaf.LoweredModel) -> list[str]:
    """Return the names of the maps of a lowered model whose inputs may have 16 bits."""
    return names_of_maps((name for name, _ in model.blocks.named_children()), hasattr(model, "pixel_head"))


def require_engines(model: leaf.LoweredModel, options: Options) -> None:
    """Raise InputError, before the long work, if no engines for a model fit the board."""
    assert options.design is not None
    board, fixed = options.design.target, options.design.sizes
    network = sizes_of(model)
    # The network's blocks are counted from 0 on, also where a budget leaves some out.
    names = dict(zip(map_names(model), maps_of(network), strict=True))
    fine = frozenset(names[name] for name in chosen_maps(options.layers, names))
    program = program_of(network, options.weight_bits, options.act_bits, board.port_bits, fine)
    require_fit(program, options.weight_bits, options.act_bits, board, fixed)


def _precisions(formats: Formats, config: dict[str, Any]) -> None:
    """State the result type of every layer in an hls4ml configuration."""
    narrow_layers = {name for name, kinds in formats.layers.items() if "result" in kinds}
    for name, layer in config["LayerName"].items():
        wide = formats.layers.get(name, {}).get("stream", formats.wide)
        layer["Precision"] = {"result": f"ap_fixed<{formats.wide_bits},{formats.wide_bits - wide},AP_RND,AP_SAT>"}
        if name in narrow_layers:
            bits, frac = formats.bits.get(name, {}).get("result", formats.act_bits), formats.layers[name]["result"]
            layer["Precision"] = {"result": f"ap_fixed<{bits},{bits - frac},AP_RND,AP_SAT>"}
    config["LayerName"]["tokens"]["Precision"] = {"result": "ap_ufixed<8,0>"}
    config["LayerName"]["task"]["Precision"] = {"result": "ap_uint<8>"}


def write_project(
    models: Sequence[leaf.LoweredModel],
    programs: Sequence[dict[str, Any]],
    calibration: np.ndarray,
    options: Options,
    out: Path,
) -> dict[str, Any]:
    """Write the project into the folder `out`; return what its manifest says of precision and hardware.

    models, programs: as of `lowered_of` and `programs_of`. calibration: images uint8 [m, H, W, 3].
    """
    model = models[0]
    if NAME.lower() not in hls4ml.backends.get_available_backends():  # installed without its entry point
        plugin.register(
            register_backend=hls4ml.backends.register_backend, register_writer=hls4ml.writer.register_writer
        )
    changes = equalise(models, calibration, options.progress) if few(options.act_bits) else None
    seen = calibrate_all(models, calibration, options.progress, octaves=few(options.act_bits))
    wide_bits = options.design.sizes.get("wide_bits", 32) if options.design else 32
    fine = chosen_maps(options.layers, map_names(model))
    formats = choose(seen, options.weight_bits, options.act_bits, wide_bits, fine)
    options.progress(0, 1, "hls4ml's conversion, quantisation and the program")
    graph = convert(
        model,
        out,
        backend=NAME,
        io_type="io_parallel",
        default_precision="ap_fixed<32,16>",  # the pass quantises the weights itself
        settle=lambda config: _precisions(formats, config),
        design=options.design.plain() if options.design else {"board": BOARD},
        formats=formats._asdict(),
        grid=list(model.grid),
        patch=model.patch,
        programs=list(programs),
    )
    if changes:
        write_changes(out, changes)
    schedule = graph.schedule
    kinds = {name: dict(layer) for name, layer in formats.layers.items()}
    return {
        "precision": {
            "weight_bits": formats.weight_bits,
            "act_bits": formats.act_bits,
            "wide_frac": formats.wide,
            "wide_bits": formats.wide_bits,
            "layers": kinds,
            **({"layer_bits": {name: dict(layer) for name, layer in formats.bits.items()}} if formats.bits else {}),
            **({"maps_of_16_bits": sorted(fine)} if fine else {}),
            "largest_sum_bits": schedule.sum_bits,
        },
        "board": options.board,
        **({"design": options.design.plain()} if options.design else {}),
        "hardware": schedule.hardware.plain(),
        "output_fracs": schedule.output_fracs,
        MANIFEST_KEY: schedule.output_layout._asdict(),
        **({"entries": list(schedule.image.starts)} if len(programs) > 1 else {}),
        **({"filled": schedule.filled} if schedule.filled else {}),
    }


def write_bench(folder: Path, images: np.ndarray, outputs: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    """Write what `make check` compares: frames, their task ids and the emulator's outputs."""
    tasks, budgets, frames = len(outputs), len(budget_names(manifest)), images[:CHECK_FRAMES]
    emulators = [Emulator.open(folder / WEIGHTS, budget) for budget in range(budgets)]
    results = [result for frame in frames for one in emulators for result in one.run_tasks(frame, list(range(tasks)))]
    data = folder / "tb_data"
    frames.repeat(budgets * tasks, axis=0).tofile(data / "images.bin")
    ids = np.tile(np.arange(tasks, dtype=np.uint8), len(frames) * budgets)
    of_budgets = np.tile(np.arange(budgets, dtype=np.uint8).repeat(tasks), len(frames))
    np.concatenate([ids, of_budgets] if budgets > 1 else [ids]).tofile(data / "tasks.bin")
    np.concatenate([result.outputs for result in results]).astype(np.int32).tofile(data / "expected_outputs.bin")


def agreement(report: dict[str, Any]) -> str:
    """Return what agreed with what."""
    return "every word is the emulator's"


def said(report: dict[str, Any]) -> list[str]:
    """Return lines on traffic, saturation and time."""
    beyond = ", ".join(f"{engine} {count}" for engine, count in report["saturated"].items()) or "none"
    seconds = report["s_per_image"]
    traffic = ", ".join(f"{task} {sum(ports.values()) / 1e6:.1f}" for task, ports in report["traffic"].items())
    return [
        f"DDR traffic a frame, MB: {traffic}",
        f"all {report['words']} output words equal the emulator's; values saturated: {beyond}; "
        f"{seconds['testbench']:.2f} s an image for C-sim, {seconds['emulator']:.2f} s for the emulator",
    ]


def runner(project: Path, manifest: dict[str, Any], budget: int = 0) -> Runner:
    """Open the emulator, which gives the words of the C-simulation; tasks share what no task changes."""
    emulator, tasks = Emulator.open(project / WEIGHTS, budget), list(range(len(manifest["tasks"])))

    def run(images: np.ndarray) -> np.ndarray:
        words = np.stack([[result.outputs for result in emulator.run_tasks(image, tasks)] for image in images])
        return real_outputs(words.reshape(len(images), len(tasks), manifest["tokens"], -1), manifest)

    return Runner("emulator", 1, run)
