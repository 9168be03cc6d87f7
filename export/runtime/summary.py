"""Figures that sum up a prediction: what is in the picture, how far, which way it faces. numpy only."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.export.runtime.drawing import NORMALS_KEY, class_names

BINS = 20  # of histograms
_DIRECTIONS = np.array([(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1)], np.float32)  # as NORMALS_KEY


def summarise(prediction: NDArray[Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Return figures about a prediction of `Package.predict`, as JSON values; `entry`: the manifest's of the task.

    argmax: `classes`, the largest first, with pixels and share. identity: `valid_share`, and of the valid (positive)
    depths `min`, `p5`, `median`, `mean`, `p95`, `max` and `histogram`. unit_vector: `mean` vector and `facing`, the
    share of pixels by the direction nearest to theirs. sigmoid: `mean`, `max`, `share_above_half` and `histogram`.
    Values of nothing are null.
    """
    kind = entry["decode"]
    if kind == "argmax":
        return {"classes": _classes(prediction, entry)}
    if kind == "unit_vector":
        nearest = (prediction.reshape(-1, 3) @ _DIRECTIONS.T).argmax(axis=1)
        shares = np.bincount(nearest, minlength=len(_DIRECTIONS)) / len(nearest)
        facing = {name: _rounded(share) for (name, _), share in zip(NORMALS_KEY, shares, strict=True)}
        return {"mean": [_rounded(value) for value in prediction.reshape(-1, 3).mean(axis=0)], "facing": facing}
    if kind == "sigmoid":
        return {
            "mean": _rounded(prediction.mean()),
            "max": _rounded(prediction.max()),
            "share_above_half": _rounded((prediction > 0.5).mean()),
            "histogram": _histogram(prediction, 0, 1),
        }
    valid = prediction[np.isfinite(prediction) & (prediction > 0)]
    names = ("min", "p5", "median", "p95", "max")
    values = np.percentile(valid, (0, 5, 50, 95, 100)) if valid.size else (None,) * len(names)
    return {
        "unit": entry.get("unit", "m"),
        "valid_share": _rounded(valid.size / prediction.size),
        **{name: _rounded(value) for name, value in zip(names, values, strict=True)},
        "mean": _rounded(valid.mean(dtype=np.float64)) if valid.size else None,
        "histogram": _histogram(valid, valid.min(), valid.max()) if valid.size else None,
    }


def _classes(ids: NDArray[np.uint8], entry: dict[str, Any]) -> list[dict[str, Any]]:
    counts, names, colours = np.bincount(ids.ravel(), minlength=256), class_names(entry), entry["palette"]
    return [
        {
            "id": int(index),
            "name": names[index] if index < len(names) else f"class {index}",
            "colour": list(colours[index]) if index < len(colours) else [0, 0, 0],
            "pixels": int(counts[index]),
            "share": _rounded(counts[index] / ids.size),
        }
        for index in np.argsort(-counts, kind="stable")
        if counts[index]
    ]


def _histogram(values: NDArray[np.float32], low: float, high: float) -> dict[str, Any]:
    counts, edges = np.histogram(values, BINS, (float(low), float(high)))
    return {"edges": [_rounded(edge) for edge in edges], "counts": [int(count) for count in counts]}


def _rounded(value: Any) -> float | None:
    """Six significant digits, as many as float32 holds; null for nothing and for what is not finite."""
    return float(f"{float(value):.6g}") if value is not None and np.isfinite(value) else None
