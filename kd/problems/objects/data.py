"""A dataset of objects, opened: both splits of annotated images, and the samples made of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.config.datasets import DatasetSection
from kd.data.open_files import open_annotated
from kd.formats.coco import CocoIndex, visible_objects
from kd.formats.coco_results import Truth, read_truth
from kd.formats.splits import labelled_images, objects_on
from kd.problems import problem
from kd.problems.base import Classes, HiddenObjects, Problem, Split
from kd.problems.objects.samples import ObjectSamples
from kd.problems.objects.schema import ObjectsSection


@dataclass(frozen=True)
class ObjectsDataset:
    """Both splits of a dataset of objects, opened."""

    section: ObjectsSection
    train: CocoIndex
    val: CocoIndex

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        return self.val.class_names

    @property
    def num_classes(self) -> int:
        """C."""
        return self.train.num_classes

    @property
    def problem(self) -> Problem[Any]:
        """Hidden objects."""
        return problem("objects")

    def class_info(self, prior: NDArray[np.float64] | None = None) -> Classes:
        """Names, prior, by default that of usable objects, and look-alikes."""
        known = partial(visible_objects, self.val)
        prior = self.prior() if prior is None else prior
        names, confusable = self.class_names, self.val.confusable_groups
        where = self.section.name
        return Classes(names, prior, confusable, known, where, truth=lambda: self.val_truth)

    @cached_property
    def val_truth(self) -> Truth:
        """The val split's boxes as COCO's evaluation counts them: all of its JSON, crowds too."""
        return read_truth(self.val.annotation_file)

    def split(self, name: Split) -> CocoIndex:
        """The index of a split."""
        return self.train if name == "train" else self.val

    def samples(self, split: Split, **options: Any) -> ObjectSamples:
        """A split as the section has it; `options` of `ObjectSamples` come in addition."""
        section, partial = self.section, self.section.partial
        own = {
            "size": section.size,
            "train": False,
            "mode": "all",
            "augment": section.augment,
            "min_fraction": section.min_fraction,
            "max_fraction": section.max_fraction,
            "shape": section.shape,
            "partial": (partial.start, partial.until) if partial else None,
            "hide_several": (section.hide_several.start, section.hide_several.end)
            if section.hide_several
            else None,
            "read_images": section.images,
            "repeat_labelled": section.repeat_labelled,
            "prepared": Path(section.prepared) / split if section.prepared else None,
        }
        return ObjectSamples(self.split(split), **{**own, **options})

    def seen_as(self, seen: HiddenObjects, **changes: Any) -> ObjectsDataset:
        """The dataset at a teacher's image size and shape of hidden regions.

        Args:
            seen: How the teacher saw scenes in training.
            changes: Further ones, of this dataset's section.
        """
        update = {"size": seen.size, "shape": seen.shape, **changes}
        return replace(self, section=self.section.model_copy(update=update))

    def evaluated_on(self, val: CocoIndex) -> ObjectsDataset:
        """The dataset with another val split, all of whose objects are scored at any size."""
        update = {"min_fraction": 0.0, "max_fraction": 1.0, "prepared": None}
        return replace(self, section=self.section.model_copy(update=update), val=val)

    def labelled(self, seed: int) -> NDArray[np.int64] | None:
        """Ids of the train images whose labels a student of this seed sees; None: all."""
        return labelled_images(self.train, self.section.labelled, seed)

    def prior(self, images: Collection[int] | None = None) -> NDArray[np.float64]:
        """Class shares, (C,), from `train_counts` with one added to each."""
        return smoothed(self.train_counts(images))

    def train_counts(self, images: Collection[int] | None = None) -> NDArray[np.int64]:
        """Usable train objects of each class, (C,), on the images with these ids or on all."""
        rows = self.samples("train", only=images).usable_rows()
        return np.bincount(self.train.labels[rows], minlength=self.num_classes)

    def class_fractions(
        self, images: Collection[int] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """How common each class is among the train images, for the weights of classes.

        Args:
            images: Only those with these ids.

        Returns:
            `pixel_shares` (1 + C,): of the images' area, background first, which has what the
            segments leave and at least 1 %; where they overlap both count. `image_shares` (C,): of
            the images, those with the class.
        """
        index, classes = self.train, self.num_classes
        kept, owners = objects_on(index, images)
        taken = len(index) if images is None else np.isin(index.image_ids, list(images)).sum()
        labels = index.labels[kept].astype(np.int64)
        pixels = index.heights.astype(np.float64) * index.widths
        areas = np.bincount(labels, index.areas[kept] / pixels[owners], classes) / taken
        shown = np.unique(np.stack([owners, labels]), axis=1)[1]
        return {
            "pixel_shares": np.concatenate([[max(0.01, 1 - areas.sum())], areas]),
            "image_shares": np.bincount(shown, minlength=classes) / taken,
        }

    def ceiling(self, split: Split = "val") -> dict[str, NDArray[Any]] | None:
        """Exact posteriors of the embedded scenes, None for other data."""
        index = self.train if split == "train" else self.val
        file = index.annotation_file.with_name(f"posteriors_{split}.npz")
        if self.section.generate is None or not file.is_file():
            return None
        with np.load(file) as stored:
            return {name: stored[name] for name in stored.files}


def smoothed(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Shares of classes, (C,), with one added to the count of each."""
    more = counts + 1.0
    return np.asarray(more / more.sum(), dtype=np.float64)


def open_objects(section: DatasetSection) -> ObjectsDataset:
    """Open a dataset; the embedded scenes are made where they are not there yet.

    Raises:
        UserError: What `load_coco` and `generate_scenes` raise, or no root.
    """
    assert isinstance(section, ObjectsSection)
    opened = open_annotated(
        section, layout=section.layout, classes=section.classes, images=section.images
    )
    return ObjectsDataset(section, *opened)
