"""Which image and label files a data.yaml means, and how its images are divided. No torch; nothing is opened but lists.

Whatever is wrong is collected, so that all of it can be told at once.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from m3vit.data.own.description import FILE, Description
from m3vit.data.own.patterns import IMAGE_ENDINGS, LABEL_ENDINGS, as_regex, files_in, fixed_folder, matches
from m3vit.errors import InputError
from m3vit.files import read_text

MOST_NAMED = 10  # of the problems of one kind, in an error
MAX_ID = 300  # characters
MAX_LIST_BYTES = 1 << 28


class Fault(NamedTuple):
    """Something wrong with files. `kind`: of m3vit.data.tools.check.PROBLEMS."""

    kind: str
    words: str
    split: str = ""
    id: str = ""
    file: str = ""


@dataclass
class Found:
    """The files that a data.yaml means, relative to its root: `files` by "image" and task, then by id."""

    files: dict[str, dict[str, str]]
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    orphans: dict[str, list[str]] = field(default_factory=dict)  # labels without an image, by task
    others: list[str] = field(default_factory=list)  # files in the folders that no pattern takes
    left_out: list[str] = field(default_factory=list)  # ids of images without any label

    def labelled(self, ids: Sequence[str], tasks: Sequence[str]) -> list[str]:
        """Return those of some ids that have a label of one of these tasks."""
        return [name for name in ids if any(name in self.files[task] for task in tasks)]


def find(description: Description, tasks: Sequence[str] | None = None) -> Found:
    """Return what lies in the folder. `tasks` (default: all) are those whose labels are looked for."""
    root = description.root
    chosen = {name: task for name, task in description.tasks.items() if tasks is None or name in tasks}
    patterns = [*description.images, *(pattern for task in description.tasks.values() for pattern in task.patterns)]
    on_disk = files_in(root, sorted({fixed_folder(pattern) for pattern in patterns}))
    found = Found({"image": {}})
    _collect(found, "image", _images(description, on_disk), description.images)
    images = found.files["image"]
    if not images:
        found.faults.append(Fault("missing", f"no picture fits images: {', '.join(description.images)}"))
    for name, task in description.tasks.items():
        some = [pair for pattern in task.patterns for pair in matches(on_disk, pattern, LABEL_ENDINGS)]
        _collect(found, name, some, task.patterns, quiet=name not in chosen)
        fitting = {one: file for one, file in found.files[name].items() if one in images}
        found.orphans[name] = [file for one, file in found.files[name].items() if one not in images]
        if images and not fitting and name in chosen:
            first = next(iter(found.orphans[name]), "")
            why = f"{first} and its like fit no image's id" if first else "no file fits"
            found.faults.append(Fault("missing", f"tasks.{name}.files {', '.join(task.patterns)}: {why}"))
        found.files[name] = fitting
    taken = {file for files in found.files.values() for file in files.values()}
    taken |= {file for files in found.orphans.values() for file in files}
    found.others = [file for file in on_disk if file not in taken and file != FILE]
    _divide(found, description, list(chosen))
    return found


def _images(description: Description, on_disk: list[str]) -> list[tuple[str, str]]:
    """Return (id, file) of all images; a label beside its image, such as x_mask.png beside x.png, is none."""
    some = [pair for pattern in description.images for pair in matches(on_disk, pattern, IMAGE_ENDINGS)]
    ids = {name for name, _ in some}
    labels = {
        file: name
        for task in description.tasks.values()
        for pattern in task.patterns
        for name, file in matches(on_disk, pattern, LABEL_ENDINGS)
        if name in ids
    }
    return [(name, file) for name, file in some if labels.get(file, name) == name]


def _collect(
    found: Found, kind: str, pairs: list[tuple[str, str]], patterns: Sequence[str], quiet: bool = False
) -> None:
    files: dict[str, str] = {}
    for name, file in pairs:
        if not name.isprintable() or len(name) > MAX_ID:
            found.faults.append(Fault("bad_id", f"{file!r} has a name that is no id: rename it"))
        elif files.get(name, file) != file and not quiet:
            words = f"{files[name]} and {file} are both the {kind} of {name}: keep one, or narrow {', '.join(patterns)}"
            found.faults.append(Fault("two_files", words, id=name, file=file))
        else:
            files[name] = file
    found.files[kind] = files


# --- splits ---------------------------------------------------------------------------------------------------------


def _divide(found: Found, description: Description, tasks: Sequence[str]) -> None:
    """Fill in the splits: of images with any label of data.yaml, so that they do not depend on the tasks chosen."""
    ids = list(found.files["image"])
    labelled = set(found.labelled(ids, list(description.tasks)))
    bare = [name for name in ids if name not in labelled]
    leave_out = description.unlabelled == "leave_out"
    if all(not isinstance(value, str) for value in description.splits.parts.values()):
        divided = _by_share(found, description, [name for name in ids if name in labelled or not leave_out])
    else:
        divided = _by_name(found, description)
    listed = {name for names in divided.values() for name in names}
    for name in [name for name in bare if name in listed]:
        if not leave_out:
            words = f"{found.files['image'][name]} has no label of any task"
            split = next(split for split, names in divided.items() if name in names)
            found.faults.append(Fault("no_label", words, split, name, found.files["image"][name]))
    found.left_out = [name for name in bare if name in listed or leave_out]
    _compare(found, divided)
    found.splits = {split: tuple(name for name in names if name in labelled) for split, names in divided.items()}
    for split in ("train", "val"):
        names = found.splits.get(split, ())
        for task in tasks if found.files["image"] and not _told(found) else ():
            if split == "train" and not found.labelled(names, [task]) and found.files[task]:
                advice = "give another seed, or more images" if description.splits.seed else "move some there"
                words = f"no image of train has a label of {task}, {len(found.files[task])} others have: {advice}"
                found.faults.append(Fault("no_label", words, split))
        if not names and found.files["image"] and not _told(found):
            found.faults.append(Fault("missing_list", f"splits.{split} has no image with a label", split))


def _told(found: Found) -> bool:
    """Return whether what is wrong already explains an empty split."""
    return any(fault.kind in ("missing", "missing_list", "groups") for fault in found.faults)


def _compare(found: Found, divided: Mapping[str, Sequence[str]]) -> None:
    """Note images that are in two splits."""
    first: dict[str, str] = {}
    for split, names in divided.items():
        for name in names:
            if first.setdefault(name, split) != split:
                words = f"{name} is in {first[name]} and in {split}"
                found.faults.append(Fault("shared_id", words, split, name, found.files["image"][name]))


def _by_share(found: Found, description: Description, ids: list[str]) -> dict[str, list[str]]:
    """Divide images by shares. Groups are put in an order that the seed and their names decide, and dealt out so."""
    splits = description.splits
    groups: dict[str, list[str]] = {}
    regex = as_regex(splits.groups) if splits.groups else None
    for name in ids:
        matched = regex.fullmatch(name) if regex else None
        if regex and matched is None:
            found.faults.append(Fault("groups", f"splits.groups {splits.groups} does not fit the id {name}", id=name))
        groups.setdefault(matched["group"] if matched else name, []).append(name)
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{splits.seed}:{group}".encode()).digest())
    wanted = {split: float(share) for split, share in splits.parts.items() if split != "train"}
    divided: dict[str, list[str]] = {"train": [], **{split: [] for split in wanted}}
    for split, share in wanted.items():
        target, taken = max(1, round(share * len(ids))), divided[split]
        # The next group comes too if that brings the split nearer to its share; the first always.
        while order and (not taken or len(taken) + len(groups[order[0]]) / 2 < target):
            taken += groups[order.pop(0)]
    divided["train"] = [name for group in order for name in groups[group]]
    place = {name: index for index, name in enumerate(ids)}
    if splits.groups and not divided["train"] and ids:
        words = f"splits.groups {splits.groups} makes {len(groups)} groups of {len(ids)} images, too few to divide"
        found.faults.append(Fault("groups", words))
    return {split: sorted(names, key=place.__getitem__) for split, names in divided.items()}


def _by_name(found: Found, description: Description) -> dict[str, list[str]]:
    """Divide images by list files and patterns of ids; "rest" is what no other split has."""
    images = found.files["image"]
    divided: dict[str, list[str]] = {}
    for split, value in description.splits.parts.items():
        if value == "rest":
            divided[split] = []
        elif "*" in str(value):
            regex = as_regex(str(value))
            divided[split] = [name for name in images if regex.fullmatch(name)]
            if images and not divided[split]:
                found.faults.append(Fault("missing_list", f"splits.{split} {value} fits no id of an image", split))
        else:
            divided[split] = _listed(found, description, split, str(value))
    taken = {name for names in divided.values() for name in names}
    for split, value in description.splits.parts.items():
        if value == "rest":
            divided[split] = [name for name in images if name not in taken]
    return divided


def _listed(found: Found, description: Description, split: str, value: str) -> list[str]:
    """Return the ids of a list file: an id a line, or the image's file, from the root or without its folder."""
    images = found.files["image"]
    path = description.root / value
    try:
        if Path(value).is_absolute() or ".." in Path(value).parts:
            raise InputError(f"splits.{split} is {value}: name a file in {description.root}")
        text = read_text(path, f"give a list of image ids as splits.{split}", MAX_LIST_BYTES)
    except InputError as error:
        found.faults.append(Fault("missing_list", str(error), split))
        return []
    known = {name: name for name in images}
    known |= {normalize("NFC", file): name for name, file in images.items()}
    known |= {f"{name}.{file.rpartition('.')[2]}": name for name, file in images.items()}
    names: dict[str, None] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = normalize("NFC", line.strip())
        if not entry or entry.startswith("#"):
            continue
        name = known.get(entry)
        if name is None:
            words = f"{value}, line {number}: no image has the id {entry[:MAX_ID]!r}"
            found.faults.append(Fault("missing", words, split, file=value))
        elif name in names:
            found.faults.append(Fault("duplicate_id", f"{value}, line {number}: {name} is listed twice", split, name))
        else:
            names[name] = None
    if not names and not any(fault.split == split for fault in found.faults):
        found.faults.append(Fault("missing_list", f"{value} lists no image", split))
    return list(names)


def refuse(description: Description, faults: Sequence[Fault], more: str = "") -> None:
    """Raise one InputError with everything that is wrong, if anything is."""
    if not faults:
        return
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault.words)
    parts = []
    for some in kinds.values():
        parts += some[:MOST_NAMED]
        parts += [f"and {len(some) - MOST_NAMED} more like it"] if len(some) > MOST_NAMED else []
    bare = any(fault.kind == "no_label" and fault.id for fault in faults)
    advice = "; give unlabelled: leave_out to do without such images" if bare else ""
    count = f"{len(faults)} problems" if len(faults) > 1 else "a problem"
    raise InputError(
        f"{description.folder} has {count}: {'; '.join(parts)}{advice}{more}; m3vit data check {description.folder} "
        "lists them all"
    )
