"""A data set of rendered scenes in the layout of NYUD_MT or PASCAL_MT, for tests, demonstrations and quick trials."""

import importlib
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import m3vit
from m3vit.data.synthetic.scenes.layouts import WRITERS
from m3vit.errors import InputError, install
from m3vit.files import atomic_folder, read_json, require_empty, write_json
from m3vit.pool import run_jobs, usable_cores

MIN_SIDE_PX = 32
MANIFEST = "synthetic.json"
SPLITS = ("train", "val")

SCENES_PER_CHUNK = 4  # few enough that progress is smooth, enough that the pool's messages cost nothing

# layout, root, id, (seed, split, index), size
Job = tuple[str, Path, str, tuple[int, int, int], tuple[int, int]]


def synthesize(
    out: Path,
    *,
    layout: str = "nyud",
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Render `train` + `val` scenes of `size` (height, width) with exact labels into the new folder `out`.

    The layout decides what is in them: "nyud" rooms, "pascal" people, animals, vehicles and furniture.

    An image depends on the seed, its split and its index there, not on the counts or on `workers` (default: one
    process per core).  `progress` is called with the images done and their total after each.  If `out` already
    holds this very data set, nothing is rendered.

    The data set is rendered in a hidden folder beside `out` and moved there when it is whole.  With more than one
    worker, processes are started afresh ("spawn": Embree and torch have threads, which a fork would break), so a
    script must call this below `if __name__ == "__main__":`.
    """
    _check_arguments(layout, train, val, size, seed, workers)
    out = Path(out).resolve()
    arguments = {"layout": layout, "train": train, "val": val, "size": list(size), "seed": seed}
    if _is_done(out, arguments):
        return
    _require_renderer(layout)

    with atomic_folder(out, last=[WRITERS[layout].lists.split("/")[0], MANIFEST]) as staging:
        _render_all(staging, arguments, workers or usable_cores(), progress)
        _write_manifest(staging, arguments)


def _check_arguments(layout: str, train: int, val: int, size: tuple[int, int], seed: int, workers: int | None) -> None:
    if layout not in WRITERS:
        raise InputError(f"layout {layout!r} is unknown: choose from {', '.join(WRITERS)}")
    for name, value, least in (("train", train, 1), ("val", val, 1), ("workers", workers, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}, but must be at least {least}: give {name} {least} or more")
    if len(size) != 2 or min(size) < MIN_SIDE_PX:
        given = " x ".join(str(side) for side in size)
        raise InputError(
            f"size is {given} pixels, but height and width must each be at least {MIN_SIDE_PX}: give for example 96 128"
        )


def _require_renderer(layout: str) -> None:
    for package in WRITERS[layout].packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise InputError(
                f"{package} is not installed, but renders synthetic scenes: run {install('train')}"
            ) from None


def _images(arguments: dict[str, Any]) -> Generator[tuple[str, int, int], None, None]:
    """Yield id, split (0: train, 1: val) and index in the split of every image."""
    number = 0
    for split, split_name in enumerate(SPLITS):
        for index in range(arguments[split_name]):
            number += 1
            yield WRITERS[arguments["layout"]].image_id(number), split, index


def _is_done(out: Path, arguments: dict[str, Any]) -> bool:
    """Return whether `out` holds this data set, False if it is still to be made, or refuse to write into it."""
    advice = "name a new folder or delete this one"
    if not (out / MANIFEST).is_file():
        require_empty(out, MANIFEST, advice)
        return False
    manifest = read_json(out / MANIFEST, advice)
    found = manifest.get("arguments") if isinstance(manifest, dict) else None
    if found != arguments:
        raise InputError(f"{out} holds a synthetic data set of {found}, not of {arguments}: {advice}")
    writer = WRITERS[arguments["layout"]]
    paths = [f"{writer.lists}/{split}.txt" for split in SPLITS]
    for name, split, index in _images(arguments):
        paths += writer.files(name, split, index).values()
    for path in paths:
        if not (out / path).is_file():
            raise InputError(f"{out / path} is missing from a synthetic data set that should be whole: {advice}")
    return True


def _render_all(
    root: Path, arguments: dict[str, Any], workers: int, progress: Callable[[int, int], None] | None
) -> None:
    writer, images = WRITERS[arguments["layout"]], list(_images(arguments))
    for name, split, index in images:
        for path in writer.files(name, split, index).values():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
    size = (arguments["size"][0], arguments["size"][1])
    jobs: list[Job] = [
        (arguments["layout"], root, name, (arguments["seed"], split, index), size) for name, split, index in images
    ]
    with closing(run_jobs(_render_one, jobs, workers, chunk=SCENES_PER_CHUNK)) as finished:
        for done, _ in enumerate(finished, start=1):
            if progress is not None:
                progress(done, len(jobs))
    (root / writer.lists).mkdir(parents=True)
    for split, split_name in enumerate(SPLITS):
        lines = [f"{name}\n" for name, of_split, _ in images if of_split == split]
        (root / writer.lists / f"{split_name}.txt").write_text("".join(lines))


def _render_one(job: Job) -> None:
    """Render one scene and write its files."""
    layout, root, name, key, size = job
    files = WRITERS[layout].files(name, key[1], key[2])
    WRITERS[layout].write(np.random.default_rng(key), size, {kind: root / path for kind, path in files.items()})


def _write_manifest(root: Path, arguments: dict[str, Any]) -> None:
    from m3vit.data.synthetic.scenes.rendering import focal_px

    height, width = arguments["size"]
    camera = {"focal_px": focal_px(width), "centre_px": [width / 2, height / 2]}  # pixel i covers [i, i + 1)
    manifest = {"generator": "m3vit.data.synthetic", "version": m3vit.__version__, "arguments": arguments}
    write_json(root / MANIFEST, {**manifest, "camera": camera})
