"""One teacher's training, from its recipe to its finished run."""

from __future__ import annotations

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import nn

from kd.config.recipes import TeacherRecipe
from kd.data.loader import Samples
from kd.distillation.student import AdaptedStudent
from kd.engine.state import Objective
from kd.nn.cooccurrence import Fitted
from kd.problems.base import Task
from kd.problems.detection.data import DetectionDataset
from kd.problems.objects.baselines import index_objects
from kd.problems.objects.context import ContextMap
from kd.problems.objects.data import Dataset, make_dataset, of_objects
from kd.problems.objects.draw import write_pictures
from kd.problems.saliency.data import SaliencyDataset
from kd.problems.segmentation.data import SegmentationDataset
from kd.runs.build import build_task, build_teacher, make_loader, segmentation_task
from kd.runs.folder import RunFolder
from kd.runs.train import Session, run_training


def train_one(
    recipe: TeacherRecipe,
    data: Dataset,
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
    data: Dataset,
    model: nn.Module,
    only: NDArray[np.int64] | None,
    *,
    counted: bool,
) -> tuple[Task, Samples]:
    """The task and the samples; a model that counts has counted (`counted`: before)."""
    if isinstance(data, SegmentationDataset):
        return segmentation_task(recipe.task, data), data.crops(recipe.seed)
    if isinstance(data, SaliencyDataset):
        task = build_task(recipe.task, recipe.data, data.num_classes)
        return task, data.pictures(recipe.seed)
    if isinstance(data, DetectionDataset):
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
