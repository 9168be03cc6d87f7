"""How fast `m3vit data check` reads: a NYUD_MT tree of realistic files in a temporary folder.

    python benchmarks/data_check.py [--samples 64] [--workers 2] [--json FILE]

The files are as large as the real ones (480 x 640, float32 normals and depth; noise, so that JPEG and PNG do not pack
better than photographs). They were just written, so they come from memory: on a cold disk 1,449 samples are about
9.5 GB to read besides.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from _bench import arguments, save
from PIL import Image

from m3vit.data.tools.check import check
from m3vit.pool import usable_cores

SIZE = (480, 640)
NYUD_SAMPLES = 1449


def write_sample(root: Path, name: str, rng: np.random.Generator) -> None:
    """Write the five files of a sample: smooth surfaces and blocks of labels, with sensor noise and holes."""
    height, width = SIZE
    coarse = rng.normal(size=(3, 12, 16)).astype(np.float32)
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in coarse]
    smooth = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    image = (128 + 50 * smooth + rng.normal(0, 8, (*SIZE, 3))).clip(0, 255).astype(np.uint8)
    labels = rng.integers(0, 41, (24, 32)).repeat(20, axis=0).repeat(20, axis=1).astype(np.uint8)
    depth = (3 + smooth[..., 0] + rng.normal(0, 0.01, SIZE)).clip(0.5, 9.9).astype(np.float32)
    holes = rng.random((24, 32)).repeat(20, axis=0).repeat(20, axis=1) < 0.15
    normals = smooth + rng.normal(0, 0.05, (*SIZE, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    edge = np.zeros(SIZE, np.float32)
    edge[:, :-1] = labels[:, 1:] != labels[:, :-1]
    Image.fromarray(image).save(root / "images" / f"{name}.jpg", quality=95)
    Image.fromarray(labels).save(root / "segmentation" / f"{name}.png")
    np.save(root / "depth" / f"{name}.npy", np.where(holes, 0, depth).astype(np.float32))
    np.save(root / "normals" / f"{name}.npy", np.where(holes[..., None], 0, normals).astype(np.float32))
    np.save(root / "edge" / f"{name}.npy", edge)


def write_tree(root: Path, samples: int) -> None:
    """Write a NYUD_MT tree with every fifth sample in val."""
    rng = np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / folder).mkdir(parents=True)
    names = [f"{number:04d}" for number in range(1, samples + 1)]
    for name in names:
        write_sample(root, name, rng)
    for split, ids in (("train", [name for name in names if int(name) % 5]), ("val", names[4::5])):
        (root / "gt_sets" / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, default=64, help="size of the tree, at least 5 (default: 64)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: one a core)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "NYUD_MT"
        write_tree(root, args.samples)
        size_mb = sum(path.stat().st_size for path in root.rglob("*.*")) / 1e6
        start = time.perf_counter()
        report = check(root, workers=args.workers)
        seconds = time.perf_counter() - start
    assert report.ok, report.problems
    figures = {
        "samples": args.samples,
        "workers": args.workers,
        "mb_per_sample": round(size_mb / args.samples, 2),
        "seconds": round(seconds, 2),
        "samples_per_s": round(args.samples / seconds, 2),
        "projected_s_for_1449": round(seconds / args.samples * NYUD_SAMPLES, 1),
    }
    print(json.dumps(figures, indent=2))
    save(args.json, figures)


if __name__ == "__main__":
    main()
