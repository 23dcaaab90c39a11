"""Read annotated images for samples, and augment the objects like their image."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd.data.prepare import PreparedCopy
from kd.errors import UserError
from kd.formats.coco import CocoIndex
from kd.transforms.augment import Plan, visible
from kd.utils.images import grey_image, read_image, scaled_size


def area_fractions(
    boxes: npt.NDArray[np.float32], areas: npt.NDArray[np.int64] | int
) -> npt.NDArray[np.float64]:
    """Fraction of the image area that each of the (K, 4) xyxy boxes covers: (K,)."""
    sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
    fractions: npt.NDArray[np.float64] = sides.prod(axis=1) / areas
    return fractions


def known_labels(
    index: CocoIndex,
    images: npt.NDArray[np.int64],
    labelled: Collection[int] | npt.NDArray[np.int64] | None,
) -> npt.NDArray[np.bool_]:
    """Whether a student may use the labels of each of `images`, which are indices into `index`.

    `labelled` lists the ids of the images with usable labels; None allows all images.
    """
    if labelled is None:
        return np.ones(len(images), np.bool_)
    ids = np.fromiter(labelled, np.int64, len(labelled))
    if len(unknown := ids[~np.isin(ids, index.image_ids)]):
        raise UserError(
            f"labelled: {index.annotation_file} has no image {unknown[0]} "
            f"({len(unknown)} unknown ids)"
        )
    return np.isin(index.image_ids[images], ids)


def repeated(
    images: npt.NDArray[np.int64], known: npt.NDArray[np.bool_], times: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Repeat images with known labels until each occurs `times` times; return both arrays."""
    again = np.tile(np.flatnonzero(known), times - 1)
    return np.concatenate([images, images[again]]), np.concatenate([known, known[again]])


@dataclass(frozen=True)
class ImageFiles:
    """Reader of a dataset's images, scaled to a long side of `size` pixels.

    Images are read from the dataset's folder or from the resized copy `prepared`. If `read_files`
    is false, all images are grey and no files are read.
    """

    index: CocoIndex
    size: int
    prepared: PreparedCopy | None = None
    read_files: bool = True

    @staticmethod
    def open(
        index: CocoIndex,
        size: int,
        prepared: Path | None,
        *,
        largest: int | None = None,
        read_files: bool = True,
    ) -> ImageFiles:
        """Open a dataset's images, or their resized copy in the folder `prepared`.

        The long side of the copy must be at least `largest` pixels, by default `size`.
        """
        copy = None
        if prepared is not None:
            at_least = size if largest is None else largest
            copy = PreparedCopy.open(prepared, at_least=at_least, fingerprint=index.fingerprint)
        return ImageFiles(index, size, copy, read_files)

    def file(self, image: int) -> tuple[Path, tuple[int, int]]:
        """Path of the file an image is read from, and the file's height and width."""
        stored = self.index.size_of(image)
        if self.prepared is None:
            return self.index.path(image), stored
        path = self.prepared.path(self.index.file_name(image))
        return path, self.prepared.image_size(*stored)

    def read(self, image: int, size: int | None = None) -> Tensor:
        """Read an image scaled to a long side of `size` (default: `self.size`): (3, h, w) uint8."""
        path, expected = self.file(image)
        side = self.size if size is None else size
        if not self.read_files:
            return grey_image(scaled_size(*expected, side))
        return read_image(path, side, expected=expected)


class Objects(NamedTuple):
    """Objects of one image, in the coordinates of one sample.

    `rows` (K,) are rows of the dataset's index, `boxes` are (K, 4) xyxy in pixels, and `fractions`
    (K,) are the fractions of the image area that the boxes cover.
    """

    rows: npt.NDArray[np.int64]
    boxes: Tensor
    fractions: npt.NDArray[np.float64]


def objects_of(index: CocoIndex, image: int, size: tuple[int, int]) -> Objects:
    """All objects of an image, in coordinates of the image scaled to `size` = (height, width)."""
    rows, original = index.rows_of(image), index.size_of(image)
    scale = torch.tensor([size[1] / original[1], size[0] / original[0]]).repeat(2)
    stored = index.boxes[rows]
    fractions = area_fractions(stored, original[0] * original[1])
    return Objects(rows, torch.from_numpy(stored) * scale, fractions)


def moved_objects(
    index: CocoIndex,
    image: int,
    size: tuple[int, int],
    plan: Plan,
    *,
    min_visible: float,
    cut_at_crop: bool = False,
) -> Objects:
    """Objects of a scaled image that stay visible after an augmentation, clipped to the frame.

    `size` is the (height, width) of the scaled image. At least the fraction `min_visible` of a box,
    and one pixel, must stay visible. `cut_at_crop` also clips boxes to the plan's crop, which
    excludes the black border added by shifts and rotations.
    """
    rows, boxes, _ = objects_of(index, image, size)
    whole = moved = plan.boxes(boxes, size)
    there = torch.ones(len(rows), dtype=torch.bool)
    if cut_at_crop and plan.crop is not None:
        top, left, height, width = plan.crop
        corners = boxes.new_tensor([[left, top], [left + width, top + height]]).repeat(1, 2)
        boxes = boxes.clamp(corners[0], corners[1])
        moved = plan.boxes(boxes, size)
        there = (boxes[:, :2] < boxes[:, 2:]).all(dim=1)  # a rotated box of no width gets an area
    boxes, remain = visible(moved, plan.size, min_visible, whole=whole)
    remain &= there
    boxes, rows = boxes[remain], rows[remain.numpy()]
    return Objects(rows, boxes, area_fractions(boxes.numpy(), plan.size[0] * plan.size[1]))
