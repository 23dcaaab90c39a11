"""Box annotations of other layouts as COCO JSONs: what the readers of each layout share.

A layout's reader (`kd.formats.voc`, `kd.formats.kitti`) makes the content; `instances_file`
keeps it beside the data, where `kd.formats.coco` and `kd.formats.coco_results` read it like any
other. What
a layout wants left out of counting is a crowd there, and its reasons are fields of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd.errors import UserError
from kd.formats.coco_validate import check_layout, is_number, read_json
from kd.utils.io import cache_path, write_atomic

_SHOWN = 5
Json = dict[str, Any]
Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Marks:
    """What layouts say of objects beside class and box; in the order of a JSON's annotations.

    Attributes:
        difficult: (K,) bool.
        truncated: (K,) float64, share outside the image; of VOC 0 or 1.
        occluded: (K,) int64; of KITTI 0 = all in sight to 2 = hardly, 3 = unknown; of VOC 0 or 1.
        types: K names as the layout has them, "" where it has no more than classes.
    """

    difficult: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.float64]
    occluded: npt.NDArray[np.int64]
    types: tuple[str, ...]


class CocoContent:
    """Collects images and objects; `done` is the JSON's content.

    Args:
        classes: Names; their ids count from 1.
        description: What the data are, for the JSON's `info`.
    """

    def __init__(self, classes: Sequence[str], description: str) -> None:
        self._ids = {name: number for number, name in enumerate(classes, start=1)}
        self._info = {"description": description}
        self._images: list[Json] = []
        self._objects: list[Json] = []

    def add_image(self, image_id: int, file_name: str, *, height: int, width: int) -> None:
        """The image that the next objects are on."""
        self._images.append(
            {"id": image_id, "file_name": file_name, "height": height, "width": width}
        )

    def add_object(self, name: str, corners: Corners, *, crowd: bool, **fields: object) -> None:
        """An object of the last image.

        Args:
            name: Of its class.
            corners: x1, y1, x2, y2, pixels, continuous: 0 to 16 is 16 wide.
            crowd: Whether what is found there counts neither way.
            fields: Anything else.
        """
        x1, y1, x2, y2 = corners
        self._objects.append(
            {
                "id": len(self._objects) + 1,
                "image_id": self._images[-1]["id"],
                "category_id": self._ids[name],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": int(crowd),
                **fields,
            }
        )

    def done(self, where: Path) -> Json:
        """The content of the JSON.

        Raises:
            UserError: There is not one object; begins with `where`.
        """
        if not self._objects:
            count = len(self._images)
            raise UserError(f"{where}: not one object of a known class on its {count} images")
        categories = [{"id": number, "name": name} for name, number in self._ids.items()]
        return {
            "info": self._info,
            "images": self._images,
            "categories": categories,
            "annotations": self._objects,
        }


def joined(contents: Sequence[Json], folders: Sequence[str]) -> Json:
    """Several JSONs of the same classes as one.

    Images keep their ids where no two share one, and count from 1 on where some do; objects count
    from 1 on.

    Args:
        contents: Of the JSONs.
        folders: Where the images of each are, seen from the folder of all: it becomes a part of
            their file names.
    """
    images = [(n, image) for n, content in enumerate(contents) for image in content["images"]]
    kept = len({image["id"] for _, image in images}) == len(images)
    ids = {
        (n, image["id"]): image["id"] if kept else place
        for place, (n, image) in enumerate(images, start=1)
    }
    objects = [(n, one) for n, content in enumerate(contents) for one in content["annotations"]]
    said = " + ".join(content["info"]["description"] for content in contents)
    return {
        "info": {"description": said},
        "images": [
            {**image, "id": ids[n, image["id"]], "file_name": f"{folders[n]}/{image['file_name']}"}
            for n, image in images
        ],
        "categories": contents[0]["categories"],
        "annotations": [
            {**one, "id": place, "image_id": ids[n, one["image_id"]]}
            for place, (n, one) in enumerate(objects, start=1)
        ],
    }


def instances_file(content: Mapping[str, Any], root: Path, name: str) -> Path:
    """Keep a JSON in `root/annotations`; where that is read-only, in `$KD_CACHE` or `~/.cache/kd`.

    One that is there and the same is left alone, so that its index stays up to date.

    Args:
        content: Of the JSON.
        root: Of the dataset.
        name: Of the split: the file is `instances_NAME.json`.

    Raises:
        UserError: It cannot be written in either place.
    """
    data = json.dumps(content, separators=(",", ":")).encode()
    paths = instances_paths(root, name)
    for path in paths:
        if path.is_file() and path.read_bytes() == data:
            return path
    for path in filter(_may_write, paths):
        with contextlib.suppress(UserError):
            write_atomic(path, lambda partial: partial.write_bytes(data))
            return path
    raise UserError(
        f"{paths[0]}: cannot be written, and neither can {paths[1]}; set KD_CACHE to a folder with "
        "space that can be written"
    )


def instances_paths(root: Path, name: str) -> tuple[Path, Path]:
    """Where `instances_file` keeps a JSON: beside the data, or else in the cache."""
    file = f"instances_{name}.json"
    return root / "annotations" / file, cache_path("boxed", root, file)


def _may_write(path: Path) -> bool:
    """Whether the folder was not made read-only on purpose, which root would not notice."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    return bool(there.stat().st_mode & 0o222)


