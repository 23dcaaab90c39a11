"""A recipe's teachers, opened once before anything trains, and what they give the students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator

from kd.config.recipes import Data, DistillRecipe
from kd.distillation.hooks import FeatureTaps
from kd.distillation.targets import (
    CachedPosteriors,
    CachedTeacher,
    LiveTeacher,
    SoftTargetSource,
    Teachers,
)
from kd.distillation.terms import OF_CLASSES, POSTERIOR, ROWS, TEACHER_OUTPUTS, Term
from kd.errors import UserError
from kd.experiments.connect import layers_among, outputs_by_teacher
from kd.losses.pair_wise import pair_wise
from kd.problems.detection.data import DetectionDataset
from kd.problems.detection.task import Detection
from kd.problems.objects.data import Dataset, ObjectsDataset
from kd.runs.load_teacher import TrainedTeacher, check_classes, find_teacher, load_teacher_of
from kd.storage.fields import PREFIX, CachedField
from kd.teacher_cache.cache import Wanted, open_cache
from kd.teacher_cache.equivariance import check_moved_maps


@dataclass
class RecipeTeachers:
    """Where the terms' targets come from.

    Args:
        teachers: By name, those that terms read; that of the recipe's `teacher` is empty.
        weights: Of the same in their mean.
        posteriors: Stored ones by teacher.
        maps: Other stored outputs by teacher, which come with the samples.
        live: The teachers that run in each step.
    """

    teachers: dict[str, TrainedTeacher]
    weights: list[float] = field(default_factory=list)
    posteriors: dict[str, CachedPosteriors] = field(default_factory=dict)
    maps: dict[str, dict[str, CachedField]] = field(default_factory=dict)
    live: dict[str, LiveTeacher] = field(default_factory=dict)

    @property
    def teacher(self) -> TrainedTeacher:
        """The first one, the recipe's `teacher` as a rule."""
        return next(iter(self.teachers.values()))

    @property
    def stored(self) -> bool:
        """Whether everything was computed once."""
        return not self.live

    def fields(self, outputs: Mapping[str, Sequence[str]]) -> list[CachedField]:
        """What the samples must bring for these outputs by teacher."""
        return [
            kept
            for name, maps in self.maps.items()
            for output, kept in maps.items()
            if output in outputs.get(name, ())
        ]

    def targets(
        self, outputs: Mapping[str, Sequence[str]], *, shuffled: int | None = None
    ) -> SoftTargetSource:
        """Targets of a batch.

        Args:
            outputs: By teacher, what `fields` were asked for.
            shuffled: Seed by which each posterior is given to another object: the control.
        """
        found: dict[str, SoftTargetSource] = {**self.live}
        for name, maps in self.maps.items():
            own = self.posteriors.get(name)
            posteriors = own if own is None or shuffled is None else own.shuffled(shuffled)
            layers = [output for output in maps if output in outputs.get(name, ())]
            found[name] = CachedTeacher(posteriors, layers, prefix=_prefix(name))
        more = {name: found[name] for name in self.teachers if name}
        first = found.get("")
        if first is not None and not more:
            return first
        return Teachers(first, more, self.weights)


def find_teachers(
    recipe: DistillRecipe, terms: Sequence[Term], data: Dataset, data_typed: str | None = None
) -> dict[str, Path]:
    """Where the teachers are that a recipe needs, by name; nothing of them is read.

    Args:
        recipe: As the user wrote it.
        terms: Those that any of its variants has.
        data: What they are computed on.
        data_typed: What `--data` was given, for a message.

    Raises:
        UserError: One is not there.
    """
    outputs = outputs_by_teacher(terms, recipe.more_teachers)
    return {
        name: find_teacher(reference, recipe.data.name, further=name, typed=data_typed)
        for name, reference in recipe.teachers.items()
        if outputs[name] or name in _always(data)
    }


def open_teachers(
    recipe: DistillRecipe,
    terms: Sequence[Term],
    data: Dataset,
    accelerator: Accelerator,
    paths: Mapping[str, Path],
) -> RecipeTeachers:
    """Open the teachers of a recipe; what is to be stored and is not yet is computed now.

    Args:
        recipe: As the user wrote it.
        terms: Those that any of its variants has.
        data: What they are computed on.
        accelerator: Devices and processes.
        paths: Of `find_teachers`.

    Raises:
        UserError: A teacher that is of another data set, other classes or another picture size;
            stored maps that cannot follow the picture.
    """
    outputs = outputs_by_teacher(terms, recipe.more_teachers)
    always = _always(data)
    teachers = {
        name: _loaded(path, data, stored=recipe.keeps(name)) for name, path in paths.items()
    }
    by_class = always | _read_by_class(terms, recipe)
    for name, teacher in teachers.items():  # all of them, before one of them works for hours
        _check_layers(teacher, name, outputs[name], recipe)
        if name in by_class:
            check_classes(teacher, data.class_names, recipe.data.name)
        if recipe.keeps(name):
            _check_labels_known(teacher, recipe)
        teacher.model.to(accelerator.device)
    sources = RecipeTeachers(teachers, [recipe.teachers[name].weight for name in teachers])
    for name, teacher in teachers.items():
        if not recipe.keeps(name):
            sources.live[name] = _live(teacher, outputs[name], recipe, accelerator)
            continue
        kept = _kept(teacher, name, outputs[name], recipe, data, accelerator)
        if POSTERIOR in kept:
            posteriors = _posteriors(kept.pop(POSTERIOR), data)
            sources.posteriors[name] = posteriors.balanced(recipe.soft_targets.balance)
        if isinstance(data, ObjectsDataset):
            limit = recipe.soft_targets.moved_error
            check_moved_maps(teacher, data, kept, accelerator, limit=limit)
        sources.maps[name] = kept
    return sources


