"""Small files that stand where large ones belong: what git LFS, git-annex and DVC leave until it is fetched."""

import os
from pathlib import Path

from m3vit.errors import InputError

LARGEST = 4096  # bytes; a pointer is a few lines of text
# How such a file begins, and what fetches the content.
BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch it with git lfs pull",
    b"/annex/objects/": "a pointer of git-annex: fetch it with git annex get",
    b"../": "the text of a symbolic link, which this checkout does not have as links",
    b"outs:": "a file of DVC about the content: fetch it with dvc pull, and give the file itself",
}


def stands_for(head: bytes) -> str:
    """Return in words what a file that begins so stands in for a file's content as, "" if it is the content itself."""
    return next((words for beginning, words in BEGINNINGS.items() if head.startswith(beginning)), "")


def fetches(target: str) -> str:
    """Return the command that fetches what a link leads to, as far as the target tells; "" if it does not."""
    return "git annex get" if "/annex/objects/" in target else "dvc pull" if ".dvc/cache" in target else ""


def check_content(path: Path, what: str) -> None:
    """Raise InputError if a file is not there but in a store it can be fetched from; `what` names what needs it."""
    if why := _stand_in(path):
        raise InputError(f"{what} {path} is not here: {why}")


def check_no_link(path: Path, what: str) -> None:
    """Raise InputError for a file that is a link out of its folder: onnxruntime does not follow those to weights."""
    check_content(path, what)
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise InputError(
            f"{what} {path} is a link out of its folder (to {os.readlink(path)}), which onnxruntime does not follow: "
            "put the file itself there (git annex unlock, dvc unprotect, or a copy with cp -rL)"
        )


def _stand_in(path: Path) -> str:
    """Return in words what lies in a file's place, "" if it is the file or nothing is."""
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        tool = fetches(target)
        fetch = f": fetch the content with {tool}" if tool else ": the file it names is missing"
        return f"it is a link to {target}{fetch}"
    if not path.exists():
        tracked = path.with_name(path.name + ".dvc")
        return f"{tracked.name} stands for it: fetch it with dvc pull" if tracked.is_file() else ""
    if not path.is_file() or path.stat().st_size > LARGEST:
        return ""
    with open(path, "rb") as file:
        start = file.read(LARGEST)
    words = stands_for(start)
    return f"its {len(start)} bytes are {words}" if words else ""
