"""Budget files: what `m3vit search` found and `--budget FILE` takes. No torch.

JSON with a digest: {"format": 1, "budget": Budget.to_json(), "search": how it was found and what it costs}.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3vit.digests import read_sealed_json, write_sealed_json
from m3vit.errors import InputError
from m3vit.models.budget import FULL, Budget

FORMAT = 1
WHOLE = "full"  # instead of a file: the model as trained
BUDGETS = "budgets"  # of a run or an export: a folder for each budget that it was evaluated with
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


def read_searches(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return what searches said of budgets, by the names of `read_budgets`; empty where nothing was said."""
    return {path.stem: read_sealed_json(path, WHAT).get("search", {}) for path in paths}


def read_budgets(given: Sequence[str]) -> dict[str, Budget]:
    """Return the budgets of several files, by the files' names without ending; WHOLE is the model as trained.

    Raises InputError for names that come twice, and what `read_budget` raises.
    """
    names = [WHOLE if one == WHOLE else Path(one).stem for one in given]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--budget names {twice[0]} twice: give each budget a file of its own name")
    return {name: FULL if one == WHOLE else read_budget(Path(one)) for name, one in zip(names, given, strict=True)}
