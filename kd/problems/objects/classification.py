"""Classification of an object in its scene, for students that see both."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kd.losses.supervised import cross_entropy_labelled
from kd.problems.base import Batch, Classes, Mask, Mean, Metric, Output, Rows, Task
from kd.problems.objects.batch import (
    hidden_boxes,
    hidden_labels,
    image_rows,
    object_counts,
    object_rows,
    ring_mask,
    top_n,
)
from kd.transforms.hide import normalise


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Which class is the object in this box?

    Args:
        num_classes: C.
        label_smoothing: Share of the target spread over all classes.
        appearance: Whether the appearance head alone learns the label, too.
    """

    outputs: ClassVar[Collection[str]] = ("logits", "context", "appearance")
    mask_names: ClassVar[Collection[str]] = ("ring",)

    num_classes: int
    label_smoothing: float = 0.0
    appearance: bool = False

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images (N, 3, H, W), normalised, and regions (K, 5): image, x1, y1, x2, y2."""
        rows = image_rows(batch).to(torch.float32)
        return normalise(batch["images"]), torch.cat([rows[:, None], hidden_boxes(batch)], dim=1)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`cross_entropy` of the combined logits; `appearance`, that of that head alone."""
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

    def rows(self, batch: Batch) -> Rows:
        """A row for each object that the batch is about."""
        return object_rows(batch)

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Objects and images, with labels and without."""
        return object_counts(batch, units)

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probabilities (K, C)."""
        return output["logits"].float().log_softmax(dim=1)

    def metric(self, classes: Classes) -> Metric:
        """Top-n accuracy and what goes with it."""
        return top_n(classes)
