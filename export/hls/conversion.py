"""From the lowered model to an hls4ml project folder: what both schedules have in common."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hls4ml
import yaml

from m3vit.export.hls import handlers, leaf

PROJECT = "m3vit"


def convert(
    model: leaf.LoweredModel,
    out: Path,
    *,
    backend: str,
    io_type: str,
    default_precision: str,
    settle: Callable[[dict[str, Any]], None],
    **options: Any,
) -> Any:
    """Write the hls4ml project for a backend into the folder `out` and return its ModelGraph.

    settle: states the precision of every layer in the hls4ml configuration (in place), so that default_precision is
    that of nothing in the end. options: of the backend.
    """
    handlers.register()
    rows, columns = model.grid
    shapes = [(rows * columns, model.embed.weight.shape[1]), (1,)]
    with contextlib.redirect_stdout(io.StringIO()):  # hls4ml prints its progress
        config = hls4ml.utils.config_from_pytorch_model(
            model,
            shapes,
            granularity="name",
            backend=backend,
            default_precision=default_precision,
            channels_last_conversion="off",  # our handlers transpose the weights themselves
            transpose_outputs=False,
        )
        config["InputShape"] = [list(shape) for shape in shapes]  # plain YAML: tuples could not be read back safely
        settle(config)
        graph = hls4ml.converters.convert_from_pytorch_model(
            model,
            output_dir=str(out),
            project_name=PROJECT,
            backend=backend,
            io_type=io_type,
            hls_config=config,
            **options,
        )
        graph.config.config["PytorchModel"] = None  # else the torch module itself goes into hls4ml_config.yml
        graph.write()
    quote_weights_folder(out / "build_lib.sh")
    settings = out / "hls4ml_config.yml"
    content = yaml.safe_load(settings.read_text())
    content["OutputDir"] = "."  # no path of this machine; hls4ml's link_existing_project then works from the folder
    # hls4ml sorts its YAML by name, but predict() takes this order for that of the arguments.
    content["InputShapes"] = {name: content["InputShapes"][name] for name in ("tokens", "task")}
    settings.write_text(yaml.safe_dump(content, sort_keys=False))
    return graph


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
