"""The spatial schedule: a kernel for each layer, joined by streams, weights on chip; for models that fit on chip."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3vit.errors import InputError
from m3vit.export.hls import leaf
from m3vit.export.hls.calibration import calibrate
from m3vit.export.hls.conversion import convert
from m3vit.export.hls.schedules import Options, Runner
from m3vit.export.hls.spatial.fixed_point import INPUT, TASK, Chooser, Fixed
from m3vit.export.hls.spatial.readme import readme
from m3vit.export.hls.spatial.simulation import CHUNK_IMAGES, simulate
from m3vit.export.hls.spatial.tracing import trace
from m3vit.hw.sim import csim
from m3vit.models.budget import FULL, Budget
from m3vit.models.multitask import MultiTaskModel

__all__ = ["readme", "simulate", "trace"]  # parts of a schedule
LIMITS: Mapping[str, Sequence[int]] = {"weight_bits": range(6, 25), "act_bits": range(8, 25)}
ACT_BITS = 20
BOARD: str | None = None
MAX_TASK_CONSUMERS = 7  # hls4ml 1.3.0 cannot clone a stream more often (backends/fpga/passes/clone.py)

Formats = dict[str, dict[str, Fixed]]


def lower(model: MultiTaskModel, budget: Budget = FULL) -> leaf.LoweredModel:
    """Lower a model whose task id goes to MoE layers and heads as a stream. Raises InputError if there are too many."""
    layers = len(model.backbone.moe_indices)
    convolutions = any(head.conv is not None for head in leaf.token_heads(model).values())
    most = MAX_TASK_CONSUMERS - (2 if convolutions else 1)
    if layers > most:
        heads = "the heads and their convolutions" if convolutions else "the heads"
        raise InputError(
            f"cannot export to HLS: the model has {layers} MoE layers, and hls4ml can send the task id to "
            f"{most} of them and {heads}; set model.moe_blocks to at most {most} blocks, or give --schedule "
            "multiplexed, which has no such limit"
        )
    for block, counts in leaf.top_ks_of(model, budget).items():
        if len(set(counts)) > 1:
            given = ", ".join(f"{task} {count}" for task, count in zip(model.config.tasks, counts, strict=True))
            raise InputError(
                f"cannot export to HLS: the budget has another top_k for each task in block {block} ({given}), and the "
                "spatial schedule has one for all: give --top-k one number, or --schedule multiplexed"
            )
    return leaf.lower(model, budget)


def write(
    folder: Path, model: MultiTaskModel, calibration: np.ndarray, options: Options
) -> tuple[leaf.LoweredModel, dict[str, Any]]:
    """Write sources and weights; see schedules.Schedule."""
    lowered = lower(model, options.budget)
    seen = calibrate(lowered, csim.tokenise(calibration, lowered.patch), options.progress)
    formats = Chooser(seen, options.weight_bits, options.act_bits).choose()
    write_project(lowered, formats, folder)
    texts = {
        name: {kind: value.text(exact=kind == "accum") for kind, value in types.items()}
        for name, types in formats.items()
    }
    return lowered, {"precision": {"tokens": {"result": INPUT}, "task": {"result": TASK}, **texts}}


def write_project(model: leaf.LoweredModel, formats: Formats, out: Path) -> None:
    """Write the hls4ml project for backend Vitis, io_stream, into the folder `out`."""

    def settle(config: dict[str, Any]) -> None:
        _state_formats(model, formats, config["LayerName"])

    convert(model, out, backend="Vitis", io_type="io_stream", default_precision="ap_fixed<20,8>", settle=settle)
    _plug_in_dense(out / "firmware" / "parameters.h", sum(isinstance(m, leaf.VitLinear) for m in model.modules()))


def _state_formats(model: leaf.LoweredModel, formats: Formats, layers: dict[str, Any]) -> None:
    """State the formats of every layer, and how the token-wise Linears are scheduled."""
    layers["tokens"]["Precision"] = {"result": INPUT}
    layers["task"]["Precision"] = {"result": TASK}
    for name, types in formats.items():
        # result: auto would fall back to the model's default for layers hls4ml does not know.
        layers[name]["Precision"] = {kind: value.text(exact=kind == "accum") for kind, value in types.items()}
    missing = [name for name in layers if name not in formats and name not in ("tokens", "task")]
    assert not missing, f"no formats for {missing}"
    for name, module in model.named_modules():
        if isinstance(module, leaf.VitLinear):
            layer = layers[name.replace(".", "_")]
            # One multiplier an output, n_in cycles a token; hls4ml's default of 1 would want n_in * n_out multipliers.
            layer["Strategy"], layer["ReuseFactor"] = "resource", module.weight.shape[1]


def _plug_in_dense(parameters: Path, expected: int) -> None:
    """Name m3vit_dense.h's kernel in the `kernel` hook of hls4ml's convolution configurations.

    hls4ml has the hook in C++ (mult_config::kernel) but no configuration key for it.
    """
    text, found = re.subn(r"nnet::DenseResource_rf_leq_nin<", "nnet::vit::dense_kernel<", parameters.read_text())
    assert found == expected, f"{found} of {expected} Linears have hls4ml's Resource kernel"
    marker = '#include "nnet_utils/'
    parameters.write_text(text.replace(marker, f'{marker}m3vit_dense.h"\n{marker}', 1))


def write_bench(folder: Path, images: np.ndarray, outputs: dict[str, np.ndarray], manifest: dict[str, Any]) -> None:
    """Write the test bench's input and torch's outputs as text, a line a run: the first image for every task."""
    data, tasks = folder / "tb_data", len(outputs)
    first = [values[0] for values in outputs.values()]  # [T, C_r]
    tokens = csim.tokenise(images[:1], manifest["patch_size"]).repeat(tasks, axis=0)
    csim.write_input_lines(data / "tb_input_features.dat", tokens, np.arange(tasks))
    expected = np.zeros((tasks, manifest["tokens"], manifest["outputs"]), dtype=np.float32)
    for row, values in zip(expected, first, strict=True):
        row[:, : values.shape[-1]] = values
    np.savetxt(data / "tb_output_predictions.dat", expected.reshape(tasks, -1), fmt="%.7g")


def agreement(report: dict[str, Any]) -> str:
    """Return what agreed with what."""
    return f"bridge and test bench agree to {report['bridge_vs_testbench']:.0e}"


def said(report: dict[str, Any]) -> list[str]:
    """Return nothing: the table says it all."""
    return []


def runner(project: Path, manifest: dict[str, Any], budget: int = 0) -> Runner:
    """Build hls4ml's bridge and run images through its predict()."""
    csim.build_bridge(project)
    tasks = len(manifest["tasks"])

    def run(images: np.ndarray) -> np.ndarray:
        tokens = csim.tokenise(images, manifest["patch_size"])
        ids = np.tile(np.arange(tasks), len(images))
        outputs = csim.run_bridge(project, tokens.repeat(tasks, axis=0), ids).outputs
        return outputs.reshape(len(images), tasks, *outputs.shape[1:])

    return Runner("csim", CHUNK_IMAGES, run)
