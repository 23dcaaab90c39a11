"""Which arms and terms go with which data, found out before anything trains."""

from __future__ import annotations

from collections.abc import Sequence

from kd.config import DistillRecipe
from kd.errors import UserError
from kd.objective import POSTERIOR, SOFTMAXED, TEACHER_OUTPUTS, Term
from kd.opened import OpenData, Opened
from kd.opened_boxes import OpenBoxes
from kd.opened_maps import OpenMaps

_OF_OBJECTS = {"bare", "shuffled", "direct"}  # arms


def check_terms(recipe: DistillRecipe, terms: Sequence[Term], data: Opened) -> None:
    """Refuse terms and controls that cannot be had.

    Args:
        recipe: As the user wrote it.
        terms: Those that any of its arms has.
        data: What they are to be computed on.

    Raises:
        UserError: One of them; the message names it.
    """
    if not isinstance(data, OpenData):
        _check_pictures(recipe, terms, data)
    stored = recipe.soft_targets.kind == "stored"
    if "shuffled" in recipe.arms and not stored:
        raise UserError("arms: shuffled needs soft_targets.kind=stored")
    maps = [term.name for term in terms if term.kind.maps]
    if maps and "shuffled" in recipe.arms:
        named = ", ".join(maps)
        raise UserError(f"arms: shuffled is the control of posteriors, not of {named}")
    if recipe.soft_targets.top_k and stored:  # kept as log-probabilities
        for term in terms:
            output = term.teacher.rpartition(".")[2]
            if output in TEACHER_OUTPUTS and term.kind.function not in SOFTMAXED:
                raise UserError(
                    f"losses: {term.name}: soft_targets.top_k keeps {output} as probabilities, "
                    "which this loss does not compare; 0 keeps all as they are"
                )


def _check_pictures(recipe: DistillRecipe, terms: Sequence[Term], data: Opened) -> None:
    """What label maps and detectors do not go with."""
    if controls := sorted(set(recipe.arms) & _OF_OBJECTS):
        raise UserError(f"arms: {', '.join(controls)}: for students that name objects only")
    if isinstance(data, OpenBoxes) and terms and recipe.soft_targets.kind == "stored":
        raise UserError(
            "soft_targets.kind: detectors are taught in each step; --set soft_targets.kind=live"
        )
    for term in terms:
        kind, output = term.kind, term.teacher.rpartition(".")[2]
        if output == POSTERIOR or kind.labels or kind.mask == "ring":
            raise UserError(f"losses: {term.name}: is about hidden objects, which are not here")
        if kind.weights and not recipe.task.options.get("class_weights"):
            raise UserError(
                f"losses: {term.name}: classes have no weights; pixel_wise does without, or "
                "--set task.options.class_weights=0.5"
            )
        if (kind.boxes or kind.mask) and isinstance(data, OpenMaps):
            raise UserError(f"losses: {term.name}: is about a detector's boxes, not label maps")
