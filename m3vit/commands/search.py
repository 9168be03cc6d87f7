"""m3vit search."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from m3vit.collector import resting
from m3vit.commands.terminal import console, progress_bar, say
from m3vit.errors import InputError
from m3vit.options import DataRoot, Positive, RunFolder, Value, share

if TYPE_CHECKING:
    from m3vit.evaluation.search import Found
    from m3vit.models.space import Space


@dataclass(frozen=True)
class Search:
    """Options of m3vit search.

    Attributes:
        run: run folder, of a model with experts
        budget: share of the cost of all tasks' graphs that may be used, above 0 up to 1
        out: budget file to write, for --budget of m3vit eval, profile, report, export onnx and export hls
        cost: macs, latency (milliseconds in onnxruntime, measured on this machine now) or cycles:BOARD (modelled, of
            the engines that fit a board, such as cycles:zcu104)
        prefer: how much each task's loss counts: depth=2,semseg=1 (default: each 1)
        images: val images, evenly spread, that losses are measured on
        data_root: data set's folder (default: the one the run was trained on)
        device: cpu, cuda, ... or auto: cuda if there is one
    """

    run: RunFolder
    budget: Annotated[float, Value(share, "X")]
    out: Annotated[Path, Value(metavar="FILE")]
    cost: Annotated[str, Value(metavar="COST")] = "macs"
    prefer: Annotated[str, Value(metavar="TASK=W,...")] | None = None
    images: Positive = 64
    data_root: DataRoot | None = None
    device: Annotated[str, Value(metavar="DEVICE")] = "auto"


def run_search(wanted: Search) -> None:
    with resting():
        from m3vit.data.opening import open_split
        from m3vit.evaluation.artefacts import choose_device
        from m3vit.evaluation.costs import macs_of
        from m3vit.evaluation.routing import spread
        from m3vit.evaluation.search import read_preferences, said, search, searched
        from m3vit.export.costs import find_costs
        from m3vit.models.budget_file import write_budget
        from m3vit.run_folder import load_run
        from m3vit.training.budgets import require_begun

    if wanted.out.exists():
        raise InputError(f"{wanted.out} is there already: give a new file")
    if not wanted.out.parent.is_dir():
        raise InputError(f"{wanted.out.parent} is no folder: make it first, or give another --out")
    run = load_run(wanted.run)
    require_begun(run)
    config = run.config.model
    preferences = read_preferences(wanted.prefer, config.tasks)
    root = wanted.data_root or run.config.data.root
    split = open_split(run.config.data.layout, root, "val", config.tasks, label_set=config.label_set)
    indices = spread(list(range(len(split))), wanted.images)
    space = searched(run.model, run.config.train)
    macs = macs_of(config, space, run.model.hidden_widths())
    with progress_bar("searching") as bar:
        costs = macs if wanted.cost == "macs" else find_costs(wanted.cost, run.model, space, bar)
        model = run.model.to(choose_device(wanted.device))
        found = search(model, split, wanted.budget, preferences, indices, bar, train=run.config.train, costs=costs)
    blocks = model.backbone.moe_indices
    measured = {"images": len(indices), "release": split.release, "weights_sha256": run.info["weights_sha256"]}
    told = said(found, wanted.budget, blocks, costs, macs)
    write_budget(wanted.out, found.budget(blocks), {**told, **measured, "preferences": preferences})
    print_found(found, len(indices), costs.unit, space, bool(run.config.train.budgets))
    if (again := told.get("cost", {}).get("share_measured")) is not None:
        say(f"measured by itself, the budget takes {again:.3f} of the {costs.unit} of all tasks' graphs")
    say(str(wanted.out))


def print_found(found: "Found", images: int, unit: str, space: "Space", trained: bool) -> None:
    """Print the front of the tasks together, and what is used at each of its points."""
    from rich.table import Table

    screen = console(max(console().width, 100))
    tasks = list(found.points)
    narrow = [block for block, widths in space.widths.items() if len(widths) > 1]
    columns = (unit, "loss (%)", *(["hidden units"] if narrow else []), *tasks)
    own = "experts per token by block" + (", channels of the head" if space.narrow_heads else "")
    front = Table(*columns, title=f"what no other choice beats; {own}")
    for part, one in found.front:
        cells = (" ".join(map(str, one.points[task].counts)) + f"  ({one.points[task].loss:+.2f})" for task in tasks)
        units = [" ".join(str(one.widths.get(block, space.widths[block][-1])) for block in narrow)] if narrow else []
        mark = " <" if one is found.chosen else ""
        front.add_row(f"{part:.3f}{mark}", f"{one.loss:+.3f}", *units, *cells)
    screen.print(front)
    what = "all of the model" if trained else "all experts"
    said = "was trained for such budgets" if trained else "was trained with all of them, not for fewer (train.budgets)"
    say(
        f"losses relative to {what}, on {images} val images, quick edge metric, the preferences as weights; the model "
        f"{said}: measure the file with m3vit eval --budget"
    )
