"""COCO-format datasets as flat arrays, shared by all worker processes on a machine.

The JSON is converted once to an index, a folder of .npy files beside it (`instances_x.kdindex/`),
and later opened in seconds by memory mapping.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle_masks

from kd.errors import UserError
from kd.formats.coco_index import CROWD_PREFIX, check_images_exist, open_arrays, up_to_date_index
from kd.formats.rle import decode, resize_nearest
from kd.utils.images import read_image

log = logging.getLogger(__name__)

_LISTED = 5


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """Images and usable objects of one COCO JSON: I images, M objects, C classes.

    The arrays are read-only memory maps; pickling stores only their paths. Each object is one row
    of the arrays of length M. The objects of image `i` are the rows `first[i]:first[i + 1]`.

    `crowds` is an index of the same images with crowds (`iscrowd`) instead of objects. `skipped`
    and `notes` count the objects, polygons or images that were skipped, or were corrected or
    suspicious.
    """

    annotation_file: Path
    image_folder: Path
    index_folder: Path
    image_ids: npt.NDArray[np.int64]  # (I,), in the JSON's order
    heights: npt.NDArray[np.int32]  # (I,), pixels
    widths: npt.NDArray[np.int32]  # (I,), pixels
    name_bytes: npt.NDArray[np.uint8]  # UTF-8 bytes of all file names, concatenated
    name_first: npt.NDArray[np.int64]  # (I + 1,), start of each name in `name_bytes`
    first: npt.NDArray[np.int64]  # (I + 1,), first row of each image's objects
    object_ids: npt.NDArray[np.int64]  # (M,), annotation ids
    boxes: npt.NDArray[np.float32]  # (M, 4), xyxy in pixels of the image file, clipped to the image
    labels: npt.NDArray[np.int16]  # (M,), 0..C-1 by ascending category id
    areas: npt.NDArray[np.float32]  # (M,), square pixels; the box area if the JSON has no area
    points: npt.NDArray[np.float32]  # (P, 2), x and y of all polygon corners in pixels
    ring_first: npt.NDArray[np.int64]  # start of each polygon in `points`
    rings_of: npt.NDArray[np.int64]  # (M + 1,), start of each object's polygons in `ring_first`
    rle_bytes: npt.NDArray[np.uint8]  # run lengths of objects that have no polygons
    rle_first: npt.NDArray[np.int64]  # (M + 1,), start of each object's run lengths in `rle_bytes`
    class_names: tuple[str, ...]  # C names, in the order of `category_ids`
    category_ids: tuple[int, ...]  # ascending
    confusable_groups: tuple[str | None, ...]  # each class's group of confusable classes, or None
    # By reason: crowd, zero_area, outside_image, tiny (a side below 1 pixel).
    skipped: dict[str, int]
    # By kind: clipped, bad_ring, bad_run_lengths, without_segment, images_without_object.
    notes: dict[str, int]
    fingerprint: str  # hash of the JSON, with the version of the reader
    # (M,), False for context objects that are never hidden or scored; None if there are none.
    scored: npt.NDArray[np.bool_] | None = None
    crowds: CocoIndex | None = None  # None if there are no crowds

    @property
    def num_classes(self) -> int:
        """Number of categories C, including categories without objects."""
        return len(self.class_names)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the paths; each worker memory-maps the files itself."""
        arguments = (self.index_folder, self.annotation_file, self.image_folder, self.fingerprint)
        return _reopen, arguments

    def file_name(self, image: int) -> str:
        """File name of the image, relative to `image_folder`."""
        start, end = self.name_first[image], self.name_first[image + 1]
        return self.name_bytes[start:end].tobytes().decode("utf-8", "surrogateescape")

    def path(self, image: int) -> Path:
        """Path of the image."""
        return self.image_folder / self.file_name(image)

    def image_of(self, row: int) -> int:
        """Index of the image (not its id) that contains object `row`."""
        return int(np.searchsorted(self.first, row, side="right")) - 1

    def size_of(self, image: int) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return int(self.heights[image]), int(self.widths[image])

    def rows_of(self, image: int) -> npt.NDArray[np.int64]:
        """Rows of the image's objects."""
        return np.arange(int(self.first[image]), int(self.first[image + 1]))

    def polygons_of(self, row: int) -> list[npt.NDArray[np.float32]]:
        """Polygons of object `row`, each (n, 2) x, y in pixels; empty if it has no polygons."""
        rings = range(int(self.rings_of[row]), int(self.rings_of[row + 1]))
        return [self.points[self.ring_first[r] : self.ring_first[r + 1]] for r in rings]

    def mask_of(self, row: int, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Draw object `row` as a mask of `size` = (height, width), to which its image is scaled.

        An object without segmentation is drawn as its box. An object thinner than one pixel at this
        scale may give an empty mask.
        """
        whole = self.size_of(self.image_of(row))
        scale = np.array([size[1] / whole[1], size[0] / whole[0]], np.float64)
        start, end = self.rle_first[row], self.rle_first[row + 1]
        if end > start:
            rle = {"size": list(whole), "counts": self.rle_bytes[start:end].tobytes()}
            return resize_nearest(decode(rle), size)
        # Round to the JSON's decimals: float32 noise would shift corners between two pixels.
        exact = [ring.astype(np.float64).round(3) for ring in self.polygons_of(row)]
        rings = [(ring * scale).ravel().tolist() for ring in exact]
        if not rings:
            x1, y1, x2, y2 = (self.boxes[row] * np.tile(scale, 2)).tolist()
            rings = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        parts = rle_masks.frPyObjects(rings, *size)
        return decode(rle_masks.merge(parts))


def load_coco(
    annotation_file: str | Path,
    image_folder: str | Path,
    *,
    check_images: bool = True,
    categories_from: CocoIndex | None = None,
) -> CocoIndex:
    """Open a COCO-format dataset, building its index if necessary, and log the skipped objects.

    The index is stored beside the JSON, or in `$KD_CACHE` (`~/.cache/kd`) if that folder is
    read-only. `check_images` checks that all image files exist, without decoding them.
    `categories_from` is a dataset that must have the same categories, such as the train split.
    Raises a UserError if a file is missing or invalid, if categories differ, or if the index cannot
    be written.
    """
    json_file, images = Path(annotation_file), Path(image_folder)
    folder = up_to_date_index(json_file)
    index = _open(folder, json_file, images)
    if categories_from is not None:
        _check_same_categories(index, categories_from)
    if check_images:
        names = (index.file_name(image) for image in range(len(index)))
        check_images_exist(names, images, json_file)
    _report(index)
    return index


def _open(folder: Path, annotation_file: Path, image_folder: Path) -> CocoIndex:
    arrays, meta = open_arrays(folder)
    categories = meta["categories"]
    objects: dict[str, Any] = {}
    crowds: dict[str, Any] = {}
    for name, values in arrays.items():
        which = crowds if name.startswith(CROWD_PREFIX) else objects
        which[name.removeprefix(CROWD_PREFIX)] = values
    index = CocoIndex(
        annotation_file=annotation_file,
        image_folder=image_folder,
        index_folder=folder,
        **objects,
        class_names=tuple(entry["name"] for entry in categories),
        category_ids=tuple(entry["id"] for entry in categories),
        confusable_groups=tuple(entry["look"] for entry in categories),
        skipped=meta["skipped"],
        notes=meta["notes"],
        fingerprint=f"{meta['sha256'][:32]}-v{meta['reader_version']}",
    )
    return replace(index, crowds=replace(index, **({"scored": None} | crowds))) if crowds else index


def _reopen(folder: Path, annotation_file: Path, images: Path, fingerprint: str) -> CocoIndex:
    index = _open(folder, annotation_file, images)
    if index.fingerprint != fingerprint:
        raise UserError(f"{annotation_file}: the file changed during the run; run again")
    return index


def _check_same_categories(index: CocoIndex, other: CocoIndex) -> None:
    here = dict(zip(index.category_ids, index.class_names, strict=True))
    there = dict(zip(other.category_ids, other.class_names, strict=True))
    differing = sorted(key for key in here | there if here.get(key) != there.get(key))
    if not differing:
        return
    listed = "; ".join(
        f"id {key}: {here.get(key, '(none)')} here, {there.get(key, '(none)')} there"
        for key in differing[:_LISTED]
    )
    more = f"; and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
    raise UserError(
        f"{index.annotation_file}: categories differ from those of {other.annotation_file}: "
        f"{listed}{more}. Use files of one dataset"
    )


def _report(index: CocoIndex) -> None:
    counts = f"{len(index)} images, {len(index.object_ids)} objects, {index.num_classes} classes"
    remarks = [f"{count} {reason}" for reason, count in index.notes.items()]
    if not index.skipped and not remarks:
        log.info("%s: %s", index.annotation_file, counts)
        return
    reasons = [f"{count} {reason}" for reason, count in index.skipped.items()]
    text = "; ".join(
        f"{word}: {', '.join(items)}"
        for word, items in (("skipped", reasons), ("noted", remarks))
        if items
    )
    log.warning("%s: %s; %s", index.annotation_file, counts, text.replace("_", " "))
    outside = index.skipped.get("outside_image", 0)
    beyond = index.notes.get("clipped", 0) + outside
    if 2 * beyond > len(index.object_ids) + outside:
        log.warning(
            "%s: most boxes reach beyond their images; is 'bbox' x, y, width, height as in COCO, "
            "or the corners x1, y1, x2, y2?", index.annotation_file,
        )  # fmt: skip


def check_images_decode(index: CocoIndex) -> list[str]:
    """Decode all images; return an error message for each unreadable image or wrong image size."""
    mistakes = []
    for image in range(len(index)):
        try:
            read_image(index.path(image), None, expected=index.size_of(image))
        except UserError as error:
            mistakes.append(f"{error} (image {index.image_ids[image]} of {index.annotation_file})")
    return mistakes


def visible_objects(index: CocoIndex, image_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count the other objects in each hidden object's image, given the K image ids: (K,)."""
    order = np.argsort(index.image_ids, kind="stable")
    images = order[np.searchsorted(index.image_ids, image_ids, sorter=order)]
    return np.asarray(np.diff(index.first)[images] - 1, dtype=np.int64)
