"""Read and write COCO detection results, and read the ground truth they are scored against."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd.errors import UserError, raise_first
from kd.formats.coco_validate import is_number, read_coco, read_json
from kd.metrics.coco_ap import Boxes
from kd.utils.io import write_text

_log = logging.getLogger("kd")
Json = dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """Ground truth for evaluating detections: I images (with or without objects) and C classes.

    `image_ids` (I,) and `category_ids` (C,) are int64, ascending; the other fields follow their
    order. `sizes` is (I, 2) int64, height and width in pixels. `confusable_groups` names each
    class's group of confusable classes, or is None. `boxes` includes crowds, in the JSON's order.
    """

    path: Path
    image_ids: npt.NDArray[np.int64]
    file_names: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    category_ids: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    confusable_groups: tuple[str | None, ...]
    boxes: Boxes


@dataclass(frozen=True)
class Detections:
    """The D detections in a results file; `boxes` and `scores`, (D,) float64, follow `entries`."""

    path: Path
    entries: list[Json]  # the parsed JSON
    boxes: Boxes
    scores: npt.NDArray[np.float64]
    sha256: str


def read_truth(path: Path) -> Truth:
    """Read a COCO instances JSON as the ground truth of an evaluation."""
    content = read_coco(path)[0].dataset
    images = sorted(content["images"], key=lambda entry: int(entry["id"]))
    categories = sorted(content["categories"], key=lambda entry: int(entry["id"]))
    image_ids = np.array([entry["id"] for entry in images], dtype=np.int64)
    category_ids = np.array([entry["id"] for entry in categories], dtype=np.int64)
    objects = content["annotations"]
    boxes = _boxes(objects, image_ids, category_ids)
    areas = [entry.get("area") for entry in objects]
    given = np.array([area if is_number(area) else np.nan for area in areas], dtype=np.float64)
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in objects])
    return Truth(
        path=path,
        image_ids=image_ids,
        file_names=tuple(str(entry["file_name"]) for entry in images),
        sizes=np.array([[entry["height"], entry["width"]] for entry in images], dtype=np.int64),
        category_ids=category_ids,
        class_names=tuple(str(entry["name"]) for entry in categories),
        confusable_groups=tuple(entry.get("look") for entry in categories),
        boxes=replace(boxes, areas=np.where(np.isnan(given), boxes.areas, given), crowd=crowd),
    )


def read_detections(path: Path, truth: Truth, *, probabilities: bool = False) -> Detections:
    """Read a results file and check that `truth` contains its images and classes.

    Boxes of zero area are kept with a warning; they are false positives, as in pycocotools. If
    `probabilities`, scores must be in 0..1; otherwise any finite number is valid, such as a logit.
    """
    entries, digest = read_json(path)
    if not isinstance(entries, list):
        raise UserError(
            f"{path}: not COCO results: expected a list of "
            '{"image_id", "category_id", "bbox", "score"}; is it an annotation file?'
        )
    if not entries:
        raise UserError(f"{path}: the list of results is empty")
    images, categories = set(truth.image_ids.tolist()), set(truth.category_ids.tolist())
    mistakes = (_mistake(entry, images, categories, truth.path, probabilities) for entry in entries)
    raise_first([f"{path}: result {n}: {text}" for n, text in enumerate(mistakes) if text])
    scores = np.array([entry["score"] for entry in entries], dtype=np.float64)
    boxes = _boxes(entries, truth.image_ids, truth.category_ids)
    if empty := int((boxes.xywh[:, 2:] == 0).any(axis=1).sum()):
        _log.warning(
            "%s: %d of %d results have a box without an area; they match nothing and count as "
            "false positives, as in pycocotools", path, empty, len(entries),
        )  # fmt: skip
    return Detections(path, entries, boxes, scores, digest)


def write_detections(path: Path, entries: Sequence[Json], scores: Sequence[float]) -> None:
    """Write the detections `entries` with new scores; all other fields stay unchanged."""
    changed = [{**entry, "score": score} for entry, score in zip(entries, scores, strict=True)]
    text = json.dumps(changed, separators=(",", ":"))
    write_text(path, text + "\n")


def by_image(boxes: Boxes, images: int) -> Iterator[npt.NDArray[np.int64]]:
    """For each image, yield the indices of its boxes in ascending order."""
    order = np.argsort(boxes.image, kind="stable")
    bounds = np.searchsorted(boxes.image[order], np.arange(images + 1))
    for start, end in pairwise(bounds.tolist()):
        yield order[start:end]


def corners(xywh: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Convert (K, 4) boxes from x, y, width, height to x1, y1, x2, y2."""
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def _mistake(
    entry: Any, images: set[int], categories: set[int], truth: Path, probabilities: bool
) -> str | None:
    """Describe the first mistake in one entry of a results file; None if the entry is valid."""
    if not isinstance(entry, Mapping):
        return f"is {str(entry)[:60]!r}, expected an object with image_id, category_id, bbox, score"
    missing = [key for key in ("image_id", "category_id", "bbox", "score") if key not in entry]
    if missing:
        return f"has no {' and no '.join(map(repr, missing))}"
    if type(entry["image_id"]) is not int or entry["image_id"] not in images:
        return f"image_id {entry['image_id']!r} is not in {truth}; are both of the same split?"
    if type(entry["category_id"]) is not int or entry["category_id"] not in categories:
        return (
            f"category_id {entry['category_id']!r} is not in {truth}; results refer to categories "
            "by id, not by position"
        )
    score = entry["score"]
    if not is_number(score):
        return f"score is {score!r}, expected a finite number"
    if probabilities and not 0 <= score <= 1:
        return f"score is {score!r}, expected a probability, 0..1; apply a sigmoid to logits"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return f"bbox is {str(box)[:60]}, expected 4 finite numbers x, y, width, height"
    if box[2] < 0 or box[3] < 0:
        return f"bbox {box} has a negative side; expected x, y, width, height in pixels"
    return None


def _boxes(
    entries: Sequence[Json], image_ids: npt.NDArray[np.int64], category_ids: npt.NDArray[np.int64]
) -> Boxes:
    """Convert JSON entries to arrays; areas are those of the boxes."""
    images = np.array([entry["image_id"] for entry in entries], dtype=np.int64)
    labels = np.array([entry["category_id"] for entry in entries], dtype=np.int64)
    xywh = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    return Boxes(
        image=np.searchsorted(image_ids, images),
        label=np.searchsorted(category_ids, labels),
        xywh=xywh,
        areas=xywh[:, 2] * xywh[:, 3],
        crowd=np.zeros(len(entries), np.bool_),
    )
