"""Convert box datasets in published layouts to COCO JSONs on first use.

The JSON is stored beside the data. A second file, `instances_x.made`, records the names, sizes and
times of the source files, so that later runs can reuse the JSON without reading them.
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
from kd.formats.kitti import ALL, kitti_to_coco
from kd.formats.splits import Layout
from kd.formats.voc import CLASSES, voc_to_coco, year_of
from kd.registry import is_foreign, resolve
from kd.utils.io import cache_path, write_text

log = logging.getLogger(__name__)

_SEPARATORS = re.compile(r"[^\w.+-]+")
_VERSION = 1  # increase it to rebuild all stored JSONs


@dataclass(frozen=True)
class BoxSplit:
    """A split in a published layout, from which a COCO JSON can be built.

    The JSON is stored as `folder/annotations/instances_NAME.json`. `read` builds its content from
    the contents of `sources` (files, or folders of files), from the file names in the folders
    `listed`, and from `parameters` such as class names.
    """

    read: Callable[[], Json]
    folder: Path
    name: str
    images: Path  # folder of the images
    sources: tuple[Path, ...]
    listed: tuple[Path, ...] = ()
    parameters: tuple[str, ...] = ()


def coco_split(
    layout: str, root: Path, split: str, classes: Sequence[str] | None = None
) -> tuple[Path, Path]:
    """Return a split's COCO JSON, built if missing or outdated, and its image folder.

    `layout` is a name in `kd.formats.LAYOUTS`, or `package.module:attribute`. For VOC, `root` is
    `VOCdevkit`, `split` includes the year's folder (`VOC2007/trainval`) and may join several years
    with `+`, and `classes` are the class names of a custom dataset.
    """
    made = resolve(LAYOUTS, layout, what="layout")
    if is_foreign(layout):
        content, images = made(root, split)
        return instances_file(content, root, _SEPARATORS.sub("_", f"{layout}_{split}")), images
    found: BoxSplit = made.open(root, split, classes)
    lock = cache_path("boxed", found.folder, "lock")  # the dataset's folder may be read-only
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # if locking fails, every process builds the JSON
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock))
        return _coco_json(found), found.images


def _coco_json(split: BoxSplit) -> Path:
    fingerprint = _fingerprint(split)
    for path in instances_paths(split.folder, split.name):
        with contextlib.suppress(OSError, UnicodeDecodeError):  # there is no JSON or no record
            record = path.with_suffix(".made").read_text(encoding="utf-8")
            if record == _record_of(path, fingerprint):
                return path
    log.info("%s: converting the boxes to a COCO JSON, which happens only once", split.folder)
    path = instances_file(split.read(), split.folder, split.name)
    with contextlib.suppress(UserError):  # without a record the boxes are read again next time
        write_text(path.with_suffix(".made"), _record_of(path, fingerprint))
    return path


def _record_of(path: Path, fingerprint: str) -> str:
    """Content of the `.made` record of a JSON built from sources with this fingerprint."""
    status = path.stat()
    return json.dumps({"sources": fingerprint, "size": status.st_size, "time": status.st_mtime_ns})


def _fingerprint(split: BoxSplit) -> str:
    """Hash the names, sizes and times of all source files, and the parameters."""
    lines = [str(_VERSION), *split.parameters]
    for path in split.sources:
        lines += sorted(_file_states(path))
    for folder in split.listed:
        with contextlib.suppress(OSError):
            lines += sorted(os.listdir(folder))
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _file_states(path: Path) -> Iterator[str]:
    """Yield name, size and time of a file or of each file in a folder; nothing if missing."""
    with contextlib.suppress(OSError):
        if not path.is_dir():
            yield f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
            return
        with os.scandir(path) as entries:
            for entry in entries:
                # On a case-insensitive disk, VOC's folder Annotations also contains our JSONs.
                if entry.name.startswith("instances_"):
                    continue
                yield f"{entry.name} {entry.stat().st_size} {entry.stat().st_mtime_ns}"


def _voc(root: Path, split: str, classes: Sequence[str] | None) -> BoxSplit:
    """Open a VOC split of one year, or of several years joined by `+`."""
    parts = [_voc_year(root, one, classes) for one in split.split("+")]
    if len(parts) == 1:
        return parts[0]
    if twice := [one.name for one in parts if [each.name for each in parts].count(one.name) > 1]:
        raise UserError(f"{root}: the split {split!r} has {twice[0]} twice")
    folders = [one.images.relative_to(root).as_posix() for one in parts]
    return BoxSplit(
        read=lambda: joined([part.read() for part in parts], folders),
        folder=root,
        name="+".join(part.name for part in parts),
        images=root,
        sources=tuple(dict.fromkeys(path for part in parts for path in part.sources)),
        listed=tuple(dict.fromkeys(path for part in parts for path in part.listed)),
        parameters=parts[0].parameters,
    )


def _voc_year(root: Path, split: str, classes: Sequence[str] | None) -> BoxSplit:
    head, _, name = split.rpartition("/")
    folder = root / head
    if not (folder / "Annotations").is_dir():
        raise UserError(
            f"{folder}: has no Annotations folder; set data.root to VOCdevkit and write each split "
            "with its folder, such as VOC2007/trainval"
        )
    images, annotations = folder / "JPEGImages", folder / "Annotations"
    return BoxSplit(
        read=lambda: voc_to_coco(folder, name, classes=classes or CLASSES),
        folder=folder,
        name=f"voc{year_of(folder)}_{name}",
        images=images,
        sources=(folder / "ImageSets" / "Main" / f"{name}.txt", annotations),
        listed=(images,),
        parameters=tuple(classes or ()),
    )


def _kitti(root: Path, split: str, classes: Sequence[str] | None) -> BoxSplit:
    assert classes is None  # the config schema allows custom classes for VOC only
    labels, images = root / "training" / "label_2", root / "training" / "image_2"
    lists = () if split == ALL else (root / "ImageSets" / f"{split}.txt",)
    return BoxSplit(
        read=lambda: kitti_to_coco(root, split),
        folder=root,
        name=f"kitti_{split}",
        images=images,
        sources=(*lists, labels, images),  # images too, because the JSON has their height and width
    )


def _voc_holds(split: str) -> str:
    head = split.partition("+")[0].rpartition("/")[0]
    return f"{head or '.'}/Annotations"


VOC = Layout(_voc, _voc_holds)
KITTI = Layout(_kitti, "training/label_2")
