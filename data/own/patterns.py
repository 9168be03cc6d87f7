"""Patterns of names: photos/{id}.* and their like, and the files of a folder that fit them. No torch.

{id} stands for one or more characters, folders included; * for any within one folder; ** for any at all. {folder}, of
patterns like {folder}/images/{id}.*, is the first part of an id: train/0001. An ending is taken in small and large
letters, and .* for any ending that such files have.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

IMAGE_ENDINGS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
LABEL_ENDINGS = ("png", "npy", "tif", "tiff")


def pattern_problem(pattern: Any) -> str:
    """Return what is wrong with a pattern of files, and what to do; nothing if it is one."""
    plain = pattern.replace("{folder}", "", 1).replace("{id}", "", 1) if isinstance(pattern, str) else "{"
    if "{" in plain or "{id}" not in pattern:
        return "give a pattern with {id} once, such as photos/{id}.*"
    if pattern.startswith("/") or ".." in pattern.split("/") or "\\" in pattern:
        return "give a pattern within the folder, with / between folders"
    return ""


def as_regex(pattern: str, endings: Sequence[str] = ()) -> re.Pattern[str]:
    """Return a pattern's expression, with groups of its {id} and {group}. `endings`: what a last .* stands for."""
    body, ending = pattern, ""
    if endings and pattern.endswith(".*"):
        body, ending = pattern[:-2], rf"\.(?i:{'|'.join(endings)})"
    elif endings and (found := re.search(r"\.\w+$", pattern)):
        body, ending = pattern[: found.start()], rf"(?i:{re.escape(found[0])})"
    text = ""
    for part in re.split(r"(\{\w+\}|\*\*|\*)", body):
        stands = {"{id}": "(?P<id>.+)", "{group}": "(?P<group>.+)", "**": ".*", "*": "[^/]*"}
        stands["{folder}"] = "(?P<folder>.+)"
        text += stands.get(part, re.escape(part))
    return re.compile(text + ending, re.DOTALL)


def fixed_folder(pattern: str) -> str:
    """Return the folder that all files of a pattern are in; "" for the root."""
    before = re.split(r"[{*]", pattern)[0]
    return before.rpartition("/")[0]


def matches(files: Sequence[str], pattern: str, endings: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (id, file) of the files that fit a pattern.

    Of letters that Unicode can write in two ways (an umlaut: one character, or a letter and a mark, as macOS stores
    names) an id has the one character.
    """
    regex, start = as_regex(pattern, endings), fixed_folder(pattern)
    for file in files:
        if file.startswith(start) and (found := regex.fullmatch(file)):
            parts = found.groupdict()
            name = f"{parts['folder']}/{parts['id']}" if "folder" in parts else parts["id"]
            yield normalize("NFC", name), file


def files_in(root: Path, folders: Sequence[str]) -> list[str]:
    """Return the files below folders of a root, relative to it, sorted; links are followed, hidden names left out."""
    found: set[str] = set()
    for folder in folders:
        top = root / folder if folder else root
        seen: set[str] = set()
        for place, names, files in os.walk(top, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:  # a link to a folder above it
                names.clear()
                continue
            seen.add(real)
            names[:] = sorted(name for name in names if not name.startswith("."))
            inside = Path(place).relative_to(root).as_posix()
            found.update(name if inside == "." else f"{inside}/{name}" for name in files if not name.startswith("."))
    return sorted(found)
