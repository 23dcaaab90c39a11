"""Distillation terms: build them from a recipe, compute them, and sum them with their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.config.recipes import TermSection
from kd.distillation.registry import MEAN, POSTERIOR, TermKind, term_kind
from kd.errors import UserError
from kd.losses.box_distillation import known_rows, own_class_deltas
from kd.losses.holistic import without_void
from kd.problems.base import KNOWN, Batch, Mask, Mean, Output, Rows, Task
from kd.transforms.hide import normalise

Masks = Mapping[str, Mask]


@dataclass(frozen=True)
class Term:
    """A distillation term of a recipe, ready to compute.

    Attributes:
        section: The term's section of the recipe.
        kind: The loss and what it needs.
        function: The loss with its options; an `nn.Module` if it has weights.
        student: Output or layer of the student that the loss compares.
        teacher: Output or layer of the teacher; `NAME.output` for a teacher of `more_teachers`.
        mask_value: Number that the term passes to the task's mask, or None.
    """

    section: TermSection
    kind: TermKind
    function: Callable[..., Any]
    student: str
    teacher: str
    mask_value: float | None = None

    @property
    def name(self) -> str:
        """Label of the term, unique in a recipe; the TensorBoard tag of its loss is `loss/NAME`."""
        return self.section.label

    @property
    def mask(self) -> str | None:
        """Key of the loss's mask among the task's masks; None if the loss takes no mask."""
        if self.mask_value is None:
            return self.kind.mask
        return f"{self.kind.mask}_{self.mask_value:g}"

    @property
    def reads_posterior(self) -> bool:
        """Whether the term compares a teacher's posteriors of hidden objects."""
        return self.teacher.rpartition(".")[2] == POSTERIOR

    @property
    def count(self) -> str | None:
        """Mask whose grid cells the task counts for this term; None if its unit is not `place`."""
        if self.kind.unit != "place":
            return None
        return self.mask or ("valid" if self.kind.valid else "frame")

    def weight_at(self, progress: float, step: int = 0) -> float:
        """Return the term's weight after `step` steps, at a fraction `progress` of training."""
        return self.section.weight * self.section.schedule.factor(progress, step)


def build_term(section: TermSection) -> Term:
    """Build a term from its section of a recipe."""
    what = f"losses: {section.name}"
    kind = term_kind(section)
    options, mask_value = dict(section.options), None
    if kind.mask_option in options:
        mask_value = _fraction(options.pop(kind.mask_option), f"{what}: {kind.mask_option}")
    function = kind.bind(options, what=what)
    student, teacher = section.student or kind.student, section.teacher or kind.teacher
    if student is None or teacher is None:
        raise UserError(f"{what}: the keys `student` and `teacher` must name layers to compare")
    return Term(section, kind, function, student, teacher, mask_value)


