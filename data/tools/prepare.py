"""The NYUD_MT layout from the official labelled release of NYU Depth v2. No torch; needs h5py and scipy.

Sources (official: cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html; the class map is that of Gupta et al., CVPR 2013):
    nyu_depth_v2_labeled.mat  HDF5 (MATLAB v7.3). h5py sees MATLAB's axes reversed: images [N, 3, W, H] uint8,
                              depths and rawDepths [N, W, H] float32 metres, labels [N, W, H] uint16 (0 unlabelled),
                              instances [N, W, H] uint8, names: the N_classes (894) names. N = 1,449, H x W = 480 x 640
    splits.mat                v5; trainNdxs (795, 1) and testNdxs (654, 1), counted from 1
    classMapping40.mat        v5; mapClass (1, 894): label id i becomes mapClass[i - 1], one of 1..40; className (40)
rawDepths are the depths projected onto the colour image, before holes are filled; depths are those filled by
colourisation, without zeros.

What is written, and how it differs from the NYUD_MT archive, which was made by others (see docs/datasets.md):
    images/{id}.jpg           JPEG of quality 95 with full-resolution colour; the archive's setting is unknown. id is
                              the position in the file, counted from 1, in four digits; the archive's ids may differ
    segmentation/{id}.png     labels through mapClass: 0 unlabelled, 1..40
    depth/{id}.npy            float32 metres. "measured" (default): depths where the Kinect measured (0 < rawDepths <
                              10 m, its clipping value), 0 elsewhere, since the published loaders ignore 0 and an
                              in-painted depth is a guess. "filled": depths as they are, for comparison with works that
                              train on them. Which of the two the archive holds is unknown
    normals/{id}.npy          float32 [H, W, 3], fitted to the measured depth, zero where there is none (fit_normals);
                              the archive's source is unknown
    edge/{id}.npy             uint8 0/1, boundaries between annotated objects (find_edges). The archive's edges are
                              HED's NYU edge maps (facebookresearch/astmt, issue 3), whose making is not published
    gt_sets/{train,val}.txt   from trainNdxs, testNdxs, in their order
    prepared.json             sources, choices, versions
"""

import math
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import m3vit
from m3vit.data.matlab import mat_names, read_mat
from m3vit.errors import InputError
from m3vit.files import atomic_folder, not_there, require_new, sha256_file, write_json
from m3vit.label_sets import NYUD_CLASSES
from m3vit.pool import run_jobs, usable_cores

# Dataset of the labelled file -> its number of dimensions and NumPy's kind of its dtype; instances may be missing.
ARRAYS = {"images": (4, "u"), "depths": (3, "f"), "rawDepths": (3, "f"), "labels": (3, "u"), "instances": (3, "u")}
DEPTHS = ("measured", "filled")
FOLDERS = ("images", "segmentation", "depth", "normals", "edge")
MANIFEST = "prepared.json"
JPEG_QUALITY = 95
OFFICIAL = {"images": 1449, "train": 795, "val": 654}

# Colour camera of the official toolbox (camera_params.m), for 640 x 480 and pixels counted from 1.
FOCAL_PX = (518.8579, 519.4696)  # x, y
CENTRE_PX = (325.5824, 253.7362)
CAMERA_WIDTH_PX = 640
MAX_DEPTH_M = 10.0  # the toolbox clips there

WINDOW_RADIUS_PX = 7  # at width 640: 15 x 15 pixels, 1.5 degrees of noise on a wall at 3 m (simulated)
# One step of the Kinect's disparity (1/8 px, baseline 75 mm, focal length 580 px) in inverse depth.
INVERSE_DEPTH_STEP = 0.125 / (580 * 0.075)
MAX_MISFIT = 5 * INVERSE_DEPTH_STEP  # above it a window, or a pixel, does not lie on a plane

MAX_GAP_PX = 8  # annotators left thin unlabelled seams between objects; wider holes have no boundary
IMAGES_PER_CHUNK = 8
CACHE_BYTES = 64 << 20  # per dataset: chunks of the official file may span several images

Progress = Callable[[int, int], None]


