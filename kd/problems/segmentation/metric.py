"""The metric of label maps: a confusion matrix per image, merged over batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.problems.images import PerImage
from kd.problems.segmentation import records as map_scores
from kd.utils.images import VOID

Counts = NDArray[np.int64]


def confusion(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns), (C, C) int64.

    Args:
        predicted: Class ids of any shape, each in 0..C-1.
        truth: True class ids of the same shape, or `VOID`.
        num_classes: C.
    """
    known = truth != VOID
    pairs = truth[known].long() * num_classes + predicted[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


class MeanIoU(PerImage[Counts]):
    """Mean IoU and pixel accuracies, from the confusion matrix of each image.

    Args:
        num_classes: C.
        where: Start of messages: a run, a dataset.
    """

    compressed = True  # an image has few of all pairs of classes: most entries are 0

    def __init__(self, num_classes: int, *, where: str = "evaluation") -> None:
        super().__init__(where=where)
        self.num_classes = num_classes

    def take(self, decoded: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add a batch: class ids (N, H, W) beside its `label_maps` and `image_ids`."""
        for own, truth, number in zip(
            decoded, batch["label_maps"], batch["image_ids"].tolist(), strict=True
        ):
            self._images[number] = confusion(own, truth, self.num_classes).cpu().numpy()

    def counts(self) -> Counts:
        """The confusion matrix of all images, (C, C).

        Raises:
            UserError: Not one pixel was scored.
        """
        total = np.zeros((self.num_classes, self.num_classes), np.int64)
        for one in self._images.values():
            total += one
        if not total.sum():
            raise UserError(f"{self._where}: not one pixel was scored; are the maps all void?")
        return total

    def compute(self) -> dict[str, float]:
        """Metrics in 0..1 by name, and the `count` of images.

        `mIoU`, the mean over the classes that are true or predicted anywhere; `pixel_accuracy`;
        `mean_accuracy`, over the true classes.
        """
        whole = {"confusion": self.counts()[None]}
        found = map_scores.pixels(whole)
        values = {
            name: float(map_scores.number_of(name, found, whole)[0]) for name in map_scores.ROWS
        }
        return {**values, "count": float(len(self._images))}

    def records(self) -> dict[str, Counts]:
        """`image_ids` (N,), ascending, and `confusion` (N, C, C)."""
        self.counts()  # raises if nothing was scored
        numbers = sorted(self._images)
        return {
            "image_ids": np.array(numbers, np.int64),
            "confusion": np.stack([self._images[number] for number in numbers]),
        }
