"""Classification of an object in its scene, for students that see both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kd.losses.supervised import cross_entropy_labelled
from kd.problems.base import (
    Batch,
    Classes,
    Mask,
    Mean,
    Metric,
    Output,
    hidden_boxes,
    hidden_labels,
    image_rows,
    ring_mask,
    top_n,
)
from kd.transforms.hide import normalise


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Which class is the object in this box?

    Args:
        num_classes: C.
        label_smoothing: Share of the target spread over all classes.
        appearance: Also ask the appearance head alone for the label.
    """

    num_classes: int
    label_smoothing: float = 0.0
    appearance: bool = False

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images (N, 3, H, W), normalised, and regions (K, 5): image, x1, y1, x2, y2."""
        rows = image_rows(batch).to(torch.float32)
        return normalise(batch["images"]), torch.cat([rows[:, None], hidden_boxes(batch)], dim=1)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`cross_entropy` of the combined answer; `appearance` of that head alone."""
        labels = hidden_labels(batch)
        names = {"cross_entropy": "logits"}
        if self.appearance:
            names["appearance"] = "appearance"
        return {
            name: Mean(
                cross_entropy_labelled(output[key], labels, label_smoothing=self.label_smoothing),
                "labelled",
            )
            for name, key in names.items()
        }

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """`ring`: the surroundings of each object."""
        return {"ring": ring_mask(batch)}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probabilities (K, C)."""
        return output["logits"].float().log_softmax(dim=1)

    def metric(self, classes: Classes) -> Metric:
        """Top-n accuracy and its company."""
        return top_n(classes)
