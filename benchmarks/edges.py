"""Time the edge scores at NYUD-v2's size, against exact minimum-cost assignment by scipy in the same run.

    python benchmarks/edges.py [--images 8] [--processes 2] [--reader read_one_png] [--json]

The predictions are made up: wandering, blurred outlines with gaps, as many false ones, noise, and the high
probabilities of a network trained with a positive weight of 0.95 (about 19 % of the pixels exceed 0.3).
"""

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

from m3vit.data.thinning import segmentation_boundaries
from m3vit.evaluation.edge_readers import HEADLINE, READERS, Reader
from m3vit.evaluation.edges import ois_counts, reader_counts, summarise, thin
from m3vit.pool import usable_cores

HEIGHT, WIDTH = 425, 560
MAX_DIST = 0.011
NYUD_IMAGES = 654  # of the test split
COMPARED = slice(4, None, 19)  # of the thresholds, 5 or 6: the alternative is slow
BY_NAME = {reader.name: reader for readers in READERS.values() for reader in readers}


def make_image(seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return a made-up edge probability and its truth, both [425, 560]."""
    rng = np.random.default_rng(seed)
    grid = np.mgrid[:HEIGHT, :WIDTH].astype(float)

    def waves(sigma_px: float) -> NDArray[np.float64]:
        field = ndimage.gaussian_filter(rng.standard_normal((HEIGHT, WIDTH)), sigma_px)
        return field / field.std()

    def outlines(regions: int) -> NDArray[np.bool_]:
        centres = cKDTree(rng.random((regions, 2)) * (HEIGHT, WIDTH))
        bent = np.stack([axis + 5 * waves(15) for axis in grid], axis=-1)
        return segmentation_boundaries(centres.query(bent)[1])

    truth = outlines(60)
    wandering = [axis + 1.5 * waves(20) for axis in grid]
    seen = ndimage.gaussian_filter(ndimage.map_coordinates(truth.astype(float), wandering, order=1), 2)
    false = ndimage.gaussian_filter(outlines(250).astype(float), 2)
    evidence = 12 * seen * np.clip(0.6 + 0.2 * waves(15), 0, 1.2) + 5 * false * np.clip(0.2 * waves(15), 0, 1)
    logit = 2 * evidence + 0.9 * waves(2) - 2.2
    return (1 / (1 + np.exp(-logit))).astype(np.float32), truth


def counts_of(seed: int, name: str) -> tuple[float, float, NDArray[np.int64]]:
    """Return an image's seconds on the clock, those of the processor, and its counts."""
    probability, truth = make_image(seed)
    clock, cpu = time.perf_counter(), time.process_time()
    counts = reader_counts(BY_NAME[name], probability, truth, MAX_DIST)
    return time.perf_counter() - clock, time.process_time() - cpu, counts


def assigned(predicted: NDArray[np.bool_], truth: NDArray[np.bool_], distance_px: float) -> int:
    """Return the pairs of the assignment of minimal summed distance, 100 maximum distances for a pixel left out."""
    p, t = np.argwhere(predicted), np.argwhere(truth)
    if not len(p) or not len(t):
        return 0
    near = cKDTree(p).sparse_distance_matrix(cKDTree(t), distance_px, output_type="coo_matrix")
    own = np.arange(len(p))  # every predicted pixel may stay alone, at a column of its own
    rows, columns = np.concatenate([near.row, own]), np.concatenate([near.col, len(t) + own])
    cost = np.concatenate([near.data + 1, np.full(len(p), 100 * distance_px + 1)])  # + 1: 0 would mean no pair
    graph = coo_array((cost, (rows, columns)), shape=(len(p), len(t) + len(p))).tocsr()
    return int((min_weight_full_bipartite_matching(graph)[1] < len(t)).sum())


def alternative(seed: int, reader: Reader) -> tuple[float, bool]:
    """Return an image's seconds by assignment, extrapolated to all thresholds, and whether the counts agree."""
    probability, truth = make_image(seed)
    few = replace(reader, thresholds=reader.thresholds[COMPARED])
    expected = reader_counts(few, probability, truth, MAX_DIST)
    start = time.perf_counter()
    passed = few.levels(np.floor(255 * probability.astype(float) + 0.5).astype(np.uint8))
    once = time.perf_counter() - start
    distance_px = MAX_DIST * math.hypot(HEIGHT, WIDTH)
    start = time.perf_counter()
    sizes = [assigned(thin(passed > rank), truth, distance_px) for rank in range(len(few.thresholds))]
    each = (time.perf_counter() - start) / len(few.thresholds)
    return once + len(reader.thresholds) * each, sizes == expected[:, 0].tolist()


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=8, help="images timed by this project (default 8)")
    parser.add_argument("--alternative-images", type=int, default=2, help="of these, by assignment too (default 2)")
    parser.add_argument("--processes", type=int, default=usable_cores(), help="default: all cores")
    parser.add_argument("--reader", choices=BY_NAME, default=HEADLINE.name, help="of the map (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if min(args.images, args.processes) < 1 or not 1 <= args.alternative_images <= args.images:
        parser.error("--images and --processes: 1 or more; --alternative-images: 1 .. --images")
    reader = BY_NAME[args.reader]

    # Time inside the processes, which run side by side: making the images is not part of it.
    with ProcessPoolExecutor(args.processes) as pool:
        timed = list(pool.map(counts_of, range(args.images), [reader.name] * args.images))
    seconds, cpu_seconds = (float(np.mean(values)) for values in list(zip(*timed, strict=True))[:2])
    counts = np.array([count for _, _, count in timed])
    alone = float(np.mean([counts_of(seed, reader.name)[0] for seed in range(args.alternative_images)]))
    slow = [alternative(seed, reader) for seed in range(args.alternative_images)]
    assignment_seconds = float(np.mean([second for second, _ in slow]))
    result = {
        "size": [HEIGHT, WIDTH],
        "reader": reader.name,
        "thresholds": len(reader.thresholds),
        "images": args.images,
        "processes": args.processes,
        "seconds_per_image": seconds,
        "cpu_seconds_per_image": cpu_seconds,
        "images_per_second": args.processes / seconds,
        "nyud_images": NYUD_IMAGES,
        "nyud_minutes": NYUD_IMAGES * seconds / args.processes / 60,
        "alternative": "scipy min_weight_full_bipartite_matching per threshold (every 19th timed)",
        "alternative_images": args.alternative_images,
        "alternative_seconds_per_image": assignment_seconds,
        "ratio_one_process": assignment_seconds / alone,
        "counts_agree": all(agree for _, agree in slow),
        "scores": summarise(
            counts.sum(axis=0), np.sum([ois_counts(count) for count in counts], axis=0), reader.thresholds
        ),
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{seconds:.2f} s an image of {HEIGHT} x {WIDTH} ({cpu_seconds:.2f} s of the processor),", end=" ")
    print(f"{len(reader.thresholds)} thresholds, {reader.name}")
    print(f"{result['images_per_second']:.1f} images/s on {args.processes} processes:", end=" ")
    print(f"{NYUD_IMAGES} images in {result['nyud_minutes']:.1f} min")
    print(f"{result['alternative']}: {assignment_seconds:.1f} s an image,", end=" ")
    print(f"{result['ratio_one_process']:.0f} times as long on one process; same counts: {result['counts_agree']}")
    print({name: round(score, 2) for name, score in result["scores"].items()})


if __name__ == "__main__":
    main()
