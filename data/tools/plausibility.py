"""What labels look like: figures of each one, statistics of a data set, and what no good labels look like. No torch.

The readers refuse impossible values. What is possible in one image but not in all of them (nothing labelled, one class
everywhere, depths of another unit) is told here, from the share of a split's images that are so.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.label_sets import LABEL_SETS
from m3vit.tasks import IGNORE

SAME_DEPTH_M, SAME_NORMAL = 1e-3, 1e-3  # closer than that is one value; sensors and 8-bit codes spread more
# 95 % of an indoor image's depths are below some value between these. NYU's Kinect measures 0.7 to 10 m; tenths of
# metres, tens of metres, depths divided by their maximum, and most inverse depths are outside.
NEAREST_M, FARTHEST_M = 1.0, 15.0
REACH_PERCENT = 95
EXAMPLES = 3

# Shares of a split's images up to which a finding is no warning; 0 where not named. A split of which every image is so
# gets one in any case.
TOLERATED = {
    ("blank", "human_parts"): 1.0,  # images without a person: many in PASCAL-Context
    ("blank", "pascal normals"): 0.5,  # only some classes have them: none in a sky with an aeroplane
    ("constant", "semseg"): 0.05,  # close-ups
    ("constant", "human_parts"): 0.05,
    ("constant", "normals"): 0.05,  # one wall
    ("constant", "saliency"): 0.25,  # nothing stands out
    ("constant", "edge"): 0.05,
    ("unit", "depth"): 0.01,
}


@dataclass(frozen=True)
class Look:
    """Figures of one label: what statistics and warnings are made from.

    `valid_share` is that of pixels that are neither ignored nor invalid; `value` is what all of these have in common,
    or None. `pixels` counts ids 0..255 (semseg, human_parts); `max_m`, `reach_m` are of depth: the greatest, and that
    which REACH_PERCENT of the valid ones do not exceed (metres, 0 if none is valid).
    """

    valid_share: float
    value: float | tuple[float, ...] | None
    positive_share: float = 0.0
    pixels: NDArray[np.int64] | None = None
    max_m: float = 0.0
    reach_m: float = 0.0


def look(task: str, label: NDArray) -> Look:
    """Return the figures of a label as loaders return it (m3vit.tasks)."""
    if task == "depth":
        valid = label[label > 0]
        if not valid.size:
            return Look(0.0, None)
        reach = float(np.percentile(valid, REACH_PERCENT))
        one = valid.max() - valid.min() <= SAME_DEPTH_M
        return Look(valid.size / label.size, float(valid[0]) if one else None, max_m=float(valid.max()), reach_m=reach)
    if task == "normals":
        has = label.any(axis=-1)
        share = float(has.mean())
        # One axis after the other: the first tells nearly always.
        one = share > 0 and all(np.ptp(label[..., axis][has]) <= SAME_NORMAL for axis in range(3))
        return Look(share, tuple(round(float(part), 3) for part in label[has][0]) if one else None)
    pixels = np.bincount(label.ravel(), minlength=256)
    ids = np.flatnonzero(pixels[:IGNORE])
    return Look(
        valid_share=float(1 - pixels[IGNORE] / label.size),
        value=float(ids[0]) if len(ids) == 1 else None,
        positive_share=float(pixels[1] / label.size),
        pixels=pixels,
    )


def statistics(task: str, label_set: str, looks: Sequence[Look]) -> dict[str, Any]:
    """Return figures over the labels of a task; shares are means over images, but over pixels for classes."""
    result: dict[str, Any] = {
        "images": len(looks),
        "blank_images": sum(not one.valid_share for one in looks),
        "constant_images": sum(one.value is not None for one in looks),
    }
    if task in LABEL_SETS[label_set].classes:
        pixels = np.sum([one.pixels for one in looks if one.pixels is not None], axis=0)
        classes = LABEL_SETS[label_set].classes[task]
        result |= {
            "ids_present": [index for index in range(len(classes)) if pixels[index]],
            "ids_absent": [index for index in range(len(classes)) if not pixels[index]],
            "ignored_share": float(pixels[IGNORE] / pixels.sum()),
            "pixel_shares": {name: float(pixels[i] / pixels.sum()) for i, name in enumerate(classes)},
        }
        if task == "human_parts":
            result["images_without_person"] = result["blank_images"]
    elif task in ("depth", "normals"):
        result["invalid_share"] = float(np.mean([1 - one.valid_share for one in looks]))
        if task == "depth":
            result["max_m"] = max(one.max_m for one in looks)
            result["reach_m"] = float(np.median([one.reach_m for one in looks if one.valid_share] or [0]))
    else:
        result["positive_share"] = float(np.mean([one.positive_share for one in looks]))
    return result


def oddities(task: str, label_set: str, ids: Sequence[str], looks: Sequence[Look]) -> list[tuple[str, str]]:
    """Return what is odd about the labels of a task in one split: kind of finding and figures, in words.

    Kinds: "blank", no label at any pixel; "constant", one value everywhere; "unit", depths that are hardly metres.
    """
    found = []
    tests: dict[str, Callable[[Look], bool]] = {
        "blank": lambda one: not one.valid_share,
        "constant": lambda one: one.value is not None,
    }
    if task == "depth":
        tests["unit"] = lambda one: one.valid_share > 0 and not NEAREST_M < one.reach_m <= FARTHEST_M
    for kind, test in tests.items():
        odd = [index for index, one in enumerate(looks) if test(one)]
        key = f"{label_set} {task}" if (kind, f"{label_set} {task}") in TOLERATED else task
        if not odd or (len(odd) < len(looks) and len(odd) / len(looks) <= TOLERATED.get((kind, key), 0)):
            continue
        words = _words(kind, task, label_set, [looks[index] for index in odd])
        examples = ", ".join(ids[index] for index in odd[:EXAMPLES])
        share = 100 * len(odd) / len(looks)
        found.append((kind, f"{len(odd)} of {len(looks)} images ({share:.1f} %){words}, such as {examples}"))
    return found


def _words(kind: str, task: str, label_set: str, odd: Sequence[Look]) -> str:
    """Return the values found, to follow the number of images."""
    if kind == "blank":
        return ""
    if kind == "unit":
        reaches = [one.reach_m for one in odd]
        return (
            f" have {REACH_PERCENT} % of their depths below {np.median(reaches):.3g} (median; {min(reaches):.3g} to "
            f"{max(reaches):.3g}), where metres of a room give {NEAREST_M:g} to {FARTHEST_M:g}"
        )
    images: dict[Any, int] = defaultdict(int)
    for one in odd:
        images[one.value] += 1
    common = sorted(images, key=lambda value: -images[value])[:EXAMPLES]
    shown = ", ".join(f"{_value(task, label_set, value)} in {images[value]}" for value in common)
    return f" have one value: {shown}{', ...' if len(images) > EXAMPLES else ''}"


def _value(task: str, label_set: str, value: Any) -> str:
    if task in LABEL_SETS[label_set].classes:
        return LABEL_SETS[label_set].classes[task][int(value)]
    if task == "depth":
        return f"{value:.3g} m"
    return f"({', '.join(f'{part:.3g}' for part in value)})" if task == "normals" else f"{value:g}"
