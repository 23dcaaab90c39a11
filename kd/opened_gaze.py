"""A data set of fixations, opened: both splits, checked, the samples made of them, their truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kd.config import Gaze
from kd.config_data import Split
from kd.data.coco import CocoIndex
from kd.data.gaze import GazeSplit
from kd.data.gaze_dataset import GazeDataset, check_gaze
from kd.data.gaze_layouts import LAYOUTS, Wanted, open_gaze
from kd.data.images import scaled_size
from kd.data.picture_dataset import in_multiples
from kd.data.scene_gaze import SceneGaze
from kd.data.stored import StoredField
from kd.gaze_truth import ValTruth, relative_places
from kd.metrics.saliency_priors import CentrePrior
from kd.opened_files import open_annotated, root_of
from kd.tasks.base import Classes

# Bytes of a split's image files that are all read before training starts: about five seconds.
READ_FIRST = 128 << 20
COUNTED = 1000  # train pictures whose fixations make the centre prior, or somewhat fewer


@dataclass(frozen=True)
class OpenGaze:
    """Both splits of a data set of fixations."""

    section: Gaze
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

    def classes(self) -> Classes:
        """What a metric is told."""
        return Classes(self.class_names, where=self.section.name, gaze=self.truth)

    @cached_property
    def truth(self) -> ValTruth:
        """What maps of val pictures are held against; made once, every evaluation asks for it."""
        return ValTruth(self.val, lambda: self.prior)

    @property
    def splits(self) -> dict[str, GazeSplit]:
        """Both, by name."""
        return {"train": self.train, "val": self.val}

    @property
    def counted(self) -> range:
        """Train pictures that make the centre prior; of a large split some, spread evenly."""
        images = len(self.train.images)
        return range(0, images, -(-images // COUNTED))

    @cached_property
    def prior(self) -> CentrePrior:
        """Where people look on train pictures."""
        places = [relative_places(self.train, number) for number in self.counted]
        return CentrePrior(torch.cat(places))

    def pictures(self, seed: int, stored: Sequence[StoredField] = ()) -> GazeDataset:
        """Training samples of the train split; a teacher's outputs come with them."""
        section = self.section
        return GazeDataset(
            self.train, size=section.size, augment=section.augment, seed=seed, stored=stored
        )

    def evaluated(self) -> GazeDataset:
        """Whole pictures of the val split."""
        return self.whole("val", size=self.section.size)

    def whole(
        self,
        split: Literal["train", "val"],
        *,
        size: tuple[int, int] | int | None,
        only: NDArray[np.int64] | None = None,
    ) -> GazeDataset:
        """Whole pictures of a split, all or those of some places.

        Args:
            split: Which.
            size: What they are scaled into; a number is its long side, None the section's own.
            only: Places; None keeps all.
        """
        if not isinstance(size, tuple):
            own = self.section.size
            size = own if size is None else in_multiples(*scaled_size(*own, size))
        pictures = self.train if split == "train" else self.val
        return GazeDataset(pictures, size=size, train=False, only=only)


def open_fixations(section: Gaze) -> OpenGaze:
    """Open a data set of fixations; small ones are read once, before anything is trained.

    Of larger ones the fixations of val and of those train pictures that make the centre prior.

    Raises:
        UserError: What `open_gaze` and `open_annotated` raise; a picture or its fixations that
            cannot be read or do not fit each other, a stimulus without any.
    """
    opened = OpenGaze(section, *_splits(section))
    opened.pictures(0)  # its options are looked at before all files are
    if section.generate is None:  # what was made here is whole
        small = {name: _soon_read(split) for name, split in opened.splits.items()}
        check_gaze(split for name, split in opened.splits.items() if small[name])
        wanted = {"train": opened.counted, "val": range(len(opened.val.images))}
        for name, split in opened.splits.items():
            for number in () if small[name] else wanted[name]:
                relative_places(split, number)  # reads them, and refuses what is wrong
    opened.evaluated()
    return opened


def _soon_read(split: GazeSplit) -> bool:
    """Whether all of a split is read in seconds: a large picture takes as long as many small."""
    return sum(path.stat().st_size for path in split.images) <= READ_FIRST


def _splits(section: Gaze) -> tuple[GazeSplit, GazeSplit]:
    if section.layout == "synthetic":
        train, val = open_annotated(section)
        return _looked_at(section, train), _looked_at(section, val)
    wanted = Wanted(
        degree=section.degree,
        published=section.maps == "published",
        val_share=section.val_share,
        seed=section.split_seed,
    )
    root = root_of(section, holds=LAYOUTS[section.layout].holds)
    assert not isinstance(section.train, Split) and not isinstance(section.val, Split)
    return (
        open_gaze(section.layout, root, section.train, wanted),
        open_gaze(section.layout, root, section.val, wanted),
    )


def _looked_at(section: Gaze, index: CocoIndex) -> GazeSplit:
    paths = tuple(index.path(number) for number in range(len(index)))
    return GazeSplit(
        str(index.annotation_file),
        tuple(path.stem for path in paths),
        paths,
        SceneGaze(index),
        section.degree,
    )
