"""What is minimised: supervised losses and distillation terms, named, unweighted, then summed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError
from kd.interop.torchdistill import PREFIX, Borrow
from kd.losses.box_distillation import box_distance, known_rows, own_class_deltas
from kd.losses.channel_wise import channel_wise
from kd.losses.decoupled_kd import decoupled
from kd.losses.hint import hint
from kd.losses.holistic import Adversary, without_void
from kd.losses.imitation import imitation
from kd.losses.logits import kl_logits, pixel_wise
from kd.losses.pair_wise import pair_wise
from kd.losses.saliency import saliency_maps
from kd.problems.base import (
    KNOWN,
    Batch,
    Mask,
    Mean,
    about_boxes,
    about_objects,
    hidden_labels,
    image_rows,
    psi_mask,
    stride_of,
)
from kd.registry import check_options, look_up
from kd.transforms.hide import normalise

# Gives a scalar; where a kind `draws`, the module that does.
Loss = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """A kind of distillation term.

    Args:
        function: The loss: student, teacher[, mask].
        student: Output of the student it reads unless told otherwise.
        teacher: Output of the teacher likewise.
        mask: Name of the task's mask that it needs.
        maps: Whether it compares feature maps; else rows, one per hidden object.
        labels: Whether it asks for the rows' labels, and so speaks for the labelled ones.
        images: Whether it asks for the rows' images: a critic does, which learns from its own loss.
        draws: Whether it has weights of its own: `function` then makes a module of the teacher's
            number of channels, see `draw_modules`.
        valid: Whether it is told where there is a class, where the task knows.
        boxes: Whether it is about what detectors say of objects.
        weights: Name of the task's mask that says what each pixel counts.
        own: Whether of numbers for every class it compares those of the box's own.
        psi: Share of the largest IoU that its mask asks for, where a term has one of its own
            (option `psi`) rather than the task's.
    """

    function: Loss
    student: str | None = None
    teacher: str | None = None
    mask: str | None = None
    maps: bool = False
    labels: bool = False
    images: bool = False
    draws: bool = False
    valid: bool = False
    boxes: bool = False
    weights: str | None = None
    own: bool = False
    psi: float | None = None


TERMS = {
    # KL from the blind teacher's posterior to the context branch (METHODS 7).
    "context_logits": Kind(kl_logits, "context", "posterior"),
    # The ablation: the same target for the output of a student that sees the object.
    "output_kd": Kind(kl_logits, "logits", "posterior"),
    "decoupled": Kind(decoupled, "logits", "posterior", labels=True),
    "context_features": Kind(imitation, mask="ring", maps=True),
    # Wang et al.'s ablation: near objects' anchors, inside the boxes, the whole map.
    "imitation": Kind(imitation, mask="imitation", maps=True),
    "imitation_inside": Kind(imitation, mask="inside", maps=True),
    "imitation_whole": Kind(imitation, mask="whole", maps=True),
    # What detectors say of objects: a second stage of boxes near the true ones.
    "object_logits": Kind(kl_logits, "object_logits", "object_logits", boxes=True),
    "object_boxes": Kind(box_distance, "object_deltas", "object_deltas", boxes=True, own=True),
    "pixel_wise": Kind(pixel_wise, "logits", "logits", maps=True, valid=True),
    "pixel_wise_weighted": Kind(
        pixel_wise, "logits", "logits", maps=True, valid=True, weights="class_weights"
    ),
    "pair_wise": Kind(pair_wise, maps=True, valid=True),
    "holistic": Kind(Adversary, "logits", "logits", maps=True, images=True, draws=True),
    "channel_wise": Kind(channel_wise, "logits", "logits", maps=True, valid=True),
    "hint": Kind(hint, maps=True, valid=True),
    # The second map of a saliency student, which says what the teacher says (METHODS 4).
    "saliency": Kind(saliency_maps, "teacher_saliency", "saliency", maps=True, valid=True),
}


def of_psi(kind: Kind, psi: object, *, what: str) -> Kind:
    """The kind of a term whose imitation mask reaches as far as it says itself.

    Args:
        kind: One with an imitation mask.
        psi: As a recipe has it.
        what: Of the term, for messages.

    Raises:
        UserError: It has another mask, or psi is no share.
    """
    if kind.mask != "imitation":
        raise UserError(f"{what}: psi is an option of imitation alone")
    if isinstance(psi, bool) or not isinstance(psi, int | float) or not 0 <= psi <= 1:
        raise UserError(f"{what}: psi must be a number in 0..1, got {psi!r}")
    return replace(kind, mask=psi_mask(psi), psi=float(psi))


# What takes a softmax of what it compares, so that logits and log-probabilities are one to it.
SOFTMAXED = (kl_logits, decoupled, pixel_wise, Adversary)
# Outputs with a row for each hidden object, box or picture, as asked; others are layers.
ROWS = ("logits", "context", "appearance", "object_logits", "object_deltas", "saliency",
        "teacher_saliency")  # fmt: skip
# What a teacher gives beside its layers.
POSTERIOR = "posterior"
TEACHER_OUTPUTS = (POSTERIOR, "logits", "dense", "object_logits", "object_deltas", "saliency")
# Of these, those with a number, or a box, for each class.
OF_CLASSES = frozenset(TEACHER_OUTPUTS) - {"saliency"}


Ramp = Literal["constant", "linear", "cosine", "off_after"]


@dataclass(frozen=True)
class Term:
    """A distillation term, ready to compute."""

    name: str
    kind: Kind
    function: Loss
    student: str
    teacher: str
    weight: float
    ramp: Ramp = "constant"
    until: float = 1.0
    start: float = 0.0
    until_step: int | None = None

    def weight_at(self, progress: float, step: int = 0) -> float:
        """The weight at a share 0..1 of training, the number of steps taken so far."""
        way = progress / self.until if self.until_step is None else step / self.until_step
        if self.ramp == "off_after":
            return self.weight if way < 1.0 else 0.0
        if self.ramp == "constant" or way >= 1.0:
            return self.weight
        if self.ramp == "cosine":
            way = 0.5 - 0.5 * math.cos(math.pi * way)
        return self.weight * (self.start + (1.0 - self.start) * way)


def build_term(
    name: str,
    *,
    weight: float,
    label: str | None = None,
    student: str | None = None,
    teacher: str | None = None,
    options: Mapping[str, object] | None = None,
    ramp: Ramp = "constant",
    until: float = 1.0,
    start: float = 0.0,
    until_step: int | None = None,
) -> Term:
    """A term by name; its options are the loss's keyword-only parameters, `label` names its curve.

    `imitation` has the option `psi` as well, which says how near objects its mask is.
    `torchdistill.NAME` is a mid-level loss of torchdistill's.

    Raises:
        UserError: An unknown name or option, or a layer that must be named and is not.
    """
    borrowed = Borrow(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if borrowed is not None:
        kind = Kind(borrowed, maps=student not in ROWS)
    else:
        kind = look_up(TERMS, name, what="distillation term")
    options = dict(options or {})
    if "psi" in options:
        kind = of_psi(kind, options.pop("psi"), what=f"losses: {name}")
    check_options(kind.function, options, what=f"losses: {name}")
    if borrowed is not None and borrowed.has_weights(**options):
        kind = replace(kind, function=borrowed.module, draws=True)
    student, teacher = student or kind.student, teacher or kind.teacher
    if student is None or teacher is None:
        raise UserError(f"losses: {name}: name the layers: student: ..., teacher: ...")
    function = functools.partial(kind.function, **options)
    return Term(label or name, kind, function, student, teacher, weight, ramp, until, start,
                until_step)  # fmt: skip


def distillation_losses(
    terms: Sequence[Term],
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    masks: Mapping[str, Mask],
    batch: Batch,
) -> dict[str, Mean]:
    """Every term's value, unweighted.

    Args:
        terms: What to compute.
        student: Outputs and adapted features. Rows are per hidden object (K, ...), feature maps
            per image (N, C, h, w).
        teacher: The same of the teacher, both per hidden object: it saw K inputs.
        masks: The task's masks.
        batch: Says which image each hidden object is on, and its label and pixels where a term
            asks for those.

    Raises:
        UserError: An output that student or teacher does not give.
    """
    losses: dict[str, Mean] = {}
    for term in terms:
        ours = _take(student, term.student, term.name, "student")
        theirs = _take(teacher, term.teacher, term.name, "teacher")
        ours = _stand_beside(term, ours, theirs, batch)
        losses[term.name] = _loss_of(term, ours, theirs, masks, batch)
    return losses


def looked_at(terms: Sequence[Term], masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """Where terms look at a student's layers, of those that all of their readers have masks for.

    Args:
        terms: Of a batch whose masks have a row for each image.
        masks: The task's.
    """
    readers: dict[str, set[str | None]] = {}
    for term in terms:
        readers.setdefault(term.student, set()).add(term.kind.mask)

    def joined(names: Sequence[str]) -> Mask:
        return lambda grid: torch.stack([masks[name](grid) > 0 for name in names]).any(dim=0)

    return {
        layer: joined([name for name in names if name is not None])
        for layer, names in readers.items()
        if None not in names
    }


def _stand_beside(term: Term, ours: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
    """The student's side row by row as the teacher's, its score maps on the teacher's grid."""
    if not term.kind.maps:
        return ours
    if about_objects(batch):  # a student has one map for each image, a teacher for each object
        return ours[image_rows(batch)]
    if term.student in ROWS and ours.ndim == 4 and ours.shape[2:] != theirs.shape[2:]:
        grid = (theirs.shape[2], theirs.shape[3])
        return F.interpolate(ours, grid, mode="bilinear", align_corners=False, antialias=True)
    return ours


