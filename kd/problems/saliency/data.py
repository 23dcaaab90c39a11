"""A dataset of fixations, opened: both splits, checked, the samples made of them, their truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.data.images import file_size, in_multiples
from kd.data.open_files import layout_holds, open_annotated, root_of
from kd.formats.coco import CocoIndex
from kd.formats.fixations import UNKNOWN, GazeSplit
from kd.formats.saliency import SplitOptions, open_gaze
from kd.metrics.saliency import METRICS, SaliencyTruth, measure
from kd.problems import problem
from kd.problems.base import Classes, Problem, Split
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
from kd.registry import is_foreign, load_target
from kd.scenes.gaze import SceneGaze
from kd.storage.fields import CachedField
from kd.utils.images import scaled_size

LOOKS = 20_000  # fixations on other images that a image's own are told from, or a few more
REFERRED = 300  # val images that the references are scored on, at most
DEALT = 10  # people that fixations are dealt to at random where nobody knows whose they are
_STREAM = 12  # keeps these random numbers apart from all others


@dataclass(frozen=True, eq=False)
class ValTruth:
    """Of a val split, each part found when it is first asked for.

    Args:
        val: The split.
        centre: Gives the centre prior, of train images.
    """

    val: GazeSplit
    centre: Callable[[], CentrePrior]

    def __call__(self, number: int) -> SaliencyTruth:
        """Of the image at a place in the split, in pixels of its file."""
        size = file_size(self.val.images[number])
        return SaliencyTruth(
            self.val.density(number, size, size)[0],
            torch.from_numpy(self.val.fixations(number, size).points),
            others=self.others(number, size),
            prior=self.centre().density(size),
        )

    def others(self, number: int, size: tuple[int, int]) -> Tensor:
        """Fixations on other val images, (J, 2) in pixels of a image: at its relative places.

        Args:
            number: The image's place in the split.
            size: Its height and width.
        """
        places, numbers = self._looks
        sides = torch.tensor([size[1], size[0]], dtype=torch.float64)
        moved = places[numbers != number] * sides
        return torch.minimum(moved, torch.nextafter(sides, torch.zeros_like(sides)))

    @cached_property
    def _looks(self) -> tuple[Tensor, Tensor]:
        """Relative places and images: of all, or of some where these are enough."""
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
        """Numbers of the centre prior and of other observers, (images, M) each.

        Of a large split on some images, spread evenly; the others are NaN.
        """
        images = len(self.val.images)
        found = {name: np.full((images, len(METRICS)), np.nan) for name in (CENTRE, OBSERVERS)}
        for number in range(0, images, -(-images // REFERRED)):
            truth = self(number)
            assert truth.prior is not None
            found[CENTRE][number] = list(measure(truth.prior, truth).values())
            height, width = truth.density.shape
            whose = self.val.fixations(number, (height, width)).observers
            told = torch.from_numpy(people(whose, number))
            numbers = inter_observer(truth, told, sigma=self.val.degree)
            found[OBSERVERS][number] = [numbers[name] for name in METRICS]
        return found


def people(observers: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Whose each fixation is, (F,); where nobody knows, each is dealt to one of a few at random.

    Args:
        observers: As the dataset says, `UNKNOWN` where it does not.
        number: Of the image, the seed of the deal.
    """
    if not (observers == UNKNOWN).all():
        return observers
    random = np.random.default_rng((_STREAM, number))
    return random.permutation(np.arange(len(observers)) % DEALT)


def relative_places(split: GazeSplit, number: int) -> Tensor:
    """Fixations on a image as shares of its sides, (F, 2)."""
    size = file_size(split.images[number])
    return relative(torch.from_numpy(split.fixations(number, size).points), size)


# Bytes of a split's image files that are all read before training starts: about five seconds.
READ_FIRST = 128 << 20
COUNTED = 1000  # train images whose fixations make the centre prior, or somewhat fewer


