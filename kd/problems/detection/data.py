"""Detection datasets: the train and val splits, and samples of images with boxes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd.data.annotated import (
    ImageFiles,
    Objects,
    moved_objects,
    objects_of,
)
from kd.data.loader import Sample
from kd.errors import UserError
from kd.formats.coco import CocoIndex
from kd.formats.coco_results import Truth, read_truth
from kd.formats.kitti import kitti_truth
from kd.formats.splits import objects_on
from kd.metrics.kitti_ap import KittiTruth
from kd.problems import problem
from kd.problems.base import Classes, Problem, Split
from kd.problems.objects.data import (
    AnnotatedDataset,
    AnnotatedSamples,
    Ids,
    ObjectsDataset,
    open_objects,
    smoothed,
)
from kd.problems.objects.schema import ObjectsSection
from kd.storage.fields import PREFIX
from kd.transforms.augment import Augment, Plan, build_augment

_SAMPLE_STREAM = 4  # separates the random numbers of samples from those of the loader's order
_NO_CHANGE = Augment(
    flip=0, shift=0, rotate=0, crop=0, rgb_shift=0, shuffle=0, grey=0, blur=0, jitter=0
)


class DetectionSamples(AnnotatedSamples):
    """Samples of images with boxes, including images without objects.

    In training, images are rescaled at random, then cropped at random or padded to the frame. Boxes
    are clipped at the border and dropped if less than `augment.min_visible` of their area is left
    or a side is below one pixel. Evaluation samples are whole images with all boxes.

    Args:
        index: Images and boxes. Crowd regions become the entry `crowds`, never `boxes`.
        size: Side of the square frame, pixels.
        train: True: random scaling and augmentation. False: every epoch is the same.
        augment: Options of `kd.transforms.augment.Augment`; None: random scaling and cropping only.
        scales: Range of the training images' long side, as factors of `size`.
        only: Ids of the images to use; None: all.
        prepared: Copy of this dataset written by `python -m kd.data.prepare`.
        options: `labelled`, `repeat_labelled` and `cached` of `AnnotatedSamples`.
    """

    def __init__(
        self, index: CocoIndex, *, size: int, train: bool = True,
        augment: dict[str, Any] | None = None, scales: tuple[float, float] = (1.0, 1.0),
        only: Ids | None = None, seed: int = 0, prepared: Path | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if not 0 < scales[0] <= scales[1]:
            raise UserError(f"scales: expected 0 < smallest <= largest, got {scales}")
        self.augment: Augment = build_augment(augment) or _NO_CHANGE
        self.scales = scales
        largest = max(size, round(size * scales[1])) if train else size
        files = ImageFiles.open(index, size, prepared, largest=largest)
        images = np.arange(len(index))
        if only is not None:
            images = images[np.isin(index.image_ids, np.asarray(list(only)))]
        if not len(images):
            raise UserError(f"{index.annotation_file}: none of the selected images is in this file")
        super().__init__(index, images, files, train=train, seed=seed, **options)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, position = place
        image = int(self.images[position])
        pixels, plan = self._draw(image, epoch, position)
        size = (pixels.shape[1], pixels.shape[2])
        found = self._objects(self.index, image, size, plan, min_visible=self.augment.min_visible)
        sample = self.entries(position, pixels, plan, found)
        crowds = torch.empty(0, 4)
        if self.index.crowds is not None:  # kept if any part of a crowd is visible
            crowds = self._objects(self.index.crowds, image, size, plan, min_visible=0.0).boxes
        sample |= {
            "own_sizes": torch.tensor(self.index.size_of(image)),
            "labelled": torch.tensor(bool(self.known[position])),
            "crowds": crowds,
        }
        ids = np.array([int(sample["image_ids"])])
        for output in self.cached:
            sample[f"{PREFIX}{output.name}"] = output(ids, plan, size, self.size)
        return sample

    def _draw(self, image: int, epoch: int, position: int) -> tuple[Tensor, Plan]:
        """Read an image, rescaled at random in training, and draw its geometric transform."""
        if not self.train:
            pixels = self.files.read(image)
            return pixels, Plan(size=(pixels.shape[1], pixels.shape[2]))
        random = np.random.default_rng((_SAMPLE_STREAM, self.seed, epoch, position))
        side = max(1, round(self.size * random.uniform(*self.scales)))
        pixels = self.files.read(image, side)
        size = (pixels.shape[1], pixels.shape[2])
        return pixels, self.augment.draw(random, size, frame=self.size)

    def _objects(
        self, index: CocoIndex, image: int, size: tuple[int, int], plan: Plan, *,
        min_visible: float,
    ) -> Objects:  # fmt: skip
        if not self.train:
            return objects_of(index, image, size)
        return moved_objects(index, image, size, plan, min_visible=min_visible, cut_at_crop=True)


@dataclass(frozen=True)
class DetectionDataset(AnnotatedDataset):
    """A dataset of images with boxes for training and evaluating detectors."""

    @property
    def problem(self) -> Problem[Any]:
        return problem("detection")

    @property
    def objects(self) -> ObjectsDataset:
        """The same dataset for context teachers: scenes with one object hidden at a time."""
        return ObjectsDataset(self.section, self.train, self.val)

    def class_info(self) -> Classes:
        """Class names, class prior and val ground truth (for KITTI, with difficulties)."""
        return Classes(
            self.class_names, self.prior(), self.val.confusable_groups, where=self.section.name,
            truth=lambda: self._val_truth,
        )  # fmt: skip

    @cached_property
    def _val_truth(self) -> tuple[Truth, KittiTruth | None]:
        """All val boxes, crowds included, and KITTI's ground truth (None for other datasets)."""
        truth = read_truth(self.val.annotation_file)
        return truth, kitti_truth(truth) if self.section.layout == "kitti" else None

    def prior(self, images: Collection[int] | None = None) -> npt.NDArray[np.float64]:
        """Class fractions (C,) of train objects on `images` (ids; None: all), add-one smoothed."""
        rows, _ = objects_on(self.train, images)
        return smoothed(np.bincount(self.train.labels[rows], minlength=self.num_classes))

    def samples(self, split: Split, **options: Any) -> DetectionSamples:
        """Samples of a split; `options` override settings of the data section."""
        section = self.section
        if not section.images:
            raise UserError(
                f"{section.name}: detectors need images, but data.images is false; set it to true"
            )
        prepared = Path(section.prepared) / split if section.prepared else None
        return DetectionSamples(
            self.split(split), size=section.size, augment=section.augment,
            scales=section.scales, repeat_labelled=section.repeat_labelled, prepared=prepared,
            **{"train": False, **options},
        )  # fmt: skip


def open_detection(section: ObjectsSection) -> DetectionDataset:
    """Open both splits of a dataset; render the embedded scenes if they do not exist yet."""
    opened = open_objects(section)
    return DetectionDataset(section, opened.train, opened.val)
