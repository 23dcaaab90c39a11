"""Expand terms and adapters that are written once for all levels of a pyramid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLACE = "{level}"  # in the layers of a term or an adapter


def on_levels(values: Any) -> Any:
    """Expand each term and adapter of a recipe's raw values whose layers contain `{level}`.

    A term `near` on levels 0 and 1 becomes `near_0` and `near_1`; a variant of an ablation that
    lists `near` gets both.

    Raises:
        ValueError: A recipe without levels.
    """
    if not isinstance(values, Mapping):
        return values
    found, levels = dict(values), [str(level) for level in values.get("levels") or ()]
    groups: dict[str, list[str]] = {}
    for key in ("losses", "more_losses"):
        if isinstance(found.get(key), list | tuple):
            every = (_terms(term, levels, key, groups) for term in found[key])
            found[key] = tuple(one for some in every for one in some)
    if isinstance(found.get("adapters"), Mapping):
        found["adapters"] = {
            layer.replace(PLACE, level): _filled(adapter, level)
            for layer, adapter in found["adapters"].items()
            for level in _levels_of(layer, levels, f"adapters.{layer}")
        }
    if groups and isinstance(found.get("ablations"), Mapping):
        found["ablations"] = {
            name: {variant: _members(labels, groups) for variant, labels in variants.items()}
            for name, variants in found["ablations"].items()
        }
    return found


def _terms(term: Any, levels: list[str], key: str, groups: dict[str, list[str]]) -> list[Any]:
    """Expand a term to one for each level; add their labels to `groups`."""
    layers = [term.get(side) for side in ("student", "teacher")] if isinstance(term, dict) else []
    if not any(isinstance(layer, str) and PLACE in layer for layer in layers):
        return [term]
    label = str(term.get("label") or term.get("name"))
    some = _levels_of(PLACE, levels, f"{key}: {label}")
    groups[label] = [f"{label}_{level}" for level in some]
    return [{**_filled(term, level), "label": f"{label}_{level}"} for level in some]


def _levels_of(layer: str, levels: list[str], where: str) -> list[str]:
    if PLACE not in layer:
        return [""]
    if not levels:
        raise ValueError(f"{where}: its layers hold {PLACE}, and the recipe has no levels")
    return levels


def _filled(section: Any, level: str) -> Any:
    if not isinstance(section, Mapping):
        return section
    return {
        key: value.replace(PLACE, level) if isinstance(value, str) else value
        for key, value in section.items()
    }


def _members(labels: Any, groups: Mapping[str, list[str]]) -> Any:
    if not isinstance(labels, list | tuple):
        return labels
    return tuple(member for label in labels for member in groups.get(label, [label]))
