"""`m3vit data show`: a contact sheet of a data set: some images, every label in its colours, class shares, coverage.

What a person sees at a glance that no check tells: labels of another image, classes by another name, depth turned over,
normals along other axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from m3vit.data.opening import LAYOUTS, layout_of, open_split
from m3vit.data.sample import Sample, Split
from m3vit.errors import InputError
from m3vit.files import atomic_path, require_ending
from m3vit.kinds.directions import KEY
from m3vit.label_sets import LABEL_SETS
from m3vit.tasks import IGNORE, TASKS, kind_of, palette

SPLITS = ("train", "val")
CELL = 240  # pixels, of a picture's width
GAP, TEXT = 12, 14
MOST_SHARES = 200  # labels that class shares are of
LINE = TEXT + 6
INK, PAPER, FAINT, BAR = (28, 39, 51), (255, 255, 255), (226, 230, 235), (70, 110, 160)

Progress = Callable[[int, int], None]


@dataclass
class Shares:
    """What the labels of a task hold: how many images have one by split, and pixels of each class over some of them."""

    counts: dict[str, tuple[int, int]]  # split -> images with a label, images
    pixels: NDArray[np.float64] | None = None
    labels: int = 0


def show(
    root: Path, out: Path, *, images: int = 8, tasks: Sequence[str] | None = None, progress: Progress | None = None
) -> list[str]:
    """Draw the contact sheet of `root` into the png `out`, and return lines about what is on it.

    Raises InputError for a folder that is no data set, for tasks that it has not, and for a name that is no png's.
    """
    require_ending(out, "picture", ".png")
    splits = _open(root, tasks)
    shares = _shares(splits, progress)
    chosen = _choose(splits, images)
    samples = [(split, _load(splits[split], index)) for split, index in chosen]
    sheet = _draw(root, splits, shares, samples)
    with atomic_path(out) as path:
        sheet.save(path, "PNG", optimize=True)
    return _words(shares)


def _open(root: Path, tasks: Sequence[str] | None) -> dict[str, Split]:
    name = layout_of(root)
    layout = LAYOUTS[name]
    label_set = layout.label_set_of(root)
    there = LABEL_SETS[label_set].tasks
    if layout.folders:  # of a published data set, which may be there in part
        there = tuple(task for task in there if any((root / folder).is_dir() for folder in layout.folders[task]))
    if unknown := [task for task in tasks or () if task not in there]:
        raise InputError(f"--tasks names {', '.join(unknown)}: those of {root} are {', '.join(there)}")
    chosen = [task for task in there if tasks is None or task in tasks]
    return {split: open_split(name, root, split, chosen, partial=True) for split in SPLITS}


def _choose(splits: dict[str, Split], count: int) -> list[tuple[str, int]]:
    """Return some images, spread over both splits, first those with most labels among their neighbours."""
    total = sum(len(split) for split in splits.values())
    found = []
    for name, split in splits.items():
        some = min(len(split), max(1, round(count * len(split) / total)))
        for place in range(some):
            block = range(place * len(split) // some, (place + 1) * len(split) // some)
            # Every second one as it comes: what images lack is to be seen too.
            best = max(block, key=lambda index: sum(split.has(index, task) for task in split.tasks))
            found.append((name, best if place % 2 == 0 else block[0]))
    return found


def _load(split: Split, index: int) -> Sample | str:
    try:
        return split.load(index)
    except InputError as error:
        return str(error)


def _shares(splits: dict[str, Split], progress: Progress | None) -> dict[str, Shares]:
    """Count labels of all images, and pixels of classes over some of them."""
    found = {}
    tasks = next(iter(splits.values())).tasks
    for number, task in enumerate(tasks):
        having = [(split, i) for split in splits.values() for i in range(len(split)) if split.has(i, task)]
        counts = {name: (sum(one is split for one, _ in having), len(split)) for name, split in splits.items()}
        entry = found[task] = Shares(counts)
        if task in LABEL_SETS[next(iter(splits.values())).label_set].classes:
            step = max(1, -(-len(having) // MOST_SHARES))
            pixels = np.zeros(256)
            for split, index in having[::step]:
                try:
                    pixels += np.bincount(split.read(index, task).ravel(), minlength=256)
                    entry.labels += 1
                except InputError:
                    continue  # m3vit data check names it
            entry.pixels = pixels
        if progress:
            progress(number + 1, len(tasks))
    return found


def _words(shares: dict[str, Shares]) -> list[str]:
    return [
        f"{task}: " + ", ".join(f"{having} of {all_} {split}" for split, (having, all_) in one.counts.items())
        for task, one in shares.items()
    ]


# --- drawing --------------------------------------------------------------------------------------------------------


def _font(size: int = TEXT) -> Any:
    return ImageFont.load_default(size)


def _draw(
    root: Path, splits: dict[str, Split], shares: dict[str, Shares], samples: Sequence[tuple[str, Sample | str]]
) -> Image.Image:
    labels = LABEL_SETS[next(iter(splits.values())).label_set]
    columns = ["image", *shares]
    width = max(GAP + len(columns) * (CELL + GAP), 3 * (CELL + GAP))
    head = _heading(root, splits, shares, labels.classes, width)
    rows = [_row(split, sample, columns, labels.classes, width) for split, sample in samples]
    sheet = Image.new("RGB", (width, sum(part.height for part in (head, *rows))), PAPER)
    top = 0
    for part in (head, *rows):
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _heading(
    root: Path, splits: dict[str, Split], shares: dict[str, Shares], classes: dict[str, tuple[str, ...]], width: int
) -> Image.Image:
    """Draw the name, the coverage by task, and the shares of classes."""
    across = max(1, (width - GAP) // (CELL + GAP))
    heights = [-(-(len(classes[task]) + 1) // across) for task, one in shares.items() if one.pixels is not None]
    keys = sum(kind_of(task).has_axes for task in shares)
    height = GAP + 2 * LINE + (len(shares) + 1) * LINE + sum(LINE * (rows + 2) for rows in heights) + keys * LINE
    part = Image.new("RGB", (width, height + GAP), PAPER)
    pen = ImageDraw.Draw(part)
    counts = ", ".join(f"{len(split)} {name}" for name, split in splits.items())
    pen.text((GAP, GAP), f"{root.resolve().name}: {counts} images", INK, _font(TEXT + 4))
    top = GAP + 2 * LINE
    for task, one in shares.items():
        having, total = (sum(pair[place] for pair in one.counts.values()) for place in (0, 1))
        told = ", ".join(f"{split} {some} of {all_}" for split, (some, all_) in one.counts.items())
        pen.text((GAP, top), _cut(task, 14), INK, _font())
        _bar(pen, 120, top, CELL, having / max(1, total), BAR)
        pen.text(
            (130 + CELL, top), f"{100 * having / max(1, total):.0f} % of images have a label: {told}", INK, _font()
        )
        top += LINE
    top += LINE // 2
    for task, one in shares.items():
        if one.pixels is not None:
            top = _class_shares(pen, task, one, classes[task], across, top)
        if kind_of(task).has_axes:
            left = GAP
            pen.text((left, top), f"{task}: surfaces that face", INK, _font())
            left += 190
            for name, colour in KEY:
                pen.rectangle((left, top, left + TEXT, top + TEXT), colour, INK)
                pen.text((left + TEXT + 4, top), name, INK, _font())
                left += TEXT + 20 + round(pen.textlength(name, _font()))
            top += LINE
    return part


def _class_shares(pen: ImageDraw.ImageDraw, task: str, one: Shares, names: Sequence[str], across: int, top: int) -> int:
    """Draw a bar for each class, and for what is ignored; return where the next part begins."""
    assert one.pixels is not None
    total = max(1.0, float(one.pixels.sum()))
    pen.text((GAP, top), f"{task}: share of pixels in {one.labels} labels", INK, _font())
    top += LINE
    entries = [
        (name, one.pixels[index], colour)
        for index, (name, colour) in enumerate(zip(names, palette(names), strict=True))
    ]
    entries.append(("(ignored)", one.pixels[IGNORE], (224, 224, 192)))
    for place, (name, pixels, colour) in enumerate(entries):
        left, here = GAP + (place % across) * (CELL + GAP), top + (place // across) * LINE
        share = pixels / total
        pen.rectangle((left, here, left + TEXT, here + TEXT), colour, INK)
        text = f"{share * 100:.1f} %" if pixels else "none"
        pen.text((left + TEXT + 6, here), _cut(name.replace("_", " "), 15), INK, _font())
        _bar(pen, left + 140, here, 50, share / max(1e-9, float(one.pixels.max()) / total), BAR)
        pen.text((left + 196, here), text, INK if pixels else (190, 30, 30), _font(TEXT - 2))
    return top + (-(-len(entries) // across)) * LINE + LINE // 2


def _bar(pen: ImageDraw.ImageDraw, left: int, top: int, width: int, share: float, colour: tuple[int, int, int]) -> None:
    pen.rectangle((left, top + 2, left + width, top + TEXT), FAINT)
    if share > 0:
        pen.rectangle((left, top + 2, left + max(1, round(width * min(share, 1))), top + TEXT), colour)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _row(
    split: str, sample: Sample | str, columns: Sequence[str], classes: dict[str, tuple[str, ...]], width: int
) -> Image.Image:
    """Draw an image and its labels, each with a line below it."""
    if isinstance(sample, str):
        part = Image.new("RGB", (width, 2 * LINE), PAPER)
        ImageDraw.Draw(part).text((GAP, 0), _cut(sample, width // 8), (190, 30, 30), _font())
        return part
    rows, across = sample.image.shape[:2]
    height = max(40, round(CELL * rows / across))
    part = Image.new("RGB", (width, height + LINE + GAP), PAPER)
    pen = ImageDraw.Draw(part)
    for place, kind in enumerate(columns):
        left = GAP + place * (CELL + GAP)
        picture, words = _cell(sample, kind, classes)
        if picture is None:
            pen.rectangle((left, 0, left + CELL - 1, height - 1), FAINT)
            for start in range(-height, CELL, 16):
                pen.line(
                    [
                        (left + max(0, start), max(0, -start)),
                        (left + min(CELL, start + height), min(height, CELL - start)),
                    ],
                    PAPER,
                )
        else:
            how = Image.Resampling.NEAREST if kind != "image" else Image.Resampling.BILINEAR
            part.paste(Image.fromarray(picture).resize((CELL, height), how), (left, 0))
        pen.text(
            (left, height + 3), _cut(f"{split} {sample.id}" if kind == "image" else words, 34), INK, _font(TEXT - 1)
        )
    return part


def _cell(sample: Sample, kind: str, classes: dict[str, tuple[str, ...]]) -> tuple[NDArray[np.uint8] | None, str]:
    """Return the picture of an image or label, None where there is none, and words below it."""
    if kind == "image":
        return sample.image, ""
    if kind in sample.unlabelled:
        return None, f"{kind}: {'cannot be read' if sample.unlabelled[kind] else 'not labelled'}"
    label, how = sample.labels[kind], kind_of(kind)
    limits = how.limits(label)
    picture = how.paint(how.drawable(label), palette(classes[kind]) if kind in classes else (), limits)
    if limits:
        return picture, f"{kind}: {limits[0]:.3g} to {limits[1]:.3g} {TASKS[kind].value_unit}"
    if kind in classes:
        largest = np.bincount(label[label != IGNORE].ravel(), minlength=1).argsort()[::-1][:2]
        return picture, f"{kind}: " + ", ".join(classes[kind][index].replace("_", " ") for index in largest)
    return picture, kind