def _loss_of(
    term: Term, ours: Tensor, theirs: Tensor, masks: Mapping[str, Mask], batch: Batch
) -> Mean:
    kind, unit = term.kind, "hidden" if about_objects(batch) else "images"
    if kind.boxes and ours.shape != theirs.shape:
        raise UserError(
            f"losses: {term.name}: student {tuple(ours.shape)} and teacher {tuple(theirs.shape)} "
            "differ in shape: what is said of boxes can be compared between heads of one kind; a "
            "second stage's has a background beside the classes, a detector's of one stage has none"
        )
    if not kind.maps and about_boxes(batch):
        unit = "boxes"
    maps = kind.maps and ours.ndim == 4
    grid = (ours.shape[2], ours.shape[3]) if maps else (1, 1)
    valid = masks["valid"](grid) if maps and "valid" in masks else None
    if kind.own:
        ours, theirs = (own_class_deltas(rows, batch["labels"]) for rows in (ours, theirs))
    if kind.labels:
        return Mean(term.function(ours, theirs, hidden_labels(batch)), "labelled")
    if unit == "boxes" and term.teacher.rpartition(".")[2] == POSTERIOR:
        ours, theirs, share = known_rows(ours, theirs)
        owner = term.teacher.removesuffix(POSTERIOR)
        return Mean(term.function(ours, theirs) * share, f"{owner}{KNOWN}")
    place = f"/{stride_of(batch['images'].shape[-2], grid[0])}" if about_boxes(batch) else ""
    if kind.mask is not None:
        return Mean(term.function(ours, theirs, masks[kind.mask](grid)), f"{kind.mask}{place}")
    if kind.images:
        images = normalise(batch["images"])
        images = images[image_rows(batch)] if about_objects(batch) else images
        ours = ours if valid is None else without_void(ours, theirs, valid)
        judged = ours.detach(), theirs.detach(), images
        return Mean(term.function(ours, theirs, images), unit, judged)
    told = {"weights": masks[kind.weights](grid)} if kind.weights else {}
    if kind.valid and valid is not None:
        by_place = kind.function in (pixel_wise, hint)
        units = ("pixels", "valid_images")
        if about_boxes(batch):  # every picture has a valid place
            units = (f"valid{place}", "images")
        unit, told["valid"] = units[0 if by_place else 1], valid
    return Mean(term.function(ours, theirs, **told), unit)


