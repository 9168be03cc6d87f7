"""The layouts: which there are, which of them a folder is in, and its splits. No torch."""

import inspect
from collections.abc import Sequence
from pathlib import Path

from m3vit.data.nyud import NYUD
from m3vit.data.own.description import FILE, open_description
from m3vit.data.own.layout import Folder, refuse_masks
from m3vit.data.pascal_context import PASCALContext
from m3vit.data.sample import FileSplit, Split, held, names_in
from m3vit.errors import InputError
from m3vit.label_sets import LABEL_SETS
from m3vit.tasks import TASKS

LAYOUTS: dict[str, type[FileSplit]] = {}
REQUIRED = ("name", "title", "described", "label_set", "listings", "folders", "releases")
# Notes that this program leaves in data roots it makes -> where such data come from.
ORIGINS = {"synthetic.json": "rendered by m3vit data synth", "prepared.json": "made by m3vit data prepare"}
NO_ROOT = "no data root: give --data.root DIR (m3vit data synth writes a small data set)"


def add_layout(layout: type[FileSplit]) -> None:
    """Make a layout known, or raise InputError for one that lacks a part or whose name is taken."""
    if not (inspect.isclass(layout) and issubclass(layout, FileSplit)):
        raise InputError(f"{layout!r} is no layout: derive a class from m3vit.data.sample.FileSplit, and add it")
    lacks = [part for part in REQUIRED if not getattr(layout, part, None)]
    lacks += sorted(getattr(layout, "__abstractmethods__", ()))
    if lacks:
        raise InputError(f"layout {layout.__name__} lacks {', '.join(lacks)}: define them")
    if layout.name in LAYOUTS:
        raise InputError(f"layout {layout.name} is there already ({LAYOUTS[layout.name].__name__}): give another name")
    if layout.label_set not in LABEL_SETS:
        raise InputError(
            f"layout {layout.name} has the unknown label set {layout.label_set!r}: add it first, or choose from "
            f"{', '.join(LABEL_SETS)}"
        )
    tasks = LABEL_SETS[layout.label_set].tasks
    for kind in ("image", *tasks):
        if not layout.folders.get(kind) or isinstance(layout.folders[kind], str):
            raise InputError(f"layout {layout.name} lacks folders of {kind}: give a tuple of them")
        if unnamed := [release for release, endings in layout.releases.items() if kind not in endings]:
            raise InputError(f"layout {layout.name} lacks the ending of {kind} in {', '.join(unnamed)}: give it")
    if any(TASKS[task].matches_edges for task in tasks) and layout.edge_truth is FileSplit.edge_truth:
        raise InputError(f"layout {layout.name} lacks edge_truth, which edges are scored against: define it")
    LAYOUTS[layout.name] = layout


for _layout in (NYUD, PASCALContext):
    add_layout(_layout)
LAYOUTS[Folder.name] = Folder  # its data.yaml says what other layouts say of themselves


def layout_named(name: str) -> type[FileSplit]:
    """Return the layout of a name, or raise InputError."""
    if name not in LAYOUTS:
        raise InputError(f"data.layout is {name!r}: choose from {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def layouts_of(root: Path) -> list[str]:
    """Return the layouts whose folders `root` has: none, or one unless two data sets were mixed up.

    A data.yaml counts where there is nothing else: a published data set may have one too.
    """
    found = [name for name, layout in LAYOUTS.items() if layout.recognises(root)]
    return found if found == [Folder.name] else [name for name in found if name != Folder.name]


def layout_of(root: str | Path) -> str:
    """Return the layout that `root` is in, its data.yaml before anything else, or raise InputError."""
    return Folder.name if str(root) and Folder.recognises(Path(root)) else recognise(root)[0]


def recognise(root: str | Path) -> tuple[str, str]:
    """Return the layout (its name) and the release of the data set in a folder, or raise InputError."""
    if not str(root):
        raise InputError(NO_ROOT)
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"data root {root} not found: give the data set's folder")
    layouts = layouts_of(root)
    if len(layouts) > 1:
        raise InputError(f"{root} holds the folders of {' and of '.join(layouts)}: give each data set its own folder")
    if not layouts:
        deeper = [root / name for name in names_in(root) if layouts_of(root / name)]
        if deeper:
            raise InputError(f"{root} is no data set, but holds one: give {deeper[0]}")
        raise InputError(
            f"{root} is no data set: it holds {held(root)}, expected one of {expected()}; for data of your own, "
            f"m3vit data init {root} writes a first {FILE}"
        )
    layout = LAYOUTS[layouts[0]]
    if layout is Folder:
        return layout.name, open_description(root).name
    present = [kind for kind, folders in layout.folders.items() if kind == "image" or (root / folders[0]).is_dir()]
    return layout.name, layout.detect(root, present)


def expected(between: str = ", ") -> str:
    """Return in words what the layouts are recognised by."""
    return between.join(
        f"{layout.listings}{'' if layout is Folder else '/'} ({name})" for name, layout in LAYOUTS.items()
    )


def origin(root: str | Path) -> str | None:
    """Return where a data root comes from if it is not a published archive: rendered, or prepared by this program."""
    return next((words for name, words in ORIGINS.items() if (Path(root) / name).is_file()), None)


def layout_for(label_set: str, root: str | Path, tasks: Sequence[str]) -> str:
    """Return the layout of `root` if it labels a model's tasks.

    Else the one that brings the label set: opening the root as that one says what is wrong. Raises InputError if there
    is none.
    """
    found = layouts_of(Path(root)) if str(root) else []
    if str(root) and Folder.recognises(Path(root)):
        found.append(Folder.name)
    fitting = [name for name in found if not LAYOUTS[name].misfit(LABEL_SETS[label_set], tasks, root)]
    own = [name for name, layout in LAYOUTS.items() if layout.label_set == label_set]
    return (fitting or own or [recognise(root)[0]])[0]


def check_masks(splits: Sequence[Split], workers: int) -> None:
    """Raise one InputError with all masks of a folder with a data.yaml that have other ids than it names, if any has.

    Of published data sets, whose classes are fixed, nothing is opened.
    """
    refuse_masks([split for split in splits if isinstance(split, Folder)], workers)


def open_split(
    layout: str, root: str | Path, split: str, tasks: Sequence[str], partial: bool = False, label_set: str = ""
) -> Split:
    """Open one split of a data set, or raise InputError; `partial`: images may lack labels of some tasks.

    `label_set`: what its classes are called, where not as the layout has it.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown: choose from {', '.join(LAYOUTS)}")
    if not str(root):
        raise InputError(NO_ROOT)
    root = Path(root)
    others = layouts_of(root)
    if others and not LAYOUTS[layout].recognises(root):
        raise InputError(
            f"{root} looks like {LAYOUTS[others[0]].title}: take a recipe or a run of the layout {others[0]} "
            f"(--data.layout {others[0]}), or give another --data.root"
        )
    if not others and root.is_dir():
        recognise(root)  # says what is there instead
    return LAYOUTS[layout](root, split, tasks, partial, label_set)
