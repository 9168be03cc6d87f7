"""Which data set a folder holds, and the loader for it. No torch."""

from collections.abc import Sequence
from pathlib import Path

from m3vit.data.nyud import FOLDERS as NYUD_FOLDERS
from m3vit.data.nyud import NYUD, detect_release
from m3vit.data.pascal_context import PASCALContext
from m3vit.data.sample import FileSplit, Split, held, names_in
from m3vit.errors import InputError

LAYOUTS: dict[str, type[FileSplit]] = {"nyud": NYUD, "pascal": PASCALContext}
# Notes that this program leaves in data roots it makes -> where such data come from.
ORIGINS = {"synthetic.json": "rendered by m3vit data synth", "prepared.json": "made by m3vit data prepare"}
NO_ROOT = "no data root: give --data.root DIR (m3vit data synth writes a small data set)"


def layouts_of(root: Path) -> list[str]:
    """Return the layouts whose folders `root` has: none, or one unless two data sets were mixed up."""
    return [layout for layout, loader in LAYOUTS.items() if (root / loader.listings).is_dir()]


def recognise(root: str | Path) -> tuple[str, str]:
    """Return the layout ("nyud" or "pascal") and the release of the data set in a folder, or raise InputError."""
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
        expected = ", ".join(f"{loader.listings}/ ({layout})" for layout, loader in LAYOUTS.items())
        raise InputError(f"{root} is no data set: it holds {held(root)}, expected one of {expected}")
    if layouts == ["pascal"]:
        return "pascal", PASCALContext.release
    kinds = [kind for kind in NYUD_FOLDERS if kind == "image" or (root / NYUD_FOLDERS[kind]).is_dir()]
    return "nyud", detect_release(root, kinds)


def origin(root: str | Path) -> str | None:
    """Return where a data root comes from if it is not a published archive: rendered, or prepared by this program."""
    return next((words for name, words in ORIGINS.items() if (Path(root) / name).is_file()), None)


def open_split(layout: str, root: str | Path, split: str, tasks: Sequence[str], partial: bool = False) -> Split:
    """Open one split of a data set, or raise InputError; `partial`: images may lack labels of some tasks."""
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown: choose from {', '.join(LAYOUTS)}")
    if not str(root):
        raise InputError(NO_ROOT)
    root = Path(root)
    others = layouts_of(root)
    if others and layout not in others:
        looks_like = {"nyud": "NYUD-v2", "pascal": "PASCAL-Context"}[others[0]]
        raise InputError(
            f"{root} looks like {looks_like}: take a recipe or a run of the layout {others[0]} "
            f"(--data.layout {others[0]}), or give another --data.root"
        )
    if not others and root.is_dir():
        recognise(root)  # says what is there instead
    return LAYOUTS[layout](root, split, tasks, partial)
