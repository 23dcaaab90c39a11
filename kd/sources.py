"""A recipe's teachers, opened once before anything trains, and what they give the students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from accelerate import Accelerator

from kd.build import OpenData
from kd.config import DistillRecipe, TeacherReference
from kd.errors import UserError
from kd.objective import Term
from kd.soft_targets import LiveTeacher, SoftTargetSource, StoredPosteriors, Teachers
from kd.teacher_runs import TrainedTeacher, find_teacher, load_teacher, train_posteriors
from kd.wiring import layers_by_teacher


@dataclass
class Sources:
    """Where the terms' targets come from.

    Args:
        teacher: The recipe's `teacher`.
        weights: Of the teachers in their mean.
        posteriors: Stored ones by teacher, or none where the teachers are live; the first is the
            recipe's `teacher`.
        live: The teachers as they run in each step, or none.
    """

    teacher: TrainedTeacher
    weights: list[float] = field(default_factory=list)
    posteriors: dict[str, StoredPosteriors] = field(default_factory=dict)
    live: dict[str, LiveTeacher] = field(default_factory=dict)

    @property
    def stored(self) -> bool:
        """Whether everything was computed once."""
        return bool(self.posteriors)

    def targets(self, *, shuffled: int | None = None) -> SoftTargetSource:
        """Targets of a batch.

        Args:
            shuffled: Seed by which each posterior is given to another object: the control.
        """
        found: dict[str, SoftTargetSource] = {**self.live, **self.posteriors}
        if shuffled is not None:
            found |= {name: p.shuffled(shuffled) for name, p in self.posteriors.items()}
        first, *more = found
        if not more:
            return found[first]
        return Teachers(found[first], {name: found[name] for name in more}, self.weights)


def open_sources(
    recipe: DistillRecipe, terms: Sequence[Term], data: OpenData, accelerator: Accelerator
) -> Sources:
    """Open the teachers of a recipe; posteriors are computed now where they are not there yet.

    Raises:
        UserError: A teacher that is not there, or is of another data set or picture size.
    """
    references: dict[str, TeacherReference] = {"": recipe.teacher, **recipe.more_teachers}
    layers = layers_by_teacher(terms, recipe.more_teachers)
    sources: Sources | None = None
    for name, reference in references.items():
        teacher = load_teacher(find_teacher(reference, recipe.data.name), data.num_classes)
        teacher.model.to(accelerator.device)
        sources = sources or Sources(teacher)
        sources.weights.append(reference.weight)
        if recipe.soft_targets.kind == "stored":
            targets = recipe.soft_targets
            sources.posteriors[name] = train_posteriors(
                teacher, data, accelerator, out_of_fold=targets.out_of_fold
            ).balanced(targets.balance)
        else:
            sources.live[name] = _live(teacher, layers[name], recipe, accelerator)
    assert sources is not None
    return sources


def _live(
    teacher: TrainedTeacher, layers: list[str], recipe: DistillRecipe, accelerator: Accelerator
) -> LiveTeacher:
    """One for all arms and seeds: each would leave its hooks on the teacher."""
    if teacher.recipe.data.size != recipe.data.size:
        raise UserError(
            f"data.size {recipe.data.size}: the teacher saw {teacher.recipe.data.size}; "
            "a live teacher sees the student's pictures"
        )
    autocast = accelerator.mixed_precision == "bf16"
    return LiveTeacher(teacher.model, teacher.task, layers, autocast=autocast)
