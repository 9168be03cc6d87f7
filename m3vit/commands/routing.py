"""m3vit routing, panel."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from m3vit.collector import resting
from m3vit.commands.terminal import console, progress_bar, say
from m3vit.errors import InputError
from m3vit.options import DataRoot, File, Folder, Positive, RunFolder, Value, count


@dataclass(frozen=True)
class Routing:
    """Options of m3vit routing.

    Attributes:
        run: run folder
        split: split to walk through, with the labels of the run's tasks
        limit: images, evenly spread over the split (default: all)
        data_root: data set's folder (default: the one a run was trained on)
        top_k: experts per token, fewer (or more) than trained: a number, or task=number,... (default: as trained)
        maps: images whose expert maps are drawn
        overlay: lay the maps over the photographs
        device: cpu, cuda, ... or auto: cuda if there is one
        batch: images the model takes at once
        out: folder to write, of routing.json and its charts (default: RUN/routing, where m3vit report looks)
    """

    run: RunFolder
    split: Annotated[str, Value(metavar="SPLIT")] = "val"
    limit: Positive | None = None
    data_root: DataRoot | None = None
    top_k: Annotated[str, Value(metavar="K")] | None = None
    maps: Annotated[int, Value(count, "N")] = 2
    overlay: bool = False
    device: Annotated[str, Value(metavar="DEVICE")] = "auto"
    batch: Positive = 1
    out: Folder | None = None


def run_routing(wanted: Routing) -> None:
    with resting():
        from m3vit.report.routed import measure

    if wanted.overlay and not wanted.maps:
        raise InputError("--overlay is of maps, and --maps 0 draws none: leave one of them out")
    with progress_bar("routing") as bar:
        given = {key: value for key, value in vars(wanted).items() if key != "run"}
        found = measure(wanted.run, **given, progress=bar)
    print_routing(found)
    say(str((wanted.out or wanted.run / "routing") / "routing.json"))


def print_routing(found: dict[str, Any]) -> None:
    """Print how far tasks are apart in each block, and what the labels of each task explain of its own choices."""
    from rich.table import Table

    from m3vit.report.routing import sentence

    blocks, tasks = list(found["use"]), found["tasks"]
    caption = f"{found['images']} images of {found['data']['release']}, {found['data']['split']}"
    table = Table("block", *blocks, caption=caption)
    if found["apart"]:
        means = [found["apart"]["blocks"][block]["all"] for block in blocks]
        table.add_row("experts that two tasks share (%)", *(_percent(one["shared"]["value"]) for one in means))
        chance = [one["shared_renamed"]["interval"] for one in means]
        table.add_row("  by chance: 95 % are between", *(f"{_percent(low)}, {_percent(high)}" for low, high in chance))
        table.add_row("  by each task's use", *(_percent(one["shared_by_use"]["value"]) for one in means))
        table.add_row("use alike (%)", *(_percent(one["similarity_of_use"]["value"]) for one in means))
    for task in tasks:
        table.add_row(
            f"dead experts of {task}", *(str(len(found["use"][block]["tasks"][task]["dead"])) for block in blocks)
        )
    for task, labels in found["labels"].items():
        told = [labels["blocks"][block][task] for block in blocks]
        table.add_row(f"{task}: labels tell of experts (%)", *(_percent(one["information"]) for one in told))
        table.add_row("  labels of another image", *(_percent(one["information_elsewhere"]) for one in told))
    console(max(console().width, 48 + 13 * len(blocks))).print(table)
    say(sentence(found))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


@dataclass(frozen=True)
class Panel:
    """Options of m3vit panel.

    Attributes:
        folder: run folder, or ONNX package (without the maps of experts, which it does not tell)
        image: image file
        out: png to write, of 150 kB at most
        no_input: leave the image itself out
        block: of a run: the block whose experts are shown (default: its last with experts)
        width: pixels of the whole picture, fewer where it would be too large a file
    """

    folder: Annotated[Path, Value(metavar="DIR", positional=True)]
    image: Annotated[Path, Value(metavar="IMAGE", positional=True)]
    out: File
    no_input: bool = False
    block: Annotated[int, Value(count, "N")] | None = None
    width: Positive = 1200


def run_panel(wanted: Panel) -> None:
    with resting():
        from m3vit.report.panel import write_panel

    height, width, size = write_panel(**vars(wanted))
    say(f"{wanted.out}: {height}x{width} pixels, {size / 1000:.0f} kB")
