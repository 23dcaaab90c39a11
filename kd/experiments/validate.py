"""Which variants and terms go with which data, found out before anything trains."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from kd.config.recipes import DistillRecipe, SoftTargets
from kd.distillation.terms import Term, outputs_by_teacher
from kd.distillation.variants import Variant
from kd.errors import UserError
from kd.problems.base import Dataset
from kd.problems.detection.data import DetectionDataset
from kd.problems.objects.data import ObjectsDataset
from kd.problems.segmentation.data import SegmentationDataset

_log = logging.getLogger("kd")
# Of the soft targets' settings those that say something of live teachers too, or belong to recipes
# whose teachers are either: folds are of posteriors alone.
_ALSO_LIVE = {"kind", "out_of_fold"}


def check_terms(
    recipe: DistillRecipe, variants: Collection[Variant], terms: Sequence[Term], data: Dataset
) -> None:
    """Refuse terms and variants that the data or the cache do not go with.

    Args:
        recipe: As the user wrote it.
        variants: Those of the recipe.
        terms: Those that any of them has.
        data: What they are to be computed on.

    Raises:
        UserError: One of them; the message names it.
    """
    _check_targets(recipe, terms, data)
    if not isinstance(data, ObjectsDataset):
        _check_images(recipe, variants, terms, data)
    for variant in variants:
        if variant.shuffled:
            _check_shuffled(recipe, [term for term in terms if term.section in variant.terms])


def _check_targets(recipe: DistillRecipe, terms: Sequence[Term], data: Dataset) -> None:
    """What is said of stored outputs must be about some; what is not is named."""
    set_here = [
        name
        for name, field in SoftTargets.model_fields.items()
        if name not in _ALSO_LIVE and getattr(recipe.soft_targets, name) != field.default
    ]
    if "equivariance_error" in set_here and not isinstance(data, ObjectsDataset):
        raise UserError(
            "soft_targets.equivariance_error: stored maps are measured where objects are hidden, "
            f"not here: {data.section.name} has its maps moved with the image as they are; leave "
            "it out. soft_targets.mirrored=true makes flips exact, soft_targets.kind=live runs on "
            "the student's own images"
        )
    outputs = outputs_by_teacher(terms, recipe.more_teachers)
    if set_here and terms and not any(recipe.keeps(name) for name, read in outputs.items() if read):
        names = ", ".join(f"soft_targets.{name}" for name in set_here)
        _log.warning(
            "%s: of stored outputs, without effect here: a live teacher sees the student's own "
            "pictures, at their size", names,
        )  # fmt: skip


def _all_kept(recipe: DistillRecipe, terms: Sequence[Term]) -> bool:
    """Whether all that terms read is stored."""
    outputs = outputs_by_teacher(terms, recipe.more_teachers)
    return all(recipe.keeps(teacher) for teacher, read in outputs.items() if read)


def _check_shuffled(recipe: DistillRecipe, terms: Sequence[Term]) -> None:
    """The control has the distilled variant's terms, and can only exchange cached posteriors."""
    if not _all_kept(recipe, terms):
        raise UserError("variants: shuffled needs soft_targets.kind=stored")
    if maps := [term.name for term in terms if term.kind.maps]:
        raise UserError(
            f"variants: shuffled is the control of posteriors, not of {', '.join(maps)}"
        )


def _check_boxes(
    recipe: DistillRecipe, variants: Collection[Variant], terms: Sequence[Term]
) -> None:
    """What detectors do not go with: they see all boxes of an image in a step, and hide none."""
    heads = [variant.name for variant in variants if not variant.context_head]
    if heads and not recipe.student.options.get("context", False):
        raise UserError(
            f"variants: {heads[0]}: a student without its context head, but "
            "student.options.context is not true, so that plain has none either"
        )
    for term in terms:
        about = term.reads_posterior
        if about and not _all_kept(recipe, [term]):
            raise UserError(
                f"losses: {term.name}: posteriors are asked for once, each object hidden in turn; "
                "say kind: stored of that teacher, or --set soft_targets.kind=stored for all"
            )
        if not about and _all_kept(recipe, [term]):
            raise UserError(
                f"losses: {term.name}: but for posteriors detectors are taught in each step; say "
                "kind: live of that teacher, or --set soft_targets.kind=live for all"
            )


def _check_images(
    recipe: DistillRecipe, variants: Collection[Variant], terms: Sequence[Term], data: Dataset
) -> None:
    """What segmentation, saliency and detection do not go with."""
    finds = isinstance(data, DetectionDataset)
    controls = sorted(
        variant.name
        for variant in variants
        if (not finds and variant.shuffled)
        or (not variant.context_head and (variant.terms or not finds))
    )
    if controls:
        raise UserError(f"variants: {', '.join(controls)}: for students that name objects only")
    if finds:
        _check_boxes(recipe, variants, terms)
    for term in terms:
        kind = term.kind
        hidden = term.reads_posterior or kind.mask == "ring"
        if kind.labels or (hidden and not finds):
            raise UserError(f"losses: {term.name}: is about hidden objects, which are not here")
        if kind.place_weights and not recipe.task.options.get("class_weights"):
            raise UserError(
                f"losses: {term.name}: classes have no weights; pixel_wise does without, or "
                "--set task.options.class_weights=0.5"
            )
        if (kind.unit == "box" or kind.mask) and not finds:
            what = "label maps" if isinstance(data, SegmentationDataset) else "gaze"
            raise UserError(f"losses: {term.name}: is about a detector's boxes, not {what}")
