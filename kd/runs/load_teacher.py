"""Find and load trained teachers, and check that their classes are those of a dataset."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd.config.datasets import DatasetSection
from kd.config.reader import known_configs, read_yaml
from kd.config.recipes import Model, TeacherRecipe, TeacherReference
from kd.data.loader import Samples, collate
from kd.distillation.student import AdaptedStudent
from kd.engine.checkpoint import load_checkpoint, load_model, load_state
from kd.errors import UserError
from kd.nn.inference import for_answers, in_int8
from kd.problems import problem_of_data, problem_of_task
from kd.problems.base import Batch, Dataset, Problem, Task
from kd.problems.recipes import section_from, teacher_recipe
from kd.runs.build import without_weights
from kd.runs.folder import class_names

RUNS = Path("runs")
SAMPLES = 32  # images that calibrate int8


def default_folder(teacher: str, data: str) -> Path:
    """Return the default run folder of a teacher that was trained on a dataset."""
    return RUNS / "teacher" / teacher / data


def find_teacher(
    reference: TeacherReference, data: str, *, further: str = "", typed: str | None = None
) -> Path:
    """Find the run folder or file of a recipe's teacher, without reading it.

    Args:
        reference: The teacher's section of the recipe.
        data: Name of the dataset that the teacher was trained on.
        further: Key of the teacher in `more_teachers`; empty for the recipe's `teacher`.
        typed: Argument of `--data` as the user typed it, for the error message.
    """
    key = f"more_teachers.{further}" if further else "teacher"
    if reference.run is not None:
        path = Path(reference.run)
        if not path.exists():
            raise UserError(f"{key}.run: {path}: no such run folder or file")
        return path
    path = default_folder(reference.name, data)
    if not (path / "model.safetensors").is_file():
        whose, flag = (f"{key}: ", f"--set {key}.run=RUN") if further else ("", "--teacher RUN")
        raise UserError(
            f"{whose}no trained teacher at {path}; train one: python -m kd.train_teacher "
            f"--teacher {reference.name} --data {_flag(data, typed)}, or choose one with {flag}"
        )
    return path


def _flag(data: str, typed: str | None) -> str:
    """Return the argument of `--data` that selects the same dataset, for a message."""
    if typed is not None:
        return shlex.quote(typed)
    if data in known_configs("data"):
        return data
    return f"{shlex.quote(data)}.yaml (a file with the data section of the recipe)"


@dataclass(frozen=True)
class TrainedTeacher:
    """A trained teacher, frozen and in evaluation mode, with its run folder, recipe and task."""

    folder: Path
    recipe: TeacherRecipe
    model: nn.Module
    task: Task

    @property
    def problem(self) -> Problem[Any]:
        return problem_of_task(self.recipe.task.name)

    @property
    def section(self) -> DatasetSection:
        return self.recipe.data

    @property
    def called(self) -> str:
        """Description of the teacher for messages: run folder, model and task."""
        recipe = self.recipe
        return f"teacher {self.folder} ({recipe.teacher.name}, task {recipe.task.name})"

    @property
    def reads_labels(self) -> bool:
        """Whether the classes of the other objects are an input of the model."""
        return bool(getattr(self.model, "reads_labels", False))


def latest_teacher() -> Path:
    """Find the most recently trained context teacher among the default run folders."""
    finished = (RUNS / "teacher").glob("*/*/summary.json")
    for summary in sorted(finished, key=lambda file: file.stat().st_mtime, reverse=True):
        config = read_yaml(summary.parent / "config.yaml")
        if problem_of_task(config["task"]["name"]).hides_objects:
            return summary.parent
    raise UserError(
        f"{RUNS / 'teacher'}: no trained context teacher; choose one with --teacher RUN, or "
        "train one: python -m kd.train_teacher --teacher cnn"
    )


def load_teacher(
    path: Path, num_classes: int, recipe: TeacherRecipe | None = None
) -> TrainedTeacher:
    """Load a teacher that has `num_classes` classes.

    `path` is its run folder, its `model.safetensors` or its checkpoint `last.pt`. If `recipe` is
    None, it is read from the run.

    Raises:
        UserError: The run is unfinished, is a student's, or has another number of classes.
    """
    folder, file = (path, path / "model.safetensors") if path.is_dir() else (path.parent, path)
    checkpoint = None
    if file.suffix == ".pt":
        _, config, checkpoint = load_checkpoint(file)
        recipe = teacher_recipe(config, file)
    elif recipe is None:
        source = folder / "config.yaml"
        if not source.is_file():
            raise UserError(f"{folder}: not a run folder, it has no config.yaml")
        recipe = teacher_recipe(read_yaml(source), source)
    problem = problem_of_task(recipe.task.name)
    model = problem.build_teacher(_without_weights(recipe), num_classes)
    try:
        if checkpoint is not None:
            load_state(AdaptedStudent(model), checkpoint.get("ema", checkpoint["model"]), file)
        else:
            load_model(file, model)
    except UserError as error:
        raise UserError(f"{error} (the dataset has {num_classes} classes)") from error
    task = problem.task(recipe.task, recipe.data, num_classes, model=model)
    return TrainedTeacher(folder, recipe, model.eval().requires_grad_(False), task)


def load_teacher_of(path: Path, data: Dataset) -> TrainedTeacher:
    """Load a teacher with the classes that it was trained on, for use on a dataset.

    The dataset's classes may differ; call `check_classes` if they must be the same.
    """
    names = class_names(path if path.is_dir() else path.parent)
    return load_teacher(path, data.num_classes if names is None else len(names))


def check_classes(teacher: TrainedTeacher, names: Sequence[str], where: str) -> None:
    """Raise a UserError unless a teacher was trained on the classes `names`, in the same order.

    A teacher's run without `classes.json` passes. `where` names the dataset in the error message.
    """
    known = class_names(teacher.folder)
    if known is None:
        return
    known = teacher.problem.comparable_names(teacher.task, known, names)
    for place, (theirs, ours) in enumerate(zip_longest(known, names)):
        if theirs != ours:
            its, own = ("none" if name is None else repr(name) for name in (theirs, ours))
            raise UserError(
                f"{teacher.folder}: class {place} (from 0) of this teacher is {its}, of {where} "
                f"{own}; choose a teacher that was trained on these classes in this order. If only "
                f"the names differ, write the dataset's into {teacher.folder / 'classes.json'}"
            )


def class_names_of(path: Path) -> tuple[str, ...]:
    """Return the class names of a teacher, in the order of its outputs.

    `path` is the same as for `load_teacher`. If the run has no `classes.json`, the names are read
    from the dataset that the teacher was trained on.
    """
    folder = path if path.is_dir() else path.parent
    if (names := class_names(folder)) is not None:
        return names
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder, it has no config.yaml")
    config = read_yaml(folder / "config.yaml")
    if "data" not in config:
        raise UserError(f"{folder / 'config.yaml'}: not the config of a run")
    section = section_from(config, str(folder / "config.yaml"))
    try:
        return problem_of_data(section).class_names(section)
    except UserError as error:
        raise UserError(
            f"{folder}: has no classes.json, and its dataset cannot be read: {error}"
        ) from error


def fast_teacher(
    model: nn.Module, task: Task, dataset: Samples, *, int8: bool = False
) -> nn.Module:
    """Return a faster copy of a frozen teacher, for inference only.

    Batch norms are folded into convolutions, so layers of the copy cannot be tapped. `int8` runs
    everything but the head in 8-bit integers on the CPU, calibrated on a few samples of `dataset`.
    """
    if not int8:
        return for_answers(model)
    few = range(0, len(dataset), max(1, len(dataset) // SAMPLES))
    samples = [images_of(task, collate([dataset[0, place]])) for place in few]
    return in_int8(model.cpu(), samples, spared=["head"] if hasattr(model, "head") else [])


def images_of(task: Task, batch: Batch) -> torch.Tensor:
    """Return the images of a batch as the task prepares them for the model."""
    images = task.inputs(batch)[0]
    assert images is not None
    return images


def _without_weights(recipe: TeacherRecipe) -> Model:
    # Remembering maps saves nothing when inputs do not repeat, and skips layers that are tapped.
    return without_weights(recipe.teacher, remember=False)


def fold_models(teacher: TrainedTeacher, num_classes: int) -> list[nn.Module]:
    """Load a teacher's fold models, in the order of the folds."""
    count = teacher.recipe.folds
    if count < 2:
        raise UserError(
            f"{teacher.folder}: trained without folds: no out-of-fold posteriors; train it with "
            "--set folds=5, or use its own with --set soft_targets.out_of_fold=false"
        )
    section = _without_weights(teacher.recipe)
    models = []
    for number in range(count):
        model = teacher.problem.build_teacher(section, num_classes)
        load_model(teacher.folder / f"fold{number}" / "model.safetensors", model)
        models.append(model.eval().requires_grad_(False))
    return models