def _always(data: Dataset) -> set[str]:
    """Teachers that are needed whether a term reads them or not.

    Of objects the recipe's own says what pictures show, and what a bare student may be taught.
    """
    return {""} if isinstance(data, ObjectsDataset) else set()


def _loaded(path: Path, data: Dataset, *, stored: bool) -> TrainedTeacher:
    """A teacher for this data; stored ones answer about objects, and so have the data's classes."""
    asked = data.objects if stored and isinstance(data, DetectionDataset) else data
    return load_teacher_of(path, asked)


def _check_layers(
    teacher: TrainedTeacher, name: str, outputs: Sequence[str], recipe: DistillRecipe
) -> None:
    """A layer that a teacher lacks may mean that another kind of teacher was to be named."""
    try:
        FeatureTaps(teacher.model, layers_among(outputs), called=teacher.called).remove()
    except UserError as error:
        reference, key = recipe.teachers[name], f"more_teachers.{name}" if name else "teacher"
        if (
            reference.name == teacher.recipe.teacher.name
            or "name" not in reference.model_fields_set
        ):
            raise
        raise UserError(
            f"{error}. The recipe is for {key}.name {reference.name}: name a run of that kind, or "
            "layers that this one has in losses and adapters"
        ) from error


def _read_by_class(terms: Sequence[Term], recipe: DistillRecipe) -> set[str]:
    """Teachers whose answers are held against the student's class by class.

    Others' classes may be any: layers have none, and `pair_wise` compares affinities.
    """
    compared = [
        term for term in terms if term.student in ROWS and term.kind.function is not pair_wise
    ]
    outputs = outputs_by_teacher(compared, recipe.more_teachers)
    return {name for name, read in outputs.items() if not OF_CLASSES.isdisjoint(read)}


def _posteriors(kept: CachedField, data: Dataset) -> CachedPosteriors:
    """All of a cache; which objects they are of is looked at before anything trains.

    On a GPU a look-up does not check. A detector may learn from boxes that nobody asked about.
    """
    posteriors = CachedPosteriors.read(kept)
    if isinstance(data, DetectionDataset):
        ids = data.objects.train.object_ids
        posteriors.check_knows(torch.from_numpy(ids.astype(np.int64)))
    elif isinstance(data, ObjectsDataset):
        posteriors.check_covers(torch.from_numpy(data.train.object_ids.astype(np.int64)))
    return posteriors


def _check_labels_known(teacher: TrainedTeacher, recipe: DistillRecipe) -> None:
    """Stored posteriors must not carry labels that the student is not to know."""
    if not isinstance(recipe.data, Data):
        return
    labelled = recipe.data.labelled
    if teacher.reads_labels and labelled < 1:
        raise UserError(
            f"{teacher.folder}: this teacher is told the other objects' classes, which "
            f"data.labelled {labelled} keeps from the student on the other images; take a teacher "
            "on pixels alone, or --set data.labelled=1.0"
        )


def _prefix(teacher: str) -> str:
    return f"{PREFIX}{teacher}." if teacher else PREFIX


def _kept(
    teacher: TrainedTeacher,
    name: str,
    outputs: Sequence[str],
    recipe: DistillRecipe,
    data: Dataset,
    accelerator: Accelerator,
) -> dict[str, CachedField]:
    """A teacher's stored outputs; samples call them by teacher, posteriors stay in memory."""
    targets = recipe.soft_targets
    objects = data.objects if isinstance(data, DetectionDataset) else data
    about_objects = isinstance(objects, ObjectsDataset)
    always = [POSTERIOR] if about_objects else []
    location = targets.cache
    if location is not None and name:
        location = f"{location.rstrip('/')}/{name}"
    wanted = Wanted(
        outputs=[*always, *(output for output in outputs if output not in always)],
        out_of_fold=targets.out_of_fold and about_objects,
        dtype=targets.dtype, top_k=targets.top_k,
        mirrored=targets.mirrored, int8=targets.int8, size=targets.size,
        location=location,
    )  # fmt: skip
    found = open_cache(teacher, objects, accelerator, wanted)
    return {
        output: CachedField(
            kept.store, f"{_prefix(name)}{output}".removeprefix(PREFIX), channels=kept.channels,
            stride=targets.stride_of(layer=output not in TEACHER_OUTPUTS),
        )
        for output, kept in found.items()
    }  # fmt: skip


def _of_pyramid(outputs: Sequence[str]) -> bool:
    """Whether nothing else of a detector is wanted: its heads need not run then."""
    return all(output.startswith("network.backbone") for output in outputs)


def _live(
    teacher: TrainedTeacher, outputs: Sequence[str], recipe: DistillRecipe, accelerator: Accelerator
) -> LiveTeacher:
    """One for all variants and seeds: each would leave its hooks on the teacher."""
    if teacher.recipe.data.size != recipe.data.size:
        raise UserError(
            f"data.size {recipe.data.size}: the teacher saw {teacher.recipe.data.size}; "
            "a live teacher sees the student's pictures"
        )
    task = teacher.task
    if isinstance(task, Detection):
        wanted: Literal["features", "objects"] = "features" if _of_pyramid(outputs) else "objects"
        task = replace(task, wanted=wanted).asking(outputs)
    return LiveTeacher(
        teacher.model, task, layers_among(outputs),
        autocast=accelerator.mixed_precision == "bf16", posterior=POSTERIOR in outputs,
        called=teacher.called,
    )  # fmt: skip
