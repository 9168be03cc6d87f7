"""Whether the values of a configuration are of its fields' types; functions that are named. No torch."""

import pkgutil
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from m3vit.errors import InputError


def check_values(section: str, settings: Any, imported: Mapping[str, Any] | None = None) -> None:
    """Raise InputError, naming `section.key`, for the first value that is not of the type its class says.

    `imported`: what the types name that their module imports for type checkers alone.
    """
    for key, hint in get_type_hints(type(settings), localns=imported).items():
        value = getattr(settings, key)
        if get_origin(hint) is ClassVar or fits(value, hint):
            continue
        if get_origin(hint) is Literal:
            raise InputError(not_among(f"{section}.{key}", value, get_args(hint)))
        expected = hint.__name__ if isinstance(hint, type) and not get_args(hint) else hint
        raise InputError(f"{section}.{key} is {str(value)[:80]!r}, expected {expected}")


def not_among(key: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return what is said of a value that is none of several words."""
    return f"{key} is {str(value)[:80]!r}: choose from {', '.join(choices)}"


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value, perhaps read from YAML, is of an annotated type; lists stand for tuples."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if kind is Literal:
        return isinstance(value, str) and value in inner
    if kind is list:
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if kind is tuple and inner[1:] == (...,):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if kind is tuple:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(inner)
            and all(fits(item, one) for item, one in zip(value, inner, strict=True))
        )
    if kind in (dict, Mapping):
        return isinstance(value, kind) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def function_at(what: str, function: str | Callable[..., Any]) -> Callable[..., Any]:
    """Return a function, or the one at "module:function"; raise InputError, which says of `what`, if there is none."""
    if not isinstance(function, str):
        return function
    try:
        found: Callable[..., Any] = pkgutil.resolve_name(function)
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{what}: {function} cannot be imported ({error})") from None
