"""Datasets of label maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kd.data.images import check_targets
from kd.data.open_files import open_annotated
from kd.errors import UserError
from kd.formats.segmentation import CocoMapSplit, LabelMapSplit, open_label_maps
from kd.problems.base import Classes, Split
from kd.problems.images import ImageDataset, is_small, open_layout
from kd.problems.segmentation.samples import SegmentationSamples
from kd.problems.segmentation.schema import SegmentationSection
from kd.storage.fields import CachedField
from kd.utils.images import VOID


@dataclass(frozen=True)
class SegmentationDataset(ImageDataset[SegmentationSection, LabelMapSplit]):
    """Both splits of a dataset of label maps."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        return self.train.class_names

    def class_info(self) -> Classes:
        """Class names."""
        return Classes(self.class_names, where=self.section.name)

    def class_fractions(self) -> dict[str, NDArray[np.float64]]:
        """`pixel_fractions` (C,): the classes' fractions of the train pixels with a class.

        Large splits are sampled, see `counted`.
        """
        counts = np.zeros(VOID + 1, np.int64)
        some = np.array(self.counted)
        samples = SegmentationSamples(self.train, size=None, crop=self.section.crop, only=some)
        for number, size in zip(some.tolist(), samples.file_sizes(), strict=True):
            counts += np.bincount(self.train.label_map(number, size).flatten(), minlength=VOID + 1)
        pixels = counts[: self.num_classes].astype(np.float64)
        if not pixels.any():
            raise UserError(f"{self.train.where}: no pixel has a class: all are void")
        return {"pixel_fractions": pixels / pixels.sum()}

    def training(self, seed: int, cached: Sequence[CachedField] = ()) -> SegmentationSamples:
        """Random crops of the train split, with cached outputs of teachers."""
        section = self.section
        return SegmentationSamples(
            self.train, size=section.size, crop=section.crop, train=True, augment=section.augment,
            seed=seed, cached=cached,
        )  # fmt: skip

    def whole(
        self, split: Split, *, size: int | None, only: NDArray[np.int64] | None = None
    ) -> SegmentationSamples:
        """Whole images of a split, all or those at some positions.

        Args:
            split: Name of the split.
            size: Long side in pixels; None: that of each file.
            only: Positions; None: all.
        """
        return SegmentationSamples(
            self.split(split), size=size, crop=self.section.crop, train=False, only=only
        )


def open_maps(section: SegmentationSection) -> SegmentationDataset:
    """Open a dataset of label maps; every file of a small split is read and checked.

    Raises:
        UserError: As `open_label_maps` and `open_annotated`; an image or a label map is corrupt,
            or their sizes differ.
    """
    opened = SegmentationDataset(section, *_splits(section))
    opened.training(0)  # checks the options before any file is read
    if section.layout != "coco":  # `open_annotated` has checked the images; maps are drawn
        small = [split for split in (opened.train, opened.val) if is_small(split)]
        check_targets((split.images, split.label_map) for split in small)
    opened.whole("val", size=section.size)
    return opened


def _splits(section: SegmentationSection) -> tuple[LabelMapSplit, LabelMapSplit]:
    if section.layout != "coco":
        return open_layout(section, section.layout, open_label_maps)
    train, val = open_annotated(section)
    if train.num_classes >= 255:
        raise UserError(f"{section.name}: more than 254 classes do not fit label maps")
    return CocoMapSplit(train), CocoMapSplit(val)
