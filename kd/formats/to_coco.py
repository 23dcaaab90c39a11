"""Published layouts of boxes, opened as COCO-format datasets: their JSONs are made once.

A JSON lies beside the data (`kd.formats.box_annotations`), and beside it, in `instances_x.made`,
what the files
that it was made from looked like: names, sizes and times. While these are the same nothing is read
again, which for ten thousand small files takes most of a minute on a network's disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from kd.errors import UserError
from kd.formats import LAYOUTS
from kd.formats.box_annotations import Json, instances_file, instances_paths, joined
from kd.formats.kitti import EVERY, kitti_to_coco
from kd.formats.voc import CLASSES, voc_to_coco
from kd.registry import is_foreign, resolve
from kd.utils.io import cache_path, write_text

log = logging.getLogger(__name__)

_SEPARATORS = re.compile(r"[^\w.+-]+")
_VERSION = 1  # of what is made: another one makes all JSONs anew


@dataclass(frozen=True)
class Boxed:
    """A split in a published layout.

    Attributes:
        read: Gives the content of its COCO JSON.
        folder: Whose `annotations` the JSON goes to.
        name: Of the JSON, after `instances_`.
        images: Folder of the images.
        sources: What it is read from: a file, or all files of a folder.
        listed: Folders of which no more than the names of files matters.
        told: What the JSON follows from beside the files.
    """

    read: Callable[[], Json]
    folder: Path
    name: str
    images: Path
    sources: tuple[Path, ...]
    listed: tuple[Path, ...] = ()
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How a dataset lies in its folder.

    Attributes:
        holds: Of a split's name: a path by which the folder is known.
        open: Of the folder, a split's name, and the names of the classes where they are the user's.
    """

    holds: Callable[[str], str]
    open: Callable[[Path, str, Sequence[str] | None], Boxed]


def made_split(
    layout: str, root: Path, split: str, classes: Sequence[str] | None = None
) -> tuple[Path, Path]:
    """A split's COCO JSON, made where there is none or its sources have changed, and its images.

    Args:
        layout: `voc`, `kitti` or `package.module:attribute`, as `kd.formats` says.
        root: The folder that the dataset was unpacked to: of VOC `VOCdevkit`.
        split: Its name: of VOC with its folder, `VOC2007/trainval`; of several years together
            `VOC2007/trainval+VOC2012/trainval`.
        classes: Of a dataset in VOC's layout with classes of its own, their names.

    Raises:
        UserError: An unknown layout, what the layout's reader finds wrong, or a JSON that cannot
            be written.
    """
    made = resolve(LAYOUTS, layout, what="layout")
    if is_foreign(layout):
        content, images = made(root, split)
        return instances_file(content, root, _SEPARATORS.sub("_", f"{layout}_{split}")), images
    found = made.open(root, split, classes)
    lock = cache_path("boxed", found.folder, "lock")  # the data's own folder may be read-only
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without a lock each process does the same work
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock))
        return _made(found), found.images


def _made(split: Boxed) -> Path:
    stamp = _stamp(split)
    for path in instances_paths(split.folder, split.name):
        if _note_of(path, stamp) == _read_note(path):
            return path
    log.info("%s: reading its boxes; once", split.folder)
    path = instances_file(split.read(), split.folder, split.name)
    note = _note_of(path, stamp)
    with contextlib.suppress(UserError):  # without it the boxes are read again next time
        write_text(_note_file(path), str(note))
    return path


def _note_file(path: Path) -> Path:
    return path.with_suffix(".made")


def _note_of(path: Path, stamp: str) -> str | None:
    """What is noted of a JSON made from such sources; None where there is no JSON."""
    try:
        about = path.stat()
    except OSError:
        return None
    return json.dumps({"sources": stamp, "size": about.st_size, "time": about.st_mtime_ns})


def _read_note(path: Path) -> str:
    try:
        return _note_file(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _stamp(split: Boxed) -> str:
    """Of all that a JSON follows from; a change that keeps a file's size and time is not seen."""
    lines = [str(_VERSION), *split.told]
    for path in split.sources:
        lines += sorted(_looks(path))
    for folder in split.listed:
        lines += sorted(_names(folder))
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _looks(path: Path) -> Iterator[str]:
    """Name, size and time of a file, or of all files of a folder; of what is not there nothing."""
    with contextlib.suppress(OSError):
        if not path.is_dir():
            yield f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
            return
        with os.scandir(path) as entries:
            for entry in entries:
                # Where case does not count, VOC's Annotations are the folder of JSONs too.
                if entry.name.startswith("instances_"):
                    continue
                yield f"{entry.name} {entry.stat().st_size} {entry.stat().st_mtime_ns}"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _voc(root: Path, split: str, classes: Sequence[str] | None) -> Boxed:
    """A year's split, or several with `+` between them, whose images are then told by folder."""
    parts = [_voc_year(root, one, classes) for one in split.split("+")]
    if len(parts) == 1:
        return parts[0]
    if twice := [one.name for one in parts if [each.name for each in parts].count(one.name) > 1]:
        raise UserError(f"{root}: train or val {split!r} has {twice[0]} twice")
    folders = [one.images.relative_to(root).as_posix() for one in parts]
    return Boxed(
        read=lambda: joined([part.read() for part in parts], folders),
        folder=root,
        name="+".join(part.name for part in parts),
        images=root,
        sources=tuple(dict.fromkeys(path for part in parts for path in part.sources)),
        listed=tuple(dict.fromkeys(path for part in parts for path in part.listed)),
        told=parts[0].told,
    )


def _voc_year(root: Path, split: str, classes: Sequence[str] | None) -> Boxed:
    head, _, name = split.rpartition("/")
    folder = root / head
    if not (folder / "Annotations").is_dir():
        raise UserError(
            f"{folder}: no Annotations in it; data.root is the folder VOCdevkit, and a split is "
            "named with its folder there: VOC2007/trainval"
        )
    year = folder.absolute().name.removeprefix("VOC")
    images, annotations = folder / "JPEGImages", folder / "Annotations"
    return Boxed(
        read=lambda: voc_to_coco(folder, year, name, classes=classes or CLASSES),
        folder=folder,
        name=f"voc{year}_{name}",
        images=images,
        sources=(folder / "ImageSets" / "Main" / f"{name}.txt", annotations),
        listed=(images,),
        told=tuple(classes or ()),
    )


def _kitti(root: Path, split: str, classes: Sequence[str] | None) -> Boxed:
    assert classes is None  # the schema's rule: KITTI has classes of its own
    labels, images = root / "training" / "label_2", root / "training" / "image_2"
    if not labels.is_dir():
        raise UserError(
            f"{labels}: no such folder; data.root is the folder that KITTI's object detection was "
            "unpacked to, training/ in it"
        )
    lists = () if split == EVERY else (root / "ImageSets" / f"{split}.txt",)
    return Boxed(
        read=lambda: kitti_to_coco(root, split),
        folder=root,
        name=f"kitti_{split}",
        images=images,
        sources=(*lists, labels, images),  # whose sizes are in the JSON
    )


def _voc_holds(split: str) -> str:
    head = split.partition("+")[0].rpartition("/")[0]
    return f"{head or '.'}/Annotations"


VOC = Layout(_voc_holds, _voc)
KITTI = Layout(lambda split: "training/label_2", _kitti)
