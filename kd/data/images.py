"""Whole images, or parts of them, with something to learn about their pixels, as samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from kd.data.loader import Sample
from kd.errors import UserError
from kd.storage.fields import PREFIX, CachedField
from kd.transforms.crops import Crop
from kd.utils.images import UNREADABLE, read_image, resize

MULTIPLE = 8  # sides of what models see: a network's halvings must meet again
_SAMPLE_STREAM = 3  # keeps the samples' random numbers apart from the loader's order


class ImageSamples(Dataset[Sample], ABC):
    """Samples of docs/batch.md, looked up by (epoch, position).

    Everything random about a sample follows from (seed, epoch, position), whoever makes it when.

    Args:
        images: Files.
        frame: Height and width of training samples, multiples of 8.
        train: Otherwise whole images, whose targets keep their own size.
        seed: Of everything random, 0 or more.
        only: Positions of the images to keep; None keeps all.
        cached: Outputs of teachers that go with training samples, as `stored.NAME`.
        setting: What messages call the frame.

    Raises:
        UserError: The frame is no multiple, or, for evaluation, a file cannot be read.
    """

    def __init__(
        self,
        images: Sequence[Path],
        *,
        frame: tuple[int, int],
        train: bool,
        seed: int,
        only: NDArray[np.int64] | None,
        cached: Sequence[CachedField],
        setting: str,
    ) -> None:
        """Check the frame; the arguments are explained above."""
        if wrong := [side for side in frame if side < MULTIPLE or side % MULTIPLE]:
            raise UserError(f"{setting}: {wrong[0]} is not a multiple of {MULTIPLE} pixels")
        self.images, self.frame = images, frame
        self.train, self.seed = train, seed
        self.places = np.arange(len(images)) if only is None else only
        self.cached = tuple(cached)
        sizes = set() if train else set(self.file_sizes())
        # Whole images of different sizes have no common shape.
        self.alike = len(sizes) <= 1
        self._whole = next(iter(sizes), frame)

    @abstractmethod
    def draw(self, random: np.random.Generator, own: tuple[int, int]) -> Crop:
        """What is done to a training image of a height and width."""

    @abstractmethod
    def seen(self, own: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which a model sees a whole image: multiples of 8."""

    @abstractmethod
    def targets(self, image: int, own: tuple[int, int], cut: Crop | None) -> Sample:
        """What is to be learned or scored; of a whole image of evaluation `cut` is None."""

    def __len__(self) -> int:
        """The number of images."""
        return len(self.places)

    def together(self, batch_size: int) -> int:
        """Whole images are larger than crops: fewer of them take the same memory."""
        if self.train:
            return batch_size
        height, width = self.seen(self._whole)
        pixels = self.frame[0] * self.frame[1]
        return max(1, batch_size * pixels // (height * width)) if self.alike else 1

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Make the sample of (epoch, position).

        Returns:
            `images` (3, h, w) uint8; `sizes` (2,), its sides; `image_ids` (), the position in the
            split; the targets; in training what is stored.

        Raises:
            UserError: The image or its target is missing, broken, or they do not fit.
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
        """Height and width of every file, from its header."""
        return [file_size(self.images[place]) for place in self.places]


def file_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, from its header.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with Image.open(path) as pixels:
            return pixels.height, pixels.width
    except UNREADABLE as error:
        raise UserError(f"{path}: cannot read this image: {error}") from None


def in_multiples(height: float, width: float, unit: int = MULTIPLE) -> tuple[int, int]:
    """Sides rounded to multiples of so many pixels."""
    sides = (max(unit, round(side / unit) * unit) for side in (height, width))
    return next(sides), next(sides)


def check_targets(
    splits: Iterable[tuple[Sequence[Path], Callable[[int, tuple[int, int]], object]]],
) -> None:
    """Read all images and their targets once.

    Args:
        splits: Images, and what reads the target of one by its place, of its height and width.

    Raises:
        UserError: As for a sample, of the first five that are wrong.
    """
    mistakes = []
    for images, target in splits:
        for number, path in enumerate(images):
            try:
                pixels = read_image(path, None)
                target(number, (pixels.shape[1], pixels.shape[2]))
            except UserError as error:
                mistakes.append(str(error))
    if mistakes:
        more = f"\n... and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        raise UserError("\n".join(mistakes[:5]) + more)
