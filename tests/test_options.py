"""Options declared once: what the command line makes of a dataclass; Python has the same names and defaults."""

import argparse
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from m3vit.commands.data import Check, Prepare, Synth
from m3vit.commands.routing import Panel, Routing
from m3vit.data.synthetic.dataset import synthesize
from m3vit.data.tools.check import check
from m3vit.data.tools.prepare import prepare_nyud
from m3vit.export.hls.options import Request
from m3vit.export.hls.project import export_project
from m3vit.export.runtime.options import Loading
from m3vit.export.runtime.package import Package
from m3vit.options import Positive, Size, Value, add_options, options
from m3vit.report.panel import write_panel
from m3vit.report.routed import measure


@dataclass(frozen=True)
class Wanted:
    """What a command is told.

    Attributes:
        folder: where to
            look: in {words}
        size: of the images
        names: of tasks
        way: how
        few: so many (default: all)
        many: more than few
        quiet: say nothing
        inner: of programs
    """

    folder: Annotated[Path, Value(positional=True)]
    size: Size = (3, 4)
    names: tuple[Annotated[str, Value(flag="task.names")], ...] = ("a", "b")
    way: Literal["fast", "slow"] | None = None
    few: Positive | None = None
    many: Positive = 0
    quiet: bool = False
    inner: Annotated[dict | None, Value(hidden=True)] = None


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, Wanted, exclusive=("few", "many"), words="words")
    return parser


def test_help_is_the_docstring_with_the_defaults(parser: argparse.ArgumentParser) -> None:
    assert {action.dest: action.help for action in parser._actions[1:]} == {
        "folder": "where to look: in words",
        "size": "of the images (default: 3x4)",
        "names": "of tasks (default: a b)",
        "way": "how",
        "few": "so many (default: all)",
        "many": "more than few (default: 0)",
        "quiet": "say nothing",
    }


def test_what_is_given_and_what_is_not(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["here"])
    assert vars(args) == {"folder": Path("here")}
    assert options(Wanted, args, inner={}) == Wanted(Path("here"), inner={})
    words = "here --size 5x6 --task.names c --way slow --many 2 --quiet"
    found = options(Wanted, parser.parse_args(words.split()))
    assert found == Wanted(Path("here"), (5, 6), ("c",), "slow", many=2, quiet=True)


@pytest.mark.parametrize("words", ["--way x", "--size 5", "--few 1 --many 2", "--few 0"])
def test_what_cannot_be(parser: argparse.ArgumentParser, words: str) -> None:
    with pytest.raises(argparse.ArgumentError):
        parser.parse_args(["here", *words.split()])


@pytest.mark.parametrize(
    ("declared", "function"),
    [
        (Loading, Package.load),
        (Synth, synthesize),
        (Prepare, prepare_nyud),
        (Check, check),
        (Request, export_project),
        (Routing, measure),
        (Panel, write_panel),
    ],
)
def test_functions_have_the_same_names_and_defaults(declared: type, function: Callable[..., Any]) -> None:
    taken = {name: given.default for name, given in signature(function).parameters.items()}
    told = {field.name: field.default for field in fields(declared) if field.default is not MISSING}
    elsewhere = {"json", "data_root"} | ({"samples"} if declared is Request else set())  # what the command itself does
    assert {name: default for name, default in told.items() if name not in elsewhere}.items() <= taken.items()
