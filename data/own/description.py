"""data.yaml: what lies in a folder of somebody's own data (docs/own-data.md has its keys). No torch.

It is read whole: whatever is wrong with it is one list, each with its line and key.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from json import dumps
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from m3vit.data.own.patterns import pattern_problem
from m3vit.errors import InputError, one_line, short
from m3vit.files import read_text
from m3vit.label_sets import MOST_DIST, VERSION, LabelSet, declare
from m3vit.normalisation import LIMITS, Normalisation
from m3vit.tasks import IGNORE, TASKS

FILE = "data.yaml"
MAX_BYTES = 1 << 20
MOST_ID = (1 << 16) - 1  # of masks: what 16 bits hold
MOST_CLASSES = 254
MOST_PROBLEMS = 20  # that one error names

KINDS = {"classes": "argmax", "depth": "identity", "normals": "unit_vector", "probability": "sigmoid"}
UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
AXES = ("right left", "up down", "towards away")  # one word of each pair, in any order
KEYS = ("name", "root", "images", "tasks", "splits", "unlabelled", "mean", "std")
TASK_KEYS = {
    "classes": ("classes", "ignore", "remap", "segments"),
    "depth": ("unit", "invalid", "farthest"),
    "normals": ("axes",),
    "probability": ("ignore", "max_dist"),
}
UNLABELLED = ("refuse", "leave_out")
EDGE_MAX_DIST = 0.0075  # of odsF, a share of the diagonal: BSDS's and PASCAL's
REACH = (0.1, 300.0, "metres of a scene")  # m3vit.tasks.Task.reach, where depths are of anything

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class TaskFiles:
    """One task of data.yaml: which files its labels are, and what is stored in them.

    ids: by the stored id, the class's place or IGNORE. metres: of one stored step; invalid: stored values; farthest:
    depths beyond it, in metres, are not labelled (None: they are refused). axes: what the three stored components point
    to. segments: COCO panoptic JSON files that say which class a segment is of.
    """

    name: str
    kind: str
    patterns: tuple[str, ...]
    classes: tuple[str, ...] = ()
    ids: Mapping[int, int] = field(default_factory=dict)
    segments: tuple[str, ...] = ()
    metres: float = 1.0
    invalid: tuple[float, ...] = (0.0,)
    farthest: float | None = None
    axes: tuple[str, ...] = ("right", "up", "towards")
    ignore: tuple[int, ...] = ()
    max_dist: float = EDGE_MAX_DIST


@dataclass(frozen=True)
class Splits:
    """How images are divided: by split, a share of them, a list file, a pattern of ids, or "rest".

    `groups` is a pattern of ids with {group}: images of one group stay together. `seed` draws shares.
    """

    parts: Mapping[str, float | str]
    seed: int = 0
    groups: str = ""


@dataclass(frozen=True)
class Description:
    """A data.yaml without problems: the folder that it is in, and `root`, where the files are (the same, mostly).

    `unlabelled` says what becomes of images without any label.
    """

    folder: Path
    root: Path
    name: str
    images: tuple[str, ...]
    tasks: Mapping[str, TaskFiles]
    splits: Splits
    unlabelled: str
    normalisation: Normalisation | None

    def label_set(self) -> str:
        """Make the classes and tasks known (m3vit.label_sets), and return the name of their label set.

        It ends with a digest: a data.yaml whose classes were changed describes another one.
        """
        classes = {name: task.classes for name, task in self.tasks.items() if task.classes}
        edges = [task.max_dist for name, task in self.tasks.items() if name == "edge"]
        depths = {name: REACH for name, task in self.tasks.items() if task.kind == "depth"}
        labels = LabelSet("", tuple(self.tasks), classes, edges[0] if edges else 0.0, reach=depths)
        rows = {name: _row(task) for name, task in self.tasks.items() if name not in TASKS}
        parts = asdict(labels)
        parts["name"] = f"{self.name}-{zlib.crc32(dumps([parts, rows]).encode()):08x}"
        return declare(
            {"version": VERSION, "label_set": parts, "tasks": rows}, str(self.folder / FILE), tuple(self.tasks)
        )


def _row(task: TaskFiles) -> dict[str, Any]:
    """Return the row of a task that the task table lacks, as `m3vit.label_sets.describe` has it."""
    metric, unit, better, weight = {
        "classes": ("mIoU", "%", True, 1.0),
        "depth": ("rmse", "m", False, 1.0),
        "normals": ("mErr", "deg", False, 10.0),
    }[task.kind]
    row = {"name": task.name, "kind": KINDS[task.kind], "metric": metric, "unit": unit, "higher_is_better": better}
    row |= {"weight": weight, "code": [], "value_unit": "m" if task.kind == "depth" else ""}
    return row


class Problem(NamedTuple):
    """Something wrong in data.yaml: where, and what."""

    line: int
    words: str


class _Notes:
    """The problems found so far, and the lines of the keys."""

    def __init__(self) -> None:
        self.lines: dict[Key, int] = {}
        self.problems: list[Problem] = []

    def add(self, key: Key, words: str) -> None:
        """Note a problem of a key, in the words that follow its name."""
        known = next(key[:end] for end in range(len(key), -1, -1) if key[:end] in self.lines or not end)
        dotted = ".".join(str(part) for part in key)
        self.problems.append(Problem(self.lines.get(known, 1), f"{dotted} {words}".strip()))


def open_description(root: Path) -> Description:
    """Return what data.yaml of a folder says, or raise InputError with everything that is wrong with it."""
    description, problems = read_description(root)
    if description is None:
        found = "; ".join(f"line {line}: {words}" for line, words in problems[:MOST_PROBLEMS])
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise InputError(f"{root / FILE} has {count}: {found}{more}; docs/own-data.md has its keys")
    return description


def read_description(root: Path) -> tuple[Description | None, list[Problem]]:
    """Return what data.yaml of a folder says, or None and what is wrong with it; InputError if it cannot be read."""
    text = read_text(root / FILE, f"m3vit data init {root} writes one, in UTF-8", MAX_BYTES)
    notes = _Notes()
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        values = _plain(node, (), notes, loader, set()) if node is not None else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        return None, [Problem(mark.line + 1 if mark else 1, f"is not YAML ({one_line(error, 200)})")]
    if not isinstance(values, dict):
        return None, [Problem(1, "holds no mapping of " + ", ".join(KEYS))]
    found = _describe(root, values, notes)
    problems = sorted(notes.problems)
    return (None if problems else found), problems


def _plain(node: yaml.Node, key: Key, notes: _Notes, loader: yaml.SafeLoader, seen: set[int]) -> Any:
    """Return a node's value, and note the lines of all keys in it."""
    notes.lines.setdefault(key, node.start_mark.line + 1)
    if id(node) in seen:
        notes.add(key, "is an alias: write it out")
        return None
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*key, place), notes, loader, seen) for place, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)  # type: ignore[no-untyped-call]
    found: dict[Any, Any] = {}
    for name_node, value_node in node.value:
        scalar = isinstance(name_node, yaml.ScalarNode)
        name: Any = loader.construct_object(name_node) if scalar else None  # type: ignore[no-untyped-call]
        if type(name) not in (str, int):
            line = name_node.start_mark.line + 1
            notes.add(key, f"has the key {short(getattr(name_node, 'value', '?'))} (line {line}): quote it")
            continue
        if name in found:
            notes.add((*key, name), f"is given twice (line {name_node.start_mark.line + 1} too)")
        notes.lines.setdefault((*key, name), name_node.start_mark.line + 1)
        found[name] = _plain(value_node, (*key, name), notes, loader, seen)
    return found


