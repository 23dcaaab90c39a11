"""A dataset of label maps, opened: both splits, checked, and the samples made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.data.open_files import layout_holds, open_annotated, root_of
from kd.errors import UserError
from kd.formats.segmentation import CocoMapSplit, LabelMapSplit, open_label_maps
from kd.problems import problem
from kd.problems.base import Classes, Problem, Split
from kd.problems.segmentation.samples import SegmentationSamples, check_pairs
from kd.problems.segmentation.schema import SegmentationSection
from kd.registry import is_foreign, load_target
from kd.storage.fields import CachedField
from kd.utils.images import VOID

# Bytes of a split's image files that are all read before training starts: about five seconds.
READ_FIRST = 128 << 20
COUNTED = 1000  # train label maps that the classes' shares are counted on, or somewhat fewer


@dataclass(frozen=True)
class SegmentationDataset:
    """Both splits of a dataset of label maps."""

    section: SegmentationSection
    train: LabelMapSplit
    val: LabelMapSplit

    @property
    def problem(self) -> Problem[Any]:
        """Segmentation."""
        return problem("segmentation")

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    def class_info(self) -> Classes:
        """Their names."""
        return Classes(self.class_names, where=self.section.name)

    def class_fractions(self) -> dict[str, NDArray[np.float64]]:
        """How common each class is, for the weights of classes.

        Returns:
            `pixel_shares` (C,): of the train pixels with a class; of a large split's, some maps
            spread evenly over it speak for all.
        """
        counts = np.zeros(VOID + 1, np.int64)
        images = len(self.train.images)
        some = np.arange(0, images, -(-images // COUNTED))
        samples = SegmentationSamples(self.train, size=None, crop=self.section.crop, only=some)
        for number, size in zip(some.tolist(), samples.file_sizes(), strict=True):
            counts += np.bincount(self.train.label_map(number, size).flatten(), minlength=VOID + 1)
        told = counts[: self.num_classes].astype(np.float64)
        if not told.any():
            raise UserError(f"{self.train.where}: no pixel has a class: all are void")
        return {"pixel_shares": told / told.sum()}

    def labelled(self, seed: int) -> None:
        """All of the train images have labels."""
        return None

    def split(self, name: Split) -> LabelMapSplit:
        """Images and label maps of a split."""
        return self.train if name == "train" else self.val

    def crops(self, seed: int, cached: Sequence[CachedField] = ()) -> SegmentationSamples:
        """Random crops of the train split; a teacher's outputs come with them."""
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
            split: Which.
            size: Long side in pixels; None: that of each file.
            only: Positions; None: all.
        """
        return SegmentationSamples(
            self.split(split), size=size, crop=self.section.crop, train=False, only=only
        )


def open_maps(section: SegmentationSection) -> SegmentationDataset:
    """Open a dataset of label maps; small ones are read once, before anything is trained.

    Raises:
        UserError: What `open_label_maps` and `open_annotated` raise, an image or a map that cannot
            be read or does not fit the other.
    """
    opened = SegmentationDataset(section, *_splits(section))
    opened.crops(0)  # options are checked before all files are
    if section.layout != "coco":  # whose images are looked at already, and maps are not files
        check_pairs(split for split in (opened.train, opened.val) if _soon_read(split))
    opened.whole("val", size=section.size)
    return opened


def _soon_read(split: LabelMapSplit) -> bool:
    """Whether all of a split is read in seconds: a large image takes as long as many small."""
    return sum(path.stat().st_size for path in split.images) <= READ_FIRST


def _splits(section: SegmentationSection) -> tuple[LabelMapSplit, LabelMapSplit]:
    if section.layout == "coco":
        train, val = open_annotated(section)
        if train.num_classes >= 255:
            raise UserError(f"{section.name}: more than 254 classes do not fit label maps")
        return CocoMapSplit(train), CocoMapSplit(val)
    root = root_of(section, holds=layout_holds(section.layout, str(section.train)))
    return (
        _open_split(section.layout, root, str(section.train)),
        _open_split(section.layout, root, str(section.val)),
    )


def _open_split(layout: str, root: Path, split: str) -> LabelMapSplit:
    if not is_foreign(layout):
        return open_label_maps(layout, root, split)
    opened: LabelMapSplit = load_target(layout, what="layout")(root, split)
    return opened
