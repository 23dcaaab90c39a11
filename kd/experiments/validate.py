"""Check before training that terms and variants fit the task, the data and the cache."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from kd.config.recipes import DistillRecipe, SoftTargets
from kd.distillation.terms import Term, outputs_by_teacher
from kd.distillation.variants import Variant
from kd.errors import UserError
from kd.problems.base import Dataset, Task

_log = logging.getLogger("kd")
# Settings of `soft_targets` that live teachers read too, or that need no warning.
_ALSO_LIVE = {"kind", "out_of_fold"}


def check_terms(
    recipe: DistillRecipe,
    variants: Collection[Variant],
    terms: Sequence[Term],
    task: Task,
    data: Dataset,
) -> None:
    """Check that terms, variants and `soft_targets` fit the task and the data.

    Raises:
        UserError: One of them does not fit.
    """
    _check_soft_targets(recipe, terms, data)
    _check_variants(recipe, variants, terms, data)
    for term in terms:
        _check_term(recipe, term, task, data)


def _has_posteriors(data: Dataset) -> bool:
    return data.problem.hides_objects or data.problem.some_posteriors


def _check_soft_targets(recipe: DistillRecipe, terms: Sequence[Term], data: Dataset) -> None:
    """Raise a UserError for impossible settings of cached outputs; warn of useless ones."""
    changed = [
        name
        for name, field in SoftTargets.model_fields.items()
        if name not in _ALSO_LIVE and getattr(recipe.soft_targets, name) != field.default
    ]
    if "equivariance_error" in changed and not data.problem.moves_cached_maps:
        raise UserError(
            "soft_targets.equivariance_error: the error is measured only where objects are hidden: "
            f"cached maps of {data.section.name} are moved with their images; leave it out. "
            "soft_targets.mirrored=true makes flips exact, soft_targets.kind=live runs the teacher "
            "on the student's own images"
        )
    outputs = outputs_by_teacher(terms, recipe.more_teachers)
    if changed and terms and not any(recipe.caches(name) for name, read in outputs.items() if read):
        _log.warning(
            "%s: for stored outputs, no effect here: a live teacher sees the student's own images, "
            "at their size",
            ", ".join(f"soft_targets.{name}" for name in changed),
        )


def _all_cached(recipe: DistillRecipe, terms: Sequence[Term]) -> bool:
    outputs = outputs_by_teacher(terms, recipe.more_teachers)
    return all(recipe.caches(teacher) for teacher, read in outputs.items() if read)


def _check_variants(
    recipe: DistillRecipe, variants: Collection[Variant], terms: Sequence[Term], data: Dataset
) -> None:
    objects, posteriors = data.problem.hides_objects, _has_posteriors(data)
    refused = sorted(
        variant.name
        for variant in variants
        if (variant.shuffled and not posteriors)
        or (not variant.context_head and not objects and (variant.terms or not posteriors))
    )
    if refused:
        raise UserError(f"variants: {', '.join(refused)}: only for students that classify objects")
    for variant in variants:
        if not variant.context_head and not objects and not recipe.student.options.get("context"):
            raise UserError(
                f"variants: {variant.name}: a student without a context head, but "
                "student.options.context is not true, so plain has none either"
            )
        if variant.shuffled:
            own = [term for term in terms if term.section in variant.terms]
            if not _all_cached(recipe, own):
                raise UserError(f"variants: {variant.name} needs soft_targets.kind=stored")
            if maps := [term.name for term in own if term.kind.maps]:
                raise UserError(
                    f"variants: {variant.name} is the control of posteriors, not of "
                    f"{', '.join(maps)}"
                )


def _check_term(recipe: DistillRecipe, term: Term, task: Task, data: Dataset) -> None:
    kind, name = term.kind, type(task).__name__
    if term.reads_posterior and not _has_posteriors(data):
        raise UserError(f"losses: {term.name}: needs hidden objects, which these data do not have")
    by_itself = not kind.maps or term.student == kind.student
    if by_itself and term.student not in task.outputs:
        raise UserError(
            f"losses: {term.name}: the student gives no {term.student!r}; it gives: "
            f"{', '.join(task.outputs)}"
        )
    if kind.mask is not None and kind.mask not in task.mask_names:
        raise UserError(
            f"losses: {term.name}: needs the mask {kind.mask!r}; {name} has "
            f"{', '.join(task.mask_names) or 'none'}"
        )
    if kind.place_weights and not recipe.task.options.get(kind.place_weights):
        raise UserError(
            f"losses: {term.name}: classes have no weights; use pixel_wise, or "
            f"--set task.options.{kind.place_weights}=0.5"
        )
    if not data.problem.some_posteriors:
        return
    # Students see all objects of an image in a step; a context teacher hides each in turn.
    cached = _all_cached(recipe, [term])
    if term.reads_posterior and not cached:
        raise UserError(
            f"losses: {term.name}: posteriors of objects, hidden in turn, must be cached; set "
            "kind: stored for that teacher, or --set soft_targets.kind=stored for all"
        )
    if cached and not term.reads_posterior:
        raise UserError(
            f"losses: {term.name}: for detectors only posteriors can come from the cache; set "
            "kind: live for that teacher, or --set soft_targets.kind=live for all"
        )
