"""The data-set doctor: opens every file that the lists name and says what is wrong. No torch; nothing is written.

Unlike the loaders, which stop at the first fault, it goes on: a folder that is missing costs its task, not the check.
"""

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from m3vit.data.opening import LAYOUTS, layouts_of, origin, recognise
from m3vit.data.own.layout import Folder
from m3vit.data.reading import ending
from m3vit.data.sample import FileSplit, check_shape, is_id
from m3vit.data.tools.plausibility import REACH_PERCENT, Look, look, oddities, statistics, untrained
from m3vit.errors import Defect, InputError
from m3vit.files import read_bounded
from m3vit.label_sets import LABEL_SETS
from m3vit.pool import run_jobs, usable_cores

FORMAT, VERSION = "m3vit-data-check", 1
SPLITS = ("train", "val")
SAMPLES_PER_JOB = 8
NO_SIZE = (1, 1)  # of an image that cannot be read: its labels are read all the same, and then found not to fit
EXAMPLES = 4  # of each kind of problem in the summary

SEVERITIES = ("error", "warning", "note")
# Kind of problem -> what it is, for the summary. The kinds are part of the JSON report's format.
PROBLEMS = {
    "description": "things wrong in data.yaml",
    "missing_list": "lists of images that are not there or not readable",
    "bad_id": "lines of a list that are no ids",
    "duplicate_id": "ids listed more than once in a split",
    "shared_id": "ids in both splits",
    "groups": "ids that the groups of data.yaml do not fit",
    "two_files": "ids with more than one file",
    "no_label": "images and splits without labels",
    "missing_folder": "folders that are not there",
    "mixed_release": "files of another release",
    "missing": "files that are not there",
    "empty": "files of 0 bytes",
    "unreadable": "files that are cut off or damaged",
    "values": "files of a wrong type or with impossible values",
    "size": "labels that do not fit their image",
    "blank": "labels that are ignored or invalid at every pixel",
    "constant": "labels with one value everywhere",
    "unit": "depths that are not in metres, by their size",
    "same_image": "identical images under two ids",
    "image_leak": "identical images in both splits",
    "untrained": "tasks with classes in val that no training label has",
    "orphan": "files that no list names",
    "counts": "numbers of images that are not the published ones",
}


@dataclass(frozen=True)
class Problem:
    """One thing found. `kind` is a key of PROBLEMS, `file` is relative to the root; id and split may be empty."""

    severity: str
    kind: str
    split: str
    id: str
    file: str
    message: str