def prepare_nyud(
    labeled: Path,
    splits: Path,
    classes: Path,
    out: Path,
    *,
    depth: str = "measured",
    sha256: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the NYUD_MT layout into the new or empty folder `out`; return what prepared.json holds.

    Images are read one by one, so memory does not grow with their number. Everything is written into a hidden folder
    beside `out`, which takes its place when it is whole. With more than one worker (default: one a core) processes are
    spawned, so a script must call this below `if __name__ == "__main__":`. `sha256` adds the sources' hashes to
    prepared.json.
    """
    labeled, splits, classes, out = Path(labeled), Path(splits), Path(classes), Path(out).resolve()
    if depth not in DEPTHS:
        raise InputError(f"depth is {depth!r}: choose from {', '.join(DEPTHS)}")
    require_new(out)
    count, size, num_names = _inspect(labeled)
    ids = _read_splits(splits, count)
    class_map = _read_class_map(classes, num_names)
    wanted = sorted(ids["train"] + ids["val"])
    _require_space(out, len(wanted), size)

    sources = {"labeled": labeled, "splits": splits, "classes": classes}
    notes = {
        "generator": "m3vit.data.tools.prepare",
        "version": m3vit.__version__,
        "layout": "nyud",
        "release": "NYUD_MT",
        "sources": {
            name: {"file": path.name, "bytes": path.stat().st_size, **({"sha256": sha256_file(path)} if sha256 else {})}
            for name, path in sources.items()
        },
        "official_counts": {"images": count, "train": len(ids["train"]), "val": len(ids["val"])} == OFFICIAL,
        "counts": {name: len(numbers) for name, numbers in ids.items()},
        "size": list(size),
        "choices": {
            "depth": depth,
            "jpeg_quality": JPEG_QUALITY,
            "focal_px": list(FOCAL_PX),
            "centre_px": list(CENTRE_PX),
            "normals_window_radius_px": _radius_px(size[1]),
            "edge_max_gap_px": MAX_GAP_PX,
        },
    }
    with atomic_folder(out) as staging:
        for folder in (*FOLDERS, "gt_sets"):
            (staging / folder).mkdir()
        chunks = [wanted[start : start + IMAGES_PER_CHUNK] for start in range(0, len(wanted), IMAGES_PER_CHUNK)]
        jobs = [(labeled.resolve(), staging, class_map, depth, numbers) for numbers in chunks]
        done = 0
        with closing(run_jobs(_write_images, jobs, workers or usable_cores())) as finished:
            for images in finished:
                done += images
                if progress is not None:
                    progress(done, len(wanted))
        for name, numbers in ids.items():
            (staging / "gt_sets" / f"{name}.txt").write_text("".join(f"{number:04d}\n" for number in numbers))
        write_json(staging / MANIFEST, notes)
    return notes


# --- sources --------------------------------------------------------------------------------------------------------


def _inspect(labeled: Path) -> tuple[int, tuple[int, int], int]:
    """Check the labelled file's structure; return its number of images, their (height, width) and number of names."""
    with _open_labeled(labeled) as file:
        shapes = {}
        for name, (dimensions, kinds) in ARRAYS.items():
            dataset = file.get(name)
            if dataset is None and name == "instances":
                continue
            shape, kind = getattr(dataset, "shape", None), getattr(getattr(dataset, "dtype", None), "kind", "")
            if shape is None or len(shape) != dimensions or kind not in kinds:
                raise InputError(
                    f"{labeled} has no array {name} of {dimensions} dimensions, but {', '.join(sorted(file))}: "
                    "give nyu_depth_v2_labeled.mat as --labeled"
                )
            shapes[name] = (shape[0], *shape[-2:])
        if len(set(shapes.values())) != 1 or file["images"].shape[1] != 3:
            raise InputError(f"{labeled}: arrays do not fit each other ({shapes}): download it again")
        count, width, height = shapes["images"]
        return count, (height, width), int(getattr(file.get("names"), "size", 0))


def _open_labeled(path: Path) -> Any:
    """Open the HDF5 file, or raise InputError that says what it is instead."""
    import h5py

    if not path.is_file():
        raise InputError(f"{path} not found: give nyu_depth_v2_labeled.mat as --labeled")
    if not h5py.is_hdf5(path):
        with open(path, "rb") as file:
            start = file.read(64)
        what = "a MATLAB v5 file" if start.startswith(b"MATLAB 5.0") else "not an HDF5 file"
        raise InputError(
            f"{path} is {what}, but the labelled release is MATLAB v7.3 (HDF5, 2.8 GB): "
            "give nyu_depth_v2_labeled.mat as --labeled, or download it again"
        )
    try:
        return h5py.File(path, "r", rdcc_nbytes=CACHE_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be opened ({error}): it is cut off or damaged, download it again") from None


def _read_v5(path: Path, key: str, option: str, what: str, other: str = "") -> list[NDArray]:
    """Return the array `key` of a small v5 .mat file, which must have it, and the array `other`, empty if it lacks."""
    if not path.is_file():
        raise InputError(f"{path} {not_there(path)}: give {what} as {option}")
    try:
        names = mat_names(path)
        arrays = [np.asarray(read_mat(path, name)) if name in names else np.empty(0) for name in (key, other)]
    except InputError as error:
        reason = str(error).removeprefix(f"{path} ")
        if "MATLAB 7.3" in reason:
            raise InputError(f"{path} is MATLAB v7.3 (HDF5), but must be a v5 file: give {what} as {option}") from None
        raise InputError(f"{path} is not a readable MATLAB v5 file ({reason}): give {what} as {option}") from None
    if key not in names:
        advice = f"give {what} as {option}"
        if {"trainNdxs", "mapClass"} & set(names):
            advice = "--splits and --classes seem to be swapped"
        raise InputError(f"{path} holds {', '.join(sorted(names)) or 'nothing'}, but no {key}: {advice}")
    return arrays


def _read_splits(path: Path, count: int) -> dict[str, list[int]]:
    """Return the image numbers, from 1, of train and val."""
    keys = ("trainNdxs", "testNdxs")
    arrays = _read_v5(path, keys[0], "--splits", "splits.mat", other=keys[1])
    ids: dict[str, list[int]] = {}
    for name, key, array in zip(("train", "val"), keys, arrays, strict=True):
        numbers = array.ravel()
        if not numbers.size:
            raise InputError(f"{path}: {key} is missing or empty: give splits.mat as --splits")
        if numbers.dtype.kind not in "uif" or (numbers != np.floor(numbers)).any():
            raise InputError(f"{path}: {key} must hold whole numbers")
        if numbers.min() < 1 or numbers.max() > count:
            raise InputError(
                f"{path}: {key} goes from {int(numbers.min())} to {int(numbers.max())}, but the labelled file has "
                f"images 1 to {count}"
            )
        ids[name] = [int(number) for number in numbers]
        if len(set(ids[name])) != len(ids[name]):
            twice = next(number for number in ids[name] if ids[name].count(number) > 1)
            raise InputError(f"{path}: {key} lists image {twice} more than once")
    both = sorted(set(ids["train"]) & set(ids["val"]))
    if both:
        raise InputError(f"{path}: {len(both)} images are in both splits, the first is {both[0]}")
    return ids


def _read_class_map(path: Path, num_names: int) -> NDArray[np.uint8]:
    """Return the table [1 + N_classes] from label ids to 0 (unlabelled), 1..40."""
    mapping = _read_v5(path, "mapClass", "--classes", "classMapping40.mat")[0].ravel()
    last = len(NYUD_CLASSES)
    if not mapping.size or mapping.dtype.kind not in "uif" or mapping.min() < 0 or mapping.max() > last:
        raise InputError(f"{path}: mapClass must hold classes 0 to {last}: give classMapping40.mat as --classes")
    if mapping.size < num_names:
        raise InputError(
            f"{path}: mapClass covers {mapping.size} label ids, but the labelled file names {num_names} classes: "
            "give classMapping40.mat (894 ids) as --classes"
        )
    return np.concatenate([[0], mapping]).astype(np.uint8)


def _require_space(out: Path, images: int, size: tuple[int, int]) -> None:
    place = next(folder for folder in (out, *out.parents) if folder.exists())
    # float32 normals and depth, uint8 edge, and at most one byte a pixel for JPEG and PNG together.
    needed, free = images * (math.prod(size) * 18 + 4096 * len(FOLDERS)), shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{out}: {images} images need about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: "
            "give a folder on another disk"
        )


# --- images ---------------------------------------------------------------------------------------------------------

Job = tuple[Path, Path, NDArray[np.uint8], str, list[int]]  # labelled file, root, class map, depth, image numbers


def _write_images(job: Job) -> int:
    """Write all files of the images of one job; return their number."""
    labeled, root, class_map, depth_choice, numbers = job
    with _open_labeled(labeled) as file:
        # Opened once: the cache of decompressed chunks belongs to the dataset object.
        datasets = {name: file[name] for name in ARRAYS if name in file}
        for number in numbers:
            arrays = {}
            for name, dataset in datasets.items():
                try:
                    arrays[name] = dataset[number - 1].T  # [H, W] or [H, W, 3]
                except (OSError, RuntimeError) as error:
                    raise InputError(
                        f"{labeled}: {name} of image {number} cannot be read ({error}): it is cut off or damaged, "
                        "download it again"
                    ) from None
            try:
                files = convert(arrays, class_map, depth_choice)
            except ValueError as error:
                raise InputError(f"{labeled}: image {number}: {error}") from None
            name = f"{number:04d}"
            Image.fromarray(files["images"]).save(root / "images" / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)
            Image.fromarray(files["segmentation"]).save(root / "segmentation" / f"{name}.png")
            for folder in ("depth", "normals", "edge"):
                np.save(root / folder / f"{name}.npy", files[folder])
    return len(numbers)


def convert(arrays: dict[str, NDArray], class_map: NDArray[np.uint8], depth_choice: str) -> dict[str, NDArray]:
    """Return the contents of an image's files by folder, from its arrays [H, W] (images [H, W, 3])."""
    labels = arrays["labels"]
    if labels.max(initial=0) >= len(class_map):
        raise ValueError(
            f"has label id {labels.max()}, but --classes covers 1 to {len(class_map) - 1}: give classMapping40.mat"
        )
    filled, raw = arrays["depths"].astype(np.float32), arrays["rawDepths"]
    measured = np.isfinite(raw) & (raw > 0) & (raw < MAX_DEPTH_M) & np.isfinite(filled) & (filled > 0)
    width = labels.shape[1]
    scale = width / CAMERA_WIDTH_PX
    normals = fit_normals(
        np.where(measured, filled, 0),
        (FOCAL_PX[0] * scale, FOCAL_PX[1] * scale),
        (CENTRE_PX[0] * scale, CENTRE_PX[1] * scale),
        _radius_px(width),
    )
    if depth_choice == "measured":
        depth = np.where(measured, filled, np.float32(0))
    else:
        depth = np.where(np.isfinite(filled) & (filled > 0), filled, np.float32(0))
    regions = labels.astype(np.int64) << 16 | arrays.get("instances", np.zeros_like(labels)).astype(np.int64)
    return {
        "images": np.ascontiguousarray(arrays["images"]),
        "segmentation": np.ascontiguousarray(class_map[labels]),
        "depth": np.ascontiguousarray(depth),
        "normals": normals,
        "edge": find_edges(np.where(labels > 0, regions, 0)).astype(np.uint8),
    }


def _radius_px(width: int) -> int:
    return max(1, round(WINDOW_RADIUS_PX * width / CAMERA_WIDTH_PX))


def fit_normals(
    depth: NDArray, focal_px: tuple[float, float], centre_px: tuple[float, float], radius: int
) -> NDArray[np.float32]:
    """Return unit normals [H, W, 3] of a depth map [H, W] in metres: x right, y up, z towards the camera.

    On a plane, inverse depth is linear in the pixel's ray (x, y, 1): 1/z = a x + b y + c, and (-a, b, c) is the normal
    in these axes. It is also where the Kinect's noise is even, since it measures disparity. So a, b, c are fitted by
    least squares to the inverse depths of a window, from sums over boxes (summed-area tables). If the window around a
    pixel fits worse than a disparity step it may span two surfaces; of it and the eight windows that reach the pixel
    from one side, the one that fits best is taken. Where depth is 0, nothing fits, or the pixel is off the plane: 0.
    """
    height, width = depth.shape
    valid = depth > 0
    x = np.broadcast_to((np.arange(1, width + 1) - centre_px[0]) / focal_px[0], depth.shape)
    y = np.broadcast_to(((np.arange(1, height + 1) - centre_px[1]) / focal_px[1])[:, None], depth.shape)
    w = np.divide(1.0, depth, out=np.zeros(depth.shape), where=valid)
    products = np.stack([np.ones_like(w), x, y, w, x * x, x * y, y * y, x * w, y * w, w * w]) * valid
    n, sx, sy, sw, xx, xy, yy, xw, yw, ww = _box_sums(products, radius)
    count = np.maximum(n, 1)
    xx, xy, yy = xx - sx * sx / count, xy - sx * sy / count, yy - sy * sy / count
    xw, yw, ww = xw - sx * sw / count, yw - sy * sw / count, ww - sw * sw / count
    # At least a third of the window (and more than a line of it): fewer pixels give a poor slope.
    determinant = xx * yy - xy * xy
    spread = (radius / focal_px[0]) ** 2 * (radius / focal_px[1]) ** 2
    fits = (n >= max(5, (2 * radius + 1) ** 2 / 3)) & (determinant > 1e-3 * n * n * spread)
    safe = np.where(fits, determinant, 1)
    a, b = (xw * yy - yw * xy) / safe, (yw * xx - xw * xy) / safe
    c = (sw - a * sx - b * sy) / count
    misfit = np.sqrt(np.maximum(ww - a * xw - b * yw, 0) / np.maximum(n - 3, 1))
    misfit[~fits] = np.inf

    # From here on per pixel: the window centred on it, unless that one is poor and another is better.
    plane, best = np.stack([a, b, c]), misfit.copy()
    chosen = plane.copy()
    for row_shift in (-radius, 0, radius):
        for column_shift in (-radius, 0, radius):
            rows = slice(max(0, -row_shift), height - max(0, row_shift))
            columns = slice(max(0, -column_shift), width - max(0, column_shift))
            other_rows = slice(rows.start + row_shift, rows.stop + row_shift)
            other_columns = slice(columns.start + column_shift, columns.stop + column_shift)
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue  # an image smaller than the window
            other = misfit[other_rows, other_columns]
            better = (other < best[rows, columns]) & (misfit[rows, columns] > INVERSE_DEPTH_STEP)
            np.copyto(best[rows, columns], other, where=better)
            np.copyto(chosen[:, rows, columns], plane[:, other_rows, other_columns], where=better)
    a, b, c = chosen
    on_plane = valid & (best < MAX_MISFIT) & (np.abs(a * x + b * y + c - w) < MAX_MISFIT)
    normals = np.stack([-a, b, c], axis=-1)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    on_plane &= length[..., 0] > 0
    return np.where(on_plane[..., None], normals / np.where(length > 0, length, 1), 0).astype(np.float32)


def _box_sums(stack: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """Return for each pixel of [K, H, W] the sums over the (2 radius + 1)^2 box around it, cut at the border."""
    height, width = stack.shape[1:]
    table = np.zeros((len(stack), height + 1, width + 1))
    np.cumsum(stack, axis=1, out=table[:, 1:, 1:])
    np.cumsum(table[:, 1:, 1:], axis=2, out=table[:, 1:, 1:])
    rows, columns = np.arange(height), np.arange(width)
    top, bottom = np.maximum(rows - radius, 0), np.minimum(rows + radius + 1, height)
    left, right = np.maximum(columns - radius, 0), np.minimum(columns + radius + 1, width)
    strips = table[:, bottom] - table[:, top]
    return strips[:, :, right] - strips[:, :, left]


def find_edges(regions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the boundaries [H, W] between regions (0: unlabelled), one pixel wide.

    A pixel is an edge if its right or lower neighbour is of another region (one-sided, as the south-east boundaries of
    the published evaluation). Unlabelled pixels at most MAX_GAP_PX from a labelled one first take its region, so that a
    seam between two objects gives one line; the rim of a wider hole is none, for what lies in it is not known.
    """
    from scipy.ndimage import distance_transform_edt

    if not regions.any():
        return np.zeros(regions.shape, bool)
    distance, (rows, columns) = distance_transform_edt(regions == 0, return_indices=True)
    near = np.where(distance <= MAX_GAP_PX, regions[rows, columns], 0)
    edge = np.zeros(regions.shape, bool)
    edge[:, :-1] |= (near[:, 1:] != near[:, :-1]) & (near[:, 1:] > 0) & (near[:, :-1] > 0)
    edge[:-1] |= (near[1:] != near[:-1]) & (near[1:] > 0) & (near[:-1] > 0)
    return edge
