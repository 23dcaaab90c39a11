"""Trained teachers: loaded, held against a dataset, and asked."""

from __future__ import annotations

import logging
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
from kd.runs.folder import class_names

RUNS = Path("runs")


def default_folder(teacher: str, data: str) -> Path:
    """Where a teacher's run goes unless told otherwise."""
    return RUNS / "teacher" / teacher / data


def find_teacher(
    reference: TeacherReference, data: str, *, further: str = "", typed: str | None = None
) -> Path:
    """The run folder or file that a recipe means; nothing of it is read.

    Args:
        reference: As the recipe has it.
        data: Name of the recipe's dataset.
        further: Its name in `more_teachers`; empty for the recipe's `teacher`.
        typed: What `--data` was given, for the command that the message advises.

    Raises:
        UserError: None is named and none is where the teacher command puts them; the message says
            which command makes one.
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
            f"{whose}no trained teacher at {path}; make one with: python -m kd.train_teacher "
            f"--teacher {reference.name} --data {_flag(data, typed)}, or name one with {flag}"
        )
    return path


def _flag(data: str, typed: str | None) -> str:
    """What `--data` must be given for the same dataset."""
    if typed is not None:
        return shlex.quote(typed)
    if data in known_configs("data"):
        return data
    return f"{shlex.quote(data)}.yaml (a file of what the recipe has under data)"


_log = logging.getLogger("kd")
SAMPLES = 32  # images by which int8 learns its ranges


@dataclass(frozen=True)
class TrainedTeacher:
    """A teacher as its run left it."""

    folder: Path
    recipe: TeacherRecipe
    model: nn.Module
    task: Task

    @property
    def problem(self) -> Problem[Any]:
        """The problem that it was trained on."""
        return problem_of_task(self.recipe.task.name)

    @property
    def section(self) -> DatasetSection:
        """Of the data that it was trained on."""
        return self.recipe.data

    @property
    def called(self) -> str:
        """What messages call it: its run, what it is and what it learned."""
        return (
            f"teacher {self.folder} ({self.recipe.teacher.name}, of task {self.recipe.task.name})"
        )

    @property
    def reads_labels(self) -> bool:
        """Whether it is told the classes of the other objects."""
        return bool(getattr(self.model, "reads_labels", False))


def latest_teacher() -> Path:
    """The teacher of objects trained last, of those where the teacher command puts them.

    Raises:
        UserError: There is none.
    """
    finished = (RUNS / "teacher").glob("*/*/summary.json")
    latest = sorted(finished, key=lambda summary: summary.stat().st_mtime, reverse=True)
    for summary in latest:
        if _hides_objects(summary.parent):
            return summary.parent
    raise UserError(
        f"{RUNS / 'teacher'}: no trained teacher is there; name one with --teacher RUN, or "
        "train one: python -m kd.train_teacher --teacher cnn"
    )


def load_teacher(path: Path, num_classes: int) -> TrainedTeacher:
    """Load a teacher from its run folder, its `model.safetensors` or a checkpoint `last.pt`.

    Args:
        path: One of those.
        num_classes: Classes of the dataset that it is wanted for.

    Raises:
        UserError: Not a teacher's run, unfinished, or of another number of classes.
    """
    folder, file = (path, path / "model.safetensors") if path.is_dir() else (path.parent, path)
    checkpoint = None
    if file.suffix == ".pt":
        _, config, checkpoint = load_checkpoint(file)
        source = file
    elif (folder / "config.yaml").is_file():
        source = folder / "config.yaml"
        config = read_yaml(source)
    else:
        raise UserError(f"{folder}: not a run folder, it has no config.yaml")
    recipe = teacher_recipe(config, source)
    problem = problem_of_task(recipe.task.name)
    model = problem.build_teacher(_to_be_loaded(recipe), num_classes)
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
    """Load a teacher for a dataset, with the classes that it was trained on.

    These need not be the dataset's where its layers alone are read: see `check_classes`.

    Raises:
        UserError: As `load_teacher`.
    """
    names = class_names(path if path.is_dir() else path.parent)
    return load_teacher(path, data.num_classes if names is None else len(names))


def check_classes(teacher: TrainedTeacher, names: Sequence[str], where: str) -> None:
    """Refuse a teacher whose answers are about other classes, or about the same in another order.

    A run without its `classes.json` does not say which its are; their number must do then.

    Args:
        teacher: One whose answers are taken class by class.
        names: Of the dataset's classes, in order.
        where: What the dataset is called.

    Raises:
        UserError: It names the first class that differs.
    """
    known = class_names(teacher.folder)
    if known is None:
        return
    known = teacher.problem.comparable_names(teacher.task, known, names)
    for place, (theirs, ours) in enumerate(zip_longest(known, names)):
        if theirs != ours:
            said = ["none" if name is None else repr(name) for name in (theirs, ours)]
            raise UserError(
                f"{teacher.folder}: class {place} (from 0) of this teacher is {said[0]}, of "
                f"{where} {said[1]}; what it says would be taken for other classes: name a teacher "
                "that was trained on these classes in this order. Where they are the same by other "
                f"names, write the dataset's into {teacher.folder / 'classes.json'}"
            )


def class_names_of(path: Path) -> tuple[str, ...]:
    """The class names of a teacher, in the order of its answers.

    Args:
        path: As for `load_teacher`.

    Raises:
        UserError: Not a teacher's run; or a run without its `classes.json`, and its dataset is
            not there either.
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
            f"{folder}: no classes.json there to name the classes, nor the dataset: {error}"
        ) from error


