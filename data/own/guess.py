"""A first data.yaml: what a folder seems to hold, from its names and some of its files. No torch.

What is only likely becomes a question, a comment beside the line that depends on it.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3vit.data.own.labels import stored_values
from m3vit.data.own.patterns import IMAGE_ENDINGS, LABEL_ENDINGS, files_in
from m3vit.data.reading import naming, read_image
from m3vit.errors import InputError, one_line
from m3vit.tasks import IGNORE

LOOKED_AT = 12  # files of a series, to tell what it is
MASKS = 500  # opened for their ids
MOST_IDS = 200  # of masks: more are no classes
MANY = 2000  # images of which a tenth is enough for val
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
ABOVE = "{folder}/"
NAME_FILES = ("classes.txt", "labels.txt", "class_names.txt", "names.txt", "classes.names")
WORDS = {  # in the name of a folder or a file
    "depth": "depth disp range distance zbuffer",
    "normals": "normal",
    "edge": "edge bound contour",
    "saliency": "salien sal",
    "semseg": "mask label seg gt annot class",
}


@dataclass
class Series:
    """Files that belong together: those of a folder with one ending of their stems, such as _mask."""

    folder: str
    files: list[str]
    token: str = ""
    role: str = ""  # image, or a task
    why: str = ""  # it is none of these
    facts: dict[str, Any] = field(default_factory=dict)

    def stems(self) -> dict[str, str]:
        """Return the file of each stem, from the folder on."""
        if self.folder.startswith(ABOVE):  # the folder above is the id's first part
            inner = len(self.folder) - len(ABOVE) + 1
            parts = ((file, *file.partition("/")) for file in self.files)
            return {f"{top}/{os.path.splitext(rest)[0][inner:]}": file for file, top, _, rest in parts}
        start = len(self.folder) + 1 if self.folder else 0
        return {os.path.splitext(file)[0][start:]: file for file in self.files}


@dataclass
class Guess:
    """What a data.yaml is written from: its lines as values, and comments by dotted key."""

    values: dict[str, Any]
    comments: dict[str, list[str]]
    kind: str = ""  # of a published data set, in words
    notes: list[str] = field(default_factory=list)


def guess(root: Path, progress: Callable[[int, int], None] | None = None) -> Guess:
    """Return what a folder seems to hold, or raise InputError if there is nothing to begin with."""
    on_disk = [name for name in files_in(root, [""]) if _ending(name) in {*IMAGE_ENDINGS, "npy"}]
    if not on_disk:
        raise InputError(f"{root} holds no pictures ({', '.join(IMAGE_ENDINGS)}): give the folder that they are in")
    series = _series(on_disk)
    for place, one in enumerate(series):
        _look(root, one)
        if progress:
            progress(place + 1, len(series))
    photographs = [one for one in series if one.role == "image"]
    if not photographs:
        found = ", ".join(f"{one.folder or '.'}/ ({one.role or one.why})" for one in series[:6])
        raise InputError(f"{root} holds no photographs that could be told from labels: it has {found}")
    result = Guess({}, defaultdict(list))
    labels = [one for one in series if one.role not in ("image", "")]
    images = max(photographs, key=lambda one: (_fit(one, labels), len(one.files)))
    result.notes += [f"{one.folder or '.'}/ is not used: {one.why}" for one in series if not one.role]
    result.notes += [f"{one.folder or '.'}/ holds pictures too" for one in photographs if one is not images]
    _describe(root, images, labels, result)
    return result


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _series(files: Sequence[str]) -> list[Series]:
    """Group files by their top folder, and by what their stems end with where one folder holds several kinds."""
    folders: dict[str, list[str]] = defaultdict(list)
    for file in files:
        parts = file.split("/")
        if len(parts) > 2 and parts[0].lower() in SPLIT_NAMES:
            folders[f"{ABOVE}{parts[1]}"].append(file)
        else:
            folders[parts[0] if len(parts) > 1 else ""].append(file)
    found = []
    for folder, some in folders.items():
        stems = Counter(os.path.splitext(file)[0] for file in some)
        twice = any(count > 1 for count in stems.values())
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for file in some:
            stem = os.path.splitext(file)[0]
            token = re.search(r"[_-][A-Za-z][A-Za-z_-]*$", stem.rpartition("/")[2])
            word = token[0] if token else ""
            groups[word, _ending(file) if twice else ""].append(file)
        if not twice:
            groups = _kinds_apart(groups)
        found += [Series(folder, sorted(members), word) for (word, _), members in groups.items()]
    return found


def _kinds_apart(groups: dict[tuple[str, str], list[str]]) -> dict[tuple[str, str], list[str]]:
    """Put together the groups whose words are just words of names: those of kinds of files come with the same ids."""
    ids = {key: {os.path.splitext(file)[0].removesuffix(key[0]) for file in members} for key, members in groups.items()}
    apart: dict[tuple[str, str], list[str]] = {}
    for key, members in groups.items():
        common = max((len(ids[key] & others) for other, others in ids.items() if other != key), default=0)
        apart.setdefault(key if 2 * common > len(members) else ("", ""), []).extend(members)
    return apart


def _sample(files: Sequence[str], count: int) -> list[str]:
    return [files[place * len(files) // count] for place in range(count)] if len(files) > count else list(files)


def _look(root: Path, series: Series) -> None:
    """Find out what a series is, from some of its files and from its name."""
    votes: Counter[str] = Counter()
    named = f"{series.folder} {series.token}".lower()
    for file in _sample(series.files, LOOKED_AT):
        try:
            if _ending(file) not in LABEL_ENDINGS:
                read_image(root / file)
                votes["image"] += 1
                continue
            with naming(root / file):
                votes[_kind(stored_values(root / file), series.facts, named)] += 1
        except InputError as error:
            series.why = f"{file} cannot be read ({one_line(error, 120)})"
    series.role = votes.most_common(1)[0][0] if votes else ""
    if series.role == "colours":
        series.role, series.why = "", "masks in colours: convert them to ids, as docs/own-data.md says"
    if series.role == "image" and any(word in named for word in "mask label normal depth".split()):
        series.role, series.why = "", "it holds pictures that its name says are labels, of a form that is not read"


def _kind(values: NDArray[Any], facts: dict[str, Any], named: str) -> str:
    """Return what one file seems to be: image, colours, or a task."""
    facts["least"] = min(facts.get("least", np.inf), float(np.nanmin(values)))
    if values.ndim == 3 and values.shape[2] == 3:
        if values.dtype.kind == "f":
            facts.setdefault("z", []).append(float(values[..., 2].mean()))
            return "normals"
        vectors = values[::4, ::4].astype(np.float32) * (2 / 255) - 1
        lengths = np.linalg.norm(vectors, axis=-1)
        if ((abs(lengths - 1) < 0.1) | (lengths < 0.1)).mean() > 0.9 and (abs(lengths - 1) < 0.1).mean() > 0.3:
            facts.setdefault("z", []).append(float(vectors[..., 2].mean()))
            return "normals"
        if (values == values[..., :1]).all():
            values = values[..., 0]
        else:
            colours = len(np.unique(values.reshape(-1, 3), axis=0))
            return "colours" if colours <= min(64, values[..., 0].size // 64) else "image"
    if values.ndim != 2:
        return "colours"
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    found = np.unique(known)
    whole = values.dtype.kind != "f" or bool((known == np.trunc(known)).all())
    depth = any(word in named for word in WORDS["depth"].split())
    if len(found) > 256 or not whole or depth:
        facts["most"] = max(facts.get("most", 0.0), float(known.max(initial=0)))
        facts["float"] = values.dtype.kind == "f"
        facts["zero"] = facts.get("zero", False) or bool((known == 0).any())
        return "depth"
    if len(found) > MOST_IDS:
        return "image"
    for task in ("edge", "saliency"):
        if len(found) <= 2 and any(re.search(rf"\b{word}|_{word}", named) for word in WORDS[task].split()):
            return task
    return "semseg"


# --- names ----------------------------------------------------------------------------------------------------------


def _affixes(stems: Sequence[str]) -> list[tuple[str, str]]:
    """Return what all stems may begin and end with, beside their ids: nothing, and the longest common words."""
    if len(stems) < 2:
        return [("", "")]
    names = [stem.rpartition("/")[2] for stem in stems]
    before = re.sub(r"[^_-]*$", "", _start(names))
    after = re.sub(r"^[^_-]*", "", _start([name[::-1] for name in names])[::-1])
    plain = after if re.search("[A-Za-z]", after) else ""
    return list(dict.fromkeys([("", ""), ("", plain), (before, ""), (before, plain)]))


def _start(names: Sequence[str]) -> str:
    """Return what all names begin with."""
    first, last = min(names), max(names)
    return first[: next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _ids(series: Series, affix: tuple[str, str]) -> set[str]:
    before, after = affix
    found = set()
    for stem in series.stems():
        folder, slash, name = stem.rpartition("/")
        if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after):
            found.add(f"{folder}{slash}{name[len(before) : len(name) - len(after)]}")
    return found


def _match(images: Series, labels: Series) -> tuple[int, tuple[str, str], tuple[str, str]]:
    """Return how many ids two series share, and which affixes leave them."""
    choices = [
        (len(_ids(images, one) & _ids(labels, other)), one, other)
        for one in _affixes(list(images.stems()))
        for other in _affixes(list(labels.stems()))
    ]
    return max(choices, key=lambda choice: (choice[0], -len("".join((*choice[1], *choice[2])))))


def _fit(images: Series, labels: Sequence[Series]) -> int:
    return sum(_match(images, one)[0] for one in labels)


def _pattern(series: Series, affix: tuple[str, str]) -> str:
    endings = {_ending(file) for file in series.files}
    ending = endings.pop() if len(endings) == 1 else "*"
    return f"{series.folder}{'/' if series.folder else ''}{affix[0]}{{id}}{affix[1]}.{ending}"


# --- data.yaml ------------------------------------------------------------------------------------------------------


def _describe(root: Path, images: Series, labels: Sequence[Series], result: Guess) -> None:
    values, comments = result.values, result.comments
    matched = [(one, *_match(images, one)) for one in labels]
    affix = Counter({own: 0 for _, _, own, _ in matched} or {("", ""): 0})
    for _, count, own, _ in matched:
        affix[own] += count
    own = affix.most_common(1)[0][0]
    values["images"] = _pattern(images, own)
    ids = sorted(_ids(images, own))
    values["tasks"] = tasks = {}
    labelled: set[str] = set()
    for series, _, _, other in sorted(matched, key=lambda found: -found[1]):
        fitting = _ids(series, other) & set(ids)
        where = f"{series.folder or '.'}/*{series.token}"
        if not fitting:
            result.notes.append(f"{where} looks like {series.role}, but its names fit no photograph")
            continue
        if series.role in tasks:
            result.notes.append(f"{where} looks like {series.role} too: choose, or give it a name of its own")
            continue
        entry, questions = ENTRIES[series.role](root, series)
        tasks[series.role] = {"files": _pattern(series, other), **entry}
        comments[f"tasks.{series.role}"] = [f"{len(fitting)} of {len(ids)} images have it"]
        for key, words in questions.items():
            comments[f"tasks.{series.role}.{key}"].append(words)
        labelled |= fitting
    values["splits"] = split_up(root, ids, comments)
    if bare := sorted(set(ids) - labelled):
        values["unlabelled"] = "leave_out"
        comments["unlabelled"].append(
            f"{len(bare)} images have no label of any task, such as {', '.join(bare[:3])}; refuse would stop there"
        )
    if not tasks:
        comments["tasks"].append("no labels were recognised: describe them here (docs/own-data.md)")


def look_for_ids(root: Path, series: Series) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys of a task with classes, from the ids in its masks, and questions by key."""
    counts: Counter[int] = Counter()
    some = _sample(series.files, MASKS)
    for file in some:
        try:
            with naming(root / file):
                values = stored_values(root / file)
                values = values[..., 0] if values.ndim == 3 else values
            found, numbers = np.unique(values, return_counts=True)
            counts.update({int(one): int(count) for one, count in zip(found, numbers, strict=True)})
        except InputError:
            continue  # m3vit data check names it
    ignore = [IGNORE] if IGNORE in counts and len(counts) > 2 else []
    ids = sorted(set(counts) - set(ignore))
    names, source = _names(root, ids)
    total = sum(counts.values())
    shares = ", ".join(f"{names[one]} {100 * counts[one] / total:.1f} %" for one in ids[:30])
    opened = "all masks" if len(some) == len(series.files) else f"{len(some)} of {len(series.files)} masks"
    contiguous = ids == list(range(len(ids))) and len(ids) > 1
    entry: dict[str, Any] = {"classes": [names[one] for one in ids] if contiguous else {one: names[one] for one in ids}}
    if len(ids) == 1:
        entry["classes"][ids[0] + 1 if ids[0] < IGNORE else 0] = "other"
    entry["ignore"] = ignore
    asked = "" if source else "what are these classes called? "
    last = f"; is {ids[-1]} one, or void and to be moved to ignore?" if not ignore else ""
    questions = {"classes": f"{asked}names are {source or 'made up'}; shares of pixels in {opened}: {shares}{last}"}
    return entry, questions