def draw_modules(terms: Sequence[Term], teacher: Mapping[str, Tensor]) -> list[Term]:
    """The terms, those with weights of their own with new ones, from torch's random numbers.

    Args:
        terms: As built.
        teacher: Outputs like those that they will compare: channels are in dimension 1.
    """
    return [
        replace(
            term,
            function=term.function(_take(teacher, term.teacher, term.name, "teacher").shape[1]),
        )
        if term.kind.draws
        else term
        for term in terms
    ]


def modules_of(terms: Sequence[Term], *, images: bool) -> dict[str, nn.Module]:
    """Modules of the terms by name: the critics' (`images`), or those that learn with a student."""
    return {
        term.name: term.function
        for term in terms
        if isinstance(term.function, nn.Module) and term.kind.images is images
    }


def _take(outputs: Mapping[str, Tensor], name: str, term: str, who: str) -> Tensor:
    if name not in outputs:
        raise UserError(
            f"losses: {term}: the {who} gives no {name!r}; it gives: {', '.join(outputs)}"
        )
    return outputs[name]


def check_weights(losses: Mapping[str, object], weights: Mapping[str, float]) -> None:
    """A loss without a weight, or a weight without a loss, is a mistake."""
    if losses.keys() != weights.keys():
        alone = sorted(losses.keys() ^ weights.keys())
        raise UserError(
            f"losses and weights differ in: {', '.join(alone)} "
            f"(losses: {', '.join(losses)}; weights: {', '.join(weights)})"
        )


def weighted_sum(
    losses: Mapping[str, Mean], weights: Mapping[str, float], scale: Mapping[str, Tensor | float]
) -> Tensor:
    """The total: each loss by its weight and by the share of the whole batch that it speaks for.

    Args:
        losses: Named means.
        weights: The same names.
        scale: Factor of each unit.
    """
    check_weights(losses, weights)
    parts = [loss.value * (scale[loss.unit] * weights[name]) for name, loss in losses.items()]
    return torch.stack(parts).sum()
