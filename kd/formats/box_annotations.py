"""Tools for converting box annotations to COCO JSONs, shared by the VOC and KITTI readers.

Objects that a benchmark ignores become crowds in the JSON.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.errors import UserError
from kd.utils.io import cache_path, may_write, write_atomic

_LISTED = 5
Json = dict[str, Any]
Corners = tuple[float, float, float, float]


class CocoContent:
    """Builder of a COCO JSON's content; category ids start at 1."""

    def __init__(self, classes: Sequence[str], description: str) -> None:
        self._ids = {name: number for number, name in enumerate(classes, start=1)}
        self._info = {"description": description}
        self._images: list[Json] = []
        self._objects: list[Json] = []

    def add_image(self, image_id: int, file_name: str, *, height: int, width: int) -> None:
        """Add an image; objects added next belong to it."""
        image = {"id": image_id, "file_name": file_name, "height": height, "width": width}
        self._images.append(image)

    def add_object(self, name: str, corners: Corners, *, crowd: bool, **fields: object) -> None:
        """Add an object to the last image; evaluation ignores detections that match a `crowd`.

        `corners` are x1, y1, x2, y2 in continuous pixel coordinates: x from 0 to 16 is 16 pixels
        wide.
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
        """Return the content; raise a UserError prefixed with `where` if it has no objects."""
        if not self._objects:
            count = len(self._images)
            raise UserError(f"{where}: no object of a known class in {count} images")
        categories = [{"id": number, "name": name} for name, number in self._ids.items()]
        return {"info": self._info, "images": self._images, "categories": categories,
                "annotations": self._objects}  # fmt: skip


def joined(contents: Sequence[Json], folders: Sequence[str]) -> Json:
    """Concatenate COCO JSONs that have the same classes.

    Each JSON's image folder (`folders`) is prepended to its file names. Image ids are renumbered
    from 1 only if they clash; object ids always are.
    """
    images = [(n, image) for n, content in enumerate(contents) for image in content["images"]]
    unique = len({image["id"] for _, image in images}) == len(images)
    ids = {
        (n, image["id"]): image["id"] if unique else place
        for place, (n, image) in enumerate(images, start=1)
    }
    objects = [(n, one) for n, content in enumerate(contents) for one in content["annotations"]]
    description = " + ".join(content["info"]["description"] for content in contents)
    return {
        "info": {"description": description},
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
    """Write `instances_NAME.json` to `root/annotations`, or to the cache if that is read-only.

    An existing file with the same content is not rewritten, so its index stays valid.
    """
    data = json.dumps(content, separators=(",", ":")).encode()
    paths = instances_paths(root, name)
    for path in paths:
        if path.is_file() and path.read_bytes() == data:
            return path
    for path in paths:
        with contextlib.suppress(UserError):
            if may_write(path.parent):
                write_atomic(path, lambda partial: partial.write_bytes(data))
                return path
    raise UserError(
        f"{paths[0]}: cannot be written, and neither can {paths[1]}; set KD_CACHE to a "
        "writable folder with enough space"
    )


def instances_paths(root: Path, name: str) -> tuple[Path, Path]:
    """The paths where `instances_file` may write: beside the data, and in the cache."""
    file = f"instances_{name}.json"
    return root / "annotations" / file, cache_path("boxed", root, file)


def split_names(path: Path, folder: Path) -> list[tuple[int, str]]:
    """Read a split's file, one image per line, as (line number, image name) pairs."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = sorted(one.stem for one in folder.glob("*.txt"))
        more = ", ..." if len(others) > _LISTED else ""
        known = f"; there are {', '.join(others[:_LISTED])}{more}" if others else ""
        raise UserError(f"{path}: no such split{known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) > 1:
            message = f"{line.strip()!r}, expected one image name; is this a list of one class?"
            raise UserError(f"{path}:{number}: {message}")
        if words[0] in lines:
            raise UserError(f"{path}:{number}: {words[0]} is also listed on line {lines[words[0]]}")
        lines[words[0]] = number
    if not lines:
        raise UserError(f"{path}: empty split: no image names")
    return [(number, name) for name, number in lines.items()]


def image_ids(names: Sequence[str]) -> list[int]:
    """Derive image ids from the digits in image names: 2007_000027 has id 2007000027.

    If any name has no digits or more than 18, or if ids clash, images are numbered from 1 instead.
    """
    digits = ["".join(letter for letter in name if letter in "0123456789") for name in names]
    if all(digits) and len(set(map(int, digits))) == len(names) and max(map(len, digits)) < 19:
        return [int(one) for one in digits]
    return list(range(1, len(names) + 1))
