"""Options, each declared once: a dataclass says name, type, default and help, for Python and the command line alike.

Parsing needs no torch: modules of such dataclasses import nothing that is slow to load.
"""

import argparse
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from inspect import cleandoc
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Value:
    """How the command line takes a field, beside its type: `Annotated[int, Value(positive, "N")]`.

    read: parses the word given. metavar: what help calls it. choices: makes the list of what it may be. flag: its name
    where not the field's. positional: it is given without a name. hidden: it is given from Python alone.
    """

    read: Callable[[str], Any] | None = None
    metavar: str | None = None
    choices: Callable[[], Iterable[Any]] | None = None
    flag: str = ""
    positional: bool = False
    hidden: bool = False


def image_size(text: str) -> tuple[int, int]:
    """Parse "96x128" as (height, width)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"size {text!r}: give HEIGHTxWIDTH, such as 96x128")
    return int(parts[0]), int(parts[1])


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a positive whole number")
    return int(text)


def words(text: str) -> tuple[str, ...]:
    """Parse names between commas."""
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r}: give names with commas between them and at no end")
    return found


def count(text: str) -> int:
    """Parse an integer of 0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 0 or more")
    return int(text)


def share(text: str) -> float:
    """Parse a share, above 0 up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number above 0, up to 1")
    return value


Number = Annotated[int, Value(int, "N")]
Positive = Annotated[int, Value(positive, "N")]
Size = Annotated[tuple[int, int], Value(image_size, "HEIGHTxWIDTH")]
Folder = Annotated[Path, Value(metavar="DIR")]
File = Annotated[Path, Value(metavar="FILE")]
DataRoot = Annotated[str, Value(metavar="DIR", flag="data.root")]
RunFolder = Annotated[Path, Value(metavar="RUN", positional=True)]


def helps(cls: type) -> dict[str, str]:
    """Return what a class's docstring says of each of its attributes."""
    section = cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def add_options(
    parser: argparse.ArgumentParser, *classes: type, exclusive: Iterable[str] = (), **words: object
) -> None:
    """Add an argument for each field; of the `exclusive` ones a user may give one. `words` are put into the help.

    What is not given is not in the parsed namespace: defaults are the dataclass's alone.
    """
    group = parser.add_mutually_exclusive_group() if exclusive else parser
    for cls in classes:
        texts, hints = helps(cls), get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            kind, value, several = _read(hints[field.name])
            if value.hidden:
                continue
            keywords: dict[str, Any] = {"help": texts.get(field.name, "").format(**words)}  # -OO leaves none
            if shown := _shown(field.default, " " if several else "x"):
                keywords["help"] += f" (default: {shown})"
            if kind is bool:
                keywords["action"] = "store_true"
            else:
                literal = get_origin(kind) is Literal
                choices = get_args(kind) if literal else value.choices and value.choices()
                keywords |= {"type": str if literal else value.read or kind, "metavar": value.metavar}
                keywords |= {"choices": list(choices) if choices else None, "nargs": "+" if several else None}
            if value.positional:
                parser.add_argument(field.name, **keywords)
                continue
            name = f"--{value.flag or field.name.replace('_', '-')}"
            required = field.default is MISSING and field.default_factory is MISSING
            (group if field.name in exclusive else parser).add_argument(
                name, dest=field.name, required=required, default=argparse.SUPPRESS, **keywords
            )


def _read(hint: Any) -> tuple[Any, Value, bool]:
    """Return a hint's own type, what it says of the command line, and whether it is of several."""
    value, several = Value(), False
    while True:
        origin, inside = get_origin(hint), get_args(hint)
        if origin is Annotated:
            hint, value = inside[:2]
        elif origin in (Union, UnionType):  # X | None
            hint = inside[0]
        elif origin is tuple and inside[-1] is ... and value.read is None:
            hint, several = inside[0], True
        else:
            return hint, value, several


def _shown(default: object, between: str) -> str:
    """Return a default as one would give it; "" for none and for what is off, which the help explains."""
    if default is MISSING or default is None or isinstance(default, bool):
        return ""
    return between.join(str(part) for part in default) if isinstance(default, tuple) else str(default)


def options(cls: type[T], args: argparse.Namespace, **others: Any) -> T:
    """Return the dataclass of what was given, and of `others`."""
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items()}
    return cls(**{name: value for name, value in given.items() if name in names} | others)


def command(
    cls: type[T], execute: Callable[[T], int | None]
) -> tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int | None]]:
    """Return what adds a command's arguments, and what runs it with what was parsed: a command of one dataclass."""
    return lambda parser: add_options(parser, cls), lambda args: execute(options(cls, args))
