"""Datasets of annotated images, samples with hidden objects, and teacher inputs for caching."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kd.config.datasets import DatasetSection
from kd.data.annotated import (
    ImageFiles,
    Objects,
    area_fractions,
    known_labels,
    moved_objects,
    objects_of,
    repeated,
)
from kd.data.loader import Sample, Samples
from kd.data.open_files import open_annotated
from kd.errors import UserError
from kd.formats.class_maps import ClassMaps
from kd.formats.coco import CocoIndex, visible_objects
from kd.formats.splits import labelled_images, objects_on
from kd.problems import problem
from kd.problems.base import Batch, Classes, Problem, Split, SplitDataset
from kd.problems.images import files_hash, mirror_images
from kd.problems.objects.batch import image_rows
from kd.problems.objects.schema import ObjectsSection
from kd.storage.fields import PREFIX, CachedField
from kd.transforms.augment import Augment, Plan, build_augment, pad
from kd.transforms.hide import hidden_regions, hide_fraction

log = logging.getLogger(__name__)

Mode = Literal["one", "all"]

# Seeds that keep these random numbers independent of each other and of the loader's order.
_SAMPLE_STREAM = 1
_HIDE_SEVERAL_STREAM = 2

Ids = Collection[int] | NDArray[np.int64]


class AnnotatedSamples(Dataset[Sample]):
    """Base class of samples of annotated images, indexed by (epoch, position).

    A sample depends only on epoch, position and seed; `docs/batch.md` lists its entries.

    Args:
        index: Images and annotations of the split.
        images: Index positions of the images to sample.
        files: Reads the image files.
        train: True: augment. False: every epoch is the same.
        labelled: Ids of the labelled images; other images get the label -1. None: all are labelled.
        repeat_labelled: How often each image in `labelled` occurs in an epoch; others occur once.
        cached: Cached teacher outputs, added to the samples as `stored.NAME`.

    Raises:
        UserError: `labelled` has an unknown id.
    """

    def __init__(
        self, index: CocoIndex, images: NDArray[np.int64], files: ImageFiles, *, train: bool,
        seed: int, labelled: Ids | None = None, repeat_labelled: int = 1,
        cached: Sequence[CachedField] = (),
    ) -> None:  # fmt: skip
        self.index, self.files, self.size = index, files, files.size
        self.train, self.seed, self.cached = train, seed, tuple(cached)
        known = known_labels(index, images, labelled)
        times = 1 if labelled is None else repeat_labelled
        self.images, self.known = repeated(images, known, times)

    def __len__(self) -> int:
        return len(self.images)

    def together(self, batch_size: int) -> int:
        """Return `batch_size`: any samples fit in one batch, since all have the same frame."""
        return batch_size

    @abstractmethod
    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Make the sample of (epoch, position); raise a UserError if its image file is invalid."""

    def image_file(self, image: int) -> tuple[Path, tuple[int, int]]:
        """The image file, prepared or original, at an index position, and its (height, width)."""
        return self.files.file(image)

    def entries(self, position: int, pixels: Tensor, plan: Plan, found: Objects) -> Sample:
        labels = self.index.labels[found.rows].astype(np.int64)
        if not self.known[position]:
            labels[:] = -1
        return {
            "images": pad(plan.image(pixels), self.size),
            "sizes": torch.tensor(plan.size),
            "image_ids": torch.tensor(int(self.index.image_ids[self.images[position]])),
            "boxes": found.boxes,
            "labels": torch.from_numpy(labels),
            "object_ids": torch.from_numpy(self.index.object_ids[found.rows].astype(np.int64)),
            "area_fractions": torch.from_numpy(found.fractions).float(),
        }


@dataclass(frozen=True)
class _Scene:
    """An image's M objects in the sample frame; `usable` (M,) marks objects that may be hidden."""

    plan: Plan
    found: Objects
    usable: Tensor


