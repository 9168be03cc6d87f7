"""Plug-ins: modules that add tasks, kinds, label sets, layouts, decoders and losses when they are imported. No torch.

A plug-in is named as a module or as the path of a .py file: with `--plugin`, or by an installed package, as an entry
point of the group m3vit.plugins, or of one of `THINGS`, which names the one thing that it adds. A run records those it
was trained with. Only those of installed packages are imported when it is opened: a run folder from elsewhere must not
make a program run what its user did not name.
"""

import importlib
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from m3vit.errors import InputError, one_line

GROUP = "m3vit.plugins"
# Groups whose entry points name what they add: tasks, label sets and layouts, decoders, losses; in this order.
THINGS = ("m3vit.tasks", "m3vit.datasets", "m3vit.decoders", "m3vit.losses")

_loaded: dict[str, str] = {}  # name of the module -> as it was given, a file as its absolute path
_missing: dict[str, str] = {}  # as a run has it -> the run
STATE = (_loaded, _missing)  # for tests, which put it back


def load(given: str) -> None:
    """Import a plug-in, once, or raise InputError saying why it cannot be."""
    name = _name(given)
    if _loaded.get(name) == _recorded(given):
        return
    if name in _loaded:
        raise InputError(f"plug-in {given}: {_loaded[name]} has the same name: rename one of them")
    if not name.rpartition(".")[2].isidentifier():
        raise InputError(f"plug-in {given!r}: give the name of a module, or a .py file whose name is one")
    origin = _origin(name)
    if _is_file(given) and origin not in (None, _recorded(given)):
        raise InputError(f"plug-in {given}: there is a module {name} already, call the file otherwise")
    if not (Path(given).is_file() if _is_file(given) else origin):
        raise InputError(f"plug-in {given} not found: give the name of an installed module, or a .py file")
    try:
        if _is_file(given):
            _import_file(name, Path(given).resolve())
        else:
            importlib.import_module(name)
    except InputError as error:
        raise InputError(f"plug-in {given}: {error}") from error
    except (Exception, SystemExit) as error:  # of any kind: it is somebody's program
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        raise InputError(
            f"plug-in {given} cannot be imported ({type(error).__name__} in {where}: {one_line(error, 300)}): mend it"
        ) from error
    _loaded[name] = _recorded(given)
    _missing.pop(_recorded(given), None)


def _import_file(name: str, path: Path) -> None:
    if name in sys.modules:  # in a process of a pool, which imports the classes of what it is sent
        return
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # processes started afresh import classes of the module by its name


def load_installed() -> None:
    """Import the plug-ins of installed packages, or raise InputError."""
    installed = _installed()
    for entry in installed[GROUP]:
        try:
            load(entry.module)
        except InputError as error:
            package = entry.dist.name if entry.dist else "a package"
            raise InputError(f"{error}; {package} brings it (entry point {entry.name} of {GROUP})") from error
    for group in THINGS:
        for entry in installed[group]:
            _add_thing(group, entry)


def _installed() -> dict[str, Any]:
    """Return the entry points of installed packages by group; all packages' files are read for it."""
    from importlib.metadata import entry_points  # takes longer than all of this module

    every = entry_points()
    return {group: every.select(group=group) for group in (GROUP, *THINGS)}


def _add_thing(group: str, entry: Any) -> None:
    """Add what an entry point of `THINGS` names, once, or raise InputError saying which package brings it."""
    recorded = f"{group}:{entry.name}"
    if recorded in _loaded:
        return
    try:
        _add(group, entry)
    except Exception as error:  # of any kind: it is somebody's program
        package = entry.dist.name if entry.dist else "a package"
        words = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {one_line(error, 300)}"
        raise InputError(f"{words}; {package} brings it (entry point {entry.name} of {group}): mend it") from error
    _loaded[recorded] = recorded
    _missing.pop(recorded, None)


def _add(group: str, entry: Any) -> None:
    from m3vit.data.opening import add_layout
    from m3vit.label_sets import LabelSet, add_label_set
    from m3vit.losses import add_loss
    from m3vit.models.decoders import add_decoder
    from m3vit.tasks import add_task

    if group == "m3vit.decoders":  # where it is: with torch, and so imported when it is used
        add_decoder(entry.name, entry.value, ("head_stride",))
    elif group == "m3vit.losses":
        add_loss(entry.name, entry.value)
    else:
        found = entry.load()
        for one in found if isinstance(found, list | tuple) else (found,):
            if group == "m3vit.tasks":
                add_task(one)
            elif isinstance(one, LabelSet):
                add_label_set(one)
            else:
                add_layout(one)


def loaded() -> list[str]:
    """Return the plug-ins of this process, as a run records them: names of modules, absolute paths of files."""
    return list(_loaded.values())


def recall(recorded: Sequence[str], where: str) -> None:
    """Import what installed packages bring of the plug-ins that a run records; `advice` says what is then missing.

    No other module is imported because a run names it. What is missing is no error: a run whose model needs nothing of
    it opens without. `where`: what to call the run, if `advice` is to speak of it.
    """
    if all(_name(given) in _loaded for given in recorded):
        return
    installed = _installed()
    brought = {entry.module for entry in installed[GROUP]}
    things = {f"{group}:{entry.name}": (group, entry) for group in THINGS for entry in installed[group]}
    for given in recorded:
        if _name(given) in _loaded:
            continue
        if given in brought:
            load(given)
        elif given in things:
            _add_thing(*things[given])
        elif where:
            _missing[given] = where


def advice() -> str:
    """Return, to be added to an error, which plug-ins of the runs that were opened are missing; empty if none is."""
    return "".join(
        f"; {where} was trained with the plug-in {given}: "
        + ("install the package that brings it" if given.startswith(THINGS) else "give --plugin")
        for given, where in _missing.items()
    )


def take(words: Sequence[str]) -> list[str]:
    """Import the plug-ins that a command line gives; return the other words."""
    _missing.clear()
    given, others = [], []
    rest = iter(words)
    for word in rest:
        if word == "--plugin":
            value = next(rest, "")
        elif word.startswith("--plugin="):
            value = word.partition("=")[2]
        elif word.partition("=")[0] == "--plugins":
            raise InputError("plugins is a key of files, which a run notes in its config.yaml: give --plugin MODULE")
        else:
            others.append(word)
            continue
        if not value or value.startswith("-"):
            raise InputError("--plugin expects one argument: the name of a module, or a .py file")
        given.append(value)
    for value in given:
        load(value)
    return others


def _is_file(given: str) -> bool:
    return given.endswith(".py") or "/" in given


def _name(given: str) -> str:
    return Path(given).stem if _is_file(given) else given


def _recorded(given: str) -> str:
    return str(Path(given).resolve()) if _is_file(given) else given


def _origin(name: str) -> str | None:
    """Return the file that a module of this name comes from, or None if there is none."""
    try:
        spec = find_spec(name)
    except ImportError:  # of the package that a dotted name is in
        return None
    except ValueError:  # of the package, or a module that came from no file, such as __main__
        return name if name in sys.modules else None
    return (spec.origin or name) if spec else None
