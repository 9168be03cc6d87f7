"""The schedules that a model can be written in: SCHEDULES, and what each is asked for.

A schedule is a module that has the parts of `Schedule`. Another one is a row of SCHEDULES and one of NEEDS in
m3vit.hw.manifest, which says what its m3vit.json and files must have; both may be added from outside the package.
Imports neither torch nor hls4ml: the modules are imported when they are used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from m3vit.errors import InputError
from m3vit.hw.design import Design, design_of, read_design
from m3vit.hw.layer_bits import LayerBits, parse_layer_bits
from m3vit.models.budget import FULL, Budget

if TYPE_CHECKING:
    from m3vit.export.hls.leaf import LoweredModel
    from m3vit.models.multitask import MultiTaskModel

SCHEDULES = {
    "spatial": "m3vit.export.hls.spatial.schedule",
    "multiplexed": "m3vit.export.hls.multiplexed.schedule",
}
Progress = Callable[[int, int, str], None]  # done, of how many, what is being done


WEIGHT_BITS = 16  # unless told otherwise
OTHER_BITS = "write a file with other bits"  # of a configuration of the engines


def silent(done: int, total: int, what: str) -> None:
    """Show no progress."""


@dataclass
class Options:
    """What a user chooses of a project.

    board: a name, or None in a schedule that is for no board. design: what is fixed of its engines. layers: which maps
    have inputs of other bits than act_bits (m3vit.hw.layer_bits). budgets: what is used of the model, by name, the
    first the project's own. progress: told of the long work.
    """

    weight_bits: int
    act_bits: int
    board: str | None
    design: Design | None = None
    layers: LayerBits = field(default_factory=LayerBits)
    budgets: Mapping[str, Budget] = field(default_factory=lambda: {"": FULL})
    progress: Progress = silent

    @property
    def budget(self) -> Budget:
        """The project's own budget."""
        return next(iter(self.budgets.values()))


class Simulated(NamedTuple):
    """What a C-simulation of n images for R tasks returned.

    outputs: float32 [n, R, T, C], whatever beyond a task's own outputs. expert_ids: [n, R, N, K] of each MoE layer, K
    the most of any task, -1 beyond a task's own. facts: more for csim.json. others: the same of further budgets, by
    name.
    """

    outputs: np.ndarray
    expert_ids: list[np.ndarray]
    facts: dict[str, Any]
    others: Mapping[str, "Simulated"] = MappingProxyType({})


class Runner(NamedTuple):
    """A project made ready to be scored: `run` takes images uint8 [n, H, W, 3], up to `batch` of them, and returns the
    token outputs [n, R, T, C] of all tasks."""

    name: str
    batch: int
    run: Callable[[np.ndarray], np.ndarray]


class Schedule(Protocol):
    """What a schedule's module has. One that can write several budgets into a project has SEVERAL_BUDGETS, True."""

    LIMITS: Mapping[str, Sequence[int]]  # of weight_bits and act_bits
    ACT_BITS: int  # unless told otherwise
    BOARD: str | None  # unless told otherwise; None: it is for no board

    def write(
        self, folder: Path, model: "MultiTaskModel", calibration: np.ndarray, options: Options
    ) -> "tuple[LoweredModel, dict[str, Any]]":
        """Write the project's sources and weights; return the lowered model and the schedule's part of the manifest.

        calibration: images uint8 [m, H, W, 3]. Raises InputError, before the long work, for a model that is too large.
        """

    def write_bench(
        self, folder: Path, images: np.ndarray, outputs: dict[str, np.ndarray], manifest: dict[str, Any]
    ) -> None:
        """Write what the test bench reads, into tb_data/: images uint8 [n, H, W, 3], torch's outputs [n, T, C_r]."""

    def readme(self, manifest: dict[str, Any]) -> str:
        """Return the text of README.md."""

    def simulate(
        self, project: Path, images: np.ndarray, manifest: dict[str, Any], progress: Progress | None
    ) -> Simulated:
        """Build and C-simulate images uint8 [n, H, W, 3] for all tasks. Raises InputError if it fails."""

    def agreement(self, report: dict[str, Any]) -> str:
        """Return half a sentence on what agreed with what, from csim.json."""

    def said(self, report: dict[str, Any]) -> list[str]:
        """Return more lines about a simulation, for people."""

    def runner(self, project: Path, manifest: dict[str, Any], budget: int = 0) -> Runner:
        """Make a project ready to be scored. budget: by its number, 0 where there is one."""


