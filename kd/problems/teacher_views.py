"""Input of teachers whose outputs are cached: whole images, and helpers for other inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.data.images import ImageSamples
from kd.data.loader import Samples
from kd.errors import UserError
from kd.problems.base import Batch, Dataset, Split
from kd.storage.fields import CachedField

HASHED_FILES = 4096  # at most, evenly spread over the split


class ImagesView:
    """Every image of a split, whole; the id of a record is the image's position in the split.

    Args:
        data: The dataset.
        split: Train or val.
        files: The split's image files.
        open_samples: Makes samples of all images (None) or of those at some positions.
        size: Size of the resized images, for messages and provenance.
        resizes_maps: Whether score maps of images of different sizes are resized to one grid, the
            samples' frame.
    """

    unit = "images"
    records_per_image = 1.0

    def __init__(
        self,
        data: Dataset,
        split: Split,
        files: Sequence[Path],
        open_samples: Callable[[NDArray[np.int64] | None], ImageSamples],
        *,
        size: int | tuple[int, int] | None,
        resizes_maps: bool,
    ) -> None:
        self.data, self.split, self.size = data, split, size
        self._files, self._open = files, open_samples
        self.grid: tuple[int, int] | None = None
        if resizes_maps and not (whole := open_samples(None)).alike:
            self.grid = whole.frame

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Positions in the split."""
        return np.arange(len(self._files), dtype=np.int64)

    @property
    def provenance(self) -> dict[str, str]:
        """Image files and their size."""
        return {
            "data": self.data.section.name,
            "split": self.split,
            "images": files_hash(len(self._files), self._files.__getitem__),
            "transform": f"size {self.size}, whole, sides in multiples of 8",
        }

    def samples(self, images: NDArray[np.int64] | None = None) -> Samples:
        """Whole images of one size, unless maps are resized."""
        samples = self._open(images)
        if not samples.alike and self.grid is None:
            raise UserError(
                f"{self.data.section.name}: images of different sizes have maps of different "
                "sizes, which are not cached: soft_targets.kind=live"
            )
        return samples

    def records(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images themselves."""
        return batch["image_ids"], torch.arange(len(batch["image_ids"]))

    def mirrored(self, batch: Batch) -> dict[str, Tensor]:
        """Mirror the images."""
        return {**batch, "images": mirror_images(batch)[0]}

    def moved(self, cached: Sequence[CachedField], augment: dict[str, Any]) -> Samples:
        """Not supported: crops read cached maps at any scale."""
        raise UserError(f"{self.data.section.name}: cached maps are not compared with moved ones")


def files_hash(count: int, file_of: Callable[[int], Path]) -> str:
    """Hash names and sizes of image files, of at most `HASHED_FILES` of them."""
    some = (file_of(number) for number in range(0, count, max(1, count // HASHED_FILES)))
    text = "\n".join(f"{path.name} {path.stat().st_size}" for path in some)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def mirror_images(batch: Batch) -> tuple[Tensor, Tensor]:
    """Mirror images (N, 3, H, W) left to right, each within its own size without the padding.

    Also return the column that each column is read from, (N, W).
    """
    images, widths = batch["images"], batch["sizes"][:, 1]
    columns = torch.arange(images.shape[-1], device=images.device)
    source = torch.where(columns < widths[:, None], widths[:, None] - 1 - columns, columns)
    return images.gather(3, source[:, None, None].expand_as(images)), source
