"""Label-map datasets in published layouts, and label maps drawn from COCO annotations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kd.errors import UserError
from kd.formats import LAYOUTS
from kd.formats.class_maps import draw_class_map
from kd.formats.coco import CocoIndex
from kd.formats.splits import Layout, check_files, images_in
from kd.registry import resolve
from kd.utils.images import UNREADABLE, VOID

_IDS = ("L", "P", "1")  # Pillow modes with up to 8 bits per pixel
_FEW_BITS = ("L;2", "L;4")  # grey PNGs of 2 and 4 bits, which Pillow rescales to 0..255
UNKNOWN = -1  # value in an id table for ids that must not occur in a file

Table = NDArray[np.int16]  # (256,): class of each id in a file


def id_table(classes: Mapping[int, int] | int, *, void: int | tuple[int, ...] = ()) -> Table:
    """Build a table from the ids in label-map files to classes, `VOID` or `UNKNOWN`.

    `classes` maps ids to classes; a number C means that ids 0..C-1 are the classes themselves.
    `void` lists the ids of unlabelled pixels. All other ids are `UNKNOWN`.
    """
    table = np.full(256, UNKNOWN, np.int16)
    pairs = {c: c for c in range(classes)} if isinstance(classes, int) else dict(classes)
    for number, label in pairs.items():
        table[number] = label
    for number in (void,) if isinstance(void, int) else void:
        table[number] = VOID
    return table


def read_label_map(path: Path, table: Table, *, expected: tuple[int, int] | None = None) -> Tensor:
    """Read a label map (8-bit grey or palette PNG) as classes and `VOID`: (H, W) uint8.

    `table` maps the file's ids to classes (see `id_table`). `expected` is the image's (height,
    width).
    """
    try:
        with Image.open(path) as file:
            mode = file.mode
            if mode not in _IDS:
                raise UserError(_mode_message(path, mode))
            if file.tile and file.tile[0].args in _FEW_BITS:
                raise UserError(
                    f"{path}: a grey label map of {file.tile[0].args[-1]} bits; save it with 8"
                )
            numbers = np.asarray(file).astype(np.uint8)
    except UserError:  # not caught below, although a UserError is a ValueError
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: the label map is missing") from error
    except UNREADABLE as error:
        raise UserError(f"{path}: this label map cannot be read: {error}") from error
    if expected is not None and numbers.shape != expected:
        height, width = numbers.shape
        raise UserError(
            f"{path}: the label map is {width} x {height}, but its image is {expected[1]} x "
            f"{expected[0]}; scale it without interpolation (nearest), or find the right one"
        )
    labels = table[numbers]
    if (wrong := labels == UNKNOWN).any():
        row, column = (int(place) for place in np.argwhere(wrong)[0])
        found = ", ".join(str(number) for number in np.unique(numbers[wrong])[:5].tolist())
        raise UserError(
            f"{path}: {int(wrong.sum())} pixels have ids that are not of this dataset: {found}; "
            f"the first is at x {column}, y {row}"
        )
    return torch.from_numpy(labels.astype(np.uint8))


def _mode_message(path: Path, mode: str) -> str:
    if mode.startswith("I"):
        return f"{path}: a label map of 16 bits; save it with 8 bits (ids 0 to 255)"
    return (
        f"{path}: an image of colours ({mode}), not of class ids; save it as a grey or palette PNG "
        "whose pixel values are the ids"
    )


CAMVID_CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
          "pedestrian", "cyclist")  # fmt: skip
CITYSCAPES_CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip
VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
_LISTS = "ImageSets/Segmentation"
_ADE_FOLDERS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class LabelMapSplit:
    """A split of a semantic segmentation dataset: images, each with a label map.

    `label_map(index, (height, width))` returns the label map of an image, (H, W) uint8 of classes
    and `VOID`. It raises a `UserError` if the map is missing, corrupt or of another size. `where`
    is the file or folder of the split, for error messages.
    """

    where: str
    images: tuple[Path, ...]
    class_names: tuple[str, ...]
    label_map: Callable[[int, tuple[int, int]], Tensor]


def coco_label_maps(index: CocoIndex) -> LabelMapSplit:
    """Open a COCO-format split as label maps: 0 is background; smaller objects are drawn on top."""
    images = tuple(index.path(number) for number in range(len(index)))
    names = ("background", *index.class_names)
    return LabelMapSplit(str(index.annotation_file), images, names, partial(_drawn_map, index))


# A split's `label_map` is a partial of a module-level function because workers receive it pickled.
def _drawn_map(index: CocoIndex, number: int, size: tuple[int, int]) -> Tensor:
    """Draw the label map of image `number`; crowds become `VOID`."""
    own = index.size_of(number)
    if own != size:
        raise UserError(
            f"{index.path(number)}: is {size[1]} x {size[0]} pixels, {index.annotation_file} says "
            f"{own[1]} x {own[0]}"
        )
    return torch.from_numpy(draw_class_map(index, number, own, crowd=VOID).astype(np.uint8))


def _read_map(maps: Sequence[Path], table: Table, number: int, size: tuple[int, int]) -> Tensor:
    return read_label_map(maps[number], table, expected=size)


def split_of_files(
    where: Path,
    pairs: Sequence[tuple[Path, Path]],
    class_names: tuple[str, ...],
    table: Table,
) -> LabelMapSplit:
    """Build a split from (image file, label-map file) pairs, after checking that all files exist.

    `where` is the prefix of error messages; for `table` see `id_table`.
    """
    if not pairs:
        raise UserError(f"{where}: empty split: no images")
    images, maps = zip(*pairs, strict=True)
    check_files({"image": images, "label map": maps})
    return LabelMapSplit(str(where), images, class_names, partial(_read_map, maps, table))


def open_label_maps(layout: str, root: Path, split: str) -> LabelMapSplit:
    """Open a split (`train`, `val` or `test`) of a published dataset."""
    found: Layout = resolve(LAYOUTS, layout, what="layout")
    found.check(root, layout, split)
    opened: LabelMapSplit = found.open(root, split)
    return opened


def _camvid(root: Path, split: str) -> LabelMapSplit:
    """Open CamVid: `train/*.png`, `trainannot/*.png`; an optional `train.txt` lists the images."""
    images, maps, listing = root / split, root / f"{split}annot", root / f"{split}.txt"
    found = images_in(images)
    if listing.is_file():
        # Some copies of CamVid list the paths of images and maps, others the images' names.
        lines = [line.split() for line in listing.read_text().splitlines()]
        names = [Path(words[0]).stem for words in lines if words]
        found = _listed(found, names, listing, images)
    pairs = [(path, maps / f"{name}.png") for name, path in found.items()]
    return split_of_files(
        images, pairs, CAMVID_CLASSES, id_table(len(CAMVID_CLASSES), void=(11, 255))
    )


def _cityscapes(root: Path, split: str) -> LabelMapSplit:
    """Open Cityscapes: `leftImg8bit/SPLIT/*/*_leftImg8bit.png`, `gtFine/SPLIT/*/*_labelIds.png`."""
    images, end = root / "leftImg8bit" / split, "_leftImg8bit.png"
    pairs = []
    for path in sorted(images.glob(f"*/*{end}")):
        name = f"{path.name.removesuffix(end)}_gtFine_labelIds.png"
        pairs.append((path, root / "gtFine" / split / path.parent.name / name))
    classes = {number: label for label, number in enumerate(CITYSCAPES_CLASSES)}
    others = tuple(number for number in range(34) if number not in classes)
    return split_of_files(
        images, pairs, tuple(CITYSCAPES_CLASSES.values()), id_table(classes, void=(*others, 255))
    )


def _ade20k(root: Path, split: str) -> LabelMapSplit:
    """Open ADE20K: `images/training/*.jpg`, `annotations/training/*.png`; id 0 is `VOID`."""
    folder = _ADE_FOLDERS[split]
    images = root / "images" / folder
    pairs = [
        (path, root / "annotations" / folder / f"{name}.png")
        for name, path in images_in(images).items()
    ]
    classes = {number: number - 1 for number in range(1, 151)}
    return split_of_files(images, pairs, _ade_names(root), id_table(classes, void=0))


def _voc2012(root: Path, split: str) -> LabelMapSplit:
    """Open VOC 2012: the `JPEGImages` and `SegmentationClass` files listed in the split's .txt."""
    listing = root / _LISTS / f"{split}.txt"
    names = listing.read_text().split()
    pairs = [
        (root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png")
        for name in names
    ]
    return split_of_files(listing, pairs, VOC_CLASSES, id_table(len(VOC_CLASSES), void=255))


def _folders(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*") if path.is_dir()]


def _ade_splits(root: Path) -> list[str]:
    there = _folders(root / "images")
    return [split for split, folder in _ADE_FOLDERS.items() if folder in there]


def _camvid_splits(root: Path) -> list[str]:
    return [name for name in _folders(root) if not name.endswith("annot")]


CAMVID = Layout(_camvid, "trainannot", _camvid_splits)
CITYSCAPES = Layout(_cityscapes, "leftImg8bit", lambda root: _folders(root / "leftImg8bit"))
ADE20K = Layout(_ade20k, "annotations/training", _ade_splits)
VOC2012 = Layout(_voc2012, _LISTS, lambda root: [p.stem for p in (root / _LISTS).glob("*.txt")])


def _ade_names(root: Path) -> tuple[str, ...]:
    """Read the first name of each class from `objectInfo150.txt`; "class N" if it is missing."""
    listing = root / "objectInfo150.txt"
    if not listing.is_file():
        return tuple(f"class {number}" for number in range(1, 151))
    rows = [line.split("\t") for line in listing.read_text("utf-8").splitlines()[1:] if line]
    names = tuple(row[-1].split(",")[0].strip() for row in rows)
    if len(names) != 150:
        raise UserError(f"{listing}: {len(names)} classes, expected 150")
    return names


def _listed(
    found: dict[str, Path], names: Iterable[str], listing: Path, folder: Path
) -> dict[str, Path]:
    names = list(dict.fromkeys(names))
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"{listing}: {len(missing)} of its images, such as {missing[0]}, are not in {folder}"
        )
    return {name: found[name] for name in names}
