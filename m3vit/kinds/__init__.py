"""The kinds of dense prediction: everything that differs between them, a class each (m3vit.kinds.kind.Kind).

A kind is known by the name that manifests store. Importing it imports no torch.
"""

from m3vit.errors import InputError
from m3vit.kinds.classes import Classes
from m3vit.kinds.directions import Directions
from m3vit.kinds.distance import Distance
from m3vit.kinds.kind import IGNORE as IGNORE
from m3vit.kinds.kind import REQUIRED, Kind
from m3vit.kinds.kind import Look as Look
from m3vit.kinds.kind import as_json as as_json
from m3vit.kinds.probability import Probability
from m3vit.values import check_values

KINDS: dict[str, Kind] = {}


def add_kind(kind: Kind) -> None:
    """Make a kind known, or raise InputError for one that lacks a part or whose name is taken."""
    if not isinstance(kind, Kind):
        raise InputError(f"{kind!r} is no kind: derive one from m3vit.kinds.Kind, and add an instance of it")
    if not isinstance(kind.name, str) or not kind.name.isidentifier():
        raise InputError(f"{type(kind).__name__} has the name {kind.name!r}: give one of letters, digits and _")
    missing = [part for part in REQUIRED if getattr(type(kind), part) is getattr(Kind, part)]
    if missing:
        raise InputError(f"kind {kind.name} ({type(kind).__name__}) lacks {', '.join(missing)}: define them")
    check_values(f"kind {kind.name}", kind)
    if kind.channels is not None and kind.channels < 1:
        raise InputError(f"kind {kind.name} has {kind.channels} channels: give 1 or more, or None for a task's classes")
    if kind.name in KINDS:
        raise InputError(f"kind {kind.name} is there already ({type(KINDS[kind.name]).__name__}): choose another name")
    KINDS[kind.name] = kind


for _kind in (Classes(), Distance(), Directions(), Probability()):
    add_kind(_kind)
