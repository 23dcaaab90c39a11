"""Trained students: one arm of a comparison, loaded from its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kd.build import build_segmenter, build_student, build_task, open_data
from kd.checkpoint import load_model
from kd.config import AnyData, DistillRecipe
from kd.config_reader import from_plain
from kd.errors import UserError
from kd.opened import OpenData, Opened
from kd.tasks.base import Task


@dataclass(frozen=True)
class TrainedStudent:
    """A student as its run left it, and the data set it is to be asked about."""

    data: Opened
    model: nn.Module
    task: Task


def load_student(run: Path, config: Mapping[str, Any], section: AnyData) -> TrainedStudent:
    """Load an arm's student.

    Args:
        run: Its folder, seed<k>/<arm> of a comparison.
        config: The folder's config.
        section: The data set to open.

    Raises:
        UserError: The folder is that of a whole comparison, unfinished, or of another model.
    """
    if "arm" not in config:
        raise UserError(
            f"{run}: a comparison; evaluate one of its arms, seed<k>/<arm>, or "
            "print its table with python -m kd.compare"
        )
    plain = {key: value for key, value in config.items() if key not in ("arm", "seed")}
    values = {**plain, "data": section.model_dump(mode="json")}
    recipe = from_plain(DistillRecipe, values, str(run / "config.yaml"))
    data = open_data(recipe.data)
    # The run's weights replace whatever it started from, which need not be here any more.
    replaced = {"weights": None, "file": None}
    options = {k: replaced.get(k, value) for k, value in recipe.student.options.items()}
    known = recipe.student.model_copy(update={"options": options})
    if isinstance(data, OpenData):
        prior = data.prior(data.labelled(config["seed"]))
        student = build_student(known, prior, context=config["arm"] not in ("bare", "direct"))
    else:
        student = build_segmenter(known, data.num_classes)
    load_model(run / "model.safetensors", student)
    return TrainedStudent(data, student, build_task(recipe.task, recipe.data, data.num_classes))
