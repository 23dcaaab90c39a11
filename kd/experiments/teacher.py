"""Train one teacher, from its recipe to its finished run."""

from __future__ import annotations

import copy

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray

from kd.config.recipes import TeacherRecipe
from kd.distillation.student import AdaptedStudent
from kd.engine.state import Objective
from kd.nn.multi_stride_trunk import nothing_remembered
from kd.problems.base import Dataset, Sampling
from kd.runs.build import make_loader
from kd.runs.folder import RunFolder
from kd.runs.setup import check_losses, first_batch, learns
from kd.runs.train import RunSetup, run_training


def train_one(
    recipe: TeacherRecipe,
    data: Dataset,
    accelerator: Accelerator,
    folder: RunFolder,
    label: str,
    images: NDArray[np.int64] | None,
) -> None:
    """Train one teacher, or one of its fold models; do nothing if the run is finished.

    Args:
        recipe: The resolved recipe.
        data: The dataset.
        accelerator: Devices and processes.
        folder: Run folder; training resumes from its checkpoint if there is one.
        label: Label of progress lines.
        images: Ids of the train images to train on; None: all.
    """
    if folder.finished:
        return
    problem = data.problem
    set_seed(recipe.seed)
    model = problem.build_teacher(recipe.teacher, data.num_classes)
    if not folder.checkpoint.is_file():  # which has what was fitted
        problem.fit(model, data, images)
    task = problem.task(
        recipe.task, recipe.data, data.num_classes, model=model,
        fractions=problem.class_fractions(recipe.task, data, images),
    )  # fmt: skip
    sampling = Sampling(
        seed=recipe.seed, epochs=recipe.train.epochs, images=images, hide=recipe.hide
    )
    samples = problem.training(data, sampling, task)
    student, objective = AdaptedStudent(model), Objective(task, recipe.task.weights)
    if learns(model) and not folder.checkpoint.is_file():
        batch = first_batch(samples, recipe.train, accelerator)
        called = f"teacher {recipe.teacher.name!r}"
        with nothing_remembered():
            trial = copy.deepcopy(student).to(accelerator.device)
            check_losses(trial, batch, objective, data.num_classes, called=called)
    loader = make_loader(
        samples, accelerator,
        batch_size=recipe.train.batch_size // recipe.train.accumulate,
        workers=recipe.data.workers, seed=recipe.seed, train=True,
    )  # fmt: skip
    setup = RunSetup(folder, accelerator, data, recipe.train, recipe.seed, label)
    run_training(setup, student, objective, loader)
