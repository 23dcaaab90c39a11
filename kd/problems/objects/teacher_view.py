"""Input of context teachers whose outputs are cached: objects hidden one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.data.loader import Samples
from kd.formats.coco import CocoIndex
from kd.problems.base import Batch, Split
from kd.problems.images import files_hash, mirror_images
from kd.problems.objects.batch import image_rows
from kd.problems.objects.data import ObjectsDataset
from kd.problems.objects.samples import ObjectSamples
from kd.problems.objects.schema import ObjectsSection
from kd.storage.fields import CachedField


@dataclass(frozen=True)
class ObjectsView:
    """Every object of a split, hidden in turn; a record for each, by its annotation id.

    Attributes:
        data: The dataset; its limits on the size of objects do not apply.
        seen: The teacher's data section, for image size and shape of hidden regions.
        split: Train or val.
        unit: What a record belongs to.
        grid: None: all score maps have the shape of the square frame.
    """

    data: ObjectsDataset
    seen: ObjectsSection
    split: Split
    unit: str = "objects"
    grid: None = None

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """Ids of the images with a usable object."""
        return np.asarray(self._index.image_ids[self._whole.images], dtype=np.int64)

    @property
    def records_per_image(self) -> float:
        """Average number of objects per image."""
        return len(self._index.labels) / len(self._index)

    @property
    def provenance(self) -> dict[str, str]:
        """Annotations, image files, and how objects are hidden."""
        whole = self._whole
        files = files_hash(len(whole.images), lambda n: whole.image_file(int(whole.images[n]))[0])
        return {
            "data": self._index.fingerprint,
            "split": self.split,
            "images": files,
            "transform": f"size {self.seen.size}, {self.seen.shape}, rescaled and padded",
        }

    def samples(self, images: NDArray[np.int64] | None = None) -> Samples:
        """Scenes with all their objects hidden in turn."""
        return self._whole if images is None else self._all_sizes.samples(self.split, only=images)

    def records(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The hidden objects."""
        return batch["object_ids"][batch["hidden"]], image_rows(batch)

    def mirrored(self, batch: Batch) -> dict[str, Tensor]:
        """Mirror images, boxes and masks."""
        return mirror_objects(batch)

    def moved(self, cached: Sequence[CachedField], augment: dict[str, Any]) -> Samples:
        """One hidden object per image, augmented together with these outputs."""
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
        """Cached: finding the usable objects of a large dataset takes a while."""
        return self._all_sizes.samples(self.split)


def mirror_objects(batch: Batch) -> dict[str, Tensor]:
    """Mirror images left to right, each within its own size, with their boxes and masks."""
    images, source = mirror_images(batch)
    edge = batch["sizes"][:, 1][batch["image_of"]].to(batch["boxes"].dtype)
    x1, y1, x2, y2 = batch["boxes"].unbind(dim=1)
    boxes = torch.stack([edge - x2, y1, edge - x1, y2], dim=1)
    mirrored = {**batch, "images": images, "boxes": boxes}
    if "segments" in batch:
        rows = source[image_rows(batch)][:, None].expand_as(batch["segments"])
        mirrored["segments"] = batch["segments"].gather(2, rows)
    return mirrored
