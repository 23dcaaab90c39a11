"""Images with the density of fixations as samples, whole in training and in evaluation."""

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
    """Training samples with `density` (1, h, w) float32, whose sum is 1; whole images.

    Training images are scaled into a frame, their aspect kept, and padded below and right, where
    the density is 0; `sizes` is the image within. Evaluation images fill what they are scaled
    to and come without a density: what is said of them is scored in pixels of the files, whose
    `own_sizes` (2,) come with them.

    Args:
        split: Images and fixations.
        size: Height and width that images are scaled into, multiples of 8.
        train: Mirrored at random, and padded.
        augment: Options of `Flips`; None changes nothing.
        seed: Of everything random, 0 or more.
        only: Positions of the images to keep; None keeps all.
        cached: Outputs of teachers that go with training samples, as `stored.NAME`.

    Raises:
        UserError: An option is out of range, or, for evaluation, a file cannot be read.
    """

    def __init__(
        self,
        split: GazeSplit,
        *,
        size: tuple[int, int],
        train: bool = True,
        augment: dict[str, Any] | None = None,
        seed: int = 0,
        only: NDArray[np.int64] | None = None,
        cached: Sequence[CachedField] = (),
    ) -> None:
        """Check the options; the arguments are explained above."""
        self.split = split
        self.turns = build_flips(augment)
        super().__init__(
            split.images, frame=size, train=train, seed=seed, only=only, cached=cached,
            setting="data.size",
        )  # fmt: skip

    def draw(self, random: np.random.Generator, own: tuple[int, int]) -> Crop:
        """The whole image."""
        scale = self._scale(own)
        height, width = (max(1, round(side * scale)) for side in own)
        return self.turns.draw(random, own, (height, width))

    def seen(self, own: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which a model sees a whole image: multiples of 8."""
        scale = self._scale(own)
        return in_multiples(own[0] * scale, own[1] * scale)

    def targets(self, image: int, own: tuple[int, int], cut: Crop | None) -> Sample:
        """The density, or in evaluation the size of the file."""
        if cut is None:
            return {"own_sizes": torch.tensor(own)}
        density = self.split.density(image, own, cut.size)
        return {"density": cut.placed(density, self.frame), "sizes": torch.tensor(cut.size)}

    def _scale(self, own: tuple[int, int]) -> float:
        return min(to / side for to, side in zip(self.frame, own, strict=True))


def check_gaze(splits: Iterable[GazeSplit]) -> None:
    """Read all images, their fixations and their published maps once.

    Raises:
        UserError: As for a sample, of the first five that are wrong.
    """

    def read(split: GazeSplit, number: int, size: tuple[int, int]) -> None:
        split.fixations(number, size)
        if split.maps:
            split.density(number, size, (8, 8))

    check_targets((split.images, partial(read, split)) for split in splits)
