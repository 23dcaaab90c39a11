"""Pictures with label maps as samples: crops for training, whole pictures for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from kd.data.collate import Sample
from kd.data.crops import build_crops
from kd.data.images import UNREADABLE, read_image, resize, scaled_size
from kd.data.segmented import MappedSplit
from kd.data.stored import PREFIX, StoredField
from kd.errors import UserError

MULTIPLE = 8  # sides of what models see: a network's halvings must meet again
_SAMPLE_STREAM = 3  # keeps the samples' random numbers apart from the loader's order


class MapDataset(Dataset[Sample]):
    """Samples of docs/design.md, looked up by (epoch, position).

    Everything random about a sample follows from (seed, epoch, position), whoever makes it when.

    Args:
        split: Images and label maps.
        size: Long side in pixels that models see; None: that of each file. Scales of crops are
            factors on it.
        crop: Height and width of training samples, multiples of 8.
        train: Random crops; otherwise whole pictures, whose label maps keep their own size.
        augment: Options of `Crops`; None cuts at one scale and changes nothing else.
        seed: Of everything random, 0 or more.
        only: Positions of the images to keep; None keeps all.
        stored: Outputs of teachers that go with training samples, as `stored.NAME`.

    Raises:
        UserError: An option is out of range, or, for evaluation, a file cannot be read.
    """

    def __init__(
        self,
        split: MappedSplit,
        *,
        size: int | None,
        crop: tuple[int, int],
        train: bool = True,
        augment: dict[str, Any] | None = None,
        seed: int = 0,
        only: NDArray[np.int64] | None = None,
        stored: Sequence[StoredField] = (),
    ) -> None:
        """Check the options; the arguments are explained above."""
        if wrong := [side for side in crop if side < MULTIPLE or side % MULTIPLE]:
            raise UserError(f"data.crop: {wrong[0]} is not a multiple of {MULTIPLE} pixels")
        self.split, self.size, self.crop = split, size, crop
        self.train, self.seed = train, seed
        self.crops = build_crops(augment)
        self.places = np.arange(len(split.images)) if only is None else only
        self.stored = tuple(stored)
        sizes = set() if train else set(self.file_sizes())
        # Whole pictures of different sizes have no common shape.
        self.alike = len(sizes) <= 1
        self._whole = next(iter(sizes), crop)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.places)

    def together(self, batch_size: int) -> int:
        """Whole pictures are larger than crops: fewer of them take the same memory."""
        if self.train:
            return batch_size
        height, width = self.seen(self._whole)
        pixels = self.crop[0] * self.crop[1]
        return max(1, batch_size * pixels // (height * width)) if self.alike else 1

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Make the sample of (epoch, position).

        Returns:
            `images` (3, h, w) uint8; `sizes` (2,), its sides; `image_ids` (), the position in the
            split; `label_maps` uint8, (h, w) in training and of the file's own size in evaluation.

        Raises:
            UserError: The image or its map is missing, broken, or they do not fit.
        """
        epoch, position = place
        image = int(self.places[position])
        picture = read_image(self.split.images[image], None)
        own = (picture.shape[1], picture.shape[2])
        labels = self.split.label_map(image, own)
        targets: Sample = {}
        if self.train:
            random = np.random.default_rng((_SAMPLE_STREAM, self.seed, epoch, position))
            factor = 1.0 if self.size is None else self.size / max(own)
            cut = self.crops.draw(random, own, self.crop, factor=factor)
            picture, labels = cut.image(picture, self.crop), cut.label_map(labels, self.crop)
            targets = {
                f"{PREFIX}{one.name}": one.cropped(image, cut, own, self.crop)
                for one in self.stored
            }
        else:
            picture = resize(picture, self.seen(own))
        return {
            "images": picture.contiguous(),
            "sizes": torch.tensor(picture.shape[1:]),
            "image_ids": torch.tensor(image),
            "label_maps": labels,
            **targets,
        }

    def seen(self, own: tuple[int, int]) -> tuple[int, int]:
        """Height and width at which a model sees a whole picture: multiples of 8."""
        height, width = own if self.size is None else scaled_size(*own, self.size)
        sides = (max(MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in (height, width))
        return next(sides), next(sides)

    def file_sizes(self) -> list[tuple[int, int]]:
        """Height and width of every file, from its header."""
        sizes = []
        for path in (self.split.images[place] for place in self.places):
            try:
                with Image.open(path) as picture:
                    sizes.append((picture.height, picture.width))
            except UNREADABLE as error:
                raise UserError(f"{path}: cannot read this image: {error}") from None
        return sizes


def check_pairs(splits: Iterable[MappedSplit]) -> None:
    """Read all images and label maps once.

    Raises:
        UserError: As for a sample, of the first five that are wrong.
    """
    mistakes = []
    for split in splits:
        for number, path in enumerate(split.images):
            try:
                picture = read_image(path, None)
                split.label_map(number, (picture.shape[1], picture.shape[2]))
            except UserError as error:
                mistakes.append(str(error))
    if mistakes:
        more = f"\n... and {len(mistakes) - 5} more" if len(mistakes) > 5 else ""
        raise UserError("\n".join(mistakes[:5]) + more)
