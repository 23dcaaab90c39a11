"""Trained teachers: found, loaded, and their posteriors computed once and stored."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from kd.adapted import AdaptedStudent
from kd.build import (
    OpenData,
    build_task,
    build_teacher,
    make_dataset,
    make_loader,
)
from kd.checkpoint import load_checkpoint, load_model, load_state
from kd.config import Model, TeacherRecipe, TeacherReference
from kd.config_reader import from_plain, read_yaml
from kd.data.splits import fold_of
from kd.engine import evaluate
from kd.errors import UserError
from kd.metrics.top_n import TopN
from kd.nn.weights import weights_hash
from kd.soft_targets import StoredPosteriors, from_arrays
from kd.tasks.base import Task, named

_log = logging.getLogger("kd")
RUNS = Path("runs")


@dataclass(frozen=True)
class TrainedTeacher:
    """A teacher as its run left it."""

    folder: Path
    recipe: TeacherRecipe
    model: nn.Module
    task: Task


def find_teacher(reference: TeacherReference, data: str) -> Path:
    """The run folder or file that a recipe means.

    Raises:
        UserError: None is named and none is where the teacher command puts them; the message says
            which command makes one.
    """
    if reference.run is not None:
        path = Path(reference.run)
        if not path.exists():
            raise UserError(f"teacher.run: {path}: no such run folder or file")
        return path
    path = default_folder(reference.name, data)
    if not (path / "model.safetensors").is_file():
        raise UserError(
            f"no trained teacher at {path}; make one with: python -m kd.train_teacher --teacher "
            f"{reference.name} --data {data}, or name one with --teacher RUN"
        )
    return path


def default_folder(teacher: str, data: str) -> Path:
    """Where a teacher's run goes unless told otherwise."""
    return RUNS / "teacher" / teacher / data


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
    if "student" in config:
        raise UserError(f"{source}: a student's run; a teacher's run is needed")
    recipe = from_plain(TeacherRecipe, config, str(source))
    # The run's weights replace whatever it started from, which need not be here any more.
    model = build_teacher(_without_weights(recipe), num_classes)
    try:
        if checkpoint is not None:
            load_state(AdaptedStudent(model), checkpoint.get("ema", checkpoint["model"]), file)
        else:
            load_model(file, model)
    except UserError as error:
        raise UserError(f"{error} (the data set has {num_classes} classes)") from error
    task = build_task(recipe.task, recipe.data, num_classes)
    return TrainedTeacher(folder, recipe, model.eval().requires_grad_(False), task)


def _without_weights(recipe: TeacherRecipe) -> Model:
    """The model's section; its weights come from the run."""
    options = dict(recipe.teacher.options)
    if "weights" in options:
        options["weights"] = None
    return recipe.teacher.model_copy(update={"options": options})


def train_posteriors(
    teacher: TrainedTeacher, data: OpenData, accelerator: Accelerator, *, out_of_fold: bool
) -> StoredPosteriors:
    """The teacher's posteriors of every train object, from its folder or computed now.

    Args:
        teacher: The teacher.
        data: Whose train split is asked about.
        accelerator: Devices and processes.
        out_of_fold: Each image by the fold model that did not train on it.

    Raises:
        UserError: `out_of_fold` and the teacher was trained without folds.
    """
    # The teacher sees pictures as it did in training; which objects count is the student's choice.
    shown = {name: getattr(teacher.recipe.data, name) for name in ("size", "shape")}
    data = replace(data, section=data.section.model_copy(update=shown))
    models = fold_models(teacher, data.num_classes) if out_of_fold else [teacher.model]
    about = {
        "teacher": hashlib.sha256("".join(map(weights_hash, models)).encode()).hexdigest()[:16],
        "data": data.train.fingerprint,
        "out_of_fold": str(out_of_fold),
        "transform": f"size {data.section.size}, {data.section.shape}, rescaled and padded",
    }
    key = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:12]
    path = teacher.folder / "posteriors" / f"{data.section.name}-train-{key}.safetensors"
    if path.is_file():
        stored = StoredPosteriors.load(path, about)
        # On a GPU a look-up does not check: here is the place, before anything trains.
        stored.check_covers(torch.from_numpy(data.train.object_ids.astype(np.int64)))
        return stored
    _log.info("posteriors of %s are computed once, then kept in %s", teacher.folder, path)
    if out_of_fold:
        folds = fold_of(data.train.image_ids, len(models))
        parts = [
            predict(model, teacher.task, data, accelerator, data.train.image_ids[folds == number])
            for number, model in enumerate(models)
        ]
        ids, log_probs = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    else:
        ids, log_probs = predict(teacher.model, teacher.task, data, accelerator, None)
    stored = from_arrays(ids, log_probs.astype(np.float32))
    if accelerator.is_main_process:
        try:
            stored.save(path, about)
        except UserError as error:  # they are here all the same
            _log.warning("%s; the posteriors are used without being kept", error)
    accelerator.wait_for_everyone()
    return stored


def fold_models(teacher: TrainedTeacher, num_classes: int) -> list[nn.Module]:
    """The models that `folds` of the teacher command made, in order of their fold."""
    count = teacher.recipe.folds
    if count < 2:
        raise UserError(
            f"{teacher.folder}: trained without folds, it has no out-of-fold posteriors; train it "
            "with --set folds=5, or take its own with --set soft_targets.out_of_fold=false"
        )
    section = _without_weights(teacher.recipe)
    models = []
    for number in range(count):
        model = build_teacher(section, num_classes)
        load_model(teacher.folder / f"fold{number}" / "model.safetensors", model)
        models.append(model.eval().requires_grad_(False))
    return models


def predict(
    model: nn.Module,
    task: Task,
    data: OpenData,
    accelerator: Accelerator,
    only: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Log-probabilities of the train objects, each hidden in turn, nothing augmented.

    Of all objects: an augmentation can bring one that is too large or too small inside the limits.
    """
    section = data.section.model_copy(update={"min_share": 0.0, "max_share": 1.0})
    dataset = make_dataset(replace(data, section=section), "train", train=False, only=only)
    loader = make_loader(dataset, accelerator, batch_size=16, workers=data.section.workers)
    metric = TopN(data.num_classes)
    evaluate(AdaptedStudent(model).eval().to(accelerator.device), task, loader, metric, accelerator)
    records = metric.records()
    return records["object_ids"], records["log_probs"].astype(np.float32)


def expectation(teacher: TrainedTeacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The teacher's probabilities for a batch's hidden objects, (K, C), in its own picture size."""
    images, size = batch["images"], teacher.recipe.data.size
    if images.shape[-1] != size:
        small = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
        boxes = batch["boxes"] * (size / images.shape[-1])
        batch = {**batch, "images": small.round().to(torch.uint8), "boxes": boxes}
    with torch.no_grad():
        output = teacher.model(*teacher.task.inputs(batch))
    return teacher.task.decode(named(output), batch).exp()
