"""m3vit search."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from m3vit.commands.terminal import console, progress_bar, say
from m3vit.errors import InputError
from m3vit.options import DataRoot, Positive, RunFolder, Value, share

if TYPE_CHECKING:
    from m3vit.evaluation.search import Found


@dataclass(frozen=True)
class Search:
    """Options of m3vit search.

    Attributes:
        run: run folder, of a model with experts
        budget: share of the MACs of all tasks' graphs that may be used, above 0 up to 1
        out: budget file to write, for --budget of m3vit eval, export onnx and export hls
        prefer: how much each task's loss counts: depth=2,semseg=1 (default: each 1)
        images: val images, evenly spread, that losses are measured on
        data_root: data set's folder (default: the one the run was trained on)
        device: cpu, cuda, ... or auto: cuda if there is one
    """

    run: RunFolder
    budget: Annotated[float, Value(share, "X")]
    out: Annotated[Path, Value(metavar="FILE")]
    prefer: Annotated[str, Value(metavar="TASK=W,...")] | None = None
    images: Positive = 64
    data_root: DataRoot | None = None
    device: Annotated[str, Value(metavar="DEVICE")] = "auto"


def run_search(wanted: Search) -> None:
    from m3vit.data.opening import open_split
    from m3vit.evaluation.artefacts import choose_device
    from m3vit.evaluation.routing import spread
    from m3vit.evaluation.search import read_preferences, said, search
    from m3vit.models.budget_file import write_budget
    from m3vit.run_folder import load_run

    if wanted.out.exists():
        raise InputError(f"{wanted.out} is there already: give a new file")
    if not wanted.out.parent.is_dir():
        raise InputError(f"{wanted.out.parent} is no folder: make it first, or give another --out")
    run = load_run(wanted.run)
    config = run.config.model
    preferences = read_preferences(wanted.prefer, config.tasks)
    root = wanted.data_root or run.config.data.root
    split = open_split(run.config.data.layout, root, "val", config.tasks, label_set=config.label_set)
    indices = spread(list(range(len(split))), wanted.images)
    model = run.model.to(choose_device(wanted.device))
    with progress_bar("searching") as bar:
        found = search(model, split, wanted.budget, preferences, indices, bar)
    blocks = model.backbone.moe_indices
    measured = {"images": len(indices), "release": split.release, "weights_sha256": run.info["weights_sha256"]}
    told = said(found, wanted.budget, blocks)
    write_budget(wanted.out, found.budget(blocks), {**told, **measured, "preferences": preferences})
    print_found(found, len(indices))
    say(str(wanted.out))


def print_found(found: "Found", images: int) -> None:
    """Print the front of the tasks together, and the experts per token of the point chosen."""
    from rich.table import Table

    screen = console(max(console().width, 100))
    tasks = list(found.points)
    front = Table("MACs", "loss (%)", *tasks, title="what no other choice beats; experts per token by block")
    for macs, loss, points in found.front:
        cells = (" ".join(map(str, points[task].counts)) + f"  ({points[task].loss:+.2f})" for task in tasks)
        mark = " <" if points == found.points else ""
        front.add_row(f"{macs:.3f}{mark}", f"{loss:+.3f}", *cells)
    screen.print(front)
    say(
        f"losses relative to all experts, on {images} val images, quick edge metric, the preferences as weights; the "
        "model was trained with all of them: measure the file with m3vit eval --budget"
    )