def _fraction(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{what} must be a number in 0..1, got {value!r}")
    return float(value)


def tapped_layers(terms: Sequence[Term], task: Task) -> list[str]:
    """Return the student's layers that the terms read and that are not outputs of the task."""
    return [term.student for term in terms if term.kind.maps and term.student not in task.outputs]


def layers_among(outputs: Sequence[str], task: Task) -> list[str]:
    """Return those of a teacher's `outputs` that are layers, which have to be tapped."""
    return [output for output in outputs if output != POSTERIOR and output not in task.outputs]


def outputs_by_teacher(terms: Sequence[Term], teachers: Collection[str]) -> dict[str, list[str]]:
    """Return the outputs and layers that terms read, by teacher; "" is the recipe's `teacher`."""
    outputs: dict[str, list[str]] = {name: [] for name in ("", *teachers)}
    for term in terms:
        first, _, rest = term.teacher.partition(".")
        if first == MEAN and rest not in (POSTERIOR, "logits"):
            raise UserError(
                f"losses: {term.name}: a mean over teachers must be "
                f"{MEAN}.{POSTERIOR} or {MEAN}.logits, not {term.teacher!r}"
            )
        whose, output = (first, rest) if first in teachers else ("", term.teacher)
        for reader in outputs if first == MEAN else [whose]:
            wanted = rest if first == MEAN else output
            if wanted not in outputs[reader]:
                outputs[reader].append(wanted)
    return outputs


def distillation_losses(
    terms: Sequence[Term], student: Output, teacher: Output, task: Task, batch: Batch, masks: Masks
) -> dict[str, Mean]:
    """Compute every term, unweighted.

    Args:
        terms: The terms to compute.
        student: The student's outputs, with the rows of `task.rows`, and its adapted features (N,
            C, h, w), by name.
        teacher: The teachers' outputs and features by name. If objects are hidden, the features
            have one row per object instead of one per image.
        task: Defines the rows of the outputs and the units of the means.
        batch: The batch that student and teachers were run on.
        masks: The task's masks of the batch.
    """
    rows, losses = task.rows(batch), {}
    for term in terms:
        ours = _take(student, term.student, term.name, "student")
        theirs = _take(teacher, term.teacher, term.name, "teacher")
        is_output = term.student in task.outputs or not term.kind.maps
        if not is_output and rows.hidden and rows.images is not None:
            ours = ours[rows.images]  # the teacher's maps have a row for each object
        elif is_output and ours.ndim == theirs.ndim == 4 and ours.shape[2:] != theirs.shape[2:]:
            grid = (theirs.shape[2], theirs.shape[3])
            ours = F.interpolate(ours, grid, mode="bilinear", align_corners=False, antialias=True)
        own = rows if is_output or rows.hidden else Rows()
        losses[term.name] = _loss_of(term, ours, theirs, own, task, batch, masks)
    return losses


def layer_masks(terms: Sequence[Term], masks: Masks) -> dict[str, Mask]:
    """Return a mask of the needed grid cells for each student layer whose terms all have masks.

    A cell is needed if any of these masks is above 0 there. All cells of other layers are needed.
    """
    readers: dict[str, set[str | None]] = {}
    for term in terms:
        readers.setdefault(term.student, set()).add(term.mask)

    def joined(names: Sequence[str]) -> Mask:
        return lambda grid: torch.stack([masks[name](grid) > 0 for name in names]).any(dim=0)

    return {
        layer: joined([name for name in names if name is not None])
        for layer, names in readers.items()
        if None not in names
    }


def _loss_of(
    term: Term, ours: Tensor, theirs: Tensor, rows: Rows, task: Task, batch: Batch, masks: Masks
) -> Mean:
    kind = term.kind
    if kind.unit == "box" and ours.shape != theirs.shape:
        raise UserError(
            f"losses: {term.name}: student {tuple(ours.shape)} and teacher {tuple(theirs.shape)} "
            "differ in shape; both detectors must have one stage, or both two (only two-stage "
            "detectors have a background class)"
        )
    maps = kind.maps and ours.ndim == 4
    grid = (ours.shape[2], ours.shape[3]) if maps else (1, 1)
    valid = masks["valid"](grid) if maps and "valid" in masks else None
    if kind.own_class:
        ours, theirs = (own_class_deltas(side, _labels(term, rows)) for side in (ours, theirs))
    if kind.labels:
        return Mean(_call(term, ours, theirs, _labels(term, rows)), "labelled")
    if rows.partial and term.reads_posterior:
        ours, theirs, scale = known_rows(ours, theirs)
        owner = term.teacher.removesuffix(POSTERIOR)
        return Mean(_call(term, ours, theirs) * scale, f"{owner}{KNOWN}")
    if term.mask is not None:
        mask = _mask(masks, term.mask, term, task)(grid)
        unit = task.place_unit(term.mask, grid, batch)
        return Mean(_call(term, ours, theirs, mask), unit)
    if kind.images:
        images = normalise(batch["images"])
        images = images if rows.images is None else images[rows.images]
        ours = ours if valid is None else without_void(ours, theirs, valid)
        judged = (ours.detach(), theirs.detach(), images) if kind.trained == "critic" else ()
        return Mean(_call(term, ours, theirs, images), rows.unit, judged)
    given: dict[str, Tensor] = {}
    if kind.place_weights:
        given["weights"] = _mask(masks, kind.place_weights, term, task)(grid)
    unit = rows.unit
    if kind.valid and valid is not None:
        unit, given["valid"] = "valid_images", valid
    if kind.unit == "place" and maps:
        unit = task.place_unit("valid" if "valid" in given else "frame", grid, batch)
    return Mean(_call(term, ours, theirs, **given), unit)


def _call(term: Term, ours: Tensor, theirs: Tensor, *more: Tensor, **given: Tensor) -> Tensor:
    """Call a term's loss, and check that it returns a scalar tensor."""
    sides = f"student {tuple(ours.shape)}, teacher {tuple(theirs.shape)}"
    try:
        value = term.function(ours, theirs, *more, **given)
    except (UserError, RuntimeError, ValueError, IndexError) as error:
        if ours.shape == theirs.shape:
            raise
        hint = "" if term.kind.unit in ("box", "object") else (
            "; add an adapter that maps the student's layer to the teacher's shape: "
            f"adapters: {{{term.student}: {{kind: conv1x1, to: {term.teacher}}}}}"
        )  # fmt: skip
        first = str(error).partition("\n")[0]
        raise UserError(f"losses: {term.name}: {sides}: {first}{hint}") from error
    if not isinstance(value, Tensor) or value.ndim:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"losses: {term.name}: a loss must return a scalar tensor, the mean over its "
            f"{term.kind.unit}s; got {got} ({sides})"
        )
    return value


