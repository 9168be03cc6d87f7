"""What was edited in a project, value by value, where the values that it was exported with are known."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from m3vit.errors import InputError
from m3vit.files import read_text
from m3vit.hw.hardware import DERIVED, OPTIONAL, Hardware
from m3vit.hw.output_memory import MANIFEST_KEY

PARAMETERS, TCL, CONFIG = "firmware/parameters.h", "project.tcl", "hls4ml_config.yml"
CONSTANT = re.compile(r"^\s*static const \w+ (\w+) = (\w+);", re.MULTILINE)
SETTING = re.compile(r"^set (\w+) \"?([^\"\n]*)\"?$", re.MULTILINE)
NUMBERS = {"clock_period": "ClockPeriod", "part": "Part"}  # of project.tcl, by their names in hls4ml_config.yml


def constants(project: Path) -> dict[str, str]:
    """Return the constants of a multiplexed project's firmware/parameters.h as they are written there.

    Raises InputError if it cannot be read.
    """
    return dict(CONSTANT.findall(read_text(project / PARAMETERS, f"{project} is not a whole project: export it again")))


def check_engines(project: Path, manifest: dict[str, Any]) -> None:
    """Raise InputError for a multiplexed project whose engines the closed form does not know: those of another version
    (which have other sizes, or wrote single values to the output)."""
    needed = {field.name for field in fields(Hardware)} - set(OPTIONAL)
    if set(manifest["hardware"]) - set(OPTIONAL) != needed or MANIFEST_KEY not in manifest:
        raise InputError(f"{project} has engines of another version, whose cost is not known here: export it again")


def hardware_of(project: Path, manifest: dict[str, Any]) -> Hardware:
    """Return the engines of a multiplexed project as its sources have them now.

    Raises InputError for engines of another version, and constants that are no numbers.
    """
    check_engines(project, manifest)
    known = manifest["hardware"]
    found = dict(known)
    for name, text in constants(project).items():
        if name in known and type(known[name]) is int:
            try:
                found[name] = int(text.removesuffix("u"), 0)
            except ValueError:
                raise InputError(f"{project / PARAMETERS}: {name} is {text}, give a whole number") from None
    return Hardware(**found)


def apart(project: Path, hardware: Hardware) -> list[str]:
    """Return which constants of parameters.h that follow from others do not, "group 4, not 1" say: the closed form is
    of engines in which they do."""
    found = constants(project)
    wanted = {name: str(int(getattr(hardware, name))) for name in DERIVED}
    return [f"{name} {value}, not {found[name]}" for name, value in wanted.items() if found.get(name, value) != value]


def clock_mhz(project: Path) -> float:
    """Return the clock that a project asks for in project.tcl, in MHz. Raises InputError if it says none."""
    found = dict(SETTING.findall(read_text(project / TCL, f"{project} is not a whole project: export it again")))
    try:
        return 1000 / float(found["clock_period"])
    except (KeyError, ValueError, ZeroDivisionError):
        raise InputError(f"{project / TCL} has no line `set clock_period NANOSECONDS`: put it back") from None


def _exported(project: Path, manifest: dict[str, Any], name: str) -> tuple[dict[str, str], re.Pattern[str]]:
    """Return the values that a file was exported with, where they are known, and what finds them in it."""
    if name == TCL:
        config = yaml.safe_load((project / CONFIG).read_text())
        return {ours: str(config[theirs]) for ours, theirs in NUMBERS.items() if theirs in config}, SETTING
    if name == PARAMETERS and "hardware" in manifest:
        return {key: str(int(value)) for key, value in manifest["hardware"].items()}, CONSTANT
    return {}, CONSTANT


def said_changes(project: Path, manifest: dict[str, Any], changed: list[str]) -> dict[str, str]:
    """Return of each edited file what changed in it, "tile_out 64, now 32" say; of others an empty text."""
    said = {}
    for name in changed:
        before, pattern = _exported(project, manifest, name)
        now = dict(pattern.findall((project / name).read_text(errors="replace"))) if before else {}
        different = [key for key in before if key in now and not _same(before[key], now[key])]
        said[name] = ", ".join(f"{key} {before[key]}, now {now[key]}" for key in different)
    return said


def _same(before: str, now: str) -> bool:
    return now in (before, {"0": "false", "1": "true"}.get(before))
