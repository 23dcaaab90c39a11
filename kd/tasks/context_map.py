"""A context task with one class a pixel: a softmax over the classes and background."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses.class_weights import median_frequency
from kd.losses.supervised import masked_cross_entropy
from kd.tasks.base import Batch, Mean, Output, hidden_labels, image_rows
from kd.tasks.context import ContextInputs, picture_pixels


@dataclass(frozen=True, kw_only=True)
class ContextMap(ContextInputs):
    """Which class covers each pixel: logits (K, 1 + C, H, W), background first, cross-entropy.

    BlindNet's pixel-wise ResNet-18. Targets are the batch's `class_maps` (`kd.data.class_maps`),
    hidden object included. The posterior of the hidden object: the softmax with background left
    out, summed over the hidden region and divided by its sum.

    Args:
        hidden_weight: Weight of the hidden region's mean against that of the rest.
        class_weights: Power of the classes' weights, `median_frequency` of their shares of the
            train pixels, background among them; 0 = none.
        pixel_shares: Those shares, 1 + C of them; needed for the loss where there are weights.
    """

    hidden_weight: float = 5.0
    class_weights: float = 0.0
    pixel_shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check the power.

        Raises:
            UserError: It is out of range.
        """
        if not 0 <= self.class_weights <= 1:
            raise UserError(f"class_weights must be in 0..1, got {self.class_weights}")

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`pixel_cross_entropy` over the picture's pixels; padding and withheld labels left out."""
        rows = image_rows(batch)
        told = hidden_labels(batch) >= 0
        logits, weights = output["logits"], None
        if self.class_weights:
            assert self.pixel_shares is not None
            numbers = median_frequency(self.pixel_shares, power=self.class_weights)
            weights = logits.new_tensor(numbers, dtype=torch.float32)
        loss = masked_cross_entropy(
            logits,
            batch["class_maps"][rows].long(),
            self.regions(batch),
            valid=picture_pixels(batch)[rows] & told[:, None, None],
            class_weights=weights,
            hidden_weight=self.hidden_weight,
        )
        # As for `ContextPixels`: inputs without labels added 0.
        scale = len(told) / told.sum().clamp(min=1)
        return {"pixel_cross_entropy": Mean(loss * scale, "labelled")}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probabilities (K, C)."""
        regions = self.regions(batch).float()
        shares = output["logits"].float().softmax(dim=1)[:, 1:]
        scores = torch.einsum("kchw,khw->kc", shares, regions).clamp(min=1e-6)
        return (scores / scores.sum(dim=1, keepdim=True)).log()
