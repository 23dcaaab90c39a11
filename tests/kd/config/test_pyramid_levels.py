"""Terms and adapters that are there once for each level of a pyramid."""

from __future__ import annotations

from typing import Any

import pytest

from kd.config.pyramid_levels import on_levels
from kd.config.reader import find_config, to_yaml
from kd.config.recipes import DistillRecipe
from kd.errors import UserError
from kd.problems.recipes import load_recipe

LAYER = "pyramid.{level}"
NEAR = {"name": "imitation", "label": "near", "weight": 1.0, "student": LAYER, "teacher": LAYER}


def test_a_term_and_its_adapter_are_there_for_each_level_and_an_variant_lists_them_all() -> None:
    values: dict[str, Any] = {
        "levels": ["0", "pool"],
        "losses": [{**NEAR, "schedule": {"name": "linear"}}, {"name": "object_boxes"}],
        "adapters": {LAYER: {"kind": "conv3x3", "to": LAYER}, "up": {"to": "neck"}},
        "ablations": {"one": {"I": ["near"], "both": ["near", "object_boxes"]}},
    }
    found = on_levels(values)
    first, second, other = found["losses"]
    assert first == {**NEAR, "label": "near_0", "student": "pyramid.0", "teacher": "pyramid.0",
                     "schedule": {"name": "linear"}}  # fmt: skip
    assert second["label"] == "near_pool" and second["student"] == "pyramid.pool"
    assert other == {"name": "object_boxes"}
    assert found["adapters"] == {
        "pyramid.0": {"kind": "conv3x3", "to": "pyramid.0"},
        "pyramid.pool": {"kind": "conv3x3", "to": "pyramid.pool"},
        "up": {"to": "neck"},
    }
    assert found["ablations"]["one"]["I"] == ("near_0", "near_pool")
    assert found["ablations"]["one"]["both"] == ("near_0", "near_pool", "object_boxes")
    assert on_levels(found) == found  # what is spelled out stays
    assert values["losses"][0]["student"] == LAYER  # what was given, too


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"losses": [NEAR]}, "losses: near: its layers hold {level}, and the recipe has no levels"),
        ({"adapters": {LAYER: {}}}, "adapters.pyramid.{level}: its layers hold {level}, and"),
    ],
)
def test_a_recipe_without_levels_says_so(part: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("{", r"\{").replace(".", r"\.")):
        on_levels(part)


def test_a_dataset_may_have_other_levels_and_a_run_s_config_is_spelled_out() -> None:
    path = find_config("distill", "fasterrcnn_resnet18")
    small = load_recipe(DistillRecipe, path)
    large = load_recipe(DistillRecipe, path, data="coco", settings=["data.root=/data/coco"])
    assert [term.label for term in small.losses] == ["near_0", "near_1"]
    assert large.ablations["imitation"]["F"] == tuple(f"whole_{n}" for n in large.levels)
    assert len(large.adapters) == len(large.levels) == 5
    assert "{level}" not in to_yaml(large)


def test_a_mistake_names_the_recipe() -> None:
    with pytest.raises(UserError, match=r"near: its layers hold \{level\}, and the recipe has no"):
        load_recipe(
            DistillRecipe, find_config("distill", "fasterrcnn_resnet18"), settings=["levels=[]"]
        )
