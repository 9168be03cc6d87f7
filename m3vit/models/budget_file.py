"""Budget files: what `m3vit search` found and `--budget FILE` takes. No torch.

JSON with a digest: {"format": 1, "budget": Budget.to_json(), "search": how it was found and what it costs}.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3vit.digests import read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.models.budget import Budget

FORMAT = 1
BUDGETS = "budgets"  # of a run: a folder for each budget that it was evaluated with
WHAT = "a budget file, which m3vit search writes: search again"


def write_budget(path: Path, budget: Budget, search: Mapping[str, Any]) -> None:
    """Write a budget and what is known of it, atomically."""
    write_sealed_json(path, {"format": FORMAT, "budget": budget.to_json(), "search": dict(search)})


def read_budget(path: Path) -> Budget:
    """Return the budget of a file. Raises InputError for anything else; the model says whether it can keep to it."""
    found = read_sealed_json(path, WHAT)
    if found.get("format") != FORMAT or "budget" not in found:
        raise InputError(f"{path} is not {WHAT}")
    return Budget.from_json(found["budget"])
