"""Samples of images with the density of fixations: whole images, padded in training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kd.data.images import ImageSamples, check_targets, in_multiples
from kd.data.loader import Sample
from kd.formats.fixations import GazeSplit
from kd.storage.fields import CachedField
from kd.transforms.crops import Crop, build_flips


class SaliencySamples(ImageSamples):
    """Training samples with `density` (1, h, w) float32, sum 1.

    Training images are scaled to fit a frame, keeping their aspect ratio, and padded below and
    right, where the density is 0; `sizes` is the size without padding. Evaluation images have no
    padding and no density: predictions are scored in pixels of the files, of `own_sizes` (2,).

    Args:
        split: Images and fixations.
        size: Height and width of the frame, multiples of 8.
        train: Flip at random, and pad.
        augment: Options of `Flips`; None: no flips.
        seed: Random seed, 0 or more.
        only: Positions of the images to use; None: all.
        cached: Teacher outputs that come with training samples, as `stored.NAME`.

    Raises:
        UserError: An option is out of range, or, for evaluation, a file cannot be read.
    """

    def __init__(
        self, split: GazeSplit, *, size: tuple[int, int], train: bool = True,
        augment: dict[str, Any] | None = None, seed: int = 0,
        only: NDArray[np.int64] | None = None, cached: Sequence[CachedField] = (),
    ) -> None:  # fmt: skip
        self.split = split
        self.flips = build_flips(augment)
        super().__init__(
            split.images, frame=size, train=train, seed=seed, only=only, cached=cached,
            setting="data.size",
        )  # fmt: skip

    def draw(self, random: np.random.Generator, own: tuple[int, int]) -> Crop:
        """The whole image, flipped or not."""
        scale = self._scale(own)
        height, width = (max(1, round(side * scale)) for side in own)
        return self.flips.draw(random, own, (height, width))

    def seen(self, own: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a whole image as the model's input: multiples of 8."""
        scale = self._scale(own)
        return in_multiples(own[0] * scale, own[1] * scale)

    def targets(self, image: int, own: tuple[int, int], cut: Crop | None) -> Sample:
        """The density; in evaluation the size of the file."""
        if cut is None:
            return {"own_sizes": torch.tensor(own)}
        density = self.split.density(image, own, cut.size)
        return {"density": cut.placed(density, self.frame), "sizes": torch.tensor(cut.size)}

    def _scale(self, own: tuple[int, int]) -> float:
        return min(to / side for to, side in zip(self.frame, own, strict=True))


def check_gaze(splits: Iterable[GazeSplit]) -> None:
    """Read every image, its fixations and its published map; errors as of `check_targets`."""

    def read(split: GazeSplit, number: int, size: tuple[int, int]) -> None:
        split.fixations(number, size)
        if split.maps:
            split.density(number, size, (8, 8))

    check_targets((split.images, partial(read, split)) for split in splits)
