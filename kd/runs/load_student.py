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
from kd.problems.base import Dataset, Task
from kd.problems.recipes import recipe_from
from kd.runs.build import open_data, without_weights


def load_student(
    run: Path, config: Mapping[str, Any], section: DatasetSection
) -> tuple[Dataset, nn.Module, Task]:
    """Load a student with its dataset and task.

    Args:
        run: Folder seed<k>/<variant> of a distillation.
        config: Content of the run's `config.yaml`.
        section: Data section of the dataset to open, which may differ from the run's own.

    Raises:
        UserError: The folder is that of a whole distillation, the run is not finished, or its
            weights do not fit the student.
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
    """Load the trained network of a variant.

    Args:
        run: Run folder of the variant.
        recipe: The distillation's recipe.
        variant: Name of the variant, which determines the heads of the network.
        data: The dataset.
        seed: Seed of the run, which determines the labelled images.
    """
    one = variants_of(recipe)[variant]
    student = data.problem.build_student(
        without_weights(recipe.student), data, labelled=data.labelled(seed),
        context=one.context_head, outputs=one.outputs,
    )  # fmt: skip
    load_model(run / "model.safetensors", student)
    return student
