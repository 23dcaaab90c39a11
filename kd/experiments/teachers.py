"""Open a recipe's teachers once, before training, as sources of the students' soft targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from kd.config.recipes import DistillRecipe
from kd.distillation.hooks import FeatureTaps
from kd.distillation.registry import POSTERIOR
from kd.distillation.targets import (
    CachedPosteriors,
    CachedTeacher,
    LiveTeacher,
    SoftTargetSource,
    Teachers,
)
from kd.distillation.terms import Term, layers_among, outputs_by_teacher
from kd.errors import UserError
from kd.problems.base import Dataset, Task
from kd.runs.load_teacher import TrainedTeacher, check_classes, find_teacher, load_teacher_of
from kd.storage.fields import PREFIX, CachedField
from kd.teacher_cache.cache import CacheOptions, open_cache
from kd.teacher_cache.equivariance import check_moved_maps


@dataclass
class RecipeTeachers:
    """The opened teachers of a recipe by name; the name of the recipe's own `teacher` is "".

    Attributes:
        teachers: The teachers whose outputs some term reads.
        weights: Weights of the teachers in `mean.posterior` and `mean.logits`, in the same order.
        posteriors: Cached posteriors in memory, by teacher.
        maps: Other cached outputs, which are loaded with the samples, by teacher and output.
        live: Teachers that run in each training step.
    """

    teachers: dict[str, TrainedTeacher]
    weights: list[float] = field(default_factory=list)
    posteriors: dict[str, CachedPosteriors] = field(default_factory=dict)
    maps: dict[str, dict[str, CachedField]] = field(default_factory=dict)
    live: dict[str, LiveTeacher] = field(default_factory=dict)

    @property
    def teacher(self) -> TrainedTeacher:
        """The first of the teachers: the recipe's `teacher`, if some term reads it."""
        return next(iter(self.teachers.values()))

    @property
    def all_cached(self) -> bool:
        """Whether no teacher runs in training."""
        return not self.live

    def fields(self, outputs: Mapping[str, Sequence[str]]) -> list[CachedField]:
        """Return the cached maps that samples have to load; `outputs` are by teacher."""
        return [
            cached
            for name, maps in self.maps.items()
            for output, cached in maps.items()
            if output in outputs.get(name, ())
        ]

    def targets(
        self, outputs: Mapping[str, Sequence[str]], *, shuffled: int | None = None
    ) -> SoftTargetSource:
        """Build the source of soft targets for a student.

        Args:
            outputs: Names of the outputs that the student's terms read, by teacher.
            shuffled: Seed with which each cached posterior is assigned to another object, for the
                control variant; None: posteriors stay with their objects.
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
    """Return the run folders or files of the teachers that a recipe needs, without loading them.

    `data_typed` is the argument of `--data`, which error messages repeat.

    Raises:
        UserError: A teacher has no trained run, or the recipe does not name it.
    """
    outputs = outputs_by_teacher(terms, recipe.more_teachers)
    problem = data.problem
    for name, reference in recipe.teachers.items():
        unnamed = reference.run is None and "name" not in reference.model_fields_set
        if outputs[name] and unnamed and not (problem.hides_objects or problem.some_posteriors):
            key = f"more_teachers.{name}" if name else "teacher"
            raise UserError(
                f"{key}: the recipe names no teacher; choose a run with --teacher RUN or "
                f"--set {key}.run=RUN; python -m kd.train_teacher --list shows teachers to train"
            )
    return {
        name: find_teacher(reference, recipe.data.name, further=name, typed=data_typed)
        for name, reference in recipe.teachers.items()
        # The recipe's own context teacher is drawn beside every student.
        if outputs[name] or (data.problem.hides_objects and not name)
    }


def open_teachers(
    recipe: DistillRecipe,
    terms: Sequence[Term],
    task: Task,
    data: Dataset,
    accelerator: Accelerator,
    found: Mapping[str, Path],
) -> RecipeTeachers:
    """Load the teachers of a recipe, and compute the outputs that their caches lack.

    Args:
        recipe: The resolved recipe.
        terms: The terms of all variants.
        task: The students' task.
        data: The students' dataset.
        accelerator: Devices and processes.
        found: Run folder or file of each teacher, from `find_teachers`.

    Raises:
        UserError: A teacher was trained on other classes or another image size, lacks a layer, or
            its cache was made for another dataset; or cached maps that are flipped, shifted or
            scaled with an image differ too much from the teacher's maps of the augmented image.
    """
    teachers = {name: load_teacher_of(path, data) for name, path in found.items()}
    outputs = outputs_by_teacher(terms, recipe.more_teachers)
    by_class = [t for t in terms if t.kind.by_class and t.student in task.outputs]
    compared = outputs_by_teacher(by_class, recipe.more_teachers)
    for name, teacher in teachers.items():  # all of them, before one of them runs for hours
        _check_layers(teacher, name, terms, recipe)
        if recipe.caches(name) and recipe.soft_targets.top_k:
            _check_softmax(teacher, name, terms, recipe)
        read, always = compared[name], data.problem.hides_objects and not name
        if always or len(layers_among(read, teacher.task)) < len(read):
            check_classes(teacher, data.class_names, recipe.data.name)
        if recipe.caches(name):
            _check_labels_known(teacher, recipe, data)
        teacher.model.to(accelerator.device)
    opened = RecipeTeachers(teachers, [recipe.teachers[name].weight for name in teachers])
    for name, teacher in teachers.items():
        if not recipe.caches(name):
            opened.live[name] = _live(teacher, outputs[name], recipe, accelerator)
            continue
        cached = _cached(teacher, name, outputs[name], recipe, data, accelerator)
        if POSTERIOR in cached:
            posteriors = _posteriors(cached.pop(POSTERIOR), data)
            opened.posteriors[name] = posteriors.balanced(recipe.soft_targets.balance)
        limit = recipe.soft_targets.equivariance_error
        check_moved_maps(teacher, data, cached, accelerator, limit=limit)
        opened.maps[name] = cached
    return opened


def _check_layers(
    teacher: TrainedTeacher, name: str, terms: Sequence[Term], recipe: DistillRecipe
) -> None:
    """Raise a UserError if a teacher lacks a layer that a term reads.

    The message says if the recipe is for another kind of teacher, which is the likely cause.
    """
    try:
        for term in terms:
            read = outputs_by_teacher([term], recipe.more_teachers)[name]
            called = f"losses: {term.name}: {teacher.called}"
            FeatureTaps(teacher.model, layers_among(read, teacher.task), called=called).remove()
    except UserError as error:
        reference, key = recipe.teachers[name], f"more_teachers.{name}" if name else "teacher"
        if (
            reference.name == teacher.recipe.teacher.name
            or "name" not in reference.model_fields_set
        ):
            raise
        raise UserError(
            f"{error}. The recipe is for {key}.name {reference.name}: use a run of that kind, or "
            "layers of this one in losses and adapters"
        ) from error


def _check_softmax(
    teacher: TrainedTeacher, name: str, terms: Sequence[Term], recipe: DistillRecipe
) -> None:
    for term in (term for term in terms if not term.kind.softmax):
        read = outputs_by_teacher([term], recipe.more_teachers)[name]
        if layers_among(read, teacher.task) != read:
            raise UserError(
                f"losses: {term.name}: this loss compares raw outputs, but with soft_targets.top_k "
                f"the cache has only probabilities of {', '.join(read)}; set soft_targets.top_k=0"
            )


def _posteriors(cached: CachedField, data: Dataset) -> CachedPosteriors:
    """Read all posteriors of a cache, and check that they belong to the dataset's objects.

    They are checked here because on a GPU look-ups during training are not.
    """
    posteriors = CachedPosteriors.read(cached)
    ids = torch.from_numpy(data.problem.object_ids(data))
    if data.problem.some_posteriors:
        posteriors.check_knows(ids)
    else:
        posteriors.check_covers(ids)
    return posteriors


def _check_labels_known(teacher: TrainedTeacher, recipe: DistillRecipe, data: Dataset) -> None:
    if teacher.reads_labels and any(data.labelled(seed) is not None for seed in recipe.seeds):
        raise UserError(
            f"{teacher.folder}: this teacher reads the other objects' classes, which data.labelled "
            "hides from the student on unlabelled images; use a teacher of pixels only, or "
            "--set data.labelled=1.0"
        )


def _prefix(teacher: str) -> str:
    return f"{PREFIX}{teacher}." if teacher else PREFIX


def _cached(
    teacher: TrainedTeacher,
    name: str,
    outputs: Sequence[str],
    recipe: DistillRecipe,
    data: Dataset,
    accelerator: Accelerator,
) -> dict[str, CachedField]:
    """Open a teacher's cache and compute what it lacks; return the cached fields by output."""
    targets = recipe.soft_targets
    seen = data.problem.cached_data(data)
    hides = seen.problem.hides_objects
    always = [POSTERIOR] if hides else []
    location = targets.cache
    if location is not None and name:
        location = f"{location.rstrip('/')}/{name}"
    options = CacheOptions(
        outputs=[*always, *(output for output in outputs if output not in always)],
        out_of_fold=targets.out_of_fold and hides,
        dtype=targets.dtype, top_k=targets.top_k,
        mirrored=targets.mirrored, int8=targets.int8, size=targets.size,
        location=location,
    )  # fmt: skip
    found = open_cache(teacher, seen, accelerator, options)
    return {
        output: CachedField(
            one.store, f"{_prefix(name)}{output}".removeprefix(PREFIX), channels=one.channels,
            stride=targets.stride_of(layer=bool(layers_among([output], teacher.task))),
        )
        for output, one in found.items()
    }  # fmt: skip


def _live(
    teacher: TrainedTeacher, outputs: Sequence[str], recipe: DistillRecipe, accelerator: Accelerator
) -> LiveTeacher:
    """Wrap a live teacher for all variants and seeds; one wrapper, since each adds hooks."""
    size, own = (getattr(section, "size", None) for section in (recipe.data, teacher.section))
    if own != size:
        raise UserError(
            f"data.size {size}: the teacher saw {own}; a live teacher sees the student's images"
        )
    return LiveTeacher(
        teacher.model, teacher.task.for_teaching(outputs), layers_among(outputs, teacher.task),
        autocast=accelerator.mixed_precision == "bf16", posterior=POSTERIOR in outputs,
        called=teacher.called,
    )  # fmt: skip
