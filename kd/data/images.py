"""Samples of images with a target map: random crops for training, whole images for evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from kd.data.loader import Sample
from kd.errors import UserError, raise_first
from kd.storage.fields import PREFIX, CachedField
from kd.transforms.crops import Crop
from kd.utils.images import file_size, read_image, resize

MULTIPLE = 8  # divides the sides of inputs, so that feature maps of several strides align
_SAMPLE_STREAM = 3  # random numbers of samples must differ from those of the loader's order


class ImageSamples(Dataset[Sample], ABC):
    """Base class of datasets of images with target maps, indexed by (epoch, position).

    Samples are described in docs/batch.md; their augmentation depends only on (seed, epoch,
    position).

    Args:
        images: Image files.
        frame: Height and width of training samples, multiples of 8.
        setting: Config key of `frame`, for error messages.
        train: Return random crops; otherwise whole images, with targets at the image file's size.
        only: Indices of the images to use; None for all.
        cached: Teacher outputs to add to training samples, as `stored.NAME`.
    """

    def __init__(
        self,
        images: Sequence[Path],
        *,
        frame: tuple[int, int],
        setting: str,
        train: bool = True,
        seed: int = 0,
        only: NDArray[np.int64] | None = None,
        cached: Sequence[CachedField] = (),
    ) -> None:
        if wrong := [side for side in frame if side < MULTIPLE or side % MULTIPLE]:
            raise UserError(f"{setting}: {wrong[0]} is not a multiple of {MULTIPLE} pixels")
        self.images, self.frame = images, frame
        self.train, self.seed = train, seed
        self.places = np.arange(len(images)) if only is None else only
        self.cached = tuple(cached)
        sizes = set() if train else set(self.file_sizes())
        self.alike = len(sizes) <= 1  # only whole images of one size can be batched
        self._whole = next(iter(sizes), frame)

    @abstractmethod
    def draw(self, random: np.random.Generator, own: tuple[int, int]) -> Crop:
        """Sample the crop of a training image of size `own` = (height, width)."""

    @abstractmethod
    def seen(self, own: tuple[int, int]) -> tuple[int, int]:
        """Evaluation size, in multiples of 8, of an image of size `own` = (height, width)."""

    @abstractmethod
    def targets(self, image: int, own: tuple[int, int], cut: Crop | None) -> Sample:
        """Targets of image number `image` of size `own`, cropped to `cut` in training."""

    def __len__(self) -> int:
        """Number of samples in an epoch."""
        return len(self.places)

    def together(self, batch_size: int) -> int:
        """Evaluation batch size that needs the memory of `batch_size` training samples, roughly."""
        if self.train:
            return batch_size
        height, width = self.seen(self._whole)
        pixels = self.frame[0] * self.frame[1]
        return max(1, batch_size * pixels // (height * width)) if self.alike else 1

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Load the sample of (epoch, position).

        It contains `images` (3, h, w) uint8; `sizes` (2,), which is h and w; `image_ids` (), the
        image's index in the split; the targets; and in training the cached teacher outputs.
        """
        epoch, position = place
        image = int(self.places[position])
        pixels = read_image(self.images[image], None)
        own = (pixels.shape[1], pixels.shape[2])
        cut = None
        if self.train:
            random = np.random.default_rng((_SAMPLE_STREAM, self.seed, epoch, position))
            cut = self.draw(random, own)
            pixels = cut.image(pixels, self.frame)
        else:
            pixels = resize(pixels, self.seen(own))
        sample = {
            "images": pixels.contiguous(),
            "sizes": torch.tensor(pixels.shape[1:]),
            "image_ids": torch.tensor(image),
            **self.targets(image, own, cut),
        }
        if cut is not None:
            for one in self.cached:
                sample[f"{PREFIX}{one.name}"] = one.cropped(image, cut, own, self.frame)
        return sample

    def file_sizes(self) -> list[tuple[int, int]]:
        """Height and width of every image file, read from its header."""
        return [file_size(self.images[place]) for place in self.places]


def in_multiples(height: float, width: float, unit: int = MULTIPLE) -> tuple[int, int]:
    """Round a height and width to multiples of `unit` pixels, at least `unit`."""
    sides = (max(unit, round(side / unit) * unit) for side in (height, width))
    return next(sides), next(sides)


def check_targets(
    splits: Iterable[tuple[Sequence[Path], Callable[[int, tuple[int, int]], object]]],
) -> None:
    """Read all images and targets once; raise a UserError that lists the first five failures.

    Each split is a pair: its image files, and a function (image index, (height, width)) that reads
    the target of an image.
    """
    mistakes = []
    for images, target in splits:
        for number, path in enumerate(images):
            try:
                pixels = read_image(path, None)
                target(number, (pixels.shape[1], pixels.shape[2]))
            except UserError as error:
                mistakes.append(str(error))
    raise_first(mistakes)
