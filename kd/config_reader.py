"""Read recipes: YAML files, `per_data` variants and `--set`, checked all at once.

A message names the file, the dotted place, what was got and the nearest key.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kd.config import Data
from kd.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Recipe = TypeVar("Recipe", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise ConfigError(f"key {key!r} is given twice in the mapping at line {line}")
        return typing.cast("dict[Any, Any]", super().construct_mapping(node, deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


class Merged:
    """Nested values together with the file that each one came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origin: dict[tuple[str, ...], str] = {}

    def merge(self, values: Mapping[str, Any], source: str, at: tuple[str, ...] = ()) -> None:
        """Lay `values` over what is there, mapping by mapping; lists and scalars replace."""
        place = self.values
        for key in at:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        for raw, value in values.items():
            key = str(raw)
            here = (*at, key)
            self.origin[here] = source
            if isinstance(value, Mapping) and value:
                if not isinstance(place.get(key), dict):
                    place[key] = {}
                self.merge(value, source, here)
            else:
                place[key] = value

    def source_of(self, place: tuple[str, ...]) -> str:
        """The file that last wrote the place or, for a missing key, what is around it."""
        for length in range(len(place), 0, -1):
            if place[:length] in self.origin:
                return self.origin[place[:length]]
        return next(iter(self.origin.values()), "recipe")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file that holds a mapping."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name}: expected a mapping at the top, got {content!r}")
    return content


def find_config(kind: str, name: str) -> Path:
    """The file configs/KIND/NAME.yaml; an unknown name lists the near ones."""
    path = CONFIGS / kind / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (CONFIGS / kind).glob("*.yaml"))
        near = difflib.get_close_matches(name, known, 3, 0.4) or known
        raise ConfigError(
            f"{name}: no recipe configs/{kind}/{name}.yaml; there are: {', '.join(near)}. "
            "A file of your own is named with --config PATH"
        )
    return path


def _setting(text: str) -> tuple[tuple[str, ...], Any]:
    place, equals, value = text.partition("=")
    if not equals or not all(place.split(".")):
        raise ConfigError(f"--set {text}: expected a.b=value")
    try:
        return tuple(place.split(".")), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML") from error


def load_recipe(
    model: type[Recipe], path: Path, *, data: str | None = None, settings: Iterable[str] = ()
) -> Recipe:
    """Read a recipe: its file, the data set it names, its variant for that data set, --set.

    Args:
        model: The schema, a pydantic model.
        path: The recipe's YAML. Its `data` is a name of configs/data, a mapping, or both:
            `{name: coco, size: 256}` starts from configs/data/coco.yaml.
        data: Replaces the recipe's data set, as `--data` does.
        settings: `a.b=value` texts; the value is YAML.

    Raises:
        ConfigError: One line per mistake, all mistakes at once.
    """
    content = read_yaml(path)
    variants = content.pop("per_data", {})
    own = content.pop("data", "scenes")
    own = {"name": own} if isinstance(own, str) else own
    if not isinstance(own, dict) or not isinstance(variants, dict):
        raise ConfigError(f"{path.name}: data and per_data must be mappings (or data a name)")
    if data is not None:
        own = {"name": data}
    name = str(own.get("name", "unnamed"))
    merged = Merged()
    if data is not None or "train" not in own:
        data_path = find_config("data", name)
        merged.merge({"data": {"name": name, **read_yaml(data_path)}}, data_path.name)
    merged.merge(content, path.name)
    merged.merge({"data": own}, path.name)
    if name in variants:
        merged.merge(variants[name] or {}, f"{path.name} (per_data.{name})")
    for text in settings:
        place, value = _setting(text)
        merged.merge({place[-1]: value}, f"--set {text}", place[:-1])
    return validate(model, merged)


def validate(model: type[Recipe], merged: Merged) -> Recipe:
    """Check merged values against the schema, reporting every mistake in one error."""
    try:
        return model.model_validate(_tuples(merged.values))
    except ValidationError as error:
        lines = [_line(model, merged, mistake) for mistake in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def from_plain(model: type[Recipe], values: Mapping[str, Any], source: str) -> Recipe:
    """Read back the resolved config of a run folder or checkpoint."""
    merged = Merged()
    merged.merge(values, source)
    return validate(model, merged)


def to_yaml(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)


def _tuples(value: Any) -> Any:
    """YAML has lists where the frozen schema has tuples; strict validation tells them apart."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _line(model: type[BaseModel], merged: Merged, mistake: ErrorDetails) -> str:
    place = tuple(str(part) for part in mistake["loc"])
    where = f"{merged.source_of(place)}: {'.'.join(place) or 'recipe'}"
    if mistake["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], _keys_at(model, place[:-1]), 1, 0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        known = "" if near else f"; known keys: {', '.join(_keys_at(model, place[:-1]))}"
        return f"{where}: unknown key{hint}{known}"
    if mistake["type"] == "missing":
        return f"{where}: missing key"
    message = mistake["msg"].removeprefix("Value error, ")
    got = "" if isinstance(mistake["input"], dict) else f", got {mistake['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{got}"


def _keys_at(model: type[BaseModel], place: tuple[str, ...]) -> list[str]:
    """The keys that the schema knows at a place."""
    current: Any = model
    for part in place:
        for candidate in _alternatives(current):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                field = candidate.model_fields.get(part)
                if field is not None:
                    current = field.annotation
                    break
            elif get_origin(candidate) in (dict, tuple):
                current = get_args(candidate)[1 if get_origin(candidate) is dict else 0]
                break
    models = [c for c in _alternatives(current) if isinstance(c, type) and issubclass(c, BaseModel)]
    return [name for found in models for name in found.model_fields]


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return list(get_args(annotation))
    return [annotation]


def data_config(name: str, settings: Iterable[str] = ()) -> Data:
    """A data set's section alone, for commands that take no recipe."""
    path = find_config("data", name)
    merged = Merged()
    merged.merge({"name": name, **read_yaml(path)}, path.name)
    for text in settings:
        place, value = _setting(text)
        merged.merge({place[-1]: value}, f"--set {text}", place[:-1])
    return validate(Data, merged)
