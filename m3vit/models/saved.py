"""Weights as a run folder has them: model.safetensors, and model.json beside it, which holds the digest of both."""

import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from m3vit.digests import changed, read_sealed_json
from m3vit.errors import InputError, first_line
from m3vit.files import sha256_file
from m3vit.models.finite import not_finite

WEIGHTS, INFO = "model.safetensors", "model.json"
_ADVICE = (
    "a run killed while it saved is mended by m3vit train with --resume; else put the file back from a copy, take the "
    "run's best/, or train again"
)


def read_info(weights: Path) -> dict[str, Any]:
    """Return the model.json beside a run's weights, "weights_sha256" among it; both files are as they were written.

    Raises InputError if not. Of weights saved without a digest "weights_sha256" is that of the file as it is now.
    """
    info = read_sealed_json(weights.with_name(INFO), f"part of a run folder, beside {WEIGHTS}; {_ADVICE}")
    digest = sha256_file(weights)
    if info.setdefault("weights_sha256", digest) != digest:
        raise changed(weights, _ADVICE)
    return info


def current_names(state: dict[str, Any]) -> dict[str, Any]:
    """Return a model's weights, or their average's, under the names of now; some of older runs have others."""
    return {re.sub(r"^(module\.)?distillation\.", r"\1heads.training_only.", name): state[name] for name in state}


def read_saved(weights: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a run's weights and its model.json; raise InputError if they are damaged, or not finite numbers."""
    written = _identity(weights)
    try:
        state = current_names(load_file(weights))
    except Exception as error:  # safetensors raises many kinds for damaged files
        raise InputError(f"{weights} cannot be loaded ({first_line(error)}), it is damaged: {_ADVICE}") from None
    info = read_info(weights)
    if _identity(weights) != written:
        raise InputError(f"{weights} was replaced while it was read: try again")
    if broken := not_finite(state):
        raise InputError(
            f"{weights} holds {broken}: training diverged; take the run's best/, or train again with a lower "
            "--train.lr or with --train.grad_clip"
        )
    return state, info


def _identity(path: Path) -> tuple[int, int, int]:
    """Return what is another once a file was replaced or written to."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
