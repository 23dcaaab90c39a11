"""Registries of distillation terms and adapters. This module does not import torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kd.config.recipes import TermSection, Unit
from kd.errors import UserError
from kd.registry import Entry, check_options, is_foreign, load_target, look_up

POSTERIOR = "posterior"  # log-probabilities of a hidden object, decoded from a teacher's output
MEAN = "mean"  # `mean.posterior`: over all teachers
TORCHDISTILL = "torchdistill."


@dataclass(frozen=True)
class TermKind:
    """A kind of distillation term: a loss, and everything that the engine has to know about it.

    The loss is called with the student's tensor and the teacher's tensor. A mask, labels or images
    follow as a third argument if they are declared here. The loss returns a scalar mean.

    Args:
        loss: `package.module:attribute`, or the function itself.
        help: One line for `--list`.
        unit: What the loss is a mean over. The means of micro-batches and processes are weighted
            by their number of units. `place`: grid cells of feature maps, restricted to those of
            `mask` or, if the task has void pixels, to valid ones. `image`: images, or, if objects
            are hidden, inputs of the teacher. `box` and `object`: rows of outputs, one for each
            box or hidden object.
        student: Default output of the student; None: the recipe must name an output or layer.
        teacher: Default output of the teacher; None: the recipe must name an output or layer.
        mask: Name of the task's mask that the loss takes as its third argument.
        mask_option: Name of an option of the term, a number in 0..1, that is passed to the mask.
        valid: Whether the loss takes `valid`, a mask of the grid cells that are not void.
        place_weights: Name of the task's mask that is passed to the loss as `weights`.
        labels: Whether the loss takes the labels of the rows; unlabelled rows do not count.
        images: Whether the loss takes the images of the rows.
        trained: How the weights of a loss that has some are trained: `student`, by the student's
            optimiser, or `critic`, in a step of their own. `loss` is then called with the teacher's
            number of channels and returns a module. None: the loss has no weights.
        softmax: Whether the loss applies a softmax, so that it also accepts log-probabilities.
        by_class: Whether outputs are compared class by class, so that student and teacher must
            have the same classes.
        own_class: Whether only the outputs for each box's labelled class are compared.

    Raises:
        UserError: The unit is unknown, or a mask is declared for a unit other than `place`.
    """

    loss: str | Callable[..., Any]
    help: str
    unit: Unit
    student: str | None = None
    teacher: str | None = None
    mask: str | None = None
    mask_option: str | None = None
    valid: bool = False
    place_weights: str | None = None
    labels: bool = False
    images: bool = False
    trained: Literal["student", "critic"] | None = None
    softmax: bool = False
    by_class: bool = True
    own_class: bool = False

    def __post_init__(self) -> None:
        if self.unit not in ("place", "image", "box", "object"):
            raise UserError(f"unit must be place, image, box or object, got {self.unit!r}")
        if self.unit != "place" and (self.mask or self.place_weights):
            raise UserError(
                f"a loss with a mask is a mean over places, not over unit {self.unit!r}"
            )

    @property
    def maps(self) -> bool:
        """Whether the loss compares maps of whole images rather than rows of objects or boxes."""
        return self.unit in ("place", "image")

    def bind(self, options: Mapping[str, object], *, what: str) -> Callable[..., Any]:
        """Import the loss, check its options and bind them.

        Args:
            options: The user's options, keyword-only parameters of the loss.
            what: Prefix of error messages.

        Raises:
            UserError: The loss cannot be imported, or an option is unknown or of a wrong type.
        """
        loss = load_target(self.loss) if isinstance(self.loss, str) else self.loss
        check_options(loss, options, what=what)
        return functools.partial(loss, **options)


TERMS: dict[str, TermKind] = {
    "context_logits": TermKind(
        "kd.losses.logits:kl_logits",
        "KL from the context teacher's posterior to the student's context head",
        unit="object", student="context", teacher=POSTERIOR, softmax=True,
    ),
    "output_kd": TermKind(
        "kd.losses.logits:kl_logits",
        "KL from the context teacher's posterior to the student's own output; an ablation",
        unit="object", student="logits", teacher=POSTERIOR, softmax=True,
    ),
    "decoupled": TermKind(
        "kd.losses.logits:decoupled",
        "decoupled distillation: the target class and the others separately",
        unit="object", student="logits", teacher=POSTERIOR, labels=True, softmax=True,
    ),
    "context_features": TermKind(
        "kd.losses.imitation:imitation", "imitation of a teacher's features around each object",
        unit="place", mask="ring", by_class=False,
    ),
    "imitation": TermKind(
        "kd.losses.imitation:imitation",
        "imitation of a detector's features at anchors near objects; option psi: how near",
        unit="place", mask="imitation", mask_option="psi", by_class=False,
    ),
    "imitation_inside": TermKind(
        "kd.losses.imitation:imitation", "imitation of a detector's features inside the boxes",
        unit="place", mask="inside", by_class=False,
    ),
    "imitation_whole": TermKind(
        "kd.losses.imitation:imitation", "imitation of a detector's features everywhere",
        unit="place", mask="whole", by_class=False,
    ),
    "object_logits": TermKind(
        "kd.losses.logits:kl_logits",
        "KL between two detectors' class scores for boxes near the true ones",
        unit="box", student="object_logits", teacher="object_logits", softmax=True,
    ),
    "object_boxes": TermKind(
        "kd.losses.box_distillation:box_distance",
        "smooth L1 distance between two detectors' box regressions",
        unit="box", student="object_deltas", teacher="object_deltas", own_class=True,
    ),
    "pixel_wise": TermKind(
        "kd.losses.logits:pixel_wise", "KL between the class distributions of each pixel",
        unit="place", student="logits", teacher="logits", valid=True, softmax=True,
    ),
    "pixel_wise_weighted": TermKind(
        "kd.losses.logits:pixel_wise", "pixel_wise, each pixel weighted as in the supervised loss",
        unit="place", student="logits", teacher="logits", valid=True, softmax=True,
        place_weights="class_weights",
    ),
    "pair_wise": TermKind(
        "kd.losses.pair_wise:pair_wise",
        "squared difference of the affinities of all pairs of places",
        unit="image", valid=True, by_class=False,
    ),
    "holistic": TermKind(
        "kd.losses.holistic:Adversary",
        "a critic that tells the teacher's score maps from the student's",
        unit="image", student="logits", teacher="logits", images=True, trained="critic",
        softmax=True,
    ),
    "channel_wise": TermKind(
        "kd.losses.logits:channel_wise",
        "KL between the places' distributions within each channel",
        unit="image", student="logits", teacher="logits", valid=True,
    ),
    "hint": TermKind(
        "kd.losses.imitation:hint", "squared distance between features",
        unit="place", valid=True,
    ),
    "saliency": TermKind(
        "kd.losses.saliency:saliency_maps",
        "KL from the teacher's saliency map to a second map of the student",
        unit="image", student="teacher_saliency", teacher="saliency", valid=True, by_class=False,
    ),
}  # fmt: skip


def term_kind(section: TermSection) -> TermKind:
    """Return the kind of term that a recipe's section names.

    The section's `name` is a key of `TERMS`, `torchdistill.NAME` for one of torchdistill's
    mid-level losses, or `package.module:attribute` for the user's own. The user's attribute is a
    `TermKind`, or a plain function `(student, teacher, *, options)`; for a function, the section
    must give the `unit`. The unit of torchdistill's losses is `object` for posteriors and `image`
    otherwise, unless the section gives another.

    Raises:
        UserError: The name is unknown, or the unit is missing, or it is given for a kind that
            declares its unit.
    """
    name, unit = section.name, section.unit
    if name.startswith(TORCHDISTILL):
        return _borrowed(section)
    if is_foreign(name):
        found = load_target(name, what="distillation term")
    else:
        found = look_up(TERMS, name, what="distillation term")
    if isinstance(found, TermKind):
        if unit is not None:
            raise UserError(f"losses: {name}: its unit is {found.unit!r}, leave `unit` out")
        return found
    if not callable(found):
        raise UserError(f"losses: {name}: neither a function nor a TermKind")
    if unit is None:
        raise UserError(
            f"losses: {name}: give the unit of its mean, `unit: place`, image, box or object; or "
            "name a kd.distillation.registry.TermKind, which declares it"
        )
    return TermKind(found, "custom loss", unit=unit)


def _borrowed(section: TermSection) -> TermKind:
    from kd.interop.torchdistill import Borrow  # the only import of torchdistill

    loss = Borrow(section.name.removeprefix(TORCHDISTILL))
    check_options(loss, section.options, what=f"losses: {section.name}")
    learns = loss.has_weights(**section.options)
    of_objects = (section.teacher or "").rpartition(".")[2] == POSTERIOR
    return TermKind(
        loss.module if learns else loss,
        "loss of torchdistill",
        unit=section.unit or ("object" if of_objects else "image"),
        trained="student" if learns else None,
    )


ADAPTERS: dict[str, Entry] = {
    name: Entry(f"kd.distillation.adapters:{target}", text)
    for name, target, text in (
        ("conv1x1", "conv1x1", "1x1 convolution"),
        ("conv3x3", "Conv3x3", "3x3 convolution, with or without ReLU"),
        ("linear", "linear", "linear layer, for vectors"),
        ("resize", "Resize", "1x1 convolution and interpolation to a grid"),
    )
}
