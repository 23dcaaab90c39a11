"""Multi-label classification of scenes: which classes are in the picture, nothing hidden."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.supervised import multilabel_bce
from kd.metrics.multilabel import MultiLabelAP, present_classes
from kd.problems.base import Batch, Classes, Mask, Mean, Metric, Output
from kd.transforms.hide import normalise


@dataclass(frozen=True, kw_only=True)
class SceneLabels:
    """Which classes are in the picture? Asked of a bare classifier, with the picture as its region.

    Args:
        num_classes: C.
        pos_weight: Weight of a class where it is there, against 1 where it is not.
    """

    num_classes: int
    pos_weight: float = 1.0

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images (N, 3, H, W), normalised, and each one's picture without the padding, (N, 5)."""
        height, width = batch["sizes"].to(torch.float32).unbind(dim=1)
        nought = torch.zeros_like(width)
        rows = torch.arange(len(width), device=width.device, dtype=torch.float32)
        return normalise(batch["images"]), torch.stack([rows, nought, nought, width, height], dim=1)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`binary`: cross-entropy of each class by itself, over the pictures with labels."""
        logits = output["appearance"]  # before any softmax: classes do not exclude each other
        present, told = present_classes(batch, self.num_classes)
        weight = None
        if self.pos_weight != 1.0:
            weight = logits.new_full((self.num_classes,), self.pos_weight)
        loss = multilabel_bce(logits, present, known=told, pos_weight=weight)
        return {"binary": Mean(loss, "labelled_images")}

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """None: no object is asked about."""
        return {}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probability that a class is in the picture, (N, C)."""
        return F.logsigmoid(output["appearance"].float())

    def metric(self, classes: Classes) -> Metric:
        """Mean average precision over the classes that occur."""
        return MultiLabelAP(self.num_classes, where=classes.where)
