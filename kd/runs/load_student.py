"""Load trained students: one variant of a comparison, from its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kd.config.datasets import DatasetSection
from kd.config.recipes import DistillRecipe
from kd.distillation.variants import variants_of
from kd.engine.checkpoint import load_model
from kd.errors import UserError
from kd.problems.base import Dataset, Task
from kd.problems.recipes import recipe_from
from kd.runs.build import open_data, without_weights


def load_student(
    run: Path, config: Mapping[str, Any], section: DatasetSection
) -> tuple[Dataset, nn.Module, Task]:
    """Load dataset, student and task of `run`, the folder seed<k>/<variant> of a comparison.

    `section` is the dataset to open. The folder of a whole comparison, an unfinished run or one of
    another model is a UserError.
    """
    if "variant" not in config:
        raise UserError(
            f"{run}: a comparison; evaluate one of its variants, seed<k>/<variant>, or "
            "print its table with python -m kd.compare"
        )
    plain = {key: value for key, value in config.items() if key not in ("variant", "seed")}
    values = {**plain, "data": section.model_dump(mode="json")}
    recipe = recipe_from(DistillRecipe, values, str(run / "config.yaml"))
    data = open_data(recipe.data, recipe.task.name)
    student = load_network(run, recipe, config["variant"], data, int(config["seed"]))
    task = data.problem.task(recipe.task, recipe.data, data.num_classes)
    return data, student, task


def load_network(
    run: Path, recipe: DistillRecipe, variant: str, data: Dataset, seed: int
) -> nn.Module:
    """Load the network of a variant from its folder.

    Variants differ in heads; `seed` determines the labelled images.
    """
    one = variants_of(recipe)[variant]
    student = data.problem.build_student(
        without_weights(recipe.student), data, labelled=data.labelled(seed),
        context=one.context_head, outputs=one.outputs,
    )  # fmt: skip
    load_model(run / "model.safetensors", student)
    return student
