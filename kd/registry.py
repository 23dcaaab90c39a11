"""Look a name up in a dict, and check options against the signature of what they go to.

A catalogue is a dict literal beside what it lists. The signature of an entry is the schema of its
options, so that nothing has to be written twice. No torch here: any module may import this one.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from kd.errors import ConfigError, UserError

T = TypeVar("T")


def nearest(name: str, names: Iterable[str], *, count: int = 3) -> list[str]:
    """The names most like a mistyped one, best first; empty where none comes near."""
    by_folded = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=count, cutoff=0.5)
    return [by_folded[folded] for folded in close]


def look_up(catalog: Mapping[str, T], name: str, *, what: str) -> T:
    """The entry of that name.

    Args:
        catalog: The dict to look in.
        name: The key that the user gave.
        what: What the catalogue lists, for the message: "teacher".

    Raises:
        UserError: No such name; the message lists the nearest ones, or all of a few.
    """
    if name in catalog:
        return catalog[name]
    raise UserError(f"unknown {what} {name!r}{suggestion(name, catalog)}")


def suggestion(name: str, names: Iterable[str]) -> str:
    """The tail of a message about an unknown name: the nearest, or all of a few."""
    known = sorted(names)
    close = nearest(name, known)
    if close:
        return "; did you mean " + " or ".join(repr(one) for one in close) + "?"
    if len(known) <= 12:
        return "; known: " + (", ".join(known) or "none")
    return f"; known: {', '.join(known[:12])} and {len(known) - 12} more"


def check_options(
    builder: Callable[..., object],
    options: Mapping[str, object],
    *,
    what: str,
    given: Iterable[str] = (),
) -> None:
    """Check option names and simple types against the builder's keyword-only parameters.

    Args:
        builder: A function, a class or a `functools.partial` of one.
        options: What the user wrote.
        what: Where they wrote it, for the message: "teacher 'unet'".
        given: Keyword-only parameters that the program fills in itself; not for the user to set.

    Raises:
        ConfigError: One line per mistake, all mistakes at once.
    """
    filled = set(given)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(builder).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in filled
    }
    annotations = _annotations(builder)
    mistakes = []
    for name, value in options.items():
        if name not in parameters:
            mistakes.append(f"{what}: unknown option {name!r}{suggestion(name, parameters)}")
            continue
        expected = annotations.get(name, Any)
        if not _fits(value, expected):
            mistakes.append(
                f"{what}: option {name!r} must be {_spell(expected)}, "
                f"got {value!r} ({type(value).__name__})"
            )
    mistakes += [
        f"{what}: option {name!r} is missing"
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in options
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def accepted(builder: Callable[..., object], **given: object) -> dict[str, object]:
    """Those of some arguments that a builder has a parameter for.

    A network that maps where people look has no classes, so `num_classes` does not go to it.
    """
    parameters = inspect.signature(builder).parameters
    return {name: value for name, value in given.items() if name in parameters}


def build(
    catalog: Mapping[str, Callable[..., T]],
    name: str,
    options: Mapping[str, object],
    *,
    what: str,
    **given: object,
) -> T:
    """Look a builder up, check the user's options, and call it with them.

    Args:
        catalog: Name to builder.
        name: The user's choice.
        options: The user's options, checked against the keyword-only parameters.
        what: What the catalogue lists: "teacher".
        **given: Arguments that the program knows, such as `num_classes`.

    Raises:
        UserError: An unknown name.
        ConfigError: Wrong options, all of them at once.
    """
    builder = look_up(catalog, name, what=what)
    check_options(builder, options, what=f"{what} {name!r}", given=given)
    return builder(**given, **options)


def _annotations(builder: Callable[..., object]) -> dict[str, Any]:
    """Resolved annotations of the function behind classes and partials."""
    while isinstance(builder, functools.partial):
        builder = builder.func
    target = builder.__init__ if isinstance(builder, type) else builder  # type: ignore[misc]
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError):  # a name imported only for type checkers, or a C function
        return {}


def _fits(value: object, expected: Any) -> bool:
    """Whether a value read from YAML suits an annotation; annotations not understood pass."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return True
    if expected is None or expected is type(None):
        return value is None
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if expected is bool:
        return isinstance(value, bool)
    if expected in (int, float):  # true is an int for Python, and a mistake in YAML
        kinds = (int,) if expected is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if expected is str:
        return isinstance(value, str)
    if origin in (list, tuple, Sequence):
        return _fits_sequence(value, origin, arguments)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    return True


def _fits_sequence(value: object, origin: Any, arguments: tuple[Any, ...]) -> bool:
    """A list fits a tuple: YAML has no tuples."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(
            _fits(item, kind) for item, kind in zip(value, arguments, strict=True)
        )
    return all(_fits(item, arguments[0]) for item in value) if arguments else True


def _spell(expected: Any) -> str:
    """An annotation in a user's words."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(choice) for choice in arguments)
    if expected is type(None):
        return "null"
    if origin in (list, tuple, Sequence):
        kinds = [_spell(one) for one in arguments if one is not Ellipsis]
        return f"a list of {', '.join(kinds)}" if kinds else "a list"
    return str(getattr(expected, "__name__", expected))
