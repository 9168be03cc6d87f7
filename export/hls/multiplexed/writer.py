"""The folder of a time-multiplexed project: sources, weights, test bench, Tcl and host driver.

Most files are copied from hw/include and hw/project as they are; what depends on the model is in sources.py. Like
backend.py, this module is imported by every `import hls4ml`, and by nothing else.
"""

import shutil
import stat
from importlib.resources import files
from pathlib import Path
from typing import Any

from hls4ml.writer.vitis_writer import VitisWriter

from m3vit.export.hls.multiplexed.plugin import NAME
from m3vit.export.hls.multiplexed.sources import (
    HEADER_TEXT,
    depths_of,
    model_text,
    parameters_text,
    resources,
    top_text,
    weights_map,
)
from m3vit.files import write_json
from m3vit.hw.boards import BOARDS
from m3vit.hw.design import Design

HEADERS = ("m3vit_tables.h", "m3vit_integer.h")  # of hw/include; and all of hw/include/engine
# Modules that the host driver has a copy of: they import numpy alone.
DRIVER_PARTS = (("m3vit.kinds", "decoding"), ("m3vit.hw", "output_memory"), ("m3vit.hw", "weights_file"))
BLOCK_DESIGN, SYSTEM = "vivado_design.tcl", "zynq_ultrascale"  # what it can build around the accelerator


class VitisMoEWriter(VitisWriter):
    """See the module."""

    def write_hls(self, model: Any) -> None:
        settings = model.config.config[NAME]
        schedule = model.schedule
        out = Path(model.config.get_output_dir())
        firmware, project = out / "firmware", Path(str(files("m3vit.hw") / "project"))
        (firmware / "nnet_utils").mkdir(parents=True, exist_ok=True)
        (firmware / "weights").mkdir(exist_ok=True)
        include = Path(str(files("m3vit.hw") / "include"))
        for header in (*(include / name for name in HEADERS), *sorted((include / "engine").glob("*.h"))):
            shutil.copyfile(header, firmware / "nnet_utils" / header.name)
        (firmware / "parameters.h").write_text(parameters_text(schedule.hardware))
        (firmware / "m3vit.h").write_text(HEADER_TEXT)
        (firmware / "m3vit.cpp").write_text(
            top_text(depths_of(schedule.image, schedule.hardware), schedule.hardware.port_bits)
        )
        schedule.image.write(firmware / "weights" / "weights.bin")
        write_json(out / "weights_map.json", weights_map(schedule))
        write_json(out / "resources.json", resources(schedule.hardware, Design(**settings["design"]).target))
        self.write_build_script(model)
        self.write_board_script_override(model)
        self.write_yml(model)
        (firmware / "model.h").write_text(model_text(settings, schedule.output_fracs, schedule.output_layout))
        (out / "vivado_synth.tcl").unlink()  # hls4ml's, for its own top level
        for path in sorted(project.rglob("*")):
            wanted = path.name != BLOCK_DESIGN or BOARDS[settings["board"]].system == SYSTEM
            if path.is_file() and "__pycache__" not in path.parts and wanted:
                target = out / path.relative_to(project)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                target.chmod(target.stat().st_mode | stat.S_IWUSR)
        for package, module in DRIVER_PARTS:
            shutil.copyfile(Path(str(files(package) / f"{module}.py")), out / "host" / f"m3vit_{module}.py")
        with open(out / "project.tcl", "a") as file:
            file.write(f'variable board_part\nset board_part "{BOARDS[settings["board"]].board_part}"\n')
