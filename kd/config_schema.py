"""The JSON schema of a recipe's file, by which editors complete and check it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def file_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a recipe's file, for editors.

    A file may say less than the resolved recipe holds: `data` is a name or some of its keys, and
    `per_data` has parts of a recipe for single data sets.
    """
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    definitions |= {f"Part{name}": _part(one) for name, one in definitions.items()}
    schema["required"] = [name for name in schema["required"] if name != "data"]
    kinds = [name for name in ("Data", "LabelMaps") if name in definitions]
    part = {"anyOf": [{"$ref": f"#/$defs/Part{name}"} for name in kinds]}
    variant = _part({**schema, "properties": {**schema["properties"], "data": part}})
    variant = {key: variant[key] for key in ("type", "properties", "additionalProperties")}
    schema["properties"]["data"] = {"anyOf": [{"type": "string"}, part]}
    schema["properties"]["per_data"] = {
        "description": "changes for single data sets, by name",
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