def _labels(term: Term, rows: Rows) -> Tensor:
    if rows.labels is None:
        raise UserError(f"losses: {term.name}: needs labels of objects, but the batch has none")
    return rows.labels


def _mask(masks: Masks, name: str, term: Term, task: Task) -> Mask:
    if name not in masks:
        raise UserError(
            f"losses: {term.name}: needs the mask {name!r}; {type(task).__name__} has "
            f"{', '.join(masks) or 'none'}"
        )
    return masks[name]


def draw_modules(terms: Sequence[Term], teacher: Output) -> list[Term]:
    """Return the terms, with the weights of losses initialised by torch's global generator.

    Dimension 1 of a teacher's output in `teacher` is the number of channels its loss is built for.
    """

    def built(term: Term) -> Term:
        channels = _take(teacher, term.teacher, term.name, "teacher").shape[1]
        return replace(term, function=term.function(channels))

    return [built(term) if term.kind.trained else term for term in terms]


def modules_of(
    terms: Sequence[Term], *, trained: Literal["student", "critic"]
) -> dict[str, nn.Module]:
    """Return the losses whose weights are trained with the student or as critics, by term name."""
    return {
        term.name: term.function
        for term in terms
        if isinstance(term.function, nn.Module) and term.kind.trained == trained
    }


def _take(outputs: Output, name: str, term: str, who: str) -> Tensor:
    if name not in outputs:
        raise UserError(
            f"losses: {term}: the {who} has no output {name!r}; it has: {', '.join(outputs)}"
        )
    return outputs[name]


def check_weights(losses: Mapping[str, object], weights: Mapping[str, float]) -> None:
    """Raise a UserError if there is a loss without a weight, or a weight without a loss."""
    if losses.keys() != weights.keys():
        alone = sorted(losses.keys() ^ weights.keys())
        raise UserError(
            f"each loss needs one weight; unmatched: {', '.join(alone)} "
            f"(losses: {', '.join(losses)}; weights: {', '.join(weights)})"
        )


def weighted_sum(
    losses: Mapping[str, Mean], weights: Mapping[str, float], scale: Mapping[str, Tensor | float]
) -> Tensor:
    """Sum the losses, each multiplied by its weight and by the factor in `scale` of its unit."""
    check_weights(losses, weights)
    parts = [loss.value * (scale[loss.unit] * weights[name]) for name, loss in losses.items()]
    return torch.stack(parts).sum()
