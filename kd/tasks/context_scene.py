"""A context task about the whole scene: which classes are in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses.class_weights import positive_weights
from kd.losses.supervised import multilabel_bce
from kd.metrics.average_precision import present_classes
from kd.tasks.base import Batch, Mean, Output, hidden_labels, image_rows
from kd.tasks.context import ContextInputs


@dataclass(frozen=True, kw_only=True)
class ContextScene(ContextInputs):
    """Which classes the scene holds, the hidden object's among them: logits (K, C), BCE.

    BlindNet's multi-label ResNet-18. It answers a coarser question than the other teachers: a
    class that is seen elsewhere in the picture is in the scene for sure, whatever is hidden. The
    posterior of the hidden object is read as the classes' probabilities divided by their sum; it is
    right about the classes that are not in sight and says too much of those that are.

    Args:
        class_weights: Power of the weight of a class's presence, `positive_weights` of its share of
            the train pictures; 0 = none.
        image_shares: Those shares, C of them; needed for the loss where there are weights.
    """

    class_weights: float = 0.0
    image_shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the power.

        Raises:
            UserError: It is out of range.
        """
        if not 0 <= self.class_weights <= 1:
            raise UserError(f"class_weights must be in 0..1, got {self.class_weights}")

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`multilabel_bce` of the inputs whose labels are known."""
        logits, weights = output["logits"], None
        if self.class_weights:
            assert self.image_shares is not None
            numbers = positive_weights(self.image_shares, power=self.class_weights)
            weights = logits.new_tensor(numbers, dtype=torch.float32)
        shown, _ = present_classes(batch, self.num_classes)
        targets = shown[image_rows(batch)]
        known = hidden_labels(batch) >= 0
        loss = multilabel_bce(logits, targets, known=known, pos_weight=weights)
        return {"multilabel_bce": Mean(loss, "labelled")}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log of the probabilities divided by their sum, (K, C)."""
        scores = output["logits"].float().sigmoid().clamp(min=1e-6)
        return (scores / scores.sum(dim=1, keepdim=True)).log()
