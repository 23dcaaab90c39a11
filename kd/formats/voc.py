"""Convert Pascal VOC's boxes to COCO JSONs (Everingham et al., doi:10.1007/s11263-009-0275-4).

A year's folder contains `Annotations/*.xml`, `ImageSets/Main/*.txt` and `JPEGImages`. VOC's
coordinates are one-based and inclusive: x from 1 to 16 becomes 0 to 16 in the JSON. Difficult
objects become crowds, which training skips and `kd.metrics.voc_ap` ignores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from kd.errors import UserError
from kd.formats.box_annotations import CocoContent, Corners, Json, image_ids, split_names
from kd.formats.segmentation import VOC_CLASSES
from kd.formats.splits import images_in
from kd.registry import suggestion

CLASSES = VOC_CLASSES[1:]  # without the background
_FLAGS = ("difficult", "truncated", "occluded")


@dataclass
class _Node:
    """An XML element, with the line number where it starts."""

    tag: str
    line: int
    text: str = ""
    children: list[_Node] = field(default_factory=list)

    def child(self, tag: str) -> _Node | None:
        return next((one for one in self.children if one.tag == tag), None)


def voc_to_coco(folder: Path, split: str, *, classes: Sequence[str] = CLASSES) -> Json:
    """Convert a split in VOC's layout, maybe of a custom dataset, to the content of a COCO JSON.

    `folder` is a year's folder, such as `VOCdevkit/VOC2007`. `split` is a file name in
    `ImageSets/Main` without suffix. Category ids start at 1, in the order of `classes`. Annotations
    also have `difficult`, `truncated` and `occluded`, each 0 or 1; `iscrowd` equals `difficult`.
    """
    lists = folder / "ImageSets" / "Main"
    where = lists / f"{split}.txt"
    listed = split_names(where, lists)
    images = images_in(folder / "JPEGImages")
    content = CocoContent(classes, f"Pascal VOC {year_of(folder)} {split}")
    for image_id, (line, name) in zip(image_ids([name for _, name in listed]), listed, strict=True):
        if name not in images:
            raise UserError(f"{where}:{line}: no image {folder / 'JPEGImages' / name}.jpg")
        path = folder / "Annotations" / f"{name}.xml"
        if not path.is_file():
            raise UserError(
                f"{where}:{line}: no annotation file {path}; some test splits' are not public"
            )
        _add(content, path, image_id, images[name].name, classes)
    return content.done(where)


def year_of(folder: Path) -> str:
    """Year of a folder named `VOC<year>`; any other folder's whole name."""
    return folder.absolute().name.removeprefix("VOC")


def _add(
    content: CocoContent, path: Path, image_id: int, file_name: str, classes: Sequence[str]
) -> None:
    """Add the image and the objects of one XML file."""
    top = _parse(path)
    if top.tag != "annotation":
        raise UserError(f"{path}:{top.line}: expected <annotation>, got <{top.tag}>")
    size = _required(top, "size", path)
    height, width = (int(_number(size, side, path)) for side in ("height", "width"))
    if height < 1 or width < 1:
        raise UserError(f"{path}:{size.line}: the image is {width} x {height} pixels")
    content.add_image(image_id, file_name, height=height, width=width)
    for entry in top.children:
        if entry.tag != "object":
            continue
        name = _required(entry, "name", path)
        if name.text not in classes:
            hint = suggestion(name.text, list(classes))
            own = ". Set custom classes with `classes: [...]` in the data section"
            raise UserError(f"{path}:{name.line}: unknown class {name.text!r}{hint}{own}")
        flags = {flag: _flag(entry, flag, path) for flag in _FLAGS}
        crowd = bool(flags["difficult"])
        content.add_object(name.text, _corners(entry, path), crowd=crowd, **flags)


def _corners(entry: _Node, path: Path) -> Corners:
    """Read an object's box as continuous, zero-based x1, y1, x2, y2."""
    box = _required(entry, "bndbox", path)
    x1, y1, x2, y2 = (_number(box, side, path) for side in ("xmin", "ymin", "xmax", "ymax"))
    if x2 < x1 or y2 < y1:
        raise UserError(
            f"{path}:{box.line}: this box has no area: x {x1:g} to {x2:g}, y {y1:g} to {y2:g}"
        )
    return x1 - 1, y1 - 1, x2, y2


def _required(parent: _Node, tag: str, path: Path) -> _Node:
    found = parent.child(tag)
    if found is None:
        raise UserError(f"{path}:{parent.line}: <{parent.tag}> has no <{tag}>")
    return found


def _number(parent: _Node, tag: str, path: Path) -> float:
    found = _required(parent, tag, path)
    try:
        value = float(found.text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}:{found.line}: <{tag}> is {found.text!r}, expected a number")
    return value


def _flag(parent: _Node, tag: str, path: Path) -> int:
    """Read a flag, 0 or 1; a missing flag is 0."""
    found = parent.child(tag)
    if found is None:
        return 0
    if found.text not in ("0", "1"):
        raise UserError(f"{path}:{found.line}: <{tag}> is {found.text!r}, expected 0 or 1")
    return int(found.text)


def _parse(path: Path) -> _Node:
    """Parse an XML file, recording the line number of each element."""
    parser = expat.ParserCreate()
    parser.buffer_text = True
    stack = [_Node("", 0)]

    def start(tag: str, _: object) -> None:
        node = _Node(tag, parser.CurrentLineNumber)
        stack[-1].children.append(node)
        stack.append(node)

    def end(_: str) -> None:
        node = stack.pop()
        node.text = node.text.strip()

    def text(data: str) -> None:
        stack[-1].text += data

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = text
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        reason = expat.errors.messages[error.code]
        raise UserError(f"{path}:{error.lineno}: not valid XML: {reason}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return stack[0].children[0]
