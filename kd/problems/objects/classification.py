"""Classification of an object in its scene, for students that see both."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kd.losses.supervised import cross_entropy_labelled
from kd.problems.base import Batch, Mean, Output
from kd.problems.objects.batch import ObjectTask, hidden_boxes, hidden_labels, image_rows
from kd.transforms.hide import normalise


@dataclass(frozen=True, kw_only=True)
class Classification(ObjectTask):
    """Classify the object in each box.

    Args:
        label_smoothing: Fraction of the target spread over all classes.
        appearance: Whether the appearance head alone also learns the label.
    """

    outputs: ClassVar[Collection[str]] = ("logits", "context", "appearance")

    label_smoothing: float = 0.0
    appearance: bool = False

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images (N, 3, H, W), normalised, and regions (K, 5): image, x1, y1, x2, y2."""
        rows = image_rows(batch).to(torch.float32)
        return normalise(batch["images"]), torch.cat([rows[:, None], hidden_boxes(batch)], dim=1)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`cross_entropy` of the combined logits; `appearance`: of that head alone."""
        labels = hidden_labels(batch)
        names = {"cross_entropy": "logits"}
        if self.appearance:
            names["appearance"] = "appearance"
        smoothing = self.label_smoothing
        losses = {
            name: cross_entropy_labelled(output[key], labels, label_smoothing=smoothing)
            for name, key in names.items()
        }
        return {name: Mean(loss, "labelled") for name, loss in losses.items()}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probabilities (K, C)."""
        return output["logits"].float().log_softmax(dim=1)