class ObjectSamples(AnnotatedSamples):
    """Samples of scenes with objects to hide, one for each image that has a usable object.

    Args:
        index: Images and annotations of the split.
        size: Side of the square frame, pixels.
        mode: `one`: hide one usable object, random in each epoch; `all`: hide each in turn.
        train: True: augment and follow schedules. False: every epoch is the same.
        augment: Options of `kd.transforms.augment.Augment`; None: no augmentation.
        min_fraction: Smallest usable box area, as a fraction of the image.
        max_fraction: Largest usable box area, as a fraction of the image.
        shape: Shape of hidden regions; `segment` adds exact masks to the samples.
        partial: Hidden fraction of a region at the start of training, and the training progress
            (0..1) from which the whole region is hidden; None: always the whole region.
        hide_several: Fraction of the other objects also hidden, at the start and end of training;
            None: no other object is hidden.
        read_images: False: replace all images by grey ones without reading the files.
        only: Ids of the images to sample; None: all.
        epochs: Number of training epochs, for the schedules.
        prepared: Copy of this dataset written by `python -m kd.data.prepare`.
        class_maps: Computes the class id of each pixel, added to the samples as `class_maps`.
        options: `labelled`, `repeat_labelled` and `cached` of `AnnotatedSamples`.

    Raises:
        UserError: No image has a usable object, or the prepared copy does not match.
    """

    def __init__(
        self, index: CocoIndex, *, size: int, mode: Mode = "one", train: bool = True,
        augment: dict[str, Any] | None = None, min_fraction: float = 0.0015,
        max_fraction: float = 0.30, shape: str = "box",
        partial: tuple[float, float] | None = None,
        hide_several: tuple[float, float] | None = None, read_images: bool = True,
        only: Ids | None = None, seed: int = 0, epochs: int = 1, prepared: Path | None = None,
        class_maps: ClassMaps | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.mode, self.epochs, self.class_maps = mode, epochs, class_maps
        self.augment: Augment | None = build_augment(augment) if train else None
        self.min_fraction, self.max_fraction, self.shape = min_fraction, max_fraction, shape
        self.partial = partial if train else None
        self.hide_several = hide_several if train else None
        files = ImageFiles.open(index, size, prepared, read_files=read_images)
        images = self._images_with_usable_objects(index, only)
        super().__init__(index, images, files, train=train, seed=seed, **options)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, position = place
        random = np.random.default_rng(
            (_SAMPLE_STREAM, self.seed, epoch if self.train else 0, position)
        )
        image = int(self.images[position])
        pixels = self.files.read(image)
        original = (pixels.shape[1], pixels.shape[2])
        scene = self._draw_scene(image, original, random)
        candidates = scene.usable.nonzero()[:, 0]
        if self.mode == "one":
            candidates = candidates[int(random.integers(len(candidates)))][None]
        sample = {
            **self.entries(position, pixels, scene.plan, scene.found),
            "usable": scene.usable,
            "hidden": candidates,
            "hide_fraction": torch.full((len(candidates),), self._hide_fraction(epoch)),
        }
        if self.hide_several is not None:
            start, end = self.hide_several
            others = np.random.default_rng((_HIDE_SEVERAL_STREAM, self.seed, epoch, position))
            fraction = start + (end - start) * epoch / max(1, self.epochs - 1)
            hidden_too = others.random(len(sample["labels"])) < fraction
            sample["also_hidden"] = torch.from_numpy(hidden_too)
        if self.class_maps is not None:
            sample["class_maps"] = self.class_maps(image, scene.plan, original)
        if self.shape == "segment":
            sample["segments"] = self._segments(scene, candidates, original)
        hidden = sample["object_ids"][candidates].numpy()
        for output in self.cached:
            sample[f"{PREFIX}{output.name}"] = output(hidden, scene.plan, original, self.size)
        return sample

    def usable_rows(self) -> NDArray[np.int64]:
        """Index rows of all usable objects on the sampled images, (K,)."""
        rows, owners = self._usable_rows(self.index)
        return rows[np.isin(owners, self.images)]

    def _usable_rows(self, index: CocoIndex) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        counts = np.diff(index.first)
        files = np.repeat(index.heights.astype(np.int64) * index.widths, counts)
        usable = self._usable(area_fractions(index.boxes, files))
        if index.scored is not None:
            usable &= index.scored
        return np.flatnonzero(usable), np.repeat(np.arange(len(index)), counts)[usable]

    def _images_with_usable_objects(self, index: CocoIndex, only: Ids | None) -> NDArray[np.int64]:
        images = np.unique(self._usable_rows(index)[1]).astype(np.int64)
        if only is not None:
            images = images[np.isin(index.image_ids[images], np.asarray(list(only)))]
        limits = f"{self.min_fraction:.2%} and {self.max_fraction:.2%} of the image"
        if not len(images):
            raise UserError(
                f"{index.annotation_file}: no image has an object between {limits}; "
                "widen min_fraction and max_fraction"
            )
        if len(images) < len(index) and only is None:
            log.info(
                "%s: %d of %d images left out, because they have no object between %s",
                *(index.annotation_file, len(index) - len(images), len(index), limits),
            )
        return images

    def _draw_scene(self, image: int, size: tuple[int, int], random: np.random.Generator) -> _Scene:
        """Augment the image; skip augmentation if it would leave no usable object."""
        if self.augment is not None:
            scene = self._place(image, self.augment.draw(random, size), size)
            if scene.usable.any():
                return scene
        return self._place(image, None, size)

    def _place(self, image: int, plan: Plan | None, size: tuple[int, int]) -> _Scene:
        index = self.index
        if plan is None:  # these fractions, by which the image was selected, are not rounded
            plan, found = Plan(size=size), objects_of(index, image, size)
        else:
            assert self.augment is not None
            found = moved_objects(index, image, size, plan, min_visible=self.augment.min_visible)
        usable = self._usable(found.fractions)
        if index.scored is not None:
            usable &= index.scored[found.rows]
        return _Scene(plan, found, torch.from_numpy(usable))

    def _usable(self, fractions: NDArray[np.float64]) -> NDArray[np.bool_]:
        return (fractions >= self.min_fraction) & (fractions <= self.max_fraction)

    def _hide_fraction(self, epoch: int) -> float:
        if self.partial is None:
            return 1.0
        start, until = self.partial
        return hide_fraction(epoch / max(1, self.epochs), start=start, until=until)

    def _segments(self, scene: _Scene, hidden: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks of the hidden objects; an empty mask is replaced by the object's box."""
        drawn = [self.index.mask_of(int(row), size) for row in scene.found.rows[hidden.numpy()]]
        masks = pad(scene.plan.masks(torch.from_numpy(np.stack(drawn))), self.size)
        empty = ~masks.flatten(1).any(dim=1)
        if empty.any():
            masks[empty] = hidden_regions(scene.found.boxes[hidden[empty]], (self.size, self.size))
        return masks


@dataclass(frozen=True)
class AnnotatedDataset(SplitDataset[CocoIndex]):
    """Train and val split of a dataset of images with annotated objects."""

    section: ObjectsSection

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.val.class_names

    def labelled(self, seed: int) -> NDArray[np.int64] | None:
        return labelled_images(self.train, self.section.labelled, seed)


@dataclass(frozen=True)
class ObjectsDataset(AnnotatedDataset):
    """A dataset of annotated images whose objects are hidden one at a time."""

    @property
    def problem(self) -> Problem[Any]:
        return problem("objects")

    def class_info(self) -> Classes:
        """Class names and prior, confusable groups, and a function to count visible objects."""
        return Classes(
            self.class_names, self.prior(), self.val.confusable_groups,
            partial(visible_objects, self.val), self.section.name,
        )  # fmt: skip

    def samples(self, split: Split, **options: Any) -> ObjectSamples:
        """Samples of a split; `options` override settings of the data section."""
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
        """Copy the dataset with a teacher's image size and hidden shape, and other `changes`."""
        update = {"size": seen.size, "shape": seen.shape, **changes}
        return replace(self, section=self.section.model_copy(update=update))

    def evaluated_on(self, val: CocoIndex) -> ObjectsDataset:
        """Copy the dataset with a different val split, in which objects of any size are scored."""
        update = {"min_fraction": 0.0, "max_fraction": 1.0, "prepared": None}
        return replace(self, section=self.section.model_copy(update=update), val=val)

    def prior(self, images: Collection[int] | None = None) -> NDArray[np.float64]:
        """Class fractions (C,) of usable train objects on `images` (ids; None: all), smoothed."""
        return smoothed(self.train_counts(images))

    def train_counts(self, images: Collection[int] | None = None) -> NDArray[np.int64]:
        """Count usable train objects by class, (C,), on images with the given ids (None: all)."""
        rows = self.samples("train", only=images).usable_rows()
        return np.bincount(self.train.labels[rows], minlength=self.num_classes)

    def class_fractions(
        self, images: Collection[int] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Class fractions for class weights, on the train images with the given ids (None: all).

        `pixel_fractions` (1 + C,): mean area fraction of the background (at least 1 %), then of
        each class's segments. `image_fractions` (C,): fraction of images that contain the class.
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
        """Arrays of the exact posteriors of the embedded scenes; None for other datasets."""
        file = self.split(split).annotation_file.with_name(f"posteriors_{split}.npz")
        if self.section.generate is None or not file.is_file():
            return None
        with np.load(file) as stored:
            return {name: stored[name] for name in stored.files}


def smoothed(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Class fractions (C,) with add-one smoothing."""
    more = counts + 1.0
    return np.asarray(more / more.sum(), dtype=np.float64)


def open_objects(section: DatasetSection) -> ObjectsDataset:
    """Open both splits of a dataset; render the embedded scenes if they do not exist yet."""
    assert isinstance(section, ObjectsSection)
    opened = open_annotated(
        section, layout=section.layout, classes=section.classes, images=section.images
    )
    return ObjectsDataset(section, *opened)


@dataclass(frozen=True)
class ObjectsView:
    """Teacher input for caching: every object of a split, hidden in turn.

    There is one record per object, identified by annotation id. `seen` is the teacher's data
    section, which determines image size and hidden shape; limits on object size are ignored.
    """

    data: ObjectsDataset
    seen: ObjectsSection
    split: Split
    unit: ClassVar[str] = "objects"
    grid: ClassVar[None] = (
        None  # no resizing, because all score maps have the shape of the square frame
    )

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Ids of the images that have an object to hide."""
        return np.asarray(self._index.image_ids[self._whole.images], dtype=np.int64)

    @property
    def records_per_image(self) -> float:
        """Mean number of objects per image."""
        return len(self._index.labels) / len(self._index)

    @property
    def provenance(self) -> dict[str, str]:
        """Identify the input: hashes of annotations and images, split, image size, hidden shape."""
        whole = self._whole
        files = files_hash(len(whole.images), lambda n: whole.image_file(int(whole.images[n]))[0])
        return {
            "data": self._index.fingerprint,
            "split": self.split,
            "images": files,
            "transform": f"size {self.seen.size}, {self.seen.shape}, rescaled and padded",
        }

    def samples(self, images: NDArray[np.int64] | None = None) -> Samples:
        """Scenes of all images or those with the given ids, with every object hidden in turn."""
        return self._whole if images is None else self._all_sizes.samples(self.split, only=images)

    def records(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Annotation ids of the hidden objects, (K,), and the batch index of each one's image."""
        return batch["object_ids"][batch["hidden"]], image_rows(batch)

    def mirrored(self, batch: Batch) -> dict[str, Tensor]:
        return mirror_objects(batch)

    def moved(self, cached: Sequence[CachedField], augment: dict[str, Any]) -> Samples:
        """Training samples that hide one object per image; cached maps are augmented with it."""
        data = self.data.seen_as(self.seen, augment=augment, partial=None)
        return data.samples(self.split, train=True, mode="one", cached=cached)

    @property
    def _index(self) -> CocoIndex:
        return self.data.split(self.split)

    @property
    def _all_sizes(self) -> ObjectsDataset:
        return self.data.seen_as(self.seen, min_fraction=0.0, max_fraction=1.0)

    @cached_property
    def _whole(self) -> ObjectSamples:
        """Samples of the whole split; cached, since finding the usable objects is slow."""
        return self._all_sizes.samples(self.split)


def mirror_objects(batch: Batch) -> dict[str, Tensor]:
    """Mirror images left to right, with their boxes and masks; the padding stays in place."""
    images, source = mirror_images(batch)
    edge = batch["sizes"][:, 1][batch["image_of"]].to(batch["boxes"].dtype)
    x1, y1, x2, y2 = batch["boxes"].unbind(dim=1)
    boxes = torch.stack([edge - x2, y1, edge - x1, y2], dim=1)
    mirrored = {**batch, "images": images, "boxes": boxes}
    if "segments" in batch:
        rows = source[image_rows(batch)][:, None].expand_as(batch["segments"])
        mirrored["segments"] = batch["segments"].gather(2, rows)
    return mirrored
