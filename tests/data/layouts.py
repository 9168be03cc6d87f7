"""Tiny data sets in the exact published formats: NYUD_MT, NYUDv2 and PASCAL-Context. Contents are random but valid."""

from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image

NYUD_RELEASES = ("NYUD_MT", "NYUDv2")
SPLITS = {"train": ("0003", "0001"), "val": ("0002",)}  # listings of the real data are not sorted either
PASCAL_SPLITS = {"train": ("2008_000003", "2008_000001"), "val": ("2009_000002",)}
SIZE = (24, 32)

Mask = NDArray[np.bool_]
Person = tuple[str, int, Mask, list[tuple[str, Mask]]]  # class, class_ind, mask, parts (part_name, mask)


def unit_normals(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
    """Return random unit vectors [H, W, 3] with z > 0."""
    normals = rng.standard_normal((*size, 3))
    normals[..., 2] = abs(normals[..., 2]) + 0.1
    return (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32)


def coded(normals: NDArray) -> NDArray[np.uint8]:
    """Return normals as the pngs of NYUDv2 and PASCAL-Context code them: v = (n + 1) / 2 * 255."""
    return np.rint((normals + 1) / 2 * 255).astype(np.uint8)


def save_palette_png(path: Path, ids: NDArray[np.uint8]) -> None:
    """Write a png of mode "P", as PASCAL VOC's: the ids are palette indices, the palette is not grey."""
    picture = Image.fromarray(ids).convert("P")
    picture.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
    picture.putdata(ids.reshape(-1).tolist())
    picture.save(path)


def write_listings(folder: Path, splits: dict[str, tuple[str, ...]]) -> None:
    """Write one file of ids for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))


def write_nyud(
    root: Path,
    release: str = "NYUD_MT",
    splits: dict[str, tuple[str, ...]] = SPLITS,
    size: tuple[int, int] = SIZE,
) -> Path:
    """Write a data set in one of NYUD_RELEASES."""
    rng = np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth", "normals", "edge"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_listings(root / "gt_sets", splits)
    for name in (name for ids in splits.values() for name in ids):
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        segmentation = rng.integers(0, 41, size, np.uint8)
        edge = rng.random(size) < 0.1
        normals = unit_normals(rng, size)
        Image.fromarray(segmentation).save(root / "segmentation" / f"{name}.png")
        np.save(root / "depth" / f"{name}.npy", rng.uniform(0.7, 9.9, size).astype(np.float32))
        if release == "NYUD_MT":
            image.save(root / "images" / f"{name}.jpg")
            np.save(root / "normals" / f"{name}.npy", normals)
            np.save(root / "edge" / f"{name}.npy", edge.astype(np.float32))
        else:
            image.save(root / "images" / f"{name}.png")
            Image.fromarray(coded(normals)).save(root / "normals" / f"{name}.png")
            Image.fromarray(edge.astype(np.uint8) * 255).save(root / "edge" / f"{name}.png")
    return root


def save_label_map(path: Path, ids: NDArray, compressed: bool = True) -> None:
    """Write pascal-context/trainval/{id}.mat: LabelMap, uint16 as MATLAB has it."""
    scipy.io.savemat(path, {"LabelMap": ids.astype(np.uint16)}, do_compression=compressed)


def _structs(fields: tuple[str, ...], rows: list[tuple]) -> NDArray:
    """Return a MATLAB struct array (1 × n), or [] if there are no rows: what MATLAB leaves where parts are missing."""
    if not rows:
        return np.zeros((0, 0))
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for column, row in enumerate(rows):
        for field, value in zip(fields, row, strict=True):
            array[0, column][field] = value
    return array


def save_anno(path: Path, name: str, objects: list[Person], compressed: bool = True) -> None:
    """Write human_parts/{id}.mat as PASCAL-Part has it: anno(1 × 1).imname, .objects(1 × n) with .parts(1 × m)."""
    things = [
        (label, float(index), mask.astype(np.uint8), _structs(("part_name", "mask"), [(p, m) for p, m in parts]))
        for label, index, mask, parts in objects
    ]
    objects_array = _structs(("class", "class_ind", "mask", "parts"), things)
    anno = _structs(("imname", "objects"), [(name, objects_array)])
    scipy.io.savemat(path, {"anno": anno}, do_compression=compressed)


def write_pascal(root: Path, splits: dict[str, tuple[str, ...]] = PASCAL_SPLITS, size: tuple[int, int] = SIZE) -> Path:
    """Write a data set in the layout of PASCAL_MT and PASCALContext.

    The first image of a split shows a person with parts and a dog; the others no person. Labels of the last image are
    in semseg/pascal-context alone, as those of images outside VOC 2012's segmentation set are.
    """
    rng = np.random.default_rng(0)
    folders = ("JPEGImages", "semseg/VOC12", "semseg/pascal-context", "human_parts", "pascal-context/trainval")
    for folder in (*folders, "normals_distill", "sal_distill"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_listings(root / "ImageSets" / "Context", splits)
    height, width = size
    everyone = [name for ids in splits.values() for name in ids]
    for name in everyone:
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        semseg = rng.choice(np.array([*range(21), 255], np.uint8), size)
        save_palette_png(root / "semseg" / "pascal-context" / f"{name}.png", semseg)
        if name != everyone[-1]:
            save_palette_png(root / "semseg" / "VOC12" / f"{name}.png", semseg)
        upper = np.arange(height)[:, None].repeat(width, 1) < height // 2
        parts = [("hair", upper), ("lfoot", ~upper)]
        objects: list[Person] = [("dog", 12, upper, [("head", upper)])]
        if any(name == ids[0] for ids in splits.values()):
            objects.append(("person", 15, np.ones(size, np.bool_), parts))
        save_anno(root / "human_parts" / f"{name}.mat", name, objects)
        blocks = rng.integers(1, 460, (height // 8 + 1, width // 8 + 1)).repeat(8, 0).repeat(8, 1)[:height, :width]
        save_label_map(root / "pascal-context" / "trainval" / f"{name}.mat", blocks)
        Image.fromarray(coded(unit_normals(rng, size))).save(root / "normals_distill" / f"{name}.png")
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(root / "sal_distill" / f"{name}.png")
    return root


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Return name -> (time of change, contents) of everything below a folder."""
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(root.rglob("*"))
    }
