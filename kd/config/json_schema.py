"""What a recipe's schema knows: the keys at a place, and all of it as JSON for editors."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from kd.config.datasets import GAZE, LABEL_MAPS, NAME, OBJECTS, PATHS
from kd.config.recipes import Data, Gaze, LabelMaps

# The kinds of data as the schema's places name them, which a file does not.
KINDS: dict[str, type[Data] | type[LabelMaps] | type[Gaze]] = {
    OBJECTS: Data,
    LABEL_MAPS: LabelMaps,
    GAZE: Gaze,
}
ALTERNATIVES = (*KINDS, NAME, PATHS)


def file_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a recipe's file, for editors.

    A file may say less than the resolved recipe holds: `data` is a name or some of its keys, and
    `per_data` has parts of a recipe for single data sets, and `others` for the rest.
    """
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    definitions |= {f"Part{name}": _part(one) for name, one in definitions.items()}
    schema["required"] = [name for name in schema["required"] if name != "data"]
    kinds = [name for name in ("Data", "LabelMaps", "Gaze") if name in definitions]
    part = {"anyOf": [{"$ref": f"#/$defs/Part{name}"} for name in kinds]}
    variant = _part({**schema, "properties": {**schema["properties"], "data": part}})
    variant = {key: variant[key] for key in ("type", "properties", "additionalProperties")}
    schema["properties"]["data"] = {"anyOf": [{"type": "string"}, part]}
    schema["properties"]["per_data"] = {
        "description": "changes for single data sets, by name; others: for all that are not named",
        "type": "object",
        "additionalProperties": variant,
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _part(schema: Any) -> Any:
    """A schema with nothing required, at any depth; lists replace as a whole and stay whole."""
    if isinstance(schema, list):
        return [_part(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key not in ("required", "$defs")}
    reference = kept.get("$ref")
    if isinstance(reference, str) and "/$defs/Part" not in reference:
        kept["$ref"] = reference.replace("/$defs/", "/$defs/Part")
    return {key: value if key == "items" else _part(value) for key, value in kept.items()}


def keys_at(model: type[BaseModel], place: Sequence[str]) -> list[str]:
    """The keys that the schema knows at a place."""
    current: Any = model
    for part in place:
        if part in KINDS:
            current = KINDS[part]
        if part in ALTERNATIVES:
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
    known = [name for found in models for name in found.model_fields]
    # Who has mistyped the layout is taken to have objects.
    return [*known, "layout"] if place and place[-1] == OBJECTS else known


def takes_layout(place: Sequence[str]) -> str | None:
    """Of what data sets with a layout a key is that stands among those of objects, if of any."""
    kinds: dict[str, type[BaseModel]] = {"label maps": LabelMaps, "fixations": Gaze}
    if len(place) < 2 or place[-2] != OBJECTS or place[-1] in Data.model_fields:
        return None
    return next((name for name, kind in kinds.items() if place[-1] in kind.model_fields), None)


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return [one for part in get_args(annotation) for one in _alternatives(part)]
    return [annotation]
