"""From the lowered model to an hls4ml ModelGraph, with every precision stated, and to a project folder."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import hls4ml
import yaml

from m3vit.export.hls import handlers, leaf
from m3vit.export.hls.precision import INPUT, TASK, Fixed

PROJECT = "m3vit"


def configure(model: leaf.LoweredModel, formats: dict[str, dict[str, Fixed]]) -> dict[str, Any]:
    """Return the hls4ml configuration: the formats of every layer, and how the token-wise Linears are scheduled."""
    rows, columns = model.grid
    shapes = [(rows * columns, model.embed.weight.shape[1]), (1,)]
    config = hls4ml.utils.config_from_pytorch_model(
        model,
        shapes,
        granularity="name",
        backend="Vitis",
        default_precision="ap_fixed<20,8>",  # of nothing in the end: see below
        channels_last_conversion="off",  # our handlers transpose the weights themselves
        transpose_outputs=False,
    )
    config["InputShape"] = [list(shape) for shape in shapes]  # plain YAML: tuples could not be read back safely
    layers = config["LayerName"]
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
    return config


def write_project(model: leaf.LoweredModel, formats: dict[str, dict[str, Fixed]], out: Path) -> None:
    """Write the hls4ml project for backend Vitis, io_stream, into the folder `out`."""
    handlers.register()
    with contextlib.redirect_stdout(io.StringIO()):  # hls4ml prints its progress
        config = configure(model, formats)
        graph = hls4ml.converters.convert_from_pytorch_model(
            model,
            output_dir=str(out),
            project_name=PROJECT,
            backend="Vitis",
            io_type="io_stream",
            hls_config=config,
        )
        graph.config.config["PytorchModel"] = None  # else the torch module itself goes into hls4ml_config.yml
        graph.write()
    _plug_in_dense(out / "firmware" / "parameters.h", sum(isinstance(m, leaf.VitLinear) for m in model.modules()))
    quote_weights_folder(out / "build_lib.sh")
    settings = out / "hls4ml_config.yml"
    content = yaml.safe_load(settings.read_text())
    content["OutputDir"] = "."  # no path of this machine; hls4ml's link_existing_project then works from the folder
    # hls4ml sorts its YAML by name, but predict() takes this order for that of the arguments.
    content["InputShapes"] = {name: content["InputShapes"][name] for name in ("tokens", "task")}
    settings.write_text(yaml.safe_dump(content, sort_keys=False))


def quote_weights_folder(script: Path) -> None:
    """Make hls4ml's build_lib.sh work in a folder of any name: the path becomes a string of C++, quotes and all."""
    plain = (
        'BASEDIR="$(cd "$(dirname "$0")" && pwd)"\n',
        'WEIGHTS_DIR="\\"${BASEDIR}/firmware/weights\\""\n',
    )
    quoting = r"""BASEDIR="$(cd "$(dirname "$0")" && pwd && echo x)" # x: newlines at the end of a name are cut off
BASEDIR="${BASEDIR%?x}"
ESCAPED="${BASEDIR//\\/\\\\}"
ESCAPED="${ESCAPED//\"/\\\"}"
ESCAPED="${ESCAPED//\?/\\?}" # no trigraphs
ESCAPED="${ESCAPED//$'\n'/\\n}"
WEIGHTS_DIR="\"${ESCAPED}/firmware/weights\""
"""
    text = script.read_text()
    assert text.count("".join(plain)) == 1, "hls4ml's build_lib.sh is another one"
    script.write_text(text.replace("".join(plain), quoting))


def _plug_in_dense(parameters: Path, expected: int) -> None:
    """Name m3vit_dense.h's kernel in the `kernel` hook of hls4ml's convolution configurations.

    hls4ml has the hook in C++ (mult_config::kernel) but no configuration key for it.
    """
    text, found = re.subn(r"nnet::DenseResource_rf_leq_nin<", "nnet::vit::dense_kernel<", parameters.read_text())
    assert found == expected, f"{found} of {expected} Linears have hls4ml's Resource kernel"
    marker = '#include "nnet_utils/'
    parameters.write_text(text.replace(marker, f'{marker}m3vit_dense.h"\n{marker}', 1))
