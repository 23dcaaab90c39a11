"""Datasets of objects, for detectors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.errors import UserError
from kd.formats.coco_results import Truth, read_truth
from kd.formats.kitti import kitti_truth
from kd.formats.splits import objects_on
from kd.metrics.kitti_ap import KittiTruth
from kd.problems import problem
from kd.problems.base import Classes, Problem, Split
from kd.problems.detection.samples import DetectionSamples
from kd.problems.objects.data import ObjectsDataset, smoothed
from kd.problems.objects.schema import ObjectsSection


@dataclass(frozen=True)
class DetectionDataset:
    """A dataset of objects whose boxes are all visible."""

    objects: ObjectsDataset

    @property
    def problem(self) -> Problem[Any]:
        """Detection."""
        return problem("detection")

    @property
    def section(self) -> ObjectsSection:
        """The dataset's section of the recipe."""
        return self.objects.section

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        return self.objects.class_names

    @property
    def num_classes(self) -> int:
        """C."""
        return self.objects.num_classes

    def class_info(self) -> Classes:
        """Names, prior and ground truth; for KITTI also the difficulties of objects."""
        return self.objects.class_info(self.prior())._replace(truth=lambda: self._val_truth)

    @cached_property
    def _val_truth(self) -> tuple[Truth, KittiTruth | None]:
        """All boxes of the val JSON, crowds included; cached, since every evaluation uses it."""
        truth = read_truth(self.objects.val.annotation_file)
        return truth, kitti_truth(truth) if self.section.layout == "kitti" else None

    def labelled(self, seed: int) -> NDArray[np.int64] | None:
        """Ids of the train images whose labels a student of this seed may use; None: all."""
        return self.objects.labelled(seed)

    def prior(self, images: Collection[int] | None = None) -> NDArray[np.float64]:
        """Class fractions, (C,), of objects of any size, one added to each count.

        Args:
            images: Ids of the train images to count on; None: all.
        """
        index = self.objects.train
        rows, _ = objects_on(index, images)
        return smoothed(np.bincount(index.labels[rows], minlength=self.num_classes))

    def samples(self, split: Split, **options: Any) -> DetectionSamples:
        """Samples of a split with the section's options and further `options`."""
        section = self.section
        if not section.images:
            raise UserError(f"{section.name}: data.images is false, but detectors need images")
        prepared = Path(section.prepared) / split if section.prepared else None
        return DetectionSamples(
            self.objects.split(split), size=section.size, augment=section.augment,
            scales=section.scales, repeat_labelled=section.repeat_labelled, prepared=prepared,
            **{"train": False, **options},
        )  # fmt: skip
