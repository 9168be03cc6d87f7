"""A synthetic data set in the published NYUD_MT layout, for tests, demonstrations and machines without the real one."""

import importlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import m3vit
from m3vit.errors import InputError
from m3vit.files import read_json, write_json

LAYOUTS = ("nyud",)
MIN_SIDE_PX = 32
JPEG_QUALITY = 95
MANIFEST = "synthetic.json"
SPLITS = ("train", "val")
# Folder of the NYUD_MT release -> extension there.
FOLDERS = {"images": ".jpg", "segmentation": ".png", "edge": ".npy", "normals": ".npy", "depth": ".npy"}

SCENES_PER_CHUNK = 4  # few enough that progress is smooth, enough that the pool's messages cost nothing

Job = tuple[Path, str, tuple[int, int, int], tuple[int, int]]  # root, id, (seed, split, index), size


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
    """Render `train` + `val` indoor scenes of `size` (height, width) with exact labels into the new folder `out`.

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
    _require_renderer()

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"cannot write beside {out} ({error.strerror}): name a folder in a writable place") from None
    try:
        staging.chmod(0o755)  # mkdtemp gives 0700
        _render_all(staging, _image_ids(train, val), size, seed, workers or os.cpu_count() or 1, progress)
        _write_manifest(staging, arguments)
        _move(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_arguments(layout: str, train: int, val: int, size: tuple[int, int], seed: int, workers: int | None) -> None:
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown: choose from {', '.join(LAYOUTS)}")
    for name, value, least in (("train", train, 1), ("val", val, 1), ("workers", workers, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}, but must be at least {least}: give {name} {least} or more")
    if len(size) != 2 or min(size) < MIN_SIDE_PX:
        given = " x ".join(str(side) for side in size)
        raise InputError(
            f"size is {given} pixels, but height and width must each be at least {MIN_SIDE_PX}: give for example 96 128"
        )


def _require_renderer() -> None:
    for package in ("trimesh", "embreex"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise InputError(
                f"{package} is not installed, but renders synthetic scenes: run pip install 'm3vit[train]'"
            ) from None


def _image_ids(train: int, val: int) -> dict[str, list[str]]:
    """Return the ids of each split: 0001, 0002, ... through both."""
    numbers = [f"{number:04d}" for number in range(1, train + val + 1)]
    return {"train": numbers[:train], "val": numbers[train:]}


def _is_done(out: Path, arguments: dict[str, Any]) -> bool:
    """Return whether `out` holds this data set, False if it is still to be made, or refuse to write into it."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise InputError(f"{out} is a file, but must be a folder that is new or empty: name another one")
    if not any(out.iterdir()):
        return False
    advice = "name a new folder or delete this one"
    if not (out / MANIFEST).is_file():
        raise InputError(f"{out} is not empty and holds no {MANIFEST}: {advice}")
    manifest = read_json(out / MANIFEST, advice)
    found = manifest.get("arguments") if isinstance(manifest, dict) else None
    if found != arguments:
        raise InputError(f"{out} holds a synthetic data set of {found}, not of {arguments}: {advice}")
    ids = _image_ids(arguments["train"], arguments["val"])
    for split in SPLITS:
        paths = [out / "gt_sets" / f"{split}.txt"]
        paths += [out / folder / (name + ending) for folder, ending in FOLDERS.items() for name in ids[split]]
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path} is missing from a synthetic data set that should be whole: {advice}")
    return True


def _render_all(
    root: Path,
    ids: dict[str, list[str]],
    size: tuple[int, int],
    seed: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    for folder in FOLDERS:
        (root / folder).mkdir()
    jobs: list[Job] = [
        (root, name, (seed, split, index), size)
        for split, split_name in enumerate(SPLITS)
        for index, name in enumerate(ids[split_name])
    ]
    with closing(_run(jobs, workers)) as finished:
        for done, _ in enumerate(finished, start=1):
            if progress is not None:
                progress(done, len(jobs))
    (root / "gt_sets").mkdir()
    for split_name in SPLITS:
        (root / "gt_sets" / f"{split_name}.txt").write_text("".join(f"{name}\n" for name in ids[split_name]))


def _run(jobs: list[Job], workers: int) -> Generator[None, None, None]:
    """Render the jobs in this process or in a pool, yielding after each; closing it drops what has not begun."""
    workers = min(workers, math.ceil(len(jobs) / SCENES_PER_CHUNK))
    if workers == 1:
        yield from map(_render_one, jobs)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield from pool.map(_render_one, jobs, chunksize=SCENES_PER_CHUNK)
    except BrokenProcessPool:
        raise InputError(
            f"one of {workers} rendering processes was killed, maybe for want of memory: run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _render_one(job: Job) -> None:
    """Render one scene and write its five files."""
    from m3vit.data.scenes.rendering import render_scene  # needs trimesh and embreex: see _require_renderer

    root, name, key, size = job
    scene = render_scene(np.random.default_rng(key), size)
    path = {folder: root / folder / (name + ending) for folder, ending in FOLDERS.items()}
    # Full-resolution chroma: at these sizes the usual 4:2:0 would blur colour edges over two pixels.
    Image.fromarray(scene.image).save(path["images"], quality=JPEG_QUALITY, subsampling=0)
    Image.fromarray(scene.labels.segmentation).save(path["segmentation"])
    np.save(path["edge"], scene.labels.edge)
    np.save(path["normals"], scene.labels.normals)
    np.save(path["depth"], scene.labels.depth)


def _write_manifest(root: Path, arguments: dict[str, Any]) -> None:
    from m3vit.data.scenes.rendering import focal_px

    height, width = arguments["size"]
    camera = {"focal_px": focal_px(width), "centre_px": [width / 2, height / 2]}  # pixel i covers [i, i + 1)
    manifest = {"generator": "m3vit.data.synthetic", "version": m3vit.__version__, "arguments": arguments}
    write_json(root / MANIFEST, {**manifest, "camera": camera})


def _move(staging: Path, out: Path) -> None:
    """Move a whole data set to its place."""
    if not out.exists():
        os.replace(staging, out)
        return
    # An empty folder may be a mount point or the working directory, so it is filled, not replaced. The lists and
    # the manifest come last: until then nothing takes it for a data set.
    for name in (*FOLDERS, "gt_sets", MANIFEST):
        shutil.move(staging / name, out / name)
