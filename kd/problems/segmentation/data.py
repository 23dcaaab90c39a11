"""Segmentation datasets: the splits, and samples of image crops and whole images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd.data.images import ImageSamples, check_targets, in_multiples
from kd.data.loader import Sample
from kd.data.open_files import open_annotated
from kd.errors import UserError
from kd.formats.segmentation import LabelMapSplit, coco_label_maps, open_label_maps
from kd.problems.base import Classes, Split
from kd.problems.images import ImageDataset, is_small, open_layout
from kd.problems.segmentation.schema import SegmentationSection
from kd.storage.fields import CachedField
from kd.transforms.crops import Crop, build_crops
from kd.utils.images import VOID, scaled_size

# Sides of whole images are multiples of 16. Otherwise the last cell of a stride-16 network would
# lie partly outside of the image, and resizing its output to the image would stretch it.
WHOLE = 16


class SegmentationSamples(ImageSamples):
    """Samples with `label_maps`, uint8: (h, w) in training, at the image file's size in evaluation.

    Args:
        split: Images and label maps.
        size: Long side of the images before crops are rescaled, pixels; None: each file's size.
        crop: Height and width of training samples, multiples of 8.
        augment: Options of `kd.transforms.crops.Crops`; None: random crops at a single scale.
        options: `train`, `seed`, `only` and `cached` of `ImageSamples`.
    """

    def __init__(
        self, split: LabelMapSplit, *, size: int | None, crop: tuple[int, int],
        augment: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.split, self.size = split, size
        self.crops = build_crops(augment)
        super().__init__(split.images, frame=crop, setting="data.crop", **options)

    def draw(self, random: np.random.Generator, own: tuple[int, int]) -> Crop:
        """Draw a randomly scaled and placed crop for a training sample."""
        factor = 1.0 if self.size is None else self.size / max(own)
        return self.crops.draw(random, own, self.frame, factor=factor)

    def seen(self, own: tuple[int, int]) -> tuple[int, int]:
        return input_size(own, self.size)

    def targets(self, image: int, own: tuple[int, int], cut: Crop | None) -> Sample:
        """The label map: cropped in training, at the file's size in evaluation."""
        labels = self.split.label_map(image, own)
        if cut is None:
            return {"label_maps": labels, "own_sizes": torch.tensor(own)}
        return {"label_maps": cut.label_map(labels, self.frame)}


def input_size(own: tuple[int, int], size: int | None) -> tuple[int, int]:
    """Height and width, multiples of 16, at which the model reads an image of size `own`."""
    return in_multiples(*(own if size is None else scaled_size(*own, size)), WHOLE)


@dataclass(frozen=True)
class SegmentationDataset(ImageDataset[LabelMapSplit]):
    """Train and val split of a dataset of label maps."""

    section: SegmentationSection

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    def class_info(self) -> Classes:
        """The class names; the ground truth is part of the evaluation batches."""
        return Classes(self.class_names, where=self.section.name)

    def class_fractions(self) -> dict[str, NDArray[np.float64]]:
        """`pixel_fractions` (C,): each class's fraction of the labelled train pixels.

        In large splits, only the images at the positions `counted` are read.
        """
        counts = np.zeros(VOID + 1, np.int64)
        some = np.array(self.counted)
        samples = SegmentationSamples(self.train, size=None, crop=self.section.crop, only=some)
        for number, size in zip(some.tolist(), samples.file_sizes(), strict=True):
            counts += np.bincount(self.train.label_map(number, size).flatten(), minlength=VOID + 1)
        pixels = counts[: self.num_classes].astype(np.float64)
        if not pixels.any():
            raise UserError(f"{self.train.where}: no pixel has a class, because all are void")
        return {"pixel_fractions": pixels / pixels.sum()}

    def training(self, seed: int, cached: Sequence[CachedField] = ()) -> SegmentationSamples:
        section = self.section
        return SegmentationSamples(
            self.train, size=section.size, crop=section.crop, augment=section.augment, seed=seed,
            cached=cached,
        )  # fmt: skip

    def whole(
        self, split: Split, *, size: int | tuple[int, int] | None,
        only: NDArray[np.int64] | None = None,
    ) -> SegmentationSamples:  # fmt: skip
        """Whole images of a split for evaluation, optionally only those at the positions `only`.

        `size`: long side in pixels, or (height, width), whose maximum is the long side; None: each
        file's size.
        """
        return SegmentationSamples(
            self.split(split), size=max(size) if isinstance(size, tuple) else size,
            crop=self.section.crop, train=False, only=only,
        )  # fmt: skip


def open_maps(section: SegmentationSection) -> SegmentationDataset:
    """Open a dataset of label maps; read and check every file of a small split."""
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
        raise UserError(f"{section.name}: label maps cannot have more than 254 classes")
    return coco_label_maps(train), coco_label_maps(val)