def _names(root: Path, ids: Sequence[int]) -> tuple[dict[int, str], str]:
    """Return a name for each id, and the file that they are from."""
    for name in NAME_FILES:
        path = root / name
        if path.is_file() and path.stat().st_size < 1 << 16:
            lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
            if len(lines) > max(ids, default=0) and len(set(lines)) == len(lines):
                return {one: lines[one] for one in ids}, name
    return {one: f"class_{one}" for one in ids}, ""


def _depth(root: Path, series: Series) -> tuple[dict[str, Any], dict[str, str]]:
    most, metric = series.facts["most"], series.facts["float"]
    unit = "m" if metric or most <= 100 else "mm"
    other = "" if metric else ", or a number: metres of one stored step (KITTI 0.00390625, Taskonomy 0.001953125)"
    invalid = ([0] if series.facts["zero"] or metric else []) + ([65535] if most == 65535 else [])
    questions = {"unit": f"stored values go up to {most:g}: is that {unit}? Else m, cm, mm{other}"}
    questions["invalid"] = "which stored values mean that depth is unknown?"
    return {"unit": unit, "invalid": invalid}, questions


def _normals(root: Path, series: Series) -> tuple[dict[str, Any], dict[str, str]]:
    towards = "towards" if np.mean(series.facts.get("z", [1])) > 0 else "away"
    words = "where do the three stored numbers point? Check it with m3vit data show: a floor is to be drawn as up"
    return {"axes": ["right", "up", towards]}, {"axes": words}


