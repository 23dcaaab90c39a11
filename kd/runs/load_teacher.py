"""Trained teachers: loaded, held against a data set, and asked."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kd.config.datasets import OBJECTS, kind_of_data
from kd.config.reader import known_configs, plain_data, read_yaml
from kd.config.recipes import Data, Model, TeacherRecipe, TeacherReference
from kd.data.loader import Samples, collate
from kd.data.open_files import class_names as data_class_names
from kd.distillation.student import AdaptedStudent
from kd.engine.checkpoint import load_checkpoint, load_model, load_state
from kd.errors import UserError
from kd.nn.inference import for_answers, in_int8
from kd.problems.base import Batch, Task, named
from kd.problems.objects.context import ContextMap
from kd.problems.objects.data import Dataset, ObjectsDataset
from kd.runs.build import build_task, build_teacher, open_data
from kd.runs.folder import class_names
from kd.runs.transfer_trunk import teacher_recipe

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
        data: Name of the recipe's data set.
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
    """What `--data` must be given for the same data set."""
    if typed is not None:
        return shlex.quote(typed)
    if data in known_configs("data"):
        return data
    return f"{shlex.quote(data)}.yaml (a file of what the recipe has under data)"


_log = logging.getLogger("kd")
BACKGROUND = "background"  # class 0 of label maps that are drawn from objects
SAMPLES = 32  # pictures by which int8 learns its ranges


@dataclass(frozen=True)
class TrainedTeacher:
    """A teacher as its run left it."""

    folder: Path
    recipe: TeacherRecipe
    model: nn.Module
    task: Task

    @property
    def objects(self) -> Data:
        """How the objects that it learned from were shown.

        Raises:
            UserError: It learned from label maps, and answers no question about objects.
        """
        section = self.recipe.data
        if not isinstance(section, Data):
            raise UserError(
                f"{self.folder}: trained on label maps; a teacher of the context of objects is "
                "needed here"
            )
        return section

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
        if _teaches_objects(summary.parent):
            return summary.parent
    raise UserError(
        f"{RUNS / 'teacher'}: no trained teacher is there; name one with --teacher RUN, or "
        "train one: python -m kd.train_teacher --teacher cnn"
    )


def load_teacher(path: Path, num_classes: int) -> TrainedTeacher:
    """Load a teacher from its run folder, its `model.safetensors` or a checkpoint `last.pt`.

    Args:
        path: One of those.
        num_classes: Classes of the data set that it is wanted for.

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
    model = build_teacher(_to_be_loaded(recipe), num_classes)
    try:
        if checkpoint is not None:
            load_state(AdaptedStudent(model), checkpoint.get("ema", checkpoint["model"]), file)
        else:
            load_model(file, model)
    except UserError as error:
        raise UserError(f"{error} (the data set has {num_classes} classes)") from error
    task = build_task(recipe.task, recipe.data, num_classes, model=model)
    return TrainedTeacher(folder, recipe, model.eval().requires_grad_(False), task)


def load_teacher_of(path: Path, data: Dataset) -> TrainedTeacher:
    """A teacher of a data set's classes; one of objects has its own where these are label maps.

    Raises:
        UserError: As `load_teacher`.
    """
    own = not isinstance(data, ObjectsDataset) and _teaches_objects(path)
    return load_teacher(path, len(class_names_of(path)) if own else data.num_classes)


def check_classes(teacher: TrainedTeacher, names: Sequence[str], where: str) -> None:
    """Refuse a teacher whose answers are about other classes, or about the same in another order.

    A run without its `classes.json` does not say which its are; their number must do then.

    Args:
        teacher: One whose answers are taken class by class.
        names: Of the data set's classes, in order.
        where: What the data set is called.

    Raises:
        UserError: It names the first class that differs.
    """
    known = class_names(teacher.folder)
    if known is None:
        return
    if isinstance(teacher.task, ContextMap) and names[0] == BACKGROUND != known[0]:
        known = (BACKGROUND, *known)  # its score maps begin with that
    for place, (theirs, ours) in enumerate(zip_longest(known, names)):
        if theirs != ours:
            said = ["none" if name is None else repr(name) for name in (theirs, ours)]
            raise UserError(
                f"{teacher.folder}: class {place} (from 0) of this teacher is {said[0]}, of "
                f"{where} {said[1]}; what it says would be taken for other classes: name a teacher "
                "that was trained on these classes in this order. Where they are the same by other "
                f"names, write the data set's into {teacher.folder / 'classes.json'}"
            )


def class_names_of(path: Path) -> tuple[str, ...]:
    """The class names of a teacher, in the order of its answers.

    Args:
        path: As for `load_teacher`.

    Raises:
        UserError: Not a teacher's run; or a run without its `classes.json`, and its data set is
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
    section = plain_data(config["data"], str(folder / "config.yaml"))
    try:
        if isinstance(section, Data):
            return data_class_names(section)
        return open_data(section).class_names
    except UserError as error:
        raise UserError(
            f"{folder}: no classes.json there to name the classes, nor the data set: {error}"
        ) from error


def _teaches_objects(path: Path) -> bool:
    """Whether a teacher's run, or a file in one, is about objects rather than label maps."""
    config = read_yaml((path if path.is_dir() else path.parent) / "config.yaml")
    return kind_of_data(config.get("data", {})) == OBJECTS


def answering(model: nn.Module, task: Task, dataset: Samples, *, int8: bool = False) -> nn.Module:
    """A copy of a frozen teacher that answers as fast as it can; none of its layers can be tapped.

    Args:
        model: Stays as it is.
        task: How it is asked.
        dataset: What it will be asked about: a few pictures show int8 its ranges.
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
    pictures computes instead: what a trained teacher is shown seldom comes twice, and only layers
    that run can be tapped.
    """
    replaced = {"weights": None, "remember": False, "file": None}
    options = {k: replaced.get(k, value) for k, value in recipe.teacher.options.items()}
    return recipe.teacher.model_copy(update={"options": options})


def as_shown(teacher: TrainedTeacher, data: ObjectsDataset, **changes: Any) -> ObjectsDataset:
    """A data set with pictures as the teacher saw them in training.

    Args:
        teacher: Its picture size and its shape of hidden regions are taken.
        data: The rest is this one's.
        changes: Of the data set's section.
    """
    shown = {name: getattr(teacher.objects, name) for name in ("size", "shape")}
    return replace(data, section=data.section.model_copy(update={**shown, **changes}))


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
        model = build_teacher(section, num_classes)
        load_model(teacher.folder / f"fold{number}" / "model.safetensors", model)
        models.append(model.eval().requires_grad_(False))
    return models


def expectation(teacher: TrainedTeacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The teacher's probabilities for a batch's hidden objects, (K, C), in its own picture size."""
    images, size = batch["images"], teacher.objects.size
    if images.shape[-1] != size:
        small = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
        boxes = batch["boxes"] * (size / images.shape[-1])
        batch = {**batch, "images": small.round().to(torch.uint8), "boxes": boxes}
    with torch.no_grad():
        output = teacher.model(*teacher.task.inputs(batch))
    return teacher.task.decode(named(output), batch).exp()
