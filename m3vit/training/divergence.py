"""What stops a training that diverged, before it overwrites what is good."""

import math
from pathlib import Path

from m3vit.errors import InputError
from m3vit.models.multitask import MultiTaskModel
from m3vit.training.sharding import largest_values


def check_finite(values: dict[str, float], step: int, out: Path) -> None:
    """Stop a diverged run before it overwrites its last good checkpoint."""
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        kept = "The last checkpoint is kept" if (out / "last" / "state.pt").exists() else "There is no checkpoint yet"
        raise InputError(
            f"training diverged at step {step}: {', '.join(broken)} not finite. {kept} in {out}; start again with a "
            "lower --train.lr or with --train.grad_clip",
            everywhere=True,
        )


def check_weights(model: MultiTaskModel, step: int, out: Path) -> None:
    """Stop before weights that are not finite are written or evaluated."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    largest = largest_values(parameters).tolist()
    check_finite(dict(zip(names, largest, strict=True)), step, out)
