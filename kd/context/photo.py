"""Read a user's images and their annotated objects."""

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
    """An image at full and at the model's resolution, with its annotated objects."""

    path: Path
    pixels: Tensor  # (3, H, W) uint8 RGB
    scaled: Tensor  # (3, h, w), decoded at the model's image size
    boxes: Tensor  # (M, 4) annotated objects, xyxy in pixels of `pixels`
    labels: Tensor  # (M,) int64, -1 for a class unknown to the model

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of `pixels`."""
        return int(self.pixels.shape[1]), int(self.pixels.shape[2])


class KnownObjects:
    """Finds the objects of images in a COCO instances JSON, by file name of the images.

    `names` are the model's classes, matched by name. The images in the JSON need not exist.
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
        """Return an image's index in the JSON or None; folders distinguish equal file names."""
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
    """Read an image at full size and with long side `size`, rotated by its EXIF orientation.

    If the COCO JSON lists the image with its stored size, it is not rotated, because COCO boxes
    usually refer to pixels as stored.
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