def _describe(root: Path, values: dict[str, Any], notes: _Notes) -> Description:
    _only(values, KEYS, (), notes)
    for key in ("images", "tasks", "splits"):
        if key not in values:
            notes.add((), f"{key} is missing: give it")
        elif values[key] in (None, "", [], {}):
            notes.add((key,), "says nothing: fill it in")
    elsewhere = values.get("root", ".")
    files = root / str(elsewhere)
    if not isinstance(elsewhere, str) or not files.is_dir():
        notes.add(("root",), f"is {short(elsewhere)}: give the folder that the files are in, or leave it out")
    name = values.get("name", re.sub(r"[^\w-]+", "-", root.resolve().name).strip("-") or "own")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,80}", name):
        notes.add(("name",), f"is {short(name)}: give a word of letters, digits, - and _")
    given = values.get("tasks") or {}
    tasks = {}
    if not isinstance(given, dict):
        notes.add(("tasks",), f"is {short(given)}: give a mapping of tasks")
    else:
        for task, entry in given.items():
            if (found := _task(task, entry, notes)) is not None:
                tasks[found.name] = replace(found, segments=tuple(str(files / one) for one in found.segments))
    unlabelled = values.get("unlabelled", "refuse")
    if unlabelled not in UNLABELLED:
        notes.add(("unlabelled",), f"is {short(unlabelled)}: choose from {', '.join(UNLABELLED)}")
    images = _patterns(values["images"], ("images",), notes) if values.get("images") else ()
    splits = _splits(values.get("splits") or {}, notes)
    return Description(root, files, str(name), images, tasks, splits, str(unlabelled), _normalisation(values, notes))


