"""From the lowered model to a time-multiplexed project: conversion by hls4ml backend VitisMoE, and frames to check."""

import contextlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hls4ml
import numpy as np
import yaml

from m3vit.errors import InputError
from m3vit.export.hls import handlers, leaf
from m3vit.export.hls.convert import PROJECT, quote_weights_folder
from m3vit.export.hls.multiplexed import plugin
from m3vit.export.hls.multiplexed.backend import NAME, hardware_of
from m3vit.export.hls.multiplexed.formats import LIMITS, Formats, choose
from m3vit.export.hls.precision import calibrate
from m3vit.hw.boards import find_board, fit
from m3vit.hw.hardware import Hardware
from m3vit.hw.manifest import WEIGHTS
from m3vit.hw.sim.csim import tokenise
from m3vit.hw.sim.emulator import Emulator

CHECK_FRAMES = 1  # stored images that `make check` runs, each for every task


@dataclass
class Options:
    """What a user chooses of a multiplexed project."""

    board: str = "zcu104"
    weight_bits: int = 16
    act_bits: int = 16

    def check(self) -> None:
        """Raise InputError for values that no project can be made with."""
        find_board(self.board)
        for name, allowed in LIMITS.items():
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name} is {value}: the multiplexed schedule has {', '.join(map(str, allowed))}")


def needed_hardware(model: leaf.LoweredModel, options: Options) -> Hardware:
    """Return the engines for a model, fitted to the board; raises InputError before any work if they do not fit."""
    limits = {"max_in": 1, "max_dim": 1, "max_experts": 1, "max_top": 1, "max_head": 1, "max_rows": 1}

    def reach(**values: int) -> None:
        for name, value in values.items():
            limits[name] = max(limits[name], value)

    for module in model.modules():
        if isinstance(module, leaf.VitLinear):
            reach(max_in=module.weight.shape[1])
        elif isinstance(module, leaf.VitMoE):
            experts, hidden, dim = module.w1.shape
            reach(max_in=max(hidden, dim), max_experts=experts, max_top=module.top_k)
        elif isinstance(module, leaf.VitPosition):
            reach(max_rows=module.table.shape[0], max_dim=module.table.shape[1])
    for block in model.blocks:
        attention: Any = block.attn
        reach(max_head=limits["max_dim"] // attention.num_heads)
    return fit(hardware_of(limits, options.weight_bits, options.act_bits), find_board(options.board))


def _precisions(model: leaf.LoweredModel, formats: Formats, config: dict[str, Any]) -> None:
    """State the result type of every layer in an hls4ml configuration."""
    narrow_layers = {name for name, kinds in formats.layers.items() if "result" in kinds}
    wide = f"ap_fixed<32,{32 - formats.wide},AP_RND,AP_SAT>"
    for name, layer in config["LayerName"].items():
        layer["Precision"] = {"result": wide}
        if name in narrow_layers:
            bits, frac = formats.act_bits, formats.layers[name]["result"]
            layer["Precision"] = {"result": f"ap_fixed<{bits},{bits - frac},AP_RND,AP_SAT>"}
    config["LayerName"]["tokens"]["Precision"] = {"result": "ap_ufixed<8,0>"}
    config["LayerName"]["task"]["Precision"] = {"result": "ap_uint<8>"}


def write_project(model: leaf.LoweredModel, calibration: np.ndarray, options: Options, out: Path) -> dict[str, Any]:
    """Write the project into the folder `out`; return what its manifest says of precision and hardware.

    calibration: images uint8 [m, H, W, 3].
    """
    handlers.register()
    if NAME.lower() not in hls4ml.backends.get_available_backends():  # installed without its entry point
        plugin.register(
            register_backend=hls4ml.backends.register_backend, register_writer=hls4ml.writer.register_writer
        )
    formats = choose(calibrate(model, tokenise(calibration, model.patch)), options.weight_bits, options.act_bits)
    rows, columns = model.grid
    shapes = [(rows * columns, model.embed.weight.shape[1]), (1,)]
    with contextlib.redirect_stdout(io.StringIO()):  # hls4ml prints its progress
        config = hls4ml.utils.config_from_pytorch_model(
            model,
            shapes,
            granularity="name",
            backend=NAME,
            default_precision="ap_fixed<32,16>",  # of nothing in the end: the pass quantises the weights itself
            channels_last_conversion="off",
            transpose_outputs=False,
        )
        config["InputShape"] = [list(shape) for shape in shapes]
        _precisions(model, formats, config)
        graph = hls4ml.converters.convert_from_pytorch_model(
            model,
            output_dir=str(out),
            project_name=PROJECT,
            backend=NAME,
            io_type="io_parallel",
            hls_config=config,
            board=options.board,
            formats=formats._asdict(),
            grid=list(model.grid),
            patch=model.patch,
        )
        graph.config.config["PytorchModel"] = None  # else the torch module itself goes into hls4ml_config.yml
        graph.write()
    quote_weights_folder(out / "build_lib.sh")
    settings = out / "hls4ml_config.yml"
    content = yaml.safe_load(settings.read_text())
    content["OutputDir"] = "."
    # hls4ml sorts its YAML by name, but predict() takes this order for that of the arguments.
    content["InputShapes"] = {name: content["InputShapes"][name] for name in ("tokens", "task")}
    settings.write_text(yaml.safe_dump(content, sort_keys=False))
    schedule = graph.schedule
    kinds = {name: dict(layer) for name, layer in formats.layers.items()}
    return {
        "precision": {
            "weight_bits": formats.weight_bits,
            "act_bits": formats.act_bits,
            "wide_frac": formats.wide,
            "layers": kinds,
            "largest_sum_bits": schedule.sum_bits,
        },
        "board": options.board,
        "hardware": asdict(schedule.hardware),
        "output_fracs": [kinds["head"][f"output{task}"] for task in range(len(model.tasks))],
    }


def write_check(folder: Path, images: np.ndarray, tasks: int) -> None:
    """Write tb_data/ of the stand-alone test bench: frames, their task ids and the emulator's outputs."""
    emulator = Emulator.open(folder / WEIGHTS)
    frames = images[:CHECK_FRAMES]
    results = [result for frame in frames for result in emulator.run_tasks(frame, list(range(tasks)))]
    data = folder / "tb_data"
    data.mkdir(exist_ok=True)
    frames.repeat(tasks, axis=0).tofile(data / "images.bin")
    np.tile(np.arange(tasks, dtype=np.uint8), len(frames)).tofile(data / "tasks.bin")
    np.concatenate([result.outputs for result in results]).astype(np.int32).tofile(data / "expected_outputs.bin")
