"""Datasets of objects: both splits of annotated images, and their samples."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.config.datasets import DatasetSection
from kd.data.open_files import open_annotated
from kd.formats.coco import CocoIndex, visible_objects
from kd.formats.splits import labelled_images, objects_on
from kd.problems import problem
from kd.problems.base import Classes, Problem, Split, SplitDataset
from kd.problems.objects.samples import ObjectSamples
from kd.problems.objects.schema import ObjectsSection


@dataclass(frozen=True)
class AnnotatedDataset(SplitDataset[ObjectsSection, CocoIndex]):
    """Both splits of a dataset of images with annotated objects."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names."""
        return self.val.class_names

    def labelled(self, seed: int) -> NDArray[np.int64] | None:
        """Ids of the train images whose labels a student of this seed may use; None: all."""
        return labelled_images(self.train, self.section.labelled, seed)


@dataclass(frozen=True)
class ObjectsDataset(AnnotatedDataset):
    """A dataset from which objects are hidden one by one."""

    @property
    def problem(self) -> Problem[Any]:
        """The problem of hidden objects."""
        return problem("objects")

    def class_info(self) -> Classes:
        """Names, prior, confusable groups and numbers of visible objects."""
        return Classes(
            self.class_names, self.prior(), self.val.confusable_groups,
            partial(visible_objects, self.val), self.section.name,
        )  # fmt: skip

    def samples(self, split: Split, **options: Any) -> ObjectSamples:
        """Samples of a split with the section's options; `options` of `ObjectSamples` win."""
        section, partial, several = self.section, self.section.partial, self.section.hide_several
        same = ("size", "augment", "min_fraction", "max_fraction", "shape", "repeat_labelled")
        own = {
            **{name: getattr(section, name) for name in same},
            "train": False,
            "mode": "all",
            "partial": (partial.start, partial.until) if partial else None,
            "hide_several": (several.start, several.end) if several else None,
            "read_images": section.images,
            "prepared": Path(section.prepared) / split if section.prepared else None,
        }
        return ObjectSamples(self.split(split), **{**own, **options})

    def seen_as(self, seen: ObjectsSection, **changes: Any) -> ObjectsDataset:
        """The dataset with a teacher's image size and shape of hidden regions, and with changes."""
        update = {"size": seen.size, "shape": seen.shape, **changes}
        return replace(self, section=self.section.model_copy(update=update))

    def evaluated_on(self, val: CocoIndex) -> ObjectsDataset:
        """The dataset with another val split, all of whose objects are scored at any size."""
        update = {"min_fraction": 0.0, "max_fraction": 1.0, "prepared": None}
        return replace(self, section=self.section.model_copy(update=update), val=val)

    def prior(self, images: Collection[int] | None = None) -> NDArray[np.float64]:
        """Class fractions (C,) from `train_counts`, with one added to each count."""
        return smoothed(self.train_counts(images))

    def train_counts(self, images: Collection[int] | None = None) -> NDArray[np.int64]:
        """Usable train objects by class, (C,), on the images with these ids or on all."""
        rows = self.samples("train", only=images).usable_rows()
        return np.bincount(self.train.labels[rows], minlength=self.num_classes)

    def class_fractions(
        self, images: Collection[int] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Class fractions for class weights, on the train images with these ids or on all.

        `pixel_fractions` (1 + C,) are fractions of the images' area, background first with at least
        1 %; overlapping segments count twice. `image_fractions` (C,) are fractions of images.
        """
        index, classes = self.train, self.num_classes
        rows, owners = objects_on(index, images)
        total = len(index) if images is None else np.isin(index.image_ids, list(images)).sum()
        labels = index.labels[rows].astype(np.int64)
        pixels = index.heights.astype(np.float64) * index.widths
        areas = np.bincount(labels, index.areas[rows] / pixels[owners], classes) / total
        present = np.unique(np.stack([owners, labels]), axis=1)[1]
        return {
            "pixel_fractions": np.concatenate([[max(0.01, 1 - areas.sum())], areas]),
            "image_fractions": np.bincount(present, minlength=classes) / total,
        }

    def ceiling(self, split: Split = "val") -> dict[str, NDArray[Any]] | None:
        """Arrays of the embedded scenes' exact posteriors; None for other datasets."""
        file = self.split(split).annotation_file.with_name(f"posteriors_{split}.npz")
        if self.section.generate is None or not file.is_file():
            return None
        with np.load(file) as stored:
            return {name: stored[name] for name in stored.files}


def smoothed(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Class fractions (C,) with one added to each count."""
    more = counts + 1.0
    return np.asarray(more / more.sum(), dtype=np.float64)


def open_objects(section: DatasetSection) -> ObjectsDataset:
    """Open both splits; the embedded scenes are rendered if they do not exist yet."""
    assert isinstance(section, ObjectsSection)
    opened = open_annotated(
        section, layout=section.layout, classes=section.classes, images=section.images
    )
    return ObjectsDataset(section, *opened)