def _only(values: Mapping[Any, Any], keys: Sequence[str], key: Key, notes: _Notes) -> None:
    """Note the keys that are not among `keys`, each with the nearest that is."""
    for name in values:
        if name in keys:
            continue
        near = get_close_matches(str(name), keys, 1, 0.5)
        advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(keys)}"
        notes.add((*key, name), f"is no key here: {advice}")


def _task(name: Any, entry: Any, notes: _Notes) -> TaskFiles | None:
    key: Key = ("tasks", name)
    if not isinstance(name, str) or not name.isidentifier():
        notes.add(key, "is no task's name: give one of letters, digits and _")
        return None
    if not isinstance(entry, dict):
        notes.add(key, f"is {short(entry)}: give a mapping with kind and files")
        return None
    own = next((word for word, kind in KINDS.items() if name in TASKS and TASKS[name].kind == kind), "")
    kind = entry.get("kind", own)
    if kind not in KINDS:
        near = get_close_matches(str(kind), KINDS, 1, 0.5)
        advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(KINDS)}"
        notes.add((*key, "kind"), f"is {short(kind)}: {advice}" if kind else f"is missing: {advice}")
        return None
    if name in TASKS and kind != own:
        known = own or TASKS[name].kind
        notes.add((*key, "kind"), f"is {kind}, and a task called {name} is of {known}: give the task another name")
    if name not in TASKS and kind == "probability":
        able = ", ".join(task.name for task in TASKS.values() if task.kind == KINDS[kind])
        notes.add(key, f"is of probability, which is scored by what it is of: call it one of {able}")
    own_keys = TASK_KEYS[kind] if name == "edge" else tuple(one for one in TASK_KEYS[kind] if one != "max_dist")
    _only(entry, ("kind", "files", *own_keys), key, notes)
    if "files" not in entry:
        notes.add(key, "lacks files: give a pattern such as masks/{id}.png")
    values: dict[str, Any] = {"patterns": _patterns(entry["files"], (*key, "files"), notes) if "files" in entry else ()}
    values |= {"classes": _classes, "depth": _depth, "normals": _normals, "probability": _probability}[kind](
        entry, key, notes
    )
    return TaskFiles(name, kind, **values)


def _patterns(value: Any, key: Key, notes: _Notes) -> tuple[str, ...]:
    patterns = value if isinstance(value, list) else [value]
    for pattern in patterns:
        if problem := pattern_problem(pattern):
            notes.add(key, f"is {short(pattern)}: {problem}")
    return tuple(str(pattern) for pattern in patterns)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_ID


def _id_list(entry: dict[str, Any], name: str, key: Key, notes: _Notes) -> tuple[int, ...]:
    given = entry.get(name, [])
    given = given if isinstance(given, list) else [given]
    if wrong := [one for one in given if not _is_id(one)]:
        notes.add((*key, name), f"has {short(wrong[0])}: give whole numbers of 0 to {MOST_ID}")
    return tuple(one for one in given if _is_id(one))