def find_schedule(name: str) -> Schedule:
    """Return a schedule. Raises InputError for a name that is not in SCHEDULES, or a module that lacks a part."""
    if name not in SCHEDULES:
        raise InputError(f"schedule is {name!r}: choose from {', '.join(SCHEDULES)}")
    module = import_module(SCHEDULES[name])
    parts = (*Schedule.__annotations__, *(part for part in vars(Schedule) if not part.startswith("_")))
    if missing := [part for part in parts if not hasattr(module, part)]:
        raise InputError(f"schedule {name}: {module.__name__} has no {', '.join(missing)}")
    return cast(Schedule, module)


def schedule_of(manifest: dict[str, Any]) -> Schedule:
    """Return the schedule of a project; the oldest manifests do not name theirs."""
    return find_schedule(manifest.get("schedule", "spatial"))


def choose_options(
    name: str,
    weight_bits: int | None,
    act_bits: int | None,
    board: str | None,
    engines: Mapping[str, Any] = MappingProxyType({}),
) -> Options:
    """Return the options of a schedule, its defaults filled in. Raises InputError for what it does not have.

    engines: part, clock, array, port_bits, ports, residual_bits (m3vit.hw.design), layer_bits (m3vit.hw.layer_bits), or
    config, the file that has all of these, the board and the bits. What is None is not given.
    """
    schedule = find_schedule(name)
    fixed = {option: value for option, value in engines.items() if value is not None}
    if fixed and schedule.BOARD is None:
        option = next(iter(fixed)).replace("_", "-")
        raise InputError(
            f"--{option}: the {name} schedule has no engines to fit: leave it out or give another --schedule"
        )
    if board is not None and schedule.BOARD is None:
        others = [other for other in SCHEDULES if find_schedule(other).BOARD is not None]
        raise InputError(
            f"--board {board}: the {name} schedule is for no board (its part is in project.tcl): leave it out or give "
            f"--schedule {' or '.join(others)}"
        )
    design, layer_bits, told = None, None, ""
    if schedule.BOARD is not None:
        if config := fixed.pop("config", None):
            rest = {"board": board, "weight_bits": weight_bits, "act_bits": act_bits, **fixed}
            if more := [f"--{option.replace('_', '-')}" for option, value in rest.items() if value is not None]:
                raise InputError(f"{config} says all of the engines: leave out {', '.join(more)}")
            design, bits = read_design(Path(config))
            weight_bits, act_bits, layer_bits = bits["weight_bits"], bits["act_bits"], bits.get("layer_bits")
            told = f"{config}: "
        else:
            layer_bits = fixed.pop("layer_bits", None)
            design = design_of(board, **fixed, default=schedule.BOARD)
        board = design.board
    chosen = WEIGHT_BITS if weight_bits is None else weight_bits
    said = f"{told}layer_bits" if told else "--layer-bits"
    layers = LayerBits() if layer_bits is None else parse_layer_bits(layer_bits, said)
    options = Options(chosen, schedule.ACT_BITS if act_bits is None else act_bits, board, design, layers)
    for what, allowed in schedule.LIMITS.items():
        if (value := getattr(options, what)) not in allowed:
            shown = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(map(str, allowed))
            raise InputError(f"{told}{what} is {value}: the {name} schedule has {shown}")
    if design and design.sizes.get("wide_bits") == 16 and options.act_bits > 8:
        given = f"{told}wide_bits 16 with act_bits" if told else "--residual-bits 16 with --act-bits"
        raise InputError(
            f"{given} {options.act_bits}: a residual stream of 16 bits goes with 8-bit activations: "
            + (OTHER_BITS if told else "give --weight-bits 8 --act-bits 8 too, or leave it out")
        )
    if layers and options.act_bits != 8:
        raise InputError(
            f"{said} with {'act_bits' if told else '--act-bits'} {options.act_bits}: layers have inputs of 16 bits "
            f"beside 8-bit activations: {OTHER_BITS if told else 'give --act-bits 8 too, or leave it out'}"
        )
    return options
