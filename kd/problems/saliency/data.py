"""Saliency datasets: splits, samples, and the ground truth of saliency maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.data.images import ImageSamples, check_targets, in_multiples
from kd.data.loader import Sample
from kd.data.open_files import open_annotated
from kd.formats.fixations import UNKNOWN, GazeSplit
from kd.formats.saliency import SplitOptions, open_gaze
from kd.metrics.saliency import METRICS, SaliencyTruth, measure
from kd.problems.base import Classes, Split
from kd.problems.images import ImageDataset, is_small, open_layout
from kd.problems.saliency.baselines import (
    CENTRE,
    OBSERVERS,
    CentrePrior,
    Float,
    inter_observer,
    relative,
)
from kd.problems.saliency.schema import SaliencySection
from kd.scenes.gaze import SceneGaze
from kd.storage.fields import CachedField
from kd.transforms.crops import Crop, build_flips
from kd.utils.images import file_size, scaled_size

NEGATIVES = 20_000  # least number of fixations on other images for shuffled AUC, if available
REFERENCE_IMAGES = 300  # largest number of val images that the references are scored on
RANDOM_OBSERVERS = 10  # number of simulated observers if the dataset does not identify them
_STREAM = 12  # separates these random numbers from all others


class SaliencySamples(ImageSamples):
    """Samples of images with the `density` of fixations, (1, h, w) float32 with sum 1.

    Training images are scaled to fit a frame, keeping their aspect ratio, and padded below and on
    the right; density is 0 there. `sizes` excludes the padding. Evaluation samples have no padding
    and no density: predictions are scored at the image file's size, `own_sizes`.

    Args:
        split: Images and fixations.
        size: Height and width of the frame, multiples of 8.
        augment: Options of `kd.transforms.crops.Flips`; None: no flips.
        options: `train`, `seed`, `only` and `cached` of `ImageSamples`.
    """

    def __init__(
        self, split: GazeSplit, *, size: tuple[int, int], augment: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.split = split
        self.flips = build_flips(augment)
        super().__init__(split.images, frame=size, setting="data.size", **options)

    def draw(self, random: np.random.Generator, own: tuple[int, int]) -> Crop:
        """Draw the transform of a training image: scaling to the frame, and a random flip."""
        scale = _scale(own, self.frame)
        height, width = (max(1, round(side * scale)) for side in own)
        return self.flips.draw(random, own, (height, width))

    def seen(self, own: tuple[int, int]) -> tuple[int, int]:
        return input_size(own, self.frame)

    def targets(self, image: int, own: tuple[int, int], cut: Crop | None) -> Sample:
        """Training: the density, and its size without padding. Evaluation: the file's size."""
        if cut is None:
            return {"own_sizes": torch.tensor(own)}
        density = self.split.density(image, own, cut.size)
        return {"density": cut.placed(density, self.frame), "sizes": torch.tensor(cut.size)}


