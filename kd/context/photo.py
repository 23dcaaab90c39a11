"""Read a user's own images at full size and at a model's, upright, with their known objects."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd.errors import UserError
from kd.formats.coco import load_coco
from kd.utils.images import read_image

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Photograph:
    """A decoded image.

    Attributes:
        path: Its file.
        pixels: (3, H, W) uint8 RGB.
        scaled: (3, h, w), the image decoded at a model's image size.
        boxes: (M, 4) known objects, xyxy in pixels of `pixels`.
        labels: (M,) int64, -1 for a class that the model does not know.
    """

    path: Path
    pixels: Tensor
    scaled: Tensor
    boxes: Tensor
    labels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of `pixels`."""
        return int(self.pixels.shape[1]), int(self.pixels.shape[2])


class KnownObjects:
    """Looks up the objects of images in a COCO file, by the images' file names.

    Args:
        file: COCO instances JSON; its images need not exist.
        names: The model's class names, to which the file's are matched.

    Raises:
        UserError: The file cannot be read, or shares no class with the model.
    """

    def __init__(self, file: Path, names: Sequence[str]) -> None:
        self.index = load_coco(file, file.parent, check_images=False)
        places = {name: place for place, name in enumerate(names)}
        self.label_of = np.array([places.get(name, -1) for name in self.index.class_names])
        if (self.label_of < 0).all():
            raise UserError(f"{file}: none of its classes is one of the teacher's")
        if strange := [n for n in self.index.class_names if n not in places]:
            log.warning(
                "%s: %d classes are unknown to the teacher, first %r; their objects stay unnamed",
                *(file, len(strange), strange[0]),
            )
        self.rows: dict[str, list[int]] = {}
        for image in range(len(self.index)):
            self.rows.setdefault(Path(self.index.file_name(image)).name, []).append(image)

    def row(self, path: Path) -> int | None:
        """Position of an image in the index; among equal names, the one in the same folders."""
        found = self.rows.get(path.name, [])
        whole = "/" + path.resolve().as_posix()
        close = [row for row in found if whole.endswith("/" + self.index.file_name(row))]
        if len(found) > 1 and len(close) != 1:
            raise UserError(
                f"{path}: {self.index.annotation_file} has {len(found)} images of that name"
            )
        found = close or found
        return found[0] if found else None


def open_photograph(path: Path, size: int, known: KnownObjects | None = None) -> Photograph:
    """Read an image, rotated as its EXIF orientation says.

    Boxes of a COCO file usually belong to the pixels as stored: if the stored size is the file's,
    the image is not rotated.

    Args:
        path: JPEG, PNG, or another format that Pillow reads.
        size: Long side of the model's images.
        known: Known objects of images.

    Raises:
        UserError: The image cannot be read, or its size is not the COCO file's.
    """
    row = None if known is None else known.row(path)
    upright, expected = True, None
    boxes, labels = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    if known is not None and row is not None:
        index, upright = known.index, False
        expected = index.size_of(row)
        rows = index.rows_of(row)
        boxes = torch.from_numpy(index.boxes[rows])
        labels = torch.from_numpy(known.label_of[index.labels[rows]].astype(np.int64))
    elif known is not None:
        log.warning("%s: not in %s; no objects are known", path, known.index.annotation_file)
    try:
        pixels = read_image(path, None, expected=expected, upright=upright)
    except UserError:
        if expected is None:
            raise
        pixels, upright = read_image(path, None, upright=True), True
        if tuple(pixels.shape[1:]) != expected:
            raise
    return Photograph(path, pixels, read_image(path, size, upright=upright), boxes, labels)
