"""Collects the confusions of label maps over batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.metrics.records import gathered, save_records
from kd.problems.segmentation import records as map_scores
from kd.utils.images import VOID

Counts = NDArray[np.int64]


def confusion(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns), (C, C) int64.

    Args:
        predicted: Class ids of any shape, each in 0..C-1.
        truth: Those that are right, of the same shape; `VOID` where nobody knows.
        num_classes: C.
    """
    known = truth != VOID
    pairs = truth[known].long() * num_classes + predicted[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


class MeanIoU:
    """Collects the confusion of each image, so that one that is seen twice counts once.

    Args:
        num_classes: C.
        where: What messages begin with: a run, a dataset.
    """

    def __init__(self, num_classes: int, *, where: str = "evaluation") -> None:
        self.num_classes, self._where = num_classes, where
        self._images: dict[int, Counts] = {}

    def take(self, decoded: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add a batch: class ids (N, H, W) beside its `label_maps` and `image_ids`."""
        for own, truth, number in zip(
            decoded, batch["label_maps"], batch["image_ids"].tolist(), strict=True
        ):
            self._images[number] = confusion(own, truth, self.num_classes).cpu().numpy()

    def gather(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge what all ranks collected; alone, does nothing."""
        parts = gathered(self._images, group)
        self._images = {number: one for part in parts for number, one in part.items()}

    def counts(self) -> Counts:
        """The confusion of all images, (C, C).

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
        """Every number by name, in 0..1.

        `mIoU`, the mean over the classes that are there or said; `pixel_accuracy`; `mean_accuracy`,
        over the classes that are there; `count` of images.
        """
        whole = {"confusion": self.counts()[None]}
        found = map_scores.pixels(whole)
        values = {name: map_scores.number_of(name, found, whole)[0] for name in map_scores.ROWS}
        return {**{name: float(value) for name, value in values.items()},
                "count": float(len(self._images))}  # fmt: skip

    def records(self) -> dict[str, Counts]:
        """The confusion of each image: `image_ids` (N,), ascending, and `confusion` (N, C, C)."""
        self.counts()  # says so where there is nothing
        numbers = sorted(self._images)
        return {
            "image_ids": np.array(numbers, np.int64),
            "confusion": np.stack([self._images[number] for number in numbers]),
        }

    def save_predictions(self, path: Path) -> None:
        """Write `records`."""
        # An image has few of all pairs of classes: most of its confusion are zeros.
        save_records(self.records(), path, compressed=True)