def _hides_objects(run: Path) -> bool:
    """Whether a run is one of a context teacher."""
    config = read_yaml(run / "config.yaml")
    return problem_of_task(config["task"]["name"]).hides_objects


def fast_teacher(
    model: nn.Module, task: Task, dataset: Samples, *, int8: bool = False
) -> nn.Module:
    """A copy of a frozen teacher that answers as fast as it can; none of its layers can be tapped.

    Args:
        model: Stays as it is.
        task: How it is asked.
        dataset: What it will be asked about: a few images show int8 its ranges.
        int8: In 8-bit integers, on the CPU, but for its head; else batch norms are folded.
    """
    if not int8:
        return for_answers(model)
    few = range(0, len(dataset), max(1, len(dataset) // SAMPLES))
    samples = [images_of(task, collate([dataset[0, place]])) for place in few]
    return in_int8(model.cpu(), samples, spared=["head"] if hasattr(model, "head") else [])


def images_of(task: Task, batch: Batch) -> torch.Tensor:
    """The images that a model is called with first, as the task shows them."""
    images = task.inputs(batch)[0]
    assert images is not None
    return images


def _to_be_loaded(recipe: TeacherRecipe) -> Model:
    """The model's section for a run's weights.

    They replace whatever it started from, which need not be here any more. A trunk that remembers
    images computes instead: what a trained teacher is shown seldom comes twice, and only layers
    that run can be tapped.
    """
    replaced = {"weights": None, "remember": False, "file": None}
    options = {k: replaced.get(k, value) for k, value in recipe.teacher.options.items()}
    return recipe.teacher.model_copy(update={"options": options})


def fold_models(teacher: TrainedTeacher, num_classes: int) -> list[nn.Module]:
    """The models that `folds` of the teacher command made, in order of their fold."""
    count = teacher.recipe.folds
    if count < 2:
        raise UserError(
            f"{teacher.folder}: trained without folds, it has no out-of-fold posteriors; train it "
            "with --set folds=5, or take its own with --set soft_targets.out_of_fold=false"
        )
    section = _to_be_loaded(teacher.recipe)
    models = []
    for number in range(count):
        model = teacher.problem.build_teacher(section, num_classes)
        load_model(teacher.folder / f"fold{number}" / "model.safetensors", model)
        models.append(model.eval().requires_grad_(False))
    return models
