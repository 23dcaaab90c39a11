"""Samples of scenes with objects to hide, one for each image that has a usable object."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd.data.annotated import (
    ImageFiles,
    area_fractions,
    known_labels,
    moved_objects,
    objects_of,
    repeated,
)
from kd.data.loader import Sample
from kd.errors import UserError
from kd.formats.class_maps import ClassMaps
from kd.formats.coco import CocoIndex
from kd.storage.fields import PREFIX, CachedField
from kd.transforms.augment import Augment, Plan, build_augment, pad
from kd.transforms.hide import hidden_regions, hide_fraction

log = logging.getLogger(__name__)

Mode = Literal["one", "all"]

# Streams of random numbers, apart from those of the loader's order.
_SAMPLE_STREAM = 1
_HIDE_SEVERAL_STREAM = 2


@dataclass(frozen=True)
class _Scene:
    """An image's objects in the frame of a sample; `rows` are those of the index."""

    plan: Plan
    rows: npt.NDArray[np.int64]
    boxes: Tensor
    area_fractions: Tensor
    usable: Tensor


class ObjectSamples(Dataset[Sample]):
    """Samples of docs/batch.md by (epoch, position); they depend on these and the seed alone.

    Args:
        index: The dataset.
        size: Side of the square frame, pixels.
        mode: Usable objects to hide: `one` drawn each epoch, or `all`, one by one.
        train: Whether to augment and to follow schedules; otherwise all epochs are equal.
        augment: Options of `Augment`; None: no augmentation.
        min_fraction: Area of the smallest usable box as a fraction of the image.
        max_fraction: Area of the largest usable box.
        shape: Shape of hidden regions; `segment` adds exact masks to the samples.
        partial: Hidden fraction of an object at the start of training, and the progress (0..1)
            from which all of it is hidden; None hides all from the start.
        hide_several: Fraction of the other objects that are hidden too, at the start and at the
            end of training; None hides one at a time.
        read_images: False for grey images.
        labelled: Ids of the labelled images; labels on others become -1. None: all.
        repeat_labelled: How often an image of `labelled` occurs in an epoch; others occur once.
        only: Ids of the images to sample; None: all.
        seed: At least 0.
        epochs: Length of the training, for the schedules.
        prepared: Folder written by `python -m kd.data.prepare` from this dataset.
        cached: Teacher outputs for the hidden objects, added as `stored.NAME`.
        class_maps: Class ids of the pixels, added as `class_maps`.

    Raises:
        UserError: No image has a usable object, or the prepared copy does not fit.
    """

    def __init__(
        self,
        index: CocoIndex,
        *,
        size: int,
        mode: Mode = "one",
        train: bool = True,
        augment: dict[str, Any] | None = None,
        min_fraction: float = 0.0015,
        max_fraction: float = 0.30,
        shape: str = "box",
        partial: tuple[float, float] | None = None,
        hide_several: tuple[float, float] | None = None,
        read_images: bool = True,
        labelled: Collection[int] | npt.NDArray[np.int64] | None = None,
        repeat_labelled: int = 1,
        only: Collection[int] | npt.NDArray[np.int64] | None = None,
        seed: int = 0,
        epochs: int = 1,
        prepared: Path | None = None,
        cached: Sequence[CachedField] = (),
        class_maps: ClassMaps | None = None,
    ) -> None:
        self.index, self.size, self.mode, self.train = index, size, mode, train
        self.augment: Augment | None = build_augment(augment) if train else None
        self.min_fraction, self.max_fraction, self.shape = min_fraction, max_fraction, shape
        self.partial = partial if train else None
        self.hide_several = hide_several if train else None
        self.seed, self.epochs, self.cached = seed, epochs, tuple(cached)
        self.class_maps = class_maps
        self.files = ImageFiles.open(index, size, prepared, read_files=read_images)
        images = self._images_with_usable_objects(only)
        known = known_labels(index, images, labelled)
        times = 1 if labelled is None else repeat_labelled
        self.images, self.known = repeated(images, known, times)

    def __len__(self) -> int:
        """The number of images with a usable object."""
        return len(self.images)

    def together(self, batch_size: int) -> int:
        """Batch size for large images: the same, as all have one square frame."""
        return batch_size

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """Make the sample of (epoch, position): docs/batch.md without the batch's dimension.

        Raises:
            UserError: The image is missing, corrupt, or not of the size in the JSON.
        """
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
        labels = self.index.labels[scene.rows].astype(np.int64)
        if not self.known[position]:
            labels[:] = -1
        sample = {
            "images": pad(scene.plan.image(pixels), self.size),
            "sizes": torch.tensor(scene.plan.size),
            "image_ids": torch.tensor(int(self.index.image_ids[image])),
            "boxes": scene.boxes,
            "labels": torch.from_numpy(labels),
            "object_ids": torch.from_numpy(self.index.object_ids[scene.rows].astype(np.int64)),
            "area_fractions": scene.area_fractions,
            "usable": scene.usable,
            "hidden": candidates,
            "hide_fraction": torch.full((len(candidates),), self._hide_fraction(epoch)),
        }
        if self.hide_several is not None:
            start, end = self.hide_several
            others = np.random.default_rng((_HIDE_SEVERAL_STREAM, self.seed, epoch, position))
            fraction = start + (end - start) * epoch / max(1, self.epochs - 1)
            sample["also_hidden"] = torch.from_numpy(others.random(len(labels)) < fraction)
        if self.class_maps is not None:
            sample["class_maps"] = self.class_maps(image, scene.plan, original)
        if self.shape == "segment":
            sample["segments"] = self._segments(scene, candidates, original)
        hidden = sample["object_ids"][candidates].numpy()
        for output in self.cached:
            sample[f"{PREFIX}{output.name}"] = output(hidden, scene.plan, original, self.size)
        return sample

    def usable_rows(self) -> npt.NDArray[np.int64]:
        """Rows of the index of all usable objects on the sampled images, (K,)."""
        rows, owners = self._usable_rows()
        return rows[np.isin(owners, self.images)]

    def _usable_rows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        index = self.index
        counts = np.diff(index.first)
        files = np.repeat(index.heights.astype(np.int64) * index.widths, counts)
        usable = self._usable(area_fractions(index.boxes, files))
        if index.scored is not None:
            usable &= index.scored
        return np.flatnonzero(usable), np.repeat(np.arange(len(index)), counts)[usable]

    def _images_with_usable_objects(
        self, only: Collection[int] | npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.int64]:
        index = self.index
        images = np.unique(self._usable_rows()[1]).astype(np.int64)
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
                "%s: %d of %d images left out, which have no object between %s",
                *(index.annotation_file, len(index) - len(images), len(index), limits),
            )
        return images

    def image_file(self, image: int) -> tuple[Path, tuple[int, int]]:
        """The (prepared) file of an image of the index, its height and width."""
        return self.files.file(image)

    def _draw_scene(self, image: int, size: tuple[int, int], random: np.random.Generator) -> _Scene:
        """Draw an augmentation; without one if it would lose every usable object."""
        if self.augment is not None:
            scene = self._place(image, self.augment.draw(random, size), size)
            if scene.usable.any():
                return scene
        return self._place(image, None, size)

    def _place(self, image: int, plan: Plan | None, size: tuple[int, int]) -> _Scene:
        index = self.index
        if plan is None:  # exactly the fractions that the image was chosen by
            plan, found = Plan(size=size), objects_of(index, image, size)
        else:
            assert self.augment is not None
            found = moved_objects(index, image, size, plan, min_visible=self.augment.min_visible)
        usable = self._usable(found.fractions)
        if index.scored is not None:
            usable &= index.scored[found.rows]
        fractions = torch.from_numpy(found.fractions).float()
        return _Scene(plan, found.rows, found.boxes, fractions, torch.from_numpy(usable))

    def _usable(self, fractions: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        return (fractions >= self.min_fraction) & (fractions <= self.max_fraction)

    def _hide_fraction(self, epoch: int) -> float:
        if self.partial is None:
            return 1.0
        start, until = self.partial
        return hide_fraction(epoch / max(1, self.epochs), start=start, until=until)

    def _segments(self, scene: _Scene, hidden: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks of the hidden objects; the object's box where a mask is empty."""
        drawn = [self.index.mask_of(int(row), size) for row in scene.rows[hidden.numpy()]]
        masks = pad(scene.plan.masks(torch.from_numpy(np.stack(drawn))), self.size)
        empty = ~masks.flatten(1).any(dim=1)
        if empty.any():
            masks[empty] = hidden_regions(scene.boxes[hidden[empty]], (self.size, self.size))
        return masks
