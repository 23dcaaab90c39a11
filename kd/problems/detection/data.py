"""A data set of objects, opened for detectors: pictures with all their boxes, none hidden."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kd.config.recipes import Data
from kd.formats.kitti import kitti_truth
from kd.formats.splits import objects_on
from kd.metrics.kitti_ap import KittiTruth
from kd.problems.base import Classes
from kd.problems.detection.samples import DetectionSamples
from kd.problems.objects.data import ObjectsDataset, smoothed
from kd.storage.fields import CachedField


@dataclass(frozen=True)
class DetectionDataset:
    """The same data set of objects, asked about as detectors are."""

    objects: ObjectsDataset

    @property
    def section(self) -> Data:
        """As the recipe has it."""
        return self.objects.section

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        return self.objects.class_names

    @property
    def num_classes(self) -> int:
        """C."""
        return self.objects.num_classes

    def classes(self) -> Classes:
        """What a metric is told; KITTI's files say how hard each object is to see, too."""
        known = self.objects.classes(self.prior())
        if self.section.made_from != "kitti":
            return known
        return known._replace(kitti=lambda: self._val_kitti)

    @cached_property
    def _val_kitti(self) -> KittiTruth:
        """Read once: every evaluation of a training asks for it."""
        return kitti_truth(self.objects.val_truth)

    def labelled(self, seed: int) -> NDArray[np.int64] | None:
        """Ids of the train images whose labels a student of this seed sees; None: all."""
        return self.objects.labelled(seed)

    def prior(self, images: Collection[int] | None = None) -> NDArray[np.float64]:
        """Class shares, (C,), with one added to each count: of objects of all sizes.

        Args:
            images: Only those with these ids.
        """
        index = self.objects.train
        rows, _ = objects_on(index, images)
        return smoothed(np.bincount(index.labels[rows], minlength=self.num_classes))

    def samples(self, seed: int, stored: Sequence[CachedField] = ()) -> DetectionSamples:
        """Train pictures of a seed, those whose labels it may know."""
        known = self.labelled(seed)
        return self.objects.boxes(seed, labelled=known, only=known, stored=stored)

    def evaluated(self) -> DetectionSamples:
        """Whole val pictures."""
        return self.objects.evaluated_boxes()