def input_size(own: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """Height and width, multiples of 8, at which the model reads an image file of size `own`."""
    scale = _scale(own, frame)
    return in_multiples(own[0] * scale, own[1] * scale)


def _scale(own: tuple[int, int], frame: tuple[int, int]) -> float:
    return min(to / side for to, side in zip(frame, own, strict=True))


@dataclass(frozen=True)
class SaliencyDataset(ImageDataset[GazeSplit]):
    """Train and val split of a dataset of fixations."""

    section: SaliencySection

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("saliency",)

    def class_info(self) -> Classes:
        """The class name, and this dataset as the source of ground truth and references."""
        return Classes(self.class_names, where=self.section.name, truth=lambda: self)

    def training(self, seed: int, cached: Sequence[CachedField] = ()) -> SaliencySamples:
        section = self.section
        return SaliencySamples(
            self.train, size=section.size, augment=section.augment, seed=seed, cached=cached
        )

    def whole(
        self, split: Split, *, size: tuple[int, int] | int | None,
        only: NDArray[np.int64] | None = None,
    ) -> SaliencySamples:  # fmt: skip
        """Whole images of a split for evaluation, optionally only those at the positions `only`.

        `size`: (height, width) of the frame that images are scaled to fit, or the frame's long side
        at the data section's aspect ratio; None: the data section's size.
        """
        if not isinstance(size, tuple):
            own = self.section.size
            size = own if size is None else in_multiples(*scaled_size(*own, size))
        return SaliencySamples(self.split(split), size=size, train=False, only=only)

    @cached_property
    def prior(self) -> CentrePrior:
        """The centre prior, computed from the train images whose positions are in `counted`."""
        places = [relative_places(self.train, number) for number in self.counted]
        return CentrePrior(torch.cat(places))

    def truth(self, number: int) -> SaliencyTruth:
        """Ground truth of the val image at position `number`, at the size of the image file."""
        size = file_size(self.val.images[number])
        return SaliencyTruth(
            self.val.density(number, size, size)[0],
            torch.from_numpy(self.val.fixations(number, size).points),
            others=self.others(number, size),
            prior=self.prior.density(size),
        )

    def others(self, number: int, size: tuple[int, int]) -> Tensor:
        """Fixations on other val images, (J, 2) x, y, scaled to pixels of image `number`."""
        places, numbers = self._negatives
        sides = torch.tensor([size[1], size[0]], dtype=torch.float64)
        moved = places[numbers != number] * sides
        return torch.minimum(moved, torch.nextafter(sides, torch.zeros_like(sides)))

    @cached_property
    def _negatives(self) -> tuple[Tensor, Tensor]:
        """Sample at least `NEGATIVES` fixations, or all, from random val images for shuffled AUC.

        Returns relative x, y positions (J, 2), and for each the position of its image in the split.
        """
        places, numbers, count = [], [], 0
        random = np.random.default_rng(_STREAM)
        for number in random.permutation(len(self.val.images)).tolist():
            if count >= NEGATIVES:
                break
            own = relative_places(self.val, number)
            places.append(own)
            numbers.append(torch.full((len(own),), number))
            count += len(own)
        return torch.cat(places), torch.cat(numbers)

    @cached_property
    def references(self) -> dict[str, Float]:
        """All M metrics of the centre prior and other observers on the I val images, (I, M) each.

        In a large split only evenly spaced images are scored; all other rows are NaN.
        """
        images = len(self.val.images)
        found = {name: np.full((images, len(METRICS)), np.nan) for name in (CENTRE, OBSERVERS)}
        for number in range(0, images, -(-images // REFERENCE_IMAGES)):
            truth = self.truth(number)
            assert truth.prior is not None
            found[CENTRE][number] = list(measure(truth.prior, truth).values())
            height, width = truth.density.shape
            observers = self.val.fixations(number, (height, width)).observers
            subjects = torch.from_numpy(people(observers, number))
            numbers = inter_observer(truth, subjects, sigma=self.val.degree)
            found[OBSERVERS][number] = [numbers[name] for name in METRICS]
        return found


def people(observers: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Observer index of each fixation on an image, (F,).

    If all observers are `UNKNOWN`, fixations are divided at random among `RANDOM_OBSERVERS`.
    """
    if not (observers == UNKNOWN).all():
        return observers
    random = np.random.default_rng((_STREAM, number))
    return random.permutation(np.arange(len(observers)) % RANDOM_OBSERVERS)


def relative_places(split: GazeSplit, number: int) -> Tensor:
    """Fixations on image `number`, (F, 2), as fractions of its width and height."""
    size = file_size(split.images[number])
    return relative(torch.from_numpy(split.fixations(number, size).points), size)


def check_gaze(splits: Iterable[GazeSplit]) -> None:
    """Check every image, its fixations and its published map; same errors as `check_targets`."""

    def read(split: GazeSplit, number: int, size: tuple[int, int]) -> None:
        split.fixations(number, size)
        if split.maps:
            split.density(number, size, (8, 8))

    check_targets((split.images, partial(read, split)) for split in splits)


def open_fixations(section: SaliencySection) -> SaliencyDataset:
    """Open a dataset of fixations; read and check every file of a small split.

    For a larger split only fixations are read: those of all val images, and of the train images
    that the centre prior is computed from.
    """
    opened = SaliencyDataset(section, *_splits(section))
    opened.training(0)  # checks the options before any file is read
    if section.generate is None:  # generated files need no check
        check_gaze(split for split in (opened.train, opened.val) if is_small(split))
        wanted = ((opened.train, opened.counted), (opened.val, range(len(opened.val.images))))
        for split, numbers in wanted:
            for number in () if is_small(split) else numbers:
                relative_places(split, number)  # raises if the fixations are wrong
    opened.whole("val", size=section.size)
    return opened


def _splits(section: SaliencySection) -> tuple[GazeSplit, GazeSplit]:
    if section.layout == "synthetic":
        train, val = (
            GazeSplit(
                str(index.annotation_file), tuple(map(index.path, range(len(index)))),
                SceneGaze(index), section.degree,
            )
            for index in open_annotated(section)
        )  # fmt: skip
        return train, val
    options = SplitOptions(
        degree=section.degree, published=section.maps == "published",
        val_fraction=section.val_fraction, seed=section.split_seed,
    )  # fmt: skip
    return open_layout(section, section.layout, open_gaze, options)
