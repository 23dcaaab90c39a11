"""Samples of images with label maps: crops for training, whole images for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.data.images import ImageSamples, in_multiples
from kd.data.loader import Sample
from kd.formats.segmentation import LabelMapSplit
from kd.storage.fields import CachedField
from kd.transforms.crops import Crop, build_crops
from kd.utils.images import scaled_size

# Sides of whole images are multiples of 16: a network of stride 16 would otherwise stretch its map
# by the part of the last cell that lies outside of the image.
WHOLE = 16


class SegmentationSamples(ImageSamples):
    """Samples with `label_maps`, uint8: (h, w) in training, of the file's own size in evaluation.

    Args:
        split: Images and label maps.
        size: Long side of the images in pixels, a factor of crop scales; None: each file's own.
        crop: Height and width of training samples, multiples of 8.
        train: Random crops; otherwise whole images, with label maps of their own size.
        augment: Options of `Crops`; None: crops at one scale, otherwise unchanged.
        seed: Random seed, 0 or more.
        only: Positions of the images to use; None: all.
        cached: Teacher outputs that come with training samples, as `stored.NAME`.

    Raises:
        UserError: An option is out of range, or, for evaluation, a file cannot be read.
    """

    def __init__(
        self, split: LabelMapSplit, *, size: int | None, crop: tuple[int, int], train: bool = True,
        augment: dict[str, Any] | None = None, seed: int = 0,
        only: NDArray[np.int64] | None = None, cached: Sequence[CachedField] = (),
    ) -> None:  # fmt: skip
        self.split, self.size = split, size
        self.crops = build_crops(augment)
        super().__init__(
            split.images, frame=crop, train=train, seed=seed, only=only, cached=cached,
            setting="data.crop",
        )  # fmt: skip

    def draw(self, random: np.random.Generator, own: tuple[int, int]) -> Crop:
        """A random crop at a random scale."""
        factor = 1.0 if self.size is None else self.size / max(own)
        return self.crops.draw(random, own, self.frame, factor=factor)

    def seen(self, own: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a whole image as the model's input: multiples of 16."""
        return in_multiples(*(own if self.size is None else scaled_size(*own, self.size)), WHOLE)

    def targets(self, image: int, own: tuple[int, int], cut: Crop | None) -> Sample:
        """The label map."""
        labels = self.split.label_map(image, own)
        return {"label_maps": labels if cut is None else cut.label_map(labels, self.frame)}
