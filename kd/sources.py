"""A recipe's teachers, opened once before anything trains, and what they give the students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from accelerate import Accelerator

from kd.config import Data, DistillRecipe, TeacherReference
from kd.data.stored import PREFIX, StoredField
from kd.equivariance import check_moved_maps
from kd.errors import UserError
from kd.features import FeatureTaps
from kd.objective import POSTERIOR, TEACHER_OUTPUTS, Term
from kd.opened import OpenData, Opened
from kd.soft_targets import (
    LiveTeacher,
    SoftTargetSource,
    StoredPosteriors,
    StoredTeacher,
    Teachers,
)
from kd.tasks.detection import Detection
from kd.teacher_cache import Wanted, open_cache
from kd.teacher_runs import TrainedTeacher, find_teacher, load_teacher_of
from kd.wiring import layers_among, outputs_by_teacher


@dataclass
class Sources:
    """Where the terms' targets come from.

    Args:
        teacher: The recipe's `teacher`.
        weights: Of the teachers in their mean.
        posteriors: Stored ones by teacher, or none where the teachers are live; the first is the
            recipe's `teacher`, whose name is empty.
        maps: Other stored outputs by teacher, which come with the samples.
        live: The teachers as they run in each step, or none.
    """

    teacher: TrainedTeacher
    weights: list[float] = field(default_factory=list)
    posteriors: dict[str, StoredPosteriors] = field(default_factory=dict)
    maps: dict[str, dict[str, StoredField]] = field(default_factory=dict)
    live: dict[str, LiveTeacher] = field(default_factory=dict)

    @property
    def stored(self) -> bool:
        """Whether everything was computed once."""
        return not self.live

    def fields(self, outputs: Mapping[str, Sequence[str]]) -> list[StoredField]:
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
            found[name] = StoredTeacher(posteriors, layers, prefix=_prefix(name))
        first, *more = found
        if not more:
            return found[first]
        return Teachers(found[first], {name: found[name] for name in more}, self.weights)


def open_sources(
    recipe: DistillRecipe, terms: Sequence[Term], data: Opened, accelerator: Accelerator
) -> Sources:
    """Open the teachers of a recipe; what is to be stored and is not yet is computed now.

    Raises:
        UserError: A teacher that is not there, or is of another data set or picture size; stored
            maps that cannot follow the picture.
    """
    references: dict[str, TeacherReference] = {"": recipe.teacher, **recipe.more_teachers}
    outputs = outputs_by_teacher(terms, recipe.more_teachers)
    teachers = {
        name: load_teacher_of(find_teacher(reference, recipe.data.name), data)
        for name, reference in references.items()
    }
    for name, teacher in teachers.items():  # all of them, before one of them works for hours
        FeatureTaps(teacher.model, layers_among(outputs[name])).remove()
        _check_labels_known(teacher, recipe)
        teacher.model.to(accelerator.device)
    sources = Sources(teachers[""], [reference.weight for reference in references.values()])
    for name, teacher in teachers.items():
        if recipe.soft_targets.kind == "live":
            sources.live[name] = _live(teacher, outputs[name], recipe, accelerator)
            continue
        kept = _kept(teacher, name, outputs[name], recipe, data, accelerator)
        if isinstance(data, OpenData):
            posteriors = StoredPosteriors.read(kept.pop(POSTERIOR))
            # On a GPU a look-up does not check: here is the place, before anything trains.
            posteriors.check_covers(torch.from_numpy(data.train.object_ids.astype(np.int64)))
            sources.posteriors[name] = posteriors.balanced(recipe.soft_targets.balance)
            limit = recipe.soft_targets.moved_error
            check_moved_maps(teacher, data, kept, accelerator, limit=limit)
        sources.maps[name] = kept
    return sources


def _check_labels_known(teacher: TrainedTeacher, recipe: DistillRecipe) -> None:
    """Stored posteriors must not carry labels that the student is not to know."""
    if not isinstance(recipe.data, Data):
        return
    labelled = recipe.data.labelled
    if teacher.reads_labels and labelled < 1 and recipe.soft_targets.kind == "stored":
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
    data: Opened,
    accelerator: Accelerator,
) -> dict[str, StoredField]:
    """A teacher's stored outputs; samples call them by teacher, posteriors stay in memory."""
    targets = recipe.soft_targets
    always = [POSTERIOR] if isinstance(data, OpenData) else []
    location = targets.cache
    if location is not None and name:
        location = f"{location.rstrip('/')}/{name}"
    wanted = Wanted(
        outputs=[*always, *(output for output in outputs if output not in always)],
        out_of_fold=targets.out_of_fold and isinstance(data, OpenData),
        dtype=targets.dtype, top_k=targets.top_k,
        mirrored=targets.mirrored, int8=targets.int8, size=targets.size,
        location=location,
    )  # fmt: skip
    found = open_cache(teacher, data, accelerator, wanted)
    return {
        output: StoredField(
            kept.store, f"{_prefix(name)}{output}".removeprefix(PREFIX), channels=kept.channels,
            stride=targets.stride_of(layer=output not in TEACHER_OUTPUTS),
        )
        for output, kept in found.items()
    }  # fmt: skip


def _live(
    teacher: TrainedTeacher, outputs: Sequence[str], recipe: DistillRecipe, accelerator: Accelerator
) -> LiveTeacher:
    """One for all arms and seeds: each would leave its hooks on the teacher."""
    if teacher.recipe.data.size != recipe.data.size:
        raise UserError(
            f"data.size {recipe.data.size}: the teacher saw {teacher.recipe.data.size}; "
            "a live teacher sees the student's pictures"
        )
    task = teacher.task
    if isinstance(task, Detection):
        task = replace(task, answers=False)
    return LiveTeacher(
        teacher.model, task, layers_among(outputs),
        autocast=accelerator.mixed_precision == "bf16", posterior=POSTERIOR in outputs,
    )  # fmt: skip
