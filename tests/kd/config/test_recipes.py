"""The schema of recipes: what it refuses, within a section and across sections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from kd.config.recipes import (
    DistillRecipe,
    Optimizer,
    Recipe,
    Schedule,
    TeacherRecipe,
    Train,
    TransferRecipe,
    Weighted,
)
from kd.problems.objects.schema import ObjectsSection
from kd.problems.recipes import bound, recipe_schema

ROOT = Path(__file__).resolve().parents[3]
SPLIT = {"annotations": "a.json", "images": "a"}
DATA = {"train": SPLIT, "val": SPLIT}
Teacher, Distill = bound(TeacherRecipe, ObjectsSection), bound(DistillRecipe, ObjectsSection)
TASK = {"name": "classification", "weights": {"cross_entropy": 1.0}}
TERM = {"name": "context_logits", "weight": 1.0}
DISTILL = {"data": DATA, "task": TASK, "student": {"name": "resnet18"}, "losses": (TERM,)}
TEACHER = {"data": DATA, "task": TASK, "teacher": {"name": "cnn"}}


def mistakes_of(model: type[BaseModel], values: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    return [mistake["msg"] for mistake in caught.value.errors()]


def test_a_recipe_of_the_needed_keys_alone_has_a_default_for_all_others() -> None:
    recipe = Distill.model_validate(DISTILL)
    assert recipe.variants == ("plain", "distilled", "no_context")
    assert recipe.train == Train()
    assert isinstance(recipe.data, ObjectsSection) and recipe.data.size == 384


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Teacher.model_validate(TEACHER)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.epochs = 3


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (Train, {"epochs": True}),
        (Train, {"epochs": 2.0}),
        (Train, {"epochs": "2"}),
        (Train, {"compile": 1}),
        (Optimizer, {"lr": "1e-3"}),
        (Optimizer, {"lr": True}),
        (Optimizer, {"lr": 0.0}),
        (Optimizer, {"lr": float("nan")}),
        (Optimizer, {"lr": float("inf")}),
        (Optimizer, {"name": "adamax"}),
        (Schedule, {"warmup": 1.0}),
        (Train, {"epocs": 2}),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused(
    section: type[BaseModel], values: dict[str, Any]
) -> None:
    assert len(mistakes_of(section, values)) == 1


def test_a_whole_number_serves_as_a_rate() -> None:
    assert Optimizer(lr=1).lr == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "seeds [] must be one or more different numbers"),
        ({"seeds": (1, 1)}, "seeds [1, 1] must be"),
        ({"variants": ()}, "variants [] must be"),
        ({"variants": ("plain", "plain")}, "variants ['plain', 'plain'] must be"),
        ({"losses": ()}, "losses: a distilled student needs at least one term"),
        ({"losses": (TERM, TERM)}, "losses: context_logits: given twice"),
        ({"adapters": {"trunk": {"to": "x"}}}, "adapters.trunk: no term of losses reads"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(
    change: dict[str, Any], message: str
) -> None:
    found = mistakes_of(Distill, {**DISTILL, **change})
    assert len(found) == 1
    assert message in found[0]


def test_without_a_taught_variant_no_term_is_needed() -> None:
    values = {**DISTILL, "losses": (), "variants": ("plain", "no_context")}
    assert Distill.model_validate(values).losses == ()


def test_smallest_fraction_must_be_below_the_largest() -> None:
    [message] = mistakes_of(ObjectsSection, {**DATA, "min_fraction": 0.4, "max_fraction": 0.3})
    assert "min_fraction 0.4 must be less than max_fraction 0.3" in message


def test_a_step_must_divide_into_equal_micro_batches() -> None:
    [message] = mistakes_of(Train, {"batch_size": 32, "accumulate": 3})
    assert "batch_size 32 is not a multiple of accumulate 3" in message


def test_one_fold_is_refused() -> None:
    [message] = mistakes_of(Teacher, {**TEACHER, "folds": 1})
    assert "one fold leaves no image to train on" in message
    assert Teacher.model_validate({**TEACHER, "folds": 2}).folds == 2


@pytest.mark.parametrize(
    ("name", "model"),
    [("teacher", TeacherRecipe), ("distill", DistillRecipe), ("transfer", TransferRecipe)],
)
def test_the_schema_in_configs_is_current(name: str, model: type[Recipe]) -> None:
    command = {"teacher": "train_teacher"}.get(name, name)
    written = (ROOT / "configs" / "schema" / f"{name}.json").read_text()
    assert written == json.dumps(recipe_schema(model), indent=2) + "\n", (
        f"write it again: python -m kd.{command} --schema > configs/schema/{name}.json"
    )


def test_a_weights_end_is_a_share_or_a_step_not_both() -> None:
    assert Weighted(name="off_after", until_step=500).until_step == 500
    with pytest.raises(ValidationError, match="until and until_step: give one of them"):
        Weighted(name="off_after", until=0.5, until_step=500)


def test_the_file_schema_lets_a_file_say_less_and_still_knows_every_key() -> None:
    schema = recipe_schema(TeacherRecipe)
    assert schema["required"] == ["task", "teacher"]
    assert {"type": "string"} in schema["properties"]["data"]["anyOf"]
    variant = schema["properties"]["per_data"]["additionalProperties"]
    assert variant["additionalProperties"] is False
    assert "required" not in variant
    assert set(variant["properties"]) == set(TeacherRecipe.model_fields)
    definitions = schema["$defs"]
    assert definitions["TaskSection"]["required"] == ["name", "weights"]
    assert "required" not in definitions["PartTaskSection"]
    assert definitions["PartTrain"]["additionalProperties"] is False
    text = json.dumps(schema)
    used = {part.split('"')[0] for part in text.split("#/$defs/")[1:]}
    assert used <= set(definitions)


def test_terms_of_a_variant_replace_the_whole_list_and_so_must_be_whole() -> None:
    schema = recipe_schema(DistillRecipe)
    losses = schema["properties"]["per_data"]["additionalProperties"]["properties"]["losses"]
    assert losses["items"] == {"$ref": "#/$defs/TermSection"}
