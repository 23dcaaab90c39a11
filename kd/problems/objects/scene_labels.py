"""Multi-label classification of images in which nothing is hidden."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses.supervised import multilabel_bce
from kd.metrics.multilabel import MultiLabelAP, present_classes
from kd.problems.base import Batch, Classes, Evaluator, Mask, Mean, Output
from kd.problems.objects.batch import ObjectTask
from kd.transforms.hide import normalise


@dataclass(frozen=True, kw_only=True)
class SceneLabels(ObjectTask):
    """Classify the scene; the classifier's region is the whole image.

    Args:
        pos_weight: Weight of the classes that are present; others weigh 1.
    """

    outputs: ClassVar[Collection[str]] = ("logits", "context", "appearance")
    mask_names: ClassVar[Collection[str]] = ()

    pos_weight: float = 1.0

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Normalised images (N, 3, H, W), and the region of each without its padding, (N, 5)."""
        height, width = batch["sizes"].to(torch.float32).unbind(dim=1)
        zero = torch.zeros_like(width)
        rows = torch.arange(len(width), device=width.device, dtype=torch.float32)
        return normalise(batch["images"]), torch.stack([rows, zero, zero, width, height], dim=1)

    def losses(self, output: Output, batch: Batch) -> dict[str, Mean]:
        """`binary`: binary cross-entropy of all classes over the labelled images."""
        logits = output["appearance"]  # before any softmax: classes do not exclude each other
        present, known = present_classes(batch, self.num_classes)
        weight = None
        if self.pos_weight != 1.0:
            weight = logits.new_full((self.num_classes,), self.pos_weight)
        loss = multilabel_bce(logits, present, known=known, pos_weight=weight)
        return {"binary": Mean(loss, "labelled_images")}

    def masks(self, batch: Batch) -> dict[str, Mask]:
        """None: nothing is hidden."""
        return {}

    def decode(self, output: Output, batch: Batch) -> Tensor:
        """Log-probabilities that a class is in the image, (N, C)."""
        return F.logsigmoid(output["appearance"].float())

    def metric(self, classes: Classes) -> Evaluator:
        """Mean average precision over the classes that occur."""
        return MultiLabelAP(self.num_classes, where=classes.where)
