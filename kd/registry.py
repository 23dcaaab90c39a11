"""Look up names in registries, and check options against builders.

A registry is a plain dict from name to `Entry`, read without torch: only `Entry.load` and `resolve`
import the target of an entry. The signature of a builder is the schema of its options.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from kd.errors import ConfigError, UserError

T = TypeVar("T")
PYDANTIC_WORDS = {
    "a valid tuple": "a list",
    "Field required": "have more items",
    "Tuple should ": "",
    " after validation": "",
}
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
FAMILY = "NAME"  # placeholder in the entry of a family: "timm/NAME"
MOST = 40  # names listed if none is near


@dataclass(frozen=True)
class Entry:
    """What a registered name stands for.

    Attributes:
        target: "package.module:attribute".
        help: One line for `--list`.
        problem: Name of the kind of problem that it is for; empty: any.
        args: Positional arguments bound to the target.
        options: Keyword arguments bound to it; the user's options replace them.
    """

    target: str
    help: str
    problem: str = ""
    args: tuple[object, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)

    def load(self) -> Any:
        """Import the target, bound to `args` and `options` if there are any."""
        loaded = load_target(self.target)
        if self.args or self.options:
            return functools.partial(loaded, *self.args, **self.options)
        return loaded

    def named(self, name: str) -> Entry:
        """Entry of a member of a family: `name` replaces the placeholder, as in "timm/NAME"."""

        def filled(value: object) -> object:
            return name if isinstance(value, str) and value.endswith(f"/{FAMILY}") else value

        options = {key: filled(value) for key, value in self.options.items()}
        return replace(self, args=tuple(map(filled, self.args)), options=options)


def load_target(target: str, *, what: str = "") -> Any:
    """Import "package.module:attribute", where the attribute may be dotted.

    Args:
        target: The module and attribute.
        what: Begins messages: "student".

    Raises:
        UserError: No such module or attribute.
    """
    where = f"{what} {target!r}".strip()
    path, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # an error inside the module
        raise UserError(
            f"{where}: no module {error.name!r}; it must be importable from the working directory "
            "or PYTHONPATH"
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{where}: {path} has no {part!r}{suggestion(part, vars(found))}")
        found = getattr(found, part)
    return found


def is_foreign(name: str) -> bool:
    """Whether a name is a user's own `package.module:attribute`."""
    path, colon, attribute = name.partition(":")
    return bool(colon and path and attribute)


def find(registry: Mapping[str, T], name: str, *, what: str) -> T | Entry:
    """The registry's value for a name, without importing its target.

    Args:
        registry: The dict.
        name: One of its keys, a member of one of its families (`timm/resnet18` where the registry
            has "timm/NAME"), or the user's own `package.module:attribute`.
        what: Kind of the values, for messages: "teacher".

    Raises:
        UserError: An unknown name; the message lists all names, the nearest first.
    """
    if name in registry and not name.endswith(f"/{FAMILY}"):
        return registry[name]
    library, slash, rest = name.partition("/")
    family = registry.get(f"{library}/{FAMILY}") if slash and rest else None
    if isinstance(family, Entry):
        return family.named(name)
    if is_foreign(name):
        return Entry(name, "")
    raise UserError(f"unknown {what} {name!r}{all_names(name, registry)}")


def resolve(registry: Mapping[str, object], name: str, *, what: str) -> Any:
    """Import the target of a name; arguments and errors as `find`."""
    found = find(registry, name, what=what)
    if not isinstance(found, Entry):
        return found
    return load_target(name, what=what) if is_foreign(name) else found.load()


def check_problem(registry: Mapping[str, Entry], name: str, problem: str, *, what: str) -> None:
    """Check that an entry is for a kind of problem; the `UserError` lists the names that fit."""
    entry = find(registry, name, what=what)
    if problem and entry.problem not in ("", problem):
        fitting = sorted(key for key, one in registry.items() if one.problem in ("", problem))
        raise UserError(
            f"{what} {name!r} is for {entry.problem}, not {problem}; {what}s for {problem}: "
            f"{', '.join(fitting)}"
        )


def nearest(name: str, names: Iterable[str], *, count: int = 3) -> list[str]:
    """Names most similar to a mistyped one, best first; empty if none is similar."""
    by_folded = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=count, cutoff=0.5)
    return [by_folded[folded] for folded in close]


def look_up(catalog: Mapping[str, T], name: str, *, what: str) -> T:
    """Return `catalog[name]`, or raise a UserError that lists all names, the nearest first."""
    if name in catalog:
        return catalog[name]
    raise UserError(f"unknown {what} {name!r}{all_names(name, catalog)}")


def suggestion(name: str, names: Iterable[str]) -> str:
    """End of a message about an unknown option or layer: the nearest, or else all known."""
    known = sorted(names)
    if close := nearest(name, known):
        return "; did you mean " + " or ".join(repr(one) for one in close) + "?"
    more = f" and {len(known) - MOST} more" if len(known) > MOST else ""
    return f"; known: {', '.join(known[:MOST]) or 'none'}{more}"


