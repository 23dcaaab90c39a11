"""Class-id maps of images, drawn once from COCO annotations and stored.

In a map, 0 is background and 1 + c is class c. Each object is drawn as its segment, or as its box
if it has none; smaller objects are drawn over larger ones.
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

VERSION = 1  # increase when the same annotations would be drawn differently
SHARD_BYTES = 64 << 20

Map = npt.NDArray[np.uint8 | np.int16]


class ClassMaps:
    """Class-id maps of a dataset's images, stored with a long side of `size` pixels.

    The maps are drawn on first use and redrawn when the annotations or the drawing code change.
    They are stored beside the dataset's index, or in the cache if that folder is read-only.
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
        """Everything that the maps depend on; stored maps with another value are redrawn."""
        return {"maps": VERSION, "data": self.index.fingerprint, "size": self.size}

    def __call__(self, image: int, plan: Plan, size: tuple[int, int]) -> Tensor:
        """Load the map of image number `image` and augment it like the image.

        `size` is the image's height and width before augmentation, at the scale of the maps.
        Returns a square map of the training size, uint8 (int16 for 256 or more classes), with 0 in
        the padding.
        """
        ids = self.index.image_ids[image : image + 1].astype(np.int64)
        own = scaled_size(*self.index.size_of(image), self.size)
        stored = torch.from_numpy(self.store.read(ids)["values"])[:, : own[0], : own[1]]
        if own != size:  # the short side of a prepared copy was rounded twice
            stored = F.interpolate(stored[None].float(), size, mode="nearest")[0].to(stored.dtype)
        return pad(plan.masks(stored), self.size)[0]

    def _draw(self) -> None:
        """Draw all missing, outdated and corrupt maps."""
        store, index = self.store, self.index
        manifest = store.manifest()
        per_shard = max(1, SHARD_BYTES // (self.size**2 * _dtype(index).itemsize))
        if manifest is None or manifest["about"] != self.about:
            if manifest is not None:
                log.warning("%s: class maps of other annotations; redrawing them", store.url)
            store.create(self.about, -(-len(index) // per_shard))
        for name in store.remove_corrupt():
            log.warning("%s/%s: corrupt shard, redrawing", store.url, name)
        missing = store.missing()
        if missing:
            log.info(
                "drawing the class maps of %s into %s; this happens only once",
                index.annotation_file, store.url,
            )  # fmt: skip
        for number in missing:
            images = range(number * per_shard, min((number + 1) * per_shard, len(index)))
            values = np.zeros((len(images), self.size, self.size), _dtype(index))
            for row, image in zip(values, images, strict=True):
                drawn = draw_class_map(index, image, scaled_size(*index.size_of(image), self.size))
                row[: drawn.shape[0], : drawn.shape[1]] = drawn
            ids = index.image_ids[images.start : images.stop].astype(np.int64)
            store.write_shard(number, {IDS: ids, "values": values})


def draw_class_map(index: CocoIndex, image: int, size: tuple[int, int], *, crowd: int = 0) -> Map:
    """Draw the classes of all objects in an image on a map of `size` = (height, width).

    Background is 0 and class c is 1 + c. Smaller objects cover larger ones. Pixels that only crowds
    cover have the value `crowd`.
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
    """Folder for the maps: beside the index, or in the cache if that is read-only."""
    beside = index.index_folder.with_name(f"{index.annotation_file.stem}.class_maps-{size}")
    for folder in (beside, cache_path("class_maps", beside, beside.name)):
        if folder.exists() or may_write(folder.parent):
            return folder
    raise UserError(
        f"{beside.parent}: cannot store class maps here; set KD_CACHE to a writable folder"
    )