def _probability(root: Path, series: Series) -> tuple[dict[str, Any], dict[str, str]]:
    return {}, {}


ENTRIES = {
    "semseg": look_for_ids,
    "depth": _depth,
    "normals": _normals,
    "edge": _probability,
    "saliency": _probability,
}


def split_up(root: Path, ids: Sequence[str], comments: dict[str, list[str]]) -> dict[str, Any]:
    """Return how images are divided: by list files or folders that are there, else by share."""
    lists: dict[str, Any] = {}
    for name in files_in(root, [""]):
        stem = Path(name).stem.lower()
        if name.endswith(".txt") and stem in ("train", "val", "valid", "validation", "test"):
            with open(root / name, errors="replace") as file:
                first = Path(file.readline().strip()).stem
            if any(one.endswith(first) for one in ids) and first:
                lists.setdefault({"valid": "val", "validation": "val"}.get(stem, stem), name)
    if {"train", "val"} <= lists.keys():
        comments["splits"].append("lists that are there")
        return lists
    tops = {one.partition("/")[0] for one in ids if "/" in one}
    train = next((name for name in SPLIT_NAMES[:2] if name in tops), "")
    val = next((name for name in SPLIT_NAMES[2:] if name in tops), "")
    if train and val:
        comments["splits"].append("folders that are there: patterns of ids")
        return {"train": f"{train}/**", "val": f"{val}/**"}
    share = 0.1 if len(ids) > MANY else 0.2
    found: dict[str, Any] = {"val": share, "seed": 0}
    groups = Counter(re.sub(r"[_ -]*\d+$", "", one) for one in ids)
    pattern = "{group}/*" if len(tops) > 2 else "{group}_*"
    if len(tops) > 2 or (2 < len(groups) <= len(ids) // 2 and all("_" in one for one in ids)):
        found["groups"] = pattern
        comments["splits.groups"].append(
            "frames of one scene or video stay together, or val would hold near copies of what is trained on"
        )
    else:
        comments["splits"].append(
            f"{share:.0%} of the images are for val; of videos or scenes add groups: '{{group}}_*', so that "
            "no frames of one are in both"
        )
    return found
