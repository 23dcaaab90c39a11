"""Trained students: one variant of a comparison, loaded from its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kd.config.datasets import DatasetSection
from kd.config.recipes import DistillRecipe, Model
from kd.distillation.variants import variants_of
from kd.engine.checkpoint import load_model
from kd.errors import UserError
from kd.problems.base import Dataset, Task
from kd.problems.recipes import recipe_from
from kd.runs.build import open_data


@dataclass(frozen=True)
class TrainedStudent:
    """A student as its run left it, and the dataset it is to be asked about."""

    data: Dataset
    model: nn.Module
    task: Task


def load_student(run: Path, config: Mapping[str, Any], section: DatasetSection) -> TrainedStudent:
    """Load a variant's student.

    Args:
        run: Its folder, seed<k>/<variant> of a comparison.
        config: The folder's config.
        section: The dataset to open.

    Raises:
        UserError: The folder is that of a whole comparison, unfinished, or of another model.
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
    return TrainedStudent(data, student, task)


def load_network(
    run: Path, recipe: DistillRecipe, variant: str, data: Dataset, seed: int
) -> nn.Module:
    """Load the network of a variant from its folder.

    Args:
        run: The folder.
        recipe: Of the comparison.
        variant: Which of it: some networks lack a head there.
        data: The dataset.
        seed: Of the run, by which its labelled images were drawn.

    Raises:
        UserError: The folder is unfinished, or of another model.
    """
    one = variants_of(recipe)[variant]
    student = data.problem.build_student(
        to_be_loaded(recipe.student),
        data,
        labelled=data.labelled(seed),
        context=one.context_head,
        outputs=one.outputs,
    )
    load_model(run / "model.safetensors", student)
    return student


def to_be_loaded(section: Model) -> Model:
    """A student's section without what it started from: a run's weights replace that.

    The files need not be here any more.
    """
    replaced = {"weights": None, "file": None}
    options = {k: replaced.get(k, value) for k, value in section.options.items()}
    return section.model_copy(update={"options": options})
