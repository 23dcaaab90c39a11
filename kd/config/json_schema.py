"""JSON schema of recipes for editors, and its keys for error messages."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from kd.config.datasets import NAME, PATHS


def file_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of a recipe's file.

    A file needs fewer keys than the resolved recipe: `data` may be a name or some of its keys.
    `per_data` holds changes for single datasets, and `others` those for all other datasets.
    """
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    definitions |= {f"Part{name}": _part(one) for name, one in definitions.items()}
    schema["required"] = [name for name in schema["required"] if name != "data"]
    part = _part(schema["properties"]["data"])
    variant = _part({**schema, "properties": {**schema["properties"], "data": part}})
    variant = {key: variant[key] for key in ("type", "properties", "additionalProperties")}
    schema["properties"]["data"] = {"anyOf": [{"type": "string"}, part]}
    schema["properties"]["per_data"] = {
        "description": "changes by name of the dataset; others: for all that are not named",
        "type": "object",
        "additionalProperties": variant,
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _part(schema: Any) -> Any:
    """A schema without required keys at any depth, except in lists, which are replaced whole."""
    if isinstance(schema, list):
        return [_part(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: value for key, value in schema.items() if key not in ("required", "$defs")}
    reference = result.get("$ref")
    if isinstance(reference, str) and "/$defs/Part" not in reference:
        result["$ref"] = reference.replace("/$defs/", "/$defs/Part")
    return {key: value if key == "items" else _part(value) for key, value in result.items()}


def keys_at(model: type[BaseModel], place: Sequence[str]) -> list[str]:
    """Keys that the schema knows at a place."""
    current: Any = model
    for part in place:
        if part in (NAME, PATHS):
            continue
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
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return [one for part in get_args(annotation) for one in _alternatives(part)]
    return [annotation]
