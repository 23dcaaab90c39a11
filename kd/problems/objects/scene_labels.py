"""Multi-label classification of scenes: which classes are in an image, nothing hidden."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.supervised import multilabel_bce
from kd.metrics.multilabel import MultiLabelAP, present_classes
from kd.problems.base import Batch, Classes, Mask, Mean, Metric, Output, Rows, Task
from kd.problems.objects.batch import object_counts, object_rows
from kd.transforms.hide import normalise


@dataclass(frozen=True, kw_only=True)
class SceneLabels(Task):
    """Which classes are in the image? The region of the classifier is the whole image.

    Args:
        num_classes: C.
        pos_weight: Weight of a class where it is there, against 1 where it is not.
    """

    outputs: ClassVar[Collection[str]] = ("logits", "context", "appearance")

    num_classes: int
    pos_weight: float = 1.0

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images (N, 3, H, W), normalised, and the region of each without its padding, (N, 5)."""
        height, width = batch["sizes"].to(torch.float32).unbind(dim=1)
        zero = torch.zeros_like(width)
        rows = torch.arange(len(width), device=width.device, dtype=torch.float32)
        return normalise(batch["images"]), torch.stack([rows, zero, zero, width, height], dim=1)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`binary`: cross-entropy of each class by itself, over the images with labels."""
        logits = output["appearance"]  # before any softmax: classes do not exclude each other
        present, told = present_classes(batch, self.num_classes)
        weight = None
        if self.pos_weight != 1.0:
            weight = logits.new_full((self.num_classes,), self.pos_weight)
        loss = multilabel_bce(logits, present, known=told, pos_weight=weight)
        return {"binary": Mean(loss, "labelled_images")}

    def rows(self, batch: Batch) -> Rows:
        """A row for each object that the batch is about."""
        return object_rows(batch)

    def counts(
        self, batch: Batch, units: Collection[str] = (), masks: Mapping[str, Mask] | None = None
    ) -> dict[str, Tensor]:
        """Objects and images, with labels and without."""
        return object_counts(batch, units)

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probability that a class is in the image, (N, C)."""
        return F.logsigmoid(output["appearance"].float())

    def metric(self, classes: Classes) -> Metric:
        """Mean average precision over the classes that occur."""
        return MultiLabelAP(self.num_classes, where=classes.where)
