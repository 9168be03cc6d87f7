"""What labels look like: figures of each one, statistics of a data set, and what no good labels look like. No torch.

The readers refuse impossible values. What is possible in one image but not in all of them (nothing labelled, one class
everywhere, depths of another unit) is told here, from the share of a split's images that are so.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.kinds.distance import REACH_PERCENT as REACH_PERCENT
from m3vit.kinds.kind import Look as Look
from m3vit.label_sets import LABEL_SETS
from m3vit.tasks import TASKS, kind_of

EXAMPLES = 3
CLASSES = 6  # named of those without training labels


def look(task: str, label: NDArray) -> Look:
    """Return the figures of a label as loaders return it (m3vit.tasks)."""
    return kind_of(task).look(label)


def statistics(task: str, label_set: str, looks: Sequence[Look]) -> dict[str, Any]:
    """Return figures over the labels of a task; shares are means over images, but over pixels for classes."""
    result: dict[str, Any] = {
        "images": len(looks),
        "blank_images": sum(not one.valid_share for one in looks),
        "constant_images": sum(one.value is not None for one in looks),
    }
    row = TASKS[task]
    result |= kind_of(task).statistics(looks, LABEL_SETS[label_set].classes.get(task, ()))
    if row.blanks_named:
        result[row.blanks_named] = result["blank_images"]
    return result


def oddities(task: str, label_set: str, ids: Sequence[str], looks: Sequence[Look]) -> list[tuple[str, str]]:
    """Return what is odd about the labels of a task in one split: kind of finding and figures, in words.

    Kinds: "blank", no label at any pixel; "constant", one value everywhere; "unit", depths that are hardly metres.
    """
    found, reach = [], _reach(task, label_set)
    # A split of which every image is so is told in any case.
    tolerated = {**TASKS[task].tolerated, **LABEL_SETS[label_set].tolerated.get(task, {})}
    tests: dict[str, Callable[[Look], bool]] = {
        "blank": lambda one: not one.valid_share,
        "constant": lambda one: one.value is not None,
    }
    if reach:
        tests["unit"] = lambda one: one.valid_share > 0 and not reach[0] < one.reach_m <= reach[1]
    for kind, test in tests.items():
        odd = [index for index, one in enumerate(looks) if test(one)]
        if not odd or (len(odd) < len(looks) and len(odd) / len(looks) <= tolerated.get(kind, 0)):
            continue
        words = _words(kind, task, label_set, [looks[index] for index in odd])
        examples = ", ".join(ids[index] for index in odd[:EXAMPLES])
        share = 100 * len(odd) / len(looks)
        found.append((kind, f"{len(odd)} of {len(looks)} images ({share:.1f} %){words}, such as {examples}"))
    return found


def untrained(task: str, label_set: str, train: Sequence[Look], val: Sequence[Look]) -> str:
    """Return, in words, the classes of a task that the labels of val have and those of train lack; empty if none."""
    names = LABEL_SETS[label_set].classes.get(task, ())
    trained, wanted = (
        sum((one.pixels for one in looks if one.pixels is not None), np.zeros(256, np.int64))[: len(names)]
        for looks in (train, val)
    )
    missing = [place for place in range(len(names)) if wanted[place] and not trained[place]]
    missing.sort(key=lambda place: -wanted[place])
    words = [f"{names[place]} ({100 * wanted[place] / wanted.sum():.2g} %)" for place in missing[:CLASSES]]
    return ", ".join(words) + (f" and {len(missing) - CLASSES} more" if len(missing) > CLASSES else "")


def _reach(task: str, label_set: str) -> tuple[float, float, str] | None:
    return LABEL_SETS[label_set].reach.get(task, TASKS[task].reach)


def _words(kind: str, task: str, label_set: str, odd: Sequence[Look]) -> str:
    """Return the values found, to follow the number of images."""
    if kind == "blank":
        return ""
    if kind == "unit":
        reaches, expected = [one.reach_m for one in odd], _reach(task, label_set)
        assert expected is not None
        return (
            f" have {REACH_PERCENT} % of their depths below {np.median(reaches):.3g} (median; {min(reaches):.3g} to "
            f"{max(reaches):.3g}), where {expected[2]} give {expected[0]:g} to {expected[1]:g}"
        )
    images: dict[Any, int] = defaultdict(int)
    for one in odd:
        images[one.value] += 1
    common = sorted(images, key=lambda value: -images[value])[:EXAMPLES]
    classes, row = LABEL_SETS[label_set].classes.get(task, ()), TASKS[task]
    shown = ", ".join(f"{kind_of(task).says(value, classes, row)} in {images[value]}" for value in common)
    return f" have one value: {shown}{', ...' if len(images) > EXAMPLES else ''}"
