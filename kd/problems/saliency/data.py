"""Datasets of fixations, and the ground truth that saliency maps are scored against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.data.images import in_multiples
from kd.data.open_files import open_annotated
from kd.formats.coco import CocoIndex
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
from kd.problems.saliency.samples import SaliencySamples, check_gaze
from kd.problems.saliency.schema import SaliencySection
from kd.scenes.gaze import SceneGaze
from kd.storage.fields import CachedField
from kd.utils.images import file_size, scaled_size

LOOKS = 20_000  # fixations on other images, the negatives of shuffled AUC, at least if there are
REFERRED = 300  # val images that the references are scored on, at most
DEALT = 10  # observers that fixations are split among at random if a dataset names none
_STREAM = 12  # separates these random numbers from all others


@dataclass(frozen=True, eq=False)
class ValTruth:
    """Ground truth of a val split, computed when it is first needed.

    Args:
        val: The split.
        centre: Gives the centre prior, fitted to train images.
    """

    val: GazeSplit
    centre: Callable[[], CentrePrior]

    def __call__(self, number: int) -> SaliencyTruth:
        """Ground truth of the image at a position in the split, in pixels of its file."""
        size = file_size(self.val.images[number])
        return SaliencyTruth(
            self.val.density(number, size, size)[0],
            torch.from_numpy(self.val.fixations(number, size).points),
            others=self.others(number, size),
            prior=self.centre().density(size),
        )

    def others(self, number: int, size: tuple[int, int]) -> Tensor:
        """Fixations on other val images, (J, 2), moved to the same relative places of this image.

        Args:
            number: The image's position in the split.
            size: Its height and width.
        """
        places, numbers = self._looks
        sides = torch.tensor([size[1], size[0]], dtype=torch.float64)
        moved = places[numbers != number] * sides
        return torch.minimum(moved, torch.nextafter(sides, torch.zeros_like(sides)))

    @cached_property
    def _looks(self) -> tuple[Tensor, Tensor]:
        """Relative places and image numbers of at least `LOOKS` fixations, or of all."""
        places, numbers, count = [], [], 0
        random = np.random.default_rng(_STREAM)
        for number in random.permutation(len(self.val.images)).tolist():
            if count >= LOOKS:
                break
            own = relative_places(self.val, number)
            places.append(own)
            numbers.append(torch.full((len(own),), number))
            count += len(own)
        return torch.cat(places), torch.cat(numbers)

    @cached_property
    def references(self) -> dict[str, Float]:
        """Metrics of the centre prior and of other observers, (images, M) each.

        Of a large split only some images, spread evenly, are scored; the others are NaN.
        """
        images = len(self.val.images)
        found = {name: np.full((images, len(METRICS)), np.nan) for name in (CENTRE, OBSERVERS)}
        for number in range(0, images, -(-images // REFERRED)):
            truth = self(number)
            assert truth.prior is not None
            found[CENTRE][number] = list(measure(truth.prior, truth).values())
            height, width = truth.density.shape
            observers = self.val.fixations(number, (height, width)).observers
            subjects = torch.from_numpy(people(observers, number))
            numbers = inter_observer(truth, subjects, sigma=self.val.degree)
            found[OBSERVERS][number] = [numbers[name] for name in METRICS]
        return found


def people(observers: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """The observer of each fixation, (F,); if all are unknown, a random split among `DEALT`.

    Args:
        observers: Of the dataset, `UNKNOWN` if it does not identify them.
        number: Of the image, the random seed.
    """
    if not (observers == UNKNOWN).all():
        return observers
    random = np.random.default_rng((_STREAM, number))
    return random.permutation(np.arange(len(observers)) % DEALT)


def relative_places(split: GazeSplit, number: int) -> Tensor:
    """Fixations on an image as fractions of its sides, (F, 2)."""
    size = file_size(split.images[number])
    return relative(torch.from_numpy(split.fixations(number, size).points), size)


@dataclass(frozen=True)
class SaliencyDataset(ImageDataset[SaliencySection, GazeSplit]):
    """Both splits of a dataset of fixations."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One map."""
        return ("saliency",)

    def class_info(self) -> Classes:
        """Ground truth of the val images."""
        return Classes(self.class_names, where=self.section.name, truth=lambda: self.truth)

    @cached_property
    def truth(self) -> ValTruth:
        """Ground truth of val images; cached, since every evaluation uses it."""
        return ValTruth(self.val, lambda: self.prior)

    @cached_property
    def prior(self) -> CentrePrior:
        """Centre prior of the train images."""
        places = [relative_places(self.train, number) for number in self.counted]
        return CentrePrior(torch.cat(places))

    def training(self, seed: int, cached: Sequence[CachedField] = ()) -> SaliencySamples:
        """Padded images of the train split, with cached outputs of teachers."""
        section = self.section
        return SaliencySamples(
            self.train, size=section.size, augment=section.augment, seed=seed, cached=cached
        )

    def whole(
        self, split: Split, *, size: tuple[int, int] | int | None,
        only: NDArray[np.int64] | None = None,
    ) -> SaliencySamples:  # fmt: skip
        """Whole images of a split, all or those at some positions.

        Args:
            split: Name of the split.
            size: Height and width of the frame that images are scaled to fit, or the long side of
                one with the section's aspect ratio; None: the section's own.
            only: Positions; None: all.
        """
        if not isinstance(size, tuple):
            own = self.section.size
            size = own if size is None else in_multiples(*scaled_size(*own, size))
        return SaliencySamples(self.split(split), size=size, train=False, only=only)


def open_fixations(section: SaliencySection) -> SaliencyDataset:
    """Open a dataset of fixations; every file of a small split is read and checked.

    Of larger splits only fixations are read: of val and of the train images of the centre prior.

    Raises:
        UserError: As `open_gaze` and `open_annotated`; an image or its fixations are corrupt or
            do not fit each other, or an image has no fixations.
    """
    opened = SaliencyDataset(section, *_splits(section))
    opened.training(0)  # checks the options before any file is read
    if section.generate is None:  # generated files are intact
        check_gaze(split for split in (opened.train, opened.val) if is_small(split))
        wanted = ((opened.train, opened.counted), (opened.val, range(len(opened.val.images))))
        for split, numbers in wanted:
            for number in () if is_small(split) else numbers:
                relative_places(split, number)  # raises if the fixations are wrong
    opened.whole("val", size=section.size)
    return opened


def _splits(section: SaliencySection) -> tuple[GazeSplit, GazeSplit]:
    if section.layout == "synthetic":
        train, val = open_annotated(section)
        return _synthetic(section, train), _synthetic(section, val)
    options = SplitOptions(
        degree=section.degree, published=section.maps == "published",
        val_fraction=section.val_fraction, seed=section.split_seed,
    )  # fmt: skip
    return open_layout(section, section.layout, open_gaze, options)


def _synthetic(section: SaliencySection, index: CocoIndex) -> GazeSplit:
    paths = tuple(index.path(number) for number in range(len(index)))
    names = tuple(path.stem for path in paths)
    return GazeSplit(str(index.annotation_file), names, paths, SceneGaze(index), section.degree)