@dataclass
class Report:
    """What the doctor found. `splits`: listed, whole (no error in any file), published (or None), by split.

    Of a folder with a data.yaml also how many images have a label, by task.
    """

    root: str
    layout: str
    release: str
    origin: str | None  # who made it, where a file says so
    quick: bool
    splits: dict[str, dict[str, Any]]
    problems: list[Problem] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    label_set: str = ""

    @property
    def ok(self) -> bool:
        """Return whether there is neither an error nor a warning."""
        return all(problem.severity == "note" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON report."""
        counts = Counter(problem.severity for problem in self.problems)
        fields = asdict(self)
        del fields["label_set"]  # the layout says it
        return {
            "format": FORMAT,
            "version": VERSION,
            **fields,
            "counts": {severity: counts[severity] for severity in SEVERITIES},
            "ok": self.ok,
        }


def check(
    root: str | Path,
    *,
    quick: bool = False,
    tasks: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Examine the data set in `root`, or raise InputError if there is none.

    `quick` looks at names only; `tasks`: those whose files are looked at (default: all). Else every file of both splits
    is decoded, in `workers` processes (default: one a core; they are spawned, so a script must call this below
    `if __name__ == "__main__":`); `progress` is called with the samples done and their total.
    """
    root = Path(root)
    if Folder.recognises(root):
        from m3vit.data.tools.check_own import check_own

        return check_own(root, tasks, quick, workers or usable_cores(), progress)
    if len(layouts_of(root) if root.is_dir() else []) != 1:
        recognise(root)  # raises, and says why
    layout = LAYOUTS[layouts_of(root)[0]]
    wanted = {"image", *chosen_tasks(tasks, LABEL_SETS[layout.label_set].tasks, str(root))}
    wanted |= {kind for task in wanted for kind in layout.needs.get(task, ())}
    problems: list[Problem] = []
    ids = {split: _read_list(root, layout, split, problems) for split in SPLITS}
    _compare_lists(ids, problems)
    kinds = _present_kinds(root, layout, wanted, problems)
    release = _release(root, layout, kinds)
    splits = {}
    if "image" in kinds:
        splits = {split: _open(layout, root, split, names, release, kinds) for split, names in ids.items() if names}
    _compare_names(splits, problems)
    report = Report(
        root=str(root),
        layout=layout.name,
        release=release,
        origin=origin(root),
        quick=quick,
        splits={},
        problems=problems,
        label_set=layout.label_set,
    )
    if splits and not quick:
        read_all(splits, report, workers or usable_cores(), progress)
    for split in SPLITS:
        published = layout.published.get(split)
        broken = {p.id for p in problems if p.severity == "error" and p.split == split and p.id}
        whole = len(set(ids[split]) - broken) if "image" in kinds else 0
        report.splits[split] = {"listed": len(ids[split]), "whole": whole, "published": published}
        if published is not None and len(ids[split]) != published and ids[split]:
            message = f"{len(ids[split])} images, the published release has {published}"
            problems.append(Problem("note", "counts", split, "", "", message))
    sort(problems)
    return report


def sort(problems: list[Problem]) -> None:
    """Put problems in the order of their severity and kind, else as found."""
    order = list(PROBLEMS)
    problems.sort(key=lambda p: (SEVERITIES.index(p.severity), order.index(p.kind)))


def chosen_tasks(tasks: Sequence[str] | None, there: Sequence[str], where: str) -> list[str]:
    """Return the tasks to look at, or raise InputError for one that there is not."""
    if unknown := [task for task in tasks or () if task not in there]:
        raise InputError(f"--tasks names {', '.join(unknown)}: those of {where} are {', '.join(there)}")
    return [task for task in there if tasks is None or task in tasks]


# --- names ----------------------------------------------------------------------------------------------------------


def _read_list(root: Path, layout: type[FileSplit], split: str, problems: list[Problem]) -> list[str]:
    """Return the usable ids of a split, each once."""
    file = f"{layout.listings}/{split}.txt"
    try:
        lines = read_bounded(root / file).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        problems.append(Problem("error", "missing_list", split, "", file, f"cannot be read ({reason})"))
        return []
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        problems.append(Problem("error", "missing_list", split, "", file, "lists no image"))
    for name, times in Counter(names).items():
        if not is_id(name):
            problems.append(Problem("error", "bad_id", split, "", file, f"{name!r} is not an image's id"))
            names = [other for other in names if other != name]
        elif times > 1:
            problems.append(Problem("error", "duplicate_id", split, name, file, f"listed {times} times"))
    return list(dict.fromkeys(names))


def _compare_lists(ids: dict[str, list[str]], problems: list[Problem]) -> None:
    others = set(ids["val"])
    for name in ids["train"]:
        if name in others:
            problems.append(Problem("error", "shared_id", "train", name, "", "listed in train and in val"))


def _present_kinds(root: Path, layout: type[FileSplit], wanted: set[str], problems: list[Problem]) -> list[str]:
    """Return "image" and the wanted tasks whose folders are there, and those of the tasks they need."""
    kinds = []
    for kind, folders in ((kind, folders) for kind, folders in layout.folders.items() if kind in wanted):
        if any((root / folder).is_dir() for folder in folders):
            kinds.append(kind)
        else:
            lost = [kind, *(task for task, needed in layout.needs.items() if kind in needed)]
            message = f"not found: {'the data set' if kind == 'image' else ' and '.join(lost)} cannot be used"
            problems.append(Problem("error", "missing_folder", "", "", f"{folders[0]}/", message))
    return [kind for kind in kinds if set(layout.needs.get(kind, ())) <= set(kinds)]


def _release(root: Path, layout: type[FileSplit], kinds: list[str]) -> str:
    """Return the release, or the one that most files belong to."""
    fitting = {
        release: sum(name.endswith(ends[kind]) for kind in kinds for name in _names(root / layout.folders[kind][0]))
        for release, ends in layout.releases.items()
    }
    return max(fitting, key=lambda release: fitting[release])


def _names(folder: Path) -> list[str]:
    """Return the names of the files in a folder, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _open(layout: type[FileSplit], root: Path, split: str, ids: list[str], release: str, kinds: list[str]) -> FileSplit:
    """Return the loader of these ids, without the refusals of its constructor: those are the doctor's to report."""
    return layout.unchecked(root, split, ids, release, [kind for kind in kinds if kind != "image"])


def _compare_names(splits: dict[str, FileSplit], problems: list[Problem]) -> None:
    """Report listed files that are not there, files of another release, and files that no list names."""
    if not splits:
        return
    one = next(iter(splits.values()))
    places = {folder: kind for kind in one.folders if kind in one.kinds for folder in one.folders[kind]}
    on_disk = {folder: _names(one.root / folder) for folder in places}
    found = {f"{folder}/{name}" for folder, names in on_disk.items() for name in names}
    spelt = {f"{folder}/{Path(name).stem}{ending(name)}": name for folder, names in on_disk.items() for name in names}
    stems = {name for loader in splits.values() for name in loader.ids}
    listed = set()
    for split, loader in splits.items():
        for index, name in enumerate(loader.ids):
            for file in dict.fromkeys(_relative(loader, index, kind) for kind in loader.kinds):
                listed.add(file)
                if file not in found:
                    other = spelt.get(file)
                    message = f"not found, but {other} is there: rename it" if other else "not found"
                    problems.append(Problem("error", "missing", split, name, file, message))
    for folder, names in on_disk.items():
        orphans = [name for name in names if f"{folder}/{name}" not in listed]
        if len(one.folders[places[folder]]) > 1:  # many ids are in several of them, and one file is used
            orphans = [name for name in orphans if Path(name).stem not in stems]
        if len(one.releases) > 1:
            expected = one.releases[one.release][places[folder]]
            foreign = [name for name in orphans if ending(name) in one.endings() - {expected}]
            if foreign:
                message = f"{len(foreign)} files that are not {expected}, such as {foreign[0]}"
                problems.append(Problem("error", "mixed_release", "", "", f"{folder}/", message))
                orphans = sorted(set(orphans) - set(foreign))
        if orphans:
            message = f"{len(orphans)} files that no list names, such as {orphans[0]}"
            problems.append(Problem("note", "orphan", "", "", f"{folder}/", message))


def _relative(loader: FileSplit, index: int, kind: str) -> str:
    path = loader.path(index, kind)
    return path.relative_to(loader.root).as_posix() if path.is_relative_to(loader.root) else str(path)


# --- files ----------------------------------------------------------------------------------------------------------


@dataclass
class Finding:
    """What reading one sample gave: problems, the hash of its image file, and the figures of its labels."""

    split: str
    index: int
    problems: list[Problem]
    image_sha256: str = ""
    size: str = ""
    looks: dict[str, Look] = field(default_factory=dict)


_splits: dict[str, FileSplit] = {}  # in each process of the pool


def _initialise(splits: dict[str, FileSplit]) -> None:
    _splits.clear()
    _splits.update(splits)


def _read_job(job: tuple[str, int, int]) -> list[Finding]:
    split, start, stop = job
    return [_read_sample(_splits[split], index) for index in range(start, stop)]


def read_all(
    splits: dict[str, FileSplit],
    report: Report,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Read every file and add what was found to the report."""
    jobs = [
        (split, start, min(start + SAMPLES_PER_JOB, len(loader)))
        for split, loader in splits.items()
        for start in range(0, len(loader), SAMPLES_PER_JOB)
    ]
    total = sum(len(loader) for loader in splits.values())
    missing = {(problem.split, problem.file) for problem in report.problems if problem.kind == "missing"}
    findings: list[Finding] = []
    with closing(run_jobs(_read_job, jobs, workers, initializer=_initialise, initargs=(splits,))) as finished:
        for some in finished:
            findings += some
            if progress is not None:
                progress(len(findings), total)
    for finding in findings:
        report.problems += [p for p in finding.problems if (p.split, p.file) not in missing]
    _judge_labels(splits, findings, report.problems)
    _compare_images(splits, findings, report.problems)
    report.statistics = _statistics(report.label_set, findings)


def _read_sample(loader: FileSplit, index: int) -> Finding:
    finding = Finding(loader.split, index, [])
    size = None
    for kind in (kind for kind in loader.kinds if loader.has(index, kind)):
        path, file = loader.path(index, kind), _relative(loader, index, kind)
        try:
            array = loader.read(index, kind, size or NO_SIZE)
            if size and kind != "image":
                check_shape(path, kind, array, size)
        except InputError as error:
            defect = error.defect or Defect(path, "unreadable", str(error))
            if defect.path != path:  # a file of a task that this one needs, reported there
                continue
            problem, message = defect.kind, defect.words
            if path.is_file() and path.stat().st_size == 0:
                problem, message = "empty", "has 0 bytes"
            if problem == "size" and not size:  # its image cannot be read, which is reported
                continue
            finding.problems.append(Problem("error", problem, loader.split, loader.ids[index], file, message))
            continue
        if kind == "image":
            size = array.shape[0], array.shape[1]
            finding.size = f"{size[0]}x{size[1]}"
            finding.image_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        elif size:
            finding.looks[kind] = look(kind, array)
    return finding


def _compare_images(splits: dict[str, FileSplit], findings: list[Finding], problems: list[Problem]) -> None:
    seen: dict[str, Finding] = {}
    for finding in findings:
        if not finding.image_sha256:
            continue
        first = seen.setdefault(finding.image_sha256, finding)
        name, other = splits[finding.split].ids[finding.index], splits[first.split].ids[first.index]
        if first is finding or name == other:  # the same id in both lists is reported as such
            continue
        kind = "same_image" if first.split == finding.split else "image_leak"
        file = _relative(splits[finding.split], finding.index, "image")
        message = f"the same file as {first.split} {other}"
        problems.append(Problem("warning", kind, finding.split, name, file, message))


def _judge_labels(splits: dict[str, FileSplit], findings: list[Finding], problems: list[Problem]) -> None:
    """Report labels that can be read but are hardly right: one problem for each split, task and kind."""
    for split, loader in splits.items():
        for task in loader.tasks:
            some = [finding for finding in findings if finding.split == split and task in finding.looks]
            ids = [loader.ids[finding.index] for finding in some]
            for kind, message in oddities(task, loader.label_set, ids, [finding.looks[task] for finding in some]):
                problems.append(Problem("warning", kind, split, "", loader.place(task), f"{task}: {message}"))
    if not {*SPLITS} <= splits.keys():
        return
    loader = splits["train"]
    for task in loader.tasks:
        looks = [[one.looks[task] for one in findings if one.split == split and task in one.looks] for split in SPLITS]
        if words := untrained(task, loader.label_set, *looks):
            message = f"{task}: {words} of val's labelled pixels; m3vit eval gives mIoU_trained too, without them"
            problems.append(Problem("note", "untrained", "train", "", loader.place(task), message))


def _statistics(label_set: str, findings: list[Finding]) -> dict[str, Any]:
    """Return figures over both splits."""
    looks: dict[str, list[Look]] = defaultdict(list)
    for finding in findings:
        for task, found in finding.looks.items():
            looks[task].append(found)
    sizes = Counter(finding.size for finding in findings if finding.size)
    result: dict[str, Any] = {"sizes": dict(sizes.most_common(10)), "num_sizes": len(sizes)}
    return result | {task: statistics(task, label_set, some) for task, some in looks.items()}


# --- words ----------------------------------------------------------------------------------------------------------


def describe(root: str | Path) -> str:
    """Return in a few words which data set a folder holds, or that it is none."""
    try:
        report = check(root, quick=True)
    except InputError as error:
        return f"not a data set ({error})"
    counts = " and ".join(f"{count['listed']} {split}" for split, count in report.splits.items())
    errors = sum(problem.severity == "error" for problem in report.problems)
    trouble = f", {errors} problems (m3vit data check tells which)" if errors else ""
    return f"{report.release} with {counts} images{trouble}"


def render(report: Report) -> str:
    """Return the summary of a report: counts, problems grouped by kind with a few examples, statistics, verdict."""
    made = f", {report.origin}" if report.origin else ""
    lines = [f"{report.release} (layout {report.layout}{made}): {report.root}"]
    for split, count in report.splits.items():
        published = "as published" if count["listed"] == count["published"] else f"published: {count['published']}"
        published = "" if count["published"] is None else f" ({published})"
        whole = "" if report.quick else f", {count['whole']} whole"
        labelled = ", ".join(f"{task} {number}" for task, number in count.get("labelled", {}).items())
        labelled = labelled and f"; with a label of {labelled}"
        lines.append(f"  {split:<6}{count['listed']} images{whole}{published}{labelled}")
    groups: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in report.problems:
        if problem.kind != "counts":  # said above
            groups[problem.severity, problem.kind].append(problem)
    for (severity, kind), some in groups.items():
        lines.append(f"{severity}: {PROBLEMS[kind]}: {len(some)}")
        for problem in some[:EXAMPLES]:
            where = " ".join(part for part in (problem.split, problem.file or problem.id) if part)
            lines.append(f"  {where}: {problem.message}" if where else f"  {problem.message}")
        if len(some) > EXAMPLES:
            lines.append(f"  and {len(some) - EXAMPLES} more (--json FILE lists all)")
    lines += _render_statistics(report)
    counts = Counter(problem.severity for problem in report.problems)
    if report.ok:
        lines.append("ok: names and lists are in order, files were not opened" if report.quick else "ok")
    else:
        lines.append(f"not ok: {counts['error']} errors, {counts['warning']} warnings")
    return "\n".join(lines)


def _render_statistics(report: Report) -> list[str]:
    figures, lines = dict(report.statistics), []
    if figures:
        sizes = [f"{size} ({count})" for size, count in list(figures.pop("sizes").items())[:3]]
        more = figures.pop("num_sizes") - len(sizes)
        lines.append(f"sizes: {', '.join(sizes)}{f' and {more} more' if more > 0 else ''}")
    for task, found in figures.items():
        words = []
        for key, text in (
            ("ignored_share", "% ignored"),
            ("invalid_share", "% invalid"),
            ("positive_share", "% positive"),
        ):
            if key in found:
                words.append(f"{100 * found[key]:.1f} {text}")
        if "ids_present" in found:
            classes = LABEL_SETS[report.label_set].classes[task]
            words.append(f"{len(found['ids_present'])} of {len(classes)} classes seen")
            if 0 < len(found["ids_absent"]) <= 5:
                words[-1] += f" (not {', '.join(classes[index] for index in found['ids_absent'])})"
        if "images_without_person" in found:
            words.append(f"{found['images_without_person']} images without a person, ignored")
        if "max_m" in found:
            words.append(f"up to {math.ceil(found['max_m'] * 100) / 100:.2f} m")
            words.append(f"{REACH_PERCENT} % of an image's within {found['reach_m']:.2f} m (median)")
        lines.append(f"{task}: {', '.join(words)}")
    return lines
