"""Load a trained student: one variant and seed of a distillation, from its run folder."""

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
from kd.problems import problem_of_task
from kd.problems.base import Dataset, Task
from kd.problems.recipes import recipe_from
from kd.runs.build import open_data, without_weights


def load_student(
    run: Path, config: Mapping[str, Any], section: DatasetSection
) -> tuple[Dataset, nn.Module, Task]:
    """Load a student with its dataset and task from its run folder, `seed<k>/<variant>`.

    `config` is the content of the run's `config.yaml`. `section` configures the dataset to open,
    which may differ from the training dataset.
    """
    recipe = student_recipe(config, run / "config.yaml", section)
    data = open_data(recipe.data, recipe.task.name)
    student = load_network(run / "model.safetensors", recipe, config["variant"], data.num_classes)
    task = data.problem.task(recipe.task, recipe.data, data.num_classes)
    return data, student, task


def student_recipe(
    config: Mapping[str, Any], source: Path, section: DatasetSection | None = None
) -> DistillRecipe:
    """Read the recipe from the config of one variant's run.

    `source` is the config's path, for error messages. `section` replaces the run's dataset config.
    """
    if "variant" not in config:
        raise UserError(
            f"{source.parent}: a comparison; choose one of its variants, seed<k>/<variant>, or "
            "print its table with python -m kd.compare"
        )
    values = {key: value for key, value in config.items() if key not in ("variant", "seed")}
    if section is not None:
        values["data"] = section.model_dump(mode="json")
    return recipe_from(DistillRecipe, values, str(source))


def load_network(file: Path, recipe: DistillRecipe, variant: str, num_classes: int) -> nn.Module:
    """Load a variant's trained network from its `model.safetensors`."""
    one = variants_of(recipe)[variant]
    # A frozen trunk caches its outputs for the images of a training only.
    student = problem_of_task(recipe.task.name).build_student(
        without_weights(recipe.student, remember=False), num_classes,
        context=one.context_head, outputs=one.outputs,
    )  # fmt: skip
    load_model(file, student)
    return student
