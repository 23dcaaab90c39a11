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
MEAN = "mean"  # `mean.posterior` is the mean posterior of all teachers
TORCHDISTILL = "torchdistill."


@dataclass(frozen=True)
class TermKind:
    """A kind of distillation term: a loss, and how the training loop calls it.

    The loss is called with the student's tensor and the teacher's tensor, followed by a mask,
    labels or images if they are declared here. It returns a scalar mean.

    Args:
        loss: `package.module:attribute`, or the function itself.
        help: One line for `--list`.
        unit: What the loss is a mean over; means of micro-batches and processes are weighted by
            their number of units. `place`: grid cells of feature maps (those of `mask`, or else
            valid ones). `image`: images, or teacher inputs if objects are hidden. `box` and
            `object`: rows of outputs, one for each box or hidden object.
        student: Default output of the student; None: the recipe must name an output or layer.
        teacher: Default output of the teacher; None: the recipe must name an output or layer.
        mask: Name of the task's mask that the loss takes as its third argument.
        mask_option: Name of a term option, a number in 0..1, that is passed to the mask.
        valid: Whether the loss takes `valid`, a mask of the grid cells that are not void.
        place_weights: Name of the task's mask that is passed to the loss as `weights`.
        labels: Whether the loss takes the labels of the rows; unlabelled rows are left out.
        images: Whether the loss takes the images of the rows.
        trained: For a loss with weights, what trains them: `student` (the student's optimiser) or
            `critic` (a separate optimiser). Then `loss` maps the teacher's number of channels to a
            module.
        softmax: Whether the loss applies a softmax, so that it also accepts log-probabilities.
        by_class: Whether outputs are compared class by class, which requires the same classes.
        own_class: Whether only the outputs for each box's labelled class are compared.
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
            raise UserError(f"a loss with a mask must have unit 'place', not {self.unit!r}")

    @property
    def maps(self) -> bool:
        """Whether the loss compares maps of whole images rather than rows of objects or boxes."""
        return self.unit in ("place", "image")

    def bind(self, options: Mapping[str, object], *, what: str) -> Callable[..., Any]:
        """Import the loss, check the user's options and bind them; `what` begins messages."""
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
        "KL from the context teacher's posterior to the student's class scores; an ablation",
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
        "imitation of a detector's features near objects; option psi: IoU threshold, relative",
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
        "squared difference of the affinities of all pairs of grid cells",
        unit="image", valid=True, by_class=False,
    ),
    "holistic": TermKind(
        "kd.losses.holistic:Adversary",
        "score of a critic that learns to distinguish the teacher's score maps from the student's",
        unit="image", student="logits", teacher="logits", images=True, trained="critic",
        softmax=True,
    ),
    "channel_wise": TermKind(
        "kd.losses.logits:channel_wise",
        "KL between the spatial distributions of each channel",
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

    The section's `name` is a key of `TERMS`, `torchdistill.NAME` for a mid-level loss of
    torchdistill, or `package.module:attribute` for a user's `TermKind` or function `(student,
    teacher, *, options)`. For a function, the section must give the `unit`. Losses of torchdistill
    have unit `object` for posteriors and `image` otherwise, unless the section gives another.

    Raises:
        UserError: The name is unknown, or `unit` is missing, or given for a kind that declares it.
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
            raise UserError(f"losses: {name}: the unit is {found.unit!r}; remove the key `unit`")
        return found
    if not callable(found):
        raise UserError(f"losses: {name}: must be a function or a TermKind")
    if unit is None:
        raise UserError(
            f"losses: {name}: set `unit`, what the loss is a mean over: place, image, box or "
            "object; or name a kd.distillation.registry.TermKind, which declares its unit"
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
        ("resize", "Resize", "1x1 convolution and resampling to the teacher's grid"),
    )
}
