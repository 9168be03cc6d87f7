"""`m3vit data init`: a first data.yaml, with questions as comments. No torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from m3vit.data.own.description import FILE, read_description
from m3vit.data.own.files import find
from m3vit.data.own.guess import Guess, guess
from m3vit.data.own.published import published
from m3vit.errors import InputError
from m3vit.files import atomic_path

WIDTH = 110  # characters of a comment's line
ORDER = ("root", "images", "tasks", "splits", "unlabelled")


def begin(
    root: Path,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, list[str]]:
    """Write data.yaml for the folder `root`, into `out` if that is another; return it, and lines about what was found.

    Raises InputError rather than replace one that is there, unless it is to `overwrite`.
    """
    if not root.is_dir():
        raise InputError(f"{root} is no folder: give the one that holds the photographs and their labels")
    folder = root if out is None else out
    path = folder / FILE
    if path.exists() and not overwrite:
        raise InputError(f"{path} is there already: edit it and look at it with m3vit data check, or give --overwrite")
    found = published(root) or guess(root, progress)
    if folder.resolve() != root.resolve():
        found.values = {"root": str(root.resolve()), **found.values}
    text = render(found)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path, [*([found.kind] if found.kind else []), *_summary(folder), *found.notes]


def _summary(folder: Path) -> list[str]:
    """Return what the new data.yaml means, in words; InputError would be a fault of ours, told as it is."""
    description, problems = read_description(folder)
    if description is None:
        return [f"line {line}: {words}" for line, words in problems]
    files = find(description)
    lines = [f"{len(files.files['image'])} images ({', '.join(description.images)})"]
    for name, task in description.tasks.items():
        classes = f", {len(task.classes)} classes" if task.classes else ""
        lines.append(f"{name} of {len(files.files[name])} ({', '.join(task.patterns)}{classes})")
    lines.append(", ".join(f"{split} {len(names)}" for split, names in files.splits.items()))
    return lines + [fault.words for fault in files.faults[:5]]


def render(found: Guess) -> str:
    """Return the text of a data.yaml: its values, each with its questions above it."""
    lines = _comment(
        [
            f"What lies in this folder{f' ({found.kind})' if found.kind else ''}, as m3vit data init found it. "
            "docs/own-data.md explains every key.",
            "Read the comments, mend what is wrong, then: m3vit data check and m3vit data show.",
        ],
        "",
    )
    lines += _comment(found.notes, "")
    for key in ORDER:
        if key in found.values:
            lines += _comment(found.comments.get(key, []), "")
            lines += _entry(key, found.values[key], found.comments, key, "")
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any, comments: dict[str, list[str]], key: str, indent: str) -> list[str]:
    if not isinstance(value, dict) or all(not isinstance(item, dict | list) for item in value.values()):
        inline = not isinstance(value, dict) or not value
        if inline:
            return [f"{indent}{_scalar(name)}: {_scalar(value)}"]
    lines = [f"{indent}{_scalar(name)}:"]
    for inner, item in value.items():
        dotted = f"{key}.{inner}"
        lines += _comment(comments.get(dotted, []), f"{indent}  ")
        lines += _entry(inner, item, comments, dotted, f"{indent}  ")
    return lines


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _comment(texts: list[str], indent: str) -> list[str]:
    lines: list[str] = []
    for text in texts:
        line = f"{indent}#"
        for word in text.split():
            if len(line) + len(word) >= WIDTH:
                lines.append(line)
                line = f"{indent}#  "
            line += f" {word}"
        lines.append(line)
    return lines
