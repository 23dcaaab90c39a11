"""Read recipes: YAML files, `per_data` variants and `--set`; report all mistakes at once.

A message names the file, the dotted place, the wrong value and the nearest key.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kd.config.datasets import NAME, PATHS
from kd.config.json_schema import keys_at
from kd.errors import ConfigError
from kd.registry import all_names, tuples

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
Recipe = TypeVar("Recipe", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise ConfigError(f"key {key!r} occurs twice in the mapping at line {line}")
        return typing.cast("dict[Any, Any]", super().construct_mapping(node, deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


class Merged:
    """Nested values merged from several files, with the file that each value came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origin: dict[tuple[str, ...], str] = {}

    def merge(self, values: Mapping[str, Any], source: str, at: tuple[str, ...] = ()) -> None:
        """Merge `values` into the mapping `at` a path of keys; lists and scalars replace."""
        place = self.values
        for depth, key in enumerate(at, 1):
            if not isinstance(place.get(key), dict):
                place[key] = {}
                self.origin[at[:depth]] = source
            place = place[key]
        for raw, value in values.items():
            key = str(raw)
            here = (*at, key)
            self.origin[here] = source
            if isinstance(value, Mapping) and value:  # an empty mapping replaces the old one
                self.merge(value, source, here)
            else:
                place[key] = value

    def source_of(self, place: tuple[str, ...]) -> str:
        """The file that last wrote a key or, if it is missing, the mapping around it."""
        for length in range(len(place), 0, -1):
            if place[:length] in self.origin:
                return self.origin[place[:length]]
        return next(iter(self.origin.values()), "recipe")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping."""
    name = source_name(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: expected a mapping at the top, got {content!r:.60}")
    return content


def source_name(path: Path) -> str:
    """Name of a file in messages: its path, without the folder if it is one of configs/."""
    return path.name if path.is_relative_to(CONFIGS) else str(path)


def find_config(kind: str, name: str) -> Path:
    """Path of configs/KIND/NAME.yaml; `name` may be the path of your own dataset's file.

    Raises:
        ConfigError: The name is unknown; the message lists all names.
    """
    if kind == "data" and name.endswith((".yaml", ".yml")):
        return Path(name)
    path = CONFIGS / kind / f"{name}.yaml"
    if not path.is_file():
        own = "--data PATH.yaml" if kind == "data" else "--config PATH"
        raise ConfigError(
            f"{name}: no file configs/{kind}/{name}.yaml{all_names(name, known_configs(kind))}. "
            f"A file of your own is named with {own}"
        )
    return path


def known_configs(kind: str) -> list[str]:
    """Names in configs/KIND."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def _setting(text: str) -> tuple[tuple[str, ...], Any]:
    place, equals, value = text.partition("=")
    if not equals or not all(place.split(".")):
        raise ConfigError(f"--set {text}: expected a.b=value")
    try:
        return tuple(place.split(".")), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML") from error
    except ConfigError as error:
        raise ConfigError(f"--set {text}: {error}") from None


def merge_recipe(path: Path, *, data: str | None = None, settings: Iterable[str] = ()) -> Merged:
    """Merge configs/task/TASK.yaml, the recipe's dataset and file, its `per_data` part, and --set.

    Args:
        path: The recipe's YAML. Its `data` is a name of configs/data, a mapping, or both:
            `{name: coco, size: 256}` starts from configs/data/coco.yaml.
        data: Replaces the recipe's dataset, as `--data` does.
        settings: `a.b=value` texts; the value is YAML.

    Raises:
        ConfigError: A file that cannot be read, an unknown dataset, or a malformed setting.
    """
    content, source = read_yaml(path), source_name(path)
    variants = content.pop("per_data", None) or {}
    own = content.pop("data", "scenes")
    own = {"name": own} if isinstance(own, str) else own
    if not isinstance(own, dict) or not isinstance(variants, dict):
        raise ConfigError(f"{source}: data must be a name or a mapping, per_data a mapping")
    if data is not None:
        own = {"name": data}
    whole = bool(own.keys() & {"layout"}) or isinstance(own.get("train"), Mapping)
    name = str(own.get("name", "unnamed" if whole else "scenes"))
    merged = Merged()
    merged.merge(*_of_task(content))
    if data is not None or not whole:
        data_path = find_config("data", name)
        name = own["name"] = data_path.stem
        merged.merge({"data": read_yaml(data_path)}, source_name(data_path))
    merged.merge(content, source)
    merged.merge({"data": own}, source if data is None else f"--data {data}")
    merged.merge(_variant(variants, name, source), f"{source} (per_data.{name})")
    apply_settings(merged, settings)
    return merged


def _of_task(content: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Defaults of a recipe's task, and their file's name for messages."""
    task = content.get("task")
    name = task.get("name") if isinstance(task, Mapping) else None
    if name not in known_configs("task"):
        return {}, ""
    path = CONFIGS / "task" / f"{name}.yaml"
    return read_yaml(path), f"task/{source_name(path)}"


def _variant(variants: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    """Changes in `per_data` for a dataset; a misspelt dataset is a ConfigError."""
    known = [*known_configs("data"), name]
    mistakes = []
    for key, part in variants.items():
        near = difflib.get_close_matches(str(key), known, 1, 0.7)
        if key not in known and near:  # the name of a user's own dataset resembles no other
            mistakes.append(f"{source}: per_data.{key}: unknown data; did you mean '{near[0]}'?")
        elif part is not None and not isinstance(part, Mapping):
            mistakes.append(f"{source}: per_data.{key}: expected a mapping, got {part!r}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return variants.get(name) or {}


def apply_settings(merged: Merged, settings: Iterable[str], *, section: str = "") -> None:
    """Merge `--set` texts; all mistakes are in one error.

    Where only `section` was read, its name may begin the keys: `data.size` is `size`.
    """
    mistakes = []
    for text in settings:
        try:
            place, value = _setting(text)
        except ConfigError as error:
            mistakes.append(str(error))
        else:
            place = place[1:] if place[0] == section and place[1:] else place
            merged.merge({place[-1]: value}, f"--set {text}", place[:-1])
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def validate(model: type[Recipe], merged: Merged) -> Recipe:
    """Check merged values against the schema; the `ConfigError` has one line per mistake."""
    try:
        return model.model_validate(tuples(merged.values))
    except ValidationError as error:
        lines = [_line(model, merged, mistake) for mistake in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def to_yaml(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, with all defaults."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)


def _line(model: type[BaseModel], merged: Merged, mistake: ErrorDetails) -> str:
    full = tuple(str(part) for part in mistake["loc"])
    place = tuple(part for part in full if part not in (NAME, PATHS))
    message = mistake["msg"].removeprefix("Value error, ")
    if not place:  # across sections: messages begin with the section
        return f"{merged.source_of((re.split('[ .:]', message)[0],))}: {message}"
    where = f"{merged.source_of(place)}: {'.'.join(place)}"
    if mistake["type"] == "extra_forbidden":
        known = keys_at(model, full[:-1])
        near = difflib.get_close_matches(place[-1], known, 1, 0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if mistake["type"] == "missing":
        return f"{where}: missing key"
    got = mistake["input"]
    if mistake["type"] == "model_type":
        return (
            f"{where}: expected a mapping with {', '.join(keys_at(model, full))}, got {got!r:.60}"
        )
    if mistake["type"] == "value_error" and isinstance(got, dict):  # a rule within a section
        about = merged.source_of((*place, re.split("[ .:]", message)[0]))
        return f"{about}: {'.'.join(place)}: {message}"
    return f"{where}: {message[0].lower()}{message[1:]}, got {got!r:.60}"
