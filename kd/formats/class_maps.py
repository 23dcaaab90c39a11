"""Class-id maps: drawn once from the annotations, stored, and loaded.

0 is background, 1 + c is class c. Smaller objects are drawn over larger ones. Each object is its
exact segment if it has one, else its box, drawn at the size of the map, which is only resampled by
nearest neighbour.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from kd.errors import UserError
from kd.formats.coco import CocoIndex
from kd.storage.store import IDS, Store
from kd.transforms.augment import Plan, pad
from kd.utils.images import scaled_size
from kd.utils.io import cache_path, may_write

log = logging.getLogger(__name__)

VERSION = 1  # increase when the same annotations give other maps
SHARD_BYTES = 64 << 20

Map = npt.NDArray[np.uint8 | np.int16]


class ClassMaps:
    """Class-id maps of a dataset, stored at one size (long side, pixels).

    They are drawn on first use into a folder beside the dataset's index, or in the cache if that is
    read-only, and redrawn when the annotations or the way of drawing have changed.
    """

    def __init__(self, index: CocoIndex, size: int) -> None:
        self.index, self.size = index, size
        self.store = Store(_folder_of(index, size))
        parent = Path(self.store.url).parent
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / ".lock"):  # one process draws, the others wait
            self._draw()

    @property
    def about(self) -> dict[str, Any]:
        """Everything that the maps depend on."""
        return {"maps": VERSION, "data": self.index.fingerprint, "size": self.size}

    def __call__(self, image: int, plan: Plan, size: tuple[int, int]) -> Tensor:
        """Load the map of an image and apply the plan of its image.

        Args:
            image: Position in the index.
            plan: Augmentation of the image.
            size: Height and width of the input image, whose long side is that of the maps.

        Returns:
            (size, size) uint8, or int16 for 256 or more classes; 0 in the padding.
        """
        ids = self.index.image_ids[image : image + 1].astype(np.int64)
        own = scaled_size(*self.index.size_of(image), self.size)
        stored = torch.from_numpy(self.store.read(ids)["values"])[:, : own[0], : own[1]]
        if own != size:  # sides of a prepared copy are rounded twice
            stored = F.interpolate(stored[None].float(), size, mode="nearest")[0].to(stored.dtype)
        return pad(plan.masks(stored), self.size)[0]

    def _draw(self) -> None:
        """Draw missing, outdated and corrupt maps."""
        store, index = self.store, self.index
        manifest = store.manifest()
        per_shard = max(1, SHARD_BYTES // (self.size**2 * _dtype(index).itemsize))
        if manifest is None or manifest["about"] != self.about:
            if manifest is not None:
                log.warning("%s: class maps of other annotations, redrawing", store.url)
            store.create(self.about, -(-len(index) // per_shard))
        for name in store.remove_corrupt():
            log.warning("%s/%s: corrupt shard, redrawing", store.url, name)
        missing = store.missing()
        if missing:
            log.info("drawing class maps of %s (once), storing them in %s", index.annotation_file,
                     store.url)  # fmt: skip
        for number in missing:
            images = range(number * per_shard, min((number + 1) * per_shard, len(index)))
            values = np.zeros((len(images), self.size, self.size), _dtype(index))
            for row, image in zip(values, images, strict=True):
                drawn = draw_class_map(index, image, scaled_size(*index.size_of(image), self.size))
                row[: drawn.shape[0], : drawn.shape[1]] = drawn
            ids = index.image_ids[images.start : images.stop].astype(np.int64)
            store.write_shard(number, {IDS: ids, "values": values})


def draw_class_map(index: CocoIndex, image: int, size: tuple[int, int], *, crowd: int = 0) -> Map:
    """Draw the objects of an image (a position in the index), the largest first.

    Returns:
        (height, width): 0 for background, 1 + c for class c, `crowd` where only crowds are.
    """
    drawn = np.zeros(size, _dtype(index))
    if crowd and index.crowds is not None:
        for row in index.crowds.rows_of(image).tolist():
            drawn[index.crowds.mask_of(row, size)] = crowd
    rows = index.rows_of(image)
    for row in rows[np.argsort(-index.areas[rows], kind="stable")]:
        drawn[index.mask_of(int(row), size)] = 1 + int(index.labels[row])
    return drawn


def _dtype(index: CocoIndex) -> np.dtype[Any]:
    return np.dtype(np.uint8 if index.num_classes < 256 else np.int16)


def _folder_of(index: CocoIndex, size: int) -> Path:
    """Folder of the maps: beside the index, or in the cache if that is read-only."""
    beside = index.index_folder.with_name(f"{index.annotation_file.stem}.class_maps-{size}")
    for folder in (beside, cache_path("class_maps", beside, beside.name)):
        if folder.exists() or may_write(folder.parent):
            return folder
    raise UserError(
        f"{beside.parent}: cannot store class maps here; set KD_CACHE to a writable folder"
    )
