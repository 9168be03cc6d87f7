"""Rows of benchmarks/onnx.py beside single images: all tasks at once, batches, and a film from file to file."""

import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from _bench import Figures, medians, seconds
from _onnx_packages import PRECISIONS, TASK, TASKS

from m3vit.export.runtime.options import Loading, Options
from m3vit.export.runtime.package import Package
from m3vit.export.runtime.predict import predict_files

FRAMES = 40
Ways = dict[str, Callable[[], float]]
Interleave = Callable[[Ways], list[dict[str, float]]]


def noise(size: int, batch: int = 1) -> Any:
    """Return images float32 [B, 3, size, size] whose tokens go to all experts."""
    return np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)


def all_tasks(package: Path, size: int, threads: int, interleave: Interleave) -> Figures:
    """Return what all tasks of an image take, at once and one after the other, in ms and as ratios to one task."""
    image, ways = noise(size), {}
    for precision in PRECISIONS:
        opened = Package.load(package, precision=precision, threads=threads, verify=False)
        turns = {
            "one": lambda opened=opened: opened.logits(image, TASK),
            "at once": lambda opened=opened: opened.logits_all(image),
            "in turn": lambda opened=opened: [opened.logits(image, task) for task in TASKS],
        }
        for name, run in turns.items():
            run()  # makes the sessions
            ways[f"{precision} {name}"] = lambda run=run: seconds(run)
    times = interleave(ways)
    found = medians([{n: each[n] / each[f"{n.split()[0]} one"] for n in each} for each in times])
    return {"size": size, "threads": threads, "ratios": found, "ms": {n: 1000 * s for n, s in medians(times).items()}}


def batches(
    package: Path, size: int, threads: int, counts: tuple[int, ...], eager: Any, interleave: Interleave
) -> Figures:
    """Return the images a second of the sparse model at some batch sizes, of its graphs and of torch if given."""
    found: Figures = {"size": size, "threads": threads, "images_per_s": {}}
    opened = {p: Package.load(package, precision=p, threads=threads, verify=False) for p in PRECISIONS}
    for count in counts:
        images, ways = noise(size, count), {}
        for precision, one in opened.items():
            one.logits(images, TASK)
            ways[precision] = lambda one=one, images=images: seconds(lambda: one.logits(images, TASK))
        if eager is not None:
            eager(images)
            ways["torch"] = lambda images=images: seconds(lambda: eager(images))
        found["images_per_s"][count] = {name: count / taken for name, taken in medians(interleave(ways)).items()}
    return found


def film(package: Path, size: int, threads: int) -> Figures:
    """Return the frames a second of a film, from file to file, and of the inference of its frames alone."""
    from m3vit.export.runtime.video import FilmWriter

    rate, figures = Fraction(25), {}
    frames = np.random.default_rng(0).integers(0, 255, (4, size, size, 3)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "film.mp4"
        with FilmWriter(source, rate, 1 / rate, (size, size)) as writer:
            for number in range(FRAMES):
                writer.write(frames[number % len(frames)], number)
        for precision in PRECISIONS:
            opened = Package.load(package, precision=precision, threads=threads, verify=False)
            opened.predict(frames[0], TASK)
            alone = FRAMES / seconds(lambda: [opened.predict(frames[n % len(frames)], TASK) for n in range(FRAMES)])  # noqa: B023
            loading = Loading(precision=precision, threads=threads)
            outcome = predict_files(package, TASK, [source], Path(temporary) / precision, Options(), loading=loading)
            figures[precision] = {"inference_alone": alone, "pace": outcome.paces[0][1]}
    return {"size": size, "threads": threads, "film": figures}
