"""One teacher's training, from its recipe to its finished run."""

from __future__ import annotations

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import nn

from kd.adapted import AdaptedStudent
from kd.baselines import index_objects
from kd.build import build_task, build_teacher, make_loader, segmentation_task
from kd.config import TeacherRecipe
from kd.data.loader import Samples
from kd.nn.cooccurrence import Fitted
from kd.opened import Opened, make_dataset, of_objects
from kd.opened_boxes import OpenBoxes
from kd.opened_gaze import OpenGaze
from kd.opened_maps import OpenMaps
from kd.pictures import write_pictures
from kd.run_folder import RunFolder
from kd.session import Session, run_training
from kd.tasks.base import Task
from kd.tasks.context_map import ContextMap
from kd.training import Objective


def train_one(
    recipe: TeacherRecipe,
    data: Opened,
    accelerator: Accelerator,
    folder: RunFolder,
    label: str,
    only: NDArray[np.int64] | None,
) -> None:
    """Train one model on some of the train images, all where `only` is None."""
    if folder.finished:
        return
    set_seed(recipe.seed)
    model = build_teacher(recipe.teacher, data.num_classes)
    task, dataset = _prepared(recipe, data, model, only, counted=folder.checkpoint.is_file())
    loader = make_loader(
        dataset, accelerator, batch_size=recipe.train.batch_size // recipe.train.accumulate,
        workers=recipe.data.workers, seed=recipe.seed, train=True,
    )  # fmt: skip
    session = Session(folder, accelerator, data, recipe.train, recipe.seed, label, write_pictures)
    run_training(session, AdaptedStudent(model), Objective(task, recipe.task.weights), loader)


def _prepared(
    recipe: TeacherRecipe,
    data: Opened,
    model: nn.Module,
    only: NDArray[np.int64] | None,
    *,
    counted: bool,
) -> tuple[Task, Samples]:
    """The task and the samples; a model that counts has counted (`counted`: before)."""
    if isinstance(data, OpenMaps):
        return segmentation_task(recipe.task, data), data.crops(recipe.seed)
    if isinstance(data, OpenGaze):
        task = build_task(recipe.task, recipe.data, data.num_classes)
        return task, data.pictures(recipe.seed)
    if isinstance(data, OpenBoxes):
        task = build_task(recipe.task, recipe.data, data.num_classes, model=model)
        return task, data.samples(recipe.seed)
    data = of_objects(data)
    if isinstance(model, Fitted) and not counted:
        model.fit(index_objects(data.train, only))
    shares = data.prior(only), data.shares(only)
    task = build_task(recipe.task, recipe.data, data.num_classes, *shares, model=model)
    return task, make_dataset(
        data, "train", train=True, mode=recipe.hide, only=only, seed=recipe.seed,
        epochs=recipe.train.epochs, class_maps=isinstance(task, ContextMap),
    )  # fmt: skip
