"""Parse and validate COCO JSONs; error messages name the file, the entry and its id."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from kd.errors import UserError, raise_first

Json = dict[str, Any]


def read_json(path: Path) -> tuple[Any, str]:
    """Parse a JSON file; return its value and the file's SHA-256 in hexadecimal."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: annotation file not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the annotation file: {error.strerror}") from None
    digest = hashlib.sha256(data).hexdigest()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); is it JSON?") from None
    del data
    try:
        return json.loads(text), digest
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {_json_mistake(text, error)}") from None
    except RecursionError:
        raise UserError(f"{path}: not COCO layout: nested too deeply") from None


def _json_mistake(text: str, error: json.JSONDecodeError) -> str:
    end = text.rstrip("\0 \t\r\n")  # a crash of the file system may leave zero bytes
    if not end:
        return "the annotation file is empty; fetch it again"
    size = len(text.encode())
    if not end.endswith("}"):
        line = text.count("\n", 0, len(end)) + 1
        return f"JSON cut off at byte {size} (line {line}); the copy is incomplete, fetch it again"
    byte = len(text[: error.pos].encode())
    return f"not valid JSON: {error.msg} at byte {byte} of {size} (line {error.lineno})"


def _is_id(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def is_number(value: object) -> bool:
    """Whether a value is a finite int or float; bools are not numbers."""
    # Comparisons also exclude NaN and infinity; isfinite would fail for integers above 1e308.
    return type(value) in (int, float) and -1e18 < value < 1e18  # type: ignore[operator]


def _image_mistake(entry: Json) -> str | None:
    for side in ("width", "height"):
        value = entry.get(side)
        if value is None:
            return f"'{side}' is missing"
        if not is_number(value) or not 1 <= value < 2**31 or int(value) != value:
            return f"'{side}' is {value!r}; expected an integer of pixels above 0"
    if not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
        return f"'file_name' is {entry.get('file_name')!r}; expected a name"
    return None


def _annotation_mistake(entry: Json) -> str | None:
    for key in ("image_id", "category_id"):
        if not _is_id(entry.get(key)):
            return f"'{key}' is {entry.get(key)!r}; expected an integer"
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return f"'bbox' is {str(box)[:80]}; expected 4 finite numbers x, y, width, height"
    return None


def _category_mistake(entry: Json) -> str | None:
    if not isinstance(entry.get("name"), str):
        return f"'name' is {entry.get('name')!r}; expected text"
    if not isinstance(entry.get("look"), str | None):
        return f"'look' is {entry['look']!r}; expected the name of a group of confusable classes"
    return None


_SECTIONS: dict[str, tuple[str, Callable[[Json], str | None]]] = {
    "images": ("image", _image_mistake),
    "categories": ("category", _category_mistake),
    "annotations": ("annotation", _annotation_mistake),
}


def check_layout(dataset: Any, path: Path) -> None:
    """Check that a parsed JSON has the keys and types of a COCO instances file."""
    if isinstance(dataset, list):
        raise UserError(
            f"{path}: not COCO layout: a list; is it a file of detection results? "
            "Expected an object with 'images', 'annotations' and 'categories'"
        )
    missing = [key for key in _SECTIONS if not isinstance(dataset, dict) or key not in dataset]
    if missing:
        raise UserError(f"{path}: not COCO layout: no {', '.join(map(repr, missing))}")
    for key, (word, check) in _SECTIONS.items():
        if not isinstance(dataset[key], list):
            raise UserError(f"{path}: not COCO layout: '{key}' is not a list")
        if not dataset[key]:
            raise UserError(f"{path}: empty dataset: '{key}' has no entry")
        mistakes = []
        for position, entry in enumerate(dataset[key]):
            if not isinstance(entry, dict) or not _is_id(entry.get("id")):
                mistakes.append(f"{path}: {key}[{position}]: no 'id' that is an integer")
            elif (mistake := check(entry)) is not None:
                mistakes.append(f"{path}: {word} {entry['id']}: {mistake}")
        raise_first(mistakes)


def check_references(coco: COCO, path: Path) -> None:
    """Check that ids are unique, and that annotations refer to listed images and categories."""
    for key, (word, _) in _SECTIONS.items():
        raise_first(
            [
                f"{path}: {word} id {entry_id} is used {times} times; ids must differ"
                for entry_id, times in Counter(entry["id"] for entry in coco.dataset[key]).items()
                if times > 1
            ]
        )
    raise_first(
        [
            f"{path}: annotation {entry['id']}: {word} {entry[f'{word}_id']} is not in '{key}'"
            for entry in coco.dataset["annotations"]
            for key, word, known in (
                ("images", "image", coco.imgs),
                ("categories", "category", coco.cats),
            )
            if entry[f"{word}_id"] not in known
        ]
    )


def read_coco(path: Path) -> tuple[COCO, str]:
    """Read, check and index a COCO JSON; return it and the file's SHA-256."""
    dataset, digest = read_json(path)
    check_layout(dataset, path)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = dataset
        coco.createIndex()
    check_references(coco, path)
    return coco, digest
