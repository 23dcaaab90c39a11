"""A data set's section alone, for commands that take no recipe, and of finished runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kd.config import Data
from kd.config_data import AnyData, kind_of_data
from kd.config_reader import (
    Merged,
    apply_settings,
    find_config,
    from_plain,
    read_yaml,
    shown_name,
    validate,
)
from kd.config_schema import KINDS
from kd.errors import ConfigError


def data_config(name: str, settings: Iterable[str] = ()) -> AnyData:
    """A data set's section alone, for commands that take no recipe.

    Args:
        name: Of configs/data, or the path of a YAML file.
        settings: `a.b=value` texts; `data.a.b=value`, as in a recipe, is the same.
    """
    path = find_config("data", name)
    merged = Merged()
    merged.merge({"name": path.stem, **read_yaml(path)}, shown_name(path))
    apply_settings(merged, settings, section="data")
    return validate(KINDS[kind_of_data(merged.values)], merged)


def objects_config(name: str, settings: Iterable[str] = ()) -> Data:
    """The same for commands that are about annotated objects.

    Raises:
        ConfigError: As above, or a data set of label maps.
    """
    section = data_config(name, settings)
    if not isinstance(section, Data):
        raise ConfigError(f"{name}: a data set of label maps; objects with boxes are needed here")
    return section


def plain_data(values: Mapping[str, Any], source: str, settings: Iterable[str] = ()) -> AnyData:
    """The data section of a run's config, perhaps with changes."""
    return from_plain(KINDS[kind_of_data(values)], values, source, settings)