def _classes(entry: dict[str, Any], key: Key, notes: _Notes) -> dict[str, Any]:
    given, where = entry.get("classes"), (*key, "classes")
    if given is None:
        notes.add(key, "lacks classes: give a list of names, of ids 0, 1, ..., or a mapping of ids to names")
        return {}
    named: dict[int, str] = dict(enumerate(given)) if isinstance(given, list) else given
    if not isinstance(named, dict):
        notes.add(where, f"is {short(given)}: give a list of names, or a mapping of ids to names")
        return {}
    for stored, name in named.items():
        if not _is_id(stored):
            notes.add((*where, stored), f"is no id: give whole numbers of 0 to {MOST_ID}, as in 7: road")
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            notes.add(
                (*where, stored), f"is {short(name)}: give a name, in quotes if it is a number or yes, no, on, off"
            )
    if isinstance(given, list):
        for name in {str(name) for name in given if given.count(name) > 1}:
            notes.add(where, f"names {name} twice: give ids to names, as in 3: {name}, to make several ids one class")
    names = tuple(dict.fromkeys(str(name) for name in named.values()))  # several ids of one name are one class
    if not 2 <= len(names) <= MOST_CLASSES:
        notes.add(where, f"has {len(names)} names: give 2 to {MOST_CLASSES}")
    ids = {stored: names.index(str(name)) for stored, name in named.items() if _is_id(stored)}
    remapped = entry.get("remap") or {}
    if not isinstance(remapped, dict):
        notes.add((*key, "remap"), f"is {short(remapped)}: give a mapping of stored ids to ids or names of classes")
        remapped = {}
    for stored, to in remapped.items():
        at = (*key, "remap", stored)
        if not _is_id(stored):
            notes.add(at, f"is no id: give whole numbers of 0 to {MOST_ID}")
        elif stored in named:
            notes.add(at, f"is an id of classes too ({named[stored]}): give it in one of them")
        elif isinstance(to, str) and to in names:
            ids[stored] = names.index(to)
        elif _is_id(to) and to in named:
            ids[stored] = names.index(str(named[to]))
        else:
            near = get_close_matches(str(to), names, 1, 0.5)
            notes.add(at, f"is {short(to)}, which is no class: {f'did you mean {near[0]}?' if near else 'name one'}")
    for stored in _id_list(entry, "ignore", key, notes):
        if stored in ids:
            notes.add((*key, "ignore"), f"has {stored}, which is {names[ids[stored]]} above: give it in one of them")
        ids[stored] = IGNORE
    segments = entry.get("segments", [])
    segments = segments if isinstance(segments, list) else [segments]
    if wrong := [one for one in segments if not isinstance(one, str) or one.startswith("/") or ".." in one]:
        notes.add((*key, "segments"), f"has {short(wrong[0])}: name COCO panoptic JSON files in the folder")
    return {"classes": names, "ids": ids, "segments": tuple(map(str, segments))}


def _depth(entry: dict[str, Any], key: Key, notes: _Notes) -> dict[str, Any]:
    unit = entry.get("unit")
    metres: Any = UNITS.get(unit) if isinstance(unit, str) else unit
    if type(metres) not in (int, float) or not 0 < metres < 1e6:
        said = "lacks unit" if unit is None else f"unit is {short(unit)}"
        where = key if unit is None else (*key, "unit")
        words = f"{said}: give {', '.join(UNITS)}, or the metres of one stored step, such as 0.00025"
        notes.add(where, words if unit is None else words.partition(" ")[2])
        metres = 1.0
    invalid = entry.get("invalid", [0])
    invalid = invalid if isinstance(invalid, list) else [invalid]
    if wrong := [one for one in invalid if type(one) not in (int, float) or not math.isfinite(one)]:
        notes.add((*key, "invalid"), f"has {short(wrong[0])}: give stored numbers that mean unknown (nan always does)")
        invalid = []
    farthest = entry.get("farthest")
    if farthest is not None and (type(farthest) not in (int, float) or not 0 < farthest < math.inf):
        notes.add((*key, "farthest"), f"is {short(farthest)}: give metres")
        farthest = None
    return {"metres": float(metres), "invalid": tuple(float(one) for one in invalid), "farthest": farthest}


