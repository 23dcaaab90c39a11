"""Trained students: one arm of a comparison, loaded from its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kd.build import build_detector, build_segmenter, build_student, build_task, open_data
from kd.checkpoint import load_model
from kd.config import AnyData, DistillRecipe, Model
from kd.config_reader import from_plain
from kd.errors import UserError
from kd.opened import OpenData, Opened
from kd.opened_boxes import OpenBoxes
from kd.tasks.base import Task

BARE = ("bare", "direct")  # arms without a context head


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
    data = open_data(recipe.data, recipe.task.name)
    if isinstance(data, OpenData):
        prior = data.prior(data.labelled(config["seed"]))
        bare = config["arm"] in BARE
        student: nn.Module = build_student(to_be_loaded(recipe.student), prior, context=not bare)
        load_model(run / "model.safetensors", student)
    else:
        student = load_network(run, recipe.student, data, bare=config["arm"] in BARE)
    return TrainedStudent(data, student, build_task(recipe.task, recipe.data, data.num_classes))


def load_network(run: Path, section: Model, data: Opened, *, bare: bool = False) -> nn.Module:
    """Load an arm's segmentation network or detector from its folder.

    Args:
        run: The folder.
        section: The student's.
        data: The data set.
        bare: Whether a detector has no context head, whatever its options say.

    Raises:
        UserError: The folder is unfinished, or of another model.
    """
    student: nn.Module
    if isinstance(data, OpenBoxes):
        student = build_detector(to_be_loaded(section), data.num_classes, context=not bare)
    else:
        student = build_segmenter(to_be_loaded(section), data.num_classes)
    load_model(run / "model.safetensors", student)
    return student


def to_be_loaded(section: Model) -> Model:
    """A student's section without what it started from: a run's weights replace that.

    The files need not be here any more.
    """
    replaced = {"weights": None, "file": None}
    options = {k: replaced.get(k, value) for k, value in section.options.items()}
    return section.model_copy(update={"options": options})