def all_names(name: str, names: Iterable[str]) -> str:
    """End of a message about an unknown name: the nearest, then all others."""
    known = sorted(names)
    close = nearest(name, known)
    others = [one for one in known if one not in close]
    if not close or not others:
        return suggestion(name, known) if close or not known else f"; known: {', '.join(known)}"
    return f"{suggestion(name, known)} The others are {', '.join(others)}"


def check_options(
    builder: Callable[..., object],
    options: Mapping[str, object],
    *,
    what: str,
    given: Iterable[str] = (),
) -> None:
    """Check option names and simple types against the builder's keyword-only parameters.

    A builder with `**options` takes any name.

    Args:
        builder: A function, a class or a `functools.partial` of one.
        options: The user's options.
        what: Begins messages: "teacher 'unet'".
        given: Keyword-only parameters that the program sets, not the user.

    Raises:
        ConfigError: One line per mistake, all mistakes at once.
    """
    filled, every = set(given), inspect.signature(builder).parameters
    any_name = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in every.values())
    parameters = {
        name: parameter
        for name, parameter in every.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in filled
    }
    annotations = _annotations(builder)
    mistakes = []
    for name, value in options.items():
        if name not in filled and name in every and every[name].kind is POSITIONAL:
            mistakes.append(
                f"{what}: option {name!r}: options are keyword-only parameters; write `*` before "
                "this one in the signature"
            )
            continue
        if name not in parameters and (name in filled or not any_name):
            mistakes.append(f"{what}: unknown option {name!r}{suggestion(name, parameters)}")
            continue
        if misfit := _misfit(value, annotations.get(name, Any)):
            kind = type(value).__name__
            mistakes.append(f"{what}: option {name!r} {misfit}, got {value!r} ({kind})")
    mistakes += [
        f"{what}: option {name!r} is missing"
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in options
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def accepted(builder: Callable[..., object], **given: object) -> dict[str, object]:
    """The arguments that a builder has parameters for: saliency networks take no `num_classes`."""
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{builder}: not a function or class that builds a model") from error
    return {name: value for name, value in given.items() if name in parameters}


def with_options(kind: type[Any]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorate a builder whose last parameter is an options dataclass.

    The decorated builder takes the fields of the dataclass as keyword-only parameters instead, so
    that builders share options, their defaults and their documentation by inheritance.
    """

    def decorate(build: Callable[..., T]) -> Callable[..., T]:
        *own, _ = inspect.signature(build).parameters.values()
        signature = inspect.Signature([*own, *inspect.signature(kind).parameters.values()])

        @functools.wraps(build)
        def builder(*args: object, **given: object) -> T:
            options = signature.bind(*args, **given).arguments
            positional = [options.pop(parameter.name) for parameter in own]
            return build(*positional, kind(**options))

        builder.__dict__["__signature__"] = signature
        builder.__annotations__ = typing.get_type_hints(kind)
        return builder

    return decorate


def build(
    registry: Mapping[str, object],
    name: str,
    options: Mapping[str, object],
    *,
    what: str,
    **given: object,
) -> Any:
    """Resolve a name to its builder, check the user's options, and call it.

    Args:
        registry: Name to `Entry`.
        name: The user's choice, as in `find`.
        options: The user's options, checked against the keyword-only parameters.
        what: Kind of the values: "teacher".
        **given: Arguments that the program sets, such as `num_classes`; the builder gets those that
            it has parameters for.

    Raises:
        UserError: An unknown name, or one whose target cannot be called.
        ConfigError: Wrong options, all of them at once.
    """
    builder = resolve(registry, name, what=what)
    if not callable(builder):
        raise UserError(f"{what} {name!r}: expected a builder or a class, got {builder!r:.60}")
    known = accepted(builder, **given)
    check_options(builder, options, what=f"{what} {name!r}", given=known)
    return builder(**known, **options)


def _annotations(builder: Callable[..., object]) -> dict[str, Any]:
    """Type annotations of the function that a class or a partial calls."""
    while isinstance(builder, functools.partial):
        builder = builder.func
    target = builder.__init__ if isinstance(builder, type) else builder  # type: ignore[misc]
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError):  # a name imported only for type checkers, or a C function
        return {}


def _misfit(value: object, annotation: Any) -> str:
    """Say what is wrong with a YAML value for an annotation; "" if nothing is."""
    try:
        adapter = TypeAdapter(annotation, config=STRICT)
    except PydanticSchemaGenerationError:
        return ""
    for candidate in (value, tuples(value)):  # YAML has no tuples
        try:
            adapter.validate_python(candidate)
            return ""
        except ValidationError as error:
            found = dict.fromkeys(one["msg"] for one in error.errors())
    text = " or ".join(message.removeprefix("Input should ") for message in found)
    for theirs, ours in PYDANTIC_WORDS.items():
        text = text.replace(theirs, ours)
    return f"must {text}"


def tuples(value: Any) -> Any:
    """Convert the lists in a YAML value to tuples."""
    if isinstance(value, Mapping):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