@dataclass(frozen=True)
class SaliencyDataset:
    """Both splits of a dataset of fixations."""

    section: SaliencySection
    train: GazeSplit
    val: GazeSplit

    @property
    def class_names(self) -> tuple[str, ...]:
        """One map, of where people look."""
        return ("saliency",)

    @property
    def num_classes(self) -> int:
        """One."""
        return len(self.class_names)

    @property
    def problem(self) -> Problem[Any]:
        """Saliency."""
        return problem("saliency")

    def labelled(self, seed: int) -> None:
        """All of the train images have fixations."""
        return None

    def class_info(self) -> Classes:
        """What a metric needs to know."""
        return Classes(self.class_names, where=self.section.name, gaze=self.truth)

    @cached_property
    def truth(self) -> ValTruth:
        """What maps of val images are held against; made once, every evaluation asks for it."""
        return ValTruth(self.val, lambda: self.prior)

    @property
    def splits(self) -> dict[str, GazeSplit]:
        """Both, by name."""
        return {"train": self.train, "val": self.val}

    @property
    def counted(self) -> range:
        """Train images that make the centre prior; of a large split some, spread evenly."""
        images = len(self.train.images)
        return range(0, images, -(-images // COUNTED))

    @cached_property
    def prior(self) -> CentrePrior:
        """Where people look on train images."""
        places = [relative_places(self.train, number) for number in self.counted]
        return CentrePrior(torch.cat(places))

    def split(self, name: Split) -> GazeSplit:
        """Images and fixations of a split."""
        return self.train if name == "train" else self.val

    def padded(self, seed: int, cached: Sequence[CachedField] = ()) -> SaliencySamples:
        """Training samples of the train split; a teacher's outputs come with them."""
        section = self.section
        return SaliencySamples(
            self.train, size=section.size, augment=section.augment, seed=seed, cached=cached
        )

    def whole(
        self,
        split: Split,
        *,
        size: tuple[int, int] | int | None,
        only: NDArray[np.int64] | None = None,
    ) -> SaliencySamples:
        """Whole images of a split, all or those at some positions.

        Args:
            split: Which.
            size: Height and width of the frame that images are scaled into, or the long side of
                one with the section's aspect; None: the section's own.
            only: Positions; None: all.
        """
        if not isinstance(size, tuple):
            own = self.section.size
            size = own if size is None else in_multiples(*scaled_size(*own, size))
        return SaliencySamples(self.split(split), size=size, train=False, only=only)


def open_fixations(section: SaliencySection) -> SaliencyDataset:
    """Open a dataset of fixations; small ones are read once, before anything is trained.

    Of larger ones the fixations of val and of those train images that make the centre prior.

    Raises:
        UserError: What `open_gaze` and `open_annotated` raise; a image or its fixations that
            cannot be read or do not fit each other, a stimulus without any.
    """
    opened = SaliencyDataset(section, *_splits(section))
    opened.padded(0)  # options are checked before all files are
    if section.generate is None:  # what was made here is whole
        small = {name: _soon_read(split) for name, split in opened.splits.items()}
        check_gaze(split for name, split in opened.splits.items() if small[name])
        wanted = {"train": opened.counted, "val": range(len(opened.val.images))}
        for name, split in opened.splits.items():
            for number in () if small[name] else wanted[name]:
                relative_places(split, number)  # reads them, and refuses what is wrong
    opened.whole("val", size=section.size)
    return opened


def _soon_read(split: GazeSplit) -> bool:
    """Whether all of a split is read in seconds: a large image takes as long as many small."""
    return sum(path.stat().st_size for path in split.images) <= READ_FIRST


def _splits(section: SaliencySection) -> tuple[GazeSplit, GazeSplit]:
    if section.layout == "synthetic":
        train, val = open_annotated(section)
        return _looked_at(section, train), _looked_at(section, val)
    wanted = SplitOptions(
        degree=section.degree,
        published=section.maps == "published",
        val_fraction=section.val_fraction,
        seed=section.split_seed,
    )
    root = root_of(section, holds=layout_holds(section.layout, str(section.train)))
    return (
        _open_split(section.layout, root, str(section.train), wanted),
        _open_split(section.layout, root, str(section.val), wanted),
    )


def _open_split(layout: str, root: Path, split: str, wanted: SplitOptions) -> GazeSplit:
    if not is_foreign(layout):
        return open_gaze(layout, root, split, wanted)
    opened: GazeSplit = load_target(layout, what="layout")(root, split, wanted)
    return opened


def _looked_at(section: SaliencySection, index: CocoIndex) -> GazeSplit:
    paths = tuple(index.path(number) for number in range(len(index)))
    return GazeSplit(
        str(index.annotation_file),
        tuple(path.stem for path in paths),
        paths,
        SceneGaze(index),
        section.degree,
    )
