"""Figures that sum up a prediction: what is in the picture, how far, which way it faces. numpy only."""

from typing import Any

from numpy.typing import NDArray

from m3vit.kinds import KINDS, as_json


def summarise(prediction: NDArray[Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Return figures about a prediction of `Package.predict`, as JSON values; `entry`: the manifest's of the task.

    Which they are is the kind's to say (`Kind.summary`). Values of nothing are null.
    """
    figures: dict[str, Any] = as_json(KINDS[entry["decode"]].summary(prediction, entry))
    return figures
