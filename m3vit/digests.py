"""Digests of what the project writes and reads back: a file changed since is refused, not computed with. No torch.

Four carriers, one for each kind of file, all sha256:

JSON             its last key, "sha256", is the digest of the rest as `_canonical` writes it, key order included
listed files     a JSON file of the first kind holds {relative name: digest} of its neighbours: weights, graphs, sources
sealed files     a last line `# m3vit sha256 <digest>` of all bytes before it: a comment to YAML, and readers of zip
                 archives (npz, torch's) look past it
logs             JSON lines; the last key of each, "digest", is the start of the digest of the rest of its line

A digest lies in the file itself, or in one written after it: a kill between the two writes looks like damage and is
refused like it. Files without a digest were written by m3vit 0.1.0 before digests, or by other hands:
they are read with an `UncheckedWarning`. Digests find accidents and edits, not forgers, who can write digests too.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from m3vit.errors import InputError, UncheckedWarning
from m3vit.files import open_regular, read_json, sha256_file, write_json

KEY = "sha256"  # of a JSON file's digest, at its top level
_SEAL = b"\n# m3vit sha256 "
_SEAL_BYTES = len(_SEAL) + 64 + 1
_NEAR_END = 1 << 16  # where a seal is looked for that is not at its place
LINE_KEY = "digest"  # of a log's line


def _canonical(value: Any) -> bytes:
    """Return the bytes whose digest a JSON value has: as it comes back from a file, in the order of its keys."""
    return json.dumps(json.loads(json.dumps(value)), separators=(",", ":")).encode()


def _warn_unchecked(path: Path) -> None:
    warnings.warn(
        f"{path} carries no digest (written by an older m3vit, or by hand): whether it was changed cannot be told",
        UncheckedWarning,
        stacklevel=3,
    )


def changed(path: Path, what: str) -> InputError:
    """Return the error for a file that is not what was written; `what` it is part of, and how to get it again."""
    return InputError(f"{path} is not as it was written (its sha256 differs), it was edited or damaged: {what}")


# ------------------------------------------------------------------------------------------------------------ JSON


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its digest as last key, atomically."""
    plain = {key: one for key, one in value.items() if key != KEY}
    write_json(path, {**plain, KEY: hashlib.sha256(_canonical(plain)).hexdigest()})


def read_sealed_json(path: Path, what: str) -> dict[str, Any]:
    """Return a JSON object without its digest.

    Raises InputError if it is missing, unreadable, no object, or not as it was written. `what` says what the file is
    part of and how to get it again.
    """
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object: {what}")
    digest = value.pop(KEY, None)
    if digest is None:
        last = next(reversed(value), "")
        if len(last) == len(KEY) and re.fullmatch("[0-9a-f]{64}", str(value[last])):  # its name is what was damaged
            raise changed(path, what)
        _warn_unchecked(path)
    elif digest != hashlib.sha256(_canonical(value)).hexdigest():
        raise changed(path, what)
    return value


# ---------------------------------------------------------------------------------------------------- listed files


def file_digests(folder: Path, names: Iterable[str | Path]) -> dict[str, str]:
    """Return {name: sha256} of files, by their names relative to `folder`."""
    return {str(name): sha256_file(folder / name) for name in names}


def check_listed(folder: Path, digests: Mapping[str, str], what: str) -> None:
    """Raise InputError naming the first of the listed files that is missing or not as it was written."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} not found: {what}")
        if sha256_file(path) != digest:
            raise changed(path, what)


# ---------------------------------------------------------------------------------------------------- sealed files


def seal(path: Path) -> None:
    """Append the seal to a file just written (inside `atomic_path`, before it gets its name)."""
    digest = sha256_file(path)
    with open(path, "ab") as file:
        file.write(_SEAL + digest.encode() + b"\n")


def check_sealed(path: Path, what: str) -> int:
    """Return the bytes of a file before its seal, all of them if it has none (with an `UncheckedWarning`).

    Raises InputError if it is missing or not as it was written.
    """
    if not path.is_file():
        raise InputError(f"{path} not found: {what}")
    size = path.stat().st_size
    digest, left = hashlib.sha256(), size - _SEAL_BYTES
    with open(path, "rb") as file:
        file.seek(max(0, size - _NEAR_END))
        tail = file.read()
        end = tail[-_SEAL_BYTES:]
        if left < 0 or not end.startswith(_SEAL):
            # A seal that is not at its place, where bytes came or went, or that is damaged itself.
            if _SEAL in tail or re.fullmatch(rb"[0-9a-f]{64}\n", end[len(_SEAL) :]):
                raise changed(path, what)
            _warn_unchecked(path)
            return size
        file.seek(0)
        while left and (piece := file.read(min(1 << 20, left))):
            digest.update(piece)
            left -= len(piece)
    if end != _SEAL + digest.hexdigest().encode() + b"\n":
        raise changed(path, what)
    return size - _SEAL_BYTES


# ------------------------------------------------------------------------------------------------------------ logs


def _line_digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()[:16]


def sealed_line(value: Mapping[str, Any]) -> str:
    """Return a JSON object as a line of a log, with its digest as last key."""
    plain = {key: one for key, one in value.items() if key != LINE_KEY}
    return json.dumps({**plain, LINE_KEY: _line_digest(plain)}) + "\n"


def read_sealed_lines(path: Path, what: str) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of a log, each as it lies in the file, without its end, and as the value without its digest.

    No file is an empty log. A last line that a kill cut short is left out. Raises InputError naming the first line that
    is not as it was written; `what` says what to do. Lines without a digest are taken where none before them has one.
    """
    content = b""
    if path.exists():
        try:
            with open_regular(path) as file:
                content = file.read()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): {what}") from None
    *lines, rest = content.split(b"\n")
    if _is_object(rest):  # whole, though its end is missing or damaged
        lines.append(rest)
    found: list[tuple[bytes, dict[str, Any]]] = []
    checked = unchecked = False
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            value = None
        digest = value.pop(LINE_KEY, None) if isinstance(value, dict) else None
        missing = digest is None and not checked
        if not isinstance(value, dict) or not (missing or digest == _line_digest(value)):
            raise InputError(f"line {number} of {path} is not as it was written, it was edited or damaged: {what}")
        checked, unchecked = checked or not missing, unchecked or missing
        found.append((line, value))
    if unchecked:
        _warn_unchecked(path)
    return found


def _is_object(line: bytes) -> bool:
    """Return whether a line starts with a whole JSON object."""
    try:
        return isinstance(json.JSONDecoder().raw_decode(line.decode(errors="replace"))[0], dict)
    except (ValueError, RecursionError):
        return False