def read_marks(path: Path) -> Marks:
    """The fields of a JSON's annotations; where one lacks, its object is an ordinary one.

    Raises:
        UserError: What is wrong with the file, or a field that is not finite.
    """
    content, _ = read_json(path)
    check_layout(content, path)
    objects = content["annotations"]

    def field(name: str) -> npt.NDArray[np.float64]:
        values = [entry.get(name, 0) for entry in objects]
        for entry, value in zip(objects, values, strict=True):
            if not is_number(value):
                raise UserError(
                    f"{path}: annotation {entry['id']}: '{name}' is {value!r}, expected a number"
                )
        return np.array(values, dtype=np.float64)

    return Marks(
        difficult=field("difficult") > 0,
        truncated=field("truncated"),
        occluded=field("occluded").astype(np.int64),
        types=tuple(str(entry.get("type", "")) for entry in objects),
    )


def split_names(path: Path, folder: Path) -> list[tuple[int, str]]:
    """The lines of a split's file that name an image: number and name of each.

    Args:
        path: The file, one name a line.
        folder: Where it lies; its other files are named if this one lacks.

    Raises:
        UserError: It is missing, not text, empty, or a line that is more than a name or the same
            as another.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = sorted(one.stem for one in folder.glob("*.txt"))
        more = ", ..." if len(others) > _SHOWN else ""
        known = f"; there are {', '.join(others[:_SHOWN])}{more}" if others else ""
        raise UserError(f"{path}: no such split{known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) > 1:
            raise UserError(
                f"{path}:{number}: {line.strip()!r} is more than a name; is it the list of one "
                "class?"
            )
        if words[0] in seen:
            raise UserError(f"{path}:{number}: {words[0]} is listed on line {seen[words[0]]} too")
        seen[words[0]] = number
    if not seen:
        raise UserError(f"{path}: empty split: it names no image")
    return [(number, name) for name, number in seen.items()]


def image_ids(names: Sequence[str]) -> list[int]:
    """An id for each name: its digits, 2007000027 of 2007_000027; places from 1 on if not enough.

    Digits are the same in every split; they will do where each name has some and no two agree.
    """
    digits = ["".join(letter for letter in name if letter in "0123456789") for name in names]
    if all(digits) and len(set(map(int, digits))) == len(names) and max(map(len, digits)) < 19:
        return [int(one) for one in digits]
    return list(range(1, len(names) + 1))


def pictures_in(folder: Path, suffixes: Sequence[str]) -> dict[str, str]:
    """Stem to file name of the images of a folder.

    Raises:
        UserError: There is no such folder.
    """
    try:
        with os.scandir(folder) as entries:
            files = sorted(entry.name for entry in entries)
    except OSError as error:
        raise UserError(f"{folder}: image folder cannot be read: {error.strerror}") from None
    return {Path(name).stem: name for name in files if Path(name).suffix.lower() in suffixes}
