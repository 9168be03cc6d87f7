"""What messages tell people to do can be done: the commands, options and names in them exist."""

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

from m3vit.cli import COMMANDS, EXTRAS
from m3vit.commands import sweep
from m3vit.plugins import GROUP, THINGS
from m3vit.training.config import SECTIONS, Config
from tests.conftest import ROOT

# Words that follow the project's name where no command is meant ("is not an m3vit package's").
PROSE = {"package", "reads", "sets", "or"}
OTHERS = {"--shm-size", "--ntasks-per-node", "--distribution"}  # options of other programs: docker, srun
FILES = ("json", "h", "cpp", "bit", "hwh")  # m3vit.json is a file, m3vit.hw a module
OPTION = r"(?<![\w-])--[a-z][a-z0-9_.-]*[a-z0-9]"


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the strings of a module that people may get to read, with their lines: no docstrings."""
    tree = ast.parse(path.read_text())
    quiet: set[int] = set()  # docstrings, and the parts of f-strings, which are read as a whole
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                quiet.add(id(first.value))
        elif isinstance(node, ast.JoinedStr):
            quiet |= {id(part) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in quiet:
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))


@cache
def said() -> list[tuple[Path, int, str]]:
    """Return every such string of the project: module, line, text."""
    modules = sorted(path for folder in ("m3vit", "export", "hw", "data") for path in (ROOT / folder).rglob("*.py"))
    return [(path, line, text) for path in modules for line, text in texts(path)]


def options() -> set[str]:
    """Every option of every command."""
    known = {"--help", "--version", "--plugin"}
    known |= {"--config", "--resume", "--out", "--json", "--task", "--train", "--device"}  # of training
    known |= {name for action in sweep.arguments()._actions for name in action.option_strings}
    for section in SECTIONS:
        known |= {f"--{section}.{key.name}" for key in fields(getattr(Config(), section))}
    for _, add_arguments, _ in COMMANDS.values():
        parser = argparse.ArgumentParser()
        if add_arguments:
            add_arguments(parser)
        known |= {name for action in parser._actions for name in action.option_strings}
    return known


def test_options_in_messages_exist() -> None:
    known, found = options(), 0
    for path, line, text in said():
        if re.fullmatch(r"--\S+", text):  # an argument itself, of our parser or another program
            continue
        for option in re.findall(OPTION, text):
            entry_of = option.rpartition(".")[0]  # a key's, that is a mapping
            assert {option, entry_of} & (known | OTHERS), f"{path}:{line}: no command has {option}: {text!r}"
            found += 1
    assert found > 100


def test_commands_in_messages_exist() -> None:
    found = 0
    for path, line, text in said():
        for words in re.findall(r"\bm3vit ([a-z]+(?: [a-z]+)?)", text):
            first = words.split()[0]
            known = words in COMMANDS or first in COMMANDS
            assert known or first in PROSE, f"{path}:{line}: no command m3vit {words}: {text!r}"
            found += known
    assert found > 30


def test_names_in_messages_exist() -> None:
    for path, line, text in said():
        for name in re.findall(r"\bm3vit(?:\.[a-z_]+)+\b", text):
            module, _, attribute = name.rpartition(".")
            if attribute in FILES or name in (GROUP, *THINGS):  # entry points
                continue
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), attribute), f"{path}:{line}: no {name}: {text!r}"


def test_extras_in_messages_exist() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    for extra in {*EXTRAS.values(), *(name for _, _, text in said() for name in re.findall(r"m3vit\[(\w+)\]", text))}:
        assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), extra


def test_all_of_a_message_is_read(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""--docs are not said."""\nraise ValueError(f"{1} or " "give --nothing " f"{2} {3}")\n')
    assert list(texts(module)) == [(2, "{} or give --nothing {} {}")]