def _normals(entry: dict[str, Any], key: Key, notes: _Notes) -> dict[str, Any]:
    axes, pairs = entry.get("axes"), [set(pair.split()) for pair in AXES]
    words = axes if isinstance(axes, list) else []
    if len(words) != 3 or not all(sum(word in pair for word in words) == 1 for pair in pairs):
        said = "lacks axes" if axes is None else f"has the axes {short(axes)}"
        choice = ", ".join(f"one of {pair.replace(' ', ' and ')}" for pair in AXES)
        notes.add(key, f"{said}: say where the three stored numbers point, {choice}, such as [right, up, towards]")
        return {}
    return {"axes": tuple(words)}


def _probability(entry: dict[str, Any], key: Key, notes: _Notes) -> dict[str, Any]:
    max_dist = entry.get("max_dist", EDGE_MAX_DIST)
    if type(max_dist) not in (int, float) or not 0 < max_dist <= MOST_DIST:
        notes.add((*key, "max_dist"), f"is {short(max_dist)}: give a share of the image diagonal, at most {MOST_DIST}")
        max_dist = EDGE_MAX_DIST
    return {"ignore": _id_list(entry, "ignore", key, notes), "max_dist": float(max_dist)}


def _splits(given: Any, notes: _Notes) -> Splits:
    key: Key = ("splits",)
    if not isinstance(given, dict):
        notes.add(key, f"is {short(given)}: give a mapping, such as val: 0.2")
        return Splits({})
    parts: dict[str, float | str] = {}
    for name, value in given.items():
        if name in ("seed", "groups"):
            continue
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,40}", name):
            notes.add((*key, name), "is no split's name: give a word")
        elif (type(value) in (int, float) and 0 < value < 1) or (isinstance(value, str) and value):
            parts[name] = value
        else:
            notes.add((*key, name), f"is {short(value)}: give a share below 1, a list file, a pattern of ids, or rest")
    shares = {name: float(value) for name, value in parts.items() if not isinstance(value, str)}
    rests = [name for name, value in parts.items() if value == "rest"]
    total = round(sum(shares.values()), 9)
    if given.keys() - {"seed", "groups"} != parts.keys():
        return Splits({})  # what is wrong with one is told already
    if given and "val" not in parts:
        near = next((name for name in parts if name in ("valid", "validation", "test", "dev")), "")
        notes.add(key, f"has no val, which figures are of: {f'call {near} so' if near else 'give it'}")
    if "train" not in parts and rests:
        notes.add(key, f"has no train: {', '.join(rests)} would be the rest")
    elif "train" not in parts and len(shares) < len(parts):
        notes.add(key, "has no train: give a list, a pattern of ids, or train: rest")
    if len(rests) > 1:
        notes.add(key, f"has {' and '.join(rests)} for the rest: give one")
    if "train" in shares and total != 1:
        notes.add((*key, "train"), f"and the others add up to {total:g}: give shares of 1 in all, or leave out train")
    elif total >= 1 and "train" not in shares:
        notes.add(key, f"has shares of {total:g} in all: leave some for train")
    if shares and len(shares) + len(rests) < len(parts):
        notes.add(key, "mixes shares with lists: give shares alone, or lists and patterns")
    seed, groups = given.get("seed", 0), given.get("groups", "")
    if type(seed) is not int or not 0 <= seed < 2**32:
        notes.add((*key, "seed"), f"is {short(seed)}: give a whole number of 0 or more")
    if "seed" in given and not shares:
        notes.add((*key, "seed"), "draws shares, and there are none: leave it out")
    if groups and (not isinstance(groups, str) or groups.count("{group}") != 1):
        notes.add((*key, "groups"), f"is {short(groups)}: give a pattern of ids with {{group}}, such as {{group}}_*")
    return Splits(parts, seed if type(seed) is int else 0, str(groups))


def _normalisation(values: dict[str, Any], notes: _Notes) -> Normalisation | None:
    if "mean" not in values and "std" not in values:
        return None
    numbers = {}
    for name, (least, most) in LIMITS.items():
        given: Any = values.get(name)
        fits = isinstance(given, list) and len(given) == 3
        if not fits or not all(type(one) in (int, float) and least <= one <= most for one in given):
            said = "is missing beside the other" if given is None else f"is {short(given)}"
            notes.add((name,), f"{said}: give three numbers of {least:g} to {most:g}, of images in 0 to 1")
            return None
        red, green, blue = (float(one) for one in given)
        numbers[name] = (red, green, blue)
    return Normalisation(**numbers)
