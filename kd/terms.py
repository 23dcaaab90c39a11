"""The kinds of distillation terms, by name: what each compares unless a recipe says otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kd.errors import UserError
from kd.losses.adversary import Adversary
from kd.losses.boxes import box_distance
from kd.losses.channel_wise import channel_wise
from kd.losses.decoupled import decoupled
from kd.losses.hint import hint
from kd.losses.imitation import imitation
from kd.losses.logits import kl_logits, pixel_wise
from kd.losses.pair_wise import pair_wise
from kd.losses.saliency import saliency_maps
from kd.tasks.base import psi_mask

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
    "direct": Kind(kl_logits, "logits", "posterior"),
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
