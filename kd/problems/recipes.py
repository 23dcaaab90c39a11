"""Read recipes and data sections with the schema of their problem, without importing torch.

The schemas in `kd.config` accept any `DatasetSection` as `data`. This module replaces it by the
data section of the problem that the recipe's task belongs to.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, create_model

from kd.config.datasets import DatasetSection
from kd.config.json_schema import file_schema
from kd.config.reader import (
    Merged,
    apply_settings,
    find_config,
    merge_recipe,
    read_yaml,
    source_name,
    validate,
)
from kd.config.recipes import Recipe as AnyRecipe
from kd.config.recipes import TeacherRecipe
from kd.errors import ConfigError, UserError
from kd.problems import problem_with, spec_of_task, specs
from kd.problems.spec import ProblemSpec
from kd.registry import tuples

Recipe = TypeVar("Recipe", bound=AnyRecipe)


@functools.cache
def bound(model: type[Recipe], section: Any) -> type[Recipe]:
    """Return the recipe schema `model` with `section` as the type of its key `data`."""
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, data=(section, ...))


def load_recipe(
    model: type[Recipe], path: Path, *, data: str | None = None, settings: Iterable[str] = ()
) -> Recipe:
    """Read and check a recipe. Same arguments as `kd.config.reader.merge_recipe`.

    Raises:
        ConfigError: The recipe has errors; the message has one line for each.
    """
    return _checked(model, merge_recipe(path, data=data, settings=settings))


def recipe_from(
    model: type[Recipe], values: Mapping[str, Any], source: str, settings: Iterable[str] = ()
) -> Recipe:
    """Read the resolved recipe of a run or checkpoint, with optional `a.b=value` settings."""
    merged = Merged()
    merged.merge(values, source)
    apply_settings(merged, settings)
    return _checked(model, merged)


def recipe_schema(model: type[Recipe]) -> dict[str, Any]:
    """Return a recipe's JSON schema, which allows the data sections of all suitable problems."""
    fitting: list[Any] = [one.data for one in specs() if model.needs in ("", *one.abilities)]
    return file_schema(bound(model, functools.reduce(operator.or_, dict.fromkeys(fitting))))


def data_config(name: str, settings: Iterable[str] = (), *, needs: str = "") -> DatasetSection:
    """Read a data section, for commands without a recipe.

    Args:
        name: Name of a file in configs/data, or path of a YAML file.
        settings: `a.b=value` texts, with or without the prefix `data.`.
        needs: One of `ProblemSpec.abilities` that the dataset's problem must have.

    Raises:
        ConfigError: The section has errors; the message has one line for each.
        UserError: The problem lacks the ability.
    """
    path = find_config("data", name)
    merged = Merged()
    merged.merge({"name": path.stem, **read_yaml(path)}, source_name(path))
    apply_settings(merged, settings, section="data")
    spec = spec_of_data(merged.values)
    if needs:
        problem_with(needs, spec, where=name)
    return validate(spec.data, merged)


def section_from(
    config: Mapping[str, Any], source: str, settings: Iterable[str] = ()
) -> DatasetSection:
    """Read the data section of a run's config. Same `settings` as `data_config`."""
    merged = Merged()
    merged.merge(config["data"], source)
    apply_settings(merged, settings, section="data")
    return validate(spec_of_config(config).data, merged)


def spec_of_config(config: Mapping[str, Any]) -> ProblemSpec:
    """Return the problem of the config's task; if there is no task, guess from the data section."""
    task = config.get("task")
    name = task.get("name") if isinstance(task, Mapping) else None
    return spec_of_task(name) if isinstance(name, str) else spec_of_data(config.get("data"))


def spec_of_data(values: Any) -> ProblemSpec:
    """Return the registered problem whose data schema these values violate least often."""
    return min(specs(), key=lambda spec: len(_mistakes(spec.data, values)))


def _mistakes(model: type[BaseModel], values: Any) -> list[Any]:
    try:
        model.model_validate(tuples(values))
    except ValidationError as error:
        return list(error.errors())
    return []


def _checked(model: type[Recipe], merged: Merged) -> Recipe:
    """Validate merged values with the data section of their task's problem."""
    data, unknown = merged.values.get("data", {}), ""
    try:
        spec = spec_of_config(merged.values)
    except UserError as error:
        spec, unknown = spec_of_data(data), f"{merged.source_of(('task', 'name'))}: {error}"
    other = spec_of_data(data)
    if len(_mistakes(other.data, data)) < len(_mistakes(spec.data, data)):
        raise ConfigError(
            f"{merged.source_of(('data', 'name'))}: data.name: {data.get('name')} is data of "
            f"{other.name}; task {merged.values['task']['name']} needs data of {spec.name}"
            + (f", such as --data {spec.example}" if spec.example else "")
        )
    try:
        recipe: Recipe = validate(bound(model, spec.data), merged)
    except ConfigError as error:
        raise ConfigError("\n".join(filter(None, [unknown, str(error)]))) from None
    if unknown:
        raise ConfigError(unknown)
    for place, needs in recipe.needed().items():
        problem_with(needs, spec, where=f"{merged.source_of(tuple(place.split('.')))}: {place}")
    return recipe


def teacher_recipe(config: Mapping[str, Any], source: Path) -> TeacherRecipe:
    """Read the recipe of a teacher's run; raise a UserError for a student's run."""
    if "student" in config:
        raise UserError(f"{source}: this is a student's run; expected a teacher's run")
    return recipe_from(TeacherRecipe, config, str(source))
