"""The doctor on a folder with a data.yaml: what is wrong with it, its files and their labels. No torch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from m3vit.data.own.description import FILE, read_description
from m3vit.data.own.files import Found, find
from m3vit.data.own.layout import Folder
from m3vit.data.sample import FileSplit
from m3vit.data.tools.check import Problem, Report, chosen_tasks, read_all, sort

NAMED = 3  # files that a note names


def check_own(
    root: Path,
    tasks: Sequence[str] | None,
    quick: bool,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Examine a folder with a data.yaml; arguments are those of `m3vit.data.tools.check.check`."""
    description, wrong = read_description(root)
    problems = [Problem("error", "description", "", "", FILE, f"line {line}: {words}") for line, words in wrong]
    report = Report(str(root), Folder.name, root.resolve().name, None, quick, {}, problems)
    if description is None:
        return report
    wanted = chosen_tasks(tasks, tuple(description.tasks), str(root))
    report.release, report.label_set = description.name, description.label_set()
    found = find(description, wanted)
    for fault in found.faults:
        problems.append(Problem("error", fault.kind, fault.split, fault.id, fault.file, fault.words))
    _note_what_is_left(found, wanted, problems)
    splits: dict[str, FileSplit] = {}
    for name in found.splits:
        split = Folder.of(description, found, name, wanted)
        if split.ids:
            splits[name] = split
            problems += [
                Problem("warning", "no_label", name, "", split.place(task), f"no image of {name} has a label of {task}")
                for task, count in split.counts.items()
                if not count and name == "val"
            ]
    if splits and not quick:
        read_all(splits, report, workers, progress)
    for name, one in splits.items():
        assert isinstance(one, Folder)
        broken = {p.id for p in problems if p.severity == "error" and p.split == name and p.id}
        whole = len(set(one.ids) - broken)
        report.splits[name] = {"listed": len(one), "whole": whole, "published": None, "labelled": one.counts}
    sort(problems)
    return report


def _note_what_is_left(found: Found, tasks: Sequence[str], problems: list[Problem]) -> None:
    """Note files that are not used: labels without an image, images without a label, and what no pattern takes."""

    def note(kind: str, severity: str, what: str, names: Sequence[str]) -> None:
        if names:
            some = [name if name.isprintable() else repr(name) for name in names[:NAMED]]
            named = ", ".join(some) + (", ..." if len(names) > NAMED else "")
            problems.append(Problem(severity, kind, "", "", "", f"{len(names)} {what}: {named}"))

    for task in tasks:
        note("orphan", "warning", f"labels of {task} without an image of their id", found.orphans[task])
    note("no_label", "note", "images without any label are left out", found.left_out)
    note("orphan", "note", "files that no pattern takes", found.others)
